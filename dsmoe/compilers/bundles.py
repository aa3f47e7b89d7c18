"""Reads the VLIW code of a kernel that the TPU compiler dumps.

`final_bundles.txt` holds one bundle for each address, its instructions separated by `;;`; the table
beside it (`final_hlo-static-per-bundle-utilization.txt`) holds the slots that each bundle fills.
Both are static: a loop's body appears once. A backward branch makes a loop, whose number of trips
is the constant that its exit predicate compares the counter with, if there is one.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

GRANULE_BYTES = 32  # unit of a DMA's size on v5p, v6e and tpu7x
DELAY_SLOTS = 4  # bundles after a branch that run before it takes effect

_BUNDLE = re.compile(r"^\s*(?:0x[0-9a-f]+|\d+)\s*(?:[A-Z]{2}\s*)*:[\s>]*\{", re.MULTILINE)
_COMMENT = re.compile(r"/\*.*?\*/", re.DOTALL)
_BRANCH = re.compile(r"sbr\.rel\s*(?:\((!?)(%\w+)\))?,?\s*target\s*=\s*\$region(\d+)")
_DMA = re.compile(r"\bdma\.([a-z]+_to_[a-z]+)\b[^;]*?size_in_granules=\*/(\d+)?")
_MATMUL = re.compile(r"\bvmatmul\.(?:[a-z]+\.)?(bf16|f32|f8\w*|[su][48])")


class Loop(NamedTuple):
  """Bundles `first` to `last`, both included; `trips` is None if it is not a constant."""

  first: int
  last: int
  trips: int | None


def read_bundles(text: str) -> list[str]:
  """Returns the text of each bundle, comments included."""
  starts = list(_BUNDLE.finditer(text))
  ends = [m.start() for m in starts[1:]] + [len(text)]
  return [text[m.end() : end] for m, end in zip(starts, ends)]


def loops(bundles: Sequence[str]) -> list[Loop]:
  """Finds the loops; outer loops come before inner ones."""
  start: dict[int, int] = {}
  for i, bundle in enumerate(bundles):
    for region in re.findall(r"Start(?:/End empty)? region (\d+)", bundle):
      start.setdefault(int(region), i)
  found = []
  for i, bundle in enumerate(bundles):
    branch = _BRANCH.search(_COMMENT.sub("", bundle))
    if branch is None or start.get(int(branch[3]), i + 1) > i:
      continue
    first = start[int(branch[3])]
    last = min(i + DELAY_SLOTS, len(bundles) - 1)
    found.append(Loop(first, last, _trips(bundles[first : i + 1], branch[2])))
  return sorted(found, key=lambda loop: (loop.first, -loop.last))


def _trips(body: Sequence[str], predicate: str) -> int | None:
  test = re.compile(re.escape(predicate) + r" = scmp\.ge\.[su]32\.totalorder [^,]+, (\d+)\b")
  matches = [m for bundle in body if (m := test.search(bundle))]
  return int(matches[-1][1]) if matches else None


def runs(bundles: Sequence[str], found: Sequence[Loop]) -> np.ndarray:
  """Returns how often each bundle runs at most, [n] int64, with every branch in a loop taken.

  A loop without a constant counts once.
  """
  times_N = np.ones(len(bundles), np.int64)
  for loop in found:
    times_N[loop.first : loop.last + 1] *= loop.trips or 1
  return times_N


def dma_bytes(bundles: Sequence[str], times_N: np.ndarray) -> dict[str, int]:
  """Returns the bytes moved in each direction ("hbm_to_vmem"), each DMA as often as its bundle.

  A pipelined grid copies a block only when its index changes, so this is exact where every
  block changes at every step, and a bound elsewhere.
  """
  total: dict[str, int] = {}
  for bundle, times in zip(bundles, times_N.tolist()):
    for direction, granules in transfers(bundle):
      if granules is None:
        raise ValueError(f"the size of a transfer must be a constant, got {bundle[:200]!r}")
      total[direction] = total.get(direction, 0) + granules * GRANULE_BYTES * times
  return total


def transfers(bundle: str) -> list[tuple[str, int | None]]:
  """Returns (direction, granules) of the DMAs that a bundle starts; None if not constant."""
  code = re.sub(r"/\*(?!size_in_granules).*?\*/", "", bundle, flags=re.DOTALL)
  return [(m[1], int(m[2]) if m[2] else None) for m in _DMA.finditer(code)]


def matmul_macs(bundles: Sequence[str], times_N: np.ndarray, mxu_size: int) -> int:
  """Returns the multiplications of all vmatmuls: 8 sublanes of packed rows x the whole MXU.

  Args:
    mxu_size: rows and columns of a matrix unit: 128 on v5p, 256 on v6e and tpu7x.
  """
  total = 0
  for bundle, times in zip(bundles, times_N.tolist()):
    for match in _MATMUL.finditer(_COMMENT.sub("", bundle)):
      bits = int(re.search(r"\d+", match[1])[0])  # type: ignore[index]
      total += times * 8 * (32 // bits) * mxu_size**2
  return total


class Utilization(NamedTuple):
  """The slots that bundles fill, by kind of slot."""

  names: list[str]
  capacity: np.ndarray  # [slots]
  used_NS: np.ndarray  # [bundles, slots]

  def share(self, name: str) -> float:
    """Returns the share of a kind of slot that is filled."""
    slot = self.names.index(name)
    return float(self.used_NS[:, slot].mean() / self.capacity[slot])

  def used(self, name: str) -> int:
    """Returns how many slots of a kind all bundles fill."""
    return int(self.used_NS[:, self.names.index(name)].sum())


def read_utilization(text: str) -> Utilization:
  """Reads the table: a line of names, one of capacities, and one a bundle."""
  lines = [line for line in text.splitlines() if line.strip()]
  names = [name.strip() for name in lines[1].split(",")]
  rows = [line.split() for line in lines[4:]]
  return Utilization(
    names, np.array(lines[2].split(), int), np.array(rows, int).reshape(-1, len(names))
  )


def steady_state(
  bundles: Sequence[str], found: Sequence[Loop], use: Utilization
) -> tuple[Loop, float] | None:
  """Returns the loop that does most of the MXU's work and its occupancy, inner loops excluded.

  Returns None if no loop uses the MXU.
  """
  busy_N = use.used_NS[:, use.names.index("MXU")]
  times_N = runs(bundles, found)
  best = None
  for loop in found:
    own_N = np.zeros(len(bundles), bool)
    own_N[loop.first : loop.last + 1] = True
    for other in found:
      if other != loop and loop.first <= other.first and other.last <= loop.last:
        own_N[other.first : other.last + 1] = False
    work = int((busy_N * times_N)[own_N].sum())
    if work > (best[0] if best else 0):
      best = (work, loop, float(busy_N[own_N].mean() / use.capacity[use.names.index("MXU")]))
  return best[1:] if best else None
