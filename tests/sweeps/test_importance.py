"""The importance of fields: beside loops, for known models, and against chance."""

import numpy as np
import pytest

from dsmoe.sweeps import importance
from tests.sweeps import drawn


def share(values, groups) -> float:
  """The same by loops."""
  ranks = [1 + sum(o < v for o in values) + (sum(o == v for o in values) - 1) / 2 for v in values]
  mean, total, within = sum(ranks) / len(ranks), 0.0, 0.0
  for rank, group in zip(ranks, groups):
    mine = [r for r, g in zip(ranks, groups) if g == group]
    total += (rank - mean) ** 2
    within += (rank - sum(mine) / len(mine)) ** 2
  S, G = len(ranks), len(set(groups))
  return 1 - (within / (S - G)) / (total / (S - 1))


def test_shares_and_their_intervals_match_loops():
  rng = np.random.default_rng(0)
  value_S, group_S = rng.integers(0, 9, 14).astype(float), rng.integers(0, 3, 14)
  assert importance.epsilon_squared(value_S, group_S) == pytest.approx(
    share(value_S.tolist(), group_S.tolist())
  )
  params = [{"f": int(g), "n": n} for n, g in enumerate(group_S)]
  (found,) = importance.importances(drawn.trials(value_S[:, None], params), ["f", "none", "n"][:2])
  lefts = [
    share([*value_S[:n], *value_S[n + 1 :]], [*group_S[:n], *group_S[n + 1 :]]) for n in range(14)
  ]
  mean = sum(lefts) / 14
  error = (13 / 14 * sum((left - mean) ** 2 for left in lefts)) ** 0.5
  assert found.share == pytest.approx(share(value_S.tolist(), group_S.tolist()))
  assert found.low == pytest.approx(found.share - 1.96 * error)
  assert found.high == pytest.approx(min(found.share + 1.96 * error, 1.0))


def test_a_grid_of_a_strong_a_weak_and_an_idle_field():
  rng = np.random.default_rng(1)
  params = [{"a": a, "b": b, "c": c} for a in range(4) for b in range(3) for c in range(3)]
  loss = np.array([2 + p["a"] + 0.4 * p["b"] + rng.normal(0, 0.05) for p in params])
  calm = importance.importances(drawn.trials(loss[:, None], params), ["c", "b", "a"])
  loss[loss.argmax()] = 1e6  # that it nearly diverged does not matter
  found = importance.importances(drawn.trials(loss[:, None], params), ["c", "b", "a"])
  assert [one.field for one in found] == ["a", "b", "c"] and found == calm
  assert found[0].share > 0.7 and found[0].is_beyond_chance and not found[2].is_beyond_chance
  assert abs(found[2].share) < 0.1 and all(one.low <= one.share <= one.high for one in found)


def test_an_idle_field_is_seldom_beyond_chance():
  rng = np.random.default_rng(2)
  num_beyond, shares = 0, []
  for _ in range(40):
    params = [{"f": float(x)} for x in rng.random(20)]
    (found,) = importance.importances(drawn.trials(rng.normal(2, 1, (20, 1)), params), ["f"])
    num_beyond += found.is_beyond_chance
    shares.append(found.share)
  assert num_beyond <= 6  # 2 are expected; 7 or more have a probability below 1%
  assert abs(np.mean(shares)) < 0.06


def test_groups():
  assert importance.groups([3, 1, 1, 2]).tolist() == [2, 0, 0, 1]
  many = importance.groups([*np.arange(12.0), None])
  assert many.tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3 + [4]
  assert len(set(importance.groups([(1, 2), (1, 2), (2, 1)]).tolist())) == 2


def test_nothing_to_measure():
  rng = np.random.default_rng(3)
  few = drawn.trials(rng.random((3, 1)), [{"f": n % 2} for n in range(3)])
  assert importance.importances(few, ["f"]) == []
  same = drawn.trials(np.full((6, 1), 2.0), [{"f": n % 2} for n in range(6)])
  assert importance.importances(same, ["f"]) == []
  one = drawn.trials(rng.random((6, 1)), [{"f": 1, "g": n} for n in range(6)])
  assert importance.importances(one, ["f", "g"]) == []  # one value; another in each setting
