"""The reference for the FP8 matmuls: a loop over tiles, a loop over experts.

Shapes: M rows, K contraction, N columns, T = ceil(K / 128) tiles; D hidden, F inner, E experts,
P rows in expert order.
Source: DeepSeek-V3 (arXiv:2412.19437), section 3.3.
"""

import jax.numpy as jnp

from pallas_kernels.quantized_matmul.e4m3 import (
  TILE,
  Quantized,
  columns_of,
  encode,
  f32,
  largest_magnitude,
  scale_of,
)


def quantize_rows(x_MK, power_of_two_scales: bool = False) -> Quantized:
  """See `api.quantize_rows`."""
  codes, scales = [], []
  for start in range(0, x_MK.shape[1], TILE):
    tile_Mk = x_MK[:, start : start + TILE].astype(f32)
    scale_M = scale_of(largest_magnitude(tile_Mk, axis=1), power_of_two_scales)
    codes.append(encode(tile_Mk, 1 / scale_M[:, None]))
    scales.append(scale_M)
  return Quantized(jnp.concatenate(codes, axis=1), jnp.stack(scales))


def quantize_columns(
  x_KN, power_of_two_scales: bool = False, transposed: bool = False
) -> Quantized:
  """See `api.quantize_columns`."""
  codes_NK, scale_TN = quantize_rows(x_KN.T, power_of_two_scales)
  return Quantized(codes_NK if transposed else codes_NK.T, scale_TN)


def quantize_blocks(w_KN, power_of_two_scales: bool = False) -> Quantized:
  """See `api.quantize_blocks`."""
  codes, scales = [], []
  for top in range(0, w_KN.shape[0], TILE):
    strip_kN = w_KN[top : top + TILE].astype(f32)
    blocks = [strip_kN[:, left : left + TILE] for left in range(0, w_KN.shape[1], TILE)]
    scale = [scale_of(largest_magnitude(block), power_of_two_scales) for block in blocks]
    codes.append(jnp.concatenate([encode(b, 1 / s) for b, s in zip(blocks, scale)], axis=1))
    scales.append(jnp.stack(scale))
  return Quantized(jnp.concatenate(codes), jnp.stack(scales))


def product(lhs: Quantized, rhs: Quantized, dtype, power_of_two_scales: bool = False):
  """Multiplies quantised operands, promoting each tile's partial product to a float32 sum.

  Args:
    lhs: codes [M, K], scales [T, M].
    rhs: codes [K, N], scales [T, N].
    dtype: of the result.
    power_of_two_scales: whether all scales are powers of two. Other implementations then scale the
      operands before they multiply, which is exact.

  Returns:
    [M, N]: sum over tiles t of (lhs_t @ rhs_t) * scales.
  """
  del power_of_two_scales
  y_MN = jnp.zeros((lhs.codes.shape[0], rhs.codes.shape[1]), f32)
  for t, (lhs_scale_M, rhs_scale_N) in enumerate(zip(lhs.scale, rhs.scale)):
    tile = slice(t * TILE, (t + 1) * TILE)
    partial_MN = lhs.codes[:, tile].astype(f32) @ rhs.codes[tile].astype(f32)
    y_MN += partial_MN * lhs_scale_M[:, None] * rhs_scale_N[None, :]
  return y_MN.astype(dtype)


def grouped_rows(
  x_PK, w, sizes_E, starts_E, power_of_two_scales: bool, dtype, transposed: bool = False
):
  """Multiplies each row by its expert's matrix in FP8; rows outside all groups become zeros.

  Args:
    x_PK: rows in expert order.
    w: the experts' matrices, quantised by blocks; [E, K, N], or [E, N, K] when transposed.
    sizes_E, starts_E: int32, each expert's rows and its first row.
    power_of_two_scales: whether scales are powers of two.
    dtype: of the result.
    transposed: whether w is.

  Returns:
    [P, N].
  """
  w_EKN = w.swapaxes(1, 2) if transposed else w
  x, row_P = quantize_rows(x_PK, power_of_two_scales), jnp.arange(x_PK.shape[0])
  y_PN = jnp.zeros((x_PK.shape[0], w_EKN.shape[2]), dtype)
  for e, (start, size) in enumerate(zip(starts_E, sizes_E)):
    mine_P = (row_P >= start) & (row_P < start + size)
    own = columns_of(quantize_blocks(w_EKN[e], power_of_two_scales))
    y_PN = jnp.where(mine_P[:, None], product(x, own, dtype), y_PN)
  return y_PN


def grouped_weights(x_PD, dy_PF, sizes_E, starts_E, power_of_two_scales: bool, dtype):
  """Multiplies x^T by dy in FP8 within each group, whose tiles start at the group's first row.

  Returns:
    [E, D, F].
  """
  row_P = jnp.arange(x_PD.shape[0])
  result = []
  for start, size in zip(starts_E, sizes_E):
    own = lambda a: jnp.where((row_P < size)[:, None], jnp.roll(a, -start, axis=0), 0)  # noqa: B023, E731
    x = quantize_columns(own(x_PD), power_of_two_scales, transposed=True)
    dy = quantize_columns(own(dy_PF), power_of_two_scales)
    result.append(product(x, dy, dtype))
  return jnp.stack(result)
