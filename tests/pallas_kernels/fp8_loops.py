"""E4M3 and its scales by NumPy loops over blocks; nothing here is shared with the code under test."""

import math

import ml_dtypes
import numpy as np

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)


def draw(seed, *shape):
  """Magnitudes over many binades, exact ties; zeros by element, row, column and block."""
  rng = np.random.default_rng(seed)
  x = rng.standard_normal(shape) * np.exp(2 * rng.standard_normal(shape))
  x = x.astype(ml_dtypes.bfloat16).astype(np.float32)  # few digits: ties are frequent
  x[rng.random(shape) < 0.1] = 0
  if min(shape) > 128:
    x[..., 1, :] = x[..., 3] = x[..., :128, :128] = 0
  return x


def scale(block, power_of_two):
  largest = np.abs(block).max().astype(np.float32)
  if largest == 0:
    return np.float32(1)
  if not power_of_two:
    return largest * np.float32(1 / 448)
  fraction, exponent = math.frexp(float(largest) / 448)
  return np.float32(2.0 ** (exponent - (fraction == 0.5)))


def quantize(x, height, width, power_of_two):
  """Codes and one scale a block of height x width, a block at a time."""
  codes = np.zeros(x.shape, E4M3)
  scales = np.zeros((-(-x.shape[0] // height), -(-x.shape[1] // width)), np.float32)
  for i in range(scales.shape[0]):
    for j in range(scales.shape[1]):
      block = np.s_[i * height : (i + 1) * height, j * width : (j + 1) * width]
      scales[i, j] = scale(x[block], power_of_two)
      codes[block] = (x[block].astype(np.float32) * (1 / scales[i, j])).astype(E4M3)
  codes[codes == 0] = 0  # no negative zeros
  return codes, scales


def values(x, height, width, power_of_two):
  """What the codes and scales stand for, float64."""
  codes, scales = quantize(np.asarray(x, np.float32), height, width, power_of_two)
  result = codes.astype(np.float64)
  for r in range(x.shape[0]):
    for c in range(x.shape[1]):
      result[r, c] *= scales[r // height, c // width]
  return result
