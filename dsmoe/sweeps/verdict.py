"""Ranks the settings of a sweep, and says which are tied with the best because of noise.

A setting is one assignment of the searched fields; its runs differ in the seed. Only complete trials
with a finite loss count towards means; the others are counted beside them.

Ties: a setting is tied with the best unless it is worse than some other setting by more than its
interval. The truly best of S settings is worse than none, so it loses its place only if one of its
S - 1 comparisons errs; each interval therefore leaves 5% / (S - 1) outside (Bonferroni), half at each
end. With the stated share or more of sweeps, the truly best setting is among the tied ones. This is
subset selection, which is never to be read as "all of these are equal".

Source: S. S. Gupta, "On some multiple decision (selection and ranking) rules", Technometrics 7, 1965.
"""

import collections
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dsmoe.sweeps import noise as noise_lib
from dsmoe.sweeps.results import Trial

LEVEL = 0.95
_AT_ONCE = 2**20  # differences of two runs in memory


class Setting(NamedTuple):
  """All trials of one assignment of the searched fields."""

  params: dict[str, Any]
  losses: dict[int, float]  # by seed; a seed that was run twice counts once, with the mean
  num_by_state: dict[str, int]  # of trials; "not finite": complete without a finite loss
  seconds: float  # of all trials
  flops: float


class Difference(NamedTuple):
  """The mean loss of one setting minus that of another, in nats; below 0 the first is better."""

  estimate: float
  margin: float  # the interval is estimate - margin to estimate + margin; infinite: not known
  level: float  # the share of intervals that contain the true difference
  num_seeds: tuple[int, int]  # of the first and of the second
  num_paired: int  # the seeds of both that it was taken on; 0: each mean on its own seeds
  is_pooled: bool  # whether the noise was estimated from further settings too

  @property
  def is_distinguishable(self) -> bool:
    """Whether the interval excludes 0."""
    return abs(self.estimate) > self.margin


class Ranked(NamedTuple):
  """A setting in its place."""

  setting: Setting
  mean: float  # over its seeds
  interval: tuple[float, float] | None  # of the mean, for this setting alone; None with one seed
  is_tied: bool  # with the best; true of the first
  behind: Difference  # minus the first; all these intervals hold together at the ranking's level


class Ranking(NamedTuple):
  """The settings of a sweep that have a loss, the best first, and what has none."""

  ranked: list[Ranked]
  unranked: list[Setting]  # without any complete trial
  noise: (
    noise_lib.Noise | None
  )  # None without ranked settings; its arrays are in the order of ranked
  level: float

  @property
  def tied(self) -> list[Ranked]:
    """The settings that may be the best."""
    return [ranked for ranked in self.ranked if ranked.is_tied]


def fields_of(ranking: Ranking, fields: Sequence[str]) -> list[str]:
  """Returns those of the fields that a ranked setting has: a conditional one may be in none."""
  return [f for f in fields if any(f in ranked.setting.params for ranked in ranking.ranked)]


def key(params: Mapping[str, Any]) -> str:
  """Returns a text that is equal for equal assignments."""
  return json.dumps(params, sort_keys=True, default=str)


def settings(trials: Sequence[Trial]) -> list[Setting]:
  """Gathers trials of equal `params`, in the order in which they first appear.

  Trials of a search that have not begun have no params yet, and are left out. A field `seed` in the
  params, of a sweep that lists its seeds itself, is the seed and no part of the setting.
  """
  groups: dict[str, list[Trial]] = {}
  for trial in trials:
    if trial.state == "waiting" and not trial.params:
      continue
    groups.setdefault(key(_without_seed(trial.params)), []).append(trial)
  return [_setting(group) for group in groups.values()]


def _without_seed(params: Mapping[str, Any]) -> dict[str, Any]:
  return {field: value for field, value in params.items() if field != "seed"}


def _setting(trials: list[Trial]) -> Setting:
  losses: dict[int, list[float]] = {}
  num_by_state: collections.Counter[str] = collections.Counter()
  for trial in trials:
    if trial.state != "complete":
      num_by_state[trial.state] += 1
    elif trial.value is None or not math.isfinite(trial.value):
      num_by_state["not finite"] += 1
    else:
      num_by_state["complete"] += 1
      losses.setdefault(trial.seed, []).append(trial.value)
  return Setting(
    _without_seed(trials[0].params),
    {seed: float(np.mean(values)) for seed, values in sorted(losses.items())},
    dict(num_by_state),
    sum(trial.seconds for trial in trials),
    sum(trial.flops for trial in trials),
  )


