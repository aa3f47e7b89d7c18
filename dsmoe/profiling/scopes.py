"""Which part of a training step each instruction of its compiled program belongs to.

The model wraps its parts in `jax.named_scope`, and XLA keeps for each instruction the path of scopes
that it was made in. An instruction that was fused of several parts counts to the part of its result.
What the compiler added without a name, such as a copy into another layout, counts to its first user, or
else to what it copies.
"""

import re
from typing import NamedTuple

from dsmoe.compilers import collective_bytes, hlo

# By part the scopes that belong to it, in the order of a step. The innermost scope that is listed
# decides: the norms inside attention count as norms.
SCOPES = {
  "embed": ("embed",),
  "norm": ("norm",),
  "attention": ("attention",),
  "dense ffn": ("dense_ffn",),
  "route": ("routing",),
  "permute": ("permute", "dispatch", "plan"),
  "exchange": ("exchange",),
  "experts": ("experts",),
  "combine": ("combine",),
  "shared": ("shared_experts",),
  "moe, rest": ("moe",),  # residuals, and sums over the mesh axis `model`
  "mtp": ("mtp",),
  "layers, rest": ("layers",),  # the loop over layers and what it keeps for the gradient
  "head": ("head",),  # the loss too
  "balance": ("balance",),
  "weights": ("weights",),  # casting and gathering them; backward, reducing and scattering
  "gradients": ("gradients",),  # summed over microbatches, in float32
  "optimizer": ("optimizer",),
}
UNNAMED = "unnamed"
DIRECTIONS = ("forward", "backward", "recomputed", "other")  # other: no gradient is taken of it

_NOTHING = (UNNAMED, "other")
_PART_OF = {scope: part for part, scopes in SCOPES.items() for scope in scopes}
# Their events last as long as those of the instructions inside them.
_AROUND_OTHERS = ("while", "conditional", "call")


class Operation(NamedTuple):
  """What an instruction is for."""

  part: str  # of SCOPES, or UNNAMED
  direction: str  # of DIRECTIONS
  is_collective: bool
  is_around_others: bool


class Program(NamedTuple):
  """A compiled program."""

  module: str  # its name, as a trace has it
  operations: dict[str, Operation]  # by the name of the instruction


def part_of(op_name: str) -> str:
  """Returns the part of an operation, named by its path of scopes."""
  scopes = [scope for scope in re.split(r"[/()]+", op_name) if scope in _PART_OF]
  return _PART_OF[scopes[-1]] if scopes else UNNAMED


def direction_of(op_name: str) -> str:
  """Returns which of `DIRECTIONS` an operation, named by its path of scopes, belongs to.

  A rematerialised operation is part of the backward pass and counts as recomputed alone.
  """
  if "rematted_computation" in op_name:
    return "recomputed"
  if "transpose(" in op_name:
    return "backward"
  return "forward" if "jvp(" in op_name else "other"


def program(text: str) -> Program:
  """Returns what each instruction of compiled HLO is for.

  Args:
    text: of `jax.stages.Compiled.as_text`.
  """
  module = re.match(r"HloModule ([\w.\-]+)", text)
  computations, _ = hlo.parse(text)
  found: dict[str, Operation] = {}
  for name, instructions in computations.items():
    for instruction, (part, direction) in zip(instructions, _parts(instructions)):
      is_collective = _is_collective(instruction, name, computations, found)
      is_around_others = instruction.opcode in _AROUND_OTHERS
      found[instruction.name] = Operation(part, direction, is_collective, is_around_others)
  return Program(module[1] if module else "", found)


def _parts(instructions: list[hlo.Instruction]) -> list[tuple[str, str]]:
  """Returns part and direction of each instruction of a computation."""
  named: dict[str, tuple[str, str]] = {}
  nameless = []
  of_user: dict[str, tuple[str, str]] = {}  # of the first one
  for instruction in reversed(instructions):
    if op_name := re.search(r'op_name="([^"]*)"', instruction.attributes):
      named[instruction.name] = part_of(op_name[1]), direction_of(op_name[1])
    elif instruction.name in of_user:
      named[instruction.name] = of_user[instruction.name]
    else:
      nameless.append(instruction)
    if (own := named.get(instruction.name, _NOTHING))[0] != UNNAMED:
      of_user |= dict.fromkeys(instruction.operands, own)
  for instruction in reversed(nameless):
    makers = (named[operand] for operand in instruction.operands if operand in named)
    named[instruction.name] = next(makers, _NOTHING)
  return [named[instruction.name] for instruction in instructions]


def _is_collective(instruction: hlo.Instruction, name: str, computations, found) -> bool:
  """Whether an instruction is a collective, wraps or fuses one, starts or ends it."""
  if any(True for _ in collective_bytes.collectives_in(instruction, name, computations)):
    return True
  if not instruction.opcode.endswith(("-done", "-update")):
    return False
  kind = instruction.opcode.removesuffix("-done")
  started = [found[operand] for operand in instruction.operands if operand in found]
  return kind in collective_bytes.KINDS or any(one.is_collective for one in started)
