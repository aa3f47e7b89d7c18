"""Matmuls in FP8 by DeepSeek-V3's recipe: tiles of 1 x 128, blocks of 128 x 128, E4M3."""

from pallas_kernels.quantized_matmul.api import (
  GROUPED_IMPLEMENTATIONS,
  IMPLEMENTATIONS,
  quantize_blocks,
  quantize_columns,
  quantize_rows,
  quantized_grouped_matmul,
  quantized_matmul,
)
from pallas_kernels.quantized_matmul.e4m3 import Quantized
from pallas_kernels.quantized_matmul.routed import quantized_routed_swiglu

__all__ = [
  "GROUPED_IMPLEMENTATIONS",
  "IMPLEMENTATIONS",
  "Quantized",
  "quantize_blocks",
  "quantize_columns",
  "quantize_rows",
  "quantized_grouped_matmul",
  "quantized_matmul",
  "quantized_routed_swiglu",
]
