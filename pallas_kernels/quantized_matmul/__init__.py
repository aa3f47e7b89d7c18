"""Matmuls in FP8 by DeepSeek-V3's recipe: tiles of 1 x 128, blocks of 128 x 128, E4M3."""

from pallas_kernels.quantized_matmul.api import (
  GROUPED_IMPLEMENTATIONS,
  IMPLEMENTATIONS,
  chosen,
  quantize_blocks,
  quantize_columns,
  quantize_rows,
  quantized_grouped_matmul,
  quantized_matmul,
)
from pallas_kernels.quantized_matmul.e4m3 import Quantized
from pallas_kernels.quantized_matmul.experts import (
  quantized_grouped_swiglu,
  quantized_routed_swiglu,
  row_alignment,
)

__all__ = [
  "GROUPED_IMPLEMENTATIONS",
  "IMPLEMENTATIONS",
  "Quantized",
  "chosen",
  "quantize_blocks",
  "quantize_columns",
  "quantize_rows",
  "quantized_grouped_matmul",
  "quantized_grouped_swiglu",
  "quantized_matmul",
  "quantized_routed_swiglu",
  "row_alignment",
]
