"""The FP8 matmuls for H100 (Mosaic GPU): E4M3 codes into the tensor cores, promoted every 128.

Codes lie with the contraction last, as the tensor cores want both operands of one byte. XLA
quantises along a row; `gpu_quantize` quantises what is blocks or columns. A step multiplies one
scale tile, 128 deep, into float32 registers, which are scaled and added to the sum: the tensor
cores' own sums of E4M3 products are narrower than float32.

Shapes: P rows, K contraction, N columns, E experts, T = ceil(K / 128) tiles; D hidden, F inner.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.grouped_matmul.gpu import EIGHT, LINE, STRIP, rows_to_store, store_rows, tiles
from pallas_kernels.mosaic_gpu import call
from pallas_kernels.permute import in_a_group
from pallas_kernels.quantized_matmul import xla
from pallas_kernels.quantized_matmul.e4m3 import TILE, Quantized
from pallas_kernels.quantized_matmul.gpu_quantize import quantize_groups, quantize_weights, whole

WGS = 2
WG_ROWS = 64
ROWS = WGS * WG_ROWS
COLUMNS = 128
STAGES = 4

f32, i32 = jnp.float32, jnp.int32
WGMMA = plgpu.Layout.WGMMA

quantize_rows = xla.quantize_rows


def quantize_columns(
  x_KN, power_of_two_scales: bool = False, transposed: bool = False
) -> Quantized:
  """See `api.quantize_columns`."""
  K, N = x_KN.shape
  first_T = jnp.arange(0, K, TILE, dtype=i32)
  count_T = jnp.minimum(K - first_T, TILE)
  codes_NK, scale_TN = quantize_groups(x_KN, first_T, count_T, power_of_two_scales)
  codes_NK = codes_NK[:N, :K]
  return Quantized(codes_NK if transposed else codes_NK.T, scale_TN[:, :N])


def quantize_blocks(w_KN, power_of_two_scales: bool = False) -> Quantized:
  """See `api.quantize_blocks`; the codes lie transposed in memory, as `product` reads them."""
  K, N = w_KN.shape
  codes_ENK, scale_ETN = quantize_weights(w_KN[None], power_of_two_scales)
  return Quantized(codes_ENK[0, :N, :K].T, scale_ETN[0, :, ::TILE])


def _codes(first) -> plgpu.BlockSpec:
  """[128, 128] codes of a step, as the tensor cores read them; contraction last."""
  transforms = (plgpu.TilingTransform((8, TILE)), plgpu.SwizzleTransform(TILE))
  return plgpu.BlockSpec((ROWS, TILE), lambda k: (0, first + k), transforms=transforms)


def _scales(first, at, width: int) -> plgpu.BlockSpec:
  """A step's scales of `width` rows or columns from `at` on."""
  return plgpu.BlockSpec((None, pl.Element(width)), lambda k: (first + k, at))


