import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from dsmoe.config import KernelsConfig
from dsmoe.model import routing
from pallas_kernels.routing import IMPLEMENTATIONS
from tests import oracles
from tests.helpers import assert_close, small_config

M, E, G, KEPT, K = 23, 12, 4, 2, 3
# Few values, so that ties abound; no two different sums of them are nearly equal.
LOGITS = (-1.3, -0.2, 0.7, 2.1)
BIASES = (-0.61, -0.17, 0.0, 0.23)


def _config(**changes):
  return dataclasses.replace(small_config().model, **changes)


def _draw(seed):
  rng = np.random.default_rng(seed)
  logits = rng.choice(LOGITS, (M, E)).astype(np.float32)
  return logits, rng.choice(BIASES, E).astype(np.float32)


def _route_by_loops(logits, bias, c):
  scores = [oracles.scores_of(row, c.scoring_func) for row in logits]
  experts = [oracles.choose(s, bias, c) for s in scores]
  gates = [oracles.gates_of(s, e, c) for s, e in zip(scores, experts)]
  counts = [sum(e in chosen for chosen in experts) for e in range(c.n_routed_experts)]
  return experts, np.array(gates), counts, np.array(scores)


@pytest.mark.parametrize(
  "scoring_func, topk_method, grouped, norm_topk_prob",
  [
    case
    for case in itertools.product(
      ("sigmoid", "softmax", "sqrtsoftplus"),
      ("noaux_tc", "group_limited_greedy", "greedy"),
      (True, False),
      (True, False),
    )
    if not (case[1] == "greedy" and case[2])
  ],
)
@pytest.mark.parametrize("implementation", sorted(IMPLEMENTATIONS.keys() - {"mosaic_gpu"}))
def test_route_matches_loops_in_indices_gates_and_gradient(
  implementation, scoring_func, topk_method, grouped, norm_topk_prob
):
  if implementation == "mosaic_tpu" and norm_topk_prob != grouped:
    pytest.skip("interpreting is slow: half of the rules, every choice among them")
  c = _config(
    scoring_func=scoring_func,
    topk_method=topk_method,
    n_group=G if grouped else 1,
    topk_group=KEPT if grouped else 1,
    norm_topk_prob=norm_topk_prob,
    routed_scaling_factor=1.7,
    kernels=KernelsConfig(routing=implementation),
  )
  logits, bias = _draw(7)
  dgates = np.random.default_rng(8).standard_normal((M, K)).astype(np.float32)

  @jax.jit
  def run(logits, bias):
    _, vjp, routed = jax.vjp(
      lambda *a: ((r := routing.route(*a, c)).gate_MK, r), logits, bias, has_aux=True
    )
    return routed, vjp(dgates)

  with pltpu.force_tpu_interpret_mode():
    routed, (dlogits, dbias) = run(logits, bias)
  experts, gates, counts, scores = _route_by_loops(logits, bias, c)
  np.testing.assert_array_equal(routed.expert_MK, experts)
  assert_close(routed.gate_MK, gates)
  assert_close(jax.jit(routing.scores, static_argnums=1)(logits, scoring_func), scores)
  ranks = [[sum(e in row for row in experts[:m]) for e in experts[m]] for m in range(M)]
  assert routed.rank_MK.tolist() == ranks
  assert routed.counts_E.tolist() == counts
  assert routed.expert_MK.dtype == routed.counts_E.dtype == routed.rank_MK.dtype == jnp.int32
  assert routed.gate_MK.dtype == jnp.float32
  # The gradient by finite differences of the loops, the choice held fixed.
  expected, h = np.zeros((M, E)), 1e-6
  for m, e in np.ndindex(M, E):
    sides = []
    for step in (h, -h):
      moved = logits[m].astype(np.float64)
      moved[e] += step
      sides.append(oracles.gates_of(oracles.scores_of(moved, scoring_func), experts[m], c))
    expected[m, e] = dgates[m] @ (sides[0] - sides[1]) / (2 * h)
  assert_close(dlogits, expected)
  np.testing.assert_array_equal(dbias, np.zeros(E))


def test_ranks_and_counts_go_on_over_blocks_of_tokens():
  """600 tokens are three blocks of the TPU's kernel, the last one partial; an expert stays idle."""
  c = _config(n_group=G, topk_group=KEPT, kernels=KernelsConfig(routing="mosaic_tpu"))
  rng = np.random.default_rng(11)
  logits = rng.choice(LOGITS, (600, E)).astype(np.float32)
  bias = rng.choice(BIASES, E).astype(np.float32)
  bias[7] = -9
  dgates = rng.standard_normal((600, K)).astype(np.float32)

  @jax.jit
  def run(logits):
    _, vjp, routed = jax.vjp(
      lambda a: ((r := routing.route(a, bias, c)).gate_MK, r), logits, has_aux=True
    )
    return routed, vjp(dgates)[0]

  with pltpu.force_tpu_interpret_mode():
    routed, dlogits = jax.device_get(run(logits))
  experts, gates, counts, _ = _route_by_loops(logits, bias, c)
  np.testing.assert_array_equal(routed.expert_MK, experts)
  assert_close(routed.gate_MK, gates)
  assert routed.counts_E.tolist() == counts and counts[7] == 0
  seen = np.zeros(E, int)
  for chosen, ranks in zip(experts, routed.rank_MK):
    assert ranks.tolist() == seen[chosen].tolist()
    seen[chosen] += 1
  for m in (0, 255, 256, 599):  # by finite differences, the choice held fixed
    for e in experts[m]:
      sides, h = [], 1e-6
      for step in (h, -h):
        moved = logits[m].astype(np.float64)
        moved[e] += step
        sides.append(oracles.gates_of(oracles.scores_of(moved, c.scoring_func), experts[m], c))
      expected = dgates[m] @ (sides[0] - sides[1]) / (2 * h)
      assert abs(dlogits[m, e] - expected) < 1e-4


