"""Permute and combine for TPU (Mosaic): each row is read once and written once.

Each row is moved by an asynchronous copy of its own, to or from a place that is known only at run
time. Copies address rows of 32-bit words, so bfloat16 rows are packed, two columns to a word
(`scatter`, `gather_sum`). The kernels that multiply the rows unpack them on chip. `permute` and
`combine` unpack and pack in XLA, for callers that need plain rows. Copies of one block of tokens
are under way while the next block is packed.

Shapes: M tokens, m tokens of a block, K choices a token, P rows, D hidden, W words of a row.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import traffic
from pallas_kernels.varying import varying_like

LANES = 128
VMEM_BYTES = 2**24  # of the row buffers
MOST_WIDTH = 2**14  # of a row: the copies of 16 tokens fit the buffers

f32, u32 = jnp.float32, jnp.uint32


def refused(dtype, D: int) -> str | None:
  """Returns the rule that rows of a dtype and width break, or None."""
  if dtype not in (jnp.bfloat16, jnp.float32):
    return f"rows must be bfloat16 or float32, got {jnp.dtype(dtype)}"
  if D > MOST_WIDTH:
    return f"D must be at most {MOST_WIDTH}, got {D}"
  return None


def packs(dtype, D: int) -> bool:
  """Returns whether rows are packed: bfloat16, and whole pairs of 128 columns."""
  return np.dtype(dtype) == jnp.bfloat16 and D % (2 * LANES) == 0


def row_words(dtype, D: int) -> jax.ShapeDtypeStruct:
  """Returns the struct [W] of a row as it travels; 16-bit rows that do not pack, as float32."""
  return (
    jax.ShapeDtypeStruct((D // 2,), u32) if packs(dtype, D) else jax.ShapeDtypeStruct((D,), f32)
  )


def pack_halves(low, high):
  """Two bfloat16-valued float32 arrays to words; rounds to bfloat16."""
  bits = lambda a: jax.lax.bitcast_convert_type(  # noqa: E731
    a.astype(jnp.bfloat16).astype(f32), u32
  )
  return (bits(low) >> 16) | bits(high)


def unpack_halves(words):
  """Words to two float32 arrays, exact."""
  as_f32 = lambda a: jax.lax.bitcast_convert_type(a, f32)  # noqa: E731
  return as_f32(words << 16), as_f32(words & u32(0xFFFF0000))


def unpack(words_PW, dtype):
  """Returns rows [P, D] of words in plain JAX; a word has columns 256 i + c and 256 i + 128 + c."""
  P, W = words_PW.shape
  low, high = unpack_halves(words_PW.reshape(P, W // LANES, LANES))
  return jnp.stack([low, high], axis=2).reshape(P, 2 * W).astype(dtype)


def pack(y_PD):
  """Returns the words [P, W] of rows in plain JAX: the inverse of `unpack`."""
  P, D = y_PD.shape
  if not packs(y_PD.dtype, D):
    return y_PD.astype(f32)
  halves = y_PD.reshape(P, D // (2 * LANES), 2, LANES)
  return pack_halves(halves[:, :, 0], halves[:, :, 1]).reshape(P, D // 2)


def permute(x_MD, row_MK, num_rows: int):
  """See `api.permute`: `scatter`, and a pass that unpacks."""
  if rule := refused(x_MD.dtype, x_MD.shape[1]):
    raise ValueError(rule)
  words_PW = scatter(x_MD, row_MK, num_rows)
  return unpack(words_PW, x_MD.dtype) if words_PW.dtype == u32 else words_PW.astype(x_MD.dtype)


def combine(y_PD, row_MK):
  """See `api.combine`: a pass that packs, and `gather_sum`."""
  if rule := refused(y_PD.dtype, y_PD.shape[1]):
    raise ValueError(rule)
  return gather_sum(pack(y_PD), row_MK, y_PD.dtype)


def _block_tokens(M: int, K: int, rows_a_token: int, W: int) -> int:
  """Returns m, at least K: a token's K copies are waited for as one of K rows."""
  least, block = pl.cdiv(K, 16) * 16, 256
  while block > least and 2 * block * rows_a_token * W * 4 > VMEM_BYTES:
    block //= 2
  return max(least, min(block, pl.cdiv(M, 16) * 16))


