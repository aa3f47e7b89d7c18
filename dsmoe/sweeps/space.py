"""Which trials a sweep has: from `sweep(add)`, a grid, a list of points or `search(trial)`.

A point maps config fields to values, {"optim.learning_rate": 0.003, "model.n_group": 4}. Everything
about it is checked here, by building its config, before anything is written or compiled.
"""

import ast
import contextlib
import copy
import importlib.util
import itertools
import json
import math
import re
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from etils import epath

from dsmoe import config as config_lib
from dsmoe.config import Config
from dsmoe.sweeps.draws import name_of
from dsmoe.sweeps.record import Planned

MAX_TRIALS = 10_000

Point = dict[str, Any]


class Space(NamedTuple):
  """The searched fields, sorted, the trials by number, and the draws that stand for a search."""

  fields: tuple[str, ...]
  trials: list[Planned]
  draws: list[Point]


def of_points(base: Config, points: Iterable[Point], num_seeds: int, source: str) -> Space:
  """Returns the space of a list of points, each with every seed.

  Args:
    base: the config that each point changes. The seeds are its own and those that follow it.
    points: where a point sets `seed` itself, `num_seeds` must be 1.
    num_seeds: how many trials a point has.
    source: what the points come from, for messages.

  Raises:
    ValueError: for no point, too many, one that is given twice, or one that makes no config.
  """
  points = list(itertools.islice(points, MAX_TRIALS + 1))
  _check_number(len(points), num_seeds, source)
  fields = config_lib.to_dict(base)
  checked = [_checked(fields, point) for point in points]
  if num_seeds > 1 and any("seed" in point for point in checked):
    raise ValueError(f"--seeds ({num_seeds}) must be 1 where {source} sets the field seed")
  numbers: dict[str, int] = {}  # of each point without its seed
  trials: dict[str, Planned] = {}
  for point in checked:
    params = {field: value for field, value in point.items() if field != "seed"}
    number = numbers.setdefault(_key(params), len(numbers))
    for seed in [point["seed"]] if "seed" in point else _seeds(base, num_seeds):
      if (key := f"{seed} {_key(params)}") in trials:
        raise ValueError(f"{source} must have each point once, got {shown(point)} twice")
      trials[key] = Planned(number, seed, params)
  searched = {field for point in checked for field in point}
  return Space(tuple(sorted(searched)), list(trials.values()), [])


def of_search(
  base: Config,
  search: Callable[[Any], Point],
  num_points: int,
  num_seeds: int,
  drawn: Iterable[tuple[Any, Point]],
) -> Space:
  """Returns the space of `search(trial)`, whose points are drawn when they begin.

  Args:
    base: the config that each point changes.
    search: the experiment's function, for messages.
    num_points: how many are drawn.
    num_seeds: how many trials a point has.
    drawn: what a fixed seed draws: `draws.probe`.

  Raises:
    ValueError: for no point, too many, or a draw that makes no config.
  """
  source = name_of(search)
  _check_number(num_points, num_seeds, source)
  points = [point for _, point in drawn]
  draws = [checked_draw(config_lib.to_dict(base), point, source) for point in points]
  seeds = _seeds(base, num_seeds)
  trials = [Planned(point, seed, None) for point in range(num_points) for seed in seeds]
  return Space(tuple(sorted({field for point in draws for field in point})), trials, draws)


def checked_draw(base: Mapping[str, Any], point: Any, source: str) -> Point:
  """Returns a point that a search has drawn, with its values as the config has them.

  Args:
    base: the config that it changes, as complete nested dicts.
    point: what `search(trial)` returned.
    source: the function's name, for messages.

  Raises:
    ValueError: for a point that makes no config, or sets the field seed.
  """
  checked = _checked(base, point)
  if "seed" in checked:
    raise ValueError(f"{source} must leave the field seed to --seeds, got {checked['seed']}")
  return checked


