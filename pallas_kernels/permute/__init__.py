"""Tokens' rows into the order of their experts, and the sum of each token's rows."""

from pallas_kernels.permute.api import IMPLEMENTATIONS, chosen, combine, permute
from pallas_kernels.permute.reference import (
  expert_order,
  group_starts,
  in_a_group,
  num_rows,
  weights_of_rows,
)

__all__ = [
  "IMPLEMENTATIONS",
  "chosen",
  "combine",
  "expert_order",
  "group_starts",
  "in_a_group",
  "num_rows",
  "permute",
  "weights_of_rows",
]
