"""A run goes on with the devices that are left: another mesh, the same global batches."""

import dataclasses
import math
from typing import Any

from dsmoe.config import Config
from dsmoe.parallel import mesh as mesh_lib
from dsmoe.training import train_step


def config_for(config: Config, num_devices: int, num_slices: int = 1) -> Config:
  """Returns the config with a mesh of so many devices, which computes the same to rounding.

  As few axes of the mesh as possible change, by as little as possible. Where a device would get
  more rows at once than in the mesh of the config, the batch is split into more microbatches; with
  mesh.data -1, which does not tell how many those were, only as far as the batch must divide. An
  exchange with `receive_capacity` may drop other rows than before.

  Args:
    config: of the run, as it was asked for; it is returned unchanged if its mesh fits.
    num_devices: that there are.
    num_slices: joined by the axis mesh.across_slices.

  Raises:
    ValueError: when no mesh of that many devices fits.
  """
  sizes = {axis: getattr(config.mesh, axis) for axis in mesh_lib.AXES}
  if is_open := sizes["data"] == -1:
    others = math.prod(size for size in sizes.values() if size != -1)
    sizes["data"] = max(num_devices // others, 1)
  most_rows = config.batch_size // (1 if is_open else _shards(sizes) * config.num_microbatches)

  def with_mesh(sizes: dict[str, int]) -> Config:
    axes: dict[str, Any] = sizes
    for microbatches in range(config.num_microbatches, config.batch_size + 1):
      rows, rest = divmod(config.batch_size, _shards(sizes) * microbatches)
      if rest == 0 and rows <= most_rows:
        mesh = dataclasses.replace(config.mesh, **axes)
        return dataclasses.replace(config, num_microbatches=microbatches, mesh=mesh)
    raise ValueError(f"batch_size ({config.batch_size}) does not divide over the mesh {sizes}")

  def fits(sizes: dict[str, int]) -> bool:
    if math.prod(sizes.values()) != num_devices or sizes[config.mesh.across_slices] % num_slices:
      return False
    try:
      train_step.check_fit(with_mesh(sizes), sizes)
    except ValueError:
      return False
    return True

  found = sizes if fits(sizes) else mesh_lib.nearest(sizes, num_devices, fits)
  if not found:
    raise ValueError(
      f"a batch of {config.batch_size} rows and the model must be split evenly over the "
      f"{num_devices} devices that are left, and no mesh of them does that: start again with fewer"
    )
  fitting = with_mesh(found)
  unchanged = is_open and found == sizes and fitting.num_microbatches == config.num_microbatches
  return config if unchanged else fitting


def most_processes(config: Config, num_processes: int, devices_each: int) -> int:
  """Returns how many of the processes that are left a run can go on with, the most possible.

  Args:
    config: of the run, as it was asked for.
    num_processes: that are left.
    devices_each: how many devices each process has.

  Raises:
    ValueError: when it cannot go on with any number of them.
  """
  for number in range(num_processes, 0, -1):
    try:
      config_for(config, number * devices_each)
      return number
    except ValueError as error:
      reason = error
  raise ValueError(
    f"no number of processes from 1 to {num_processes} can go on with {devices_each} devices each"
  ) from reason


def _shards(sizes: dict[str, int]) -> int:
  return math.prod(sizes[axis] for axis in mesh_lib.BATCH_AXES)