def _sums(lhs, rhs, first, steps, lhs_at, rhs_at, finish):
  """Adds the scaled products of `steps` tiles from `first` on; two warpgroups, 64 rows each.

  Args:
    lhs, rhs: (codes, scales) in memory, [128, K] and [T, rows] each.
    lhs_at, rhs_at: where their rows begin among the scales.
    finish: what to do with a warpgroup's sum [64, 128].
  """
  wg = jax.lax.axis_index("wg")
  shape = (WG_ROWS, COLUMNS)

  def step(_, lhs_smem, low_smem, high_smem, rhs_smem, rhs_scale_smem, total):
    def multiply(acc):
      plgpu.wgmma(acc, lhs_smem.at[pl.ds(wg * WG_ROWS, WG_ROWS)], rhs_smem.T)
      return acc[...]

    partial = pl.run_scoped(multiply, plgpu.ACC(shape, f32))
    low, high = (plgpu.layout_cast(s[...], WGMMA.reduce(1)) for s in (low_smem, high_smem))
    rows = jax.lax.broadcast_in_dim(jnp.where(wg == 0, low, high), shape, (0,))
    columns = plgpu.layout_cast(rhs_scale_smem[...], WGMMA.reduce(0))
    columns = jax.lax.broadcast_in_dim(columns, shape, (1,))
    return total + partial * plgpu.layout_cast(rows, WGMMA) * plgpu.layout_cast(columns, WGMMA)

  def compute(run):
    finish(run(plgpu.layout_cast(jnp.zeros(shape, f32), WGMMA)))

  plgpu.emit_pipeline_warp_specialized(
    step,
    grid=(steps,),
    memory_registers=40,
    in_specs=[
      _codes(first),
      _scales(first, lhs_at, WG_ROWS),
      _scales(first, lhs_at + WG_ROWS, WG_ROWS),
      _codes(first),
      _scales(first, rhs_at, COLUMNS),
    ],
    max_concurrent_steps=STAGES,
    wg_axis="wg",
    num_compute_wgs=WGS,
    compute_context=compute,
  )(lhs[0], lhs[1], lhs[1], rhs[0], rhs[1])


def _in_pieces(total, smem, store):
  """Brings a sum into memory that copies read, and stores it, a line of bytes at a time."""
  width = LINE // smem.dtype.itemsize
  for c in range(0, COLUMNS, width):
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    smem[...] = total[:, c : c + width].astype(smem.dtype)
    plgpu.commit_smem()
    store(smem, c)
  plgpu.wait_smem_to_gmem(0)


def _run(kernel, name: str, operands, out_type, grid):
  room = [rows_to_store(out_type.dtype)]
  return call(kernel, name, operands, out_type, grid, room, warpgroups=WGS + 1)


def _rows_times(x: Quantized, codes_ENK, scale_ETN, sizes_E, starts_E, dtype):
  """Returns [P, N], each row times its expert's matrix; rows outside all groups are undefined."""
  num_rows, N = x.codes.shape[0], codes_ENK.shape[1]
  codes_PK = whole(x.codes, axis0=EIGHT, axis1=TILE)
  scale_TP = whole(x.scale, axis1=EIGHT)
  codes_ENK = whole(codes_ENK, axis1=COLUMNS, axis2=TILE)
  scale_ETN = whole(scale_ETN, axis2=COLUMNS)
  P, steps = codes_PK.shape[0], codes_PK.shape[1] // TILE
  columns = codes_ENK.shape[1] // COLUMNS
  plan = tiles(sizes_E, starts_E, P)
  T = plan.expert_T.shape[0]

  def kernel(expert_hbm, first_hbm, begin_hbm, end_hbm, x_hbm, xs_hbm, w_hbm, ws_hbm, *refs):
    out_hbm, out_smem = refs
    tile, column = plgpu.planar_snake(jax.lax.axis_index("place"), (T, columns), 0, STRIP)
    wg = jax.lax.axis_index("wg")
    first, end = first_hbm[tile], end_hbm[tile]
    own_first = first + wg * WG_ROWS

    def finish(total):
      begin = jnp.clip(begin_hbm[tile] - own_first, 0, WG_ROWS)
      count = jnp.clip(end - own_first, 0, WG_ROWS) - begin

      def store(smem, c):
        there = pl.ds(column * COLUMNS + c, smem.shape[1])
        store_rows(smem, out_hbm, own_first, there, begin, count)

      _in_pieces(total, out_smem.at[wg], store)

    @pl.when(end > 0)
    def _():
      expert = expert_hbm[tile]
      lhs = x_hbm.at[pl.ds(first, ROWS)], xs_hbm
      rhs = w_hbm.at[expert, pl.ds(column * COLUMNS, COLUMNS)], ws_hbm.at[expert]
      _sums(lhs, rhs, jnp.int32(0), jnp.int32(steps), first, column * COLUMNS, finish)

  operands = [*plan, codes_PK, scale_TP, codes_ENK, scale_ETN]
  y_PN = _run(
    kernel,
    "quantized_rows",
    operands,
    jax.ShapeDtypeStruct((P, columns * COLUMNS), dtype),
    {"place": T * columns},
  )
  return y_PN[:num_rows, :N]


