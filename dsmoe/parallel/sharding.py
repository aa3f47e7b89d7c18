"""Over which mesh axes each logical dimension of a parameter is split, stored and computed with.

A parameter is stored split over every axis along which devices have different tokens, and gathered
axis by axis just before use to what it is computed with: the gradient of such a gather is a
reduce-scatter, where a parameter that those devices all stored would have its whole gradient
all-reduced. Over the axis `model`, whose devices have the same tokens, dimensions that stay split
in computation are split and all else is replicated.
"""

import functools
import itertools
import math
from collections.abc import Mapping

from jax.sharding import PartitionSpec

# Along these axes devices have different tokens. Each splits a dimension of every matrix: these
# first, in this order, then any other.
STORED: dict[str, tuple[str, ...]] = {
  "data": ("joined", "embed", "q_lora", "kv_lora"),
  "expert": ("experts", "scores", "vocab", "ffn", "head_dim", "q_lora", "kv_lora", "embed"),
  "context": ("ffn", "vocab", "heads", "head_dim", "q_lora", "kv_lora", "embed"),
}
# Dimensions that stay split in computation: the devices of an axis own what lies there.
COMPUTED: dict[str, str] = {
  "experts": "expert",
  "heads": "model",
  "ffn": "model",
  "vocab": "model",
}
# Every logical dimension. `joined` is the two hidden states that an MTP module joins, `scores` the
# router's outputs, one an expert, which every device computes whole.
DIMS = (
  "joined",
  "embed",
  "q_lora",
  "kv_lora",
  "heads",
  "head_dim",
  "ffn",
  "vocab",
  "experts",
  "scores",
)


def stored_spec(
  dims: tuple[str, ...], shape: tuple[int, ...], sizes: Mapping[str, int]
) -> PartitionSpec:
  """Returns how a parameter with these logical dimensions is stored; vectors are replicated.

  An axis splits a dimension that its size divides. As few dimensions as possible are split over
  several axes of more than one device; then the orders of `STORED` decide, the first axis' first.
  A dimension that stays split in computation is split over that axis first, so that what gathers
  over the other axes leave is a device's own part.

  Args:
    dims: of `DIMS`, in the order of the parameter's own dimensions, without a stack's layers.
    shape: their sizes.
    sizes: the number of devices along each mesh axis.

  Raises:
    ValueError: for an unknown or a repeated dimension, and where an axis divides no dimension.
  """
  for dim in dims:
    if dim not in DIMS:
      raise ValueError(f"logical dimension must be one of {', '.join(DIMS)}, got {dim!r}")
  if len(set(dims)) != len(dims):
    raise ValueError(f"a parameter must have each logical dimension once, got {dims}")
  if len(dims) < 2:
    return PartitionSpec()
  return _matrix_spec(dims, tuple(shape), tuple(sizes.items()))


@functools.cache
def _matrix_spec(dims, shape, sizes_items) -> PartitionSpec:
  sizes, size_of = dict(sizes_items), dict(zip(dims, shape, strict=True))
  # The batch is split over `data` and `expert` even if they have one device, and so are parameters:
  # inside `shard_map` the two must then be of types that vary over the same axes.
  used = {axis for axis, size in sizes.items() if size > 1 or axis in ("data", "expert")}
  owners = {dim: COMPUTED[dim] for dim in dims if COMPUTED.get(dim) in used}
  for dim, axis in owners.items():
    _check_owned(dim, size_of[dim], axis, sizes[axis])
  free = [axis for axis in STORED if axis in used and axis not in owners.values()]
  found: list[tuple[int, dict[str, list[str]]]] = []
  for places in itertools.product(*(_candidates(axis, dims) for axis in free)):
    axes_of = {dim: [owners[dim]] if dim in owners else [] for dim in dims}
    for axis, dim in zip(free, places):
      axes_of[dim].append(axis)
    if all(size_of[d] % math.prod(sizes[a] for a in axes) == 0 for d, axes in axes_of.items()):
      several = [sum(sizes[a] > 1 for a in axes) for axes in axes_of.values()]
      found.append((sum(n - 1 for n in several if n > 1), axes_of))
  if not found:
    split = {axis: sizes[axis] for axis in STORED if sizes[axis] > 1}
    raise ValueError(
      f"each of the mesh axes {split} must divide a dimension of {size_of}, together with what "
      "else splits it"
    )
  _, axes_of = min(found, key=lambda candidate: candidate[0])
  parts = (tuple(axes_of[dim]) for dim in dims)
  return PartitionSpec(*(axes[0] if len(axes) == 1 else axes or None for axes in parts))


def computed_spec(
  dims: tuple[str, ...], shape: tuple[int, ...], sizes: Mapping[str, int]
) -> PartitionSpec:
  """Returns how a parameter lies while it is computed with: what `gather_weight` gathers it to.

  Only dimensions of `COMPUTED` are split, each over its own axis where that has several devices.

  Args:
    dims, shape, sizes: as for `stored_spec`.

  Raises:
    ValueError: where the axis does not divide the dimension.
  """
  owners = [COMPUTED.get(dim) for dim in dims]
  axes = [axis if axis and sizes[axis] > 1 else None for axis in owners]
  for dim, size, axis in zip(dims, shape, axes, strict=True):
    if axis:
      _check_owned(dim, size, axis, sizes[axis])
  return PartitionSpec(*axes) if any(axes) else PartitionSpec()


def _check_owned(dim: str, size: int, axis: str, devices: int) -> None:
  """Raises ValueError unless a dimension that an axis' devices own divides by their number."""
  if size % devices:
    raise ValueError(
      f"dimension {dim} ({size}) must be divisible by the mesh axis {axis!r} ({devices})"
    )


def _candidates(axis: str, dims: tuple[str, ...]) -> list[str]:
  """Returns a parameter's dimensions in the order in which an axis would split them."""
  return [dim for dim in dict.fromkeys((*STORED[axis], *DIMS)) if dim in dims]


def axes_of(part: str | tuple[str, ...] | None) -> tuple[str, ...]:
  """Returns the mesh axes of one part of a PartitionSpec, the outermost first."""
  return (part,) if isinstance(part, str) else tuple(part or ())
