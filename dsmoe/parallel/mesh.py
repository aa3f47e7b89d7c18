"""The device mesh: its axes, how the batch is split over them, and the model's `shard_map`."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsmoe import platforms
from dsmoe.config import MeshConfig

AXES = ("stage", "data", "expert", "context", "model")
BATCH_AXES = ("data", "expert")  # of a batch's rows
TOKEN_AXES = (*BATCH_AXES, "context")  # of its tokens; see context.py


def make_mesh(
  config: MeshConfig, devices: list[Any] | None = None, check: Callable | None = None
) -> Mesh:
  """Builds the mesh over `devices` (default: all there are).

  Args:
    config: the sizes of the axes, and which of them joins slices.
    devices: any number of them.
    check: raises ValueError for axis sizes, a dict by name, that what will be computed does not
      fit; None accepts all.

  Raises:
    ValueError: when the axis sizes do not multiply to the number of devices, do not suit `check`
      or cannot join the slices, naming the nearest sizes that do, if any do.
  """
  devices = jax.devices() if devices is None else devices
  sizes = sizes_that_fit(config, len(devices), len(slices(devices)), check)
  across = AXES.index(config.across_slices)
  grid = device_grid(tuple(sizes.values()), devices, across)
  return Mesh(grid, AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(AXES))


def sizes_that_fit(
  config: MeshConfig, num_devices: int, num_slices: int, check: Callable | None = None
) -> dict[str, int]:
  """Returns the sizes of all axes over devices that need not be there.

  Args:
    config: as for `make_mesh`; `data` may be -1.
    num_devices: of all slices together.
    num_slices: groups of devices that fast links join.
    check: as for `make_mesh`.

  Raises:
    ValueError: as `make_mesh`.
  """
  sizes = {axis: getattr(config, axis) for axis in AXES}
  others = math.prod(size for size in sizes.values() if size != -1)
  if sizes["data"] == -1:
    sizes["data"] = max(num_devices // others, 1)
  across = config.across_slices

  def misfit(sizes: Mapping[str, int]) -> str | None:
    if math.prod(sizes.values()) != num_devices:
      return f"the mesh axes {sizes} must multiply to the number of devices ({num_devices})"
    if sizes[across] % num_slices:
      return (
        f"mesh.{across} ({sizes[across]}) must be divisible by the number of slices "
        f"({num_slices}) that it joins"
      )
    try:
      if check:
        check(sizes)
    except ValueError as error:
      return str(error)
    return None

  if reason := misfit(sizes):
    near = nearest(sizes, num_devices, lambda sizes: misfit(sizes) is None)
    advice = (
      f"the nearest mesh that fits is {near}" if near else f"no mesh of {num_devices} devices fits"
    )
    raise ValueError(f"{reason}; {advice}")
  return sizes


def axes_of_flag(parts: Sequence[str]) -> MeshConfig:
  """Returns the mesh that a flag --mesh names, as data:2,expert:4; axes it leaves out are 1.

  Args:
    parts: the flag's parts between commas.

  Raises:
    ValueError: for a part of another form, an unknown axis or one that is named twice.
  """
  sizes: dict[str, Any] = dict.fromkeys(AXES, 1)
  named: set[str] = set()
  for part in parts:
    axis, _, size = part.partition(":")
    if axis not in sizes or axis in named or not size.isdecimal():
      raise ValueError(
        f"--mesh must name axes and sizes as data:2,expert:4, got {part!r}; the axes, each once at "
        f"most, are {', '.join(AXES)}"
      )
    named.add(axis)
    sizes[axis] = int(size)
  return MeshConfig(**sizes)


def nearest(
  sizes: Mapping[str, int], num_devices: int, fits: Callable[[dict[str, int]], bool]
) -> dict[str, int]:
  """Returns the sizes nearest to `sizes` that use all devices and fit; empty when none do.

  As few axes as possible change, then by as small factors as possible, then the first axes.

  Args:
    sizes: of every axis; `stage` is left as it is and divides the devices.
    num_devices: what they are to multiply to.
    fits: whether sizes can be used.
  """

  def distance(other: dict[str, int]):
    ratios = [abs(math.log2(other[axis] / sizes[axis])) for axis in AXES]
    return sum(r > 0 for r in ratios), round(sum(ratios), 6), [-r for r in ratios]

  stage = sizes["stage"]
  others = factorizations(num_devices // stage, len(AXES) - 1)
  found = [dict(zip(AXES, (stage, *other))) for other in others]
  return next(filter(fits, sorted(found, key=distance)), {})


def factorizations(number: int, num_factors: int) -> Iterator[tuple[int, ...]]:
  """Yields every way to write a number as a product of so many factors, in order."""
  if num_factors == 1:
    yield (number,)
    return
  for first in range(1, number + 1):
    if number % first == 0:
      for others in factorizations(number // first, num_factors - 1):
        yield (first, *others)


def slices(devices: list[Any]) -> list[list[Any]]:
  """Groups devices by the slice whose fast links join them, in the order of the slices' numbers.

  Of devices that do not tell their slice, TPUs are of one; others are grouped by process, where
  processes have several.
  """
  key = "slice_index" if all(hasattr(d, "slice_index") for d in devices) else "process_index"
  numbers = sorted({getattr(d, key) for d in devices})
  groups = [[d for d in devices if getattr(d, key) == number] for number in numbers]
  if key == "process_index" and (devices[0].platform == "tpu" or len(groups) == len(devices)):
    return [list(devices)]
  return groups


def device_grid(shape: tuple[int, ...], devices: list[Any], across: int) -> np.ndarray:
  """Returns the devices in the mesh's shape; links between slices are crossed along one axis only.

  Args:
    shape: of the mesh; multiplies to the number of devices.
    devices: of one or more slices, all of one size.
    across: index of the axis whose outermost part goes from slice to slice.

  Raises:
    ValueError: for slices of different sizes.
  """
  groups = slices(devices)
  if len({len(group) for group in groups}) > 1:
    raise ValueError(f"all slices must have equally many devices, got {[len(g) for g in groups]}")
  inside = tuple(n // len(groups) if i == across else n for i, n in enumerate(shape))
  # Where an axis does not fill whole rings of the slice's torus, it is given parts of them.
  grids = [
    mesh_utils.create_device_mesh(inside, group, allow_split_physical_axes=True) for group in groups
  ]
  return np.concatenate(grids, axis=across)


def single_device_mesh() -> Mesh:
  """Returns a mesh of this process's first device, every axis 1."""
  config = MeshConfig(stage=1, data=1, expert=1, context=1, model=1)
  return make_mesh(config, jax.devices()[:1])


