"""What the workdirs of runs hold for a report, read once; what is damaged is named, not fatal."""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from dsmoe import config as config_lib
from dsmoe.reporting import final, goodput, metrics, routing_trace, series

_LONGEST_NAME = 40
_MOST = 1e30  # no number of a run is larger
# What is shown of metrics.jsonl: numbers, and lists of numbers, one a layer.
_NUMBERS = (
  *(
    "step",
    "loss",
    "cross_entropy",
    "mtp_loss",
    "balance_loss",
    "z_loss",
    "learning_rate",
    "grad_norm",
  ),
  *("tokens", "tokens_per_sec", "gflops_per_sec", "mfu", "dropped_rows", "fallbacks", "rewinds"),
  *("skipped_steps", "validation_loss", "validation_bits_per_byte", "validation_tokens"),
  *("validation_checksum", "whole_validation_loss", "whole_validation_bits_per_byte"),
)
_LISTS = ("max_vio", "max_vio_running", "dead_experts", "bias_range", "groups_per_token")


class RunFiles(NamedTuple):
  """A run, as its files tell it; None where they do not."""

  name: str
  workdir: epath.Path
  series: series.Run
  config: dict[str, Any] | None  # nested, as in config.json, with defaults for newer fields
  result: dict[str, Any]  # result.json; {} where there is none
  goodput: list[dict[str, Any]]  # the lines of the first process' log
  traces: list[epath.Path]  # of the first process, by step
  sample: str | None  # what the model wrote at the end
  remarks: list[str]  # sentences about what is damaged

  def xy(self, name: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Returns `series.Run.series` of the run."""
    return self.series.series(name)


def read(workdir: epath.PathLike, name: str) -> RunFiles:
  """Reads a run's files.

  Args:
    workdir: the run's.
    name: what the report calls it.

  Raises:
    ValueError: naming the workdir, if it has no metrics.jsonl with a whole line, or a damaged one.
  """
  workdir = epath.Path(workdir)
  path = workdir / metrics.METRICS_FILE
  if not path.exists():
    raise ValueError(f"{workdir} must hold {metrics.METRICS_FILE}, it does not")
  try:
    found = series.Run(metrics.iter_metrics(workdir))
    _check(found.rows)
  except (ValueError, TypeError) as error:
    text = str(error) if str(path) in str(error) else f"{path} is damaged: {error}"
    raise ValueError(text) from error
  if not found.rows:
    raise ValueError(f"{path} must have a whole line, it has none")
  remarks: list[str] = []

  def of(name: str, parse: Callable[[epath.Path], Any], absent: Any) -> Any:
    """Returns what a file of the workdir holds; a remark says why it could not be read."""
    if not (workdir / name).exists():
      return absent
    try:
      return parse(workdir / name)
    except (ValueError, TypeError, OSError, RecursionError) as error:
      remarks.append(f"{workdir / name} is left out: {error}")
      return absent

  config = of("config.json", _config, None)
  result = of("result.json", _object, {})
  log = of(goodput.file_of(workdir, 0).name, goodput.read, [])
  sample = of(final.SAMPLE_FILE, lambda path: path.read_bytes().decode(errors="replace"), None)
  return RunFiles(name, workdir, found, config, result, log, _traces(workdir), sample, remarks)


def names(workdirs: Sequence[epath.PathLike]) -> list[str]:
  """Returns a short name for each workdir: the fewest of its last folders by which they differ."""
  parts = [[p for p in str(workdir).split("/") if p not in ("", ".")] for workdir in workdirs]
  for depth in range(1, max(map(len, parts), default=0) + 1):
    short = ["/".join(part[-depth:]) for part in parts]
    shown = [_shortened(name) for name in short]
    if len(set(shown)) == len(shown):
      return shown
  return [f"{_shortened('/'.join(part))} ({i})" for i, part in enumerate(parts, 1)]


def differing(configs: Mapping[str, Mapping[str, Any]]) -> dict[str, list[Any]]:
  """Returns the values of each config field, by its dotted name, that is not the same in all.

  Args:
    configs: nested, by the name of the run; a field that one lacks is "(absent)".
  """
  flat = [dict(_flat(config)) for config in configs.values()]
  fields = sorted(set().union(*flat))
  columns = {field: [one.get(field, "(absent)") for one in flat] for field in fields}
  return {field: values for field, values in columns.items() if any(v != values[0] for v in values)}


def flops_per_token(run: RunFiles) -> float | None:
  """Returns the training FLOPs of a token as the run counted them; None where it logged no speed."""
  for row in run.series.rows:
    rate, tokens = row.get("gflops_per_sec"), row.get("tokens_per_sec")
    if rate and tokens:
      return rate * 1e9 / tokens
  return None


def tokens_at(run: RunFiles, step_T: np.ndarray) -> np.ndarray | None:
  """Returns the tokens that the run had read at some steps, between its lines in proportion.

  None for a run that logged none. NaN stays NaN.
  """
  pairs = [(r["step"], r["tokens"]) for r in run.series.rows if r.get("tokens") is not None]
  if not pairs:
    return None
  steps, tokens = np.array([(0, 0), *pairs], float).T
  step_T = np.asarray(step_T, float)
  return np.where(np.isnan(step_T), np.nan, np.interp(np.nan_to_num(step_T), steps, tokens))


def _check(rows: Sequence[Mapping[str, Any]]) -> None:
  """Raises ValueError for values that no run writes, naming step and field."""
  lengths: dict[str, int] = {}
  for row in rows:
    for name in _NUMBERS:
      if not (row.get(name) is None or _is_number(row[name])):
        raise ValueError(f"{name} of step {row['step']} must be a number, it is {row[name]!r:.80}")
    for name in _LISTS:
      values = row.get(name) or []
      is_list = isinstance(values, list) and all(v is None or _is_number(v) for v in values)
      if not is_list or (values and len(values) != lengths.setdefault(name, len(values))):
        raise ValueError(
          f"{name} of step {row['step']} must be a number for each layer, it is {values!r:.80}"
        )


def _is_number(value: Any) -> bool:
  return type(value) in (int, float) and abs(value) < _MOST


def config_of_trace(path: epath.PathLike) -> tuple[dict[str, Any] | None, list[str]]:
  """Returns the config of the run that wrote a routing trace, and sentences about a damaged one."""
  config_path = epath.Path(path).parent.parent / "config.json"
  if not config_path.exists():
    return None, []
  try:
    return _config(config_path), []
  except (ValueError, TypeError, OSError, RecursionError) as error:
    return None, [f"{config_path} is left out: {error}"]


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
  for name, value in config.items():
    if isinstance(value, Mapping):
      yield from _flat(value, f"{prefix}{name}.")
    else:
      yield f"{prefix}{name}", list(value) if isinstance(value, tuple) else value


def _shortened(name: str) -> str:
  if len(name) <= _LONGEST_NAME:
    return name
  return f"{name[: _LONGEST_NAME // 2 - 1]}…{name[-_LONGEST_NAME // 2 :]}"


def _object(path: epath.Path) -> dict[str, Any]:
  value = json.loads(path.read_text())
  if not isinstance(value, dict):
    raise ValueError(f"it must be a JSON object, it is {type(value).__name__}")
  return value


def _config(path: epath.Path) -> dict[str, Any]:
  return config_lib.with_defaults(_object(path))


def _traces(workdir: epath.Path) -> list[epath.Path]:
  folder = workdir / routing_trace.FOLDER
  if not folder.exists():
    return []
  found = {}
  for path in folder.iterdir():
    if match := re.fullmatch(r"step_(\d+)_process_0\.npz", path.name):
      found[int(match[1])] = path
  return [found[step] for step in sorted(found)]
