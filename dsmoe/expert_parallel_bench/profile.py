"""The parts of a program's time, from a profile of it: one number for each named scope.

The profiler's events name HLO instructions, and the compiled program says for each the scopes that
it was made in. An instruction that was fused of several parts counts to the part of its result.
"""

import pathlib
import re
import tempfile

import jax

from dsmoe.compilers import hlo

# Of a layer, by the scopes that belong to it; the innermost scope that is listed decides.
PARTS = {
  "route": ("routing",),
  "permute": ("permute", "dispatch", "plan"),
  "exchange": ("exchange",),
  "experts": ("experts",),
  "combine": ("combine",),
  "shared": ("shared_experts",),
}
_PART_OF = {scope: part for part, scopes in PARTS.items() for scope in scopes}
# Their events last as long as those of the instructions inside them.
_AROUND_OTHERS = ("while", "conditional", "call")


def part_of(op_name: str) -> str:
  """Returns the part that an operation, named by its path of scopes, belongs to, or `other`."""
  scopes = [s for s in re.split(r"[/()]+", op_name) if s in _PART_OF]
  return _PART_OF[scopes[-1]] if scopes else "other"


def parts_of_program(text: str) -> dict[str, str]:
  """Returns the part of each instruction of compiled HLO, by its name."""
  computations, _ = hlo.parse(text)
  found = {}
  for instructions in computations.values():
    for instruction in instructions:
      op_name = re.search(r'op_name="([^"]*)"', instruction.attributes)
      if instruction.opcode not in _AROUND_OTHERS:
        found[instruction.name] = part_of(op_name[1]) if op_name else "other"
  return found


def secs_of_parts(run: jax.stages.Compiled, args: tuple, num_devices: int, runs: int) -> dict:
  """Runs a program under the profiler and returns the seconds of each part, of one device and run.

  Args:
    run, args: the program and its arguments.
    num_devices: that run it.
    runs: how often to run it.

  Returns:
    By part; empty where the profiler names no instructions.
  """
  part_of_name = parts_of_program(run.as_text() or "")
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      for _ in range(runs):
        jax.block_until_ready(run(*args))
    secs: dict[str, float] = {}
    for path in pathlib.Path(folder).rglob("*.xplane.pb"):
      for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
        for line in plane.lines:
          for event in line.events:
            name = dict(event.stats).get("hlo_op")
            if name in part_of_name:
              part = part_of_name[name]
              secs[part] = secs.get(part, 0.0) + event.duration_ns * 1e-9
  return {part: total / num_devices / runs for part, total in secs.items()}
