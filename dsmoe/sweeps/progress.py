"""How far the trials of a sweep are, from the files in their workdirs."""

import contextlib
import json
import math
from typing import NamedTuple

from dsmoe.reporting import metrics, watch
from dsmoe.sweeps import sentences
from dsmoe.sweeps.results import Sweep, Trial

TRAINING_MARK = "*"
TRAINING_NOTE = "* of training: there is no validation loss yet"
_FOLLOWED = ("running", "interrupted", "waiting", "pruned")


class Progress(NamedTuple):
  """How far a trial is."""

  curve: tuple[tuple[int, float], ...]  # (step, validation loss), of one set of validation rows
  status: watch.Status

  @property
  def steps(self) -> str:
    """The steps that were made, of those that there will be."""
    step, num_steps = self.status.step, self.status.num_steps
    return "" if step is None else f"{step:,}/{'?' if num_steps is None else f'{num_steps:,}'}"

  @property
  def loss(self) -> str:
    """The last validation loss; before there is one the last training loss, with a mark."""
    if self.curve:
      return sentences.nats(self.curve[-1][1])
    return "" if self.status.loss is None else f"{sentences.nats(self.status.loss)}{TRAINING_MARK}"


class Follower:
  """Reads what is new in the files of a sweep's running trials."""

  def __init__(self):
    """Reads nothing yet."""
    self._runs: dict[int, tuple[watch.Run, watch.Tail]] = {}
    self._found: dict[int, Progress] = {}
    self._rows: dict[int, tuple[str, list[tuple[int, float]]]] = {}

  def poll(self, sweep: Sweep, now: float) -> dict[int, Progress]:
    """Returns how far trials are that are not finished, and where pruned ones ended, by their number.

    Args:
      sweep: as it is now.
      now: seconds since 1970.
    """
    for trial in sweep.trials:
      is_new = trial.state == "pruned" and trial.number not in self._found
      was_handed_back = trial.state == "waiting" and trial.seconds
      if trial.state in ("running", "interrupted") or was_handed_back or is_new:
        self._found[trial.number] = self._read(trial, now)
    ended = {trial.number for trial in sweep.trials if trial.state not in _FOLLOWED}
    for number in ended & self._found.keys():
      for held in (self._found, self._runs, self._rows):
        held.pop(number, None)
    return dict(self._found)

  def _read(self, trial: Trial, now: float) -> Progress:
    if trial.number not in self._runs:
      tail = watch.Tail(trial.workdir / metrics.METRICS_FILE)
      self._runs[trial.number] = (watch.Run(trial.workdir), tail)
    run, tail = self._runs[trial.number]
    with contextlib.suppress(OSError):  # an object store may fail for a moment
      lines, is_anew = tail.read()
      if is_anew:
        self._rows.pop(trial.number, None)
      for line in lines:
        self._add(trial.number, line)
    _, curve = self._rows.get(trial.number, ("", []))
    return Progress(tuple(curve), run.poll(now))

  def _add(self, number: int, line: bytes) -> None:
    """Takes in a line of metrics; a curve of other validation rows begins anew."""
    with contextlib.suppress(ValueError, TypeError):
      row = metrics.parse(line)
      if "validation_loss" not in row:
        return
      rows = json.dumps(metrics.validation_curve(row))
      value = math.nan if row["validation_loss"] is None else float(row["validation_loss"])
      known, curve = self._rows.setdefault(number, (rows, []))
      if known != rows:
        curve = []
      self._rows[number] = (rows, [*curve, (row["step"], value)])
