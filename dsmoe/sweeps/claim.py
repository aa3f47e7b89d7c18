"""Chooses the next trial of a worker: the first that is not finished and that nobody runs."""

import json
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from dsmoe.sweeps import corpus, draws, space
from dsmoe.sweeps.lease import Leases, trial_name
from dsmoe.sweeps.record import Record
from dsmoe.sweeps.study import Study, state_of

_SEED_PRIME = 1_000_003  # sets the sampler's seeds of neighbouring trials apart


class Claimed(NamedTuple):
  """A trial that this process runs while it has the lease `name`; `trial` is Optuna's.

  `refused` says why the point that was drawn for it must not be run; else "".
  """

  number: int
  name: str
  trial: Any
  params: dict[str, Any]
  seed: int
  refused: str


def next_trial(
  record: Record,
  study: Study,
  leases: Leases,
  search: Callable[[Any], Any] | None,
  max_restarts: int,
  aside: Collection[int] = (),
) -> Claimed | None:
  """Takes the lease of the first trial that is free, and begins it or takes it over.

  Args:
    record: the sweep's.
    study: its trials that have begun.
    leases: of this process.
    search: the experiment's `search(trial)`; None for a grid or a list.
    max_restarts: how often in a row a trial whose process died is run again from the same point of
      its curve; once more and it has failed.
    aside: numbers of trials that are not to be taken now.

  Returns:
    None when every trial is finished, set aside or run by another process.
  """
  begun = study.begun()
  for number in range(len(record.trials)):
    if number in aside or (number in begun and begun[number].state.is_finished()):
      continue
    if not leases.take(name := trial_name(number)):
      continue
    claimed = None
    try:
      begun = study.begun()  # as it is now that nobody else changes this trial
      claimed = _begin(number, record, study, begun, search, max_restarts)
      if claimed is not None:
        return claimed
    finally:
      if claimed is None:
        leases.release(name)
  return None


def is_finished(record: Record, study: Study) -> bool:
  """Whether every trial of a sweep is finished."""
  begun = study.begun()
  numbers = range(len(record.trials))
  return all(number in begun and begun[number].state.is_finished() for number in numbers)


def _begin(
  number: int,
  record: Record,
  study: Study,
  begun: Mapping[int, Any],
  search: Callable[[Any], Any] | None,
  max_restarts: int,
) -> Claimed | None:
  """Begins a trial whose lease this process has, or takes it over; None where that cannot be."""
  planned, found = record.trials[number], begun.get(number)
  if found is None:
    params, drawn, refused = planned.params, None, ""
    if params is None:
      if (draw := _draw(number, record, begun, search)) is None:
        return None  # its point is not drawn yet: another process is about to
      drawn, params, refused = draw
    found = study.create(number, params, planned.seed, drawn, refused)
  elif found.state.is_finished():
    return None
  elif state_of(found) == "waiting":
    study.set_state(found, "running", error="")
  elif not _may_restart(study, found, max_restarts):
    return None
  known = found.user_attrs
  refused = known.get("refused", "")
  return Claimed(number, trial_name(number), found, known["params"], known["seed"], refused)


def _draw(
  number: int, record: Record, begun: Mapping[int, Any], search: Callable[[Any], Any] | None
) -> tuple[Any | None, dict[str, Any], str] | None:
  """Returns a trial's point, drawn by Optuna or by the first trial of the same point.

  Optuna's trial is None, and the point empty, where the search drew none. The last value says why the
  point must not be run; else it is "".
  """
  point = record.trials[number].point
  first = next(n for n, planned in enumerate(record.trials) if planned.point == point)
  if first != number:
    found = begun.get(first)
    if found is None:
      return None
    return found, found.user_attrs["params"], found.user_attrs.get("refused", "")
  assert search is not None, "only a search leaves a trial's values open"
  history = [begun[n] for n in sorted(begun)]
  try:
    drawn, drawn_point = draws.draw(search, history, record.config["seed"] * _SEED_PRIME + number)
  except draws.SearchError as error:
    return None, {}, str(error)
  try:
    checked = space.checked_draw(record.config, drawn_point, draws.name_of(search))
    corpus.check_drawn(checked, record.fields)
    return drawn, checked, ""
  except ValueError as error:
    shown = json.loads(json.dumps(drawn_point, default=str, skipkeys=True), parse_constant=str)
    return drawn, shown, " ".join(str(error).split())


def _may_restart(study: Study, found: Any, max_restarts: int) -> bool:
  """Notes that a trial's process died; a trial that keeps ending its process has failed."""
  step = found.last_step or 0
  before, count = found.user_attrs.get("deaths", (step, 0))
  count = count + 1 if before == step else 1
  if count > max_restarts:
    study.set_state(
      found,
      "failed",
      error=f"the process of a trial may die at most {max_restarts} times in a row after the same "
      f"point of its curve, and it has died {count} times after step {step}",
    )
    return False
  study.note(found, deaths=(step, count))
  return True
