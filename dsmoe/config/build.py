"""Builds the frozen configs from nested dicts and back, and says in what two of them differ."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any

from ml_collections import config_dict

from dsmoe.config.rules import require
from dsmoe.config.schema import Config


def from_config_dict(config: config_dict.ConfigDict) -> Config:
  """Turns an experiment's ConfigDict into a checked `Config`; see `from_dict`."""
  return from_dict(config.to_dict())


def from_dict(values: Mapping[str, Any]) -> Config:
  """Turns nested dicts, such as a run's saved config.json, into a checked `Config`.

  Raises:
    ValueError: for an unknown or missing field (naming the nearest), a value of the wrong
      type, or a broken rule.
  """
  return _build(Config, values, "config")


def to_dict(config: Any) -> dict[str, Any]:
  """Turns a config dataclass into nested plain dicts, ready for JSON."""
  return dataclasses.asdict(config)


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
  """Lists the fields in which two configs (nested dicts) differ, as `name: old -> new`."""
  lines = []
  for key in sorted(set(old) | set(new)):
    a, b = old.get(key, "(absent)"), new.get(key, "(absent)")
    if isinstance(a, Mapping) and isinstance(b, Mapping):
      lines += differences(a, b, f"{prefix}{key}.")
    elif _plain(a) != _plain(b):
      lines.append(f"{prefix}{key}: {a} -> {b}")
  return lines


def _plain(value: Any) -> Any:
  return list(value) if isinstance(value, (tuple, list)) else value


def _build(cls: type, values: Mapping[str, Any], path: str) -> Any:
  hints = typing.get_type_hints(cls)
  for name in values:
    if name not in hints:
      near = difflib.get_close_matches(name, hints, n=1, cutoff=0.0)
      raise ValueError(f"{path} has no field {name!r}; did you mean {near[0]!r}?")
  optional = {f.name for f in dataclasses.fields(cls) if f.default is not dataclasses.MISSING}
  missing = [name for name in hints if name not in values and name not in optional]
  require(not missing, f"{path} lacks the field {', '.join(missing)}")
  return cls(**{k: _convert(h, values[k], f"{path}.{k}") for k, h in hints.items() if k in values})


def _convert(hint: Any, value: Any, path: str) -> Any:
  """Checks `value` against a field's type; ints may stand for floats, lists for tuples."""
  if dataclasses.is_dataclass(hint):
    require(isinstance(value, Mapping), f"{path} must be a group of fields, got {value!r}")
    return _build(typing.cast(type, hint), value, path)
  if typing.get_origin(hint) is tuple:
    require(isinstance(value, (tuple, list)), f"{path} must be a tuple, got {value!r}")
    return tuple(_convert(typing.get_args(hint)[0], v, path) for v in value)
  if isinstance(hint, types.UnionType):
    if value is None:
      return None
    hint = next(a for a in typing.get_args(hint) if a is not type(None))
  if hint is float and type(value) is int:
    return float(value)
  require(
    type(value) is hint,
    f"{path} must be {hint.__name__}, got {value!r} of type {type(value).__name__}",
  )
  return value
