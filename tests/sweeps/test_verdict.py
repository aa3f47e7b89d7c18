"""Ranking, intervals and ties: textbook figures, loops, permutations, and coverage by simulation."""

import itertools

import numpy as np
import pytest

from dsmoe.sweeps import noise, verdict
from tests.sweeps import drawn

# A. R. Cushny and A. R. Peebles, 1905, the data of Student's paper of 1908: hours of sleep gained by
# ten patients with each of two drugs. Its intervals are those that every textbook prints.
SLEEP = np.array(
  [
    [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0],
    [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4],
  ]
)
A, B = {"x": 0}, {"x": 1}


def interval(difference) -> tuple[float, float]:
  return difference.estimate - difference.margin, difference.estimate + difference.margin


def apart(value_SK: np.ndarray) -> np.ndarray:
  """Gives each run a seed of its own."""
  S, K = value_SK.shape
  wide = np.full((S, S, K), np.nan)
  wide[np.arange(S), np.arange(S)] = value_SK
  return wide.reshape(S, S * K)


def test_students_sleep_data():
  paired = verdict.compare(drawn.trials(SLEEP), A, B)
  assert interval(paired) == pytest.approx((-2.4598858, -0.7001142), abs=1e-6)
  assert (paired.num_paired, paired.num_seeds, paired.is_pooled) == (10, (10, 10), False)
  welch = verdict.compare(drawn.trials(apart(SLEEP)), A, B)
  assert interval(welch) == pytest.approx((-3.3654832, 0.2054832), abs=1e-6)
  assert welch.num_paired == 0 and paired.is_distinguishable and not welch.is_distinguishable


def test_students_t_table():
  for df, tail, value in (
    (1, 0.025, 12.706),
    (4, 0.025, 2.776),
    (7, 0.05, 1.895),
    (10, 0.005, 3.169),
  ):
    assert noise.quantile(df, tail) == pytest.approx(value, abs=5e-4)
  assert noise.quantile(0, 0.05) == np.inf


def test_pooled_noise_of_whole_layouts_matches_loops():
  rng = np.random.default_rng(0)
  value = drawn.losses(rng, [2.0, 2.01, 2.03, 1.99], 5, 0.02, 0.01)
  S, K = value.shape
  within = rest = 0.0
  for s, k in itertools.product(range(S), range(K)):
    row, column = sum(value[s]) / K, sum(value[:, k]) / S
    within += (value[s, k] - row) ** 2
    rest += (value[s, k] - row - column + value.sum() / (S * K)) ** 2
  found = noise.estimate(value)
  assert found.paired_df == (S - 1) * (K - 1)
  assert found.single == pytest.approx((within / (S * (K - 1))) ** 0.5)
  # Satterthwaite of the textbooks' table: the mean squares of seeds and of the rest, added up.
  seeds, rest_ms = (within - rest) / (K - 1), rest / found.paired_df
  total = seeds + (S - 1) * rest_ms
  df = total**2 / (seeds**2 / (K - 1) + ((S - 1) * rest_ms) ** 2 / found.paired_df)
  assert found.single_df == pytest.approx(df) and K - 1 < df < S * (K - 1)
  assert found.paired == pytest.approx((rest / found.paired_df) ** 0.5)
  assert found.offset_K == pytest.approx(value.mean(axis=0) - value.mean())
  # Student's t of the textbooks: 2.681 leaves 0.01 above it at 12 degrees of freedom.
  to_all = noise.differences(value, found, 0.01, [1])
  for s in (0, 2, 3):
    assert to_all.estimate_RS[0, s] == pytest.approx(value[1].mean() - value[s].mean())
    assert to_all.margin_RS[0, s] == pytest.approx(2.681 * found.paired * (2 / K) ** 0.5, rel=2e-4)
  low, high = noise.interval(value[2], found._replace(single_df=16), 2, 0.025)
  assert (high - low) / 2 == pytest.approx(2.120 * found.single / K**0.5, rel=2e-4)


