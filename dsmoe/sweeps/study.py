"""A sweep's trials in Optuna's storage: a journal in the workdir, or a PostgreSQL server.

A trial is created there when it begins; `record.Record.trials` says which there are to be. All
changes of a trial are made by the holder of its lease (lease.py), so none needs the storage's own
claims, whose journal can tell two workers that both have a trial.
"""

import datetime
import sys
import time
from collections.abc import Callable
from typing import Any, TypeVar

from etils import epath

from dsmoe.sweeps import storage as storage_lib
from dsmoe.sweeps.record import Record
from dsmoe.sweeps.storage import SilentStorageError

T = TypeVar("T")

_PATIENCE_SECS = 600.0  # how long a storage that has answered may stay away
_IDENTITY = "identity"
_ATTEMPT = "attempt"


class Study:
  """The trials of one sweep that have begun, by number."""

  def __init__(
    self,
    workdir: epath.PathLike,
    record: Record,
    storage: str | None = None,
    creates: bool = False,
    waits: bool = False,
  ):
    """Opens the storage.

    Args:
      workdir: the sweep's.
      record: from its sweep.json.
      storage: URL of a PostgreSQL server; None for the journal in `workdir`.
      creates: whether the study in it is created if absent.
      waits: whether to wait ten minutes for a storage that has answered others and does not now.

    Raises:
      ValueError: when the storage does not answer, is not the one that the sweep began in, has no
        study of this name, or has another sweep's.
    """
    if (kind := storage_lib.kind_of(storage)) != record.storage:
      need = (
        "no --storage"
        if record.storage == storage_lib.JOURNAL
        else "its --storage=postgresql://..."
      )
      raise ValueError(
        f"the sweep in {workdir} began with {record.storage} storage, which needs {need}, got {kind}"
      )
    self._optuna = storage_lib.optuna_package()
    self._patience_secs = _PATIENCE_SECS if waits else 0.0
    path, patience = epath.Path(workdir), self._patience_secs
    try:
      self._storage = storage_lib.opened(path, storage, patience, creates)
    except FileNotFoundError as error:
      raise ValueError(_without_study(workdir, record)) from error
    self._study = self.patiently(self._load, workdir, record, creates)
    self._patience_secs = _PATIENCE_SECS

  def _load(self, workdir: epath.PathLike, record: Record, creates: bool) -> Any:
    """Returns the study of the record's name."""
    try:
      if creates:
        study = self._optuna.create_study(
          storage=self._storage, study_name=record.name, load_if_exists=True, direction="minimize"
        )
      else:
        study = self._optuna.load_study(storage=self._storage, study_name=record.name)
    except KeyError as error:
      raise ValueError(_without_study(workdir, record)) from error
    found = study.user_attrs.get(_IDENTITY)
    if found is None and creates:
      study.set_user_attr(_IDENTITY, record.identity)
      found = study.user_attrs.get(_IDENTITY)
    if found != record.identity:
      raise ValueError(
        f"a storage must have one sweep of a name, and the study {record.name!r} in it is not that of "
        f"{workdir}: give --name another value, or the workdir in which that sweep began"
      )
    study.pruner = _pruner(self._optuna, record.pruner)
    return study

  def patiently(self, call: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Calls until the storage answers.

    Raises:
      SilentStorageError: after ten minutes without an answer.
    """
    began = time.monotonic()
    pause = 0.1
    while True:
      try:
        return call(*args, **kwargs)
      except self._silences() as error:
        if time.monotonic() - began > self._patience_secs:
          raise SilentStorageError(
            f"the sweep's storage must answer within {self._patience_secs:.0f} s: {storage_lib.reason(error)}"
          ) from error
        if pause == 0.1:
          print(f"waiting for the sweep's storage: {storage_lib.reason(error)}", file=sys.stderr)
        time.sleep(pause)
        pause = min(2 * pause, 5.0)

  def _silences(self) -> tuple[type[Exception], ...]:
    """Returns what is raised while a storage does not answer."""
    import sqlalchemy.exc

    return (self._optuna.exceptions.StorageInternalError, sqlalchemy.exc.SQLAlchemyError, OSError)

  def begun(self) -> dict[int, Any]:
    """Returns Optuna's FrozenTrials that have begun, by their number in the sweep.

    Of those that `retry` made of one another it is the last.
    """
    trials: dict[int, Any] = {}
    for trial in self.patiently(self._study.get_trials, deepcopy=False):
      if (number := trial.user_attrs.get("number")) is None:
        continue
      if number not in trials or _attempt(trial) > _attempt(trials[number]):
        trials[number] = trial
    return trials

  def create(
    self, number: int, params: dict[str, Any], seed: int, drawn: Any | None, refused: str = ""
  ) -> Any:
    """Begins a trial; everything about it is stored at once.

    Args:
      number: of the trial.
      params: its config fields and their values.
      seed: its seed.
      drawn: a FrozenTrial with what a search has drawn; None for a grid or a list.
      refused: why its point must not be run; else "".
    """
    attributes = {"number": number, "params": params, "seed": seed}
    attributes |= {"refused": refused} if refused else {}
    template = self._optuna.trial.create_trial(
      state=self._optuna.trial.TrialState.RUNNING,
      params=drawn.params if drawn else None,
      distributions=drawn.distributions if drawn else None,
      user_attrs=attributes,
    )
    template.datetime_start = datetime.datetime.now()

    def create() -> Any:
      # A storage that went away may have stored it before.
      found = self.begun().get(number)
      if found is None:
        self._storage.create_new_trial(self._study._study_id, template)
        found = self.begun()[number]
      return found

    return self.patiently(create)

  def retry(self, failed: Any) -> None:
    """Lets a failed trial wait again; its point, curve, seconds and FLOPs stay.

    The storage changes no trial that is finished, so that another one takes its number.
    """
    number, attempt = failed.user_attrs["number"], _attempt(failed) + 1
    kept = {k: v for k, v in failed.user_attrs.items() if k not in ("error", "deaths")}
    template = self._optuna.trial.create_trial(
      state=self._optuna.trial.TrialState.WAITING,
      params=failed.params,
      distributions=failed.distributions,
      user_attrs=kept | {_ATTEMPT: attempt},
      intermediate_values=failed.intermediate_values,
    )

    def create() -> None:
      if _attempt(self.begun()[number]) < attempt:  # else it was stored before
        self._storage.create_new_trial(self._study._study_id, template)

    self.patiently(create)

  def set_state(self, trial: Any, state: str, value: float | None = None, **notes: Any) -> None:
    """Stores what became of a trial; one that is finished already stays as it is.

    Args:
      trial: from `begun`.
      state: "running", "waiting" (handed back), "complete", "pruned" or "failed".
      value: of a complete trial.
      **notes: stored with the trial before its state: error, seconds, flops.
    """
    if self.fresh(trial).state.is_finished():
      return
    self.note(trial, **notes)
    values = None if value is None else [value]
    wanted = self._optuna.trial.TrialState[_OPTUNAS[state]]
    finished = self._optuna.exceptions.UpdateFinishedTrialError
    try:
      self.patiently(self._storage.set_trial_state_values, trial._trial_id, wanted, values)
    except finished:  # by the call before, whose answer the storage did not live to give
      pass

  def note(self, trial: Any, **notes: Any) -> None:
    """Stores further values, that JSON can have, with a trial that is not finished."""
    for name, note in notes.items():
      self.patiently(self._storage.set_trial_user_attr, trial._trial_id, name, note)

  def fresh(self, trial: Any) -> Any:
    """Returns a trial as the storage has it now."""
    return self.patiently(self._storage.get_trial, trial._trial_id)

  def report(self, trial: Any, step: int, loss: float) -> None:
    """Stores a point of a trial's validation curve."""
    self.patiently(self._storage.set_trial_intermediate_value, trial._trial_id, step, loss)

  def prunes(self, trial: Any) -> bool:
    """Whether the pruner ends a trial after its last point."""
    return self.patiently(self._study.pruner.prune, self._study, self.fresh(trial))


_OPTUNAS = {
  "waiting": "WAITING",
  "running": "RUNNING",
  "complete": "COMPLETE",
  "pruned": "PRUNED",
  "failed": "FAIL",
}


def _attempt(trial: Any) -> int:
  """Returns how often a trial had failed and was tried again before."""
  return trial.user_attrs.get(_ATTEMPT, 0)


def state_of(trial: Any) -> str:
  """Returns a FrozenTrial's state in a sweep's words."""
  return next(word for word, name in _OPTUNAS.items() if name == trial.state.name)


def _without_study(workdir: epath.PathLike, record: Record) -> str:
  return f"the storage of the sweep in {workdir} must have its study {record.name!r}, and has none"


def _pruner(optuna: Any, settings: dict[str, Any]) -> Any:
  """Returns the pruner that a record names."""
  if settings["name"] == "none":
    return optuna.pruners.NopPruner()
  return optuna.pruners.MedianPruner(
    n_startup_trials=settings["n_startup_trials"], n_warmup_steps=settings["n_warmup_steps"]
  )
