"""What became of a sweep's trials, for tables, rankings and reports."""

from typing import Any, NamedTuple

from etils import epath

from dsmoe.sweeps import lease
from dsmoe.sweeps import record as record_lib
from dsmoe.sweeps import study as study_lib

# A trial that is interrupted was running when its process died; it goes on in the next worker that is
# free. The storage does not know: it is one that runs there, and whose lease nobody has.
STATES = ("waiting", "interrupted", "running", "complete", "pruned", "failed")
LEFT = ("waiting", "interrupted", "running")  # the states of trials that are not finished
TRIALS = "trials"


class Trial(NamedTuple):
  """One run of a sweep.

  Attributes:
    number: its place in the sweep, and its folder's name.
    params: config fields and their values; equal for trials that differ only in the seed. Empty for
      a trial of a search that has not begun.
    seed: the config's field `seed`.
    state: one of `STATES`.
    value: the final validation loss of a complete trial, in nats a token; lower is better.
    workdir: of the run.
    error: why a trial failed or was handed back, in one sentence; else "".
    seconds: that its processes spent on it, without those that were killed.
    flops: compute of the whole run.
    lost_flops: the part of it in steps that were computed again after a kill or a bad step.
    num_devices: on which its run computed.
  """

  number: int
  params: dict[str, Any]
  seed: int
  state: str
  value: float | None
  workdir: epath.Path
  error: str
  seconds: float
  flops: float
  lost_flops: float = 0.0
  num_devices: int = 1


class Sweep(NamedTuple):
  """A sweep and all its trials, by number; `fields` are the config fields that are searched."""

  name: str
  fields: tuple[str, ...]
  objective: str
  trials: list[Trial]


def trial_folder(workdir: epath.PathLike, number: int) -> epath.Path:
  """Returns the workdir of a trial's run."""
  return epath.Path(workdir) / TRIALS / f"{number:04d}"


def read(workdir: epath.PathLike, storage: str | None = None) -> Sweep:
  """Reads the state of a sweep.

  Args:
    workdir: the sweep's.
    storage: URL of the PostgreSQL server that has its trials; None for the journal in `workdir`.

  Raises:
    ValueError: when `workdir` has no sweep, or the storage does not answer or is another.
  """
  record = record_lib.read(workdir)
  return of(workdir, record, study_lib.Study(workdir, record, storage))


def of(workdir: epath.PathLike, record: record_lib.Record, study: study_lib.Study) -> Sweep:
  """Returns the state of a sweep whose storage is open; see `read`."""
  begun = study.begun()
  trials = [
    _trial(workdir, number, planned, study, begun.get(number))
    for number, planned in enumerate(record.trials)
  ]
  # A search may set a field in few of its points, which the first draws did not show.
  known = {field for trial in trials if trial.state != "failed" for field in trial.params}
  fields = (*record.fields, *sorted(known - {*record.fields}))
  return Sweep(record.name, fields, record.objective, trials)


def _trial(
  workdir: epath.PathLike,
  number: int,
  planned: record_lib.Planned,
  study: study_lib.Study,
  found: Any | None,
) -> Trial:
  """Returns a trial; `found` is Optuna's, None before it begins."""
  state = study_lib.state_of(found) if found else "waiting"
  if state == "running" and not lease.is_held(workdir, lease.trial_name(number)):
    found = study.fresh(found)  # which may have been finished just before its lease was released
    state = study_lib.state_of(found)
    state = "interrupted" if state == "running" else state
  notes = found.user_attrs if found else {}
  return Trial(
    number=number,
    params=notes.get("params", planned.params or {}),
    seed=planned.seed,
    state=state,
    value=found.value if found and state == "complete" else None,
    workdir=trial_folder(workdir, number),
    error=notes.get("error", ""),
    seconds=notes.get("seconds", 0.0),
    flops=notes.get("flops", 0.0),
    lost_flops=notes.get("lost_flops", 0.0),
    num_devices=notes.get("num_devices", 1),
  )
