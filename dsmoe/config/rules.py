"""Checks for config rules; each raises ValueError with one sentence that states the values."""

from typing import Any


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
