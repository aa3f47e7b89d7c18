"""From router logits to experts: scores, group limit, top-k, gates. Pure functions.

Semantics, where ports go wrong: selection uses biased scores and gates unbiased ones;
dropped groups become -inf, never 0; ties go to the lower expert index; all in float32.
DeepSeek's own inference code calls the group fields n_expert_groups and n_limited_groups,
and the scaling factor route_scale.

Shapes: M tokens, E routed experts, G groups, K experts a token.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsmoe.config import ModelConfig


class Routing(NamedTuple):
  """Where each token goes."""

  expert_MK: jax.Array  # int32, descending by biased score
  gate_MK: jax.Array  # float32, the weights of those experts' outputs
  counts_E: jax.Array  # int32, tokens each expert received
  scores_ME: jax.Array  # float32, unbiased


def router_logits(x_MD, router_DE):
  """Returns x @ router in float32 whatever the inputs' dtype: [M, E]."""
  return jnp.matmul(
    x_MD.astype(jnp.float32),
    router_DE.astype(jnp.float32),
    precision=jax.lax.Precision.HIGHEST,
  )


def scores(logits_ME, scoring_func: str):
  """Returns sigmoid or softmax of the logits, float32 [M, E]."""
  if scoring_func == "sigmoid":
    return jax.nn.sigmoid(logits_ME)
  return jax.nn.softmax(logits_ME, axis=-1)


def limit_groups(biased_ME, config: ModelConfig):
  """Sets the scores outside each token's best `topk_group` of `n_group` groups to -inf.

  A group ranks by the sum of its top two biased scores (noaux_tc, V3) or by its best
  (group_limited_greedy, V2); ties go to the lower group.
  """
  if config.topk_group == config.n_group:
    return biased_ME
  M, E = biased_ME.shape
  grouped_MGe = biased_ME.reshape(M, config.n_group, E // config.n_group)
  if config.topk_method == "noaux_tc":
    rank_MG = jnp.sum(jax.lax.top_k(grouped_MGe, 2)[0], axis=-1)
  else:
    rank_MG = jnp.max(grouped_MGe, axis=-1)
  _, kept = jax.lax.top_k(rank_MG, config.topk_group)
  keep_MG = jnp.any(kept[:, :, None] == jnp.arange(config.n_group)[None, None, :], axis=1)
  return jnp.where(keep_MG[:, :, None], grouped_MGe, -jnp.inf).reshape(M, E)


def route(logits_ME, bias_E, config: ModelConfig) -> Routing:
  """Chooses each token's experts and their gates.

  Args:
    logits_ME: float32.
    bias_E: float32, added to the scores for selection only; no gradient.
    config: scoring_func, topk_method, n_group, topk_group, num_experts_per_tok,
      norm_topk_prob, routed_scaling_factor.

  Returns:
    A `Routing`; the gradient of the gates reaches the logits, indices have none.

  Source: DeepSeek-V3 (arXiv:2412.19437) equations 12-16 and section 2.1.2.
  """
  scores_ME = scores(logits_ME, config.scoring_func)
  biased_ME = jax.lax.stop_gradient(scores_ME)
  if config.topk_method == "noaux_tc":
    biased_ME = biased_ME + jax.lax.stop_gradient(bias_E)[None]
  _, expert_MK = jax.lax.top_k(limit_groups(biased_ME, config), config.num_experts_per_tok)
  gate_MK = jnp.take_along_axis(scores_ME, expert_MK, axis=-1)
  if config.norm_topk_prob:
    gate_MK = gate_MK / (jnp.sum(gate_MK, axis=-1, keepdims=True) + 1e-20)
  gate_MK = gate_MK * config.routed_scaling_factor
  counts_E = jnp.bincount(expert_MK.reshape(-1), length=config.n_routed_experts)
  return Routing(expert_MK, gate_MK, counts_E.astype(jnp.int32), scores_ME)


def groups_touched(expert_MK, config: ModelConfig):
  """Returns the mean number of expert groups a token's experts lie in, float32."""
  group_MK = expert_MK // (config.n_routed_experts // config.n_group)
  hit_MG = jnp.any(group_MK[:, :, None] == jnp.arange(config.n_group)[None, None, :], axis=1)
  return jnp.mean(jnp.sum(hit_MG, axis=-1, dtype=jnp.float32))
