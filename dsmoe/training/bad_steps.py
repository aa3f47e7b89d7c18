"""Which steps are bad, and what follows: the run stops, skips the step, or goes back.

A step is bad when its loss or its gradient is not finite or, with `recovery.spike_deviations`, when
the loss or the gradient's norm is a spike: more standard deviations above its mean over the latest
steps. The step itself decides, on the devices: the limits are numbers that the host gives it. As a
step is dispatched before the one before it is fetched, the window ends two steps before.

Everything here is computed from metrics that all processes have alike, so that they decide alike.

Sources: the rule, a window of 128 steps and 6 deviations are those of OLMo-core's
`SkipStepOptimizer` (github.com/allenai/OLMo-core), which skips a spike but counts its values into
the window, as is done here. Going back and skipping 200 to 500 batches is PaLM's (arXiv:2204.02311,
section 5.1).
"""

import collections
import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from dsmoe.config.recovery import RecoveryConfig
from dsmoe.training.train_step import Gate

RECENT = "recent_steps"  # under which the window is saved beside the position in the data
COUNTS = "bad_steps"  # and the counts


@dataclasses.dataclass
class Counts:
  """What a run has skipped, and how often it went back, over all its starts."""

  skipped: int = 0
  skipped_in_a_row: int = 0
  returns: int = 0
  returns_in_a_row: int = 0  # to the same checkpoint
  went_back_to: int = -1  # its step


class BadSteps:
  """Judges the steps of a run, in order."""

  def __init__(self, config: RecoveryConfig, saved: Mapping[str, Any] | None = None):
    """Begins with the window and the counts that another start has saved.

    Args:
      config: of the run.
      saved: see `to_dict`; other items in it are not read.
    """
    saved = saved or {}
    self._config = config
    self._counts = Counts(**saved.get(COUNTS, {}))
    window = config.spike_window_steps + 1  # the latest step is in no limit yet
    self._recent: collections.deque = collections.deque(maxlen=window)
    self.restart(saved)

  def gate(self, step: int) -> Gate:
    """Returns what `step`, counted from 1, must meet; the one two before it must have been judged."""
    deviations, window = self._config.spike_deviations, self._config.spike_window_steps
    known = [values for number, *values in self._recent if number <= step - 2][-window:]
    limits = np.full(2, np.inf)
    if deviations and len(known) >= window // 2:
      limits = np.mean(known, axis=0) + deviations * np.std(known, axis=0, ddof=1)
    return Gate(np.int32(step - 1), *limits.astype(np.float32))

  def judge(self, step: int, host_metrics: dict) -> str | None:
    """Returns None for a good step; for a bad one "stop", "skip" or "rewind".

    Args:
      step: its number; each is judged once, in order.
      host_metrics: of the train step, as NumPy arrays.
    """
    values = float(host_metrics["losses"].total), float(host_metrics["grad_norm"])
    if self._config.spike_deviations and host_metrics["finite"]:
      self._recent.append((step, *values))
    counts = self._counts
    if self._config.bad_step == "skip":
      counts.skipped_in_a_row = 0 if host_metrics["is_made"] else counts.skipped_in_a_row + 1
      counts.skipped += not host_metrics["is_made"]
    if host_metrics["is_made"]:
      return None
    if self._config.bad_step == "skip" and counts.skipped_in_a_row > self._config.max_in_a_row:
      return "stop"
    return self._config.bad_step

  def goes_back(self, step: int) -> bool:
    """Whether the run may go back to a checkpoint: `max_in_a_row` times to the same one."""
    counts = self._counts
    in_a_row = counts.returns_in_a_row + 1 if step == counts.went_back_to else 1
    if in_a_row > self._config.max_in_a_row:
      return False
    counts.returns_in_a_row, counts.went_back_to = in_a_row, step
    counts.returns += 1
    return True

  def restart(self, saved: Mapping[str, Any]) -> None:
    """Takes the window, not the counts, that was saved with the checkpoint the run goes back to."""
    self._recent.clear()
    self._recent.extend(tuple(values) for values in saved.get(RECENT, ()))

  def reason(self, step: int, host_metrics: dict, gate: Gate) -> str:
    """Returns the sentence, without its end, that tells what is wrong with a bad step."""
    found = (
      ("loss", host_metrics["losses"].total, gate.max_loss),
      ("gradient norm", host_metrics["grad_norm"], gate.max_grad_norm),
    )
    if not host_metrics["finite"]:
      bad = [f"{name} ({value})" for name, value, _ in found if not np.isfinite(value)]
      return f"{' and '.join(bad)} must be finite, at step {step}"
    bad = [
      f"{name} ({value}) must be at most {most}" for name, value, most in found if value > most
    ]
    return (
      f"{' and '.join(bad)}, {self._config.spike_deviations:g} standard deviations above the mean "
      f"of the latest steps, at step {step}"
    )

  def skipped(self) -> str:
    """Returns what has happened to the bad step that was judged last, for the line of its reason."""
    counts, most = self._counts, self._config.max_in_a_row
    return (
      f"skipped ({counts.skipped} so far, {counts.skipped_in_a_row} of at most {most} in a row)"
    )

  def went_back(self) -> str:
    """Returns where the run has gone back to, likewise."""
    counts, most = self._counts, self._config.max_in_a_row
    returns = f"{counts.returns} return{'s' * (counts.returns > 1)} so far"
    in_a_row = f"{counts.returns_in_a_row} of at most {most} to this checkpoint"
    return f"back to step {counts.went_back_to} ({returns}, {in_a_row})"

  def why_stopped(self) -> str:
    """Returns why a bad step ends the run, and what else the config could say."""
    counts, most = self._counts, self._config.max_in_a_row
    if self._config.bad_step == "skip":
      return (
        f"{counts.skipped_in_a_row} bad steps in a row are more than recovery.max_in_a_row ({most})"
      )
    if self._config.bad_step == "rewind":
      times = f"recovery.max_in_a_row ({most}) times"
      return f"the run has gone back to step {counts.went_back_to} {times}"
    return (
      "with config.recovery.bad_step=skip a run passes over such a step, with rewind it goes back to "
      "its newest checkpoint and on after the bad batch"
    )

  def to_dict(self) -> dict[str, Any]:
    """Returns the window and the counts as values of JSON; {} where there is nothing to tell."""
    saved: dict[str, Any] = {}
    if self._recent:
      saved[RECENT] = [list(values) for values in self._recent]
    if self._counts != Counts():
      saved[COUNTS] = dataclasses.asdict(self._counts)
    return saved
