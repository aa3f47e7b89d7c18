"""The devices that a launched run is given, read from a flag such as v5p:4x4x4 or h100:2x8."""

import dataclasses
import math
import re

from dsmoe.planning import chips
from dsmoe.planning.chips import Chip, Cloud

CPU = "cpu"
TPUS = tuple(name for name, chip in chips.CHIPS.items() if chip.cloud)
GPUS = tuple(name for name, chip in chips.CHIPS.items() if not chip.cloud)


@dataclasses.dataclass(frozen=True)
class Topology:
  """Equal slices of TPUs, or hosts with GPUs or CPU devices.

  Attributes:
    kind: name of the chip in the table of chips, or "cpu".
    shape: chips along each dimension of a TPU slice; otherwise (hosts, devices of a host).
    num_slices: of TPUs; otherwise 1.
  """

  kind: str
  shape: tuple[int, ...]
  num_slices: int = 1

  @property
  def chip(self) -> Chip | None:
    return chips.CHIPS.get(self.kind)

  @property
  def cloud(self) -> Cloud | None:
    return self.chip.cloud if self.chip else None

  @property
  def size(self) -> str:
    """How a slice's shape is written, 4x4x4 say."""
    return "x".join(map(str, self.shape))

  @property
  def hosts(self) -> int:
    """Number of hosts of a slice."""
    return math.prod(self.shape) // self.cloud.chips_per_vm if self.cloud else self.shape[0]

  @property
  def num_devices(self) -> int:
    """Number of jax devices of all slices."""
    per_chip = self.chip.devices_per_chip if self.chip else 1
    return math.prod(self.shape) * per_chip * self.num_slices

  @property
  def devices_per_host(self) -> int:
    return self.num_devices // (self.hosts * self.num_slices)

  @property
  def joined(self) -> int:
    """Number of groups of devices that fast links join, as `mesh.slices` counts them."""
    by_host = not self.cloud and self.hosts > 1 and self.devices_per_host > 1
    return self.hosts if by_host else self.num_slices

  def __str__(self) -> str:
    hosts = self.hosts * self.num_slices
    slices = f"{self.num_slices} x " if self.num_slices > 1 else ""
    where = "process" if self.kind == CPU else "host"
    plural = ("es" if self.kind == CPU else "s") * (hosts > 1)
    return (
      f"{slices}{self.kind}:{self.size}, {self.num_devices} device{'s' * (self.num_devices > 1)} "
      f"on {hosts} {where}{plural}"
    )


def parse(text: str, num_slices: int = 1) -> Topology:
  """Reads a topology.

  Args:
    text: "v5p:4x4x4", a slice of TPUs by the number of chips along each dimension; "h100:2x8", two
      hosts of eight GPUs; "cpu:2x4", two processes with four devices each.
    num_slices: how many of such slices the run has.

  Raises:
    ValueError: for another form, a kind that is not known, a slice that there is not, or several
      slices of hosts without TPUs.
  """
  kind, _, size = text.partition(":")
  if kind not in (*TPUS, *GPUS, CPU):
    raise ValueError(
      f"a topology must begin with one of {', '.join((*TPUS, *GPUS, CPU))}, got {text!r}"
    )
  chip = chips.CHIPS.get(kind)
  example = "2x4" if chip is None else "2x8" if chip.cloud is None else "4x4"
  example = "4x4x4" if chip and chip.cloud and chip.cloud.cubes else example
  if not re.fullmatch(r"[1-9]\d{0,4}(x[1-9]\d{0,4}){1,2}", size):
    raise ValueError(f"a topology of {kind} must be written {kind}:{example}, got {text!r}")
  shape = tuple(map(int, size.split("x")))
  if chip and chip.cloud:
    if not chip.cloud.cubes and len(shape) == 3 and shape[2] == 1:
      shape = shape[:2]  # as the compiler spells it
    if not chip.cloud.has(shape):
      shapes = ", ".join("x".join(map(str, s)) for s in chip.cloud.shapes)
      cubes = " and ascending multiples of 4 such as 4x4x8" * chip.cloud.cubes
      raise ValueError(
        f"a slice of {kind} must be one of {shapes}{cubes}, up to {chip.cloud.max_chips} chips, "
        f"got {size}"
      )
    return Topology(kind, shape, num_slices)
  if len(shape) != 2:
    raise ValueError(f"a topology of {kind} must be written {kind}:{example}, got {text!r}")
  if num_slices != 1:
    raise ValueError(f"only TPUs have slices; --num_slices must be 1 for {kind}, got {num_slices}")
  return Topology(kind, shape)
