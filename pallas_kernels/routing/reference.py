"""Router logits to experts, gates, counts and ranks, in plain JAX.

Semantics, where ports go wrong: selection uses biased scores and gates unbiased ones;
dropped groups become -inf, never 0; ties go to the lower expert index; all in float32.

Shapes: M tokens, E experts, G groups, K experts a token.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

SCORING_FUNCS = ("sigmoid", "softmax", "sqrtsoftplus")


class Rule(NamedTuple):
  """How tokens choose. Fields are named as in DeepSeek's config.json."""

  num_experts_per_tok: int
  n_group: int
  topk_group: int
  group_score: str  # "top2" (sum of the two best, V3) or "max" (V2)
  scoring_func: str
  norm_topk_prob: bool
  routed_scaling_factor: float


class Routed(NamedTuple):
  """Where each token goes."""

  expert_MK: jax.Array  # int32, descending by biased score
  gate_MK: jax.Array  # float32, the weights of those experts' outputs
  counts_E: jax.Array  # int32, tokens each expert received
  rank_MK: jax.Array  # int32, how many earlier tokens chose that expert


def scores(logits, scoring_func: str, axis: int = -1):
  """Returns the experts' scores, float32, like logits; sqrtsoftplus is sqrt(softplus)."""
  if scoring_func == "sigmoid":
    return jax.nn.sigmoid(logits)
  if scoring_func == "softmax":
    return jax.nn.softmax(logits, axis=axis)
  return jnp.sqrt(jax.nn.softplus(logits))


def limit_groups(biased_ME, rule: Rule):
  """Sets the scores outside each token's best `topk_group` groups to -inf; ties to the lower."""
  if rule.topk_group == rule.n_group:
    return biased_ME
  M, E = biased_ME.shape
  grouped_MGe = biased_ME.reshape(M, rule.n_group, E // rule.n_group)
  if rule.group_score == "top2":
    score_MG = jnp.sum(jax.lax.top_k(grouped_MGe, 2)[0], axis=-1)
  else:
    score_MG = jnp.max(grouped_MGe, axis=-1)
  _, kept = jax.lax.top_k(score_MG, rule.topk_group)
  keep_MG = jnp.any(kept[:, :, None] == jnp.arange(rule.n_group)[None, None, :], axis=1)
  return jnp.where(keep_MG[:, :, None], grouped_MGe, -jnp.inf).reshape(M, E)


def _by_expert(expert_P, num_experts: int):
  """Returns the pairs in order of their experts, as a stable argsort does."""
  P = expert_P.size
  if num_experts * P >= 2**31:
    return jnp.argsort(expert_P, stable=True)
  # One array of distinct numbers: XLA:CPU sorts it four times faster than keys with places.
  return jnp.sort(expert_P * P + jnp.arange(P, dtype=jnp.int32)) % P


def ranks(expert_MK, num_experts: int):
  """Returns (rank_MK, counts_E) of chosen experts, by a stable sort."""
  flat_P = expert_MK.reshape(-1)
  pair_P = _by_expert(flat_P, num_experts)
  place_P = jnp.arange(flat_P.size, dtype=jnp.int32)
  row_P = jnp.zeros_like(place_P).at[pair_P].set(place_P, unique_indices=True)
  counts_E = jnp.bincount(flat_P, length=num_experts).astype(jnp.int32)
  first_E = jnp.cumsum(counts_E) - counts_E
  return (row_P - first_E[flat_P]).reshape(expert_MK.shape), counts_E


def route(logits_ME, bias_E, rule: Rule) -> Routed:
  """See `api.route`."""
  scores_ME = scores(logits_ME, rule.scoring_func)
  biased_ME = jax.lax.stop_gradient(scores_ME)
  if bias_E is not None:
    biased_ME = biased_ME + jax.lax.stop_gradient(bias_E)[None]
  _, expert_MK = jax.lax.top_k(limit_groups(biased_ME, rule), rule.num_experts_per_tok)
  gate_MK = jnp.take_along_axis(scores_ME, expert_MK, axis=-1)
  if rule.norm_topk_prob:
    gate_MK = gate_MK / (jnp.sum(gate_MK, axis=-1, keepdims=True) + 1e-20)
  rank_MK, counts_E = ranks(expert_MK, logits_ME.shape[1])
  return Routed(expert_MK, gate_MK * rule.routed_scaling_factor, counts_E, rank_MK)
