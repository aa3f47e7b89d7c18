"""What a run came to: `Result` in a program, and result.json in the workdir, see `Recorded`."""

import json
import math
import time
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
from etils import epath

from dsmoe.reporting import goodput as goodput_lib

RESULT_FILE = "result.json"
FORMAT = 1


class Point(NamedTuple):
  """A point of the validation curve; losses in nats a token, NaN where one is not finite.

  The points of one curve have the same `checksum`: their losses are of the same rows.
  """

  step: int  # optimizer steps made
  tokens: int  # of training data that these steps have read
  loss: float  # on the rows of log.eval_batches
  bits_per_byte: float | None  # likewise; None where the text is not known
  validation_tokens: int | None  # how many these rows have; None in files of old versions
  checksum: int | None  # CRC-32 of these rows; None likewise
  whole_loss: float | None = None  # on the whole validation set, at the end of a run
  whole_bits_per_byte: float | None = None


class Result(NamedTuple):
  """What a start of a run came to, as `dsmoe.train.train` returns it."""

  step: int  # optimizer steps made, by all starts
  tokens: int  # of training data that they have read
  seconds: float  # wall time of this start
  flops: float  # the model's, of the steps of all starts, also those made again; NaN: not known
  why: str  # "finished", "stopped by SIGTERM" or "stopped by SIGINT", or the reason that was sent
  final: Point | None  # the last point of the validation curve
  best: Point | None  # the one with the lowest loss on the same rows as the last one
  # Names of those that came in this start. A run that finishes before it looks at them is "finished",
  # and whoever called it must heed them.
  signals: tuple[str, ...] = ()


class Recorded(NamedTuple):
  """What result.json holds: a JSON object with these fields.

  Process 0 writes it at the end of a start, however that ends, and replaces that of the start before.
  A start that is refused or fails before its first step leaves it as it was, and so does one that is
  killed. A value that is not finite is null.
  """

  format: int  # version of these fields: FORMAT
  time: float  # when it was written, in seconds since 1970
  # "finished"; "stopped by SIGTERM" or "stopped by SIGINT"; the reason to stop that the caller sent,
  # such as "pruned"; "closed" when the caller left the run between two points; else what the error
  # that ended the run says.
  why: str
  error: str | None  # the class of that error, such as NonFiniteError
  step: int  # optimizer steps made by all starts, those that were lost left out
  tokens: int  # of training data up to there
  final: (
    Point | None
  )  # the last point of the validation curve; an object with the fields of `Point`
  best: Point | None  # the point with the lowest loss on the same rows as the last one
  seconds: float  # wall time of this start
  num_starts: int | None  # null, like the next two, where the goodput log is damaged
  seconds_of_all_starts: float | None  # from the first start on, the time between starts included
  # Those seconds by what they were spent on: `goodput.PHASES`, and `made_again` (steps lost by a kill
  # or by going back), `down` (between a kill and the next start), `stopped` (after another end).
  seconds_by_kind: dict | None
  # The model's floating-point operations in all steps of all starts (forward and backward, causal
  # attention, multi-token prediction, without recomputation), evaluation left out; null as above.
  model_flops: float | None
  model_flops_made_again: float | None  # the part of them in steps that were lost and made again
  device_kind: str  # as JAX names it
  num_devices: int  # of all processes
  num_processes: int
  config: dict  # as it was asked for, as in config.json
  versions: dict  # of libraries, and a digest of each folder of the source code, by name
  git: dict | None  # `commit`, and `is_changed` if a file differs from it; null outside a checkout
  dataset_sha256: str  # `manifest_sha256` of the tokenised data

  @property
  def result(self) -> Result:
    flops = math.nan if self.model_flops is None else self.model_flops
    return Result(self.step, self.tokens, self.seconds, flops, self.why, self.final, self.best)


def read(workdir: epath.PathLike) -> Recorded:
  """Reads a run's result.json.

  Raises:
    ValueError: when there is none, it is damaged, or it has another format, naming it.
  """
  path = epath.Path(workdir) / RESULT_FILE
  if not path.exists():
    raise ValueError(
      f"a run's workdir must hold {RESULT_FILE}, which a run writes at its end, got {workdir}"
    )
  try:
    values = json.loads(path.read_text())
    if type(values.get("format")) is int and values["format"] != FORMAT:
      raise _OtherFormatError(
        f"{path} must have format {FORMAT}, which this version of dsmoe reads and writes, got "
        f"{values['format']}"
      )
    for name in ("final", "best"):
      if values[name] is not None:
        values[name] = _point(values[name])
    return _checked(Recorded, values)
  except _OtherFormatError:
    raise
  except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
    raise ValueError(
      f"{path}: it must be the JSON object that a run wrote, it is damaged ({error!r}): start the "
      "run again, which writes it anew"
    ) from error


class _OtherFormatError(ValueError):
  """Of a result.json that is whole."""


def _point(values: Mapping[str, Any]) -> Point:
  loss = math.nan if values["loss"] is None else values["loss"]
  return _checked(Point, {**values, "loss": loss})


def _checked(cls: Any, values: Mapping[str, Any]) -> Any:
  """Makes a NamedTuple of values whose types are those of its fields."""
  for name, kind in typing.get_type_hints(cls).items():
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    value = values[name]
    if type(value) not in kinds and not (type(value) is int and float in kinds):
      raise TypeError(f"{name} is {value!r}")
  return cls(**values)


