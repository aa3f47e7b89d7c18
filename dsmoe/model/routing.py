"""From hidden states to experts: the router's logits, and the config's rule for `pallas_kernels`.

What selection means stands in `pallas_kernels/routing/reference.py`. DeepSeek's own inference
code calls the group fields n_expert_groups and n_limited_groups, and the scaling factor
route_scale.

Shapes: M tokens, D hidden, E routed experts, K experts a token.
"""

import jax
import jax.numpy as jnp

from dsmoe.config import ModelConfig
from pallas_kernels import routing as kernels
from pallas_kernels.routing import Routed as Routing
from pallas_kernels.routing import scores

__all__ = ["Routing", "groups_touched", "route", "router_logits", "rule", "scores"]


def router_logits(x_MD, router_DE):
  """Returns x @ router in float32 whatever the inputs' dtype: [M, E]."""
  return jnp.matmul(
    x_MD.astype(jnp.float32),
    router_DE.astype(jnp.float32),
    precision=jax.lax.Precision.HIGHEST,
  )


def rule(config: ModelConfig) -> kernels.Rule:
  """Returns how the config's tokens choose: groups rank by their top two (V3) or best (V2)."""
  return kernels.Rule(
    config.num_experts_per_tok,
    config.n_group,
    config.topk_group,
    "top2" if config.topk_method == "noaux_tc" else "max",
    config.scoring_func,
    config.norm_topk_prob,
    config.routed_scaling_factor,
  )


def route(logits_ME, bias_E, config: ModelConfig) -> Routing:
  """Chooses each token's experts and their gates; see `pallas_kernels.routing.route`.

  Args:
    logits_ME: float32.
    bias_E: float32, used where the config's topk_method has one.
    config: scoring_func, topk_method, n_group, topk_group, num_experts_per_tok,
      norm_topk_prob, routed_scaling_factor, kernels.routing.
  """
  bias_E = bias_E if config.topk_method == "noaux_tc" else None
  return kernels.route(logits_ME, bias_E, rule(config), config.kernels.routing)


def groups_touched(expert_MK, config: ModelConfig):
  """Returns the mean number of expert groups a token's experts lie in, float32."""
  group_MK = expert_MK // (config.n_routed_experts // config.n_group)
  hit_MG = jnp.any(group_MK[:, :, None] == jnp.arange(config.n_group)[None, None, :], axis=1)
  return jnp.mean(jnp.sum(hit_MG, axis=-1, dtype=jnp.float32))
