"""Causal flash attention for TPU (Mosaic), with queries and keys wider than values.

A grid step is a block of queries against a block of keys of one head; the steps of a head are
listed beforehand, and blocks above the diagonal are not among them. Within a step queries go in
chunks, on the diagonal against the keys up to the chunk's end. Logits lie keys by queries, so
that what there is one of for each query is a row. The compiler keeps the order of matmuls: the
next chunk's logits are asked for before this one's softmax, which then runs beside them.

The gradient is one kernel: for each block of keys it goes through the queries that see it. The
gradients of keys and values stay in VMEM meanwhile, and so does, from block to block of keys,
the gradient of all queries of a span. Of longer rows the spans are done one after another.

Queries may be runs of a row's tokens, wherever they start: the steps are then all blocks of queries
against all of keys, and one that lies above the diagonal neither computes nor copies.

The last chunk's softmax has no matmul beside it. The forward therefore takes twice the block where
blocks pair up: of v5p's MXU slots 0.85 are filled, not 0.81 (0.55 and 0.38 of v6e's, 0.59 and
0.42 of tpu7x's), and keys are read half as often. Four times the block would fill 0.87 with four
times the code.

jax's splash attention takes these widths too, and was compiled first. For v5p, blocks of 1024,
bfloat16, 192 and 128 wide: forward 8,198 bundles a block at 0.70 of the MXU's slots; gradient
22,864 in its two kernels, here 14,917 at 0.99, on the diagonal 9,058 at 0.96. Nor does jax's
interpreter of TPU kernels take it `vmap`ped over rows. tokamax's splash attention, over two rows
of 4,096 and 128 heads: 11.5 million cycles at 0.84 with the best of seven tilings, 8.9 here; one
that fills 0.86 is slower, because it multiplies all of a diagonal block.

Shapes: B rows, S queries, T keys (S of them, but for runs), H heads, A query and key dim, U value
dim, n tokens of a block, Y runs of queries; within a step k keys and q queries of a chunk.
Source: FlashAttention-2 (arXiv:2307.08691), algorithms 1 and 2.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import traffic
from pallas_kernels.varying import varying_like

BLOCK_TOKENS = 1024  # queries and keys of a grid step of the gradient, half of the forward's
CHUNK_TOKENS = 256  # queries at a time within it
MOST_DIM = 256  # of a head: the gradients of a span of queries fit VMEM
SPAN_TOKENS = 16384  # queries whose gradient VMEM holds
VMEM_BYTES = 56 * 2**20  # of the 64 MiB of a tpu7x device, the smallest of the chips supported
LANES = 128
HIDDEN = -1e30  # a logit; not -inf, whose difference to itself is no number

f32 = jnp.float32


def _dot(a, b, contract: tuple[int, int]):
  """Matrix product over one dimension of each, accumulated in float32."""
  return jax.lax.dot_general(
    a,
    b,
    (((contract[0],), (contract[1],)), ((), ())),
    precision=jax.lax.Precision.HIGHEST if a.dtype == f32 else None,
    preferred_element_type=f32,
  )


def _column(row_1n):
  """[1, n] to [n, 1]."""
  return jnp.broadcast_to(row_1n, (8, row_1n.shape[1])).T[:, :1]


def _ids(segments):
  """Segments of queries [1, n] and of keys [n, 1], or None."""
  return None if not segments else (segments[0][...], _column(segments[1][...]))


def _masked(logits_kq, first: int, diagonal: bool, ids):
  """Hides from a chunk of queries, from `first` on, what they must not see."""
  k, q = logits_kq.shape
  visible_kq = None
  if diagonal:
    key, query = (jax.lax.broadcasted_iota(jnp.int32, (k, q), axis) for axis in (0, 1))
    visible_kq = query + first >= key
  if ids is not None:
    same_kq = ids[0][:, first : first + q] == ids[1][:k]
    visible_kq = same_kq if visible_kq is None else visible_kq & same_kq
  return logits_kq if visible_kq is None else jnp.where(visible_kq, logits_kq, HIDDEN)


def _forward_kernel(q_of_ref, k_of_ref, *refs, scale, chunk, runs):
  step, rest = pl.program_id(2), list(refs)
  q_block, k_block = q_of_ref[step], k_of_ref[step]
  if runs:
    turn_of_ref, at_of_ref, *rest = rest
    q_block, k_block = at_of_ref[step], turn_of_ref[step]
  q_ref, k_ref, v_ref, *segments, out_ref, log_z_ref, acc_ref_Uq, top_ref, z_ref = rest
  n = q_ref.shape[0]
  unit = scale * math.log2(math.e)  # so that exp2 will do

  @pl.when(k_block == 0)
  def _():
    acc_ref_Uq[...] = jnp.zeros(acc_ref_Uq.shape, f32)
    top_ref[...] = jnp.full(top_ref.shape, HIDDEN, f32)
    z_ref[...] = jnp.zeros(z_ref.shape, f32)

  def run(diagonal: bool):
    ids = _ids(segments)

    def slices(first):
      return pl.ds(0, first + chunk if diagonal else n), pl.ds(first, chunk)

    def score(first):
      keys, queries = slices(first)
      return _dot(k_ref[keys], q_ref[queries], (1, 1)) * unit

    def attend(logits_kq, first):
      keys, queries = slices(first)
      logits_kq = _masked(logits_kq, first, diagonal, ids)
      # A query that has seen nothing yet sums ones; what it sees later wipes them out, and in
      # its last block it sees itself.
      top_1q = jnp.maximum(top_ref[:, queries], jnp.max(logits_kq, axis=0, keepdims=True))
      p_kq = jnp.exp2(logits_kq - top_1q)
      kept_1q = jnp.exp2(top_ref[:, queries] - top_1q)
      top_ref[:, queries] = top_1q
      z_ref[:, queries] = z_ref[:, queries] * kept_1q + jnp.sum(p_kq, axis=0, keepdims=True)
      values_Uq = _dot(v_ref[keys], p_kq.astype(v_ref.dtype), (0, 0))
      acc_ref_Uq[:, queries] = acc_ref_Uq[:, queries] * kept_1q + values_Uq

    logits_kq = score(0)
    for first in range(0, n, chunk):
      following = score(first + chunk) if first + chunk < n else None
      attend(logits_kq, first)
      logits_kq = following

  @pl.when(k_block < q_block)
  def _():
    run(diagonal=False)

  @pl.when(k_block == q_block)
  def _():
    run(diagonal=True)
    out_ref[...] = (acc_ref_Uq[...] / z_ref[...]).T.astype(out_ref.dtype)
    log_z_ref[...] = top_ref[...] + jnp.log2(z_ref[...])


def _backward_kernel(
  q_of_ref, k_of_ref, _whole_of_ref, *refs, scale, chunk, first_block, num_blocks, runs
):
  step, rest = pl.program_id(2), list(refs)
  q_block, k_block = q_of_ref[step], k_of_ref[step]
  own, first_own = q_block, jnp.maximum(k_block, first_block)
  if runs:
    own_of_ref, at_of_ref, *rest = rest
    own, first_own, q_block = own_of_ref[step], first_block, at_of_ref[step]
  q_ref, k_ref, v_ref, dout_ref, log_z_ref, shared_ref, *rest = rest
  *segments, dq_ref, dk_ref, dv_ref, dq_acc_ref, dk_acc_ref, dv_acc_ref = rest
  n = q_ref.shape[0]
  unit = scale * math.log2(math.e)
  dtype = q_ref.dtype
  place = pl.multiple_of((own - first_block) * n, n)

  @pl.when(step == 0)
  def _():
    dq_acc_ref[...] = jnp.zeros(dq_acc_ref.shape, f32)

  @pl.when(own == first_own)
  def _():
    dk_acc_ref[...] = jnp.zeros(dk_acc_ref.shape, f32)
    dv_acc_ref[...] = jnp.zeros(dv_acc_ref.shape, f32)

  def run(diagonal: bool):
    ids = _ids(segments)

    def slices(first):
      return pl.ds(0, first + chunk if diagonal else n), pl.ds(first, chunk)

    def score(first):
      keys, queries = slices(first)
      logits_kq = _dot(k_ref[keys], q_ref[queries], (1, 1)) * unit
      return logits_kq, _dot(v_ref[keys], dout_ref[queries], (1, 1))

    def attend(scores, first):
      logits_kq, dp_kq = scores
      keys, queries = slices(first)
      logits_kq = _masked(logits_kq, first, diagonal, ids)
      p_kq = jnp.exp2(logits_kq - log_z_ref[:, queries])
      dv_acc_ref[keys] += _dot(p_kq.astype(dtype), dout_ref[queries], (1, 0))
      dlogits_kq = (p_kq * (dp_kq - shared_ref[:, queries])).astype(dtype)
      dk_acc_ref[keys] += _dot(dlogits_kq, q_ref[queries], (1, 0))
      dq_acc_ref[pl.ds(place + first, chunk)] += _dot(dlogits_kq, k_ref[keys], (0, 0))

    scores = score(0)
    for first in range(0, n, chunk):
      following = score(first + chunk) if first + chunk < n else None
      attend(scores, first)
      scores = following

  @pl.when(k_block < q_block)
  def _():
    run(diagonal=False)

  @pl.when(k_block == q_block)
  def _():
    run(diagonal=True)  # the last keys these queries see
    dq_ref[...] = (dq_acc_ref[pl.ds(place, n)] * scale).astype(dq_ref.dtype)

  @pl.when(own == first_block + num_blocks - 1)
  def _():
    dk_ref[...] = (dk_acc_ref[...] * scale).astype(dk_ref.dtype)
    dv_ref[...] = dv_acc_ref[...].astype(dv_ref.dtype)


def _call(name, kernel, steps, counted, inputs, outputs, scratch, flops, transcendentals):
  """Runs a kernel over (rows, heads, steps), with its costs counted.

  Args:
    name: of the kernel.
    kernel: gets the steps' blocks of queries and of keys, inputs, outputs and scratch.
    steps: int32 [n] arrays, blocks of queries, of keys, and what else index maps ask for.
    counted: NumPy arrays like these, by which bytes are counted.
    inputs: (array, spec) of each.
    outputs: (shape, dtype, spec) of each.
    scratch: its shapes.
    flops, transcendentals: of one head of one row.
  """
  B, H = inputs[0][0].shape[:2]
  grid = (B, H, len(steps[0]))
  arrays, in_specs = zip(*inputs)
  out_specs = [spec for _, _, spec in outputs]
  out_shapes = [
    varying_like(jax.ShapeDtypeStruct(shape, dtype), *arrays) for shape, dtype, _ in outputs
  ]
  operands = list(zip(map(traffic.struct, arrays), in_specs)) + list(zip(out_shapes, out_specs))
  # Every head of every row moves as much as the first.
  moved = traffic.bytes_moved((1, 1, grid[2]), operands, counted)
  call = pl.pallas_call(
    kernel,
    out_shape=out_shapes,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=len(steps),
      grid=grid,
      in_specs=in_specs,
      out_specs=out_specs,
      scratch_shapes=scratch,
    ),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
    ),
    cost_estimate=pl.CostEstimate(
      flops=B * H * flops,
      transcendentals=B * H * transcendentals,
      bytes_accessed=B * H * moved,
    ),
    name=name,
  )
  return call(*map(jnp.asarray, steps), *arrays)


def _flops(q_blocks, k_blocks, n: int, chunk: int, dims: int) -> tuple[int, int]:
  """Returns (FLOPs of matmuls over `dims` numbers a logit, logits) of one head's steps."""
  chunks = n // chunk
  on_diagonal = int(np.sum(q_blocks == k_blocks))
  logits = int(np.sum(q_blocks > k_blocks)) * n * n
  logits += on_diagonal * chunk * chunk * (chunks * (chunks + 1) // 2)
  return 2 * logits * dims, logits


def _specs(n: int, segments_B1T, runs: bool):
  """Returns makers of the specs of [B, H, S, width] by queries and keys, the spec of [B, H, 1, S]
  by queries, and the segments as inputs. Of runs, the last of a step's numbers is the place of its
  queries among the row's blocks."""

  def rows(which):
    return lambda width: pl.BlockSpec(
      (None, None, n, width), lambda b, h, step, *blocks: (b, h, blocks[which][step], 0)
    )

  def ids(which):
    return pl.BlockSpec((None, 1, n), lambda b, h, step, *blocks: (b, 0, blocks[which][step]))

  flat = pl.BlockSpec((None, None, 1, n), lambda b, h, step, *blocks: (b, h, 0, blocks[0][step]))
  of_queries = ids(-1 if runs else 0)
  segments = [] if segments_B1T is None else [(segments_B1T, of_queries), (segments_B1T, ids(1))]
  return rows(0), rows(1), flat, segments


def _chunk(n: int, most: int) -> int:
  """Returns the largest multiple of LANES up to `most` that divides a block."""
  return max(c for c in range(LANES, max(most, LANES) + 1, LANES) if n % c == 0)


def _run_blocks(starts_Y, S: int, T: int, n: int):
  """Returns the places of runs' blocks among the row's, traced, and such places for counting."""
  runs, length = starts_Y.shape[0], S // starts_Y.shape[0]
  within = np.arange(length // n, dtype=np.int32)
  spread = np.linspace(0, T // length - 1, runs).astype(np.int32) * (length // n)
  return (starts_Y[:, None] // n + within[None]).reshape(-1), (spread[:, None] + within).reshape(-1)


def _forward_steps(at, num_keys: int):
  """Returns the steps of runs: blocks of queries; of keys, no further ones than the queries see;
  of keys, in turn; and the places of the queries. `at` holds the places of all blocks."""
  key, query = np.tile(np.arange(num_keys, dtype=np.int32), len(at)), np.arange(len(at))
  query = np.repeat(query.astype(np.int32), num_keys)
  at = at[query]
  return query, at.clip(max=key), key, at


def _backward_steps(at, first: int, end: int, num_keys: int):
  """Returns the steps of runs' blocks of queries first ... end - 1: of queries, no earlier ones than
  see the keys; of keys; which block's gradient leaves; of queries, in turn; and their places."""
  own = np.tile(np.arange(first, end, dtype=np.int32), num_keys)
  key = np.repeat(np.arange(num_keys, dtype=np.int32), end - first)
  # By blocks of keys: blocks of queries that see none of them.
  before = (at[None, first:end] < np.arange(num_keys)[:, None]).sum(axis=1)
  whole = before.clip(max=end - first - 1).astype(np.int32)[key]
  return (first + whole).clip(min=own), key, whole, own, at[own]


def _forward(q_BHSA, k_BHTA, v_BHTU, segments_B1T, starts_Y, scale, n):
  (B, H, S, A), T = q_BHSA.shape, k_BHTA.shape[2]
  U, dtype, runs = v_BHTU.shape[3], v_BHTU.dtype, starts_Y is not None
  n = 2 * n if (S // starts_Y.shape[0] if runs else S) % (2 * n) == 0 else n
  if runs:
    steps, counted = (_forward_steps(at, T // n) for at in _run_blocks(starts_Y, S, T, n))
    q_blocks, k_blocks = counted[3], counted[2]
  else:
    pairs = [(i, j) for i in range(S // n) for j in range(i + 1)]
    steps = counted = tuple(np.array(blocks, np.int32) for blocks in zip(*pairs))
    q_blocks, k_blocks = counted
  by_query, by_key, flat, segments = _specs(n, segments_B1T, runs)
  chunk = _chunk(n, CHUNK_TOKENS)
  flops, logits = _flops(q_blocks, k_blocks, n, chunk, A + U)
  return _call(
    "mla_forward",
    functools.partial(_forward_kernel, scale=scale, chunk=chunk, runs=runs),
    steps,
    counted,
    [(q_BHSA, by_query(A)), (k_BHTA, by_key(A)), (v_BHTU, by_key(U)), *segments],
    [
      ((B, H, S, U), dtype, by_query(U)),
      ((B, H, 1, S), f32, flat),
    ],
    [pltpu.VMEM((U, n), f32), pltpu.VMEM((1, n), f32), pltpu.VMEM((1, n), f32)],
    flops,
    logits,
  )


def _backward(
  q_BHSA, k_BHTA, v_BHTU, dout_BHSU, log_z_BH1S, shared_BH1S, segments_B1T, starts_Y, scale, n
):
  (B, H, S, A), T = q_BHSA.shape, k_BHTA.shape[2]
  U, dtype, runs = v_BHTU.shape[3], v_BHTU.dtype, starts_Y is not None
  by_query, by_key, flat, segments = _specs(n, segments_B1T, runs)
  chunk = _chunk(n, CHUNK_TOKENS)
  span_blocks = max(1, SPAN_TOKENS // n)
  spans = [(i, min(i + span_blocks, S // n)) for i in range(0, S // n, span_blocks)]
  sum_dtype = dtype if len(spans) == 1 else f32
  dq, dk, dv = [], [], []
  for first, end in spans:
    # A block of dq is whole when its own keys have been seen, and leaves before the next's.
    if runs:
      places = _run_blocks(starts_Y, S, T, n)
      steps, counted = (_backward_steps(at, first, end, T // n) for at in places)
      seen, q_blocks, k_blocks = T, counted[4], counted[1]
    else:
      pairs = [(i, j, max(j - first, 0)) for j in range(end) for i in range(max(j, first), end)]
      steps = counted = tuple(np.array(blocks, np.int32) for blocks in zip(*pairs))
      seen, q_blocks, k_blocks = end * n, counted[0], counted[1]
    flops, logits = _flops(q_blocks, k_blocks, n, chunk, 3 * A + 2 * U)
    dq_spec = pl.BlockSpec(
      (None, None, n, A), lambda b, h, step, _, __, whole_of, *___: (b, h, whole_of[step], 0)
    )
    one_dq, one_dk, one_dv = _call(
      "mla_backward",
      functools.partial(
        _backward_kernel,
        scale=scale,
        chunk=chunk,
        first_block=first,
        num_blocks=end - first,
        runs=runs,
      ),
      steps,
      counted,
      [
        (q_BHSA, by_query(A)),
        (k_BHTA, by_key(A)),
        (v_BHTU, by_key(U)),
        (dout_BHSU, by_query(U)),
        (log_z_BH1S, flat),
        (shared_BH1S, flat),
        *segments,
      ],
      [
        ((B, H, (end - first) * n, A), dtype, dq_spec),
        ((B, H, seen, A), sum_dtype, by_key(A)),
        ((B, H, seen, U), sum_dtype, by_key(U)),
      ],
      [
        pltpu.VMEM(((end - first) * n, A), f32),
        pltpu.VMEM((n, A), f32),
        pltpu.VMEM((n, U), f32),
      ],
      flops,
      logits,
    )
    behind = ((0, 0), (0, 0), (0, T - seen), (0, 0))
    dq.append(one_dq)
    dk.append(jnp.pad(one_dk, behind))
    dv.append(jnp.pad(one_dv, behind))
  dk_BHTA, dv_BHTU = (functools.reduce(jnp.add, parts).astype(dtype) for parts in (dk, dv))
  return jnp.concatenate(dq, axis=2), dk_BHTA, dv_BHTU


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _attention(q_BHSA, k_BHTA, v_BHTU, segments_B1T, starts_Y, scale, n):
  return _forward(q_BHSA, k_BHTA, v_BHTU, segments_B1T, starts_Y, scale, n)[0]


def _attention_fwd(q_BHSA, k_BHTA, v_BHTU, segments_B1T, starts_Y, scale, n):
  operands = (q_BHSA, k_BHTA, v_BHTU, segments_B1T, starts_Y)
  out_BHSU, log_z_BH1S = _forward(*operands, scale, n)
  return out_BHSU, (*operands, out_BHSU, log_z_BH1S)


def _attention_bwd(scale, n, saved, dout_BHSU):
  q_BHSA, k_BHTA, v_BHTU, segments_B1T, starts_Y, out_BHSU, log_z_BH1S = saved
  # Sum over keys of p dp, the part of the softmax's gradient all logits of a query share.
  shared_BHS = jnp.sum(dout_BHSU.astype(f32) * out_BHSU.astype(f32), axis=-1)
  rest = (dout_BHSU, log_z_BH1S, shared_BHS[:, :, None], segments_B1T, starts_Y, scale, n)
  return (*_backward(q_BHSA, k_BHTA, v_BHTU, *rest), None, None)


_attention.defvjp(_attention_fwd, _attention_bwd)


def refused(q_BSHA, v_BSHU, runs: int = 0) -> str | None:
  """Returns the rule that the operands break, or None; `runs` is Y, or 0."""
  if runs and (q_BSHA.shape[1] // runs) % LANES:
    return f"a run must be a multiple of {LANES} tokens, got {q_BSHA.shape[1] // runs}"
  for name, size in (("A", q_BSHA.shape[3]), ("U", v_BSHU.shape[3])):
    if size > MOST_DIM:
      return f"{name} must be at most {MOST_DIM}, got {size}"
  return None


def _block(S: int, most: int) -> int:
  """Returns a block's tokens: as equal blocks as the tiles allow."""
  number = -(-S // most)
  unit = LANES if number == 1 else 2 * LANES
  return min(-(-S // (number * unit)) * unit, most)


def _prepared(q_BSHA, k_BSHA, v_BSHU, segments_BS, block_tokens: int):
  """Returns q, k, v as [B, H, S, ...] and segments [B, 1, S] or None, padded; a block's tokens."""
  S = q_BSHA.shape[1]
  n = _block(S, block_tokens)
  behind = -S % n  # tokens behind the last, which none before them sees

  def heads_first(a):
    return jnp.pad(a, ((0, 0), (0, behind), (0, 0), (0, 0))).swapaxes(1, 2)

  segments_B1S = segments_BS
  if segments_BS is not None:
    segments_B1S = jnp.pad(segments_BS, ((0, 0), (0, behind)))[:, None]
  return heads_first(q_BSHA), heads_first(k_BSHA), heads_first(v_BSHU), segments_B1S, n


def causal_attention(
  q_BSHA,
  k_BSHA,
  v_BSHU,
  segments_BS,
  scale: float,
  block_tokens: int = BLOCK_TOKENS,
  starts_Y=None,
):
  """See `api.causal_attention`; a grid step of the gradient has at most `block_tokens` queries and
  keys, of the forward twice as many.

  Runs must be a multiple of 128 tokens and start, in ascending order, at multiples of their length,
  into which the keys must divide.
  """
  S = q_BSHA.shape[1]
  if starts_Y is not None:
    length = S // starts_Y.shape[0]
    if rule := refused(q_BSHA, v_BSHU, starts_Y.shape[0]):
      raise ValueError(rule)
    if k_BSHA.shape[1] % length:
      raise ValueError(f"T ({k_BSHA.shape[1]}) must be divisible by a run's tokens ({length})")
    heads_first = (a.swapaxes(1, 2) for a in (q_BSHA, k_BSHA, v_BSHU))
    segments_B1T = None if segments_BS is None else segments_BS[:, None]
    n = max(b for b in range(LANES, min(block_tokens, length) + 1, LANES) if length % b == 0)
    return _attention(*heads_first, segments_B1T, starts_Y, scale, n).swapaxes(1, 2)
  q_BHSA, k_BHSA, v_BHSU, segments_B1S, n = _prepared(
    q_BSHA, k_BSHA, v_BSHU, segments_BS, block_tokens
  )
  out_BHSU = _attention(q_BHSA, k_BHSA, v_BHSU, segments_B1S, None, scale, n)
  return out_BHSU.swapaxes(1, 2)[:, :S]


def causal_attention_with_normaliser(q_BSHA, k_BSHA, v_BSHU, segments_BS, scale: float):
  """Also returns the log of each softmax's normaliser, float32 [B, H, S]; no gradient."""
  S = q_BSHA.shape[1]
  q_BHSA, k_BHSA, v_BHSU, segments_B1S, n = _prepared(
    q_BSHA, k_BSHA, v_BSHU, segments_BS, BLOCK_TOKENS
  )
  out_BHSU, log2_z_BH1S = _forward(q_BHSA, k_BHSA, v_BHSU, segments_B1S, None, scale, n)
  return out_BHSU.swapaxes(1, 2)[:, :S], log2_z_BH1S[:, :, 0, :S] * math.log(2)
