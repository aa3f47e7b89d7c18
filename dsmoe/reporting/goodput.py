"""The goodput log: what a run's wall time was spent on, over all its starts.

Every process appends to a file of its own in the workdir, the first one to `goodput.jsonl`, process
n to `goodput.<n>.jsonl`. A line accounts for the time since the line before it:

  {"step": 40, "time": 1700000000.0, "secs": {"step": 12.5, "save": 0.5}}

`step` is the number of steps made, `time` is in seconds since 1970, `secs` are by phase (PHASES).
The first line of a start has more fields: `began`, when its process was started; `resumed_from`, the
step of its checkpoint, 0 for a new run; `processes`, how many there are; `step_flops`, the model's
FLOPs of a step, which older versions did not write. A line
with `resumed_from` alone says that the run has gone back to that checkpoint, and how long that took.
`ended` marks the last line of a start that was not killed. What was spent on steps after
`resumed_from` is lost: they are made again.
"""

import collections
import contextlib
import datetime
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
from etils import epath

from dsmoe.reporting.appended import AppendedFile

PHASES = {
  "step": "stepping",
  "data_stall": "stalled for data",
  "save": "saving",
  "evaluate": "evaluating",
  "compile": "compiling",
  "data": "preparing data",
  "start_up": "starting up",
  "paused": "paused by the caller",
}
_SHOWN_SECS = 0.5  # a shorter time would be a row of 0:00:00
_LOST = {
  "made_again": "lost to going back, and to steps made again",
  "down": "lost between a kill and the next start",
  "stopped": "between a stop and the next start",
}
LABELS = PHASES | _LOST
HELD = (*PHASES, "made_again")  # the times in which a run holds its devices
_MOST_SECS = 1e12  # no time of a run, since 1970 either, is longer
T = TypeVar("T")


def file_of(workdir: epath.PathLike, process: int) -> epath.Path:
  """Returns the path of a process's file."""
  return epath.Path(workdir) / (f"goodput.{process}.jsonl" if process else "goodput.jsonl")


class Goodput:
  """Accounts for one start's time: at any moment the process is in one of PHASES.

  Attributes:
    path: of the file.
    phase: the name of the present one, `start_up` at first.
    step: the last step that was made, as `beat` was told.
    beat_time: when a phase or a step was last completed, by `clock`.
  """

  def __init__(
    self,
    path: epath.Path,
    began: float | None = None,
    clock: Callable[[], float] = time.perf_counter,
    now: Callable[[], float] = time.time,
  ):
    """Begins to count; the file is opened by `start`.

    Args:
      path: of the file; see `file_of`.
      began: when the process was started, in seconds since 1970; None: now.
      clock: seconds that only grow.
      now: seconds since 1970.
    """
    self.clock, self.phase, self.step = clock, "start_up", 0
    self.beat_time = self._charged_time = clock()
    self._secs: dict[str, float] = dict.fromkeys(PHASES, 0.0)  # since the last line
    self._totals = dict(self._secs)  # of this start's lines
    self._began = now() if began is None else began
    self._secs["start_up"] = max(now() - self._began, 0.0)
    self.path = path
    self._file: AppendedFile | None = None

  def enter(self, phase: str) -> None:
    """Ends the present phase and begins another."""
    self.beat_time = self.clock()
    self._secs[self.phase] += self.beat_time - self._charged_time
    self._charged_time, self.phase = self.beat_time, phase

  @contextlib.contextmanager
  def during(self, phase: str) -> Iterator[None]:
    """Is in another phase until the context ends."""
    before = self.phase
    self.enter(phase)
    try:
      yield
    finally:
      self.enter(before)

  def beat(self, step: int) -> None:
    """Notes that the run goes on, after `step` steps."""
    self.step, self.beat_time = step, self.clock()

  def beats(self, items: Iterable[T]) -> Iterator[T]:
    """Yields the items; each of them shows that the run goes on."""
    for item in items:
      self.beat(self.step)
      yield item

  def stalled(self, asked: float, got: float, idle_since: float) -> None:
    """Accounts for the wait for a batch, so far as the device had nothing to do meanwhile.

    Args:
      asked, got: when the batch was asked for and when it was there, by `clock`.
      idle_since: when the device had done the last step that was dispatched.
    """
    self.enter(self.phase)
    secs = max(got - max(asked, idle_since), 0.0)
    self._secs[self.phase] -= secs
    self._secs["data_stall"] += secs

  def start(self, step: int, num_processes: int, **fields: Any) -> None:
    """Opens the file and writes the first line of this start.

    Args:
      step: of the checkpoint that the run resumes from; 0 for a new run.
      num_processes: of the run.
      **fields: `step_flops`, the model's FLOPs of a step, all devices together.
    """
    _mend(self.path)
    self._file = AppendedFile(self.path)
    self.write(step, began=self._began, resumed_from=step, processes=num_processes, **fields)

  def write(self, step: int, **fields: Any) -> None:
    """Writes a line about the time since the one before; nothing before `start`."""
    self.enter(self.phase)
    self.step = step
    if self._file is None:
      return
    secs, self._secs = self._secs, dict.fromkeys(PHASES, 0.0)
    for name in PHASES:
      self._totals[name] += secs[name]
    line = {"step": step, "time": self._began + sum(self._totals.values()), **fields}
    line["secs"] = {name: value for name, value in secs.items() if value}
    self._file.write(json.dumps(line))

  @property
  def fraction(self) -> float:
    """The share of this start's time so far that was spent stepping."""
    self.enter(self.phase)
    secs = {name: self._totals[name] + self._secs[name] for name in PHASES}
    return secs["step"] / (sum(secs.values()) or 1.0)

  @property
  def seconds(self) -> float:
    """Those of this start so far."""
    self.enter(self.phase)
    return sum(self._totals.values()) + sum(self._secs.values())

  def flush(self) -> None:
    """Makes the lines written so far durable."""
    if self._file is not None:
      self._file.flush()

  def __enter__(self) -> "Goodput":
    return self

  def __exit__(self, *_):
    """Writes the last line: this start was not killed."""
    if self._file is not None:
      self.write(self.step, ended=True)
      self._file.close()


