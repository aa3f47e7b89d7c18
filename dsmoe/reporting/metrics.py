"""Computes expert-load statistics, and writes metrics.jsonl and TensorBoard events.

L is the number of MoE layers. Everything here is NumPy on the host; in a run of several processes
only one of them writes.
"""

import collections
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath

from dsmoe.reporting.appended import AppendedFile

METRICS_FILE = "metrics.jsonl"


def load_statistics(counts_LE: np.ndarray) -> dict[str, np.ndarray]:
  """Measures how evenly each layer's tokens are spread over its experts.

  Args:
    counts_LE: integer [L, E], tokens sent to each expert in a step, summed over devices.

  Returns:
    A dict of arrays [L]. float64, NaN for a layer without tokens: `max_vio`, the largest load
    over the mean load, minus 1; `load_cv`, standard deviation over mean; `load_entropy`, of the
    distribution of tokens over experts, divided by ln E (1: uniform). int64: `dead_experts`,
    those without a token; `starved_experts`, those below 10% of the mean load, dead ones
    included.

  Raises:
    ValueError: if the counts are not integers [L, E] of at least 0, with E >= 1.

  Source: MaxVio is arXiv:2408.15664's.
  """
  counts_LE = _checked_counts(counts_LE)
  E = counts_LE.shape[1]
  total_L = counts_LE.sum(axis=1)
  mean_L = np.where(total_L > 0, total_L / E, np.nan)
  share_LE = counts_LE / (mean_L * E)[:, None]
  log_LE = np.log(share_LE, out=np.zeros_like(share_LE), where=share_LE > 0)
  entropy_L = -(share_LE * log_LE).sum(axis=1)
  return {
    "max_vio": counts_LE.max(axis=1) / mean_L - 1.0,
    "load_cv": counts_LE.std(axis=1) / mean_L,
    "load_entropy": entropy_L / np.log(E) if E > 1 else share_LE[:, 0],
    "dead_experts": (counts_LE == 0).sum(axis=1),
    "starved_experts": (10 * E * counts_LE < total_L[:, None]).sum(axis=1),
  }


def bias_range(router_bias_LE: np.ndarray) -> np.ndarray:
  """Returns float [L], the largest minus the smallest of each layer's biases, in score units."""
  return np.ptp(np.asarray(router_bias_LE), axis=1)


class RunningLoad:
  """Sums expert counts since the start of a run, or over the latest ones only."""

  def __init__(self, window: int | None = None):
    """Starts without counts.

    Args:
      window: how many of the latest `add`ed counts are summed, at least 1; None: all.
    """
    if window is not None and window < 1:
      raise ValueError(f"window must be None or at least 1, got {window}")
    self._latest: collections.deque[np.ndarray] = collections.deque()
    self._window = window
    self._total_LE: np.ndarray | None = None

  @classmethod
  def from_rows(cls, rows: Iterable[Mapping[str, Any]], window: int | None = None) -> "RunningLoad":
    """Rebuilds the sum from metrics lines, so that a resumed run continues it.

    Raises:
      ValueError: naming the line, for counts that are none or change their shape.
    """
    running = cls(window)
    for row in rows:
      if row.get("expert_counts"):
        try:
          running.add(np.asarray(row["expert_counts"]))
        except ValueError as error:
          raise ValueError(
            f"expert_counts of step {row['step']} in {METRICS_FILE} are damaged ({error}): delete "
            "that line, or the file if its curves are not needed"
          ) from error
    return running

  def add(self, counts_LE: np.ndarray) -> None:
    """Adds integer [L, E] counts, which must have the shape of those before."""
    counts_LE = _checked_counts(counts_LE)
    if self._total_LE is None:
      self._total_LE = np.zeros_like(counts_LE)
    if counts_LE.shape != self._total_LE.shape:
      raise ValueError(
        f"counts must keep their shape {self._total_LE.shape}, got {counts_LE.shape}"
      )
    self._total_LE = self._total_LE + counts_LE
    if self._window is not None:
      self._latest.append(counts_LE)
      if len(self._latest) > self._window:
        self._total_LE = self._total_LE - self._latest.popleft()

  def statistics(self) -> dict[str, np.ndarray]:
    """Returns `max_vio_running` and `dead_experts_running`, [L] each; {} before any counts."""
    if self._total_LE is None:
      return {}
    statistics = load_statistics(self._total_LE)
    return {f"{name}_running": statistics[name] for name in ("max_vio", "dead_experts")}


