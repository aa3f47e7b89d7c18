"""Routing for TPU (Mosaic): one pass over the logits, nothing else written but the results.

A block of tokens is turned so that experts lie along sublanes and tokens along lanes: maxima
over experts are then elementwise. Ranks are prefix sums over tokens, taken by a product with a
triangle of ones, exact since all are small whole numbers; the counts so far are carried from
block to block, which makes them deterministic.

Shapes: M tokens, m tokens of a block, E experts, G groups, K experts a token.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import traffic
from pallas_kernels.routing.reference import Routed, Rule, scores
from pallas_kernels.varying import varying_like

BLOCK_TOKENS = 256
MOST_EXPERTS = 1024  # with whose scores a block of tokens fits VMEM

f32, i32 = jnp.float32, jnp.int32


def _experts(shape):
  return jax.lax.broadcasted_iota(i32, shape, 0)


def _first_best(values, experts, num_experts: int):
  """Returns (largest [1, m], its lowest index [1, m]) along the first axis."""
  best = jnp.max(values, axis=0, keepdims=True)
  index = jnp.min(jnp.where(values == best, experts, num_experts - 1), axis=0, keepdims=True)
  return best, index


def _limit_groups(biased_Em, rule: Rule):
  """`reference.limit_groups`, experts first."""
  G, size = rule.n_group, biased_Em.shape[0] // rule.n_group
  groups = [biased_Em[g * size : (g + 1) * size] for g in range(G)]
  score = []
  for group in groups:
    experts = _experts(group.shape)
    best, index = _first_best(group, experts, size)
    if rule.group_score == "top2":
      best = best + jnp.max(jnp.where(experts == index, -jnp.inf, group), axis=0, keepdims=True)
    score.append(best)
  kept = []
  for g in range(G):
    better = [score[h] >= score[g] if h < g else score[h] > score[g] for h in range(G) if h != g]
    num_better = sum(b.astype(i32) for b in better)
    kept.append(jnp.where(num_better < rule.topk_group, groups[g], -jnp.inf))
  return jnp.concatenate(kept, axis=0)


def _forward(rule: Rule, num_tokens: int, logits_ref, bias_ref, *refs):
  expert_ref, gate_ref, rank_ref, counts_ref, before_ref = refs
  i = pl.program_id(0)
  m, E = logits_ref.shape

  @pl.when(i == 0)
  def _():
    before_ref[...] = jnp.zeros_like(before_ref)

  scores_Em = scores(logits_ref[...].T, rule.scoring_func, axis=0)
  left_Em = scores_Em + bias_ref[...]
  if rule.topk_group < rule.n_group:
    left_Em = _limit_groups(left_Em, rule)
  experts = _experts((E, m))
  taken_Em = jnp.zeros((E, m), bool)
  index, gate = [], []
  for _choice in range(rule.num_experts_per_tok):
    _, index_1m = _first_best(left_Em, experts, E)
    chosen_Em = experts == index_1m
    index.append(index_1m)
    gate.append(jnp.sum(jnp.where(chosen_Em, scores_Em, 0), axis=0, keepdims=True))
    left_Em = jnp.where(chosen_Em, -jnp.inf, left_Em)
    taken_Em |= chosen_Em
  expert_ref[...] = jnp.concatenate(index, axis=0)
  gate_Km = jnp.concatenate(gate, axis=0)
  if rule.norm_topk_prob:
    gate_Km = gate_Km / (jnp.sum(gate_Km, axis=0, keepdims=True) + 1e-20)
  gate_ref[...] = gate_Km * rule.routed_scaling_factor

  tokens_1m = i * m + jax.lax.broadcasted_iota(i32, (1, m), 1)
  taken_Em = jnp.where(taken_Em & (tokens_1m < num_tokens), 1.0, 0.0).astype(f32)
  earlier_mm = jax.lax.broadcasted_iota(i32, (m, m), 0) < jax.lax.broadcasted_iota(i32, (m, m), 1)
  earlier_mm = jnp.where(earlier_mm, 1.0, 0.0).astype(jnp.bfloat16)
  rank_Em = jnp.dot(taken_Em.astype(jnp.bfloat16), earlier_mm, preferred_element_type=f32)
  rank_Em = rank_Em.astype(i32) + before_ref[...]
  rank = [jnp.sum(jnp.where(experts == e, rank_Em, 0), axis=0, keepdims=True) for e in index]
  rank_ref[...] = jnp.concatenate(rank, axis=0)
  before_ref[...] += jnp.sum(taken_Em, axis=1, keepdims=True).astype(i32)
  counts_ref[...] = before_ref[...]


def _backward(rule: Rule, logits_ref, expert_ref, dgate_ref, dlogits_ref):
  logits_Em = logits_ref[...].T
  scores_Em = scores(logits_Em, rule.scoring_func, axis=0)
  experts = _experts(scores_Em.shape)
  K = rule.num_experts_per_tok
  chosen = [experts == expert_ref[k : k + 1] for k in range(K)]
  dgate_Km = dgate_ref[...] * rule.routed_scaling_factor
  if rule.norm_topk_prob:
    score_Km = jnp.concatenate(
      [jnp.sum(jnp.where(c, scores_Em, 0), axis=0, keepdims=True) for c in chosen], axis=0
    )
    total_1m = jnp.sum(score_Km, axis=0, keepdims=True) + 1e-20
    along_1m = jnp.sum(dgate_Km * score_Km, axis=0, keepdims=True) / total_1m
    dgate_Km = (dgate_Km - along_1m) / total_1m
  dscores_Em = jnp.zeros_like(scores_Em)
  for k in range(K):
    dscores_Em = jnp.where(chosen[k], dgate_Km[k : k + 1], dscores_Em)
  if rule.scoring_func == "sigmoid":
    dlogits_Em = dscores_Em * scores_Em * (1 - scores_Em)
  elif rule.scoring_func == "softmax":
    mean_1m = jnp.sum(dscores_Em * scores_Em, axis=0, keepdims=True)
    dlogits_Em = scores_Em * (dscores_Em - mean_1m)
  else:
    dlogits_Em = dscores_Em * jax.nn.sigmoid(logits_Em) / (2 * scores_Em)
  dlogits_ref[...] = dlogits_Em.T


def _call(kernel, name: str, M: int, flops: int, operands, in_specs, outs, out_specs, scratch=()):
  grid = (pl.cdiv(M, BLOCK_TOKENS),)
  return pl.pallas_call(
    kernel,
    grid=grid,
    in_specs=in_specs,
    out_specs=out_specs,
    out_shape=varying_like(outs, *operands),
    scratch_shapes=scratch,
    compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
    cost_estimate=pl.CostEstimate(
      flops=flops,
      bytes_accessed=traffic.bytes_moved(
        grid, [*zip(operands, in_specs), *zip(jax.tree.leaves(outs), jax.tree.leaves(out_specs))]
      ),
      transcendentals=operands[0].size,
    ),
    name=name,
  )(*operands)


_TOKENS_FIRST = lambda E: pl.BlockSpec((BLOCK_TOKENS, E), lambda i: (i, 0))  # noqa: E731
_TOKENS_LAST = lambda K: pl.BlockSpec((K, BLOCK_TOKENS), lambda i: (0, i))  # noqa: E731


def refused(E: int) -> str | None:
  """Returns why the kernel does not take so many experts, or None."""
  if E > MOST_EXPERTS:
    return f"mosaic_tpu takes at most {MOST_EXPERTS} experts, got {E}"
  return None


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def route(logits_ME, bias_E, rule: Rule) -> Routed:
  """See `api.route`."""
  M, E = logits_ME.shape
  if broken := refused(E):
    raise ValueError(broken)
  K = rule.num_experts_per_tok
  bias_E1 = jnp.zeros((E, 1), f32) if bias_E is None else bias_E[:, None]
  column = pl.BlockSpec((E, 1), lambda i: (0, 0))
  struct = lambda dtype: jax.ShapeDtypeStruct((K, M), dtype)  # noqa: E731
  expert_KM, gate_KM, rank_KM, counts_E1 = _call(
    functools.partial(_forward, rule, M),
    "routing",
    M,
    2 * E * BLOCK_TOKENS**2 * pl.cdiv(M, BLOCK_TOKENS),
    (logits_ME, bias_E1),
    [_TOKENS_FIRST(E), column],
    (struct(i32), struct(f32), struct(i32), jax.ShapeDtypeStruct((E, 1), i32)),
    (_TOKENS_LAST(K), _TOKENS_LAST(K), _TOKENS_LAST(K), column),
    [pltpu.VMEM((E, 1), i32)],
  )
  return Routed(expert_KM.T, gate_KM.T, counts_E1[:, 0], rank_KM.T)


def _route_fwd(logits_ME, bias_E, rule):
  routed = route(logits_ME, bias_E, rule)
  return routed, (logits_ME, bias_E, routed.expert_MK)


def _route_bwd(rule, saved, dout: Routed):
  logits_ME, bias_E, expert_MK = saved
  M, E = logits_ME.shape
  K = rule.num_experts_per_tok
  dlogits_ME = _call(
    functools.partial(_backward, rule),
    "routing_gradient",
    M,
    0,
    (logits_ME, expert_MK.T, dout.gate_MK.T),
    [_TOKENS_FIRST(E), _TOKENS_LAST(K), _TOKENS_LAST(K)],
    jax.ShapeDtypeStruct((M, E), f32),
    _TOKENS_FIRST(E),
  )
  return dlogits_ME, None if bias_E is None else jnp.zeros_like(bias_E)


route.defvjp(_route_fwd, _route_bwd)