class Account(NamedTuple):
  """Where the wall time of a run went, from its first start to the last line."""

  secs: dict[str, float]  # by PHASES, and `made_again`, `down`, `stopped`; their sum is all of it
  num_starts: int


def read(path: epath.Path) -> list[dict[str, Any]]:
  """Reads a process's file; a last line cut short by a kill is left out.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: for another line that is none of a goodput log, naming it.
  """
  texts, lines = path.read_bytes().splitlines(), []
  for number, text in enumerate(texts, 1):
    try:
      lines.append(_parse(text))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
      if number == len(texts):
        break
      raise ValueError(
        f"{path}, line {number} must have a step, a time and secs by phase, it is damaged "
        f"({error!r}; {text[:80]!r}): delete that line, or the file if its account is not needed"
      ) from error
  return lines


def _parse(text: bytes) -> dict[str, Any]:
  """Returns the fields of a line; raises an error of some kind for what no run writes."""
  try:
    line = json.loads(text)
  except RecursionError as error:
    raise ValueError(str(error)) from error
  counts = {name: line[name] for name in ("resumed_from", "processes") if name in line}
  numbers = {"time": line["time"], "began": line.get("began", 0.0), **line["secs"]}
  for name, value in (counts | {"step": line["step"]}).items():
    if type(value) is not int or value < 0:
      raise ValueError(f"{name} {value!r} is no count")
  for name, value in numbers.items():
    if type(value) not in (int, float) or not abs(value) < _MOST_SECS:
      raise ValueError(f"{name} {value!r} is no number")
  if type(value := line.get("step_flops", 0.0)) not in (int, float) or not 0 <= value < np.inf:
    raise ValueError(f"step_flops {value!r} is no number of FLOPs")
  if unknown := set(line["secs"]) - set(PHASES):
    raise ValueError(f"{min(unknown)!r} is no phase")
  return line


def account(lines: Iterable[Mapping[str, Any]]) -> Account:
  """Adds the lines of the first process up, of all starts."""
  kept: list[Mapping[str, Any]] = []
  secs = dict.fromkeys((*PHASES, *_LOST), 0.0)
  num_starts, previous = 0, None
  for line in lines:
    if "resumed_from" in line:
      for done in kept:
        if done["step"] > line["resumed_from"]:
          secs["made_again"] += sum(done["secs"].values())
      kept = [done for done in kept if done["step"] <= line["resumed_from"]]
    if "began" in line:
      num_starts += 1
      if previous is not None:
        gap = max(line["began"] - previous["time"], 0.0)
        secs["stopped" if previous.get("ended") else "down"] += gap
    if "resumed_from" in line and "began" not in line:
      secs["made_again"] += sum(line["secs"].values())
    else:
      kept.append(line)
    previous = line
  for line in kept:
    for name, value in line["secs"].items():
      secs[name] += value
  return Account(secs, num_starts)


