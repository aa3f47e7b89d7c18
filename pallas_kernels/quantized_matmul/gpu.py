"""The FP8 matmuls for H100 (Mosaic GPU): E4M3 codes into the tensor cores, promoted every 128.

Codes lie with the contraction last, as the tensor cores want both operands of one byte. XLA
quantises along a row; `gpu_quantize` quantises what is blocks or columns. A step multiplies one
scale tile, 128 deep, into float32 registers, which are scaled and added to the sum: the tensor
cores' own sums of E4M3 products are narrower than float32.

A thread block's product is 128 x 256, one warpgroup for each half of the columns, so that one adds
while the other multiplies. Two thread blocks of a cluster stay on the same rows: each fetches half
of their codes, and the copy engine hands them to both. A step then takes 40 KiB from the L2 cache
for 8.4 MFLOP.

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
WG_ROWS = 64  # of a product of the tensor cores
COLUMNS = 128  # of a warpgroup
ROWS, WIDTH = 128, WGS * COLUMNS  # of a thread block
STAGES = 4
CLUSTER = 2  # thread blocks with the same rows, where the columns fall into pairs of WIDTH

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
  """See `api.quantize_blocks`; the codes lie transposed in memory."""
  K, N = w_KN.shape
  codes_ENK, scale_ETN = quantize_weights(w_KN[None], power_of_two_scales)
  return Quantized(codes_ENK[0, :N, :K].T, scale_ETN[0, :, ::TILE])


def _codes(first, rows: int, shared: bool = False) -> plgpu.BlockSpec:
  """[rows, 128] codes of a step, as the tensor cores read them; contraction last.

  `shared`: with the cluster's other thread block.
  """
  return plgpu.BlockSpec(
    (rows, TILE),
    lambda k: (0, first + k),
    transforms=(plgpu.TilingTransform((8, TILE)), plgpu.SwizzleTransform(TILE)),
    collective_axes=("half",) if shared else (),
  )


def _scales(first, at, width: int) -> plgpu.BlockSpec:
  """A step's scales of `width` rows or columns from `at` on."""
  return plgpu.BlockSpec((None, pl.Element(width)), lambda k: (first + k, at))


def _sums(lhs, rhs, first, steps, lhs_at, rhs_at, blocks: bool, shared: bool, finish):
  """Adds the scaled products of `steps` tiles from `first` on; two warpgroups, 128 columns each.

  Args:
    lhs, rhs: (codes, scales) in memory, [128 or 256, K] and [T, rows] each.
    lhs_at, rhs_at: where their rows begin among the scales.
    blocks: whether a warpgroup's columns have one scale.
    shared: whether the cluster's other thread block has the same lhs.
    finish: what to do with a warpgroup's sums, two [64, 128], of the upper and the lower rows.
  """
  wg = jax.lax.axis_index("wg")
  shape = (WG_ROWS, COLUMNS)
  own = pl.ds(wg * COLUMNS, COLUMNS)

  def step(_, lhs_smem, low_smem, high_smem, rhs_smem, rhs_scale_smem, totals):
    def scaled_product(h, scale_smem):
      def multiply(acc):
        plgpu.wgmma(acc, lhs_smem.at[pl.ds(h * WG_ROWS, WG_ROWS)], rhs_smem.at[own].T)
        return acc[...]

      product = pl.run_scoped(multiply, plgpu.ACC(shape, f32))
      rows = plgpu.layout_cast(scale_smem[...], WGMMA.reduce(1))
      if blocks:
        rows = rows * rhs_scale_smem[wg * COLUMNS]
      product *= plgpu.layout_cast(jax.lax.broadcast_in_dim(rows, shape, (0,)), WGMMA)
      if not blocks:
        columns = plgpu.layout_cast(rhs_scale_smem[own], WGMMA.reduce(0))
        product *= plgpu.layout_cast(jax.lax.broadcast_in_dim(columns, shape, (1,)), WGMMA)
      return product

    return tuple(
      total + scaled_product(h, scale_smem)
      for h, (total, scale_smem) in enumerate(zip(totals, (low_smem, high_smem)))
    )

  def compute(run):
    zeros = plgpu.layout_cast(jnp.zeros(shape, f32), WGMMA)
    finish(run((zeros, zeros)))

  plgpu.emit_pipeline_warp_specialized(
    step,
    grid=(steps,),
    memory_registers=88 if blocks else 40,  # with these ptxas spills nothing
    in_specs=[
      _codes(first, ROWS, shared),
      _scales(first, lhs_at, WG_ROWS),
      _scales(first, lhs_at + WG_ROWS, WG_ROWS),
      _codes(first, WIDTH),
      _scales(first, rhs_at, WIDTH),
    ],
    max_concurrent_steps=STAGES,
    wg_axis="wg",
    num_compute_wgs=WGS,
    compute_context=compute,
  )(lhs[0], lhs[1], lhs[1], rhs[0], rhs[1])


def _in_pieces(totals, smem, store):
  """Brings sums into memory that copies read, and stores them, a line of bytes at a time."""
  width = LINE // smem.dtype.itemsize
  for h, total in enumerate(totals):
    for c in range(0, COLUMNS, width):
      plgpu.wait_smem_to_gmem(0, wait_read_only=True)
      smem[...] = total[:, c : c + width].astype(smem.dtype)
      plgpu.commit_smem()
      store(smem, h * WG_ROWS, c)
  plgpu.wait_smem_to_gmem(0)


def _cluster(columns: int) -> int:
  """Returns how many thread blocks a cluster has, for so many of them along the columns."""
  return CLUSTER if columns % CLUSTER == 0 else 1


