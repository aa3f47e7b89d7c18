"""Checks for config rules; each raises ValueError with one sentence that states the values."""

import dataclasses
from typing import Any

import numpy as np


def require(condition: bool, message: str) -> None:
  """Raises ValueError with `message` unless `condition` holds."""
  if not condition:
    raise ValueError(message)


def one_of(name: str, value: Any, choices: tuple[str | None, ...]) -> None:
  """Raises ValueError unless `value`, the value of field `name`, is among `choices`."""
  require(value in choices, f"{name} must be one of {', '.join(map(str, choices))}, got {value!r}")


def at_least(config: Any, minimum: float, *names: str) -> None:
  """Raises ValueError unless each field in `names` of `config` is at least `minimum`."""
  for name in names:
    value = getattr(config, name)
    require(value >= minimum, f"{name} must be at least {minimum}, got {value}")


def splits(name: str, number: int, axis: str, devices: int) -> None:
  """Raises ValueError unless the `devices` along a mesh axis split `number` evenly."""
  divisors = [d for d in range(1, number + 1) if number % d == 0]
  near = min(divisors, key=lambda d: max(d, devices) / min(d, devices))
  require(
    number % devices == 0,
    f"{name} ({number}) must be divisible by {axis} ({devices}); the nearest that divides it is "
    f"{near}",
  )


def numbers(config: Any) -> None:
  """Raises ValueError unless programs of 32 bits can compute with every number of a dataclass.

  A float, in a tuple too, must be finite in float32 and not become 0 there; an int must be an
  int32, a seed a uint32. Groups of fields check their own numbers.
  """
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    for number in value if isinstance(value, tuple) else (value,):
      if isinstance(number, float):
        with np.errstate(over="ignore", under="ignore"):
          single = np.float32(number)
        kept = np.isfinite(single) and (single != 0) == (number != 0)
        require(bool(kept), f"{field.name} must be a finite number of float32, got {value}")
      elif isinstance(number, int) and field.name == "seed":
        require(0 <= number < 2**32, f"seed must be from 0 to {2**32 - 1}, got {number}")
      elif isinstance(number, int):
        require(-(2**31) <= number < 2**31, f"{field.name} must be below {2**31}, got {number}")
