"""Counts in compiled HLO the bytes that collectives send and receive, by mesh axis.

A collective is counted as often as the loops around it run, an asynchronous one at its start. What
counts is the data itself, unpadded, that an algorithm with the fewest bytes moves: among n devices
an all-gather of a shard of b bytes sends and receives (n - 1) b, a reduce-scatter the same, an
all-reduce of b bytes 2 (n - 1) / n b, an all-to-all of b bytes (n - 1) / n b. How much a ragged
all-to-all moves depends on its data: its buffers' sizes are counted, which are upper limits.

Devices are numbered in the order of the mesh, as `jax.jit` numbers them.
"""

import itertools
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from dsmoe.compilers import hlo

KINDS = (
  "all-gather",
  "reduce-scatter",
  "all-reduce",
  "all-to-all",
  "ragged-all-to-all",
  "collective-permute",
)


class Collective(NamedTuple):
  """One collective of a program, and what it moves in a run of the program; N devices."""

  kind: str  # of `KINDS`
  name: str  # of its instruction
  axes: tuple[str, ...]  # the mesh axes along which the devices of a group differ
  times: int  # how often it runs
  sent_N: np.ndarray  # int64 bytes, of all times together
  received_N: np.ndarray
  asynchronous: bool  # whether the compiler split it into a start and a done
  scope: str  # the operation that it was made from, as jax names it; "" where that is not known

  @property
  def upper_limit(self) -> bool:
    """Whether the bytes are those of buffers which the data need not fill."""
    return self.kind == "ragged-all-to-all"


def collectives(text: str, mesh_shape: Mapping[str, int]) -> list[Collective]:
  """Returns the collectives of a compiled program that move anything, in the program's order.

  Args:
    text: its HLO.
    mesh_shape: the size of each mesh axis, in the mesh's order; they multiply to the devices.
  """
  computations, entry = hlo.parse(text)
  found = []
  for instruction, computation, times in hlo.executed(computations, entry):
    for inner, where, kind in collectives_in(instruction, computation, computations):
      asynchronous = instruction.opcode.endswith("-start")
      one = _collective(inner, where, kind, times, asynchronous, computations, mesh_shape)
      if one.sent_N.any() or one.received_N.any():
        found.append(one)
  return found


def by_axis(found: Iterable[Collective]) -> dict[str, dict[str, int]]:
  """Sums collectives by mesh axis, and over all axes as "all".

  Returns:
    For the name of an axis, of several joined by "+" where a group spans them: `sent_bytes` and
    `received_bytes` of the device with the most, and the number of `collectives` run.
  """
  totals: dict[str, list] = {}
  for one in found:
    for name in ("+".join(one.axes), "all"):
      total = totals.setdefault(name, [0, 0, 0])
      total[0] = total[0] + one.sent_N
      total[1] = total[1] + one.received_N
      total[2] += one.times
  return {
    name: {
      "sent_bytes": int(np.max(sent)),
      "received_bytes": int(np.max(received)),
      "collectives": runs,
    }
    for name, (sent, received, runs) in sorted(totals.items())
  }


def collectives_in(instruction, computation: str, computations):
  """Yields (instruction, its computation, kind) of what an instruction is, wraps or fuses."""
  opcode = instruction.opcode.removesuffix("-start")
  if opcode in KINDS:
    yield instruction, computation, opcode
    return
  called = re.search(r"calls=%([\w.\-]+)", instruction.attributes)
  if called and instruction.opcode in ("fusion", "async-start"):
    for inner in computations.get(called[1], ()):
      for found, where, kind in collectives_in(inner, called[1], computations):
        # The TPU's reduce-scatter is an all-reduce inside a computation of this name.
        scatters = "all-reduce-scatter" in where and kind == "all-reduce"
        yield found, where, "reduce-scatter" if scatters else kind


def _collective(inner, where, kind, times, asynchronous, computations, mesh_shape) -> Collective:
  num_devices = int(np.prod(list(mesh_shape.values())))
  known = {i.name: i.shape for i in computations[where]}
  sizes = [hlo.data_bytes(known[name]) for name in inner.operands if name in known]
  sent_N, received_N = np.zeros((2, num_devices), np.int64)
  if kind == "collective-permute":
    pairs = re.search(r"source_target_pairs=(\{\{.*?\}\})", inner.attributes)
    groups = _braces(pairs[1]) if pairs else []
    for source, target in groups:
      if source != target:
        sent_N[source] += sum(sizes)
        received_N[target] += sum(sizes)
  else:
    groups = _groups(inner.attributes, num_devices)
    for group in groups:
      sent, received = _bytes(kind, sizes, len(group))
      sent_N[group] += sent
      received_N[group] += received
  scope = re.search(r'op_name="([^"]*)"', inner.attributes)
  return Collective(
    kind,
    inner.name,
    _axes(groups, mesh_shape),
    times,
    sent_N * times,
    received_N * times,
    asynchronous,
    scope[1] if scope else "",
  )


def _bytes(kind: str, sizes: list[int], n: int) -> tuple[int, int]:
  """Returns the bytes that one of n devices sends and receives, given its operands' sizes."""
  if n == 1:
    return 0, 0
  if kind == "ragged-all-to-all":  # operands: rows, the buffer for the result, four of sizes
    return sizes[0], sizes[1]
  b = sum(sizes)
  if kind == "all-gather":
    moved = (n - 1) * b
  elif kind == "all-reduce":
    moved = -(-2 * (n - 1) * b // n)
  else:
    moved = (n - 1) * b // n
  return moved, moved


def _braces(text: str) -> list[list[int]]:
  return [[int(n) for n in part.split(",")] for part in re.findall(r"\{([\d,]+)\}", text)]


def _groups(attributes: str, num_devices: int) -> list[list[int]]:
  """Reads replica groups in each of the forms that XLA prints: {{0,1}}, [2,4]<=[8], mesh[...]."""
  match = re.search(r"replica_groups=(\{\{.*?\}\}|\{\}|\S+(?: \{[^}]*\})?)", attributes)
  text = match[1].rstrip(",") if match else "{}"
  if text.startswith("{{"):
    return _braces(text)
  if iota := re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
    shape, dims = ([int(n) for n in iota[i].split(",")] for i in (1, 2))
    order = [int(n) for n in iota[3].split(",")] if iota[3] else range(len(dims))
    return np.arange(num_devices).reshape(dims).transpose(order).reshape(shape).tolist()
  if named := re.match(r"@?mesh\[([^\]]*)\] \{([^}]*)\}", text):
    axes = dict(re.findall(r"'?(\w+)'?=(\d+)", named[1]))
    dims, along = [int(n) for n in axes.values()], re.findall(r"'?(\w+)'?", named[2])
    places = [list(axes).index(axis) for axis in along]
    others = [i for i in range(len(dims)) if i not in places]
    size = int(np.prod([dims[i] for i in places]))
    grid = np.arange(num_devices).reshape(dims).transpose(others + places)
    return grid.reshape(-1, size).tolist()
  if text == "{}":
    return [list(range(num_devices))]
  raise ValueError(f"replica_groups must be in a form that XLA prints, got {text!r}")


def _axes(groups: list[list[int]], mesh_shape: Mapping[str, int]) -> tuple[str, ...]:
  """Returns the mesh axes along which the devices of some group differ."""
  sizes = list(mesh_shape.values())
  place = np.stack(np.unravel_index(np.arange(np.prod(sizes)), sizes))
  differs = np.zeros(len(mesh_shape), bool)
  for group in groups:
    differs |= (place[:, group] != place[:, group[:1]]).any(axis=1)
  return tuple(itertools.compress(mesh_shape, differs))