def flops(lines: Iterable[Mapping[str, Any]]) -> tuple[float, float]:
  """Adds the model's FLOPs up that all starts have spent on steps.

  Steps that were made before a kill and not logged yet are not known. Starts of versions that did
  not write `step_flops` are counted with those of the next start that did.

  Args:
    lines: of the first process.

  Returns:
    Of the steps that the run keeps, and of those that were lost and are made again.
  """
  kept: list[tuple[int, int, int]] = []  # steps after which and up to which; number of the start
  step_flops: list[float | None] = []
  lost: list[tuple[int, int]] = []  # how many steps, number of the start
  step = 0
  for line in lines:
    if "began" in line:
      step_flops.append(line.get("step_flops"))
    if (first := line.get("resumed_from")) is not None:
      lost += [(last - max(after, first), start) for after, last, start in kept if last > first]
      kept = [(after, min(last, first), start) for after, last, start in kept if after < first]
    elif line["step"] > step:
      kept.append((step, line["step"], len(step_flops) - 1))
    step = line["step"]
  for number in reversed(range(len(step_flops) - 1)):
    step_flops[number] = step_flops[number] or step_flops[number + 1]
  return (
    sum((last - after) * (step_flops[start] or 0.0) for after, last, start in kept),
    sum(count * (step_flops[start] or 0.0) for count, start in lost),
  )


def slowest(logs: Sequence[Iterable[Mapping[str, Any]]]) -> list[tuple[int, int, float]]:
  """Finds at each step of the last start who kept the others waiting.

  A process that is late to dispatch a step holds the collectives of all. What it was late by is the
  time it did not spend stepping: stalled for data, saving, evaluating. A device that computes more
  slowly than the others is not told from them: their steps wait for each other and take equally long.

  Args:
    logs: the lines of every process, in the order of their numbers.

  Returns:
    (step, process, seconds behind the fastest) for each line's step that all of them have.
  """
  own: list[dict[int, float]] = []
  for lines in logs:
    others: dict[int, float] = collections.defaultdict(float)
    for line in lines:
      if "began" in line:
        others.clear()
      else:
        others[line["step"]] += sum(s for name, s in line["secs"].items() if name != "step")
    own.append(others)
  found = []
  for step in sorted(set.intersection(*(set(others) for others in own))):
    secs = np.array([others[step] for others in own])
    found.append((step, int(secs.argmax()), float(np.ptp(secs))))
  return found


def rows(workdir: epath.PathLike) -> list[tuple[str, str]]:
  """Returns a run's account as (name, value) pairs for `progress.final_table`; [] without a log."""
  path = file_of(workdir, 0)
  if not path.exists() or not (lines := read(path)):
    return []
  secs, num_starts = account(lines)
  total = sum(secs.values())
  pairs = [("wall time, starts", f"{_duration(total)}, {num_starts}")]
  for name, label in (PHASES | _LOST).items():
    if secs[name] >= _SHOWN_SECS:
      pairs.append((f"  {label}", f"{_duration(secs[name])}, {secs[name] / total:.1%}"))
  count = next((line["processes"] for line in reversed(lines) if "processes" in line), 1)
  others = [file_of(workdir, process) for process in range(1, count)]
  if others and all(other.exists() for other in others):
    found = slowest([lines, *map(read, others)])
    latest = collections.Counter(process for _, process, behind in found if behind > 0)
    if latest:
      [(process, times)] = latest.most_common(1)
      behind = sum(secs for _, who, secs in found if who == process)
      pairs.append(
        (
          "slowest process, last start",
          f"{process}, at {times} of {len(found)} log points, {behind:.1f} s behind",
        )
      )
  return pairs


def _duration(secs: float) -> str:
  return str(datetime.timedelta(seconds=round(secs)))


def _mend(path: epath.Path) -> None:
  """Removes a last line that was cut short by a kill, so that the next one can follow."""
  if path.exists() and not (content := path.read_bytes()).endswith(b"\n"):
    path.write_bytes(content[: content.rfind(b"\n") + 1])
