"""The parts of a program's time, from a profile of it: one number for each named scope."""

import pathlib
import tempfile

import jax

from dsmoe.profiling import planes, scopes

# Of a layer; the rest is `other`.
PARTS = ("route", "permute", "exchange", "experts", "combine", "shared")


def part_of(op_name: str) -> str:
  """Returns the part that an operation, named by its path of scopes, belongs to, or `other`."""
  part = scopes.part_of(op_name)
  return part if part in PARTS else "other"


def secs_of_parts(run: jax.stages.Compiled, args: tuple, num_devices: int, runs: int) -> dict:
  """Runs a program under the profiler and returns the seconds of each part, of one device and run.

  Args:
    run, args: the program and its arguments.
    num_devices: that run it.
    runs: how often to run it.

  Returns:
    By part; empty where the profiler names no instructions.
  """
  program = scopes.program(run.as_text() or "")
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      for _ in range(runs):
        jax.block_until_ready(run(*args))
    found = [
      device
      for path in pathlib.Path(folder).rglob("*.xplane.pb")
      for device in planes.devices(path.read_bytes(), program)
    ]
  secs: dict[str, float] = {}
  for device in found:
    for (part, _), total in device.secs_of_parts().items():
      part = part if part in PARTS else "other"
      secs[part] = secs.get(part, 0.0) + total
  return {part: total / num_devices / runs for part, total in secs.items()}
