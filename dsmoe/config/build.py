"""Converts between frozen configs and nested dicts, and lists the differences of two configs."""

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
  """Converts an experiment's ConfigDict into a validated `Config`; see `from_dict`."""
  return from_dict(config.to_dict())


def from_dict(values: Mapping[str, Any]) -> Config:
  """Converts nested dicts, such as a run's saved config.json, into a validated `Config`.

  Args:
    values: field names mapped to values; a group of fields is a nested dict. Fields that have a
      default in the dataclass may be left out.

  Raises:
    ValueError: if a field is unknown (the message names the nearest one) or missing, a value has
      the wrong type, or a rule is broken.
  """
  return _build(Config, values, "config")


def to_dict(config: Any) -> dict[str, Any]:
  """Converts a config dataclass into nested dicts of plain values, ready for JSON."""
  return dataclasses.asdict(config)


def with_defaults(values: Mapping[str, Any], cls: type = Config) -> dict[str, Any]:
  """Adds the fields that have a default to a saved config from before they existed.

  Args:
    values: nested dicts, of any version.
    cls: the dataclass of these values; used when the function calls itself on a group.
  """
  result = dict(values)
  hints = typing.get_type_hints(cls)
  for field in dataclasses.fields(cls):
    if field.name not in result and field.default is not dataclasses.MISSING:
      default = field.default
      result[field.name] = to_dict(default) if dataclasses.is_dataclass(default) else default
    elif isinstance(group := result.get(field.name), Mapping):
      if dataclasses.is_dataclass(hint := hints[field.name]):
        result[field.name] = with_defaults(group, typing.cast(type, hint))
  return result


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
  """Lists the fields in which two configs, given as nested dicts, differ.

  Args:
    old, new: the two configs; tuples and lists of equal elements count as equal.
    prefix: put before each field's name; used when the function calls itself on a group.

  Returns:
    One line `name: old value -> new value` for each field, sorted by name.
  """
  lines = []
  for key in sorted(set(old) | set(new)):
    a, b = old.get(key, "(absent)"), new.get(key, "(absent)")
    if isinstance(a, Mapping) and isinstance(b, Mapping):
      lines += differences(a, b, f"{prefix}{key}.")
    elif _plain(a) != _plain(b):
      lines.append(f"{prefix}{key}: {a} -> {b}")
  return lines


def _plain(value: Any) -> Any:
  """Returns a tuple as a list, as JSON has it, and any other value unchanged."""
  return list(value) if isinstance(value, (tuple, list)) else value


def _build(cls: type, values: Mapping[str, Any], path: str) -> Any:
  """Builds the dataclass `cls` from a dict; `path` is its dotted name, for messages."""
  hints = typing.get_type_hints(cls)
  for name in values:
    if name not in hints:
      near = difflib.get_close_matches(name, hints, n=1, cutoff=0.0)
      raise ValueError(f"{path} has no field {name!r}; did you mean {near[0]!r}?")
  optional = {f.name for f in dataclasses.fields(cls) if f.default is not dataclasses.MISSING}
  missing = [name for name in hints if name not in values and name not in optional]
  require(not missing, f"{path} must have a value for {', '.join(missing)}; it has none")
  return cls(**{k: _convert(h, values[k], f"{path}.{k}") for k, h in hints.items() if k in values})


def _convert(hint: Any, value: Any, path: str) -> Any:
  """Returns `value` as the type `hint`; an int is accepted for a float, a list for a tuple."""
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
    bits = value.bit_length()
    require(bits <= 128, f"{path} must be a finite number of float32, got {bits} bits of an int")
    return float(value)
  require(
    type(value) is hint,
    f"{path} must be {hint.__name__}, got {value!r} of type {type(value).__name__}",
  )
  return value