def _row_blocks(row_MK, m: int, extra: int = 0):
  """Rows as scalars of a block of tokens, [blocks + extra, 1, m K]; zeros fill the last."""
  M, K = row_MK.shape
  blocks = pl.cdiv(M, m)
  row_MK = jnp.pad(row_MK, ((0, (blocks + extra) * m - M), (0, 0)))
  return row_MK.reshape(blocks + extra, 1, m * K)


def _row_spec(m: int, K: int, ahead: int = 0):
  return pl.BlockSpec((None, 1, m * K), lambda i: (i + ahead, 0, 0), memory_space=pltpu.SMEM)


def _scatter(M: int, K: int, pack, row_ref, x_ref, out_ref, words_ref, sems):
  """Packs a block of tokens, then sends each row to its K places."""
  i, steps = pl.program_id(0), pl.num_programs(0)
  m = x_ref.shape[0]
  slot = jax.lax.rem(i, 2)

  def copy(slot, r, place, rows=1):
    return pltpu.make_async_copy(
      words_ref.at[slot, pl.ds(r, rows)], out_ref.at[pl.ds(place, rows)], sems.at[slot]
    )

  def wait(step, slot):
    def one(_, __):
      copy(slot, 0, 0, K).wait()  # a token's

    jax.lax.fori_loop(0, jnp.minimum(m, M - step * m), one, None)

  @pl.when(i >= 2)
  def _():
    wait(i - 2, slot)

  pack(x_ref, words_ref.at[slot])

  def send(r, _):
    for k in range(K):
      copy(slot, r, row_ref[0, r * K + k]).start()

  jax.lax.fori_loop(0, jnp.minimum(m, M - i * m), send, None)

  @pl.when(i == steps - 1)
  def _():
    @pl.when(i >= 1)
    def _():
      wait(i - 1, 1 - slot)

    wait(i, slot)


def _pack_row(x_ref, words_ref):
  """Rows as `row_words` has them."""
  if words_ref.dtype == f32:
    words_ref[...] = x_ref[...].astype(f32)
    return
  for c in range(words_ref.shape[1] // LANES):
    low, high = (
      x_ref[:, (2 * c + h) * LANES : (2 * c + h + 1) * LANES].astype(f32) for h in range(2)
    )
    words_ref[:, c * LANES : (c + 1) * LANES] = pack_halves(low, high)


def scatter(x_MD, row_MK, num_rows: int):
  """Copies each token's row to its K places: words [P, W]; other rows are undefined."""
  return scatter_as(row_words(x_MD.dtype, x_MD.shape[1]), _pack_row, x_MD, row_MK, num_rows)


def scatter_as(words: jax.ShapeDtypeStruct, pack, x_MD, row_MK, num_rows: int, name="permute"):
  """`scatter` of rows as words [W] that `pack(x_ref, words_ref)` makes of some tokens' rows."""
  M, D = x_MD.shape
  K = row_MK.shape[1]
  (W,) = words.shape
  m = _block_tokens(M, K, 1, W)
  grid = (pl.cdiv(M, m),)
  row_spec = _row_spec(m, K)
  x_spec = pl.BlockSpec((m, D), lambda i: (i, 0))
  rows = _row_blocks(row_MK, m)
  moved = traffic.bytes_moved(grid, [(rows, row_spec), (x_MD, x_spec)])
  return pl.pallas_call(
    functools.partial(_scatter, M, K, pack),
    grid=grid,
    in_specs=[row_spec, x_spec],
    out_specs=pl.BlockSpec(memory_space=pl.ANY),
    out_shape=varying_like(jax.ShapeDtypeStruct((num_rows, W), words.dtype), rows, x_MD),
    scratch_shapes=[pltpu.VMEM((2, m, W), words.dtype), pltpu.SemaphoreType.DMA((2,))],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("arbitrary",), vmem_limit_bytes=4 * VMEM_BYTES
    ),
    cost_estimate=pl.CostEstimate(flops=0, bytes_accessed=moved + M * K * W * 4, transcendentals=0),
    name=name,
  )(rows, x_MD)


