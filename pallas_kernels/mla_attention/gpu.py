"""Causal flash attention for H100 (Mosaic GPU), unequal head dims, segments, both directions.

A thread block holds 128 queries of a head (or keys, for their gradients), 64 a warpgroup, and a
third warpgroup brings the other side past them block by block. No [S, S] array exists: the
backward pass makes the probabilities again from the logits and their saved sums.

Shapes: B rows, S tokens, H heads, A query and key dim, U value dim; T of 64 tokens each.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_gpu import call

WGS = 2
WG_ROWS = 64
ROWS = WGS * WG_ROWS  # queries, or keys, of a thread block
KEYS = 128  # that come past at a time, forward
PAST = 64  # queries or keys that come past at a time, backward
SMEM_BYTES = 226 * 1024
MOST_DIM = 256  # columns of a product
LOG2E = math.log2(math.e)
MASKED = -1e30  # finite: a block without visible keys must give no NaN

f32, i32 = jnp.float32, jnp.int32
WGMMA = plgpu.Layout.WGMMA


_TILED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))


def _smem(rows: int, columns: int, dtype):
  """Rows of each warpgroup, as the tensor cores read them."""
  return plgpu.SMEM((WGS, rows, columns), dtype, transforms=_TILED)


def _past(rows: int, columns: int | None, first) -> plgpu.BlockSpec:
  """A block of what comes past, numbered from `first`; numbers of tokens without columns."""
  if columns is None:
    return plgpu.BlockSpec((rows,), lambda i: (first + i,))
  return plgpu.BlockSpec((rows, columns), lambda i: (first + i, 0), transforms=_TILED)


def _product(shape, *pairs):
  """Sums a @ b over the pairs, float32."""

  def scope(acc):
    for a, b in pairs:
      plgpu.wgmma(acc, a, b)
    return acc[...]

  return pl.run_scoped(scope, plgpu.ACC(shape, f32))


def _along(value, shape, axis: int):
  """Spreads a vector, whose numbers lie along `axis`, over the shape."""
  return plgpu.layout_cast(jax.lax.broadcast_in_dim(value, shape, (axis,)), WGMMA)


def _vector(smem, axis: int):
  return plgpu.layout_cast(smem, WGMMA.reduce(1 - axis))


def _masked(logits, diagonal, first, segments, query_axis: int):
  """Logits, MASKED where a pair of query and key does not count: causal, in one segment.

  Args:
    logits: queries along `query_axis`, keys along the other.
    diagonal: whether any key may be later than a query.
    first: numbers of the first query and the first key.
    segments: those of the queries and of the keys, or None.
  """
  axes = (query_axis, 1 - query_axis)

  def mask(logits):
    query, key = (plgpu.broadcasted_iota(i32, logits.shape, axis, layout=WGMMA) for axis in axes)
    seen = query + first[0] >= key + first[1]
    if segments is not None:
      query, key = (_along(s, logits.shape, axis) for s, axis in zip(segments, axes))
      seen = seen & (query == key)
    return jnp.where(seen, logits, MASKED)

  if segments is not None:
    return mask(logits)
  return jax.lax.cond(diagonal, mask, lambda logits: logits, logits)


def _own(number, hbms, smems, arrived):
  """Brings a warpgroup's own rows on chip and waits for them."""
  for hbm, smem in zip(hbms, smems, strict=True):
    plgpu.copy_gmem_to_smem(hbm, smem.at[number], arrived.at[number])
  plgpu.barrier_wait(arrived.at[number])


