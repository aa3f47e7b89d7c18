"""The few collectives of the model, by name; called inside `mesh.shard_map`."""

from typing import Any

import jax

from dsmoe.parallel.mesh import BATCH_AXES
from dsmoe.parallel.sharding import COMPUTED, stored_spec


def gather_weight(x: jax.Array, dims: tuple[str, ...]) -> jax.Array:
  """Gathers a parameter from how it is stored to how it is computed with, axis by axis.

  The gradient of each gather is a reduce-scatter over the same axis.

  Args:
    x: this device's part.
    dims: the logical dimensions of x.
  """
  for place, axis in enumerate(stored_spec(dims)):
    # Over an axis of one device a gather would be a copy.
    if axis is not None and axis != COMPUTED.get(dims[place]) and jax.lax.axis_size(axis) > 1:
      x = jax.lax.all_gather(x, axis, axis=place, tiled=True)
  return x


def sum_over_batch(x: Any) -> Any:
  """Sums a tree of arrays over every device that holds a part of the batch."""
  return jax.lax.psum(x, BATCH_AXES)
