"""Further seeds go to the tied settings, by hand and by simulation."""

import numpy as np
import pytest

from dsmoe.sweeps import promotion, verdict
from tests.sweeps import drawn


def xs(chosen) -> list[tuple[int, int]]:
  return [(params["x"], seed) for params, seed in chosen]


def test_fewest_seeds_first_and_the_seeds_of_the_others():
  value = np.full((4, 3), np.nan)
  value[:, 0] = [2.02, 2.01, 2.03, 9.0]
  value[[0, 1, 3], 1] = [2.01, 2.02, 9.0]
  value[0, 2] = 2.02
  # Setting 2 has one seed, setting 1 two, setting 0 three; setting 3 is far worse.
  chosen = promotion.promote(drawn.trials(value), 6)
  order = [one.setting.params["x"] for one in verdict.rank(drawn.trials(value)).tied]
  assert set(order) == {0, 1, 2}
  assert xs(chosen) == [(2, 1), (1, 2), (2, 2), *((x, 3) for x in order)]
  assert promotion.promote(drawn.trials(value), 6) == chosen


def test_the_lowest_comes_first_where_nothing_was_repeated():
  trials = drawn.trials(np.array([[2.3], [2.1], [2.2]]))
  assert xs(promotion.promote(trials, 4)) == [(1, 1), (2, 1), (0, 1), (1, 2)]


def test_runs_that_wait_run_or_failed_are_not_asked_for_again():
  trials = drawn.trials(np.array([[2.3], [2.1], [2.2]]))
  trials += [
    drawn.trial(3, {"x": 1}, 1, None, state="running"),
    drawn.trial(4, {"x": 2}, 1, None, state="waiting"),
    drawn.trial(5, {"x": 0}, 1, None, state="failed"),
  ]
  # Setting 0 still has one seed that counts, and may not have seed 1 again.
  assert xs(promotion.promote(trials, 3)) == [(0, 2), (1, 2), (2, 2)]


def test_nothing_is_spent_on_what_is_decided():
  value = np.array([[2.0, 2.001, 1.999], [3.0, 3.001, 2.999]])
  assert promotion.promote(drawn.trials(value), 5) == []
  assert promotion.promote(drawn.trials(value[:1]), 5) == []
  assert promotion.promote([], 5) == []
  with pytest.raises(ValueError, match="at least 1, got 0"):
    promotion.promote(drawn.trials(value), 0)


def test_promoted_sweeps_find_the_best_more_often_than_equal_spending():
  """8 settings with 2 seeds each and 48 further runs: 6 for each setting, or by promotion."""
  rng = np.random.default_rng(0)
  mean_S = np.array([2.0, 2.002, 2.003, 2.03, 2.03, 2.04, 2.04, 2.05])
  found_promoted = found_equal = kept = num_sweeps = 0
  for _ in range(100):
    value = drawn.losses(rng, mean_S, 40, 0.02, 0.005)
    equal, promoted = drawn.trials(value[:, :8]), drawn.trials(value[:, :2])
    while len(promoted) < len(equal):
      chosen = promotion.promote(promoted, min(12, len(equal) - len(promoted)))
      if not chosen:
        break
      for params, seed in chosen:
        promoted.append(drawn.trial(len(promoted), params, seed, value[params["x"], seed]))
    num_sweeps += 1
    ranked = verdict.rank(promoted)
    found_promoted += ranked.ranked[0].setting.params["x"] == 0
    found_equal += verdict.rank(equal).ranked[0].setting.params["x"] == 0
    # What is tied still contains the best, although the runs were chosen by their results.
    kept += any(one.setting.params["x"] == 0 for one in ranked.tied)
  assert found_promoted > found_equal + 5, (found_promoted, found_equal)
  assert kept >= 0.95 * num_sweeps
