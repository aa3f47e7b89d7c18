"""The FP8 matmuls in plain XLA, exactly: E4M3 numbers carried in float32.

Products of two E4M3 numbers are exact in bfloat16 and float32 matmuls alike, so the values do
not depend on the precision a device gives a float32 matmul.

Shapes: M rows, K contraction, N columns, T = ceil(K / 128) tiles, k = 128; D hidden, F inner,
E experts, P rows in expert order, R tiles of r = 128 rows of one expert each.
"""

import jax
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
from pallas_kernels.varying import zeros_like_operands


def _padded(a, *axes: int):
  """Pads axes with zeros to whole tiles."""
  return jnp.pad(a, [(0, -size % TILE if i in axes else 0) for i, size in enumerate(a.shape)])


def quantize_columns(
  x_KN, power_of_two_scales: bool = False, transposed: bool = False
) -> Quantized:
  """See `api.quantize_columns`."""
  K, N = x_KN.shape
  x_TkN = _padded(x_KN.astype(f32), 0).reshape(-1, TILE, N)
  scale_TN = scale_of(largest_magnitude(x_TkN, axis=1), power_of_two_scales)
  codes_KN = encode(x_TkN, 1 / scale_TN[:, None]).reshape(-1, N)[:K]
  return Quantized(codes_KN.T if transposed else codes_KN, scale_TN)


def quantize_rows(x_MK, power_of_two_scales: bool = False) -> Quantized:
  """See `api.quantize_rows`."""
  return quantize_columns(x_MK.T, power_of_two_scales, transposed=True)


def quantize_blocks(w_KN, power_of_two_scales: bool = False) -> Quantized:
  """See `api.quantize_blocks`."""
  K, N = w_KN.shape
  padded = _padded(w_KN.astype(f32), 0, 1)
  w_TkUn = padded.reshape(padded.shape[0] // TILE, TILE, padded.shape[1] // TILE, TILE)
  scale_TU = scale_of(largest_magnitude(w_TkUn, axis=(1, 3)), power_of_two_scales)
  codes = encode(w_TkUn, 1 / scale_TU[:, None, :, None]).reshape(padded.shape)
  return Quantized(codes[:K, :N], scale_TU)


def product(lhs: Quantized, rhs: Quantized, dtype, power_of_two_scales: bool = False):
  """See `reference.product`."""
  M, N = lhs.codes.shape[0], rhs.codes.shape[1]
  tiles = (
    _padded(lhs.codes, 1).reshape(M, -1, TILE).swapaxes(0, 1),
    _padded(rhs.codes, 0).reshape(-1, TILE, N),
    lhs.scale,
    rhs.scale,
  )
  if power_of_two_scales:
    lhs_TMk, rhs_TkN, lhs_scale_TM, rhs_scale_TN = tiles
    lhs_TMk = lhs_TMk.astype(f32) * lhs_scale_TM[:, :, None]
    rhs_TkN = rhs_TkN.astype(f32) * rhs_scale_TN[:, None]
    return jnp.einsum("tmk,tkn->mn", lhs_TMk, rhs_TkN).astype(dtype)

  def partial(tile):
    lhs_Mk, rhs_kN, lhs_scale_M, rhs_scale_N = tile
    y_MN = lhs_Mk.astype(f32) @ rhs_kN.astype(f32)
    return y_MN * lhs_scale_M[:, None] * rhs_scale_N[None, :]

  # The sum starts with the first tile's product, which varies over the right mesh axes.
  first, rest = jax.tree.map(lambda a: a[0], tiles), jax.tree.map(lambda a: a[1:], tiles)
  add = lambda y_MN, tile: (y_MN + partial(tile), None)  # noqa: E731
  return jax.lax.scan(add, partial(first), rest)[0].astype(dtype)


def row_tiles(sizes_E, starts_E, num_rows: int, size: int = TILE):
  """Cuts the groups into tiles of up to `size` rows.

  Returns:
    expert_R and row_Rr, int32: each tile's expert and rows, P where there is none; and how many
    tiles have rows.
  """
  E, R = sizes_E.shape[0], -(-num_rows // size) + sizes_E.shape[0]
  tiles_E = (sizes_E + size - 1) // size
  last_E, end_E = jnp.cumsum(tiles_E), starts_E + sizes_E
  number_R = jnp.arange(R)
  expert_R = jnp.minimum(jnp.searchsorted(last_E, number_R, side="right"), E - 1)
  within_R = number_R - (last_E - tiles_E)[expert_R]
  first_R = starts_E[expert_R] + within_R * size
  row_Rr = first_R[:, None] + jnp.arange(size)[None, :]
  row_Rr = jnp.where(row_Rr < end_E[expert_R][:, None], row_Rr, num_rows)
  return expert_R.astype(jnp.int32), row_Rr.astype(jnp.int32), last_E[-1]


def grouped_rows(
  x_PK, w, sizes_E, starts_E, power_of_two_scales: bool, dtype, transposed: bool = False
):
  """See `reference.grouped_rows`."""
  w_EKN = w.swapaxes(1, 2) if transposed else w
  P, N = x_PK.shape[0], w_EKN.shape[2]
  x = quantize_rows(x_PK, power_of_two_scales)
  w = jax.vmap(lambda w_KN: columns_of(quantize_blocks(w_KN, power_of_two_scales)))(w_EKN)
  *tiles, _ = row_tiles(sizes_E, starts_E, P)

  def one_tile(tile):
    expert, row_r = tile
    rows = Quantized(x.codes[row_r], x.scale[:, row_r])  # indices are clamped
    w_own = jax.tree.map(lambda a: a[expert], w)
    return product(rows, w_own, dtype, power_of_two_scales)

  y_RrN = jax.lax.map(one_tile, tiles)
  y_PN = jnp.zeros((P, N), dtype)
  return y_PN.at[tiles[1].reshape(-1)].set(y_RrN.reshape(-1, N), mode="drop")


def grouped_weights(x_PD, dy_PF, sizes_E, starts_E, power_of_two_scales: bool, dtype):
  """See `reference.grouped_weights`."""
  shape = (sizes_E.shape[0], x_PD.shape[1], dy_PF.shape[1])
  *tiles, _ = row_tiles(sizes_E, starts_E, x_PD.shape[0])

  def add(dw_EDF, tile):
    expert, row_r = tile
    x_rD, dy_rF = (a.at[row_r].get(mode="fill", fill_value=0) for a in (x_PD, dy_PF))
    x = quantize_columns(x_rD, power_of_two_scales, transposed=True)
    dy = quantize_columns(dy_rF, power_of_two_scales)
    return dw_EDF.at[expert].add(product(x, dy, f32, power_of_two_scales)), None

  zeros_EDF = zeros_like_operands(shape, f32, x_PD, dy_PF, sizes_E, starts_E)
  return jax.lax.scan(add, zeros_EDF, tiles)[0].astype(dtype)
