"""Runs a sweep of hyperparameters, or goes on with it: a grid, a list of points or a search.

  python scripts/sweep.py --config=experiments/tiny.py --workdir=runs/sweep
  python scripts/sweep.py --config=experiments/tiny.py --workdir=runs/grid --grid optim.learning_rate=1e-3,3e-3 balance.bias_update_speed=0,0.01 --seeds=3
  python scripts/sweep.py --config=experiments/tiny.py --workdir=runs/search --trials=40 --workers=2
  python scripts/sweep.py --workdir=runs/search --status

Without --grid, --points or --trials the experiment's own `sweep(add)` says which points there are.
The same command goes on with a sweep that was interrupted, and on another machine that sees the
workdir it joins. Each trial is a run in WORKDIR/trials. --config.FIELD=VALUE sets a field for all.
"""

import contextlib
import functools
import os
import pathlib
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import rich
from absl import app, flags
from etils import epath
from ml_collections import config_flags
from rich.console import Console

from dsmoe import config as config_lib
from dsmoe.config import Config
from dsmoe.reporting import code_version, output
from dsmoe.sweeps import (
  begin,
  dependent,
  devices,
  draws,
  lease,
  live,
  progress,
  promotion,
  results,
  runner,
  sentences,
  show,
  space,
  verdict,
)
from dsmoe.sweeps import record as record_lib
from dsmoe.sweeps import storage as storage_lib
from dsmoe.sweeps import study as study_lib

_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "An experiment, experiments/<name>.py; needed without --status."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Where the sweep's files go. Needed.")
_GRID = flags.DEFINE_multi_string(
  "grid", [], "FIELD=VALUE,VALUE,...; every combination with those that follow it."
)
_POINTS = flags.DEFINE_string("points", None, "File with a point a line, as JSON by config field.")
_TRIALS = flags.DEFINE_integer("trials", None, "How many points search(trial) draws.")
_SEEDS = flags.DEFINE_integer("seeds", 1, "How many seeds a point is run with.")
_NAME = flags.DEFINE_string("name", None, "Of the sweep; by default the workdir's last folder.")
_STORAGE = flags.DEFINE_string(
  "storage",
  None,
  "postgresql://USER@HOST:PORT/DATABASE, for many machines; by default a journal in the workdir.",
)
_WORKERS = flags.DEFINE_integer(
  "workers", 1, "Processes on this machine, among which its devices or cores are split."
)
_PRUNER = flags.DEFINE_enum(
  "pruner",
  None,
  ["median", "none"],
  "median ends a trial whose best loss is worse than the median of the others at its step, which is "
  "the default for a search; none lets all finish, the default for points that are given.",
)
_PRUNE_AFTER = flags.DEFINE_integer(
  "prune_after_steps", None, "Steps without pruning; by default a quarter of num_steps.", 0
)
_MAX_RESTARTS = flags.DEFINE_integer(
  "max_restarts",
  5,
  "How often in a row a trial whose process dies is run again from the same point of its curve.",
  lower_bound=0,
)
_RETRY_FAILED = flags.DEFINE_bool(
  "retry_failed",
  False,
  "Try the failed trials of the sweep again; each goes on from its checkpoint if it has one.",
)
_GRACE_SECS = flags.DEFINE_integer(
  "grace_secs", 120, "Time for workers to save when the sweep is stopped.", lower_bound=1
)
_PROMOTE = flags.DEFINE_integer(
  "promote",
  0,
  "How many further runs to spend, when all trials have ended, on seeds of the settings that are tied "
  "with the best.",
  lower_bound=0,
)
_DASHBOARD = flags.DEFINE_integer(
  "dashboard",
  None,
  "Serve the report's page on this port of the loopback interface meanwhile; 0: one that is free.",
  lower_bound=0,
  upper_bound=65535,
)
_STATUS = flags.DEFINE_bool("status", False, "Print the table of the sweep in --workdir, and end.")
_JSON = output.define_json()

