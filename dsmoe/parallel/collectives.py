"""The few collectives of the model, by name; called inside `mesh.shard_map`."""

import math
from typing import Any

import jax

from dsmoe.parallel.mesh import BATCH_AXES, TOKEN_AXES
from dsmoe.parallel.sharding import COMPUTED, stored_spec
from pallas_kernels import varying


def gather_weight(x: jax.Array, dims: tuple[str, ...]) -> jax.Array:
  """Gathers a parameter from how it is stored to how it is computed with, axis by axis.

  The gradient of each gather is a reduce-scatter over the same axis.

  Args:
    x: this device's part.
    dims: the logical dimensions of x.
  """
  for place, axis in enumerate(stored_spec(dims)):
    # Over an axis of one device a gather would be a copy.
    if axis is not None and axis != COMPUTED.get(dims[place]) and devices_along(axis) > 1:
      x = jax.lax.all_gather(x, axis, axis=place, tiled=True)
  return x


def sum_over_batch(x: Any) -> Any:
  """Sums a tree of arrays over every device that holds a part of the batch: rows, or tokens of rows.

  Raises:
    ValueError: for an array that is the same along one of those axes and differs along another: it
      would be counted several times.
  """
  varies = varying.varying_axes(x)
  return jax.lax.psum(x, tuple(a for a in TOKEN_AXES if a in varies or devices_along(a) > 1))


def num_batch_shards() -> int:
  """Returns the number of parts into which the batch's rows are split."""
  return math.prod(devices_along(axis) for axis in BATCH_AXES)


def devices_along(axis: str) -> int:
  """Returns the number of devices along a mesh axis: 1 outside `mesh.shard_map`."""
  try:
    return jax.lax.axis_size(axis)
  except NameError:
    return 1


def sum_to_owners(x: jax.Array, axis: str) -> jax.Array:
  """Sums an array over the devices along an axis and gives each its part of the first dimension."""
  return jax.lax.psum_scatter(x, axis, scatter_dimension=0, tiled=True)
