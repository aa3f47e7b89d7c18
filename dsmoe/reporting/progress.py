"""Shows a run's progress in the terminal, and a table at its end.

Without a terminal (in a log file or a batch job) both are plain text.
"""

import collections
import datetime
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import rich.box
import rich.console
import rich.progress
import rich.table
import rich.text

from dsmoe.reporting.metrics import validation_curve

# What is said of counts above zero: of a step, "" where a sentence of its own is, and of all steps.
_COUNTS = {
  "dropped_rows": ("rows dropped", "rows dropped for want of room, all steps"),
  "fallbacks": (
    "layers computed by the exact path",
    "layers computed by the exact path for want of room, all steps",
  ),
  "skipped_steps": ("", "bad steps skipped"),
  "rewinds": ("", "returns to a checkpoint"),
}


class Progress:
  """A live line with a bar on a terminal; elsewhere a plain line for each update."""

  def __init__(
    self,
    total_steps: int,
    start_step: int = 0,
    console: rich.console.Console | None = None,
    is_quiet: bool = False,
  ):
    """Prepares the display; `console` is standard output unless given, and unused if `is_quiet`."""
    if console is None:  # without force_terminal, variables such as FORCE_COLOR decide
      terminal = None if sys.stdout.isatty() else False
      console = rich.console.Console(force_terminal=terminal, quiet=is_quiet)
    self._console = console
    self._total_steps = total_steps
    self._latest: dict[str, Any] = {}
    self._bar = None
    if console.is_terminal and not console.is_dumb_terminal:
      self._bar = rich.progress.Progress(
        rich.progress.TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
        rich.progress.BarColumn(bar_width=None),
        rich.progress.TextColumn("{task.fields[text]}", markup=False),
        console=console,
        expand=True,
      )
      self._task = self._bar.add_task("", total=total_steps, completed=start_step, text="")

  def __enter__(self) -> "Progress":
    if self._bar is not None:
      self._bar.start()
    return self

  def __exit__(self, *_):
    if self._bar is not None:
      self._bar.stop()

  def update(self, step: int, metrics: Mapping[str, Any]) -> None:
    """Shows a metrics line, a validation loss above the bar; {} only moves the bar.

    Args:
      step: optimizer steps made so far.
      metrics: any of loss, validation_loss, validation_bits_per_byte, the same two of the whole set
        (whole_...), dropped_rows and fallbacks, shown above zero, tokens_per_sec,
        mfu and goodput (fractions of 1, or None), gflops_per_sec and step_secs, which gives the time
        left.
    """
    steps_left = self._total_steps - step
    parts = _parts(metrics, steps_left)
    if parts and (self._bar is None or "validation_loss" in metrics):
      self.print("  ".join([f"step {step}/{self._total_steps}", *parts]))
    if self._bar is not None:
      self._latest |= {k: v for k, v in metrics.items() if "validation" not in k}
      text = "  ".join(_parts(self._latest, steps_left))
      self._bar.update(self._task, completed=step, text=text)

  def print(self, *objects: Any) -> None:
    """Prints text (with visible control characters) or rich's own objects above the bar."""
    for item in objects:
      text = isinstance(item, str)  # a table must keep its own wrapping
      self._console.print(
        _printable(item) if text else item,
        markup=False,
        highlight=False,
        emoji=False,
        soft_wrap=text,
      )


