"""From router logits to experts, gates, counts and ranks."""

from pallas_kernels.routing.api import IMPLEMENTATIONS, chosen, route
from pallas_kernels.routing.reference import SCORING_FUNCS, Routed, Rule, ranks, scores

__all__ = [
  "IMPLEMENTATIONS",
  "SCORING_FUNCS",
  "Routed",
  "Rule",
  "chosen",
  "ranks",
  "route",
  "scores",
]