def test_pooled_noise_with_absent_runs_matches_least_squares_over_all_columns():
  rng = np.random.default_rng(1)
  for _ in range(20):
    value = drawn.losses(rng, rng.normal(2, 0.005, 5), 6, 0.02, 0.01)
    value[rng.random(value.shape) < 0.4] = np.nan
    value = value[~np.isnan(value).all(axis=1)]
    found = noise.estimate(value)
    rows = [(s, k) for s, k in np.ndindex(*value.shape) if not np.isnan(value[s, k])]
    rows = [(s, k) for s, k in rows if found.is_pooled_S[s]]
    design = np.zeros((len(rows), sum(value.shape)))
    for n, (s, k) in enumerate(rows):
      design[n, s] = design[n, len(value) + k] = 1.0
    y = np.array([value[at] for at in rows])
    rest = y - design @ np.linalg.pinv(design) @ y
    df = len(rows) - np.linalg.matrix_rank(design)
    assert found.paired_df == df
    if df >= 2:
      assert found.paired == pytest.approx((rest @ rest / df) ** 0.5)
    else:
      assert found.paired is None


def test_noise_of_far_worse_settings_is_not_pooled():
  rng = np.random.default_rng(2)
  good, bad = drawn.losses(rng, [2.0] * 4, 3, 0, 0.01), drawn.losses(rng, [3.0] * 3, 3, 0, 0.5)
  found = noise.estimate(np.concatenate([bad, good]))
  assert found.is_pooled_S.tolist() == [False] * 3 + [True] * 4
  assert found.single == pytest.approx(noise.estimate(good).single)
  # Their own noise still counts where they are compared.
  margin_S = noise.differences(np.concatenate([bad, good]), found, 0.025, [3]).margin_RS[0]
  assert (margin_S[:3] > 2 * margin_S[4:].max()).all()


def test_verdicts_agree_with_permutation_tests():
  rng = np.random.default_rng(3)
  num_checked = 0
  signs = np.array(list(itertools.product((1, -1), repeat=8)))
  groups = np.array(list(itertools.combinations(range(10), 5)))
  for shift in rng.choice([0.0, 0.005, 0.01, 0.02], 60):
    value = drawn.losses(rng, [2.0, 2.0 + shift], 8, 0.05, 0.01)
    gap = value[0] - value[1]
    p_paired = np.mean(abs((signs * gap).mean(axis=1)) >= abs(gap.mean()) - 1e-12)
    own = value[:, :5] - drawn.losses(np.random.default_rng(0), [0, 0], 5, 0, 0)
    every = own.ravel()
    ones = every[groups].sum(axis=1)
    gaps = abs(ones / 5 - (every.sum() - ones) / 5)
    p_apart = np.mean(gaps >= abs(own[0].mean() - own[1].mean()) - 1e-12)
    for p, trials in ((p_paired, drawn.trials(value)), (p_apart, drawn.trials(apart(own)))):
      if abs(p - 0.05) > 0.03:  # elsewhere the two tests may differ
        num_checked += 1
        assert verdict.compare(trials, A, B).is_distinguishable == (p < 0.05), p
  assert num_checked > 80


def test_trials_that_did_not_end_well_take_no_part():
  params = [{"x": 0}, {"x": 1}, {"x": 2}]
  trials = [
    drawn.trial(0, params[0], 0, 2.0),
    drawn.trial(1, params[0], 1, 2.2),
    drawn.trial(2, params[0], 1, 2.4),  # the same seed again
    drawn.trial(3, params[1], 0, 2.5),
    drawn.trial(4, params[1], 1, None),
    drawn.trial(5, params[1], 2, 1.0, state="pruned"),
    drawn.trial(6, params[1], 3, float("nan"), state="complete"),
    drawn.trial(7, params[2], 0, 0.5, state="running"),
  ]
  ranking = verdict.rank(trials)
  first, second = ranking.ranked
  assert (first.mean, second.mean) == pytest.approx((2.15, 2.5))
  assert first.setting.losses == {0: 2.0, 1: pytest.approx(2.3)}
  assert second.setting.num_by_state == {"complete": 1, "failed": 1, "pruned": 1, "not finite": 1}
  assert second.interval is None and second.setting.seconds == 240
  assert [one.params for one in ranking.unranked] == [{"x": 2}]


def test_without_two_seeds_all_are_tied():
  ranking = verdict.rank(drawn.trials(np.array([[2.0], [1.0], [9.0]])))
  assert [one.mean for one in ranking.ranked] == [1.0, 2.0, 9.0]
  assert len(ranking.tied) == 3 and not ranking.ranked[2].behind.is_distinguishable
  assert ranking.noise.single is None and ranking.ranked[0].interval is None
  assert verdict.rank([]).ranked == []


