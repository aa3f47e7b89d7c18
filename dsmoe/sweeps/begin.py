"""Begins a sweep in a workdir and a storage, or goes on with the one that is there."""

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from dsmoe import config as config_lib
from dsmoe.config import Config
from dsmoe.sweeps import corpus
from dsmoe.sweeps import record as record_lib
from dsmoe.sweeps import storage as storage_lib
from dsmoe.sweeps import study as study_lib
from dsmoe.sweeps.lease import Leases
from dsmoe.sweeps.record import Planned, Record
from dsmoe.sweeps.results import Trial
from dsmoe.sweeps.space import MAX_TRIALS

_LEASE = "sweep"
_OF_A_RUN = ("config.json", "checkpoints", "metrics.jsonl")
_POLL_SECS = 0.5


@contextlib.contextmanager
def _alone(workdir: epath.Path, say: Callable[[str], None]) -> Iterator[None]:
  """Waits until no other process writes the sweep's record."""
  with Leases(workdir) as leases:
    told = False
    while not leases.take(_LEASE):
      if not told:
        say("another process prepares this sweep: waiting for it")
      told = True
      time.sleep(_POLL_SECS)
    yield


def begin(
  workdir: epath.Path,
  storage: str | None,
  config: Config,
  record: Record,
  say: Callable[[str], None],
) -> tuple[Record, study_lib.Study]:
  """Begins a sweep, or goes on with it; one process of all does this at a time.

  Args:
    workdir: the sweep's.
    storage: URL of a PostgreSQL server; None for a journal in the workdir.
    config: the one that trials start from.
    record: of the sweep as the command has it, without the corpus.
    say: takes sentences for the user.

  Returns:
    The sweep's record and its study.

  Raises:
    ValueError: for the workdir of a run or of another sweep; for a space, config or corpus that is
      not the one that the sweep began with; for a storage that does not answer or has another sweep
      of this name. Nothing of a sweep that has begun is changed.
  """
  if "://" in os.fspath(workdir) and storage is None:
    raise ValueError(
      "a sweep in an object store must have a --storage=postgresql://..., because its journal would "
      f"be a file on a disk, got --workdir={workdir}"
    )
  for name in _OF_A_RUN:
    if (workdir / name).exists():
      raise ValueError(f"a sweep's --workdir must not be a run's, and {workdir} has {name}")
  if not record_lib.exists(workdir) and (folders := list(workdir.glob("trials/*"))):
    raise ValueError(
      f"{workdir} has {len(folders)} trials and no {record_lib.SWEEP_FILE}, which says of which "
      "sweep they are: restore that file, or name another --workdir"
    )
  corpus.check(config, workdir, record.fields)
  if record_lib.exists(workdir):  # what can be refused before the corpus is read
    old = record_lib.read(workdir)
    record_lib.check(workdir, old, record._replace(corpus=old.corpus))
  elif storage is not None:
    storage_lib.check_answers(workdir, storage)
  with _alone(workdir, say):
    record = record._replace(corpus=corpus.prepare(config, workdir, say))
    if record_lib.exists(workdir):
      old = record_lib.read(workdir)
      record_lib.check(workdir, old, record)
      if changed := config_lib.differences(old.code, record.code):
        say(f"the code has changed since the sweep began: {'; '.join(changed)}")
      return old, study_lib.Study(workdir, old, storage, creates=True)
    record_lib.write(workdir, record)
    try:
      return record, study_lib.Study(workdir, record, storage, creates=True)
    except BaseException:
      record_lib.remove(workdir)
      raise


def retry_failed(workdir: epath.Path, study: study_lib.Study, say: Callable[[str], None]) -> int:
  """Lets the failed trials of a sweep wait again; returns how many there are.

  Each goes on from its checkpoint if it has one, when a worker comes to it. Those without a point that
  may be run stay failed.
  """
  with _alone(workdir, say):
    failed = [trial for trial in study.begun().values() if study_lib.state_of(trial) == "failed"]
    found = [trial for trial in failed if not trial.user_attrs.get("refused")]
    if number := len(failed) - len(found):
      say(f"{number:,} failed trials have no point that may be run, and stay failed")
    for trial in found:
      study.retry(trial)
  return len(found)


def add(
  workdir: epath.Path,
  trials: Sequence[Trial],
  more: Iterable[tuple[Mapping[str, Any], int]],
  say: Callable[[str], None],
) -> Record:
  """Adds trials to a sweep that has begun; workers find them when they look for their next.

  They are not pruned: they are there to be compared.

  Args:
    workdir: the sweep's.
    trials: that it has, from `results.read`.
    more: values that some of them were run with, and a further seed, for each new trial.
    say: takes sentences for the user.

  Returns:
    The sweep's record with them; those that it has already are not added again.

  Raises:
    ValueError: for values that no trial has, and for more trials than a sweep may have.
  """
  with _alone(workdir, say):
    record = record_lib.read(workdir)
    planned = list(record.trials)
    known = {(trial.point, trial.seed) for trial in planned}
    for params, seed in more:
      like = next((trial.number for trial in trials if trial.params == params), None)
      if like is None:
        raise ValueError(f"a trial can be added to values that were run, got {dict(params)}")
      point = record.trials[like].point
      if (point, seed) not in known:
        planned.append(Planned(point, seed, dict(params), is_added=True))
        known.add((point, seed))
    if len(planned) > MAX_TRIALS:
      raise ValueError(f"a sweep must have at most {MAX_TRIALS:,} trials, got {len(planned):,}")
    record = record._replace(trials=planned)
    record_lib.write(workdir, record)
    return record
