"""Quantisation for H100 (Mosaic GPU) that also transposes, by tiles of 128 x 128 numbers.

The tensor cores want codes with the contraction last; weights, and rows whose gradient of weights
is wanted, come with it first. A thread block reads one tile, of bfloat16 say, and stores its codes
transposed, as they lie, or both ways, with their scales: each number is read once and each code
written once, where XLA stores magnitudes and masks in between. Thread blocks are small, so that several share a
multiprocessor and some work while others wait for memory.

Shapes: E experts, K contraction, N columns, P rows in expert order, D numbers of a row, R tiles.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_gpu import call, load
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


def _room(dtype, ways):
  """Shared memory of a thread block: a tile's halves, its codes, and a barrier for the halves.

  Swizzles avoid bank conflicts. `ways`: for each set of codes, whether it is transposed.
  """
  swizzle = [plgpu.SwizzleTransform(TILE)] if HALF * dtype.itemsize == TILE else []
  room = [plgpu.SMEM((TILE // HALF, TILE, HALF), dtype, transforms=swizzle)]
  for width in (TILE if turned else HALF for turned in ways):
    swizzle = [plgpu.SwizzleTransform(width)]
    room.append(plgpu.SMEM((TILE // width, TILE, width), CODE, transforms=swizzle))
  return [*room, plgpu.Barrier(num_arrivals=TILE // HALF)]


def _load(x_hbm, rows, column, halves, arrived) -> None:
  """Brings a tile on chip, in halves of 64 columns."""
  for h in range(TILE // HALF):
    own = pl.ds(column + h * HALF, HALF)
    plgpu.copy_gmem_to_smem(x_hbm.at[rows, own], halves.at[h], arrived)
  plgpu.barrier_wait(arrived)


def _values(halves, turned: bool) -> list:
  """Returns the halves of a tile, [64, 128] each if turned, else [128, 64]."""
  if not turned:
    return [load(halves.at[h], WGMMA) for h in range(TILE // HALF)]
  across = [load(halves.at[h].T, plgpu.Layout.WGMMA_TRANSPOSED) for h in range(TILE // HALF)]
  return [plgpu.layout_cast(half, WGMMA) for half in across]


def _store(values, codes, codes_hbm, turned: bool) -> None:
  """Stores the codes of a tile's halves in [128, 128], by way of shared memory."""
  for h, half in enumerate(values):
    if turned:
      codes[0, h * HALF : (h + 1) * HALF] = half
    else:
      codes[h] = half
  plgpu.commit_smem()
  width = codes.shape[2]
  for c in range(TILE // width):
    plgpu.copy_smem_to_gmem(codes.at[c], codes_hbm.at[:, c * width : (c + 1) * width])


@functools.partial(jax.jit, static_argnums=(1, 2))
def _quantize_weights(w, power_of_two_scales: bool, ways: tuple[bool, ...]) -> list[Quantized]:
  """Returns the codes of w, and where `ways` says so of w transposed, from one read."""
  w = whole(w, axis1=TILE, axis2=TILE)
  E, *sides = w.shape

  def kernel(w_hbm, *refs):
    outs, (halves, *codes_smem, arrived) = refs[: 2 * len(ways)], refs[2 * len(ways) :]
    expert, *at = (jax.lax.axis_index(name) for name in ("group", "row", "column"))
    own = [pl.ds(i * TILE, TILE) for i in at]
    _load(w_hbm.at[expert], own[0], at[1] * TILE, halves, arrived)
    scale = None
    for turned, codes, codes_hbm, scale_hbm in zip(ways, codes_smem, outs[::2], outs[1::2]):
      values = _values(halves, turned)
      if scale is None:
        low, high = (_largest(half, axis=1) for half in values)
        scale = scale_of(_largest(jnp.maximum(low, high), axis=0), power_of_two_scales)
        scales = plgpu.layout_cast(jax.lax.broadcast_in_dim(scale, (TILE,), ()), WGMMA.reduce(1))
        inverse = reciprocal(scale)
      outer, inner = (1, 0) if turned else (0, 1)
      scale_hbm[expert, at[inner], own[outer]] = scales
      values = [encode(half, inverse) for half in values]
      _store(values, codes, codes_hbm.at[expert, own[outer], own[inner]], turned)
    plgpu.wait_smem_to_gmem(0)

  out_types = []
  for turned in ways:
    outer, inner = reversed(sides) if turned else sides
    out_types.append(jax.ShapeDtypeStruct((E, outer, inner), CODE))
    out_types.append(jax.ShapeDtypeStruct((E, inner // TILE, outer), f32))
  results = call(
    kernel,
    "quantize_weights" if len(ways) == 1 else "quantize_weights_both",
    [w],
    out_types,
    {"group": E, "row": sides[0] // TILE, "column": sides[1] // TILE},
    _room(w.dtype, ways),
  )
  return [Quantized(*pair) for pair in zip(results[::2], results[1::2])]


def quantize_weights(w, power_of_two_scales: bool = False, transposed: bool = False) -> Quantized:
  """Quantises each expert's matrix by blocks of 128 x 128, for products with rows.

  Args:
    w: [E, K, N], or [E, N, K] when transposed.
    power_of_two_scales: round scales up to powers of two (UE8M0).

  Returns:
    codes [E, N, K] and scale [E, K / 128, N], those of `quantize_blocks` with the contraction last
    and every column given its block's scales. N and K are filled up with zeros to multiples of 128.
  """
  return _quantize_weights(w, power_of_two_scales, (not transposed,))[0]


def quantize_weights_both(w, power_of_two_scales: bool = False) -> list[Quantized]:
  """Returns `quantize_weights` of w, and of w as the transposed matrix, from one read."""
  return _quantize_weights(w, power_of_two_scales, (True, False))


@functools.partial(jax.jit, static_argnums=(3, 4))
def _quantize_groups(
  x_PD, first_R, count_R, power_of_two_scales: bool, ways: tuple[bool, ...]
) -> list[Quantized]:
  """Returns tiles quantised by columns, transposed, and where `ways` says so by rows."""
  x_PD = whole(x_PD, axis1=TILE)
  D, R = x_PD.shape[1], first_R.shape[0]

  def kernel(first_hbm, count_hbm, x_hbm, *refs):
    outs, (halves, *codes_smem, arrived) = refs[: 2 * len(ways)], refs[2 * len(ways) :]
    tile, column = jax.lax.axis_index("tile"), jax.lax.axis_index("column")
    count = count_hbm[tile]
    rows, columns = pl.ds(tile * TILE, TILE), pl.ds(column * TILE, TILE)

    def inverse_of(scale, shape):
      return jax.lax.broadcast_in_dim(reciprocal(scale), shape, (0,))

    def by_columns(codes, codes_hbm, scale_hbm):
      own = plgpu.broadcasted_iota(jnp.int32, (HALF, TILE), 1, layout=WGMMA) < count
      encoded = []
      for h, half in enumerate(_values(halves, True)):
        x = jnp.where(own, half.astype(f32), 0)
        scale = scale_of(_largest(x, axis=1), power_of_two_scales)
        scale_hbm[tile, pl.ds(column * TILE + h * HALF, HALF)] = scale
        encoded.append(encode(x, inverse_of(scale, x.shape)))
      _store(encoded, codes, codes_hbm.at[columns, rows], True)

    def by_rows(codes, codes_hbm, scale_hbm):
      values = _values(halves, False)
      low, high = (_largest(half, axis=1) for half in values)
      scale = scale_of(jnp.maximum(low, high), power_of_two_scales)
      scale_hbm[column, rows] = scale
      inverse = inverse_of(scale, (TILE, HALF))
      encoded = [encode(half, inverse) for half in values]
      _store(encoded, codes, codes_hbm.at[rows, columns], False)

    @pl.when(count > 0)
    def _():
      _load(x_hbm, pl.ds(first_hbm[tile], TILE), column * TILE, halves, arrived)
      for turned, codes, *out in zip(ways, codes_smem, outs[::2], outs[1::2]):
        (by_columns if turned else by_rows)(codes, *out)
      plgpu.wait_smem_to_gmem(0)

  out_types = []
  for turned in ways:
    outer, inner = (D, R * TILE) if turned else (R * TILE, D)
    out_types.append(jax.ShapeDtypeStruct((outer, inner), CODE))
    out_types.append(jax.ShapeDtypeStruct((inner // TILE, outer), f32))
  results = call(
    kernel,
    "quantize_groups" if len(ways) == 1 else "quantize_groups_both",
    [first_R, count_R, x_PD],
    out_types,
    {"tile": R, "column": D // TILE},
    _room(x_PD.dtype, ways),
  )
  return [Quantized(*pair) for pair in zip(results[::2], results[1::2])]


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
  return _quantize_groups(x_PD, first_R, count_R, power_of_two_scales, (True,))[0]


def quantize_groups_both(
  x_PD, first_R, count_R, power_of_two_scales: bool = False
) -> list[Quantized]:
  """Quantises tiles of rows by columns and by rows, from one read; see `quantize_groups`.

  Returns:
    What `quantize_groups` does; and codes [R * 128, D] and scale [D / 128, R * 128], those of
    `quantize_rows`, tile after tile. The rows that a tile does not have are undefined.
  """
  return _quantize_groups(x_PD, first_R, count_R, power_of_two_scales, (True, False))