def test_a_listed_seed_is_no_part_of_the_setting():
  trials = [drawn.trial(n, {"x": 1, "seed": n}, n, 2.0 + n) for n in range(3)]
  trials.append(drawn.trial(3, {}, 0, None, state="waiting"))  # of a search that has not begun
  (setting,) = verdict.settings(trials)
  assert setting.params == {"x": 1} and setting.losses == {0: 2.0, 1: 3.0, 2: 4.0}


def test_a_hard_seed_does_not_lower_those_that_ran_it():
  value = np.full((6, 3), np.nan)
  value[:, 0] = [2.00, 2.01, 2.02, 2.05, 2.06, 2.07]
  value[:3, 1:] = value[:3, :1] + [0.2, 0.3] + np.array([[1, 2], [2, 1], [-3, 1]]) * 1e-4
  ranking = verdict.rank(drawn.trials(value))
  assert [one.setting.params["x"] for one in ranking.ranked] == [0, 1, 2, 3, 4, 5]
  assert len(ranking.tied) == 1 and ranking.ranked[3].behind.num_paired == 1


def test_the_order_of_trials_does_not_matter():
  rng = np.random.default_rng(4)
  trials = drawn.trials(drawn.losses(rng, rng.normal(2, 0.01, 7), 3, 0.02, 0.01))
  expected = verdict.rank(trials)
  for _ in range(3):
    found = verdict.rank([trials[n] for n in rng.permutation(len(trials))])
    assert [one.setting.params for one in found.ranked] == [
      one.setting.params for one in expected.ranked
    ]
    assert [one.is_tied for one in found.ranked] == [one.is_tied for one in expected.ranked]


def test_bad_arguments():
  trials = drawn.trials(SLEEP)
  with pytest.raises(ValueError, match="between 0 and 1, got 95"):
    verdict.rank(trials, level=95)
  with pytest.raises(ValueError, match=r"must have a complete trial .* \{'x': 7\} has none"):
    verdict.compare(trials, A, {"x": 7})


# What the true means are, the seeds that each setting ran, the noise of seeds and of runs.
LAYOUTS = {
  "two settings, other seeds": ([2.0, 2.0], "apart", 0.0, 0.01),
  "two settings, the same seeds": ([2.0, 2.0], "same", 0.03, 0.01),
  "six equal ones": ([2.0] * 6, "same", 0.02, 0.01),
  "twelve, spread": (np.linspace(2.0, 2.06, 12), "same", 0.02, 0.01),
  "one seed of most": ([2.0] * 8, "ragged", 0.02, 0.01),
  "bad ones are noisier": ([2.0] * 4 + [3.5] * 4, "same", 0.01, [0.01] * 4 + [0.3] * 4),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_best_is_among_the_tied_as_often_as_stated(layout):
  """400 sweeps of 3 seeds; no setting is better than the first, which only noise can rule out."""
  mean_S, seeds, seed_sd, run_sd = LAYOUTS[layout]
  rng = np.random.default_rng(5)
  num_kept = num_tied = 0
  for _ in range(400):
    value = drawn.losses(rng, mean_S, 3, seed_sd, run_sd)
    if seeds == "ragged":
      value[3:, 1:] = np.nan
    if seeds == "apart":
      value = apart(value)
    tied = verdict.rank(drawn.trials(value)).tied
    num_kept += any(one.setting.params == {"x": 0} for one in tied)
    num_tied += len(tied)
  assert num_kept >= 0.95 * 400
  if mean_S[-1] > mean_S[0]:  # and what is worse is mostly found out
    assert num_tied < 0.7 * 400 * len(mean_S)


def test_intervals_contain_the_truth_as_often_as_stated():
  rng = np.random.default_rng(6)
  num_means = num_differences = 0
  for _ in range(600):
    true_S = rng.normal(2, 0.02, 3)
    value = drawn.losses(rng, true_S, 3, 0.02, 0.01)
    ranking = verdict.rank(drawn.trials(value))
    one = ranking.ranked[1]
    low, high = one.interval
    num_means += low <= true_S[one.setting.params["x"]] <= high
    low, high = interval(verdict.compare(drawn.trials(value), A, B))
    num_differences += low <= true_S[0] - true_S[1] <= high
  # Of an exact 95%, 600 draws have a standard deviation of 5.3.
  assert 554 <= num_means and 554 <= num_differences <= 586
