"""Permute, FP8 experts, combine for H100 (Mosaic GPU): tokens are quantised while permuted.

`permute_quantized` brings a token's row on chip, makes its codes and scales there, once for all
its rows and for gate and up both, and stores them at its K places. It is `permute.gpu.permute`
with the quantisation added; a row's chunks of 128 are the tiles.

Shapes: M tokens, K choices a token, P rows, D hidden, F inner, E experts, T tiles of a row.
"""

import functools

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.grouped_matmul.gpu import EIGHT
from pallas_kernels.mosaic_gpu import call, load
from pallas_kernels.permute import combine, expert_order, group_starts, weights_of_rows
from pallas_kernels.permute import gpu as permute
from pallas_kernels.quantized_matmul import gpu
from pallas_kernels.quantized_matmul.e4m3 import (
  CODE,
  TILE,
  Quantized,
  encode,
  f32,
  largest_magnitude,
  scale_of,
)
from pallas_kernels.quantized_matmul.gpu_quantize import reciprocal, whole
from pallas_kernels.varying import vary_alike

TILES = 64  # quantised at once, in a warpgroup's registers


@functools.partial(jax.jit, static_argnums=(2, 3))
def permute_quantized(x_MD, row_MK, num_rows: int, power_of_two_scales: bool = False) -> Quantized:
  """Copies each token's row, quantised by tiles of 1 x 128, to its K places.

  Args:
    x_MD: bfloat16, float16 or float32.
    row_MK: int32 place of each copy, all different; outside [0, num_rows) none is made.
    num_rows: P.
    power_of_two_scales: round scales up to powers of two (UE8M0).

  Returns:
    codes [P, D] and scale [T, P], those of `quantize_rows`, T filled up to a multiple of 64. Rows
    to which no token was copied, and tiles past D, are undefined.
  """
  M, D = x_MD.shape
  K = row_MK.shape[1]
  chunks = permute.num_chunks(D)
  T = pl.cdiv(chunks, TILES) * TILES

  def kernel(x_hbm, row_hbm, codes_hbm, scale_hbm, row_smem, codes_smem, arrived):
    m = jax.lax.axis_index("token")
    own = pl.ds(0, chunks)
    plgpu.copy_gmem_to_smem(x_hbm.at[m], row_smem.at[own], arrived)
    places = [row_hbm[m, k] for k in range(K)]
    plgpu.barrier_wait(arrived)

    def at_places(store):
      for row in places:
        pl.when((row >= 0) & (row < num_rows))(functools.partial(store, row))

    for first in range(0, T, TILES):
      tiles = pl.ds(first, TILES)
      x = load(row_smem.at[tiles], plgpu.Layout.WGMMA).astype(f32)
      scale = scale_of(largest_magnitude(x, axis=1), power_of_two_scales)
      codes_smem[tiles] = encode(x, jax.lax.broadcast_in_dim(reciprocal(scale), x.shape, (0,)))

      def store_scale(row, tiles=tiles, scale=scale):
        scale_hbm[tiles, row] = scale

      at_places(store_scale)

    plgpu.commit_smem()
    at_places(lambda row: plgpu.copy_smem_to_gmem(codes_smem.at[own], codes_hbm.at[row]))
    plgpu.wait_smem_to_gmem(0)

  codes, scale = call(
    kernel,
    "permute_quantized",
    [x_MD.reshape(M, chunks, TILE), row_MK],
    [
      jax.ShapeDtypeStruct((num_rows, chunks, TILE), CODE),
      jax.ShapeDtypeStruct((T, num_rows), f32),
    ],
    {"token": M},
    [
      plgpu.SMEM((T, TILE), x_MD.dtype),
      plgpu.SMEM((T, TILE), CODE, transforms=(plgpu.SwizzleTransform(TILE),)),
      plgpu.Barrier(),
    ],
  )
  return Quantized(codes.reshape(num_rows, D), scale)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gate_and_up(power_of_two, w_dtype, x_MD, w_gate_EDF, w_up_EDF, row_MK, counts_E):
  """Returns each row's two products, [A, F]; A is the number of rows rounded up to eights.

  Rows of no expert are undefined.
  """
  del w_dtype  # for the gradient
  weights = [gpu.quantize_weights(w, power_of_two) for w in (w_gate_EDF, w_up_EDF)]
  return _products(power_of_two, x_MD, weights, w_up_EDF.shape[2], row_MK, counts_E)


def _products(power_of_two, x_MD, weights, F: int, row_MK, counts_E):
  A = pl.cdiv(row_MK.size, EIGHT) * EIGHT
  x = permute_quantized(x_MD, row_MK, A, power_of_two)
  plan = counts_E, group_starts(counts_E)
  return tuple(gpu.rows_times(x, w, *plan, x_MD.dtype)[:, :F] for w in weights)


def _gate_and_up_fwd(power_of_two, _, x_MD, w_gate_EDF, w_up_EDF, row_MK, counts_E):
  both = [gpu.quantize_weights_both(w, power_of_two) for w in (w_gate_EDF, w_up_EDF)]
  weights, transposed = zip(*both)
  gate_up = _products(power_of_two, x_MD, weights, w_up_EDF.shape[2], row_MK, counts_E)
  return gate_up, (x_MD, transposed, row_MK, counts_E)


def _gate_and_up_bwd(power_of_two, w_dtype, saved, dgate_dup):
  x_MD, weights, row_MK, counts_E = saved
  x_AD = permute.permute(x_MD, row_MK, dgate_dup[0].shape[0])
  plan = counts_E, group_starts(counts_E)
  dx_AD, *dws = gpu.gradients(power_of_two, w_dtype, x_AD, weights, plan, dgate_dup)
  return permute.combine(dx_AD, row_MK), *dws, None, None


_gate_and_up.defvjp(_gate_and_up_fwd, _gate_and_up_bwd, optimize_remat=True)


def routed_swiglu(power_of_two: bool, x_MD, routed, experts):
  """See `experts.quantized_routed_swiglu`."""
  expert_MK, gate_MK, counts_E, rank_MK = routed
  dtype, D = x_MD.dtype, x_MD.shape[1]
  pair_P, row_MK = expert_order(expert_MK, rank_MK, counts_E)
  x_MD, w_gate, w_up, w_down = vary_alike(x_MD, *experts)
  x_MD, w_down = whole(x_MD, axis1=TILE), whole(w_down, axis2=TILE)
  w_gate, w_up = (whole(w, axis1=TILE) for w in (w_gate, w_up))
  gate_AF, up_AF = _gate_and_up(power_of_two, w_up.dtype, x_MD, w_gate, w_up, row_MK, counts_E)
  weight_A = weights_of_rows(gate_MK, row_MK, gate_AF.shape[0])
  inner_AF = jax.nn.silu(gate_AF.astype(f32)) * up_AF.astype(f32) * weight_A[:, None]
  plan = counts_E, group_starts(counts_E)
  y_AD = gpu.multiply(power_of_two, inner_AF.astype(dtype), w_down, *plan)
  y_PD = y_AD[: pair_P.size]
  return combine(y_PD, pair_P, row_MK, "mosaic_gpu")[:, :D]
