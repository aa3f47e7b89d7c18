"""E4M3, its scales and an FP8 expert by NumPy loops; nothing is shared with the tested code."""

import math

import ml_dtypes
import numpy as np

from tests import oracles

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
  row, column = (np.arange(n) // side for n, side in zip(x.shape, (height, width)))
  return codes.astype(np.float64) * scales[row[:, None], column]


def expert(x, weight, weights, dy, dtype, power_of_two):
  """One expert's SwiGLU on its own rows, float64 but for codes and for rounding to dtype.

  Returns:
    The outputs, the gradients of x, of the rows' weights, and of the three matrices.
  """

  def number(a, height, width):
    return values(a, height, width, power_of_two)

  def rounded(a):
    return np.asarray(np.asarray(a, np.dtype(dtype)), np.float64)

  w_gate, w_up, w_down = (number(w, 128, 128) for w in weights)
  scale = weight[:, None]
  gate, up = (rounded(number(x, 1, 128) @ w) for w in (w_gate, w_up))
  sigmoid = oracles.sigmoid(gate)
  act = gate * sigmoid * up
  inner = rounded(act * scale)
  y = rounded(number(inner, 1, 128) @ w_down)
  dinner = rounded(number(dy, 1, 128) @ w_down.T)
  dgate = rounded(dinner * scale * up * sigmoid * (1 + gate * (1 - sigmoid)))
  dup = rounded(dinner * scale * gate * sigmoid)
  dx = sum(rounded(number(d, 1, 128) @ w.T) for d, w in ((dgate, w_gate), (dup, w_up)))
  columns = lambda a: number(a, 128, 1)  # noqa: E731
  pairs = [(x, dgate), (x, dup), (inner, dy)]
  dweights = [columns(left).T @ columns(right) for left, right in pairs]
  return y, dx, (dinner * act).sum(axis=1), dweights