def summary(rows: Iterable[Mapping[str, Any]]) -> list[tuple[str, str]]:
  """Condenses metrics lines into (name, value) pairs for `final_table`.

  The best validation loss is that of the last curve: of points on the same rows as the last one.
  """
  last: dict[str, Any] = {}
  speeds: dict[str, list[float]] = collections.defaultdict(list)
  best_loss, best_step, curve = np.inf, 0, None
  counts = dict.fromkeys(_COUNTS, 0)
  for row in rows:
    last |= row
    for name in counts:
      counts[name] += row.get(name) or 0
    for name in ("tokens_per_sec", "mfu", "gflops_per_sec"):
      if row.get(name) is not None:
        speeds[name].append(row[name])
    if row.get("validation_loss") is not None:
      if validation_curve(row) != curve:
        best_loss, curve = np.inf, validation_curve(row)
      if row["validation_loss"] < best_loss:
        best_loss, best_step = row["validation_loss"], row["step"]

  if last.get("whole_validation_loss") == last.get("validation_loss"):  # the curve is of all of it
    for name in ("validation_loss", "validation_bits_per_byte"):
      last.pop(name, None)
  pairs = []
  for name, label, form in (
    ("step", "steps", "{:,}"),
    ("tokens", "tokens seen", "{:,}"),
    ("loss", "train loss", "{:.4f}"),
    ("cross_entropy", "train cross-entropy (nats/token)", "{:.4f}"),
    ("mtp_loss", "MTP loss (nats/token)", "{:.4f}"),
    ("whole_validation_loss", "validation loss, whole set (nats/token)", "{:.4f}"),
    ("whole_validation_bits_per_byte", "validation bits per byte, whole set", "{:.4f}"),
    ("validation_loss", "validation loss, log.eval_batches (nats/token)", "{:.4f}"),
    ("validation_bits_per_byte", "validation bits per byte, log.eval_batches", "{:.4f}"),
  ):
    # A model without multi-token prediction logs zeros.
    if last.get(name) is not None and (name != "mtp_loss" or last[name]):
      pairs.append((label, form.format(last[name])))
  if np.isfinite(best_loss):
    pairs.append(("best validation loss", f"{best_loss:.4f} at step {best_step:,}"))
  for name, label, form in (
    ("tokens_per_sec", "tokens/s, median", "{:,.0f}"),
    ("mfu", "MFU, median", "{:.1%}"),
    ("gflops_per_sec", "GFLOP/s, median", "{:,.1f}"),
  ):
    if speeds[name]:
      pairs.append((label, form.format(np.median(speeds[name]))))
  for name, label in (
    ("max_vio", "MaxVio"),
    ("max_vio_running", "MaxVio, running"),
    ("dead_experts", "dead experts"),
    ("bias_range", "range of the router's biases"),
    ("groups_per_token", "groups a token"),
  ):
    values = [v for v in last.get(name) or [] if v is not None]
    if values:
      pairs.append((f"{label}, mean (largest) layer", f"{np.mean(values):.3g} ({max(values):.3g})"))
  for name, (_, of_all) in _COUNTS.items():
    if counts[name]:
      pairs.append((of_all, f"{counts[name]:,}"))
  return pairs


def final_table(rows: Sequence[tuple[str, str]], title: str | None = None) -> rich.table.Table:
  """Lays (name, value) pairs out as a table to print, on a terminal or off it."""
  heading = None if title is None else rich.text.Text(title)
  table = rich.table.Table(title=heading, show_header=False, box=rich.box.SIMPLE)
  table.add_column("name")
  table.add_column("value", justify="right", overflow="fold")
  for name, value in rows:
    table.add_row(rich.text.Text(name), rich.text.Text(value))
  return table


def _printable(text: str) -> str:
  return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


def _parts(metrics: Mapping[str, Any], steps_left: int) -> list[str]:
  parts = []
  for name, form in (
    ("loss", "loss {:.4f}"),
    ("validation_loss", "validation loss {:.4f}"),
    ("validation_bits_per_byte", "{:.4f} bits/byte"),
    ("whole_validation_loss", "whole set {:.4f}"),
    ("whole_validation_bits_per_byte", "{:.4f} bits/byte"),
    ("tokens_per_sec", "{:,.0f} tokens/s"),
    ("mfu", "MFU {:.1%}"),
  ):
    curve = name.removeprefix("whole_")
    said = curve != name and metrics.get(curve) == metrics.get(name)  # the curve is of all of it
    if metrics.get(name) is not None and not said:
      parts.append(form.format(metrics[name]))
  for name, (what, _) in _COUNTS.items():
    if what and metrics.get(name):
      parts.append(f"{metrics[name]:,} {what}")
  if metrics.get("mfu") is None and metrics.get("gflops_per_sec") is not None:
    parts.append(f"{metrics['gflops_per_sec']:,.1f} GFLOP/s")
  if metrics.get("goodput") is not None:
    parts.append(f"goodput {metrics['goodput']:.0%}")
  if metrics.get("step_secs") is not None:
    left = datetime.timedelta(seconds=round(max(steps_left, 0) * float(metrics["step_secs"])))
    parts.append(f"{left} left")
  return parts
