"""Tokens into expert order and back."""

from pallas_kernels.permute.reference import (
  combine,
  expert_order,
  group_starts,
  num_rows,
  permute,
  sum_rows,
)

__all__ = ["combine", "expert_order", "group_starts", "num_rows", "permute", "sum_rows"]
