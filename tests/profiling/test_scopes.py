"""Which part and direction each instruction belongs to."""

from dsmoe.profiling import scopes
from tests.profiling import programs


def test_instructions_of_a_program():
  program = scopes.program(programs.HLO)
  assert program.module == "jit_train_step"
  found = program.operations
  for name, expected in programs.EXPECTED.items():
    assert (found[name].part, found[name].direction) == expected, name
  named = {name for name, operation in found.items() if operation.is_collective}
  assert named - {"all-gather.2"} == programs.COLLECTIVES
  assert {name for name, operation in found.items() if operation.is_around_others} == {"while.1"}


def test_the_innermost_listed_scope_decides():
  paths = {
    "jit(f)/jvp(layers)/attention/norm/mul": ("norm", "forward"),
    "jit(f)/transpose(jvp(head))/dot_general": ("head", "backward"),
    "jit(f)/jvp(layers)/transpose": ("layers, rest", "forward"),
    "jit(f)/my_head/add": ("unnamed", "other"),
    "": ("unnamed", "other"),
  }
  found = {path: (scopes.part_of(path), scopes.direction_of(path)) for path in paths}
  assert found == paths