def added(sweep: Callable[[Callable[..., None]], Any]) -> list[Point]:
  """Returns the points that an experiment's `sweep(add)` adds."""
  points: list[Point] = []

  def add(**point: Any) -> None:
    if len(points) <= MAX_TRIALS:  # one more is refused by number
      points.append(point)

  sweep(add)
  return points


def grid(texts: Iterable[str], base: Config) -> Iterator[Point]:
  """Returns every combination of values that are written FIELD=VALUE,VALUE,...

  Values are numbers, words, true, false, none, and for a field that is a tuple lists in brackets, in
  which a text with a comma stands in quotes.

  Raises:
    ValueError: for another form, a field that is given twice, or too many combinations.
  """
  values: dict[str, list[Any]] = {}
  fields = config_lib.to_dict(base)
  for text in texts:
    field, equals, listed = text.partition("=")
    if not equals or not field or not listed:
      raise ValueError(f"--grid must be FIELD=VALUE,VALUE,..., got {text!r}")
    if field in values:
      raise ValueError(f"--grid must name each field once, got {field} twice")
    values[field] = [_parsed(word, _value(fields, field)) for word in _words(listed)]
  number = math.prod(map(len, values.values()))
  if number > MAX_TRIALS:
    sizes = " x ".join(f"{len(listed)} of {field}" for field, listed in values.items())
    raise ValueError(f"a grid must have at most {MAX_TRIALS:,} points, got {number:,}: {sizes}")
  combined = itertools.product(*values.values()) if values else []
  return (dict(zip(values, row, strict=True)) for row in combined)


