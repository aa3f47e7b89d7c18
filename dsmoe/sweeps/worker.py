"""A worker: one process that runs trials of a sweep one after the other.

  python -m dsmoe.sweeps.worker SWEEP

`scripts/sweep.py` starts it. It ends when all trials are finished, and hands its trial back at
SIGTERM, Ctrl-C or the end of its standard input, which is the end of whoever started it. A storage
other than the journal is given by DSMOE_SWEEP_STORAGE, because a command line is no place for
passwords.
"""

import argparse
import contextlib
import functools
import math
import os
import signal
import stat
import sys
import threading
import time
import traceback
from collections.abc import Callable, Generator
from typing import Any

from etils import epath

from dsmoe import checkpoint, runtime
from dsmoe.config import Config
from dsmoe.data.folder import ChangedDataError
from dsmoe.platforms import cpu
from dsmoe.reporting import result
from dsmoe.sweeps import claim, corpus, results, space
from dsmoe.sweeps import record as record_lib
from dsmoe.sweeps.lease import Leases
from dsmoe.sweeps.storage import SilentStorageError
from dsmoe.sweeps.study import Study

STORAGE_VARIABLE = "DSMOE_SWEEP_STORAGE"
MACHINE_FAULT = 75  # exit code: this machine cannot run trials now, which says nothing about them
PRUNED = "pruned"
_POLL_SECS = 1.0  # while other processes run what is left
_ASIDE_SECS = 30.0  # between two tries of a trial in whose workdir another process trains

# What runs a trial, as `dsmoe.train.points` does: yields points, takes a reason to end, and returns
# a result.
Points = Callable[[Config, epath.Path], Generator[Any, str | None, Any]]


class Handed(Exception):
  """A trial was handed back; str() says why."""


class MachineError(Exception):
  """This machine cannot run trials now; str() says why."""


def work(
  workdir: epath.Path,
  storage: str | None,
  leases: Leases,
  run: Points,
  max_restarts: int,
  poll_secs: float = _POLL_SECS,
  aside_secs: float = _ASIDE_SECS,
) -> None:
  """Runs trials until all are finished.

  Args:
    workdir: the sweep's.
    storage: URL of a PostgreSQL server; None for the journal.
    leases: of this process; in its context.
    run: what runs a trial.
    max_restarts: see `claim.next_trial`.
    poll_secs: between two looks while other processes run what is left.
    aside_secs: between two tries of a trial in whose workdir another process trains.

  Raises:
    Handed: when a signal ended the run of a trial, which is handed back, or came at its end.
    KeyboardInterrupt: when one came before or between runs.
    MachineError: when this machine cannot run trials, its trial handed back.
    ChangedDataError: when the corpus is not as it was when the sweep began, likewise.
  """
  record = record_lib.read(workdir)
  study = Study(workdir, record, storage, waits=True)
  search = space.load(record.experiment).search if record.experiment else None
  tried: dict[int, float] = {}  # trials in whose workdirs other processes trained, and when
  while True:
    record = record_lib.read(workdir)  # to which trials may have been added
    aside = {number for number, at in tried.items() if time.monotonic() - at < aside_secs}
    claimed = claim.next_trial(record, study, leases, search, max_restarts, aside)
    if claimed is not None:
      try:
        _run_trial(workdir, record, study, leases, claimed, run)
      except checkpoint.InUseError:
        tried[claimed.number] = time.monotonic()
    elif claim.is_finished(record, study):
      return
    else:
      time.sleep(poll_secs)


def _run_trial(
  workdir: epath.Path,
  record: record_lib.Record,
  study: Study,
  leases: Leases,
  claimed: claim.Claimed,
  run: Points,
) -> None:
  """Runs a trial to its end, or hands it back and raises what says why; see `work`.

  Raises:
    InUseError: when another process trains in the trial's workdir.
  """
  began, folder = time.monotonic(), results.trial_folder(workdir, claimed.number)
  spent = claimed.trial.user_attrs.get("seconds", 0.0)
  point = claimed.params | {"seed": claimed.seed}
  print(f"trial {claimed.number}: {space.shown(point)}", flush=True)

  def leave(state: str, value: float | None = None, **notes: Any) -> None:
    if not leases.is_lost(claimed.name):
      used = {"seconds": spent + time.monotonic() - began, **_used(folder)}
      study.set_state(claimed.trial, state, value, **(used | notes))
    leases.release(claimed.name)
    why = f": {notes['error']}" if "error" in notes else ""
    print(f"trial {claimed.number}: {state}{why}", flush=True)

  if claimed.refused:
    leave("failed", error=claimed.refused)
    return
  try:
    config = space.config_of(record.config, point)
    corpus.link(config, workdir, folder)
    corpus.check_unchanged(config, workdir, record.corpus, functools.partial(print, flush=True))
    with contextlib.closing(run(config, folder)) as points:
      prune_before = 0 if record.trials[claimed.number].is_added else config.num_steps
      ended = _drive(points, study, leases, claimed, prune_before)
  except KeyboardInterrupt:
    leave("waiting")
    raise
  except SilentStorageError:
    leases.release(claimed.name)
    raise
  except (checkpoint.InUseError, ChangedDataError) as error:
    leave("waiting", error=_sentence(error))
    raise
  except Exception as error:
    if _is_machines(error):
      leave("waiting", error=_sentence(error))
      raise MachineError(_sentence(error)) from error
    # Whatever else it is, the other trials go on.
    traceback.print_exc()
    leave("failed", error=_sentence(error))
    return
  flops = {"flops": ended.flops} if math.isfinite(ended.flops) else {}
  if ended.why == "finished":
    value = _objective(ended.final, record.fields)
    if value is None or not math.isfinite(value):
      got = "none" if value is None else value
      leave("failed", error=f"the final validation loss must be finite, got {got}", **flops)
    else:
      leave("complete", value, **flops)
  elif ended.why == PRUNED:
    leave("pruned", **flops)
  elif leases.is_lost(claimed.name):
    print(f"trial {claimed.number}: {ended.why}", flush=True)
  else:
    leave("waiting", **flops)
    raise Handed(ended.why)
  if signals := ended.signals:  # they came too late for this run to look at them
    raise Handed(f"stopped by {signals[0]}, after trial {claimed.number}")