def point_of(row: Mapping[str, Any], tokens: int) -> Point:
  """Returns the point that a line of metrics.jsonl with a validation loss stands for.

  Args:
    row: the line.
    tokens: of training data that the run had read.
  """

  def number(name: str) -> float | None:
    return None if row.get(name) is None else float(row[name])

  loss = number("validation_loss")
  return Point(
    row["step"],
    tokens,
    loss if loss is not None and math.isfinite(loss) else math.nan,
    number("validation_bits_per_byte"),
    row.get("validation_tokens"),
    row.get("validation_checksum"),
    number("whole_validation_loss"),
    number("whole_validation_bits_per_byte"),
  )


def points_of(rows: Iterable[Mapping[str, Any]], step_tokens: int) -> Iterator[Point]:
  """Yields the points of all validation curves in the lines of metrics.jsonl.

  Args:
    rows: the lines.
    step_tokens: tokens of a step, for points at steps that were not logged.
  """
  step, tokens = 0, 0
  for row in rows:
    if row.get("tokens") is not None:
      step, tokens = row["step"], row["tokens"]
    if "validation_loss" in row:
      yield point_of(row, tokens + (row["step"] - step) * step_tokens)


def best_of(points: Iterable[Point]) -> Point | None:
  """Returns the earliest point of the lowest loss among those of the last one's curve."""
  points = list(points)
  same = [p for p in points if p.checksum == points[-1].checksum and math.isfinite(p.loss)]
  return min(same, key=lambda point: point.loss, default=None)


class Record:
  """Notes what a start of a run comes to; writes result.json when the context ends.

  Attributes:
    about: `config`, `versions`, `git` and `dataset_sha256` of `Recorded`.
    has_begun: whether the first step can be made; if so, the file is written at the end.
    points: of the present validation curve, from the beginning of the run.
    step, tokens: how far the run has got.
    why: why it ends; "": it has finished.
    signals: names of those that came; the list of the run.
    result: None before the end, and of a start that failed.
  """

  def __init__(
    self,
    workdir: epath.Path,
    goodput: goodput_lib.Goodput,
    check_owner: Callable[[], None],
  ):
    """Begins with nothing.

    Args:
      workdir: of the run.
      goodput: of this start; its context ends before this one.
      check_owner: raises ValueError when the workdir has become another process's.
    """
    self._workdir, self._goodput, self._check_owner = workdir, goodput, check_owner
    self.about: dict[str, Any] = {}
    self.has_begun = False
    self.points: list[Point] = []
    self.step, self.tokens, self.why = 0, 0, ""
    self.signals: list[str] = []
    self.result: Result | None = None

  def go_back(self, step: int) -> None:
    """Forgets what came after a step."""
    self.points = [point for point in self.points if point.step <= step]

  def __enter__(self) -> "Record":
    return self

  def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _) -> None:
    if not self.has_begun:
      return
    recorded = self._recorded(error)
    if error is None:
      self.result = recorded.result._replace(signals=tuple(self.signals))
    if jax.process_index() == 0:
      try:
        self._check_owner()
        _write(self._workdir, recorded)
      except (OSError, ValueError):
        if error is None:  # else that is what ends the run
          raise

  def _recorded(self, error: BaseException | None) -> Recorded:
    """Returns the fields of the file."""
    why, name = self.why or "finished", None
    if isinstance(error, GeneratorExit):
      why = "closed"
    elif isinstance(error, KeyboardInterrupt):
      why = "stopped by SIGINT"
    elif error is not None:
      why, name = str(error) or type(error).__name__, type(error).__name__
    of_all: dict[str, Any] = dict.fromkeys(
      ("num_starts", "seconds_of_all_starts", "seconds_by_kind")
    )
    flops: float | None = None
    again: float | None = None
    try:
      lines = goodput_lib.read(self._goodput.path)
      of_all["seconds_by_kind"], of_all["num_starts"] = goodput_lib.account(lines)
      of_all["seconds_of_all_starts"] = sum(of_all["seconds_by_kind"].values())
      kept, again = goodput_lib.flops(lines)
      flops = kept + again
    except (OSError, ValueError):
      pass  # a damaged line of an earlier start: the run's last table names it
    return Recorded(
      format=FORMAT,
      time=time.time(),
      why=why,
      error=name,
      step=self.step,
      tokens=self.tokens,
      final=self.points[-1] if self.points else None,
      best=best_of(self.points),
      seconds=self._goodput.seconds,
      model_flops=flops,
      model_flops_made_again=again,
      device_kind=jax.devices()[0].device_kind,
      num_devices=jax.device_count(),
      num_processes=jax.process_count(),
      **of_all,
      **self.about,
    )


def _write(workdir: epath.Path, recorded: Recorded) -> None:
  values = recorded._asdict()
  for name in ("final", "best"):
    if values[name] is not None:
      values[name] = {
        key: None if value != value else value  # NaN
        for key, value in values[name]._asdict().items()
      }
  temporary = workdir / f"{RESULT_FILE}.tmp"
  temporary.write_text(json.dumps(values, indent=2, allow_nan=False) + "\n")
  temporary.replace(workdir / RESULT_FILE)
