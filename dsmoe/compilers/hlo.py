"""Counts in scheduled HLO how often each instruction runs and the bytes it moves to and from HBM.

XLA's own `cost_analysis` counts a loop's body once, counts arrays on the chip like those in HBM, and
ignores padding. Here a loop's body counts as often as its condition says, arrays with a memory
space (`S(1)`: VMEM) cost nothing, and a layout's tiles are padded.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([^{}]*)\})?")
# Instructions that move no data.
_FREE = {
  "parameter",
  "constant",
  "tuple",
  "get-tuple-element",
  "bitcast",
  "while",
  "conditional",
  "after-all",
  "partition-id",
  "replica-id",
  "opt-barrier",
  "optimization-barrier",
}
_FREE_CALLS = ("AllocateBuffer", "PrepareAsyncCall", "AssumeGatherIndices")


class Instruction(NamedTuple):
  """One line of HLO."""

  name: str
  opcode: str
  shape: str
  arguments: str  # the text inside its brackets
  attributes: str  # the text behind them
  root: bool

  @property
  def operands(self) -> list[str]:
    return re.findall(r"%([\w.\-]+)", self.arguments)


def _closing(text: str, start: int) -> int:
  """Returns the index after the bracket that closes the one at `start`."""
  depth = 0
  for i in range(start, len(text)):
    depth += {"(": 1, ")": -1}.get(text[i], 0)
    if depth == 0:
      return i + 1
  raise ValueError(f"unbalanced brackets in {text[:80]!r}")


def _instruction(line: str) -> Instruction | None:
  match = re.match(r"\s+(ROOT )?%([\w.\-]+) = ", line)
  if match is None:
    return None
  rest = line[match.end() :]
  end = _closing(rest, 0) if rest.startswith("(") else rest.index(" ")
  shape, rest = rest[:end], rest[end:].lstrip()
  opcode, _ = rest.split("(", 1)
  end = _closing(rest, len(opcode))
  arguments = rest[len(opcode) + 1 : end - 1]
  return Instruction(match[2], opcode, shape, arguments, rest[end:], bool(match[1]))


def parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
  """Returns the computations of an HLO module by name, and the entry's name."""
  computations: dict[str, list[Instruction]] = {}
  entry, body = "", None
  for line in text.splitlines():
    header = re.match(r"(ENTRY )?%([\w.\-]+) \(.*\{$", line)
    if header:
      body = computations.setdefault(header[2], [])
      entry = header[2] if header[1] else entry
    elif line.startswith("}"):
      body = None
    elif body is not None and (found := _instruction(line)) is not None:
      body.append(found)
  if not entry:
    raise ValueError("the text must be an HLO module with an ENTRY computation")
  return computations, entry


def executed(
  computations: dict[str, list[Instruction]], name: str, times: int = 1
) -> Iterator[tuple[Instruction, str, int]]:
  """Yields (instruction, its computation, how often it runs), following loops and branches.

  Every branch of a conditional counts; a loop without a known bound counts once.
  """
  for instruction in computations[name]:
    called = re.search(r"(?:body|to_apply)=%([\w.\-]+)", instruction.attributes)
    branches = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
    if instruction.opcode == "while" and called:
      condition = re.search(r"condition=%([\w.\-]+)", instruction.attributes)
      known = re.search(r'"known_trip_count":\{"n":"(\d+)"', instruction.attributes)
      trips = _trips(computations, condition[1]) if condition else 1
      trips = int(known[1]) if known else trips
      yield from executed(computations, called[1], times * trips)
    elif instruction.opcode == "call" and called:
      yield from executed(computations, called[1], times)
    elif instruction.opcode == "conditional" and branches:
      for branch in re.findall(r"%([\w.\-]+)", branches[1]):
        yield from executed(computations, branch, times)
    yield instruction, name, times


def _trips(computations: dict[str, list[Instruction]], condition: str) -> int:
  """Returns the only constant that a loop's condition compares with; 1 if there is no such one."""
  instructions = list(computations[condition])
  for instruction in computations[condition]:
    if called := re.search(r"calls=%([\w.\-]+)", instruction.attributes):
      instructions += computations[called[1]]
  bounds = {
    int(i.arguments)
    for i in instructions
    if i.opcode == "constant" and re.match(r"[su]32\[\]", i.shape)
  }
  return bounds.pop() if len(bounds) == 1 else 1


