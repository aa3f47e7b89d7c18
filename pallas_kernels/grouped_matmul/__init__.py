"""Rows times their expert's matrices: the fused SwiGLU of a mixture of experts."""

from pallas_kernels.grouped_matmul.api import (
  IMPLEMENTATIONS,
  MATMULS,
  TILES,
  chosen,
  grouped_matmul,
  grouped_swiglu,
  refusals,
  routed_swiglu,
  row_alignment,
)

__all__ = [
  "IMPLEMENTATIONS",
  "MATMULS",
  "TILES",
  "chosen",
  "grouped_matmul",
  "grouped_swiglu",
  "refusals",
  "routed_swiglu",
  "row_alignment",
]
