"""Converts DeepSeek's FP8 weights: codes, and a scale for each block of 128 x 128.

Shapes: a published matrix is [O, I], outputs by inputs.
Source: DeepSeek-V3's inference/kernel.py (weight = code * weight_scale_inv of its block) and
the report, arXiv:2412.19437 section 3.3.
"""

import ml_dtypes
import numpy as np

FP8_BLOCK = (128, 128)
CODE = np.dtype(ml_dtypes.float8_e4m3fn)
FP8_MAX = float(ml_dtypes.finfo(CODE).max)  # 448


def dequantise(
  codes: np.ndarray, scale: np.ndarray, start: int = 0, block: tuple[int, int] = FP8_BLOCK
) -> np.ndarray:
  """Scales FP8 codes, rows `start` on of a weight, block by block.

  Args:
    codes: float8_e4m3fn [rows, I].
    scale: float32 or float8_e8m0fnu [ceil(O / block[0]), ceil(I / block[1])].
    start: the first row's place in the weight.

  Returns:
    float32 [rows, I]: code * scale.
  """
  result, (height, width) = codes.astype(np.float32), block
  for i in range(start // height, -(-(start + len(codes)) // height)):
    first, last = max(i * height - start, 0), (i + 1) * height - start
    result[first:last] *= np.repeat(scale[i].astype(np.float32), width)[: codes.shape[1]]
  return result


def quantise(
  weight: np.ndarray, ue8m0: bool = False, name: str = "weight"
) -> tuple[np.ndarray, np.ndarray]:
  """Turns rows of a weight, starting at a multiple of 128, into FP8 codes and scales.

  A block's scale maps its largest magnitude to 448, the largest code; UE8M0 scales are rounded up
  to a power of two. A block of zeros has scale 1.

  Args:
    weight: float32 [rows, I].
    ue8m0: whether scales are powers of two.
    name: for messages.

  Returns:
    codes, float8_e4m3fn [rows, I]; scales, float32 [ceil(rows / 128), ceil(I / 128)].

  Raises:
    ValueError: for NaN or infinity, which would make its whole block wrong.
  """
  (height, width), (rows, columns) = FP8_BLOCK, weight.shape
  scale = np.ones((-(-rows // height), -(-columns // width)), np.float32)
  codes = np.empty(weight.shape, CODE)
  for i in range(len(scale)):
    strip = weight[i * height : (i + 1) * height]
    largest = np.maximum.reduceat(np.abs(strip).max(axis=0), np.arange(0, columns, width))
    if not np.isfinite(largest).all():
      raise ValueError(f"{name} must be finite to become FP8, it holds NaN or infinity")
    # Below the smallest normal number a quotient by the scale would lose its meaning.
    wanted = np.maximum(largest / np.float32(FP8_MAX), np.finfo(np.float32).tiny)
    if ue8m0:
      fraction, exponent = np.frexp(wanted)
      wanted = np.ldexp(np.float32(1), exponent - (fraction == 0.5))
    scale[i] = np.where(largest > 0, wanted, 1)
    scaled = strip / np.repeat(scale[i], width)[:columns]
    codes[i * height : (i + 1) * height] = scaled.astype(CODE)
  return codes, scale