def _drive(
  points: Generator[Any, str | None, Any],
  study: Study,
  leases: Leases,
  claimed: claim.Claimed,
  prune_before: int,
) -> Any:
  """Reports a run's points and ends it where the pruner or a lost lease says so.

  Points that an earlier process reported come again. It has judged all but the last of them, so the
  same is decided as if nothing had been interrupted. Points from the step `prune_before` on are not
  judged.
  """
  reported = claimed.trial.intermediate_values
  last = max(reported, default=-1)
  reason: str | None = None
  while True:
    try:
      point = points.send(reason) if reason else next(points)
    except StopIteration as end:
      return end.value
    if leases.is_lost(claimed.name):
      reason = "another machine has taken the trial over"
      continue
    if point.step not in reported:
      study.report(claimed.trial, point.step, point.loss)
    if last <= point.step < prune_before and study.prunes(claimed.trial):
      reason = PRUNED


def _used(folder: epath.Path) -> dict[str, Any]:
  """Returns what a trial's run has used, as far as its result.json says."""
  try:
    found = result.read(folder)
  except (ValueError, OSError):  # of a run that was refused, or that a bad disk has damaged
    return {}
  used = {
    "flops": found.model_flops,
    "lost_flops": found.model_flops_made_again,
    "num_devices": found.num_devices,
  }
  return {name: value for name, value in used.items() if value is not None}


def _objective(final: Any, fields: tuple[str, ...]) -> float | None:
  """Returns the loss by which a trial is ranked, which is of the same rows in all trials."""
  if final is None:
    return None
  # log.eval_batches are so many batches: of the same rows only where those are of one size.
  return final.whole_loss if "batch_size" in fields else final.loss


def _is_machines(error: Exception) -> bool:
  """Whether an error (of a disk, a network, a permission) says nothing about the trial."""
  return isinstance(error, OSError | checkpoint.DamagedSaveError)


def _sentence(error: Exception) -> str:
  """Returns an error in one line, with its type where it is not a refusal."""
  text = " ".join(str(error).split())[:1000]
  return text if isinstance(error, ValueError) and text else f"{type(error).__name__}: {text}"


def _ends_with_stdin() -> None:
  """Ends this process as SIGTERM does when a pipe that is its standard input ends."""
  if not stat.S_ISFIFO(os.fstat(0).st_mode):
    return

  def read() -> None:
    while os.read(0, 4096):
      pass
    os.kill(os.getpid(), signal.SIGTERM)

  threading.Thread(target=read, name="stdin", daemon=True).start()


def main(arguments: list[str], run: Points | None = None) -> int:
  """Runs a worker; returns its exit code."""
  parser = argparse.ArgumentParser(prog="python -m dsmoe.sweeps.worker")
  parser.add_argument("workdir")
  parser.add_argument("--slot", default="", help="Lease of this worker's devices.")
  parser.add_argument("--cores", default="", help="The cores that it may use, 0,1 say.")
  parser.add_argument("--max_restarts", type=int, required=True)
  options = parser.parse_args(arguments)
  if options.cores:
    os.sched_setaffinity(0, map(int, options.cores.split(",")))
  if run is None:
    from dsmoe import train  # defines flags, which a program that only imports this does not want
    from dsmoe.training.programs import Programs

    # Trials whose configs differ in the step's arguments alone run the programs of the first.
    run = functools.partial(train.points, programs=Programs())
  # Outside of training SIGTERM interrupts as Ctrl-C does; training has its own way of ending.
  signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
  signal.signal(signal.SIGINT, signal.default_int_handler)
  _ends_with_stdin()
  workdir = epath.Path(options.workdir)
  try:
    with runtime.noted_interrupts(), Leases(workdir) as leases:
      while options.slot and not leases.take(options.slot):
        print(f"waiting for the worker that has {options.slot}", flush=True)
        time.sleep(_POLL_SECS)
      work(workdir, os.environ.get(STORAGE_VARIABLE), leases, run, options.max_restarts)
  except KeyboardInterrupt:
    print("stopped by a signal", flush=True)
  except Handed as handed:
    print(f"handed back: {handed}", flush=True)
  except MachineError as error:
    print(f"error: this machine cannot run trials: {error}", file=sys.stderr, flush=True)
    return MACHINE_FAULT
  except ValueError as error:
    print(f"error: {_sentence(error)}", file=sys.stderr, flush=True)
    return 2
  return 0


if __name__ == "__main__":
  cpu.keep_memory()
  sys.exit(main(sys.argv[1:]))
