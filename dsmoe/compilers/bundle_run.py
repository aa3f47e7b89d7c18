"""Runs the scalar half of a kernel's VLIW code: which bundles are issued, which DMAs start.

Loop counters, branches, predicates and the sizes of transfers are scalars, computed by few kinds
of instructions; vector instructions do not affect control flow and are skipped. Values that
depend on data (a number popped from a vector, memory never written) are unknown, and branching on
one is an error.

Depends on an undocumented format: the text of `*-final_bundles.txt` that libtpu's compiler dumps
(`compile_only.dumped`), as `LIBTPU` writes it for v5p, v6e and tpu7x. A newer libtpu may rename
instructions, order their operands otherwise, or mark regions and branches differently. An
instruction that is not in the tables below raises `UnknownInstructionError`; kernels then report
their declared costs instead of counted ones (`compile_only.Kernel.run` returns None). The test that
fails first is tests/compilers/test_bundle_run.py::test_the_installed_libtpu_is_understood.
"""

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dsmoe.compilers.bundles import DELAY_SLOTS, GRANULE_BYTES

LIBTPU = "0.0.42"  # the version whose dumps were read

_MASK = 2**32 - 1
_REGION = 2**20  # words kept apart for each allocation of scalar memory
_NAME = re.compile(r"(%\w+) = ([\w.]+)(.*)", re.DOTALL)


def _signed(x: int) -> int:
  return (x & _MASK) - ((x & 2**31) << 1)


_ARITHMETIC: dict[str, Callable[[int, int], int]] = {
  "sadd.s32": operator.add,
  "ssub.s32": operator.sub,
  "smul.u32": operator.mul,
  "sand.u32": operator.and_,
  "sor.u32": operator.or_,
  "sxor.u32": operator.xor,
  "sshll.u32": lambda a, b: a << b if b < 32 else 0,
  "sshrl.u32": lambda a, b: (a & _MASK) >> b if b < 32 else 0,
  "sshra.s32": lambda a, b: _signed(a) >> min(b, 31),
  "smin.u32": lambda a, b: min(a & _MASK, b & _MASK),
  "smax.u32": lambda a, b: max(a & _MASK, b & _MASK),
  "sdiv.u32": lambda a, b: (a & _MASK) // (b & _MASK),
  "srem.u32": lambda a, b: (a & _MASK) % (b & _MASK),
}
_COMPARE = {
  "eq": operator.eq,
  "ne": operator.ne,
  "lt": operator.lt,
  "le": operator.le,
  "gt": operator.gt,
  "ge": operator.ge,
}
_LOGIC: dict[str, Callable[[Any, Any], Any]] = {
  "por": lambda a, b: True if True in (a, b) else None if None in (a, b) else False,
  "pnand": lambda a, b: True if False in (a, b) else None if None in (a, b) else False,
  "pand": lambda a, b: False if False in (a, b) else None if None in (a, b) else True,
}


class UnknownInstructionError(NotImplementedError):
  """A scalar instruction or a kind of DMA that this interpreter does not know."""


class Instruction(NamedTuple):
  """The instruction of one slot."""

  name: str  # of the result
  opcode: str
  predicate: tuple[bool, str] | None  # (whether it is negated, its name)
  otherwise: str | None  # the result where the predicate is false
  operands: list[str]


def _unknown(what: str, i: Instruction) -> UnknownInstructionError:
  return UnknownInstructionError(
    f"{what} is not known to dsmoe/compilers/bundle_run.py, which reads the code of libtpu "
    f"{LIBTPU}: {' '.join([i.name, '=', i.opcode, *i.operands])}"
  )


class BundleRun(NamedTuple):
  """What a kernel's code did."""

  visits_N: np.ndarray  # int64, how often each bundle was issued
  moved: dict[str, int]  # bytes by direction, "hbm_to_vmem" for instance


def _decode(text: str) -> Instruction | None:
  text = re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL).strip()
  match = _NAME.match(text)
  if match is None:
    return None
  name, opcode, rest = match.groups()
  rest = re.sub(r"\[(thread|resolvable):[^\]]*\]", "", rest).strip()
  predicate = otherwise = None
  guard = re.search(r"\((!?)(%\w+)(?:,\s*(%\w+))?\)", rest)
  if guard:
    predicate, otherwise = (bool(guard[1]), guard[2]), guard[3]
    rest = f"{rest[: guard.start()]} {rest[guard.end() :]}"
  return Instruction(name, opcode, predicate, otherwise, _split(rest))


