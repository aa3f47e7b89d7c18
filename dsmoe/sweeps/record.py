"""SWEEP/sweep.json: what a sweep consists of, written once and compared at every later start."""

import functools
import json
import types
import typing
import uuid
from typing import Any, NamedTuple

from etils import epath

from dsmoe import config as config_lib

SWEEP_FILE = "sweep.json"
_MAX_DIFFERENCES = 8  # in an error message


class Planned(NamedTuple):
  """A trial that the sweep is to run; its number is its place in the list of all of them.

  Trials of the same point differ only in their seeds. `params` maps config fields to values; None
  for a trial of a search, whose values are drawn when it begins. One that `is_added` came after the
  sweep had begun, and is not pruned.
  """

  point: int
  seed: int
  params: dict[str, Any] | None
  is_added: bool = False


class Record(NamedTuple):
  """What a sweep consists of.

  Attributes:
    name: of the study in the storage.
    identity: made at random, to tell sweeps of one name apart.
    objective: what is compared; lower is better.
    storage: "journal" or "postgresql".
    experiment: the file whose `search(trial)` draws the values; "" for a grid or a list.
    fields: the config fields that are searched, sorted.
    trials: all of them, by number.
    draws: for a search, values that a fixed seed draws from its space, which stand for the space.
    pruner: the pruner's name and settings.
    config: the config that the trials start from, as nested dicts.
    corpus: the digest that stands for the tokenised text; "" where every trial has its own.
    code: digests of the source code by folder.
  """

  name: str
  identity: str
  objective: str
  storage: str
  experiment: str
  fields: tuple[str, ...]
  trials: list[Planned]
  draws: list[dict[str, Any]]
  pruner: dict[str, Any]
  config: dict[str, Any]
  corpus: str
  code: dict[str, str]


def exists(workdir: epath.PathLike) -> bool:
  """Whether a sweep has begun in `workdir`."""
  return (epath.Path(workdir) / SWEEP_FILE).exists()


def write(workdir: epath.PathLike, record: Record) -> None:
  """Writes sweep.json whole, then gives it its name."""
  path = epath.Path(workdir) / SWEEP_FILE
  values = record._asdict() | {"trials": [trial._asdict() for trial in record.trials]}
  temporary = path.parent / f"{SWEEP_FILE}.{uuid.uuid4().hex}"
  temporary.write_text(json.dumps(values, indent=1) + "\n")
  temporary.replace(path)


def remove(workdir: epath.PathLike) -> None:
  """Takes sweep.json back, of a sweep that could not begin."""
  (epath.Path(workdir) / SWEEP_FILE).unlink(missing_ok=True)


def read(workdir: epath.PathLike) -> Record:
  """Reads sweep.json.

  Raises:
    ValueError: where there is none, or it is no sweep's.
  """
  path = epath.Path(workdir) / SWEEP_FILE
  if not path.exists():
    raise ValueError(f"a sweep's workdir must have the file {SWEEP_FILE}; {workdir} has none")
  try:
    return _record(json.loads(path.read_text()))
  except (ValueError, RecursionError) as error:
    raise ValueError(f"{path} must be what a sweep has written: {error}") from error


def _record(values: Any) -> Record:
  """Returns the record that JSON values stand for; raises ValueError for others, naming the first."""
  found = _typed(values, Record, "it")
  for kind in ("fields", "draws"):
    of_kind = str if kind == "fields" else dict
    for number, value in enumerate(getattr(found, kind)):
      _check(type(value) is of_kind, f"{kind}[{number}]", of_kind.__name__, value)
  trials = [_typed(t, Planned, f"trials[{number}]") for number, t in enumerate(found.trials)]
  _check(bool(trials), "trials", "a list of at least one trial", trials)
  is_search = any(trial.params is None for trial in trials)
  _check(bool(found.experiment) or not is_search, "experiment", "a search's file", found.experiment)
  pruner = found.pruner
  numbers = [pruner.get(name) for name in ("n_startup_trials", "n_warmup_steps")]
  is_median = pruner.get("name") == "median" and all(type(n) is int and n >= 0 for n in numbers)
  _check(pruner.get("name") == "none" or is_median, "pruner", "none or median", pruner)
  _check(type(found.config.get("seed")) is int, "config", "a config with a seed", found.config)
  return found._replace(trials=trials, fields=tuple(found.fields))


_hints = functools.cache(typing.get_type_hints)  # of a NamedTuple; a sweep may have 10,000 trials


def _typed(values: Any, kind: Any, name: str) -> Any:
  """Makes a NamedTuple of JSON's values, whose types are those of its fields."""
  _check(type(values) is dict, name, "dict", values)
  hints = _hints(kind)
  if odd := sorted(set(values) - set(hints)):
    raise ValueError(f"{name} has no field {odd[0]}")
  for field, hint in hints.items():
    if field not in values:
      if field in kind._field_defaults:
        continue
      raise ValueError(f"{name} must have the field {field}")
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    kinds = [typing.get_origin(option) or option for option in options]
    kinds = [list if one is tuple else one for one in kinds]  # as JSON has it
    rule = " or ".join("null" if one is types.NoneType else one.__name__ for one in kinds)
    where = field if kind is Record else f"{name}.{field}"
    _check(type(values[field]) in kinds, where, rule, values[field])
  return kind(**values)


def _check(is_right: bool, name: str, rule: str, value: Any) -> None:
  if not is_right:
    raise ValueError(f"{name} must be {rule}, got {value!r:.80}")


def check(workdir: epath.PathLike, old: Record, new: Record) -> None:
  """Refuses to go on with a sweep that is not the one that began.

  Trials that were added to the list after the sweep began may be in `old` only.

  Raises:
    ValueError: naming what differs, with both values.
  """
  found = []
  for name in ("name", "objective", "storage", "corpus"):
    a, b = getattr(old, name), getattr(new, name)
    if a != b:
      moved = f" (--name={a} goes on with a sweep that was moved)" * (name == "name")
      found.append(f"{name}: {a or '(none)'} -> {b or '(none)'}{moved}")
  found += config_lib.differences(old.pruner, new.pruner, "pruner.")
  found += config_lib.differences(old.config, new.config, "config.")
  found += _space_differences(old, new)
  if found:
    shown = found[:_MAX_DIFFERENCES]
    more = f"; and {len(found) - len(shown)} more" if len(found) > len(shown) else ""
    raise ValueError(
      f"the sweep in {workdir} began with another space, config or corpus, and goes on only with "
      f"its own: {'; '.join(shown)}{more}; name another --workdir for a new sweep"
    )


def _space_differences(old: Record, new: Record) -> list[str]:
  """Lists how two sweeps' spaces differ."""
  kinds = ["a search" if r.draws else "a list of values" for r in (old, new)]
  if kinds[0] != kinds[1]:
    return [f"space: {kinds[0]} -> {kinds[1]}"]
  if old.fields != new.fields:
    return [f"searched fields: {', '.join(old.fields)} -> {', '.join(new.fields)}"]
  found = []
  began = [trial for trial in old.trials if not trial.is_added]
  if len(began) != len(new.trials):
    found.append(f"number of trials: {len(began)} -> {len(new.trials)}")
  for number, (a, b) in enumerate(zip(began, new.trials, strict=False)):
    found += config_lib.differences(_plain(a), _plain(b), f"trial {number}: ")
  for number, (x, y) in enumerate(zip(old.draws, new.draws, strict=False)):
    found += config_lib.differences(x, y, f"draw {number} of the search: ")
  return found


def _plain(trial: Planned) -> dict[str, Any]:
  return {"seed": trial.seed, **(trial.params or {})}