class MetricsWriter:
  """Appends to <workdir>/metrics.jsonl, and to <workdir>/tensorboard when asked to."""

  def __init__(self, workdir: epath.PathLike, tensorboard: bool, start_step: int = 0):
    """Opens the files and keeps their lines up to `start_step`.

    Later lines, which a resumed run writes again, and half a line of a killed run are removed, and
    so are the copies that killed runs and earlier versions left beside the file.

    Args:
      workdir: on disk or gs://; created if absent. To an object store the file is sent whole by
        `flush`, `close` and once a minute.
      tensorboard: whether to write TensorBoard events too.
      start_step: the step of the checkpoint that the run resumes from; 0 for a new run.

    Raises:
      ValueError: for a metrics.jsonl with a broken line; see `read_metrics`.
    """
    self._workdir, self._tensorboard = epath.Path(workdir), tensorboard
    self._workdir.mkdir(parents=True, exist_ok=True)
    self._open(start_step)

  def _open(self, start_step: int) -> None:
    _cut(self._workdir / METRICS_FILE, start_step)
    self._file = AppendedFile(self._workdir / METRICS_FILE)
    self._board = None
    if self._tensorboard:
      import tensorboardX  # here, since it imports torch where that is installed: seconds

      self._board = tensorboardX.SummaryWriter(
        os.fspath(self._workdir / "tensorboard"), purge_step=start_step + 1
      )

  def write(self, step: int, values: Mapping[str, Any]) -> None:
    """Writes one line, {"step": step, ...}.

    Args:
      step: optimizer steps made so far.
      values: numbers, None, or arrays or lists of up to two dimensions. What is not finite
        becomes null. TensorBoard gets the numbers, and one dimension as name/layer_00, ...

    Raises:
      ValueError: for a value of another kind, naming it.
    """
    line = {"step": int(step)}
    line |= {name: _plain(name, value) for name, value in values.items() if name != "step"}
    self._file.write(json.dumps(line, allow_nan=False))
    if self._board is not None:
      for name, value in line.items():
        numbers = {name: value}
        if isinstance(value, list):
          numbers = {f"{name}/layer_{i:02d}": item for i, item in enumerate(value)}
        for tag, number in numbers.items():
          if isinstance(number, (int, float)) and name != "step":
            self._board.add_scalar(tag, number, line["step"])

  def cut(self, step: int) -> list[dict[str, Any]]:
    """Removes the lines after `step`, whose steps are made again; returns the others."""
    self.close()
    self._open(step)
    return read_metrics(self._workdir)

  def flush(self) -> None:
    """Makes the lines written so far durable; call it before saving a checkpoint."""
    if self._board is not None:
      self._board.flush()
    self._file.flush()

  def close(self) -> None:
    """Flushes and closes the files."""
    self._file.close()
    if self._board is not None:
      self._board.close()

  def __enter__(self) -> "MetricsWriter":
    return self

  def __exit__(self, *_):
    self.close()


class NoMetrics(MetricsWriter):
  """In all processes of a run but the first, which writes: drops what it is given."""

  def __init__(self):
    """Opens nothing."""

  def write(self, step: int, values: Mapping[str, Any]) -> None:
    """Drops the line."""

  def cut(self, step: int) -> list[dict[str, Any]]:
    """Has no lines."""
    return []

  def flush(self) -> None:
    """Has nothing to write."""

  def close(self) -> None:
    """Has nothing to close."""


def iter_metrics(workdir: epath.PathLike) -> Iterator[dict[str, Any]]:
  """Yields what `read_metrics` returns, one line at a time."""
  for _, row in _lines(epath.Path(workdir) / METRICS_FILE):
    yield row


def read_metrics(workdir: epath.PathLike) -> list[dict[str, Any]]:
  """Reads <workdir>/metrics.jsonl; a last line cut short by a kill is left out.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: for any other line that is no JSON object with an integer "step" and numbers or
      lists, naming it.
  """
  return list(iter_metrics(workdir))


def validation_curve(row: Mapping[str, Any]) -> tuple[int | None, int | None]:
  """Returns what points of one validation curve share: their number of tokens, their rows' CRC-32.

  Either is None in lines of versions that did not write it.
  """
  return row.get("validation_tokens"), row.get("validation_checksum")


def _checked_counts(counts_LE: np.ndarray) -> np.ndarray:
  counts = np.asarray(counts_LE)
  if counts.ndim != 2 or counts.dtype.kind not in "iu" or not counts.shape[1]:
    raise ValueError(f"counts must be integers [L, E], got {counts.dtype} {counts.shape}")
  counts = counts.astype(np.int64)
  if (counts < 0).any():
    raise ValueError(f"counts must be at least 0, got {counts.min()}")
  return counts


def _plain(name: str, value: Any) -> Any:
  """Turns a number or array into what JSON holds; float32 keeps its own few digits."""
  if value is None:
    return None
  array = np.asarray(value)
  if array.dtype.kind in "OUSMmc" or array.ndim > 2:
    raise ValueError(
      f"{name} must be numbers of at most 2 dimensions, got {array.dtype} {array.shape}"
    )
  if array.dtype.kind in "biu":
    return array.tolist()
  if array.dtype != np.float64:
    array = array.astype(np.float32).astype("U").astype(np.float64)
  return np.where(np.isfinite(array), array, np.array(None)).tolist()


def parse(line: bytes) -> dict[str, Any]:
  """Returns the values of a line.

  Raises:
    ValueError: for what is no JSON object with an integer "step" and numbers or lists.
  """
  try:
    row = json.loads(line)
  except RecursionError as error:
    raise ValueError(str(error)) from error
  if not isinstance(row, dict) or type(row.get("step")) is not int:
    raise ValueError("no object with an integer step")
  if odd := [name for name, value in row.items() if isinstance(value, str | dict)]:
    raise ValueError(f"{odd[0]} is neither a number nor a list of numbers")
  return row


def _lines(path: epath.Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
  """Yields each line with its value, but not a last one cut short."""
  with path.open("rb") as file:
    for number, line in enumerate(file, 1):
      try:
        row = parse(line)
      except ValueError as error:
        if not any(rest.strip() for rest in file):  # the last one, whether or not it was ended
          return
        raise ValueError(
          f"{path}, line {number} must be a JSON object with a step, it is damaged ({error}; "
          f"{line[:80]!r}): delete that line, or the file if its curves are not needed"
        ) from error
      yield line, row


def _cut(path: epath.Path, start_step: int) -> None:
  """Keeps only whole lines up to start_step, and deletes what killed runs left beside the file."""
  if not path.exists():
    return
  temporary = path.with_name(f"{path.name}.tmp")
  with temporary.open("wb") as file:
    for line, row in _lines(path):
      if row["step"] <= start_step:
        file.write(line.rstrip(b"\n") + b"\n")
  temporary.replace(path)
  for left in path.parent.iterdir():
    if left.name.startswith((f"{path.name}.before_step_", f"{path.name}.tmp")):
      left.unlink()
