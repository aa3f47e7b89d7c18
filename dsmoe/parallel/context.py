"""The mesh axis `context`: a row's tokens split over devices, each with an equal share of attention.

A row of S tokens is cut into 2 X chunks, and device i of the X along the axis has chunks i and
2 X - 1 - i, in that order. A later token attends to more keys, and the two chunks of any device
together to equally many.

Rows reach every device of the axis whole and in their own order; `own_tokens` takes what is the
device's. A batch is some 20 bytes a token, so this costs nothing beside the hidden states, and
whatever looks at a token's neighbours, such as multi-token prediction, is written on whole rows.

Along an axis of one device, and outside `mesh.shard_map`, the functions change nothing.

Shapes: B rows, S tokens of a row, X devices along the axis, s = S / X tokens of this device.

Source of the order: zigzag ring attention, as in Megatron-LM's and MaxText's context parallelism.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsmoe.parallel import collectives
from pallas_kernels import varying

AXIS = "context"


def own_starts(own_tokens: int):
  """Returns where in the row this device's two chunks begin, int32 [2]; None where it has all.

  Args:
    own_tokens: s.
  """
  X = collectives.devices_along(AXIS)
  if X == 1:
    return None
  device = jax.lax.axis_index(AXIS)
  return jnp.stack([device, 2 * X - 1 - device]) * (own_tokens // 2)


def own_tokens(tree: Any) -> Any:
  """Takes this device's tokens out of whole rows: arrays [B, S, ...] to [B, s, ...].

  Raises:
    ValueError: when S does not divide by 2 X.
  """
  X = collectives.devices_along(AXIS)
  if X == 1:
    return tree

  def take(a):
    check_divisible(a.shape[1], X)
    chunk = a.shape[1] // (2 * X)
    starts = own_starts(2 * chunk)
    parts = [jax.lax.dynamic_slice_in_dim(a, starts[i], chunk, axis=1) for i in range(2)]
    return jnp.concatenate(parts, axis=1)

  return jax.tree.map(take, tree)


def whole_rows(x_Bsx):
  """Gathers the tokens of all devices into whole rows, in the rows' own order.

  The gradient is a reduce-scatter.

  Args:
    x_Bsx: this device's tokens, as `own_tokens` orders them.

  Returns:
    [B, S, x].
  """
  X = collectives.devices_along(AXIS)
  if X == 1:
    return x_Bsx
  B, s, x = x_Bsx.shape
  # Over the tokens' own dimension: over another one XLA:TPU may sum whole rows in the gradient.
  chunks_BX2cx = jax.lax.all_gather(x_Bsx, AXIS, axis=1, tiled=True).reshape(B, X, 2, s // 2, x)
  first_BXcx, last_BXcx = chunks_BX2cx[:, :, 0], chunks_BX2cx[:, ::-1, 1]
  return jnp.concatenate([first_BXcx, last_BXcx], axis=1).reshape(B, X * s, x)


def in_row_order(a, devices: int, axis: int):
  """Puts tokens that lie device by device in the rows' own order, outside `mesh.shard_map`.

  Args:
    a: with S tokens along `axis`, as `own_tokens` left them to each of X devices.
    devices: X.
    axis: of the tokens.
  """
  if devices == 1:
    return a
  chunks = np.stack([np.arange(devices), 2 * devices - 1 - np.arange(devices)], axis=1).reshape(-1)
  shape = (*a.shape[:axis], 2 * devices, a.shape[axis] // (2 * devices), *a.shape[axis + 1 :])
  return jnp.take(a.reshape(shape), np.argsort(chunks), axis=axis).reshape(a.shape)


def sum_over_rows(x: Any) -> Any:
  """Sums a tree of arrays over the devices that share its rows."""
  return x if collectives.devices_along(AXIS) == 1 else jax.lax.psum(x, AXIS)


def vary(params: Any) -> Any:
  """Lets parameters vary along the axis, so that autodiff does not sum their gradients over it.

  It would do so wherever a gathered weight meets this device's tokens: as often as the weight is
  used, and whole. `sum_gradients` does it once, on what each device stores.
  """
  if collectives.devices_along(AXIS) == 1:
    return params
  return varying.varying_like(params, jax.lax.axis_index(AXIS))


def sum_gradients(gradients: Any, params: Any) -> Any:
  """Sums gradients over the axis where the parameters themselves, before `vary`, are replicated."""
  if collectives.devices_along(AXIS) == 1:
    return gradients

  def summed(gradient, param):
    return gradient if AXIS in varying.varying_axes(param) else jax.lax.psum(gradient, AXIS)

  return jax.tree.map(summed, gradients, params)


def check_divisible(sequence_length: int, devices: int) -> None:
  """Raises ValueError unless rows can be cut into two chunks for each device."""
  if sequence_length % (2 * devices):
    raise ValueError(
      f"a row's tokens ({sequence_length}) must be divisible by twice the devices along the mesh "
      f"axis 'context' ({devices})"
    )
