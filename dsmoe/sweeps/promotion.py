"""Which runs a sweep should spend next: further seeds of the settings that noise holds together."""

import collections
from collections.abc import Sequence
from typing import Any

from dsmoe.sweeps import verdict
from dsmoe.sweeps.results import LEFT, Trial

_PLANNED = ("complete", *LEFT)


def promote(
  trials: Sequence[Trial], budget: int, level: float = verdict.LEVEL
) -> list[tuple[dict[str, Any], int]]:
  """Chooses further runs of the settings that are tied with the best.

  The setting with the fewest seeds comes first, and of those the one with the lowest mean loss. It is given
  the seed that most of the other tied settings have or will have, so that they can be compared on
  the same seeds; if it has all of those, the first seed that no trial has. A seed that a setting was run
  with is never given to it again, even if that trial failed.

  Trials that are not finished count as if they were complete, so that asking again before they have ended
  gives further runs, never the same ones. Called with small budgets as results come in, it leaves
  settings out as soon as they are no longer tied. The runs must not be pruned: means of those that
  survive would flatter.

  Args:
    trials: of a sweep, in any state.
    budget: the number of runs, at least 1.
    level: see `verdict.rank`.

  Returns:
    At most `budget` pairs of `params` and a seed, in the order to run them; none if one setting is
    better than all others beyond the noise, or none or one has a loss.

  Raises:
    ValueError: for a budget below 1 or a wrong level.
  """
  if budget < 1:
    raise ValueError(f"the budget of further runs must be at least 1, got {budget}")
  tied = [ranked.setting.params for ranked in verdict.rank(trials, level).tied]
  if len(tied) < 2:
    return []
  used: dict[str, set[int]] = collections.defaultdict(set)
  planned: dict[str, set[int]] = collections.defaultdict(set)
  for trial in trials:
    at = verdict.key({f: value for f, value in trial.params.items() if f != "seed"})
    used[at].add(trial.seed)
    if trial.state in _PLANNED:
      planned[at].add(trial.seed)
  keys = [verdict.key(params) for params in tied]
  unused = max(trial.seed for trial in trials) + 1
  chosen = []
  for _ in range(budget):
    best = min(range(len(keys)), key=lambda place: (len(planned[keys[place]]), place))
    at = keys[best]
    shared = collections.Counter(seed for other in keys for seed in planned[other] - used[at])
    seed = min(shared, key=lambda seed: (-shared[seed], seed)) if shared else unused
    unused = max(unused, seed + 1)
    used[at].add(seed)
    planned[at].add(seed)
    chosen.append((tied[best], seed))
  return chosen