_jitted = jax.jit(routing.route, static_argnums=2)


def _route(logits, bias, c):
  return _jitted(np.asarray(logits, np.float32), np.asarray(bias, np.float32), c)


def test_equal_scores_go_to_the_lower_experts_of_the_lower_groups():
  c = _config(n_group=G, topk_group=KEPT)
  routed = _route(np.zeros((2, E)), np.zeros(E), c)
  assert routed.expert_MK.tolist() == [[0, 1, 2]] * 2
  raised = np.zeros((1, E))
  raised[0, 8], raised[0, 4] = 1.0, 1.0  # groups 2 and 1 now tie above groups 0 and 3
  assert _route(raised, np.zeros(E), c).expert_MK.tolist() == [[4, 8, 3]]


def test_experts_of_dropped_groups_are_never_chosen_below_zero():
  """With every biased score negative, a fill of 0 would choose from the dropped groups."""
  c = _config(n_group=G, topk_group=KEPT, num_experts_per_tok=6)
  logits = np.random.default_rng(9).standard_normal((M, E)).astype(np.float32)
  bias = np.random.default_rng(10).choice(BIASES, E).astype(np.float32) - 5
  experts = _route(logits, bias, c).expert_MK
  expected = [oracles.choose(oracles.sigmoid(row), bias, c) for row in logits]
  np.testing.assert_array_equal(experts, expected)
  groups = np.asarray(experts) // (E // G)
  assert {len(set(row)) for row in groups.tolist()} == {KEPT}


def test_a_group_ranks_by_its_two_best_or_by_its_best():
  scores = np.array([[0.9, 0.1, 0.1, 0.6, 0.6, 0.1, 0.2, 0.2, 0.2, 0.3, 0.3, 0.3]])
  logits = np.log(scores / (1 - scores))
  base = dict(n_group=G, topk_group=1, num_experts_per_tok=2)
  v3 = _route(logits, np.zeros(E), _config(**base, topk_method="noaux_tc"))
  v2 = _route(logits, np.zeros(E), _config(**base, topk_method="group_limited_greedy"))
  assert v3.expert_MK.tolist() == [[3, 4]] and v2.expert_MK.tolist() == [[0, 1]]


def test_bias_chooses_and_does_not_weigh():
  c = _config(n_group=1, topk_group=1, norm_topk_prob=False, routed_scaling_factor=2.0)
  logits, _ = _draw(10)
  bias = np.zeros(E)
  bias[[2, 5, 11]] = 10, 20, 30
  routed = _route(logits, bias, c)
  assert routed.expert_MK.tolist() == [[11, 5, 2]] * M
  assert_close(routed.gate_MK, 2 * oracles.sigmoid(logits[:, [11, 5, 2]]))
  assert routed.counts_E.tolist() == [M if e in (2, 5, 11) else 0 for e in range(E)]


def test_bias_decides_by_less_than_bfloat16_can_hold():
  c = _config(n_group=1, topk_group=1, num_experts_per_tok=1)
  bias = np.full(E, 1.0)
  bias[7] = 1.0001
  assert _route(np.zeros((1, E)), bias, c).expert_MK.tolist() == [[7]]


def test_bias_is_not_needed_without_noaux_tc():
  c = _config(topk_method="greedy", n_group=1, topk_group=1)
  logits, _ = _draw(11)
  expected = [oracles.choose(oracles.sigmoid(row), None, c) for row in logits]
  np.testing.assert_array_equal(_jitted(logits, None, c).expert_MK, expected)


@pytest.mark.parametrize("router_dtype", ["float32", "bfloat16"])
def test_router_logits_are_float32_whatever_the_inputs(router_dtype):
  rng = np.random.default_rng(12)
  x = jnp.asarray(rng.standard_normal((M, 40)), jnp.bfloat16)
  router = jnp.asarray(rng.standard_normal((40, E)), router_dtype)
  logits = routing.router_logits(x, router)
  assert logits.dtype == jnp.float32
  assert_close(logits, np.asarray(x, np.float64) @ np.asarray(router, np.float64))
  # On accelerators the default precision of a float32 matmul is lower.
  assert "HIGHEST" in str(jax.make_jaxpr(routing.router_logits)(x, router))


def test_groups_touched():
  c = _config(n_group=G)
  experts = jnp.asarray([[0, 1, 2], [0, 3, 11], [2, 3, 4], [9, 11, 10]])
  touched = routing.groups_touched(experts, c)
  assert touched.dtype == jnp.float32 and float(touched) == (1 + 3 + 2 + 1) / 4
