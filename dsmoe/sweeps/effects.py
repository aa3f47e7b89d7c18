"""The effect of one field of a sweep, by settings that differ in that field only.

Two settings are a matched pair if they differ in one field and agree in all others. The effect of
one value against another is the mean over matched pairs of the difference of their losses, each taken
on the seeds of both where they share some. Its interval is Student's t over the pairs, which covers both the
noise and that the effect may depend on the other fields; with one pair it is that of the noise alone.
"""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from dsmoe.sweeps import noise as noise_lib
from dsmoe.sweeps import verdict
from dsmoe.sweeps.results import Trial


class Effect(NamedTuple):
  """The mean loss with one value of a field minus that with another, in nats."""

  field: str
  value: Any
  other: Any
  estimate: float
  margin: float  # half the interval's width; infinite where the noise is not known
  smallest: float  # of the matched pairs' differences
  largest: float
  level: float  # of the intervals of all pairs of values of the field together
  num_matched: int  # matched pairs of settings
  num_worse: int  # of them, those in which `value` has the higher loss
  num_lost: int  # further pairs, of which one setting or both have no complete trial
  num_runs: int  # complete runs in them
  seconds: float  # of all trials of those settings, pruned and failed ones included
  flops: float


def effects(
  trials: Sequence[Trial], field: str, level: float = verdict.LEVEL
) -> tuple[list[Any], list[Effect]]:
  """Measures the effect of each pair of values of a field that has matched settings.

  Args:
    trials: of a sweep.
    field: one of their `params`. Settings that do not have it, as with conditional parameters,
      take no part.
    level: the share of sweeps in which all intervals of the field contain the true effects, if the
      matched pairs are a sample of what is meant (Bonferroni over the pairs of values).

  Returns:
    The field's values, in order, and the effects of each pair of them that can be matched; none
    where all settings differ in more than one field, as those of a random search do.

  Raises:
    ValueError: for a field that no trial has, or a wrong level.
  """
  verdict.check_level(level)
  if not any(field in trial.params for trial in trials):
    raise ValueError(f"a field must be one of the sweep's, no trial has {field!r}")
  found = sorted(verdict.settings(trials), key=lambda setting: not setting.losses)
  num_with_loss = sum(bool(setting.losses) for setting in found)
  values, matched = _matched(found, field)
  has_loss = {pair: [r for r in rows if max(r) < num_with_loss] for pair, rows in matched.items()}
  has_loss = {pair: rows for pair, rows in has_loss.items() if rows}
  if not has_loss:
    return list(values.values()), []
  value_SK = verdict.losses_of(found[:num_with_loss])
  noise = noise_lib.estimate(value_SK)
  tail = (1 - level) / 2 / len(has_loss)
  made = []
  for (a, b), rows in has_loss.items():
    used = [found[row] for row in sorted({row for pair in rows for row in pair})]
    estimate, margin, apart = _estimate(value_SK, noise, rows, tail)
    made.append(
      Effect(
        field,
        values[a],
        values[b],
        estimate,
        margin,
        smallest=float(apart.min()),
        largest=float(apart.max()),
        level=level,
        num_matched=len(rows),
        num_worse=int((apart > 0).sum()),
        num_lost=len(matched[a, b]) - len(rows),
        num_runs=sum(setting.num_by_state["complete"] for setting in used),
        seconds=sum(setting.seconds for setting in used),
        flops=sum(setting.flops for setting in used),
      )
    )
  return list(values.values()), made


def _matched(found: Sequence[verdict.Setting], field: str):
  """Returns the field's values by key, in order, and for two keys the rows of matched settings."""
  groups: dict[str, dict[str, int]] = {}  # by the other fields: by the value of this one, the row
  values: dict[str, Any] = {}
  for row, setting in enumerate(found):
    if field in setting.params:
      others = {name: value for name, value in setting.params.items() if name != field}
      at = verdict.key({field: setting.params[field]})
      groups.setdefault(verdict.key(others), {})[at] = row
      values[at] = setting.params[field]
  values = dict(sorted(values.items(), key=lambda item: order(item[1])))
  matched: dict[tuple[str, str], list[tuple[int, int]]] = {}
  places = {at: place for place, at in enumerate(values)}
  for group in groups.values():
    for a, b in itertools.combinations(sorted(group, key=places.__getitem__), 2):
      matched.setdefault((a, b), []).append((group[a], group[b]))
  return values, matched


def order(value: Any) -> tuple:
  """Returns what sorts a field's values: numbers by size, then all else by its text."""
  if isinstance(value, int | float) and not isinstance(value, bool):
    return (0, value, "")
  return (1, 0, str(value))


def _estimate(value_SK, noise, rows: list[tuple[int, int]], tail: float):
  """Returns the mean difference of pairs of rows, its margin, and the difference of each pair."""
  if len(rows) == 1:
    (a, b) = rows[0]
    to_all = noise_lib.differences(value_SK, noise, tail, [a])
    estimate = float(to_all.estimate_RS[0, b])
    return estimate, float(to_all.margin_RS[0, b]), np.array([estimate])
  apart = np.array([_apart(value_SK[a], value_SK[b]) for a, b in rows])
  deviation = apart.std(ddof=1) / np.sqrt(len(apart))
  margin = float(noise_lib.quantile(len(apart) - 1, tail)) * float(deviation)
  return float(apart.mean()), margin, apart


def _apart(a_K: np.ndarray, b_K: np.ndarray) -> float:
  """Returns the mean difference on the seeds of both, or that of the means where there are none."""
  apart_K = a_K - b_K
  if np.isnan(apart_K).all():
    return float(np.nanmean(a_K) - np.nanmean(b_K))
  return float(np.nanmean(apart_K))


def against_the_lowest(found: Sequence[Effect]) -> list[Effect]:
  """Returns the effects of a field's other values against the one with the lowest losses.

  That one is chosen by the same losses; the intervals, which hold for all pairs together, allow for it.
  """
  values = [value for effect in found for value in (effect.value, effect.other)]
  if not values:
    return []

  def mean(value: Any) -> float:
    signs = [1 if e.value == value else -1 for e in found if value in (e.value, e.other)]
    estimates = [e.estimate for e in found if value in (e.value, e.other)]
    return float(np.mean(np.multiply(signs, estimates)))

  lowest = min(values, key=mean)
  kept = [effect for effect in found if lowest in (effect.value, effect.other)]
  return [effect if effect.other == lowest else _turned(effect) for effect in kept]


def _turned(effect: Effect) -> Effect:
  return effect._replace(
    value=effect.other,
    other=effect.value,
    estimate=-effect.estimate,
    smallest=-effect.largest,
    largest=-effect.smallest,
    num_worse=effect.num_matched - effect.num_worse,
  )