def _place(rows: int, columns: int):
  """Returns which of the thread blocks along rows and columns this one is."""
  cluster = _cluster(columns)
  shape = (rows, columns // cluster)
  row, column = plgpu.planar_snake(jax.lax.axis_index("place"), shape, 0, STRIP)
  return row, column * cluster + (jax.lax.axis_index("half") if cluster > 1 else 0)


def _run(kernel, name: str, operands, out_type, rows: int, columns: int, **grid: int):
  cluster = _cluster(columns)
  return call(
    kernel,
    name,
    operands,
    out_type,
    {"place": rows * columns // cluster} | grid,
    [rows_to_store(out_type.dtype)],
    warpgroups=WGS + 1,
    cluster={"half": cluster} if cluster > 1 else None,
  )


@functools.partial(jax.jit, static_argnums=(4, 5))  # lowered once for all layers
def _tiles_times(x: Quantized, from_T, plan: Tiles, w: Quantized, P: int, dtype):
  """Returns [P, N], each row times its expert's matrix; rows of no tile are undefined.

  Args:
    x: codes [., K] and scale [T, .], from which `from_T` says where each tile of `plan` begins, at
      a multiple of EIGHT.
    plan: tiles without rows come last.
    w: codes [E, N, K] and scale [E, T, N], of `quantize_weights`: 128 columns have one scale.
  """
  N = w.codes.shape[1]
  codes_PK = whole(x.codes, axis0=EIGHT, axis1=TILE)
  scale_TP = whole(x.scale, axis1=EIGHT)
  codes_ENK = whole(w.codes, axis1=COLUMNS, axis2=TILE)
  scale_ETN = whole(w.scale, axis2=COLUMNS)
  steps = codes_PK.shape[1] // TILE
  width = codes_ENK.shape[1]
  T, columns = plan.expert_T.shape[0], pl.cdiv(width, WIDTH)

  def kernel(used_hbm, from_hbm, expert_hbm, first_hbm, begin_hbm, end_hbm, *refs):
    x_hbm, xs_hbm, w_hbm, ws_hbm, out_hbm, out_smem = refs
    tile, column = _place(T, columns)
    wg = jax.lax.axis_index("wg")
    own_column = column * WIDTH + wg * COLUMNS

    def finish(totals):
      # Read here and not before the sum, which takes the registers.
      first, begin, end = (a[tile] for a in (first_hbm, begin_hbm, end_hbm))

      def store(smem, row, c):
        own = first + row
        skipped = jnp.clip(begin - own, 0, WG_ROWS)
        count = jnp.clip(end - own, 0, WG_ROWS) - skipped
        there = pl.ds(own_column + c, smem.shape[1])
        store_rows(smem, out_hbm, own, there, skipped, count)

      pl.when(own_column < width)(lambda: _in_pieces(totals, out_smem.at[wg], store))

    @pl.when(tile < used_hbm[0])
    def _():
      expert, source = expert_hbm[tile], from_hbm[tile]
      lhs = x_hbm.at[pl.ds(source, ROWS)], xs_hbm
      rhs = w_hbm.at[expert, pl.ds(column * WIDTH, WIDTH)], ws_hbm.at[expert]
      at = jnp.int32(0), jnp.int32(steps), source, column * WIDTH
      _sums(lhs, rhs, *at, blocks=True, shared=_cluster(columns) > 1, finish=finish)

  y_PN = _run(
    kernel,
    "quantized_rows",
    [
      jnp.sum(plan.end_T > 0, keepdims=True, dtype=i32),
      from_T,
      *plan,
      codes_PK,
      scale_TP,
      codes_ENK,
      scale_ETN,
    ],
    jax.ShapeDtypeStruct((P, width), dtype),
    T,
    columns,
  )
  return y_PN[:, :N]


def rows_times(x: Quantized, w: Quantized, sizes_E, starts_E, dtype):
  """Returns [P, N], each row times its expert's matrix; rows outside all groups are undefined.

  Args:
    x: `quantize_rows` of the rows.
    w: `quantize_weights` of the matrices.
  """
  P = x.codes.shape[0]
  plan = tiles(sizes_E, starts_E, -(-P // EIGHT) * EIGHT)
  return _tiles_times(x, plan.first_T, plan, w, P, dtype)


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
  (D, _), (F, _) = x.codes.shape, dy.codes.shape
  columns = pl.cdiv(F, WIDTH)

  def kernel(tiles_hbm, first_hbm, x_hbm, xs_hbm, dy_hbm, dys_hbm, out_hbm, out_smem):
    expert, wg = jax.lax.axis_index("group"), jax.lax.axis_index("wg")
    row, column = _place(D // ROWS, columns)
    own_column = column * WIDTH + wg * COLUMNS
    lhs = x_hbm.at[pl.ds(row * ROWS, ROWS)], xs_hbm
    rhs = dy_hbm.at[pl.ds(column * WIDTH, WIDTH)], dys_hbm

    def store(smem, r, c):
      rows, own = pl.ds(row * ROWS + r, WG_ROWS), pl.ds(own_column + c, smem.shape[1])
      plgpu.copy_smem_to_gmem(smem, out_hbm.at[expert, rows, own])

    def finish(totals):
      pl.when(own_column < F)(lambda: _in_pieces(totals, out_smem.at[wg], store))

    at = first_hbm[expert], tiles_hbm[expert], row * ROWS, column * WIDTH
    _sums(lhs, rhs, *at, blocks=False, shared=_cluster(columns) > 1, finish=finish)

  operands = [tiles_E.astype(i32), first_E.astype(i32), *x, *dy]
  out = jax.ShapeDtypeStruct((E, D, F), dtype)
  return _run(kernel, "quantized_weights", operands, out, D // ROWS, columns, group=E)


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