def _split(text: str) -> list[str]:
  """Splits operands at commas and blanks outside brackets."""
  parts, depth = [""], 0
  for c in text:
    depth += {"[": 1, "]": -1}.get(c, 0)
    if depth == 0 and c in ", \n":
      parts.append("")
    else:
      parts[-1] += c
  return [part for part in parts if part]


class _Machine:
  """The scalar state of a core: registers by name, memory by word."""

  def __init__(self, core: int, operands: Mapping[int, np.ndarray], core_ids: Sequence[str]):
    self.values: dict[str, Any] = {}
    self.written: dict[str, int] = {}
    self.memory: dict[int, Any] = {}
    self.operands = operands
    self.addresses: dict[int, int] = {}  # of operands in HBM or VMEM
    self.clock = 0
    self.moved: dict[str, int] = {}
    for allocation in core_ids:
      self.store(self.address(allocation), core)

  def set(self, name: str, value: Any) -> None:
    self.clock += 1
    self.values[name], self.written[name] = value, self.clock

  def store(self, address: int | None, value: Any) -> None:
    if address is None:
      raise ValueError("the address that a scalar is stored to must not depend on data")
    self.memory[address] = value

  def value(self, text: str) -> Any:
    if text.startswith("!"):
      value = self.value(text[1:])
      return None if value is None else not value
    if text.startswith("%"):
      return self.values.get(text)
    if text.startswith("["):
      return self.address(text)
    return int(text, 0)

  def address(self, text: str) -> int | None:
    """Returns where `[smem:[#allocation3 + %s1]]`, `#allocation3` or `[%s1 + $0x4]` is."""
    total = 0
    for part in re.findall(r"#allocation(\d+)\w*|(%\w+)|\$(0x[0-9a-f]+|\d+)", text):
      allocation, register, number = part
      value = (
        (int(allocation) + 1) * _REGION
        if allocation
        else self.values.get(register)
        if register
        else int(number, 0)
      )
      if value is None:
        return None
      total += value
    return total

  def holds(self, predicate: tuple[bool, str] | None) -> bool | None:
    if predicate is None:
      return True
    value = self.values.get(predicate[1])
    return None if value is None else bool(value) != predicate[0]

  def phi(self, i: Instruction) -> None:
    known = [o for o in i.operands if o in self.written]
    latest = max(known, key=self.written.__getitem__, default=None)
    self.set(i.name, self.values[latest] if latest else None)

  def execute(self, i: Instruction) -> None:
    holds = self.holds(i.predicate)
    if i.opcode.startswith("dma."):
      self.transfer(i, holds)
    elif i.opcode == "sst":
      address = self.address(i.operands[0])
      if holds is not False:
        self.store(address, self.value(i.operands[1]) if holds else None)
    elif i.name.startswith(("%s", "%p")):
      if holds is None:
        self.set(i.name, None)
      elif holds:
        self.set(i.name, self.result(i))
      elif i.otherwise is not None:
        self.set(i.name, self.value(i.otherwise))

  def result(self, i: Instruction) -> Any:
    opcode = i.opcode
    if opcode == "sld":
      address = self.address(i.operands[0])
      return None if address is None else self.memory.get(address)
    if opcode.startswith("inlined_call_operand"):
      return self.operand(i)
    if opcode == "spop":
      return None
    values = [self.value(o) for o in i.operands]
    if opcode in ("smov", "pmov", "int_to_ptr.hbm", "int_to_ptr.vmem", "int_to_ptr.smem"):
      return values[-1]
    if opcode.startswith("int_to_ptr"):
      return values[-1]
    if opcode == "scalar_select":
      return None if values[0] is None else values[1] if values[0] else values[2]
    if opcode == "pneg":
      return None if values[0] is None else not values[0]
    if opcode in _LOGIC:
      return _LOGIC[opcode](*(None if v is None else bool(v) for v in values))
    if None in values:
      return None
    if opcode.startswith("scalar_lea"):
      return sum(values[:2])
    if opcode in _ARITHMETIC:
      return _signed(_ARITHMETIC[opcode](*values))
    if opcode.startswith("scmp."):
      _, how, kind, *_ = opcode.split(".")
      a, b = (v & _MASK if kind == "u32" else _signed(v) for v in values)
      return _COMPARE[how](a, b)
    raise _unknown(f"scalar instruction {opcode}", i)

  def operand(self, i: Instruction) -> Any:
    """Returns the address of a kernel's operand, or its number if it is one in scalar memory."""
    index = int(re.search(r"index: (\d+)", " ".join(i.operands))[1])  # type: ignore[index]
    if i.opcode.endswith((".hbm", ".vmem")):
      address = (index + 1) * _REGION
      self.addresses[address] = index
      return address
    given = self.operands.get(index)
    return None if given is None else int(np.asarray(given).reshape(-1)[0])

  def transfer(self, i: Instruction, holds: bool | None) -> None:
    direction = i.opcode[len("dma.") :]
    if "_to_" not in direction:
      raise _unknown("a DMA without its direction", i)
    source, granules, target, *_ = (self.value(o) for o in i.operands)
    if holds is None or granules is None:
      raise ValueError(f"a DMA's predicate and size must not depend on data: {i}")
    if not holds:
      return
    self.moved[direction] = self.moved.get(direction, 0) + granules * GRANULE_BYTES
    if direction.endswith("_to_smem") and target is not None:
      index = self.addresses.get(source if direction.startswith("hbm") else (source or 0) >> 4)
      given = self.operands.get(index) if index is not None else None
      for k, number in enumerate([] if given is None else np.asarray(given).reshape(-1)):
        self.memory[target + k] = int(number)


