"""The few collectives of the model, by name; called inside `mesh.shard_map`."""

import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from dsmoe.parallel.mesh import AXES, BATCH_AXES, TOKEN_AXES
from dsmoe.parallel.sharding import COMPUTED, axes_of, stored_spec
from pallas_kernels import varying


def gather_weight(x: jax.Array, dims: tuple[str, ...], shape: tuple[int, ...]) -> jax.Array:
  """Gathers a parameter from how it is stored to how it is computed with, axis by axis.

  The gradient of each gather is a reduce-scatter over the same axis.

  Args:
    x: this device's part.
    dims: the logical dimensions of x.
    shape: the whole parameter's, which decides how it is stored.
  """
  sizes = {axis: devices_along(axis) for axis in AXES}
  for place, part in enumerate(stored_spec(dims, shape, sizes)):
    for axis in reversed(axes_of(part)):  # the innermost first: its parts lie together
      # Over an axis of one device a gather would be a copy.
      if axis != COMPUTED.get(dims[place]) and sizes[axis] > 1:
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


def sum_over_mesh(x: jax.Array) -> jax.Array:
  """Sums an array over all devices; it must vary over every axis, see `on_first_device`."""
  return jax.lax.psum(x, AXES)


def on_first_device(x: jax.Array, axes: Iterable[str]) -> jax.Array:
  """Returns x on the first of the devices along mesh axes, 0 on the others.

  Of what is alike on all of them, the sum over these axes is then x itself.
  """
  return jnp.where(sum(jax.lax.axis_index(axis) for axis in axes) == 0, x, 0)


def num_batch_shards() -> int:
  """Returns the number of parts into which the batch's rows are split."""
  return math.prod(devices_along(axis) for axis in BATCH_AXES)


def devices_along(axis: str) -> int:
  """Returns the number of devices along a mesh axis: 1 outside `mesh.shard_map`."""
  try:
    return jax.lax.axis_size(axis)
  except NameError:
    return 1


def any_along(axis: str, x: jax.Array) -> jax.Array:
  """Returns whether a bool is true on any device along an axis, alike on all of them."""
  if axis not in varying.varying_axes(x):
    return x
  return jax.lax.pmax(x.astype(jnp.int32), axis) > 0


def sum_to_owners(x: jax.Array, axis: str) -> jax.Array:
  """Sums an array over the devices along an axis and gives each its part of the first dimension."""
  return jax.lax.psum_scatter(x, axis, scatter_dimension=0, tiled=True)


# The axis `model`, whose devices have the same tokens and each its own heads, inner dimensions of
# the feed-forward layers and part of the vocabulary. With one device along it nothing is done.


def enter_model_axis(x: Any) -> Any:
  """Hands arrays that are alike on all devices of `model` to what each computes of its own part.

  The gradient is summed over them. Every product of activations with a weight that is split over
  `model` begins here and ends in `sum_over_model`.
  """
  if devices_along("model") == 1:
    return x
  return jax.tree.map(lambda a: jax.lax.pcast(a, "model", to="varying"), x)


def sum_over_model(x: Any) -> Any:
  """Sums partial results over the devices of `model`, all of which get the sum."""
  return x if devices_along("model") == 1 else jax.lax.psum(x, "model")


def joined_over_model(x: jax.Array) -> jax.Array:
  """Joins the last dimension's parts, one a device of `model`; all devices get the whole.

  As a sum with zeros in the others' places, whose type says that the result is alike on all of
  them, which that of a gather does not. For arrays that are small beside a weight.
  """
  devices = devices_along("model")
  if devices == 1:
    return x
  size = x.shape[-1]
  whole = varying.zeros_like_operands((*x.shape[:-1], devices * size), x.dtype, x)
  first = first_of_model(size)
  return sum_over_model(jax.lax.dynamic_update_slice_in_dim(whole, x, first, axis=x.ndim - 1))


def max_over_model(x: jax.Array) -> jax.Array:
  """Returns the largest value over the devices of `model`; not differentiable."""
  return x if devices_along("model") == 1 else jax.lax.pmax(x, "model")


def first_of_model(size: int) -> jax.Array | int:
  """Returns the number of the first of this device's entries, if each along `model` has `size`."""
  return 0 if devices_along("model") == 1 else jax.lax.axis_index("model") * size