_PRUNE_COMPLETE = 5  # complete trials before the first is pruned


def space_of(config: Config, path: str, grid: list[str]) -> tuple[space.Space, str]:
  """Returns the space that the flags or the experiment name, and the file of a search, else ""."""
  ways = {"--grid": bool(grid), "--points": _POINTS.value is not None}
  given = [
    name for name, is_given in (*ways.items(), ("--trials", _TRIALS.value is not None)) if is_given
  ]
  if len(given) > 1:
    raise app.UsageError(
      f"only one of --grid, --points and --trials may be given, got {' and '.join(given)}"
    )
  if grid:
    return space.of_points(config, space.grid(grid, config), _SEEDS.value, "--grid"), ""
  if _POINTS.value is not None:
    points = space.listed(_POINTS.value)
    return space.of_points(config, points, _SEEDS.value, f"--points={_POINTS.value}"), ""
  module = space.load(path)
  if _TRIALS.value is not None:
    if not hasattr(module, "search"):
      raise ValueError(f"--trials needs a function search(trial) in {path}, which has none")
    drawn = draws.probe(module.search)
    return space.of_search(config, module.search, _TRIALS.value, _SEEDS.value, drawn), path
  if not hasattr(module, "sweep"):
    more = (
      "; it has search(trial), which --trials=N draws from" if hasattr(module, "search") else ""
    )
    raise ValueError(
      f"--grid or --points must be given where {path} has no function sweep(add){more}"
    )
  points = space.added(module.sweep)
  return space.of_points(config, points, _SEEDS.value, "sweep(add)"), ""


def pruner_of(config: Config, is_search: bool) -> dict[str, Any]:
  """Returns the settings of the pruner."""
  name = _PRUNER.value or ("median" if is_search else "none")
  if name == "none":
    if _PRUNE_AFTER.value is not None:
      raise app.UsageError("--prune_after_steps goes with --pruner=median")
    return {"name": name}
  after = config.num_steps // 4 if _PRUNE_AFTER.value is None else _PRUNE_AFTER.value
  return {"name": name, "n_startup_trials": _PRUNE_COMPLETE, "n_warmup_steps": after}


def record_of(config: Config, workdir: str, grid: list[str]) -> record_lib.Record:
  """Returns the record of the sweep that the command describes, without its corpus."""
  path = config_flags.get_config_filename(flags.FLAGS["config"])
  found, experiment = space_of(config, path, grid)
  return record_lib.Record(
    name=_NAME.value or workdir.rstrip("/").rpartition("/")[2],
    identity=uuid.uuid4().hex,
    objective=f"final {'whole_' * ('batch_size' in found.fields)}validation_loss",
    storage=storage_lib.kind_of(_STORAGE.value),
    experiment=experiment,
    fields=found.fields,
    trials=found.trials,
    draws=found.draws,
    pruner=pruner_of(config, bool(experiment)),
    config=config_lib.to_dict(config),
    corpus="",
    code=code_version.versions(),
  )


def report(sweep: results.Sweep) -> None:
  """Prints how a sweep stands, and what may be said of it."""
  if _JSON.value != output.STDOUT:
    found = progress.Follower().poll(sweep, time.time())
    rich.print(show.table(sweep, found))
    told, _ = dependent.without(sweep)
    print("\n".join(sentences.of_ranking(verdict.rank(told.trials))))
  trials = [trial._asdict() | {"workdir": str(trial.workdir)} for trial in sweep.trials]
  output.write_json(_JSON.value, sweep._asdict() | {"trials": trials})


def run_workers(
  workdir: epath.Path, study: study_lib.Study, slots: list[devices.Slot], console: Console
) -> list[str]:
  """Runs the workers until they end, showing how the sweep stands; returns the signals that came."""
  logs = pathlib.Path(workdir / runner.LOGS)
  if "://" in str(workdir):
    logs = pathlib.Path(tempfile.mkdtemp(prefix="sweep_logs_"))
  with live.showing(console) as show:
    try:
      return runner.run(
        workdir,
        _STORAGE.value,
        slots,
        logs,
        _MAX_RESTARTS.value,
        _GRACE_SECS.value,
        lambda said: show(results.of(workdir, record_lib.read(workdir), study), said),
        sayer(console),
      )
    except runner.Ended as error:
      output.fail(str(error))