def data_bytes(shape: str) -> int:
  """Returns the bytes of a shape's elements, wherever they lie, or of all in a tuple of shapes."""
  return sum(_bytes(match[1], match[2], None) for match in _ARRAY.finditer(shape))


def array_bytes(shape: str) -> int:
  """Returns the bytes that a shape or tuple of shapes occupies in HBM, with padded tiles."""
  return sum(_bytes(*match.groups()) for match in _ARRAY.finditer(shape))


def _bytes(dtype: str, dims: str, layout: str | None) -> int:
  bits = re.search(r"\d+", dtype)
  if dtype in ("token", "opaque") or re.search(r"S\(\d+\)", layout or ""):
    return 0
  sizes = [int(d) for d in dims.split(",") if d]
  order, _, rest = (layout or "").partition(":")
  if order:
    sizes = [sizes[int(i)] for i in order.split(",")]  # the fastest first
  tile = re.match(r"T\(([\d,]+)\)", rest)
  if tile:
    for i, t in enumerate(reversed([int(t) for t in tile[1].split(",")])):
      if i < len(sizes):
        sizes[i] = -(-sizes[i] // t) * t
  return math.prod(sizes) * (int(bits[0]) if bits else 8) // 8


def hbm_bytes(instruction: Instruction, computation: str, computations) -> int:
  """Returns the bytes that an instruction, run once, reads from and writes to HBM.

  An instruction that only slices or gathers from an operand reads just those elements; one that
  updates a slice in place writes just the slice.
  """
  opcode, attributes = instruction.opcode, instruction.attributes
  if opcode in _FREE or (opcode == "call" and "to_apply" in attributes):
    return 0
  if opcode == "custom-call" and any(name in attributes for name in _FREE_CALLS):
    return 0
  if opcode.endswith("-done"):
    return array_bytes(instruction.shape)  # its reads were counted at its start
  outer = {i.name: i for i in computations[computation]}
  inner, names, root = [instruction], instruction.operands, instruction
  if opcode == "fusion":
    called = re.search(r"calls=%([\w.\-]+)", attributes)
    inner = computations[called[1]] if called else []
    parameters = [i for i in inner if i.opcode == "parameter"]
    names = [i.name for i in sorted(parameters, key=lambda i: int(i.arguments))]
    root = next(i for i in inner if i.root)
  read = 0
  for name, operand in zip(names, instruction.operands):
    whole = array_bytes(outer[operand].shape)
    read += min(whole, _taken(name, whole, inner))
  if opcode.endswith("-start"):
    return read
  known = outer | {i.name: i for i in inner}
  parts = [known[name] for name in root.operands] if root.opcode == "tuple" else [root]
  arrays = [_bytes(*match.groups()) for match in _ARRAY.finditer(instruction.shape)]
  if len(parts) != len(arrays):  # an instruction that returns a tuple
    return read + sum(arrays)
  return read + sum(min(whole, _put(part, whole, known)) for part, whole in zip(parts, arrays))


def _taken(name: str, whole: int, instructions: list[Instruction]) -> int:
  """Returns the bytes of an operand that instructions read."""
  total = 0
  for user in instructions:
    if name not in user.operands:
      continue
    if user.opcode == "bitcast":
      total += _taken(user.name, whole, instructions)
    elif user.opcode in ("dynamic-slice", "slice", "gather") and user.operands[0] == name:
      total += array_bytes(re.sub(r"S\(\d+\)", "", user.shape))
    elif user.opcode != "dynamic-update-slice" or user.operands[0] != name:
      return whole
  return total


def _put(part: Instruction, whole: int, known: dict[str, Instruction]) -> int:
  """Returns the bytes that a result's instruction writes."""
  if part.opcode == "bitcast" and part.operands[0] in known:
    return _put(known[part.operands[0]], whole, known)
  if part.opcode == "dynamic-update-slice":
    return array_bytes(re.sub(r"S\(\d+\)", "", known[part.operands[1]].shape))
  return whole
