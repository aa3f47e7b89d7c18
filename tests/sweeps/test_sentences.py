"""What a sweep's verdict says, word for word."""

import numpy as np

from dsmoe.sweeps import sentences, verdict
from tests.sweeps import drawn


def difference(estimate, margin, seeds=(3, 3), num_paired=0):
  return verdict.Difference(estimate, margin, 0.95, seeds, num_paired, True)


def test_differences():
  say = sentences.of_difference
  assert say(difference(-0.0012, 0.0021)) == (
    "0.0012 nats better (95% interval -0.0009 to 0.0033, 3 seeds each): not distinguishable"
  )
  assert say(difference(0.5, 0.1, (1, 3), 1)) == (
    "0.5000 nats worse (95% interval 0.4000 to 0.6000, 1 and 3 seeds, compared on the 1 seed of "
    "both): beyond the noise"
  )
  assert say(difference(0.5, np.inf, (1, 1))) == (
    "0.5000 nats worse (no interval: the noise is not known): not distinguishable"
  )


def test_a_sweep_with_ties():
  value = np.array([[2.00, 2.02, 2.01], [2.01, 2.01, 2.02], [3.01, 3.02, 3.00]])
  params = [{"optim.learning_rate": lr} for lr in (1e-3, 3e-3, 1.0)]
  trials = drawn.trials(value, params)
  trials.append(drawn.trial(9, params[0], 3, None))
  trials.append(drawn.trial(10, {"optim.learning_rate": 5.0}, 0, None, state="pruned"))
  said = sentences.of_ranking(verdict.rank(trials))
  assert said[0].startswith(
    "optim.learning_rate=0.001 is at the top with a mean loss of 2.0100 (3 seeds, 95% interval 1."
  )
  assert said[1] == (
    "2 of 3 settings are tied: any of them may be the best, and the noise does not say which. Beside "
    "the first these are optim.learning_rate=0.003."
  )
  assert "is 0.0082 nats, pooled over 2 settings" in said[2]  # the third is far worse
  assert said[3] == "Not counted in any mean: 1 trial pruned, 1 trial failed."
  assert said[4].startswith("1 tied setting lost runs to pruning or failure")
  assert said[5].startswith("1 setting without a complete trial cannot be ranked")


def test_a_clear_winner_and_unknown_noise():
  value = np.array([[2.00, 2.02, 2.01], [3.01, 3.02, 3.00]])
  first, second, *_ = sentences.of_ranking(verdict.rank(drawn.trials(value)))
  assert first.startswith("x=0 is lowest with") and "better than the other setting" in second
  assert "x=1, 1.0000 nats worse (95% interval 0." in second
  said = sentences.of_ranking(verdict.rank(drawn.trials(value[:, :1])))
  assert said[0].endswith("(1 seed, no interval).") and said[1].startswith(
    "2 of 2 settings are tied"
  )
  assert said[2].startswith("No setting was run with two seeds")
  assert sentences.of_ranking(verdict.rank([])) == [
    "No trial is complete with a finite loss, so nothing can be ranked."
  ]


def test_small_figures_keep_two_digits():
  assert [sentences.nats(x) for x in (0.0, 1.23456, 0.00012345, -0.0005)] == [
    "0.0000",
    "1.2346",
    "0.00012",
    "-0.0005",
  ]
  assert sentences.compute(5400, 1.5e15) == "1.5 hours and 1.50e+15 FLOPs"
