"""How much of what separates a sweep's settings goes with one field alone.

The importance of a field is epsilon squared: the share of the variance between settings that groups
by the field's value explain, adjusted for what as many random groups would explain, so that it is 0
on average for a field that does nothing. The variance is that of the ranks of the settings' mean
losses, for which a few losses that nearly diverged do not stand for everything. More than
MOST_GROUPS different numbers are parted into groups of about equally many settings. What fields do
only together is in none of the shares, and a search that looks mostly at good settings shows less of a
field than a grid would.

Source: T. L. Kelley, "An unbiased correlation ratio measure", PNAS 21, 1935; the first-order term of
fANOVA (Hutter, Hoos and Leyton-Brown, ICML 2014), without a model between the settings.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from dsmoe.sweeps import effects, verdict
from dsmoe.sweeps.results import Trial

MOST_GROUPS = 6
_BINS = 4
_SHUFFLES = 400
_LEAST_SETTINGS = 4


class Importance(NamedTuple):
  """The share of one field, from 0 to 1 except for the noise of the adjustment."""

  field: str
  share: float
  low: float  # 95% by leaving out one setting at a time (the jackknife)
  high: float
  chance: float  # what a field that does nothing reaches in 5% of sweeps, by shuffling
  num_settings: int

  @property
  def is_beyond_chance(self) -> bool:
    """Whether the share is larger than a field that does nothing would have."""
    return self.share > self.chance


def importances(trials: Sequence[Trial], fields: Sequence[str]) -> list[Importance]:
  """Measures each field that has two values or more, the most important first.

  Args:
    trials: of a sweep; settings without a complete trial take no part.
    fields: of `params`.

  Returns:
    One for each such field; none with fewer than 4 settings, or if all losses are equal.
  """
  found = [setting for setting in verdict.settings(trials) if setting.losses]
  mean_S = np.array([np.mean(list(setting.losses.values())) for setting in found])
  if len(found) < _LEAST_SETTINGS or not np.ptp(mean_S):
    return []
  made = []
  for field in fields:
    group_S = groups([setting.params.get(field) for setting in found])
    if 1 < len(np.unique(group_S)) < len(found):
      made.append(_importance(field, mean_S, group_S))
  return sorted(made, key=lambda one: -one.share)


def groups(values: Sequence[Any]) -> np.ndarray:
  """Returns integer [S], the group of each value; None, a field that was not set, is one too."""
  keys = [verdict.key({"": value}) for value in values]
  numbers = [value for value in values if _is_number(value)]
  others = sorted({key for key, value in zip(keys, values) if not _is_number(value)})
  if not numbers or len(set(numbers)) + len(others) <= MOST_GROUPS:
    ordered = sorted(set(keys), key=lambda key: effects.order(values[keys.index(key)]))
    return np.array([ordered.index(key) for key in keys])
  edges = np.quantile(numbers, np.arange(1, _BINS) / _BINS)
  return np.array(
    [
      np.searchsorted(edges, value, side="right")
      if _is_number(value)
      else _BINS + others.index(key)
      for key, value in zip(keys, values)
    ]
  )


def _is_number(value: Any) -> bool:
  return isinstance(value, int | float) and not isinstance(value, bool)


def _importance(field: str, mean_S: np.ndarray, group_S: np.ndarray) -> Importance:
  S = len(mean_S)
  share = epsilon_squared(mean_S, group_S)
  kept = [np.arange(S) != s for s in range(S)]
  left_out_S = np.array([epsilon_squared(mean_S[keep], group_S[keep]) for keep in kept])
  error = np.sqrt((S - 1) / S * ((left_out_S - left_out_S.mean()) ** 2).sum())
  rng = np.random.default_rng(0)
  shuffled = [epsilon_squared(mean_S, rng.permutation(group_S)) for _ in range(_SHUFFLES)]
  low, high = (float(min(share + z * error, 1.0)) for z in (-1.96, 1.96))
  return Importance(field, share, low, high, float(np.quantile(shuffled, 0.95)), S)


def epsilon_squared(value_S: np.ndarray, group_S: np.ndarray) -> float:
  """Returns the adjusted share of the variance of the ranks of values that groups explain.

  Args:
    value_S: float [S]; equal ones share the mean of their ranks.
    group_S: int [S], at least 0.

  Returns:
    At most 1; 0 if there is but one group, as many groups as values, or no variance.
  """
  _, place_S, count = np.unique(value_S, return_inverse=True, return_counts=True)
  rank_S = (np.cumsum(count) - (count - 1) / 2)[place_S]
  rank_S = rank_S - rank_S.mean()
  size_G = np.bincount(group_S)
  sum_G = np.bincount(group_S, rank_S)[size_G > 0]
  size_G = size_G[size_G > 0]
  S, G = len(rank_S), len(size_G)
  total = float((rank_S**2).sum())
  if G < 2 or G == S or not total:
    return 0.0
  within = total - float((sum_G**2 / size_G).sum())
  return 1.0 - within / (S - G) / (total / (S - 1))