def product(lhs: Quantized, rhs: Quantized, dtype, power_of_two_scales: bool = False):
  """See `reference.product`."""
  del power_of_two_scales  # one way for all
  rows = jnp.full(1, lhs.codes.shape[0], i32)
  return _rows_times(lhs, rhs.codes.T[None], rhs.scale[None], rows, jnp.zeros(1, i32), dtype)


def grouped_rows(
  x_PK, w, sizes_E, starts_E, power_of_two_scales: bool, dtype, transposed: bool = False
):
  """See `reference.grouped_rows`."""
  x = quantize_rows(x_PK, power_of_two_scales)
  y_PN = grouped_codes(x, w, sizes_E, starts_E, power_of_two_scales, dtype, transposed)
  return jnp.where(in_a_group(x_PK.shape[0], sizes_E, starts_E)[:, None], y_PN, 0)


def grouped_codes(
  x: Quantized, w, sizes_E, starts_E, power_of_two_scales: bool, dtype, transposed: bool = False
):
  """`grouped_rows` of quantised rows, which may have more tiles of scales than of codes.

  Rows outside all groups are undefined.
  """
  own = quantize_weights(w, power_of_two_scales, transposed)
  y_PN = _rows_times(x, *own, sizes_E, starts_E, dtype)
  return y_PN[:, : w.shape[1 if transposed else 2]]


def grouped_weights(x_PD, dy_PF, sizes_E, starts_E, power_of_two_scales: bool, dtype):
  """See `reference.grouped_weights`."""
  (P, D), F, E = x_PD.shape, dy_PF.shape[1], sizes_E.shape[0]
  _, row_Rr, _ = xla.row_tiles(sizes_E, starts_E, P)
  tiles = row_Rr[:, 0], jnp.sum(row_Rr < P, axis=1, dtype=i32)
  x, dy = (quantize_groups(a, *tiles, power_of_two_scales) for a in (x_PD, dy_PF))
  tiles_E = (sizes_E + TILE - 1) // TILE
  first_E = jnp.cumsum(tiles_E) - tiles_E
  shape = (x[0].shape[0] // ROWS, dy[0].shape[0] // COLUMNS)

  def kernel(tiles_hbm, first_hbm, x_hbm, xs_hbm, dy_hbm, dys_hbm, out_hbm, out_smem):
    expert, wg = jax.lax.axis_index("group"), jax.lax.axis_index("wg")
    d, f = plgpu.planar_snake(jax.lax.axis_index("place"), shape, 0, STRIP)
    lhs = x_hbm.at[pl.ds(d * ROWS, ROWS)], xs_hbm
    rhs = dy_hbm.at[pl.ds(f * COLUMNS, COLUMNS)], dys_hbm

    def finish(total):
      rows = pl.ds(d * ROWS + wg * WG_ROWS, WG_ROWS)

      def store(smem, c):
        there = out_hbm.at[expert, rows, pl.ds(f * COLUMNS + c, smem.shape[1])]
        plgpu.copy_smem_to_gmem(smem, there)

      _in_pieces(total, out_smem.at[wg], store)

    first, steps = first_hbm[expert], tiles_hbm[expert]
    _sums(lhs, rhs, first, steps, d * ROWS, f * COLUMNS, finish)

  operands = [tiles_E.astype(i32), first_E.astype(i32), *x, *dy]
  out = jax.ShapeDtypeStruct((E, shape[0] * ROWS, shape[1] * COLUMNS), dtype)
  dw = _run(kernel, "quantized_weights", operands, out, {"place": shape[0] * shape[1], "group": E})
  return dw[:, :D, :F]
