"""The chooser of the path from tokens to their experts and back.

Every back end has one signature, `(x_MD, routed, experts, config) -> (y_MD, DispatchStats)`,
and equals the dense oracle in value and gradient.

Shapes: M tokens, D hidden, E experts, K experts a token.
"""

from collections.abc import Callable

import jax

from dsmoe import platforms
from dsmoe.config import ModelConfig
from dsmoe.parallel import (
  all_gather,
  all_to_all,
  chosen,
  collectives,
  dense,
  hierarchical,
  local,
  replicated,
  ring,
)
from dsmoe.parallel.experts import ExpertWeights
from dsmoe.parallel.stats import DispatchStats, nothing_dropped
from pallas_kernels.routing import Routed

# By their names in the config.
BACK_ENDS: dict[str, Callable] = {
  "local": local.local,
  "dense": dense.dense,
  "all_gather": all_gather.all_gather,
  "all_to_all": all_to_all.all_to_all,
  "ring": ring.ring,
  "replicated": replicated.replicated,
  "hierarchical": hierarchical.hierarchical,
}


def routed_experts(
  x_MD,
  routed: Routed,
  experts: ExpertWeights,
  config: ModelConfig,
  real_M=None,
  inference: bool = False,
) -> tuple[jax.Array, DispatchStats]:
  """Sends tokens to their experts and sums what comes back, each times its gate.

  Args:
    x_MD: tokens.
    routed: their experts and gates.
    experts: the layer's weights, in x's dtype.
    config: dispatch, exchange, matmul_precision, kernels.
    real_M: bool, tokens that count; the others' results are undefined. None: all count.
    inference: no gradient is taken, and the devices along `expert` have the same tokens: each
      applies its own experts to all of them, and the results are summed. Few tokens then read only
      the experts they chose, unless the config names a grouped matmul, the back end `dense` or FP8,
      whose paths are the same everywhere.

  Returns:
    ([M, D] in x's dtype; this device's `DispatchStats`).
  """
  few = (
    inference
    and config.dispatch != "dense"
    and config.kernels.grouped_matmul is None
    and config.matmul_precision == "compute_dtype"
    and platforms.reads_chosen_experts(x_MD.shape[0])
  )
  if inference and collectives.devices_along("expert") > 1:
    own_MD = _own_experts(x_MD, routed, experts, config, real_M, few)
    return jax.lax.psum(own_MD, "expert"), nothing_dropped()
  if few:
    return chosen.chosen(x_MD, routed, experts, real_M), nothing_dropped()
  return BACK_ENDS[config.dispatch](x_MD, routed, experts, config)


def _own_experts(x_MD, routed: Routed, experts: ExpertWeights, config: ModelConfig, real_M, few):
  """Returns the sum of this device's experts' shares of tokens that all devices of `expert` have."""
  first = jax.lax.axis_index("expert") * experts.num_experts
  if few:
    return chosen.chosen(x_MD, routed, experts, real_M, first)
  if config.dispatch == "dense":
    return dense.masked(x_MD, routed, experts, first)
  return all_gather.own_experts(x_MD, routed, experts, config)