def listed(path: epath.PathLike) -> list[Point]:
  """Reads a file with a point a line, as JSON: {"optim.learning_rate": 0.003}.

  Raises:
    ValueError: for a file that is not UTF-8, and for a line that is something else, by its number.
  """
  points = []
  try:
    text = epath.Path(path).read_bytes().decode("utf-8-sig")  # with a byte order mark or without
  except UnicodeDecodeError as error:
    raise ValueError(f"the file of --points must be UTF-8, {path} is not: {error}") from error
  for number, line in enumerate(text.split("\n"), 1):
    if not line.strip():
      continue
    try:
      point = json.loads(line, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
      raise ValueError(
        f"line {number} of {path} must be JSON: {error}, got {line[:80]!r}"
      ) from error
    if not isinstance(point, dict):
      raise ValueError(f"line {number} of {path} must map fields to values, got {line[:80]!r}")
    points.append(point)
  return points


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  """Returns a JSON object, which must not have a name twice."""
  found = dict(pairs)
  if len(found) < len(pairs):
    raise ValueError("a field is given twice")
  return found


def load(path: str) -> types.ModuleType:
  """Returns an experiment's module; `path` may end in `:` and an argument of its get_config."""
  file = path.partition(":")[0]
  spec = importlib.util.spec_from_file_location("sweep_experiment", file)
  if spec is None or spec.loader is None:
    raise ValueError(f"an experiment must be a file such as experiments/tiny.py, got {file!r}")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def config_of(base: Mapping[str, Any], point: Mapping[str, Any]) -> Config:
  """Returns the config of a point.

  Args:
    base: the config that it changes, as complete nested dicts.
    point: values by field; `seed` may be one of them.

  Raises:
    ValueError: for a parameter that is no field, a value of another type, or values that together
      break a rule of the config, with the point.
  """
  values = copy.deepcopy(dict(base))
  try:
    for field, value in point.items():
      if isinstance(_value(base, field), Mapping):
        raise ValueError(f"it is a group of fields, of which one must be named: {field}")
      *groups, name = field.split(".")
      group = values
      for part in groups:
        group = group[part]
      group[name] = value
    return config_lib.from_dict(values)
  except ValueError as error:
    raise ValueError(f"the point {shown(point)} must make a config: {error}") from error


def shown(point: Mapping[str, Any]) -> str:
  """Returns a point in words."""
  return ", ".join(f"{field}={value}" for field, value in point.items()) or "without fields"


def _check_number(num_points: int, num_seeds: int, source: str) -> None:
  if num_seeds < 1:
    raise ValueError(f"--seeds must be at least 1, got {num_seeds}")
  if num_points < 1:
    raise ValueError(f"a sweep must have at least one point, and {source} gives none")
  if num_points * num_seeds > MAX_TRIALS:
    number = f"{num_points:,}" if num_points <= MAX_TRIALS else f"over {MAX_TRIALS:,}"
    raise ValueError(
      f"a sweep must have at most {MAX_TRIALS:,} trials, got {number} points of {source} with "
      f"{num_seeds} seeds each"
    )


def _checked(fields: Mapping[str, Any], point: Any) -> Point:
  """Returns a point with its values as the config has them: 1.0 for 1, a list for a tuple."""
  if not isinstance(point, Mapping) or not point:
    raise ValueError(f"a point must map at least one config field to a value, got {point!r}")
  if not all(isinstance(field, str) for field in point):
    raise ValueError(f"a point's fields must be names such as 'optim.learning_rate', got {point!r}")
  made = config_lib.to_dict(config_of(fields, point))
  return {field: json.loads(json.dumps(_value(made, field))) for field in sorted(point)}


def _value(fields: Mapping[str, Any], field: str) -> Any:
  """Returns a field's value in nested dicts.

  Raises:
    ValueError: when there is no such field; the config's own refusal names the nearest.
  """
  value: Any = fields
  parts = field.split(".")
  for number, part in enumerate(parts):
    if not isinstance(value, Mapping):
      raise ValueError(f"{'.'.join(parts[:number])} is a value and has no field {part!r}")
    if part not in value:
      probe: Any = None
      for inner in reversed(parts[: number + 1]):
        probe = {inner: probe}
      config_lib.from_dict(_merged(fields, probe))  # raises
    value = value[part]
  return value


def _merged(fields: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
  """Returns nested dicts with further entries."""
  result = dict(fields)
  for key, value in more.items():
    deeper = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
    result[key] = _merged(result[key], value) if deeper else value
  return result


def _seeds(base: Config, num_seeds: int) -> list[int]:
  if base.seed + num_seeds > 2**32:
    raise ValueError(
      f"the seeds from config.seed ({base.seed}) on must be below {2**32}, got --seeds={num_seeds}"
    )
  return [base.seed + number for number in range(num_seeds)]


def _key(params: Point) -> str:
  return json.dumps(params, sort_keys=True)


def _words(text: str) -> list[str]:
  """Splits at the commas that are outside of brackets and quotes."""
  words, depth, quote, before = [""], 0, "", ","
  for sign in text:
    if quote:
      quote = "" if sign == quote else quote
    elif sign in "'\"" and before in "[(,":  # another one is an apostrophe
      quote = sign
    else:
      depth += (sign in "[(") - (sign in "])")
    before = before if sign == " " else sign
    if sign == "," and depth == 0 and not quote:
      words.append("")
    else:
      words[-1] += sign
  return words


def _parsed(word: str, now: Any) -> Any:
  """Returns a written value; a field that is text now takes it as it is written."""
  word = word.strip()
  if isinstance(now, str):
    return word
  names = {"true": True, "false": False, "none": None}
  if word.lower() in names:
    return names[word.lower()]
  if re.fullmatch(r"\[.*\]|\(.*\)", word):
    inner = _words(word[1:-1])
    if not inner[-1].strip():  # after a last comma, or of an empty list
      inner.pop()
    return [_parsed(part, None) for part in inner]
  if re.fullmatch(r"[-+.0-9].*|'[^']*'|\"[^\"]*\"", word):
    with contextlib.suppress(ValueError, SyntaxError):
      return ast.literal_eval(word)
  return word