def platform_of(mesh: Mesh) -> str:
  """Returns the platform of the mesh's devices: "cpu", "gpu" or "tpu"."""
  return mesh.devices.flat[0].platform


def num_batch_shards(mesh: Mesh) -> int:
  """Returns the number of parts into which a batch's rows are split."""
  return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def part_of_rows(mesh: Mesh, process_index: int) -> tuple[int, int]:
  """Returns (part, parts): which part of each batch's rows a process must give to `to_global`.

  Processes whose devices hold the same rows, as those do that share an axis `context`, give the
  same part.

  Raises:
    ValueError: when two processes have some rows in common and others not.
  """
  shards_of: dict[int, set[int]] = {}
  grid = mesh.devices.reshape(mesh.devices.shape[0], num_batch_shards(mesh), -1)
  for (_, shard, _), device in np.ndenumerate(grid):
    shards_of.setdefault(device.process_index, set()).add(shard)
  parts = sorted({tuple(sorted(shards)) for shards in shards_of.values()})
  if sum(map(len, parts)) != num_batch_shards(mesh):
    raise ValueError(
      f"processes must have the same rows of a batch or none in common, got {parts} of "
      f"{num_batch_shards(mesh)} parts: let each process hold whole axes 'context' and 'model', or "
      "one part of the rows"
    )
  return parts.index(tuple(sorted(shards_of[process_index]))), len(parts)


def batch_spec() -> PartitionSpec:
  """Returns the spec of arrays [batch, ...]: each device has whole rows."""
  return PartitionSpec(BATCH_AXES)


def to_global(batch: dict[str, Any], mesh: Mesh) -> dict[str, jax.Array]:
  """Turns this process's rows, NumPy arrays, into global arrays split over the mesh."""
  shard = NamedSharding(mesh, batch_spec())
  return {k: jax.make_array_from_process_local_data(shard, v) for k, v in batch.items()}


def named(mesh: Mesh, specs: Any) -> Any:
  """Turns a tree of PartitionSpecs into NamedShardings on `mesh`."""
  return jax.tree.map(
    lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda x: isinstance(x, PartitionSpec)
  )


def shard_map(fn: Any, mesh: Mesh, in_specs: Any, out_specs: Any) -> Any:
  """Returns `jax.shard_map` of `fn`: manual over all axes, checking what varies over which axis.

  While `fn` is traced, `platforms.current()` is the platform of the mesh's devices.
  """

  def run(*args):
    with platforms.compiling_for(platform_of(mesh)):
      return fn(*args)

  return jax.shard_map(run, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=True)
