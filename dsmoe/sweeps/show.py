"""The table of a sweep's trials."""

from collections.abc import Mapping

import rich.console
import rich.text

from dsmoe.sweeps import dependent, live, sentences
from dsmoe.sweeps.progress import Progress
from dsmoe.sweeps.results import Sweep, Trial

_MAX_ROWS = 40
_ORDER = ("complete", "running", "interrupted", "pruned", "failed", "waiting")


def table(
  sweep: Sweep, progress: Mapping[int, Progress], max_rows: int = _MAX_ROWS
) -> rich.console.RenderableType:
  """Returns the trials as a table: complete ones by their loss, then the others by number.

  Below it stand how many there are of each state, and why trials failed or wait.

  Args:
    sweep: see `results.read`.
    progress: of trials that are not finished, see `progress.Follower`.
    max_rows: of the table.
  """
  sweep, multiples = dependent.without(sweep)
  ordered = sorted(sweep.trials, key=_order)
  names = live.short_names([field for field in sweep.fields if field != "seed"])
  settings = [f"{trial.number}: {live.setting_of(trial, names)}" for trial in ordered[:max_rows]]
  made = live.table_of(("trial", "seed", "state", "step", "loss", "secs"), settings)
  for trial, setting in zip(ordered, settings):
    found = progress.get(trial.number)
    loss = "" if trial.value is None else sentences.nats(trial.value)
    steps, loss = (found.steps, found.loss) if found and trial.value is None else ("", loss)
    secs = f"{trial.seconds:.0f}" if trial.seconds else ""
    made.add_row(rich.text.Text(setting), str(trial.seed), trial.state, steps, loss, secs)
  below = [f"and {len(ordered) - max_rows} more trials"] if len(ordered) > max_rows else []
  below += [
    f"{live.heading(sweep, progress)}; the loss is the {sweep.objective} of complete trials, and of "
    "others the last one",
    *live.notes(ordered[:max_rows], progress),
    *live.reasons(sweep, progress),
    *multiples,
  ]
  return rich.console.Group(made, *map(rich.text.Text, below))


def _order(trial: Trial) -> tuple[int, float, int]:
  value = 0.0 if trial.value is None else trial.value
  return _ORDER.index(trial.state), value, trial.number