def _store(value, hbm, smem, row):
  """Stores [64, columns] at `row`, 64 columns at a time."""
  for c in range(0, value.shape[1], 64):
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    smem[...] = value[:, c : c + 64].astype(smem.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(smem, hbm.at[pl.ds(row, WG_ROWS), pl.ds(c, 64)])


def _stages(room: int, stage: int) -> int:
  """Returns how many steps' copies are under way in the memory left on chip."""
  return min(4, room // stage)


def _run(kernel, name: str, operands, out_types, scratch_types, tiles: int, B: int, H: int):
  grid = {"tile": tiles, "row": B, "head": H}
  # No sum crosses warps.
  return call(kernel, name, operands, out_types, grid, scratch_types, WGS + 1, reduction_bytes=0)


def _at():
  return (jax.lax.axis_index(name) for name in ("tile", "row", "head", "wg"))


def _pipeline(step, specs, count, stages: int, compute):
  return plgpu.emit_pipeline_warp_specialized(
    step,
    grid=(count,),
    memory_registers=24,
    in_specs=specs,
    max_concurrent_steps=stages,
    wg_axis="wg",
    num_compute_wgs=WGS,
    compute_context=compute,
  )


@functools.partial(jax.jit, static_argnums=4)  # lowered once for all layers
def _forward(q_BSHA, k_BSHA, v_BSHU, segments_BS, scale: float):
  """Returns the output and, for the backward pass, log2 of each query's sum, [B, H, S]."""
  (B, S, H, A), U = q_BSHA.shape, v_BSHU.shape[3]
  dtype, tiles = q_BSHA.dtype, S // ROWS
  has = segments_BS is not None
  segments = [segments_BS] * has
  own_bytes = ROWS * (A + 64) * dtype.itemsize
  stages = _stages(SMEM_BYTES - own_bytes, KEYS * (A + U) * dtype.itemsize)

  def kernel(q_hbm, k_hbm, v_hbm, *refs):
    segment_hbm, (out_hbm, sum_hbm, q_smem, out_smem, arrived, *segment_smem) = (
      refs[:has],
      refs[has:],
    )
    tile, b, h, wg = _at()
    tile = tiles - 1 - tile  # the longest first
    row = tile * ROWS + wg * WG_ROWS
    shape = (WG_ROWS, KEYS)

    def step(indices, k_smem, v_smem, *rest):
      *key_segment, (out, most, total) = rest
      key = indices[0] * KEYS
      logits = _product(shape, (q_smem.at[wg], k_smem.T)) * (scale * LOG2E)
      pair = None
      if has:
        pair = (_vector(segment_smem[0][wg], 0), _vector(key_segment[0][...], 1))
      logits = _masked(logits, key + KEYS > row, (row, key), pair, 0)
      before, most = most, jnp.maximum(most, jnp.max(logits, axis=1))
      p = jnp.exp2(logits - _along(most, shape, 0))
      fade = jnp.exp2(before - most)
      total = total * fade + jnp.sum(p, axis=1)
      value = _product((WG_ROWS, U), (p.astype(dtype), v_smem))
      return out * _along(fade, out.shape, 0) + value, most, total

    def compute(run):
      rows = pl.ds(row, WG_ROWS)
      _own(
        wg,
        [q_hbm.at[b, rows, h], *(ref.at[b, rows] for ref in segment_hbm)],
        [q_smem, *segment_smem],
        arrived,
      )
      full = lambda value, *shape: jnp.full(shape, value, f32)  # noqa: E731
      out, most, total = run(
        (
          plgpu.layout_cast(full(0, WG_ROWS, U), WGMMA),
          plgpu.layout_cast(full(MASKED, WG_ROWS), WGMMA.reduce(1)),
          plgpu.layout_cast(full(0, WG_ROWS), WGMMA.reduce(1)),
        )
      )
      sum_hbm[b, h, tile * WGS + wg] = most + jnp.log(total) * LOG2E
      _store(out / _along(total, out.shape, 0), out_hbm.at[b, :, h], out_smem.at[wg], row)
      plgpu.wait_smem_to_gmem(0)

    specs = [_past(KEYS, A, 0), _past(KEYS, U, 0), *[_past(KEYS, None, 0)] * has]
    past = [k_hbm.at[b, :, h], v_hbm.at[b, :, h], *(ref.at[b] for ref in segment_hbm)]
    _pipeline(step, specs, (tile + 1) * (ROWS // KEYS), stages, compute)(*past)

  operands = [q_BSHA, k_BSHA, v_BSHU, *segments]
  out, sums = _run(
    kernel,
    "attention",
    operands,
    [
      jax.ShapeDtypeStruct((B, S, H, U), dtype),
      jax.ShapeDtypeStruct((B, H, S // WG_ROWS, WG_ROWS), f32),
    ],
    [
      _smem(WG_ROWS, A, dtype),
      _smem(WG_ROWS, 64, dtype),
      plgpu.Barrier(num_arrivals=1 + has, num_barriers=WGS),
      *[plgpu.SMEM((WGS, WG_ROWS), i32)] * has,
    ],
    tiles,
    B,
    H,
  )
  return out, sums.reshape(B, H, S)


@functools.partial(jax.jit, static_argnums=7)
def _gradient_to_queries(
  q_BSHA, k_BSHA, v_BSHU, segments_BS, dout_BSHU, sums_BHS, delta_BHS, scale
):
  (B, S, H, A), U = q_BSHA.shape, v_BSHU.shape[3]
  dtype, tiles = q_BSHA.dtype, S // ROWS
  has = segments_BS is not None
  own_bytes = ROWS * (A + U + 64) * dtype.itemsize
  stages = _stages(SMEM_BYTES - own_bytes, PAST * (A + U) * dtype.itemsize)

  def kernel(q_hbm, dout_hbm, sums_hbm, delta_hbm, k_hbm, v_hbm, *refs):
    segment_hbm, (dq_hbm, q_smem, dout_smem, sums_smem, delta_smem, *rest) = (
      refs[:has],
      refs[has:],
    )
    *segment_smem, dq_smem, arrived = rest
    tile, b, h, wg = _at()
    tile = tiles - 1 - tile
    row = tile * ROWS + wg * WG_ROWS
    shape = (WG_ROWS, PAST)

    def step(indices, k_smem, v_smem, *rest):
      *key_segment, dq = rest
      key = indices[0] * PAST
      logits = _product(shape, (q_smem.at[wg], k_smem.T)) * (scale * LOG2E)
      pair = None
      if has:
        pair = (_vector(segment_smem[0][wg], 0), _vector(key_segment[0][...], 1))
      logits = _masked(logits, key + PAST > row, (row, key), pair, 0)
      p = jnp.exp2(logits - _along(_vector(sums_smem[wg], 0), shape, 0))
      dp = _product(shape, (dout_smem.at[wg], v_smem.T))
      dlogits = p * (dp - _along(_vector(delta_smem[wg], 0), shape, 0))
      plgpu.wgmma(dq, dlogits.astype(dtype), k_smem)
      plgpu.wgmma_wait(0)
      return dq

    def compute(run):
      rows = pl.ds(row, WG_ROWS)
      own = [q_hbm.at[b, rows, h], dout_hbm.at[b, rows, h]]
      own += [ref.at[b, h, rows] for ref in (sums_hbm, delta_hbm)]
      own += [ref.at[b, rows] for ref in segment_hbm]
      _own(wg, own, [q_smem, dout_smem, sums_smem, delta_smem, *segment_smem], arrived)

      def scope(dq):
        run(dq)
        _store(dq[...] * scale, dq_hbm.at[b, :, h], dq_smem.at[wg], row)
        plgpu.wait_smem_to_gmem(0)

      pl.run_scoped(scope, plgpu.ACC((WG_ROWS, A), f32))

    specs = [_past(PAST, A, 0), _past(PAST, U, 0), *[_past(PAST, None, 0)] * has]
    past = [k_hbm.at[b, :, h], v_hbm.at[b, :, h], *(ref.at[b] for ref in segment_hbm)]
    _pipeline(step, specs, (tile + 1) * (ROWS // PAST), stages, compute)(*past)

  operands = [q_BSHA, dout_BSHU, sums_BHS, delta_BHS, k_BSHA, v_BSHU, *[segments_BS] * has]
  numbers = plgpu.SMEM((WGS, WG_ROWS), f32)
  return _run(
    kernel,
    "attention_gradient_queries",
    operands,
    [jax.ShapeDtypeStruct((B, S, H, A), dtype)],
    [
      _smem(WG_ROWS, A, dtype),
      _smem(WG_ROWS, U, dtype),
      numbers,
      numbers,
      *[plgpu.SMEM((WGS, WG_ROWS), i32)] * has,
      _smem(WG_ROWS, 64, dtype),
      plgpu.Barrier(num_arrivals=4 + has, num_barriers=WGS),
    ],
    tiles,
    B,
    H,
  )[0]


@functools.partial(jax.jit, static_argnums=(0, 8))
def _gradient_to_keys(
  values: bool, q_BSHA, k_BSHA, v_BSHU, segments_BS, dout_BSHU, sums_BHS, delta_BHS, scale
):
  """Returns the gradient to the keys, or to the values.

  Both sums at once do not fit a warpgroup's registers: the logits are made for each anew.
  """
  (B, S, H, A), U = q_BSHA.shape, v_BSHU.shape[3]
  dtype, tiles = q_BSHA.dtype, S // ROWS
  has = segments_BS is not None
  stay = [k_BSHA] if values else [k_BSHA, v_BSHU]
  numbers = [sums_BHS] if values else [sums_BHS, delta_BHS]
  own_bytes = ROWS * (A + U + 64) * dtype.itemsize
  stages = _stages(SMEM_BYTES - own_bytes, PAST * (A + U) * dtype.itemsize)

  def kernel(q_hbm, dout_hbm, *refs):
    a, b = len(stay), len(stay) + len(numbers)
    stay_hbm, numbers_hbm, segment_hbm = refs[:a], refs[a:b], refs[b : b + has]
    out_hbm, *smems = refs[b + has :]
    stay_smem, (*segment_smem, out_smem, arrived) = smems[:a], smems[a:]
    tile, b, h, wg = _at()
    row = tile * ROWS + wg * WG_ROWS
    first = tile * (ROWS // PAST)  # queries before these see none of the block's keys
    shape = (WG_ROWS, PAST)

    def step(indices, q_smem, dout_smem, sums_smem, *refs):
      *rest, total = refs
      query = (first + indices[0]) * PAST
      logits = _product(shape, (stay_smem[0].at[wg], q_smem.T)) * (scale * LOG2E)
      pair = None
      if has:
        pair = (_vector(rest[-1][...], 1), _vector(segment_smem[0][wg], 0))
      logits = _masked(logits, query < row + WG_ROWS, (query, row), pair, 1)
      p = jnp.exp2(logits - _along(_vector(sums_smem[...], 1), shape, 1))
      if values:
        plgpu.wgmma(total, p.astype(dtype), dout_smem)
      else:
        dp = _product(shape, (stay_smem[1].at[wg], dout_smem.T))
        dlogits = p * (dp - _along(_vector(rest[0][...], 1), shape, 1))
        plgpu.wgmma(total, dlogits.astype(dtype), q_smem)
      plgpu.wgmma_wait(0)
      return total

    def compute(run):
      rows = pl.ds(row, WG_ROWS)
      own = [ref.at[b, rows, h] for ref in stay_hbm] + [ref.at[b, rows] for ref in segment_hbm]
      _own(wg, own, [*stay_smem, *segment_smem], arrived)

      def scope(total):
        run(total)
        factor = 1 if values else scale
        _store(total[...] * factor, out_hbm.at[b, :, h], out_smem.at[wg], row)
        plgpu.wait_smem_to_gmem(0)

      pl.run_scoped(scope, plgpu.ACC((WG_ROWS, U if values else A), f32))

    specs = [_past(PAST, A, first), _past(PAST, U, first)]
    specs += [_past(PAST, None, first)] * (len(numbers) + has)
    past = [q_hbm.at[b, :, h], dout_hbm.at[b, :, h], *(ref.at[b, h] for ref in numbers_hbm)]
    past += [ref.at[b] for ref in segment_hbm]
    _pipeline(step, specs, S // PAST - first, stages, compute)(*past)

  operands = [q_BSHA, dout_BSHU, *stay, *numbers, *[segments_BS] * has]
  return _run(
    kernel,
    "attention_gradient_values" if values else "attention_gradient_keys",
    operands,
    [jax.ShapeDtypeStruct((B, S, H, U if values else A), dtype)],
    [
      *(_smem(WG_ROWS, a.shape[3], dtype) for a in stay),
      *[plgpu.SMEM((WGS, WG_ROWS), i32)] * has,
      _smem(WG_ROWS, 64, dtype),
      plgpu.Barrier(num_arrivals=len(stay) + has, num_barriers=WGS),
    ],
    tiles,
    B,
    H,
  )[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attention(q_BSHA, k_BSHA, v_BSHU, segments_BS, scale: float):
  return _forward(q_BSHA, k_BSHA, v_BSHU, segments_BS, scale)[0]


def _fwd(q_BSHA, k_BSHA, v_BSHU, segments_BS, scale):
  out_BSHU, sums_BHS = _forward(q_BSHA, k_BSHA, v_BSHU, segments_BS, scale)
  return out_BSHU, (q_BSHA, k_BSHA, v_BSHU, segments_BS, out_BSHU, sums_BHS)


def _bwd(scale, saved, dout_BSHU):
  *operands, out_BSHU, sums_BHS = saved
  delta_BHS = jnp.einsum("bshu,bshu->bhs", dout_BSHU, out_BSHU, preferred_element_type=f32)
  rest = (*operands, dout_BSHU, sums_BHS, delta_BHS, scale)
  dk_BSHA, dv_BSHU = (_gradient_to_keys(values, *rest) for values in (False, True))
  return _gradient_to_queries(*rest), dk_BSHA, dv_BSHU, None


_attention.defvjp(_fwd, _bwd)


def refused(q_BSHA, v_BSHU) -> str | None:
  """Returns the rule that the operands break, or None."""
  for name, size in (("A", q_BSHA.shape[3]), ("U", v_BSHU.shape[3])):
    if size % 64 or size > MOST_DIM:
      return f"{name} must be a multiple of 64, at most {MOST_DIM}, got {size}"
  if q_BSHA.dtype not in (jnp.bfloat16, jnp.float16):
    return f"q, k and v must be bfloat16 or float16, got {q_BSHA.dtype}"
  A, U = q_BSHA.shape[3], v_BSHU.shape[3]
  forward, backward = ROWS * (A + 64) + 2 * KEYS * (A + U), ROWS * (A + U + 64) + 2 * PAST * (A + U)
  if (size := 2 * max(forward, backward)) > SMEM_BYTES:
    return (
      f"a block's rows and two steps of the others' must take at most {SMEM_BYTES} bytes on chip, "
      f"got {size} with A = {A} and U = {U}"
    )
  return None


def _padded(q_BSHA, k_BSHA, v_BSHU, segments_BS):
  """Returns the operands with a multiple of 128 tokens; the new ones are seen by no query."""
  if rule := refused(q_BSHA, v_BSHU):
    raise ValueError(rule)
  more = -q_BSHA.shape[1] % ROWS
  operands = (q_BSHA, k_BSHA, v_BSHU, segments_BS)
  if not more:
    return operands
  return jax.tree.map(lambda a: jnp.pad(a, [(0, 0), (0, more)] + [(0, 0)] * (a.ndim - 2)), operands)


def causal_attention(q_BSHA, k_BSHA, v_BSHU, segments_BS, scale: float):
  """See `api.causal_attention`; bfloat16 or float16, head dims multiples of 64.

  A sequence that is no multiple of 128 costs a copy.

  Source: FlashAttention-3 (arXiv:2407.08608), without its overlap of two blocks' softmax.
  """
  out_BSHU = _attention(*_padded(q_BSHA, k_BSHA, v_BSHU, segments_BS), scale)
  return out_BSHU[:, : q_BSHA.shape[1]]


def causal_attention_with_normaliser(q_BSHA, k_BSHA, v_BSHU, segments_BS, scale: float):
  """Also returns the log of each softmax's normaliser, float32 [B, H, S]; no gradient."""
  S = q_BSHA.shape[1]
  q_BSHA, k_BSHA, v_BSHU, segments_BS = _padded(q_BSHA, k_BSHA, v_BSHU, segments_BS)
  out_BSHU, log2_z_BHS = _forward(q_BSHA, k_BSHA, v_BSHU, segments_BS, scale)
  return out_BSHU[:, :S], log2_z_BHS[:, :, :S] / LOG2E