def are_left(trials: list[results.Trial]) -> bool:
  """Whether some trials are not finished."""
  return any(trial.state in results.LEFT for trial in trials)


def promoted(workdir: epath.Path, study: study_lib.Study, number: int, console: Console) -> bool:
  """Adds at most `number` of the further runs of --promote; returns whether there are any."""
  record = record_lib.read(workdir)
  left = (_PROMOTE.value or 0) - sum(trial.is_added for trial in record.trials)
  if left < 1:
    return False
  trials = results.of(workdir, record, study).trials
  if are_left(trials):
    return False
  more = promotion.promote(trials, min(left, number))
  if not more:
    sayer(console)(f"--promote: no two settings are tied, so {left} of its runs are not spent")
  begin.add(workdir, trials, more, sayer(console))
  return bool(more)


def sayer(console: Console) -> Callable[[str], None]:
  """Returns what prints sentences."""
  return functools.partial(console.print, markup=False, highlight=False, soft_wrap=True)


def main(argv: list[str]) -> None:
  grid = _GRID.value
  if argv[1:]:  # --grid A=1,2 B=3,4
    if not grid or not all("=" in argument for argument in argv[1:]):
      output.refuse_arguments(argv)
    grid = [*grid, *argv[1:]]
  if not (_WORKDIR.value or "").strip():
    raise app.UsageError("--workdir must name a folder, got an empty text")
  workdir = epath.Path(_WORKDIR.value)
  if _STATUS.value:
    if _RETRY_FAILED.value:
      raise app.UsageError("--status changes nothing, and --retry_failed must not go with it")
    report(results.read(workdir, _STORAGE.value))
    return
  if _CONFIG.value is None:
    raise app.UsageError("--config must be given")
  console = Console(stderr=True)
  config = config_lib.from_config_dict(_CONFIG.value)
  made = record_of(config, str(workdir), grid)
  platform, number = devices.found(os.environ, sayer(console))
  slots = devices.slots(_WORKERS.value, platform, number, lease.this_machine(), os.environ)
  _, study = begin.begin(workdir, _STORAGE.value, config, made, sayer(console))
  if _RETRY_FAILED.value:
    number = begin.retry_failed(workdir, study, sayer(console))
    sayer(console)(f"--retry_failed: {sentences.count(number, 'failed trial')} to be tried again")
  if "://" not in str(workdir):
    sayer(console)(f"what the workers print is in {workdir / runner.LOGS}")
  with contextlib.ExitStack() as stack:
    if _DASHBOARD.value is not None:
      stack.enter_context(served(workdir, _DASHBOARD.value, console))
    received = run_workers(workdir, study, slots, console)
    while not received and promoted(workdir, study, len(slots), console):
      received = run_workers(workdir, study, slots, console)
  sweep = results.of(workdir, record_lib.read(workdir), study)
  report(sweep)
  if are_left(sweep.trials):
    sayer(console)("the same command goes on with the trials that are left")


@contextlib.contextmanager
def served(workdir: epath.Path, port: int, console: Console) -> Iterator[None]:
  """Serves the sweep's page until the context ends."""
  try:
    from dsmoe.sweeps import dashboard
  except ImportError as error:
    raise ValueError(f'--dashboard needs more: pip install ".[sweep]" ({error})') from error
  process, address = dashboard.start(workdir, _STORAGE.value, port)
  sayer(console)(f"the sweep's page is at {address}")
  try:
    yield
  finally:
    process.terminate()


if __name__ == "__main__":
  flags.mark_flags_as_required(["workdir"])
  output.run_script(main)
