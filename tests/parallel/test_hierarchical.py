"""How often tokens cross between groups of devices, and what is done where there is no room."""

import numpy as np
import pytest

from dsmoe.config import ExchangeConfig
from tests.helpers import assert_close
from tests.parallel.exchanges import program
from tests.parallel.test_all_gather import _inputs
from tests.parallel.test_dispatch import _by_loops, _config


def _routing(num_tokens: int, limit: int, rng):
  """int32 [tokens, 8]: 8 of 256 experts, from `limit` of 8 groups."""
  groups = [rng.choice(8, limit, replace=False) for _ in range(num_tokens)]
  rows = [rng.choice(32 * limit, 8, replace=False) for _ in range(num_tokens)]
  return np.array([g[r // 32] * 32 + r % 32 for g, r in zip(groups, rows)], np.int32)


@pytest.mark.parametrize(
  "expert, limit, per_token", [(4, 8, 2.711), (8, 8, 4.633), (8, 4, 3.175)], ids=str
)
def test_a_token_crosses_once_to_each_group_of_its_experts(expert, limit, per_token):
  """Every device is a group here. Published for DeepSeek-V3's routing: 3.175, limited to 4 of 8."""
  rng, T, D, E, F = np.random.default_rng(0), 512 * expert, 2, 256, 3
  experts = _routing(T, limit, rng)
  x, dy = rng.standard_normal((2, T, D)).astype(np.float32)
  gates = rng.uniform(0.1, 2, experts.shape).astype(np.float32)
  weights = [rng.standard_normal(s).astype(np.float32) for s in ((E, D, F), (E, D, F), (E, F, D))]
  exchange = ExchangeConfig(devices_per_group=1, receive_capacity=2.0)
  config = _config(dispatch="hierarchical", exchange=exchange, n_routed_experts=E)
  _, stats = program(config, 1, expert)(x, experts, gates, tuple(weights), dy)
  owner = experts // (E // expert)
  home = np.repeat(np.arange(expert), 512)
  crossings = [len(set(o.tolist()) - {h}) for o, h in zip(owner, home)]
  assert stats.sent_rows.tolist() == np.array(crossings).reshape(expert, -1).sum(axis=1).tolist()
  assert abs(stats.sent_rows.sum() / T - per_token) < 0.05
  assert not stats.dropped_rows.any()


@pytest.mark.parametrize("capacity", [0.6, 1.1])
def test_what_finds_no_room_is_counted_once_and_the_rest_is_right(capacity):
  """Each token's result is the sum of some of its experts' shares, and as many lack as are said."""
  x, experts, gates, weights, dy = inputs = _inputs("one_device", 32)
  exchange = ExchangeConfig(devices_per_group=2, receive_capacity=capacity)
  config = _config(dispatch="hierarchical", exchange=exchange)
  (y, (_, dgates, _)), stats = program(config, 1, 4)(*inputs)
  # A gate whose row was dropped has no gradient.
  _, (_, expected_dgates, _) = _by_loops(*inputs)
  assert (np.abs(expected_dgates) > 1e-6).all()
  came = np.abs(np.asarray(dgates)) > 0
  assert_close(dgates, np.where(came, expected_dgates, 0))
  assert stats.dropped_rows.sum() == (~came).sum() > 0
  expected_y, _ = _by_loops(x, experts, np.where(came, gates, 0), weights, dy)
  assert_close(y, expected_y)