def losses_of(found: Sequence[Setting]) -> np.ndarray:
  """Returns float64 [S, K], the loss of each setting and seed; NaN where there is none."""
  seeds = sorted({seed for setting in found for seed in setting.losses})
  return np.array([[s.losses.get(seed, np.nan) for seed in seeds] for s in found], np.float64)


def rank(trials: Sequence[Trial], level: float = LEVEL) -> Ranking:
  """Orders settings by their mean loss and says which of them may be the best.

  The order is that of means from which each seed's offset was taken (see `noise`), so that a setting
  is not ranked lower for having been run with a hard seed that others were not run with.

  Args:
    trials: of a sweep, in any state.
    level: of the intervals, and the least share of sweeps whose best setting is among the tied.

  Raises:
    ValueError: for a level that is not between 0 and 1.
  """
  check_level(level)
  found = settings(trials)
  unranked = [setting for setting in found if not setting.losses]
  found = [setting for setting in found if setting.losses]
  if not found:
    return Ranking([], unranked, None, level)
  value_SK = losses_of(found)
  noise = noise_lib.estimate(value_SK)
  order = np.argsort(np.nanmean(value_SK - noise.offset_K, axis=1), kind="stable")
  found, value_SK = [found[s] for s in order], value_SK[order]
  noise = noise._replace(is_pooled_S=noise.is_pooled_S[order], own_S=noise.own_S[order])
  tail = (1 - level) / 2 / max(len(found) - 1, 1)
  ranked: list[Ranked] = []
  for rows in np.array_split(
    np.arange(len(found)), math.ceil(len(found) * value_SK.size / _AT_ONCE)
  ):
    to_all = noise_lib.differences(value_SK, noise, tail, rows)
    is_worse_R = np.any(to_all.estimate_RS > to_all.margin_RS, axis=1)
    for r, s in enumerate(rows.tolist()):
      value_K = value_SK[s][~np.isnan(value_SK[s])]
      interval = noise_lib.interval(value_K, noise, s, (1 - level) / 2)
      is_tied, behind = (
        bool(s == 0 or not is_worse_R[r]),
        _difference(to_all, value_SK, s, r, 0, level),
      )
      ranked.append(Ranked(found[s], float(value_K.mean()), interval, is_tied, behind))
  return Ranking(ranked, unranked, noise, level)


def _difference(to_all: noise_lib.Differences, value_SK, s: int, r: int, other: int, level):
  """Returns row r of `to_all`, which is setting s, minus the setting `other`."""
  num_S = (~np.isnan(value_SK)).sum(axis=1)
  return Difference(
    float(to_all.estimate_RS[r, other]),
    float(to_all.margin_RS[r, other]),
    level,
    (int(num_S[s]), int(num_S[other])),
    int(to_all.num_paired_RS[r, other]),
    not bool(to_all.is_own_RS[r, other]),
  )


def compare(
  trials: Sequence[Trial], params: Mapping[str, Any], other: Mapping[str, Any], level: float = LEVEL
) -> Difference:
  """Compares two settings that were chosen before their results were seen.

  The noise is pooled over all settings. Settings that were chosen for their results, such as the
  best, are compared by `rank`, whose intervals allow for the choice.

  Args:
    trials: of a sweep.
    params, other: the two settings.
    level: the share of intervals that contain the true difference.

  Raises:
    ValueError: for a setting without a complete trial, naming it, or a wrong level.
  """
  check_level(level)
  found = [setting for setting in settings(trials) if setting.losses]
  rows = {key(setting.params): row for row, setting in enumerate(found)}
  for wanted in (params, other):
    if key(wanted) not in rows:
      raise ValueError(f"a setting must have a complete trial to be compared, {wanted} has none")
  value_SK = losses_of(found)
  s = rows[key(params)]
  to_all = noise_lib.differences(value_SK, noise_lib.estimate(value_SK), (1 - level) / 2, [s])
  return _difference(to_all, value_SK, s, 0, rows[key(other)], level)


def check_level(level: float) -> None:
  """Raises ValueError for a level that is not between 0 and 1."""
  if not 0 < level < 1:
    raise ValueError(f"level must be between 0 and 1, got {level}")
