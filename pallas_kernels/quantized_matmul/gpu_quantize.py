"""Quantisation for H100 (Mosaic GPU) that also transposes, by tiles of 128 x 128 numbers.

The tensor cores want codes with the contraction last; weights, and rows whose gradient of weights
is wanted, come with it first. A thread block reads one tile, of bfloat16 say, and stores its codes
transposed, with their scales: each number is read once and each code written once, where XLA
stores magnitudes and masks in between. Thread blocks are small, so that several share a
multiprocessor and some work while others wait for memory.

Shapes: E experts, K contraction, N columns, P rows in expert order, D numbers of a row, R tiles.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_gpu import call
from pallas_kernels.quantized_matmul.e4m3 import (
  CODE,
  TILE,
  Quantized,
  encode,
  f32,
  scale_of,
)

HALF = 64  # columns that a warpgroup's registers take at a time; 128 bytes of bfloat16

WGMMA = plgpu.Layout.WGMMA


def whole(a, **multiples: int):
  """Fills axes up with zeros to multiples; a copy where one is not."""
  more = [(0, -size % multiples.get(f"axis{i}", 1)) for i, size in enumerate(a.shape)]
  return jnp.pad(a, more) if any(after for _, after in more) else a


def _upper_half(x):
  """Returns x with 12 of its 24 digits, so that products of two such are exact."""
  bits = jax.lax.bitcast_convert_type(x, jnp.int32)
  return jax.lax.bitcast_convert_type(bits & ~0xFFF, f32)


def reciprocal(x):
  """Returns 1 / x, rounded to nearest: a quotient here may be one digit off, which breaks ties."""
  near = 1 / x
  x_upper, near_upper = _upper_half(x), _upper_half(near)
  x_lower, near_lower = x - x_upper, near - near_upper
  # 1 - x * near, without rounding.
  error = 1 - x_upper * near_upper
  error = error - x_upper * near_lower
  error = error - x_lower * near_upper
  error = error - x_lower * near_lower
  return near + near * error


def _largest(x, axis: int):
  """Returns the largest magnitudes along an axis, in float32; NaN if there is one."""
  # As integers magnitudes have the same order, and NaN comes after infinity.
  whole_number = jnp.dtype(f"int{x.dtype.itemsize * 8}")
  sign = np.iinfo(whole_number).min
  size = jax.lax.bitcast_convert_type(x, whole_number) & ~sign
  return jax.lax.bitcast_convert_type(jnp.max(size, axis=axis), x.dtype).astype(f32)


def _room(dtype, turned: bool):
  """Shared memory of a thread block: a tile's halves, its codes, and a barrier for the halves.

  Swizzles avoid bank conflicts.
  """
  swizzle = [plgpu.SwizzleTransform(TILE)] if HALF * dtype.itemsize == TILE else []
  halves = plgpu.SMEM((TILE // HALF, TILE, HALF), dtype, transforms=swizzle)
  width = TILE if turned else HALF
  swizzle = [plgpu.SwizzleTransform(width)]
  codes = plgpu.SMEM((TILE // width, TILE, width), CODE, transforms=swizzle)
  return [halves, codes, plgpu.Barrier(num_arrivals=TILE // HALF)]


def _load(x_hbm, rows, column, room, turned: bool):
  """Returns the halves of a tile, of 64 columns each: [64, 128] if turned, else [128, 64]."""
  halves, _, arrived = room
  for h in range(TILE // HALF):
    own = pl.ds(column + h * HALF, HALF)
    plgpu.copy_gmem_to_smem(x_hbm.at[rows, own], halves.at[h], arrived)
  plgpu.barrier_wait(arrived)

  def half(h):
    if not turned:
      return plgpu.load(halves, h, layout=WGMMA, optimized=False)
    across = plgpu.Layout.WGMMA_TRANSPOSED
    return plgpu.layout_cast(plgpu.load(halves.at[h].T, (), layout=across, optimized=False), WGMMA)

  return [half(h) for h in range(TILE // HALF)]


def _store(halves, codes_hbm, room, turned: bool):
  """Stores the codes of halves in [128, 128]."""
  codes = room[1]
  for h, half in enumerate(halves):
    if turned:
      codes[0, h * HALF : (h + 1) * HALF] = half
    else:
      codes[h] = half
  plgpu.commit_smem()
  width = codes.shape[2]
  for c in range(TILE // width):
    plgpu.copy_smem_to_gmem(codes.at[c], codes_hbm.at[:, c * width : (c + 1) * width])
  plgpu.wait_smem_to_gmem(0)


def quantize_weights(w, power_of_two_scales: bool = False, transposed: bool = False) -> Quantized:
  """Quantises each expert's matrix by blocks of 128 x 128, for products with rows.

  Args:
    w: [E, K, N], or [E, N, K] when transposed.
    power_of_two_scales: round scales up to powers of two (UE8M0).

  Returns:
    codes [E, N, K] and scale [E, K / 128, N], those of `quantize_blocks` with the contraction last
    and every column given its block's scales. N and K are filled up with zeros to multiples of 128.
  """
  w = whole(w, axis1=TILE, axis2=TILE)
  turned = not transposed
  (E, K, N) = w.shape if turned else (w.shape[0], w.shape[2], w.shape[1])

  def kernel(w_hbm, codes_hbm, scale_hbm, *room):
    expert, column, tile = (jax.lax.axis_index(name) for name in ("group", "column", "tile"))
    n, k = pl.ds(column * TILE, TILE), pl.ds(tile * TILE, TILE)
    rows, first = (k, column * TILE) if turned else (n, tile * TILE)
    halves = _load(w_hbm.at[expert], rows, first, room, turned)
    low, high = (_largest(w, axis=1) for w in halves)
    scale = scale_of(_largest(jnp.maximum(low, high), axis=0), power_of_two_scales)
    scales = jax.lax.broadcast_in_dim(scale, (TILE,), ())
    scale_hbm[expert, tile, n] = plgpu.layout_cast(scales, WGMMA.reduce(1))
    inverse = reciprocal(scale)
    codes = [encode(w, inverse) for w in halves]
    _store(codes, codes_hbm.at[expert, n, k], room, turned)

  codes, scale = call(
    kernel,
    "quantize_weights",
    [w],
    [jax.ShapeDtypeStruct((E, N, K), CODE), jax.ShapeDtypeStruct((E, K // TILE, N), f32)],
    {"group": E, "column": N // TILE, "tile": K // TILE},
    _room(w.dtype, turned),
  )
  return Quantized(codes, scale)


def quantize_groups(x_PD, first_R, count_R, power_of_two_scales: bool = False) -> Quantized:
  """Quantises tiles of rows by columns, 128 x 1, for products that contract rows.

  Args:
    x_PD: rows.
    first_R, count_R: int32, each tile's first row and how many it has, up to 128.
    power_of_two_scales: round scales up to powers of two (UE8M0).

  Returns:
    codes [D, R * 128] and scale [R, D], those of `quantize_columns` transposed, of rows of which
    each tile is filled up with zeros. Tiles without rows are undefined. D is filled up with zeros
    to a multiple of 128.
  """
  x_PD = whole(x_PD, axis1=TILE)
  D, R = x_PD.shape[1], first_R.shape[0]

  def kernel(first_hbm, count_hbm, x_hbm, codes_hbm, scale_hbm, *room):
    tile, column = jax.lax.axis_index("tile"), jax.lax.axis_index("column")
    count = count_hbm[tile]

    @pl.when(count > 0)
    def _():
      halves = _load(x_hbm, pl.ds(first_hbm[tile], TILE), column * TILE, room, True)
      own = plgpu.broadcasted_iota(jnp.int32, (HALF, TILE), 1, layout=WGMMA) < count
      codes = []
      for h, half in enumerate(halves):
        x = jnp.where(own, half.astype(f32), 0)
        scale = scale_of(_largest(x, axis=1), power_of_two_scales)
        scale_hbm[tile, pl.ds(column * TILE + h * HALF, HALF)] = scale
        inverse = jax.lax.broadcast_in_dim(reciprocal(scale), x.shape, (0,))
        codes.append(encode(x, inverse))
      there = codes_hbm.at[pl.ds(column * TILE, TILE), pl.ds(tile * TILE, TILE)]
      _store(codes, there, room, True)

  codes, scale = call(
    kernel,
    "quantize_groups",
    [first_R, count_R, x_PD],
    [jax.ShapeDtypeStruct((D, R * TILE), CODE), jax.ShapeDtypeStruct((R, D), f32)],
    {"tile": R, "column": D // TILE},
    _room(x_PD.dtype, True),
  )
  return Quantized(codes, scale)
