"""Grouped matmuls for H100 (Mosaic GPU): tiles of rows, each times its own expert's matrices.

A group's tiles begin at its first row, or up to 7 rows before it, because the copy engine brings
rows into the layout of the tensor cores eight at a time. So no group needs padding, and on average
half a tile a group is computed in vain. Thread blocks past the last tile end at once, so rows after
the last group cost nothing. In a thread block one warpgroup copies and two multiply, 64 rows each,
in 16-bit floating point with float32 sums.

Shapes: P rows, D hidden, F inner, E experts, K contraction, N columns, T tiles, n columns of a
tile.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_gpu import call
from pallas_kernels.permute.gpu import MOST_WIDTH

WGS = 2  # warpgroups that multiply
WG_ROWS = 64  # of a warpgroup's product
ROWS = WGS * WG_ROWS  # of a tile
EIGHT = 8  # rows of the tensor cores' form
STEP = 64  # of a contraction at a time: 128 bytes, the widest swizzle
LINE = 128  # bytes of a row that are stored at a time
STAGES = 4  # copies under way
SMEM_BYTES = 227 * 1024  # of a thread block
ACC_COLUMNS = 256  # of float32 sums a warpgroup has registers for
STRIP = 8  # tiles of rows that go through all columns together, for the L2 cache

f32 = jnp.float32


class Tiles(NamedTuple):
  """Which rows each tile holds, and the expert they belong to; int32."""

  expert_T: Any
  first_T: Any  # of ROWS rows, a multiple of EIGHT
  begin_T: Any  # the expert's first row among them
  end_T: Any  # the end of the expert's rows; 0 past the last tile


def tiles(sizes_E, starts_E, num_rows: int) -> Tiles:
  """Cuts each group into tiles of rows."""
  E = sizes_E.shape[0]
  base_E = starts_E // EIGHT * EIGHT
  end_E = starts_E + sizes_E
  tiles_E = jnp.where(sizes_E > 0, (end_E - base_E + ROWS - 1) // ROWS, 0)
  last_E = jnp.cumsum(tiles_E)
  most = (num_rows + min(E, num_rows) * (ROWS + EIGHT - 2)) // ROWS
  tile_T = jnp.arange(most, dtype=jnp.int32)
  expert_T = jnp.minimum(jnp.searchsorted(last_E, tile_T, side="right"), E - 1)
  first_T = base_E[expert_T] + (tile_T - (last_E - tiles_E)[expert_T]) * ROWS
  begin_T = jnp.maximum(first_T, starts_E[expert_T])
  plan = Tiles(expert_T, first_T, begin_T, end_E[expert_T])
  return Tiles(*(jnp.where(tile_T < last_E[-1], a, 0).astype(jnp.int32) for a in plan))


def _by_eights(a):
  """Pads the number of rows to a multiple of EIGHT with zeros; a copy where that is needed."""
  return jnp.pad(a, [(0, -a.shape[0] % EIGHT)] + [(0, 0)] * (a.ndim - 1))


def _split(items, lengths):
  """Cuts a sequence into lists of these lengths and a last one of the rest."""
  parts, at = [], 0
  for length in lengths:
    parts.append(list(items[at : at + length]))
    at += length
  return [*parts, list(items[at:])]


def _starts(sizes_E, starts_E):
  return jnp.cumsum(sizes_E) - sizes_E if starts_E is None else starts_E


def _check(**sizes: tuple[int, int]) -> None:
  for name, (size, multiple) in sizes.items():
    if size % multiple or not size:
      raise ValueError(f"{name} must be a multiple of {multiple}, got {size}")


def refused(dtype, D: int, F: int) -> str | None:
  """Returns the rule that an expert layer breaks, gradients and permutation included, or None."""
  if dtype not in (jnp.bfloat16, jnp.float16):
    return f"rows must be bfloat16 or float16, got {dtype}"
  if D % ROWS or F % ROWS or D > MOST_WIDTH:
    return f"D must be a multiple of {ROWS}, at most {MOST_WIDTH}, and F one, got {D} and {F}"
  return None


def _check_dtypes(*arrays) -> None:
  if len({a.dtype for a in arrays}) > 1 or arrays[0].dtype not in (jnp.bfloat16, jnp.float16):
    raise ValueError(
      "rows and matrices must have one dtype, bfloat16 or float16, got "
      + ", ".join(str(a.dtype) for a in arrays)
    )


def _swizzle(columns: int, dtype):
  """The layout in shared memory that the tensor cores read."""
  swizzle = plgpu.find_swizzle(columns * dtype.itemsize * 8)
  return (
    plgpu.TilingTransform((8, swizzle // dtype.itemsize)),
    plgpu.SwizzleTransform(swizzle),
  )


def _block(shape, index_map, dtype) -> plgpu.BlockSpec:
  """A block of a pipeline's input, which is kept for one more step."""
  transforms = _swizzle(shape[1], dtype)
  return plgpu.BlockSpec(shape, index_map, transforms=transforms, delay_release=1)