def run(
  bundles: Sequence[str],
  operands: Mapping[int, np.ndarray] | None = None,
  core: int = 0,
  most: int = 10**7,
) -> BundleRun:
  """Runs a kernel's scalar code.

  Args:
    bundles: as `bundles.read_bundles` returns them.
    operands: the integer operands that the kernel reads as scalars, by their index: grid sizes
      that are data, prefetched scalars.
    core: index of the device's core that runs the code.
    most: limit on the stretches of code to run, so that a loop without end is an error.

  Raises:
    ValueError: if a branch or a DMA depends on an unknown value.
    UnknownInstructionError: for an instruction that is not in the tables above.
  """
  starts: dict[int, int] = {}
  core_ids: list[str] = []
  code: list[list[Instruction]] = []
  phis: list[list[Instruction]] = []
  branches: list[tuple[tuple[bool, str] | None, int] | None] = []
  for n, bundle in enumerate(bundles):
    for region in re.findall(r"Start(?:/End empty)? region (\d+)", bundle):
      starts.setdefault(int(region), n)
    core_ids += re.findall(r"sld (\[smem:\[#allocation\d+\]\])\s*/\* core id \*/", bundle)
    # A DMA whose strides lie in memory says in a remark from where to where it goes.
    plain = re.sub(r"dma\.general(.*?)/\* (\w+)-to-(\w+) \*/", r"dma.\2_to_\3\1", bundle)
    plain = re.sub(r"/\*.*?\*/", "", plain, flags=re.DOTALL)
    slots = [s for text in plain.rpartition("}")[0].split(";;") if (s := _decode(text))]
    jump = next((s for s in slots if s.opcode == "sbr.rel"), None)
    region = re.search(r"target\s*=\s*\$region(\d+)", plain)
    branches.append((jump.predicate, int(region[1])) if jump and region else None)
    phis.append([s for s in slots if s.opcode in ("sphi", "pphi")])
    # A pointer made of a number stands in the number's bundle.
    rest = [s for s in slots if _matters(s)]
    code.append(sorted(rest, key=lambda s: s.opcode.startswith("int_to_ptr")))
  machine = _Machine(core, operands or {}, core_ids)
  # Straight code without scalars is passed at once: the first bundle, and the one behind the last.
  busy = [n for n in range(len(bundles)) if code[n] or phis[n] or branches[n]] + [len(bundles)]
  following = np.searchsorted(busy, np.arange(len(bundles) + 1)).tolist()
  entered_N = np.zeros(len(bundles) + 1, np.int64)
  n, target, left = 0, -1, 0
  for _ in range(most):
    if n >= len(bundles):
      return BundleRun(np.cumsum(entered_N)[:-1], machine.moved)
    if branch := branches[n]:
      taken = machine.holds(branch[0])
      if taken is None or (taken and branch[1] not in starts):
        raise ValueError(f"a branch must not depend on data: {bundles[n][:200]}")
      if taken:
        target, left = starts[branch[1]], DELAY_SLOTS + 1
    for i in phis[n]:
      machine.phi(i)
    for i in code[n]:
      machine.execute(i)
    end = n + 1 if left else busy[following[n + 1]]
    entered_N[n] += 1
    entered_N[end] -= 1
    if left:
      left -= 1
      end = end if left else target
    n = end
  raise ValueError(f"the kernel's code must end, but did not in {most} stretches")


def _matters(slot: Instruction) -> bool:
  if slot.opcode.startswith("dma."):
    return not slot.opcode.startswith("dma.done")
  if slot.opcode in ("sbr.rel", "sphi", "pphi", "shalt.err", "sfence"):
    return False
  return slot.opcode == "sst" or slot.name.startswith(("%s", "%p"))
