"""E4M3 numbers and their scales: the arithmetic that every implementation shares.

E4M3 (float8_e4m3fn) has 4 exponent bits, 3 mantissa bits, no infinity, and 448 as its largest
number. A tile's scale takes its largest magnitude there.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

TILE = 128  # numbers that share a scale, along the contraction
CODE = jnp.float8_e4m3fn
LARGEST = 448.0

f32 = jnp.float32


class Quantized(NamedTuple):
  """One operand: codes times their tile's scale.

  Scales come with the tile first, [T, M] for rows [M, D] cut along D: one line a tile, as the
  matmuls walk through them. Those of blocks are [D / 128, F / 128].
  """

  codes: Any  # float8_e4m3fn
  scale: Any  # float32


def largest_magnitude(x, axis=None, keepdims: bool = False):
  """Returns the largest magnitude of float32, infinity if there is one or a NaN."""
  # A maximum may forget NaN (XLA:CPU's does): none reaches it.
  size = jnp.abs(x)
  return jnp.where(size < jnp.inf, size, jnp.inf).max(axis=axis, keepdims=keepdims)


def scale_of(largest, power_of_two: bool):
  """Returns the scale of tiles whose largest magnitudes are given, in float32.

  The largest magnitude becomes 448, or with `power_of_two` (UE8M0) a number in (224, 448]. A
  tile of zeros has scale 1; that of an infinite one is NaN, and its products are NaN with it.
  """
  if power_of_two:
    # 448 is 1.75 * 2**8: from the bits, since a rounded quotient would miss 448 * 2**k itself.
    bits = jax.lax.bitcast_convert_type(largest, jnp.int32)
    above = ((bits & 0x7FFFFF) > 0x600000).astype(jnp.int32)
    exponent = jnp.maximum((bits >> 23) - 8 + above, 1)
    scale = jax.lax.bitcast_convert_type(exponent << 23, f32)
  else:
    # A factor: compilers turn a quotient by a constant into one, and differ in whether they do.
    # Below the smallest normal number a quotient by the scale would lose its meaning.
    scale = jnp.maximum(largest * np.float32(1 / LARGEST), np.finfo(np.float32).tiny)
  scale = jnp.where(largest > 0, scale, 1.0)
  return jnp.where(largest < jnp.inf, scale, jnp.nan)


def nearest(scaled):
  """Rounds float32 of magnitudes up to 448 to E4M3 numbers, ties to even, still in float32.

  Written out, so that the codes do not depend on how a compiler converts, or on its leaving out
  a conversion there and back: converting the result is exact. Zeros come out positive: other
  E4M3 formats read the code of a negative zero as NaN.
  """
  # `scaled` is a product, which GPUs' compilers would join with the addition below, unrounded, and
  # so break ties. No smaller number comes, but that keeps them apart.
  scaled = jnp.maximum(scaled, -LARGEST)
  # Adding 1.5 * 2**23 steps leaves whole steps. A step is 2**-3 of the power of two at or below
  # the number, or of 2**-6 for the subnormal ones.
  power = jax.lax.bitcast_convert_type(scaled, jnp.int32) & 0x7F800000
  power = jnp.maximum(power, (127 - 6) << 23)
  shift = jax.lax.bitcast_convert_type(power + (((23 - 3) << 23) | 0x400000), f32)
  return (scaled + shift) - shift


def encode(x, inverse_scale):
  """Returns the codes of x * inverse_scale."""
  return nearest(x.astype(f32) * inverse_scale).astype(CODE)


def columns_of(blocks: Quantized) -> Quantized:
  """Gives every column its block's scales: [T, ceil(N / 128)] becomes [T, N]."""
  N = blocks.codes.shape[1]
  return Quantized(blocks.codes, jnp.repeat(blocks.scale, TILE, axis=1)[:, :N])
