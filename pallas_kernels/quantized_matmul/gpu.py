"""The FP8 matmuls for H100 (Mosaic GPU): E4M3 codes into the tensor cores, promoted every 128.

Codes lie with the contraction last, as the tensor cores want both operands of one byte. XLA
quantises along a row; `gpu_quantize` quantises what is blocks or columns. A step multiplies one
scale tile, 128 deep, into float32 registers, which are scaled and added to the sum: the tensor
cores' own sums of E4M3 products are narrower than float32.

Shapes: P rows, K contraction, N columns, E experts, T = ceil(K / 128) tiles; D hidden, F inner.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.grouped_matmul.gpu import (
  EIGHT,
  LINE,
  STRIP,
  Tiles,
  rows_to_store,
  store_rows,
  tiles,
)
from pallas_kernels.mosaic_gpu import call
from pallas_kernels.permute import in_a_group
from pallas_kernels.quantized_matmul import xla
from pallas_kernels.quantized_matmul.e4m3 import TILE, Quantized
from pallas_kernels.quantized_matmul.gpu_quantize import (
  quantize_groups,
  quantize_groups_both,
  quantize_weights,
  quantize_weights_both,
  whole,
)
from pallas_kernels.varying import vary_alike

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


@functools.partial(jax.jit, static_argnums=(4, 5))  # lowered once for all layers
def _tiles_times(x: Quantized, from_T, plan: Tiles, w: Quantized, P: int, dtype):
  """Returns [P, N], each row times its expert's matrix; rows of no tile are undefined.

  Args:
    x: codes [., K] and scale [T, .], from which `from_T` says where each tile of `plan` begins, at
      a multiple of EIGHT.
    w: codes [E, N, K] and scale [E, T, N].
  """
  N = w.codes.shape[1]
  codes_PK = whole(x.codes, axis0=EIGHT, axis1=TILE)
  scale_TP = whole(x.scale, axis1=EIGHT)
  codes_ENK = whole(w.codes, axis1=COLUMNS, axis2=TILE)
  scale_ETN = whole(w.scale, axis2=COLUMNS)
  steps = codes_PK.shape[1] // TILE
  columns = codes_ENK.shape[1] // COLUMNS
  T = plan.expert_T.shape[0]

  def kernel(from_hbm, expert_hbm, first_hbm, begin_hbm, end_hbm, *refs):
    x_hbm, xs_hbm, w_hbm, ws_hbm, out_hbm, out_smem = refs
    tile, column = plgpu.planar_snake(jax.lax.axis_index("place"), (T, columns), 0, STRIP)
    wg = jax.lax.axis_index("wg")
    source, end = from_hbm[tile], end_hbm[tile]
    own_first = first_hbm[tile] + wg * WG_ROWS

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
      lhs = x_hbm.at[pl.ds(source, ROWS)], xs_hbm
      rhs = w_hbm.at[expert, pl.ds(column * COLUMNS, COLUMNS)], ws_hbm.at[expert]
      _sums(lhs, rhs, jnp.int32(0), jnp.int32(steps), source, column * COLUMNS, finish)

  y_PN = _run(
    kernel,
    "quantized_rows",
    [from_T, *plan, codes_PK, scale_TP, codes_ENK, scale_ETN],
    jax.ShapeDtypeStruct((P, columns * COLUMNS), dtype),
    {"place": T * columns},
  )
  return y_PN[:, :N]


def rows_times(x: Quantized, w: Quantized, sizes_E, starts_E, dtype):
  """Returns [P, N], each row times its expert's matrix; rows outside all groups are undefined."""
  P = x.codes.shape[0]
  plan = tiles(sizes_E, starts_E, -(-P // EIGHT) * EIGHT)
  return _tiles_times(x, plan.first_T, plan, w, P, dtype)


def product(lhs: Quantized, rhs: Quantized, dtype, power_of_two_scales: bool = False):
  """See `reference.product`."""
  del power_of_two_scales  # one way for all
  rows, w = jnp.full(1, lhs.codes.shape[0], i32), Quantized(rhs.codes.T[None], rhs.scale[None])
  return rows_times(lhs, w, rows, jnp.zeros(1, i32), dtype)


def grouped_rows(
  x_PK, w, sizes_E, starts_E, power_of_two_scales: bool, dtype, transposed: bool = False
):
  """See `reference.grouped_rows`."""
  x = quantize_rows(x_PK, power_of_two_scales)
  own = quantize_weights(w, power_of_two_scales, transposed)
  y_PN = rows_times(x, own, sizes_E, starts_E, dtype)[:, : w.shape[1 if transposed else 2]]
  return jnp.where(in_a_group(x_PK.shape[0], sizes_E, starts_E)[:, None], y_PN, 0)


def grouped_weights(x_PD, dy_PF, sizes_E, starts_E, power_of_two_scales: bool, dtype):
  """See `reference.grouped_weights`."""
  _, first_R, count_R = _group_tiles(sizes_E, starts_E, x_PD.shape[0])
  x, dy = (quantize_groups(a, first_R, count_R, power_of_two_scales) for a in (x_PD, dy_PF))
  dw = _weights(x, dy, sizes_E, dtype)
  return dw[:, : x_PD.shape[1], : dy_PF.shape[1]]


def _group_tiles(sizes_E, starts_E, num_rows: int):
  """Returns the tiles of rows of `quantize_groups`: their experts, first rows and sizes."""
  expert_R, row_Rr, _ = xla.row_tiles(sizes_E, starts_E, num_rows)
  return expert_R, row_Rr[:, 0], jnp.sum(row_Rr < num_rows, axis=1, dtype=i32)


@functools.partial(jax.jit, static_argnums=3)
def _weights(x: Quantized, dy: Quantized, sizes_E, dtype):
  """Returns [E, D, F], the sums over each group's tiles of `quantize_groups`."""
  E = sizes_E.shape[0]
  tiles_E = (sizes_E + TILE - 1) // TILE
  first_E = jnp.cumsum(tiles_E) - tiles_E
  shape = (x.codes.shape[0] // ROWS, dy.codes.shape[0] // COLUMNS)

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
  return _run(
    kernel, "quantized_weights", operands, out, {"place": shape[0] * shape[1], "group": E}
  )


# A group's product with its gradients.


def multiply(power_of_two: bool, x_PD, w_EDF, sizes_E, starts_E):
  """`api.quantized_grouped_matmul`; rows outside all groups are undefined, in the gradient too.

  Weights are quantised once for the product and the gradient of x, where nothing recomputes the
  forward pass. In place of them the gradient keeps their codes.
  """
  x_PD, w_EDF = vary_alike(x_PD, w_EDF)
  return _multiply(power_of_two, w_EDF.dtype, x_PD, w_EDF, sizes_E, starts_E)


def matmul(power_of_two: bool, x_MD, w_DF):
  """See `api.quantized_matmul`: a single group."""
  rows = jnp.full(1, x_MD.shape[0], i32)
  return multiply(power_of_two, x_MD, w_DF[None], rows, jnp.zeros(1, i32))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _multiply(power_of_two, w_dtype, x_PD, w_EDF, sizes_E, starts_E):
  del w_dtype  # for the gradient
  x = quantize_rows(x_PD, power_of_two)
  w = quantize_weights(w_EDF, power_of_two)
  return rows_times(x, w, sizes_E, starts_E, x_PD.dtype)[:, : w_EDF.shape[2]]


def _multiply_fwd(power_of_two, _, x_PD, w_EDF, sizes_E, starts_E):
  x = quantize_rows(x_PD, power_of_two)
  w, w_transposed = quantize_weights_both(w_EDF, power_of_two)
  y_PF = rows_times(x, w, sizes_E, starts_E, x_PD.dtype)[:, : w_EDF.shape[2]]
  return y_PF, (x_PD, w_transposed, sizes_E, starts_E)


def _multiply_bwd(power_of_two, w_dtype, saved, dy_PF):
  x_PD, w, *plan = saved
  return *gradients(power_of_two, w_dtype, x_PD, [w], plan, [dy_PF]), None, None


_multiply.defvjp(_multiply_fwd, _multiply_bwd, optimize_remat=True)


def gradients(power_of_two: bool, w_dtype, x_PD, weights, plan, dys):
  """Returns the gradients of the products of x with some matrices: x's, and each matrix's.

  Args:
    weights: `quantize_weights` of each matrix, transposed.
    plan: the groups' sizes and starts.
    dys: [P, F] each.
  """
  (P, D), (sizes_E, starts_E) = x_PD.shape, plan
  expert_R, first_R, count_R = _group_tiles(sizes_E, starts_E, P)
  x = quantize_groups(x_PD, first_R, count_R, power_of_two)
  end_R = jnp.where(count_R > 0, first_R + count_R, 0)
  tiles_R = Tiles(expert_R, first_R, first_R, end_R)
  from_R = jnp.arange(first_R.shape[0], dtype=i32) * TILE
  dx, dws = [], []
  for w, dy_PF in zip(weights, dys):
    columns, rows = quantize_groups_both(dy_PF, first_R, count_R, power_of_two)
    dx.append(_tiles_times(rows, from_R, tiles_R, w, P, x_PD.dtype)[:, :D])
    dws.append(_weights(x, columns, sizes_E, w_dtype)[:, :D, : dy_PF.shape[1]])
  return sum(dx[1:], dx[0]), *dws
