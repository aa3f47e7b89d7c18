"""The FP8 matmuls of experts for TPU (Mosaic): each step has rows of one expert.

Rows are laid out anew, so that a group starts at a multiple of a step's rows and zeros fill its
last step. Steps are as many as the groups need.

Shapes: P rows in expert order, A rows laid out, S steps of m rows; K contraction, N columns,
T = ceil(K / 128) tiles; D hidden, F inner, E experts.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.grouped_matmul.tpu_tiles import schedule
from pallas_kernels.permute import group_starts
from pallas_kernels.quantized_matmul import tpu
from pallas_kernels.quantized_matmul.e4m3 import TILE, Quantized, f32
from pallas_kernels.quantized_matmul.xla import row_tiles


def step_rows(P: int, E: int) -> int:
  """Returns m: half a step a group is lost on average, at most an eighth of the rows.

  At most 256: at DeepSeek-V3's shape on 8 devices the gradient of the experts takes 98.0 million
  cycles in steps of 512 and 94.9 in steps of 256, compiled for v5p.
  """
  return max(TILE, min(256, P // E // 4 // TILE * TILE))


def assumed_experts(P: int, E: int, m: int) -> np.ndarray:
  """Those that costs are counted for: equal loads, whole steps."""
  S = pl.cdiv(P, m)
  return np.arange(S, dtype=np.int32) * E // S


def lay_out(x_PK, row_A):
  """Takes rows to their places, zeros where there is none."""
  return x_PK.at[row_A].get(mode="fill", fill_value=0)


def grouped_rows(
  x_PK, w, sizes_E, starts_E, power_of_two_scales: bool, dtype, transposed: bool = False
):
  """See `reference.grouped_rows`."""
  w_EKN = w.swapaxes(1, 2) if transposed else w
  (P, K), (E, _, N) = x_PK.shape, w_EKN.shape
  T, m = pl.cdiv(K, TILE), step_rows(P, E)
  # Two cores of a chip share the columns.
  _, n, tiles = tpu.step_of(P, pl.cdiv(N, 2), T, jnp.dtype(dtype).itemsize, rows=m)
  k = tiles * TILE
  expert_S, row_Sm, steps = row_tiles(sizes_E, starts_E, P, m)
  row_A = row_Sm.reshape(-1)
  A = row_A.shape[0]

  x = tpu.quantize_rows(x_PK, power_of_two_scales)
  # As integers: not every compiler gathers FP8.
  codes_AK = lay_out(jax.lax.bitcast_convert_type(x.codes, jnp.int8), row_A)
  codes_AK = jax.lax.bitcast_convert_type(codes_AK, x.codes.dtype)
  codes_AK = jnp.pad(codes_AK, ((0, 0), (0, T * TILE - K)))
  w_EKN = jnp.pad(w_EKN, ((0, 0), (0, T * TILE - K), (0, 0)))
  w = tpu.quantize_down(w_EKN, power_of_two_scales, blocks=True)
  operands = [
    codes_AK,
    x.scale[:, row_A],  # indices are clamped
    *w,
  ]

  grid = (pl.cdiv(N, n), steps, pl.cdiv(T, tiles))
  experts = assumed_experts(P, E, m)
  assumed_grid = (grid[0], len(experts), grid[2])
  [y_AN] = tpu.call(
    tpu.product_kernel(T, tiles, dtype, power_of_two_scales, scalars=1),
    "quantized_grouped_matmul_rows",
    grid,
    operands,
    [tpu.out((A, N), dtype, expert_S, *operands)],
    [
      pl.BlockSpec((m, k), lambda j, i, s, e: (i, s)),
      pl.BlockSpec((tiles, m), lambda j, i, s, e: (s, i)),
      pl.BlockSpec((None, k, n), lambda j, i, s, e: (e[i], s, j)),
      pl.BlockSpec((None, tiles, n), lambda j, i, s, e: (e[i], s, j)),
    ],
    [pl.BlockSpec((m, n), lambda j, i, s, e: (i, j))],
    flops=2 * len(experts) * m * grid[0] * n * T * TILE,
    scratch=[pltpu.VMEM((m, n), f32)],
    parallel=1,
    scalars=[expert_S],
    assumed=(assumed_grid, [experts]),
  )
  place_P = jnp.full((P,), A, jnp.int32).at[row_A].set(jnp.arange(A, dtype=jnp.int32), mode="drop")
  return lay_out(y_AN, place_P)


def grouped_weights(x_PD, dy_PF, sizes_E, starts_E, power_of_two_scales: bool, dtype):
  """See `reference.grouped_weights`."""
  P, E = x_PD.shape[0], sizes_E.shape[0]
  rows = step_rows(P, E)
  row_A = row_tiles(sizes_E, starts_E, P, rows)[1].reshape(-1)
  x = tpu.quantize_columns(lay_out(x_PD, row_A), power_of_two_scales, transposed=True)
  dy = tpu.quantize_columns(lay_out(dy_PF, row_A), power_of_two_scales)
  laid_out_E = group_starts(sizes_E, rows)
  return weights_of_steps(x, dy, sizes_E, laid_out_E, rows, P, power_of_two_scales, dtype)


def weights_of_steps(
  x: Quantized, dy: Quantized, sizes_E, starts_E, rows: int, P: int, power_of_two: bool, dtype
):
  """Multiplies x^T by dy within each group, whose rows fill steps and zeros the rest of the last.

  Args:
    x, dy: codes [D, A] and [A, F], scales [A / 128, D] and [A / 128, F].
    sizes_E, starts_E: each group's rows and its first, a multiple of `rows`.
    rows: of a step.
    P: of all groups, for the cost.

  Returns:
    [E, D, F] in `dtype`.
  """
  (D, A), F, E = x.codes.shape, dy.codes.shape[1], sizes_E.shape[0]
  tiles = rows // TILE
  d, f, _ = tpu.step_of(D, F, tiles, jnp.dtype(dtype).itemsize)
  native = tpu.multiplies_e4m3()
  steps = schedule(sizes_E, starts_E, A, rows, every_group=True)

  def kernel(expert_S, tile_S, sizes_E, *refs):
    del tile_S  # for the blocks
    lhs_ref, lhs_scale_ref, rhs_ref, rhs_scale_ref, out_ref, sum_ref = refs
    s, num_steps = pl.program_id(2), pl.num_programs(2)
    expert = expert_S[s]

    @pl.when((s == 0) | (expert_S[jnp.maximum(s - 1, 0)] != expert))
    def _():
      sum_ref[...] = jnp.zeros_like(sum_ref)

    @pl.when(sizes_E[expert] > 0)
    def _():
      scales = lhs_scale_ref[...], rhs_scale_ref[...]
      refs = lhs_ref, rhs_ref, sum_ref
      tpu.add_products(refs, scales, 0, tiles, native, power_of_two)

    @pl.when((s == num_steps - 1) | (expert_S[jnp.minimum(s + 1, num_steps - 1)] != expert))
    def _():
      out_ref[...] = sum_ref[...].astype(dtype)

  operands = [
    x.codes,
    x.scale.reshape(-1, tiles, D),
    dy.codes,
    dy.scale.reshape(-1, tiles, F),
  ]
  grid = (pl.cdiv(D, d), pl.cdiv(F, f), steps.num_steps)
  scalars = [steps.expert_T, steps.tile_T, sizes_E.astype(jnp.int32)]
  experts = assumed_experts(P, E, rows)
  assumed = [experts, np.arange(len(experts), dtype=np.int32), np.zeros(E, np.int32)]
  [dw_EDF] = tpu.call(
    kernel,
    "quantized_grouped_matmul_weights",
    grid,
    operands,
    [tpu.out((E, D, F), dtype, sizes_E, *operands)],
    [
      pl.BlockSpec((d, rows), lambda i, j, s, e, r, _: (i, r[s])),
      pl.BlockSpec((None, tiles, d), lambda i, j, s, e, r, _: (r[s], 0, i)),
      pl.BlockSpec((rows, f), lambda i, j, s, e, r, _: (r[s], j)),
      pl.BlockSpec((None, tiles, f), lambda i, j, s, e, r, _: (r[s], 0, j)),
    ],
    [pl.BlockSpec((None, d, f), lambda i, j, s, e, *_: (e[s], i, j))],
    flops=2 * grid[0] * d * grid[1] * f * len(experts) * rows,
    scratch=[pltpu.VMEM((d, f), f32)],
    scalars=scalars,
    assumed=((*grid[:2], len(experts)), assumed),
  )
  return dw_EDF
