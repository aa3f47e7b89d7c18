"""Main effects by matched settings, beside loops and by hand; and the sentences about them."""

import itertools

import numpy as np
import pytest

from dsmoe.sweeps import effects, sentences, verdict
from tests.sweeps import drawn

LRS, SPEEDS = (0.001, 0.003, 0.01), (0.0, 0.1, 0.2, 0.3)


def grid(rng, num_seeds: int = 2, without=()):
  """Returns trials of the grid, and their losses by (lr, speed, seed)."""
  loss = {}
  for lr, speed, seed in itertools.product(LRS, SPEEDS, range(num_seeds)):
    if (lr, speed) not in without:
      loss[lr, speed, seed] = 2 + lr + speed / 10 + rng.normal(0, 0.001)
  trials = [
    drawn.trial(n, {"lr": lr, "speed": speed}, seed, value, seconds=10.0 + n, flops=1e9)
    for n, ((lr, speed, seed), value) in enumerate(loss.items())
  ]
  return trials, loss


def test_effects_match_loops():
  rng = np.random.default_rng(0)
  trials, loss = grid(rng, without=[(0.003, 0.2)])
  values, found = effects.effects(trials, "lr")
  assert values == list(LRS) and [(e.value, e.other) for e in found] == list(
    itertools.combinations(LRS, 2)
  )
  t = {3: 4.857, 2: 7.649}  # Student's, with 0.05 / 6 above it, by df
  for effect in found:
    gaps = []
    for speed in SPEEDS:
      seeds = [k for k in range(2) if (effect.value, speed, k) in loss]
      seeds = [k for k in seeds if (effect.other, speed, k) in loss]
      if seeds:
        pairs = [loss[effect.value, speed, k] - loss[effect.other, speed, k] for k in seeds]
        gaps.append(sum(pairs) / len(pairs))
    n = len(gaps)
    mean = sum(gaps) / n
    sd = (sum((gap - mean) ** 2 for gap in gaps) / (n - 1)) ** 0.5
    assert effect.num_matched == n and effect.num_runs == 4 * n
    assert effect.estimate == pytest.approx(mean)
    assert effect.margin == pytest.approx(t[n - 1] * sd / n**0.5, rel=2e-3)
    assert (effect.smallest, effect.largest) == pytest.approx((min(gaps), max(gaps)))
    assert effect.num_worse == sum(gap > 0 for gap in gaps)
    used = [x for x in trials if x.params["lr"] in (effect.value, effect.other)]
    used = [x for x in used if n == 4 or x.params["speed"] != 0.2]
    assert effect.seconds == sum(x.seconds for x in used) and effect.flops == 1e9 * len(used)


def test_effects_against_the_lowest_value():
  trials, _ = grid(np.random.default_rng(5))
  _, found = effects.effects(trials, "speed")
  kept = effects.against_the_lowest(found)
  assert [(effect.value, effect.other) for effect in kept] == [(0.1, 0.0), (0.2, 0.0), (0.3, 0.0)]
  turned = found[0]
  assert (turned.value, turned.other) == (0.0, 0.1)
  assert (kept[0].estimate, kept[0].smallest, kept[0].largest, kept[0].num_worse) == (
    -turned.estimate,
    -turned.largest,
    -turned.smallest,
    3,
  )
  assert "worse in 3 of 3 pairs, by 0.0" in sentences.of_effect(kept[0])
  assert effects.against_the_lowest([]) == []


def test_one_pair_has_the_noise_of_the_sweep():
  rng = np.random.default_rng(1)
  trials, _ = grid(rng, 3)
  trials = [trial for trial in trials if trial.params["speed"] == 0.1]
  (_, found) = effects.effects(trials, "lr", level=0.85)
  alone = verdict.compare(trials, trials[0].params, trials[3].params, level=0.95)
  assert (found[0].estimate, found[0].margin) == pytest.approx((alone.estimate, alone.margin))
  assert "in that pair only" in sentences.of_effect(found[0])


def test_what_cannot_be_matched_has_no_effect():
  rng = np.random.default_rng(2)
  params = [{"lr": float(lr), "speed": float(speed)} for lr, speed in rng.random((5, 2))]
  values, found = effects.effects(drawn.trials(rng.random((5, 2)), params), "lr")
  assert len(values) == 5 and values == sorted(values) and found == []
  with pytest.raises(ValueError, match="no trial has 'depth'"):
    effects.effects(drawn.trials(rng.random((5, 2)), params), "depth")


def test_pairs_without_a_loss_are_counted():
  trials, _ = grid(np.random.default_rng(3))
  lost = {"lr": 0.01, "speed": 0.3}
  trials = [t._replace(state="failed", value=None) if t.params == lost else t for t in trials]
  (_, found) = effects.effects(trials, "lr")
  assert [(effect.num_matched, effect.num_lost) for effect in found] == [(4, 0), (3, 1), (3, 1)]
  assert "1 pair left out, without a complete trial on both sides" in sentences.of_effect(found[1])


def test_the_interval_of_an_effect_holds_as_often_as_stated():
  rng = np.random.default_rng(4)
  num_held = 0
  for _ in range(300):
    # The effect of one field depends on the other: 4 draws of it, of which 0.01 is the mean.
    effect_S = rng.normal(0.01, 0.01, 4)
    params = [{"a": a, "b": b} for b in range(4) for a in range(2)]
    mean = np.array([2 + p["a"] * effect_S[p["b"]] + p["b"] for p in params])
    value = drawn.losses(rng, mean, 2, 0.01, 0.003)
    effect = effects.effects(drawn.trials(value, params), "a")[1][0]
    num_held += abs(effect.estimate + 0.01) <= effect.margin
  assert 0.925 * 300 <= num_held <= 0.98 * 300
