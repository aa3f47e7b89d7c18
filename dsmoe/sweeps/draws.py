"""Draws the points of a search by Optuna, each from what the storage knows when it begins."""

import copy
import datetime
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from dsmoe.sweeps.storage import optuna_package

NUM_PROBES = 16
_PROBE_SEED = 0


class SearchError(ValueError):
  """A search, which is the experiment's own code, has drawn no point."""


def name_of(search: Callable[[Any], Any]) -> str:
  """Returns what messages call a search: a function, or whatever else can be called."""
  return f"{getattr(search, '__name__', 'search')}(trial)"


def probe(search: Callable[[Any], Any]) -> Iterator[tuple[Any, dict[str, Any]]]:
  """Returns points that a fixed seed draws from a search's space, in which nothing is known."""
  optuna = optuna_package()
  sampler = optuna.samplers.RandomSampler(seed=_PROBE_SEED)
  study = optuna.create_study(sampler=sampler)
  for _ in range(NUM_PROBES):
    yield _drawn(study, search)


def draw(
  search: Callable[[Any], Any], history: Iterable[Any], seed: int
) -> tuple[Any, dict[str, Any]]:
  """Draws a point by TPE.

  Args:
    search: the experiment's `search(trial)`.
    history: FrozenTrials of the sweep, in the order of their numbers. One that runs counts as a bad
      one, so that workers do not all draw near the same point.
    seed: of the sampler. The same history and seed draw the same point.

  Returns:
    Optuna's FrozenTrial with what was drawn, and the point.

  Raises:
    SearchError: for a search that suggests nothing, returns no point or raises.

  Source: the tree-structured Parzen estimator, Bergstra et al., NeurIPS 2011.
  """
  optuna = optuna_package()
  sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=True)
  study = optuna.create_study(sampler=sampler, direction="minimize")
  for trial in history:
    known = copy.copy(trial)
    if known.state.name == "WAITING":  # it was handed back, and `ask` would take it
      known.state = type(known.state).RUNNING
      known.datetime_start = known.datetime_start or datetime.datetime.now()  # none if tried again
    study.add_trial(known)

  @functools.wraps(search)
  def guarded(trial: Any) -> dict[str, Any]:
    try:
      return search(trial)
    except Exception as error:
      said = " ".join(f"{type(error).__name__}: {error}".split())
      raise SearchError(f"{name_of(search)} must draw a point, and raised {said}") from error

  return _drawn(study, guarded)


def _drawn(study: Any, search: Callable[[Any], Any]) -> tuple[Any, dict[str, Any]]:
  trial = study.ask()
  point = search(trial)
  name = name_of(search)
  frozen = study.get_trials(deepcopy=False)[-1]
  if not frozen.params:
    raise SearchError(f"a search must have at least one parameter, and {name} suggests none")
  if not isinstance(point, dict) or not point:
    raise SearchError(
      f"{name} must return the config fields that it sets, such as "
      f"{{'optim.learning_rate': 0.003}}, got {point!r}"
    )
  study.tell(trial, state=type(frozen.state).FAIL)
  return frozen, point
