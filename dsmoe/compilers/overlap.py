"""What a compiler scheduled between the start and the end of each collective.

In scheduled HLO a computation's instructions stand in the order in which they run. A collective that
the compiler split into a start and a done moves its data while what stands between them computes.
"""

import re
from typing import NamedTuple

from dsmoe.compilers import collective_bytes, hlo


class Scheduled(NamedTuple):
  """One collective of a program, and what computes while it moves its data."""

  kind: str  # of `collective_bytes.KINDS`
  name: str  # of its instruction, or of that which starts it
  times: int  # how often it runs
  scope: str  # the operation that it was made from, as jax names it; "" where that is not known
  is_split: bool  # whether there is a start and a done, or all wait for it
  between: tuple[str, ...]  # scopes of the products and kernels that run meanwhile, in their order

  @property
  def is_exposed(self) -> bool:
    """Whether no product and no kernel runs meanwhile."""
    return not self.between


def schedule(text: str) -> list[Scheduled]:
  """Returns the collectives of a compiled program, in its order.

  What runs between counts where it multiplies matrices or is a kernel (a custom call of Pallas),
  itself or by what it fuses or calls; other instructions, as copies, hide little.

  Args:
    text: scheduled HLO, as `jax.stages.Compiled.as_text` returns it.
  """
  computations, entry = hlo.parse(text)
  computing = {name: _computes(name, computations, {}) for name in computations}
  seen, found = set(), []
  for instruction, computation, times in hlo.executed(computations, entry):
    if instruction.name in seen or instruction.opcode.endswith("-done"):
      continue
    seen.add(instruction.name)
    inner = next(
      iter(collective_bytes.collectives_in(instruction, computation, computations)), None
    )
    if inner is None:
      continue
    scope, between = _scope(inner[0]) or _scope(instruction), []
    is_split = instruction.opcode.endswith("-start")
    if is_split:
      body = computations[computation]
      first = body.index(instruction)
      last = _done(body, first)
      between = [_scope(i) for i in body[first + 1 : last] if _is_computing(i, computing)]
    found.append(Scheduled(inner[2], instruction.name, times, scope, is_split, tuple(between)))
  return found


def _done(body: list[hlo.Instruction], first: int) -> int:
  """Returns the place of the instruction that ends the one at `first`."""
  names = {body[first].name}
  for place in range(first + 1, len(body)):
    if names & set(body[place].operands):
      if body[place].opcode.endswith("-done"):
        return place
      if body[place].opcode.endswith("-update"):
        names.add(body[place].name)
  return len(body)


def _scope(instruction: hlo.Instruction) -> str:
  found = re.search(r'op_name="([^"]*)"', instruction.attributes)
  return found[1] if found else ""


def _called(instruction: hlo.Instruction) -> list[str]:
  """Returns the computations that an instruction runs."""
  named = re.findall(r"(?:body|to_apply|calls)=%([\w.\-]+)", instruction.attributes)
  branches = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
  return named + (re.findall(r"%([\w.\-]+)", branches[1]) if branches else [])


def _computes(name: str, computations: dict, known: dict[str, bool]) -> bool:
  """Whether a computation multiplies matrices or calls a kernel."""
  if name not in known:
    known[name] = False  # of a computation that calls itself, of which there is none
    for instruction in computations.get(name, ()):
      if _is_product(instruction) or any(
        _computes(called, computations, known) for called in _called(instruction)
      ):
        known[name] = True
        break
  return known[name]


def _is_product(instruction: hlo.Instruction) -> bool:
  kernel = 'custom_call_target="tpu_custom_call"' in instruction.attributes
  return instruction.opcode in ("dot", "convolution") or kernel


def _is_computing(instruction: hlo.Instruction, computing: dict[str, bool]) -> bool:
  if instruction.opcode.endswith(("-start", "-done", "-update")):
    return False
  return _is_product(instruction) or any(computing[name] for name in _called(instruction))