def _gather(M: int, K: int, row_ref, next_row_ref, gate_ref, y_ref, out_ref, words_ref, sems):
  """Fetches the K rows of each token of the next block, then sums those of this one."""
  i, steps = pl.program_id(0), pl.num_programs(0)
  m = out_ref.shape[0]
  slot = jax.lax.rem(i, 2)

  def copy(slot, k, r, place, rows=1):
    return pltpu.make_async_copy(
      y_ref.at[pl.ds(place, rows)], words_ref.at[slot, k, pl.ds(r, rows)], sems.at[slot]
    )

  def fetch(step, slot, rows):
    def one(r, _):
      for k in range(K):
        copy(slot, k, r, rows[0, r * K + k]).start()

    jax.lax.fori_loop(0, jnp.minimum(m, M - step * m), one, None)

  @pl.when(i == 0)
  def _():
    fetch(0, 0, row_ref)

  @pl.when(i + 1 < steps)
  def _():
    fetch(i + 1, 1 - slot, next_row_ref)

  def wait(_, __):
    copy(slot, 0, 0, 0, K).wait()  # a token's

  jax.lax.fori_loop(0, jnp.minimum(m, M - i * m), wait, None)

  gates = None if gate_ref is None else [gate_ref[:, k : k + 1] for k in range(K)]
  weigh = lambda a, k: a if gates is None else a * gates[k]  # noqa: E731
  if words_ref.dtype == u32:
    for c in range(words_ref.shape[3] // LANES):
      own = slice(c * LANES, (c + 1) * LANES)
      halves = [unpack_halves(words_ref[slot, k, :, own]) for k in range(K)]
      for h in range(2):
        total = sum(weigh(halves[k][h], k) for k in range(K))
        out_ref[:, (2 * c + h) * LANES : (2 * c + h + 1) * LANES] = total.astype(out_ref.dtype)
  else:
    total = sum(weigh(words_ref[slot, k], k) for k in range(K))
    out_ref[...] = total.astype(out_ref.dtype)


def gather_sum(words_PW, row_MK, dtype, gate_MK=None):
  """Sums each token's K rows, weighted by its gates: [M, D]; in float32, `dtype` at the end."""
  M, K = row_MK.shape
  W = words_PW.shape[1]
  D = 2 * W if words_PW.dtype == u32 else W
  m = _block_tokens(M, K, K, W)
  grid = (pl.cdiv(M, m),)
  row_spec, next_spec = _row_spec(m, K), _row_spec(m, K, ahead=1)
  gate_spec = pl.BlockSpec((m, K), lambda i: (i, 0))
  out_spec = pl.BlockSpec((m, D), lambda i: (i, 0))
  out = jax.ShapeDtypeStruct((M, D), dtype)
  rows = _row_blocks(row_MK, m, extra=1)
  blocks = [(rows, row_spec), (rows, next_spec), (out, out_spec)]
  blocks += [] if gate_MK is None else [(gate_MK, gate_spec)]
  gates = [] if gate_MK is None else [gate_MK]

  def kernel(row_ref, next_row_ref, *refs):
    gate_ref = None if gate_MK is None else refs[0]
    _gather(M, K, row_ref, next_row_ref, gate_ref, *refs[len(gates) :])

  return pl.pallas_call(
    kernel,
    grid=grid,
    in_specs=[
      row_spec,
      next_spec,
      *[gate_spec] * len(gates),
      pl.BlockSpec(memory_space=pl.ANY),
    ],
    out_specs=out_spec,
    out_shape=varying_like(out, rows, *gates, words_PW),
    scratch_shapes=[pltpu.VMEM((2, K, m, W), words_PW.dtype), pltpu.SemaphoreType.DMA((2,))],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("arbitrary",), vmem_limit_bytes=4 * VMEM_BYTES
    ),
    cost_estimate=pl.CostEstimate(
      flops=2 * M * K * D,
      bytes_accessed=traffic.bytes_moved(grid, blocks) + M * K * W * 4,
      transcendentals=0,
    ),
    name="combine",
  )(rows, rows, *gates, words_PW)
