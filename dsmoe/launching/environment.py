"""The variables of a launched run's processes: what the user gives, and what the devices need."""

import re
from collections.abc import Iterable

from dsmoe.launching.topology import CPU, Topology
from dsmoe.platforms import xla_flags


def read(given: Iterable[str]) -> dict[str, str]:
  """Reads variables that are written NAME=VALUE.

  Raises:
    ValueError: for another form.
  """
  found = {}
  for text in given:
    name, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z_]\w*", name):
      raise ValueError(f"--env must be NAME=VALUE, got {text!r}")
    found[name] = value
  return found


def complete(
  env: dict[str, str],
  where: Topology | None,
  choice: Iterable[str],
  cache: str | None,
  inherited_flags: str = "",
) -> dict[str, str]:
  """Adds to a run's variables the flags of XLA and the compilation cache.

  Args:
    env: the user's. A flag of XLA that it sets takes the place of the chosen one.
    where: the run's devices, None when not known.
    choice: purposes of flags, as `xla_flags.chosen` takes them.
    cache: folder of the compilation cache, None for none.
    inherited_flags: XLA_FLAGS of this process where the run's processes are its children.

  Raises:
    ValueError: for flags that the chip has not or that must not be set together.
  """
  kind, num_slices = (where.kind, where.num_slices) if where else (CPU, 1)
  variable = xla_flags.variable(kind)
  merged = xla_flags.chosen(kind, choice, num_slices) | xla_flags.parse(env.get(variable, ""))
  xla_flags.check(kind, merged)
  made = {"PYTHONUNBUFFERED": "1"}  # lines are printed when they are written
  if merged:
    made[variable] = xla_flags.text(merged)
  if where and kind == CPU:
    count = f"--xla_force_host_platform_device_count={where.devices_per_host}"
    words = (inherited_flags, env.get("XLA_FLAGS", ""), count)
    made |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join(filter(None, words))}
  if cache is not None:
    made["JAX_COMPILATION_CACHE_DIR"] = cache
  return env | made
