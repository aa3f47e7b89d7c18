"""The checks that config rules are made of: each raises one sentence with the values."""

from typing import Any


def require(condition: bool, message: str) -> None:
  """Raises ValueError with `message` unless `condition` holds."""
  if not condition:
    raise ValueError(message)


def one_of(name: str, value: Any, choices: tuple[str | None, ...]) -> None:
  """Raises ValueError unless the field `name` has one of the values `choices`."""
  require(value in choices, f"{name} must be one of {', '.join(map(str, choices))}, got {value!r}")


def at_least(config: Any, minimum: float, *names: str) -> None:
  """Raises ValueError unless each of the config's fields `names` is at least `minimum`."""
  for name in names:
    value = getattr(config, name)
    require(value >= minimum, f"{name} must be at least {minimum}, got {value}")
