"""Follows runs from the files in their workdirs, reading only what was appended.

A run's metrics.jsonl says how far it is, its config.json how far it goes, and goodput.jsonl, where it
has one, whether it was stopped.
"""

import contextlib
import datetime
import json
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import rich.box
import rich.cells
import rich.progress_bar
import rich.table
import rich.text
from etils import epath

from dsmoe.reporting import metrics

GOODPUT_FILE = "goodput.jsonl"
_MARK_BYTES = 256  # of what was read last: a file that was not only appended to differs there
_MOST = 1e18  # of a number in metrics.jsonl
_LONGEST_SECS = 1e10  # that is shown as a duration
_GAP = 2  # characters between two columns of the table
_BAR, _LONGEST_BAR = 4, 20  # characters of a bar, which must be as long, and at most
_LEAST = {"run": 12, "state": 10}  # characters of columns whose texts may take several lines
_FIRST_TO_GO = ("MFU", "tokens/s", "valid.")  # columns, where the terminal is narrow
_SILENT_SECS = 60.0  # beside three times what the lines of metrics.jsonl are apart


class Status(NamedTuple):
  """How a run is doing; None where its files do not say."""

  workdir: str
  state: str  # not there yet | starting | running | silent | stopped | finished | unreadable: why
  step: int | None = None
  num_steps: int | None = None
  loss: float | None = None
  validation_loss: float | None = None  # the latest
  tokens_per_sec: float | None = None
  mfu: float | None = None  # a fraction of 1
  dropped_rows: int = 0  # of all steps
  secs_left: float | None = None  # also None for a run that was stopped
  age_secs: float | None = None  # since its files were last written
  damaged_lines: int = 0  # of metrics.jsonl


class Tail:
  """The whole lines of a growing file, which a resumed run may also shorten."""

  def __init__(self, path: epath.Path):
    """Reads nothing yet; the file need not exist."""
    self.path = path
    self._offset, self._mark = 0, b""

  def read(self) -> tuple[list[bytes], bool]:
    """Returns the lines that are new, and whether they take the place of all before.

    A last line that has no end yet is left for the next time.
    """
    data = self._from(self._offset - len(self._mark))
    is_anew = not data.startswith(self._mark)
    if is_anew:
      self._offset, self._mark = 0, b""
      data = self._from(0)
    whole = data[len(self._mark) : data.rfind(b"\n") + 1]
    self._offset += len(whole)
    self._mark = (self._mark + whole)[-_MARK_BYTES:]
    return whole.splitlines(), is_anew

  def _from(self, offset: int) -> bytes:
    try:
      with self.path.open("rb") as file:
        file.seek(offset)
        return file.read()
    except FileNotFoundError:
      return b""


class Run:
  """One run, as its files have told so far."""

  def __init__(self, workdir: epath.PathLike):
    """Reads nothing yet; the folder need not exist."""
    self._name, self._workdir = str(workdir), epath.Path(workdir)
    self._metrics = Tail(self._workdir / metrics.METRICS_FILE)
    self._goodput = Tail(self._workdir / GOODPUT_FILE)
    self._forget()
    self._is_ended = False
    self._status = Status(self._name, "not there yet")

  def _forget(self) -> None:
    self._latest: dict[str, Any] = {}
    self._dropped = self._damaged = 0

  def poll(self, now: float) -> Status:
    """Reads what is new.

    Args:
      now: seconds since 1970.
    """
    try:
      self._status = self._read(now)
    except OSError as error:  # an object store may fail for a moment
      self._status = self._status._replace(state=f"unreadable: {error}")
    return self._status

  def _read(self, now: float) -> Status:
    if not self._workdir.exists():
      return Status(self._name, "not there yet")
    self._read_metrics()
    lines, _ = self._goodput.read()
    if lines:
      with contextlib.suppress(ValueError, AttributeError, RecursionError):
        self._is_ended = bool(json.loads(lines[-1]).get("ended"))
    num_steps, log_every_steps = self._limits()
    files = (tail.path for tail in (self._metrics, self._goodput) if tail.path.exists())
    written = max((file.stat().mtime for file in files), default=0)  # 0: not known
    age = max(now - written, 0.0) if written else None
    step, step_secs = self._latest.get("step"), self._latest.get("step_secs")
    state = self._state(num_steps, age, (step_secs or 0.0) * log_every_steps)
    left = None
    if step is not None and num_steps is not None and step_secs is not None and state != "stopped":
      left = max(num_steps - step, 0) * step_secs
    latest = self._latest.get
    return Status(
      self._name,
      state,
      step,
      num_steps,
      loss=latest("loss"),
      validation_loss=latest("validation_loss"),
      tokens_per_sec=latest("tokens_per_sec"),
      mfu=latest("mfu"),
      dropped_rows=self._dropped,
      secs_left=left,
      age_secs=age,
      damaged_lines=self._damaged,
    )

  def _read_metrics(self) -> None:
    lines, is_anew = self._metrics.read()
    if is_anew:
      self._forget()
    for line in lines:
      try:
        row = metrics.parse(line)
      except ValueError:
        self._damaged += 1
        continue
      numbers = {name: value for name, value in row.items() if _is_number(value)}
      self._dropped += numbers.get("dropped_rows", 0)
      self._latest |= numbers

  def _limits(self) -> tuple[int | None, int]:
    """Returns how many steps the run has, and how many are between two lines of its metrics."""
    wrong = (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError)
    with contextlib.suppress(*wrong):
      config = json.loads((self._workdir / "config.json").read_text())
      return int(config["num_steps"]), int(config["log"]["log_every_steps"])
    return None, 1

  def _state(self, num_steps: int | None, age: float | None, line_secs: float) -> str:
    step = self._latest.get("step")
    if num_steps is not None and step is not None and step >= num_steps:
      return "finished"
    if self._is_ended:
      return "stopped"
    if age is not None and age > _SILENT_SECS + 3 * line_secs:
      return "silent"
    return "starting" if step is None else "running"


