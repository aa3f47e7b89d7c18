"""The device mesh: its axes, how the batch is split over them, and the model's `shard_map`."""

import math
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


def make_mesh(config: MeshConfig, devices: list[Any] | None = None) -> Mesh:
  """Builds the mesh over `devices` (default: all there are).

  Raises:
    ValueError: when the axis sizes do not multiply to the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  sizes = {axis: getattr(config, axis) for axis in AXES}
  others = math.prod(size for size in sizes.values() if size != -1)
  if sizes["data"] == -1:
    sizes["data"] = max(len(devices) // others, 1)
  if math.prod(sizes.values()) != len(devices):
    raise ValueError(
      f"the mesh axes {sizes} must multiply to the number of devices ({len(devices)})"
    )
  grid = mesh_utils.create_device_mesh(tuple(sizes.values()), devices)
  return Mesh(grid, AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(AXES))


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