def rows_to_store(dtype):
  """Shared memory for lines of 64 rows a warpgroup.

  A swizzle without tiles avoids bank conflicts and lets copies begin at any row, because it depends
  on addresses alone.
  """
  shape = (WGS, WG_ROWS, LINE // jnp.dtype(dtype).itemsize)
  return plgpu.SMEM(shape, dtype, transforms=(plgpu.SwizzleTransform(LINE),))


def store_rows(smem, hbm, first, columns, begin, count):
  """Copies `count` rows from `begin` on to HBM, in powers of 2, since a copy's length is static."""
  for length in (64, 32, 16, 8, 4, 2, 1):
    here = smem.at[pl.ds(begin, length)]
    there = hbm.at[pl.ds(first + begin, length), columns]
    pl.when((count & length) != 0)(functools.partial(plgpu.copy_smem_to_gmem, here, there))
    begin = begin + (count & length)


# Lowered once for all layers.
@functools.partial(jax.jit, static_argnames=("body", "transposed", "outs", "sums"))
def _over_rows(
  body: Callable,
  rows,
  matrices,
  transposed: bool,
  sizes_E,
  starts_E,
  *,
  weight_P=None,
  extras=(),
  outs: int = 1,
  sums: bool = False,
):
  """Multiplies each row with its expert's matrices and stores what `body` makes of it.

  Args:
    body: (products, extras, weight) -> the outputs' values, and with `sums` a last one, all
      float32 [64, c]; called on some columns at a time.
    rows: [P, K] each. One: a product a matrix. As many as matrices: the sum of their products.
    matrices: [E, K, N] each, or [E, N, K] when transposed.
    weight_P: float32 or None.
    extras: [P, N] each.
    outs: how many outputs, [P, N] in the rows' dtype.
    sums: whether the last value's sum over N is another output, float32 [P].
  """
  _check_dtypes(*rows, *matrices, *extras)
  num_rows, dtype = rows[0].shape[0], rows[0].dtype
  rows, extras = [_by_eights(a) for a in rows], [_by_eights(a) for a in extras]
  P, K = rows[0].shape
  N = matrices[0].shape[1 if transposed else 2]
  _check(K=(K, STEP), N=(N, STEP))
  products = len(matrices) if len(rows) == 1 else 1
  simple = len(rows) == len(matrices) == 1 and not extras
  most = ACC_COLUMNS if simple else ACC_COLUMNS // 2
  n = next(n for n in (256, 128, 64) if N % n == 0 and n <= most)
  piece = STEP
  size = dtype.itemsize
  stage = (ROWS * len(rows) + n * len(matrices)) * STEP * size
  room = SMEM_BYTES - ROWS * (len(extras) * n + piece) * size - 2048
  stages = min(STAGES, room // stage)
  plan = tiles(sizes_E, _starts(sizes_E, starts_E), P)
  T, columns = plan.expert_T.shape[0], N // n
  weights = [] if weight_P is None else [weight_P]
  wide = len(extras) + len(weights)

  def kernel(expert_hbm, first_hbm, begin_hbm, end_hbm, *refs):
    split = [len(rows), len(matrices), len(weights), len(extras), outs, int(sums)]
    row_hbms, matrix_hbms, weight_hbm, extra_hbms, out_hbms, sum_hbm, refs = _split(refs, split)
    out_smem, weight_smem, arrived, *extra_smems = refs
    place = jax.lax.axis_index("tile")
    tile, column = plgpu.planar_snake(place, (T, columns), 0, STRIP)
    wg = jax.lax.axis_index("wg")
    first, end = first_hbm[tile], end_hbm[tile]
    own_first = first + wg * WG_ROWS
    here = pl.ds(column * n, n)
    own = pl.ds(own_first, WG_ROWS)

    def multiply(_, *refs):
      row_smems, matrix_smems, [accs] = _split(refs, [len(rows), len(matrices)])
      for i, matrix_smem in enumerate(matrix_smems):
        mine = row_smems[i % len(rows)].at[pl.ds(wg * WG_ROWS, WG_ROWS)]
        plgpu.wgmma(accs[i % products], mine, matrix_smem.T if transposed else matrix_smem)
      plgpu.wgmma_wait(len(matrices))  # this step's go on, those of the step before are done
      return accs

    def compute(run):
      if weights:
        plgpu.copy_gmem_to_smem(weight_hbm[0].at[own], weight_smem.at[wg], arrived.at[wg])
      for hbm, smem in zip(extra_hbms, extra_smems):
        plgpu.copy_gmem_to_smem(hbm.at[own, here], smem.at[wg], arrived.at[wg])

      def scope(*accs):
        run(accs)
        if wide:
          plgpu.barrier_wait(arrived.at[wg])
        finish([acc[...] for acc in accs])

      pl.run_scoped(scope, *[plgpu.ACC((WG_ROWS, n), f32)] * products)

    def finish(values):
      weight = None
      if weights:
        weight = plgpu.layout_cast(weight_smem[wg], plgpu.Layout.WGMMA.reduce(1))
        weight = jax.lax.broadcast_in_dim(weight, (WG_ROWS, piece), (0,))
      begin = jnp.clip(begin_hbm[tile] - own_first, 0, WG_ROWS)
      count = jnp.clip(end - own_first, 0, WG_ROWS) - begin
      total = None
      for c in range(0, n, piece):
        part = slice(c, c + piece)
        extra = [smem[wg, :, part].astype(f32) for smem in extra_smems]
        results = body([value[:, part] for value in values], extra, weight)
        for out_hbm, result in zip(out_hbms, results):
          plgpu.wait_smem_to_gmem(0, wait_read_only=True)
          out_smem[wg] = result.astype(dtype)
          plgpu.commit_smem()
          there = pl.ds(column * n + c, piece)
          store_rows(out_smem.at[wg], out_hbm, own_first, there, begin, count)
        if sums:
          row_sum = jnp.sum(results[outs], axis=1)
          total = row_sum if total is None else total + row_sum
      if sums:
        sum_hbm[0][column, tile, wg] = total
      plgpu.wait_smem_to_gmem(0)

    if transposed:
      matrix_spec = _block((n, STEP), lambda k: (0, k), dtype)
    else:
      matrix_spec = _block((STEP, n), lambda k: (k, 0), dtype)
    row_spec = _block((ROWS, STEP), lambda k: (0, k), dtype)
    pipeline = plgpu.emit_pipeline_warp_specialized(
      multiply,
      grid=(jnp.int32(K // STEP),),  # not static: that allows fewer steps than stages
      memory_registers=24,
      in_specs=[row_spec] * len(rows) + [matrix_spec] * len(matrices),
      max_concurrent_steps=stages,
      wg_axis="wg",
      num_compute_wgs=WGS,
      compute_context=compute,
    )

    @pl.when(end > 0)
    def _():
      expert = expert_hbm[tile]
      at = (expert, here) if transposed else (expert, slice(None), here)
      all_rows = [row_hbm.at[pl.ds(first, ROWS)] for row_hbm in row_hbms]
      pipeline(*all_rows, *(matrix_hbm.at[at] for matrix_hbm in matrix_hbms))

  operands = [*plan, *rows, *matrices, *weights, *extras]
  out_types = [jax.ShapeDtypeStruct((P, N), dtype)] * outs
  out_types += [jax.ShapeDtypeStruct((columns, T, WGS, WG_ROWS), f32)] * sums
  extra_smem = plgpu.SMEM((WGS, WG_ROWS, n), dtype, transforms=_swizzle(n, dtype))
  results = call(
    kernel,
    "grouped_matmul_rows",
    operands,
    out_types,
    {"tile": T * columns},
    [
      rows_to_store(dtype),
      plgpu.SMEM((WGS, WG_ROWS), f32),
      plgpu.Barrier(num_arrivals=max(wide, 1), num_barriers=WGS),
      *[extra_smem] * len(extras),
    ],
    warpgroups=WGS + 1,
  )
  wide_results = [result[:num_rows] for result in results[:outs]]
  if not sums:
    return wide_results
  row_TR = plan.first_T[:, None] + jnp.arange(ROWS, dtype=jnp.int32)[None]
  own_TR = (row_TR >= plan.begin_T[:, None]) & (row_TR < plan.end_T[:, None])
  sum_TR = jnp.sum(results[outs], axis=0).reshape(T, ROWS)
  sum_P = jnp.zeros_like(results[outs], shape=num_rows)
  sum_P = sum_P.at[jnp.where(own_TR, row_TR, num_rows)].set(sum_TR, mode="drop")
  return [*wide_results, sum_P]


def grouped_matmul(x_PD, w_EDF, sizes_E, starts_E=None):
  """Multiplies each row with its expert's matrix.

  Args:
    x_PD: rows in expert order, bfloat16 or float16.
    w_EDF: in x's dtype; D and F multiples of 64.
    sizes_E: int32, each expert's rows.
    starts_E: int32, each expert's first row; None: the groups lie one after the other.

  Returns:
    [P, F] in x's dtype; rows outside all groups are undefined.
  """
  return _over_rows(_as_is, [x_PD], [w_EDF], False, sizes_E, starts_E)[0]


def _as_is(products, extras, weight):
  return products


def grouped_matmul_transposed(dy_PF, w_EDF, sizes_E, starts_E=None):
  """Returns [P, D], each row times its expert's matrix transposed; see `grouped_matmul`."""
  return _over_rows(_as_is, [dy_PF], [w_EDF], True, sizes_E, starts_E)[0]


def grouped_swiglu_in(x_PD, w_gate_EDF, w_up_EDF, sizes_E, starts_E=None):
  """Returns gate and up [P, F] in one pass over the rows; see `grouped_matmul`."""
  return _over_rows(_as_is, [x_PD], [w_gate_EDF, w_up_EDF], False, sizes_E, starts_E, outs=2)


def _activation(products, _, weight):
  gate, up = products
  return [gate * jax.lax.logistic(gate) * up * weight, gate, up]


def grouped_swiglu_hidden(
  x_PD, weight_P, w_gate_EDF, w_up_EDF, sizes_E, starts_E=None, keep: bool = False
):
  """Returns weight * silu(gate) * up [P, F], without storing gate and up.

  `weight_P` is float32; for the rest see `grouped_matmul`. With `keep` (inner, gate, up).
  """
  results = _over_rows(
    _activation,
    [x_PD],
    [w_gate_EDF, w_up_EDF],
    False,
    sizes_E,
    starts_E,
    weight_P=weight_P,
    outs=3 if keep else 1,
  )
  return results if keep else results[0]


def _through_activation(products, extras, weight):
  (dinner,), (gate, up) = products, extras
  sigmoid = jax.lax.logistic(gate)
  silu = gate * sigmoid
  dact = dinner * weight
  dgate = dact * up * (sigmoid + silu * (1 - sigmoid))
  return [dgate, dact * silu, silu * up * weight, dinner * silu * up]


@functools.partial(jax.jit, static_argnames="dtype")
def grouped_matmul_weights(x_PD, dy_PF, sizes_E, starts_E=None, dtype=f32):
  """Returns x^T dy of each group's rows, [E, D, F] in dtype; zeros for an empty group.

  Args:
    x_PD, dy_PF: rows in expert order, bfloat16 or float16; D a multiple of 128, F of 64. Rows
      outside all groups are not read, and may be NaN.
    sizes_E, starts_E: see `grouped_matmul`.
  """
  _check_dtypes(x_PD, dy_PF)
  (_, D), F = x_PD.shape, dy_PF.shape[1]
  E = sizes_E.shape[0]
  _check(D=(D, ROWS), F=(F, STEP))
  n = next(n for n in (256, 128, 64) if F % n == 0)
  starts_E = _starts(sizes_E, starts_E).astype(jnp.int32)

  piece = LINE // jnp.dtype(dtype).itemsize

  def kernel(size_hbm, start_hbm, x_hbm, dy_hbm, out_hbm, out_smem):
    expert, wg = jax.lax.axis_index("group"), jax.lax.axis_index("wg")
    d, f = plgpu.planar_snake(jax.lax.axis_index("block"), (D // ROWS, F // n), 0, STRIP)
    size, start = size_hbm[expert], start_hbm[expert]
    base = jax.lax.div(start, EIGHT) * EIGHT

    def multiply(indices, x_smem, dy_smem, sum_ref):
      begin = start - base - indices[0] * STEP
      end = begin + size

      @pl.when((begin > 0) | (end < STEP))
      def _():  # Both warpgroups write the same zeros in place of rows outside the group.
        row = plgpu.broadcasted_iota(jnp.int32, (STEP, 64), 0, layout=plgpu.Layout.WGMMA)
        own = (row >= begin) & (row < end)
        for ref in (x_smem, dy_smem):
          for c in range(0, ref.shape[1], 64):
            part = ref.at[:, c : c + 64]
            part[...] = jnp.where(own, part[...], jnp.zeros((), ref.dtype))
        plgpu.commit_smem()

      mine = x_smem.at[:, pl.ds(wg * WG_ROWS, WG_ROWS)]
      plgpu.wgmma(sum_ref, mine.T, dy_smem)
      plgpu.wgmma_wait(1)
      return sum_ref

    def compute(run):
      def scope(sum_ref):
        run(sum_ref)
        sums, rows = sum_ref[...], pl.ds(d * ROWS + wg * WG_ROWS, WG_ROWS)
        for c in range(0, n, piece):
          plgpu.wait_smem_to_gmem(0, wait_read_only=True)
          out_smem[wg] = sums[:, c : c + piece].astype(dtype)
          plgpu.commit_smem()
          there = out_hbm.at[expert, rows, pl.ds(f * n + c, piece)]
          plgpu.copy_smem_to_gmem(out_smem.at[wg], there)
        plgpu.wait_smem_to_gmem(0)

      pl.run_scoped(scope, plgpu.ACC((WG_ROWS, n), f32))

    def block(width, column):
      return _block((pl.Element(STEP), width), lambda k: (base + k * STEP, column), x_PD.dtype)

    plgpu.emit_pipeline_warp_specialized(
      multiply,
      grid=(jnp.where(size > 0, (start - base + size + STEP - 1) // STEP, 0),),
      memory_registers=24,
      in_specs=[block(ROWS, d), block(n, f)],
      max_concurrent_steps=STAGES,
      wg_axis="wg",
      num_compute_wgs=WGS,
      compute_context=compute,
    )(x_hbm, dy_hbm)

  operands = [sizes_E.astype(jnp.int32), starts_E, _by_eights(x_PD), _by_eights(dy_PF)]
  return call(
    kernel,
    "grouped_matmul_weights",
    operands,
    jax.ShapeDtypeStruct((E, D, F), dtype),
    {"group": E, "block": D // ROWS * (F // n)},
    [rows_to_store(dtype)],
    warpgroups=WGS + 1,
  )


# The expert's SwiGLU with its gradients.


@jax.custom_vjp
def grouped_swiglu(x_PD, weight_P, w_gate_EDF, w_up_EDF, w_down_EFD, sizes_E, starts_E):
  """See `api.grouped_swiglu`; rows outside all groups are undefined."""
  inner_PF = grouped_swiglu_hidden(x_PD, weight_P, w_gate_EDF, w_up_EDF, sizes_E, starts_E)
  return grouped_matmul(inner_PF, w_down_EFD, sizes_E, starts_E)


def _fwd(x_PD, weight_P, w_gate_EDF, w_up_EDF, w_down_EFD, sizes_E, starts_E):
  plan = (sizes_E, starts_E)
  inner_PF, gate_PF, up_PF = grouped_swiglu_hidden(
    x_PD, weight_P, w_gate_EDF, w_up_EDF, *plan, keep=True
  )
  y_PD = grouped_matmul(inner_PF, w_down_EFD, *plan)
  return y_PD, (x_PD, weight_P, w_gate_EDF, w_up_EDF, w_down_EFD, plan, gate_PF, up_PF)


def _bwd(saved, dy_PD):
  x_PD, weight_P, w_gate_EDF, w_up_EDF, w_down_EFD, plan, gate_PF, up_PF = saved
  dgate_PF, dup_PF, inner_PF, dweight_P = _over_rows(
    _through_activation,
    [dy_PD],
    [w_down_EFD],
    True,
    *plan,
    weight_P=weight_P,
    extras=[gate_PF, up_PF],
    outs=3,
    sums=True,
  )
  dx_PD = _over_rows(_as_is, [dgate_PF, dup_PF], [w_gate_EDF, w_up_EDF], True, *plan)[0]
  weights = functools.partial(
    grouped_matmul_weights, sizes_E=plan[0], starts_E=plan[1], dtype=dy_PD.dtype
  )
  dw_gate, dw_up = weights(x_PD, dgate_PF), weights(x_PD, dup_PF)
  return dx_PD, dweight_P, dw_gate, dw_up, weights(inner_PF, dy_PD), None, None


grouped_swiglu.defvjp(_fwd, _bwd)


@jax.custom_vjp
def grouped_matmul_vjp(x_PD, w_EDF, sizes_E, starts_E):
  """`grouped_matmul` with its gradients."""
  return grouped_matmul(x_PD, w_EDF, sizes_E, starts_E)


def _matmul_bwd(saved, dy_PF):
  x_PD, w_EDF, sizes_E, starts_E = saved
  dx_PD = grouped_matmul_transposed(dy_PF, w_EDF, sizes_E, starts_E)
  dw_EDF = grouped_matmul_weights(x_PD, dy_PF, sizes_E, starts_E, w_EDF.dtype)
  return dx_PD, dw_EDF, None, None


grouped_matmul_vjp.defvjp(lambda *args: (grouped_matmul(*args), args), _matmul_bwd)