def _is_number(value: Any) -> bool:
  """Whether a value is one that a run may have written: finite, and of no odd size."""
  return isinstance(value, int | float) and -_MOST < value < _MOST


def table(statuses: Sequence[Status], width: int) -> rich.table.Table:
  """Returns a table of runs, in their order; without columns that no run has.

  Where its `width`, in characters, is small, the bars become shorter and go; then names and states
  take several lines, and the columns of `_FIRST_TO_GO` go.
  """
  cells = [_cells(status) for status in statuses]
  shown = rich.table.Table(box=None, padding=(0, _GAP, 0, 0))
  titles = [title for title in cells[0] if any(row[title] != "" for row in cells)] if cells else []

  def room(least: dict[str, int]) -> int:
    """Returns the characters that are left beside the columns, of which some may be as narrow."""
    widths = {"": _BAR} | least
    for title in titles:
      if title not in widths:
        widths[title] = max(
          rich.cells.cell_len(text) for text in (title, *(r[title] for r in cells))
        )
    return width - sum(widths[title] + _GAP for title in titles)

  bar = min(_BAR + room({}), _LONGEST_BAR)
  for title in ("", *_FIRST_TO_GO):
    if title in titles and (bar < _BAR if title == "" else room(_LEAST) < 0):
      titles.remove(title)
  for title in titles:
    if title in _LEAST:
      shown.add_column(title, overflow="fold", min_width=_LEAST[title])
    elif title == "":
      shown.add_column(title, width=bar)
    else:
      shown.add_column(title, justify="right", no_wrap=True)
  for row in cells:
    texts = (row[title] for title in titles)  # of which none is rich's markup
    shown.add_row(*(rich.text.Text(text) if isinstance(text, str) else text for text in texts))
  return shown


def _cells(status: Status) -> dict[str, Any]:
  """Returns a row of the table by title, "" where nothing is known."""
  step, num_steps = status.step, status.num_steps
  bar: Any = ""
  if step is not None and num_steps:
    bar = rich.progress_bar.ProgressBar(num_steps, min(step, num_steps))
  return {
    "run": status.workdir,
    "state": _said(status),
    "step": "" if step is None else f"{step:,}/{_text(num_steps, '{:,}') or '?'}",
    "": bar,
    "loss": _text(status.loss, "{:.4f}"),
    "valid.": _text(status.validation_loss, "{:.4f}"),
    "tokens/s": _text(status.tokens_per_sec, "{:,.0f}"),
    "MFU": _text(status.mfu, "{:.1%}"),
    "left": _duration(status.secs_left) if status.secs_left else "",
    "dropped": _text(status.dropped_rows or None, "{:,}"),
  }


def _said(status: Status) -> str:
  state = status.state
  if status.age_secs is not None:
    before = "silent for " if state == "silent" else f"{state}, "
    after = "" if state == "silent" else " ago"
    state = f"{before}{_age(status.age_secs)}{after}"
  return f"{state}; {status.damaged_lines} damaged lines" if status.damaged_lines else state


def _age(secs: float) -> str:
  return f"{math.floor(secs)} s" if secs < 120 else _duration(secs)


def _text(value: Any, form: str) -> str:
  return "" if value is None else form.format(value)


def _duration(secs: float) -> str:
  return str(datetime.timedelta(seconds=round(min(secs, _LONGEST_SECS))))
