"""The one table of chips: what a device of each kind can do at most, with sources.

Figures are a jax device's: a TPU7x chip shows as two devices, every other chip here as one. A
figure that no source gives is None.
"""

import dataclasses
import math
from typing import Any

_TERA, _GB, _GIB = 1e12, 1e9, 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cloud:
  """How Google Cloud lends TPUs of a kind: as slices of VMs with several chips each."""

  accelerator: str  # the node label cloud.google.com/gke-tpu-accelerator
  machine: str  # the type of the VMs
  chips_per_vm: int = 4
  xpk: str  # xpk spells a slice <xpk>-4x4x4
  shapes: tuple[tuple[int, ...], ...]  # the slices there are, in chips along each dimension
  max_chips: int  # of a slice
  cubes: bool = False  # whether there are also slices of whole cubes of 4 x 4 x 4 chips

  def has(self, shape: tuple[int, ...]) -> bool:
    """Whether there are slices of this shape."""
    whole = len(shape) == 3 and all(n % 4 == 0 and n > 0 for n in shape)
    small = math.prod(shape) <= self.max_chips
    return shape in self.shapes or (self.cubes and whole and small and list(shape) == sorted(shape))


_FLAT = ((2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_SMALL_TORUS = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
  """What one jax device of a kind can do at most."""

  name: str  # as users and topologies spell it
  device_kinds: tuple[str, ...]  # as `jax.Device.device_kind` spells it
  peak_flops: float  # dense bfloat16, FLOP/s
  fp8_flops: float | None = None  # dense FP8, FLOP/s; None without units faster than bfloat16's
  hbm_bytes: float | None = None
  hbm_bytes_per_sec: float | None = None
  interconnect_bytes_per_sec: float | None = None  # ICI or NVLink, both directions summed
  network_bytes_per_sec: float | None = None  # a GPU's share of its host's, both directions summed
  devices_per_chip: int = 1
  clock_hz: float | None = None  # at which the matrix units reach the peak
  mxu_size: int | None = None  # rows and columns of a TPU's matrix unit
  # Names and slices: https://cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus, and xpk.
  cloud: Cloud | None = None
  source: str


# Clocks follow from peak_flops = cores x matrix units x rows a cycle x mxu_size^2 x 2 x clock_hz.
_TABLE = (
  Chip(
    name="v4",
    device_kinds=("TPU v4",),
    peak_flops=275 * _TERA,
    hbm_bytes=32 * _GIB,
    hbm_bytes_per_sec=1200 * _GB,
    cloud=Cloud(
      accelerator="tpu-v4-podslice",
      machine="ct4p-hightpu-4t",
      xpk="v4",
      shapes=_SMALL_TORUS,
      max_chips=4096,
      cubes=True,
    ),
    source="https://cloud.google.com/tpu/docs/v4, which gives no bandwidth of the interconnect",
  ),
  Chip(
    name="v5e",
    device_kinds=("TPU v5 lite", "TPU v5e"),
    peak_flops=197 * _TERA,
    hbm_bytes=16 * _GIB,
    hbm_bytes_per_sec=819 * _GB,
    interconnect_bytes_per_sec=400 * _GB,
    cloud=Cloud(
      accelerator="tpu-v5-lite-podslice",
      machine="ct5lp-hightpu-4t",
      xpk="v5litepod",
      shapes=_FLAT,
      max_chips=256,
    ),
    source="https://cloud.google.com/tpu/docs/v5e",
  ),
  Chip(
    name="v5p",
    device_kinds=("TPU v5", "TPU v5p"),
    peak_flops=459 * _TERA,
    hbm_bytes=95 * _GIB,
    hbm_bytes_per_sec=2765 * _GB,
    interconnect_bytes_per_sec=1200 * _GB,
    clock_hz=1.75e9,
    mxu_size=128,
    cloud=Cloud(
      accelerator="tpu-v5p-slice",
      machine="ct5p-hightpu-4t",
      xpk="v5p",
      shapes=_SMALL_TORUS,
      max_chips=8960,
      cubes=True,
    ),
    source="https://cloud.google.com/tpu/docs/v5p; its FP8 peak is that of bfloat16",
  ),
  Chip(
    name="v6e",
    device_kinds=("TPU v6 lite", "TPU v6e"),
    peak_flops=918 * _TERA,
    hbm_bytes=32 * _GIB,
    hbm_bytes_per_sec=1640 * _GB,
    interconnect_bytes_per_sec=800 * _GB,
    clock_hz=1.75e9,
    mxu_size=256,
    cloud=Cloud(
      accelerator="tpu-v6e-slice",
      machine="ct6e-standard-4t",
      xpk="v6e",
      shapes=_FLAT,
      max_chips=256,
    ),
    source="https://cloud.google.com/tpu/docs/v6e; its FP8 peak is that of bfloat16",
  ),
  Chip(
    name="tpu7x",
    device_kinds=("TPU7x",),
    peak_flops=2307 * _TERA / 2,
    fp8_flops=4614 * _TERA / 2,
    hbm_bytes=192 * _GIB / 2,
    hbm_bytes_per_sec=7380 * _GB / 2,
    interconnect_bytes_per_sec=1200 * _GB / 2,
    devices_per_chip=2,
    clock_hz=2.2e9,
    mxu_size=256,
    cloud=Cloud(
      accelerator="tpu7x",
      machine="tpu7x-standard-4t",
      xpk="tpu7x",
      shapes=_SMALL_TORUS,
      max_chips=9216,
      cubes=True,
    ),
    source="https://cloud.google.com/tpu/docs/tpu7x, which gives them a chip",
  ),
  Chip(
    name="a100",
    device_kinds=("NVIDIA A100-SXM4-80GB",),
    peak_flops=312 * _TERA,
    hbm_bytes=80 * _GB,
    hbm_bytes_per_sec=2039 * _GB,
    interconnect_bytes_per_sec=600 * _GB,
    source="NVIDIA A100 data sheet, SXM 80 GB",
  ),
  Chip(
    name="h100",
    device_kinds=("NVIDIA H100 80GB HBM3",),
    peak_flops=989 * _TERA,
    fp8_flops=1979 * _TERA,
    hbm_bytes=80 * _GB,
    hbm_bytes_per_sec=3352 * _GB,
    interconnect_bytes_per_sec=900 * _GB,
    network_bytes_per_sec=100 * _GB,
    source="NVIDIA H100 data sheet, SXM; 3.35 TB/s there, 3,352 GB/s in XLA's device description. "
    "Network: NVIDIA DGX H100 data sheet, a 400 Gb/s adapter for each GPU",
  ),
  Chip(
    name="h800",
    device_kinds=("NVIDIA H800",),
    peak_flops=989 * _TERA,
    fp8_flops=1979 * _TERA,
    hbm_bytes=80 * _GB,
    hbm_bytes_per_sec=3352 * _GB,
    interconnect_bytes_per_sec=400 * _GB,
    source="As h100; NVLink: Insights into DeepSeek-V3, arXiv:2505.09343",
  ),
  Chip(
    name="h200",
    device_kinds=("NVIDIA H200",),
    peak_flops=989 * _TERA,
    fp8_flops=1979 * _TERA,
    hbm_bytes=141 * _GB,
    hbm_bytes_per_sec=4800 * _GB,
    interconnect_bytes_per_sec=900 * _GB,
    source="NVIDIA H200 data sheet, SXM",
  ),
  Chip(
    name="b200",
    device_kinds=("NVIDIA B200",),
    peak_flops=2250 * _TERA,
    fp8_flops=4500 * _TERA,
    hbm_bytes=180 * _GB,
    interconnect_bytes_per_sec=1800 * _GB,
    source="NVIDIA Blackwell technical brief, HGX B200; for its HBM 7.7 and 8 TB/s are published",
  ),
)
CHIPS = {chip.name: chip for chip in _TABLE}
_BY_KIND = {kind: chip for chip in _TABLE for kind in chip.device_kinds}


def of_device(device: Any) -> Chip | None:
  """Returns the chip of a jax device, or None where it is not in the table."""
  return _BY_KIND.get(device.device_kind)
