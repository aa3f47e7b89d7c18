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

from pallas_kernels.quantized_matmul import tpu
from pallas_kernels.quantized_matmul.e4m3 import TILE, f32
from pallas_kernels.quantized_matmul.xla import row_tiles


def step_rows(P: int, E: int) -> int:
  """Returns m: half a step a group is lost on average, at most an eighth of the rows."""
  return max(TILE, min(512, P // E // 4 // TILE * TILE))


def assumed_experts(P: int, E: int, m: int) -> np.ndarray:
  """Those that costs are counted for: equal loads, whole steps."""
  S = pl.cdiv(P, m)
  return np.arange(S, dtype=np.int32) * E // S


def lay_out(x_PK, row_A):
  """Takes rows to their places, zeros where there is none."""
  return x_PK.at[row_A].get(mode="fill", fill_value=0)


def grouped_rows(x_PK, w_EKN, group_sizes_E, power_of_two_scales: bool, dtype):
  """See `reference.grouped_rows`."""
  (P, K), (E, _, N) = x_PK.shape, w_EKN.shape
  T, m = pl.cdiv(K, TILE), step_rows(P, E)
  # Two cores of a chip share the columns.
  _, n, tiles = tpu.step_of(P, pl.cdiv(N, 2), T, jnp.dtype(dtype).itemsize, rows=m)
  k = tiles * TILE
  expert_S, row_Sm, steps = row_tiles(group_sizes_E, P, m)
  row_A = row_Sm.reshape(-1)
  A = row_A.shape[0]

  x = tpu.quantize_rows(x_PK, power_of_two_scales)
  # As integers: not every compiler gathers FP8.
  codes_AK = lay_out(jax.lax.bitcast_convert_type(x.codes, jnp.int8), row_A)
  codes_AK = jax.lax.bitcast_convert_type(codes_AK, x.codes.dtype)
  codes_AK = jnp.pad(codes_AK, ((0, 0), (0, T * TILE - K)))
  # One matrix, whose blocks belong to one expert each.
  w_EKN = jnp.pad(w_EKN, ((0, 0), (0, T * TILE - K), (0, 0)))
  w = tpu.quantize_down(w_EKN.reshape(-1, N), power_of_two_scales, blocks=True)
  operands = [
    codes_AK,
    x.scale[:, row_A],  # indices are clamped
    w.codes.reshape(E, T * TILE, N),
    w.scale.reshape(E, T, N),
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


def grouped_weights(x_PD, dy_PF, group_sizes_E, power_of_two_scales: bool, dtype):
  """See `reference.grouped_weights`."""
  P, E = x_PD.shape[0], group_sizes_E.shape[0]
  rows = step_rows(P, E)
  expert_S, row_Sm, steps = row_tiles(group_sizes_E, P, rows)
  row_A = row_Sm.reshape(-1)
  x = tpu.quantize_columns(lay_out(x_PD, row_A), power_of_two_scales, transposed=True)
  dy = tpu.quantize_columns(lay_out(dy_PF, row_A), power_of_two_scales)
  plan = (expert_S, steps, rows, P, group_sizes_E > 0)
  return weights_of_steps(x, dy, *plan, power_of_two_scales, dtype)


def weights_of_steps(x, dy, expert_S, steps, rows: int, P: int, any_E, power_of_two: bool, dtype):
  """Multiplies x^T by dy of each expert's steps.

  Args:
    x, dy: codes [D, A] and [A, F], scales [A / 128, D] and [A / 128, F].
    expert_S, steps: each step's expert, and how many steps there are.
    rows: of a step.
    P: rows of experts in all, for the cost.
    any_E: bool, whether an expert has rows.

  Returns:
    [E, D, F] in `dtype`.
  """
  D, F, E = x.codes.shape[0], dy.codes.shape[1], any_E.shape[0]
  tiles = rows // TILE
  d, f, _ = tpu.step_of(D, F, tiles, jnp.dtype(dtype).itemsize)
  native = tpu.multiplies_e4m3()

  def kernel(expert_S, lhs_ref, lhs_scale_ref, rhs_ref, rhs_scale_ref, out_ref, sum_ref):
    s, num_steps = pl.program_id(2), pl.num_programs(2)
    expert = expert_S[s]

    @pl.when((s == 0) | (expert_S[jnp.maximum(s - 1, 0)] != expert))
    def _():
      sum_ref[...] = jnp.zeros_like(sum_ref)

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
  grid = (pl.cdiv(D, d), pl.cdiv(F, f), jnp.maximum(steps, 1))
  experts = assumed_experts(P, E, rows)
  [dw_EDF] = tpu.call(
    kernel,
    "quantized_grouped_matmul_weights",
    grid,
    operands,
    [tpu.out((E, D, F), dtype, expert_S, *operands)],
    [
      pl.BlockSpec((d, rows), lambda i, j, s, e: (i, s)),
      pl.BlockSpec((None, tiles, d), lambda i, j, s, e: (s, 0, i)),
      pl.BlockSpec((rows, f), lambda i, j, s, e: (s, j)),
      pl.BlockSpec((None, tiles, f), lambda i, j, s, e: (s, 0, j)),
    ],
    [pl.BlockSpec((None, d, f), lambda i, j, s, e: (e[s], i, j))],
    flops=2 * grid[0] * d * grid[1] * f * len(experts) * rows,
    scratch=[pltpu.VMEM((d, f), f32)],
    scalars=[expert_S],
    assumed=((*grid[:2], len(experts)), [experts]),
  )
  # No step visits an empty group.
  return jnp.where(any_E[:, None, None], dw_EDF, 0)
