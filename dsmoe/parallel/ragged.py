"""Rows to the other devices of the axis `expert`, as many to each as a plan says, and back.

On TPU and GPU this is XLA's `ragged_all_to_all`. XLA:CPU has none: there all rows of all devices are
gathered, unless that is more than twice what can come. Otherwise, as for numbers of which a row has
only one (which a TPU would pad to 128), each device's rows to another are padded to as many as there
can be and exchanged by `all_to_all`.

An exchange is linear and moves every row to one place at most: its gradient is the exchange back.

Shapes: X devices along the axis, n slices of rows for each, S = X n slices in the order of their
devices, P rows sent, R rows received, W rows from one device to another, padding included.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsmoe import platforms
from dsmoe.parallel import collectives
from pallas_kernels.varying import vary_alike, zeros_like_operands

AXIS = "expert"
MOST_GPUS = 32  # XLA's kernel for GPUs crashed beyond (openxla/xla#47283)


class Slices(NamedTuple):
  """Where slices of rows lie at the sender and at the receiver, int32 [S] each."""

  starts: jax.Array  # of those this device sends, in its own rows
  sizes: jax.Array
  places: jax.Array  # where they go, in the receiver's rows
  received: jax.Array  # sizes of those that it receives
  arrivals: jax.Array  # where these go, in its own rows
  origins: jax.Array  # where they come from, in the sender's rows


class Way(NamedTuple):
  """An exchange from P rows to R rows."""

  slices: Slices
  send_rows: int
  receive_rows: int
  platform: str  # whose program it is part of; a gradient is traced where nothing else tells


def plan(sizes_X, send_rows: int, room: int) -> Way:
  """Plans an exchange of rows that lie in the order of the devices they go to.

  A device has room for `room` rows; what the devices before leave no room for stays behind.

  Args:
    sizes_X: int32, rows for each device.
    send_rows: P; the rows of all devices start at row 0.
    room: R.
  """
  me = jax.lax.axis_index(AXIS)
  wanted_XX = jax.lax.all_gather(sizes_X, AXIS)  # [from, to]
  sizes_XX = jnp.clip(room - before(wanted_XX, axis=0), 0, wanted_XX)
  places_XX, starts_XX = before(sizes_XX, axis=0), before(wanted_XX, axis=1)
  slices = Slices(
    *(a[me] for a in (starts_XX, sizes_XX, places_XX)),
    *(a[:, me] for a in (sizes_XX, places_XX, starts_XX)),
  )
  return Way(slices, send_rows, room, platforms.current())


def back(way: Way) -> Way:
  """Returns the exchange that brings rows back to where they came from."""
  s = way.slices
  slices = Slices(s.arrivals, s.received, s.origins, s.sizes, s.starts, s.places)
  return Way(slices, way.receive_rows, way.send_rows, way.platform)


def exchange(a, way: Way):
  """Sends rows to other devices.

  Args:
    a: [P] or [P, ...].
    way: of which slices.

  Returns:
    [R, ...], zeros where nothing arrives. Differentiable in a.

  Raises:
    ValueError: on GPU for more devices than XLA's kernel takes.
  """
  assert a.shape[0] == way.send_rows, (a.shape, way.send_rows)
  return _exchange(way[1:], *vary_alike(a, way.slices))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _exchange(static: tuple[int, int, str], a, slices: Slices):
  way = Way(slices, *static)
  return move(a, way.receive_rows, *slices[:4], platform=way.platform)


def _exchange_back(static: tuple[int, int, str], slices: Slices, d):
  way = back(Way(slices, *static))
  return move(d, way.receive_rows, *way.slices[:4], platform=way.platform), None


_exchange.defvjp(
  lambda static, a, slices: (_exchange(static, a, slices), slices),
  _exchange_back,
)


def before(a, axis: int = -1):
  """Returns what lies before each number along an axis: int32 sums without the number itself."""
  return jnp.cumsum(a, axis=axis, dtype=jnp.int32) - a


def move(a, num_rows: int, starts_S, sizes_S, places_S, received_S, platform: str | None = None):
  """Moves slices of rows, without a gradient.

  Args:
    a: [P] or [P, ...].
    num_rows: R.
    starts_S, sizes_S, places_S, received_S: the first fields of `Slices`.
    platform: "cpu", "gpu" or "tpu"; None: the current one, which a gradient's trace cannot tell.

  Returns:
    [num_rows, ...], zeros where nothing arrives.
  """
  num_devices, platform = collectives.devices_along(AXIS), platform or platforms.current()
  a, starts_S, sizes_S, places_S, received_S = vary_alike(
    a, starts_S, sizes_S, places_S, received_S
  )
  if platform == "cpu" or a.ndim == 1:
    slices = (starts_S, sizes_S, places_S, received_S)
    return _move_emulated(a, num_rows, *slices, gathers=platform == "cpu")
  if platform == "gpu" and num_devices > MOST_GPUS:
    raise ValueError(
      f"mesh.expert ({num_devices}) must be at most {MOST_GPUS} on GPU for an exchange of rows: "
      "XLA's kernel takes no more devices"
    )
  # Constant zeros: with anything else there, jax's gradient of it is wrong for an empty slice.
  zeros = zeros_like_operands((num_rows, *a.shape[1:]), a.dtype, a, sizes_S)
  return jax.lax.ragged_all_to_all(
    a, zeros, starts_S, sizes_S, places_S, received_S, axis_name=AXIS
  )


def _move_emulated(a, num_rows: int, starts_S, sizes_S, places_S, received_S, gathers: bool):
  """`move` by exchanges of equal parts.

  Either all rows of all devices are gathered, or rows for each device are padded to as many as there
  can be. The first copies a row once where the second does twice, but also rows that go elsewhere.
  """
  num_devices, P = collectives.devices_along(AXIS), a.shape[0]
  W = min(P, num_rows)
  received_Xn = received_S.reshape(num_devices, -1)
  if gathers and P <= 2 * W:
    got = jax.lax.all_gather(a, AXIS, tiled=True)
    first_Xn = jax.lax.all_to_all(starts_S, AXIS, 0, 0, tiled=True).reshape(num_devices, -1)
  else:
    P = W
    got = _padded(a, W, starts_S, sizes_S)
    first_Xn = before(received_Xn, axis=1)
  first_Xn += P * jnp.arange(num_devices, dtype=jnp.int32)[:, None]

  # Which of the slices each row lies in; empty ones are put past the end.
  arrivals_S = jax.lax.all_to_all(places_S, AXIS, 0, 0, tiled=True)
  arrivals_S = jnp.where(received_S > 0, arrivals_S, num_rows)
  order_S = jnp.argsort(arrivals_S)
  row_R = jnp.arange(num_rows, dtype=jnp.int32)
  place_R = jnp.searchsorted(arrivals_S[order_S], row_R, side="right") - 1
  slice_R = order_S[jnp.maximum(place_R, 0)]
  within_R = row_R - arrivals_S[slice_R]
  filled_R = (place_R >= 0) & (within_R < received_S[slice_R])
  source_R = jnp.where(filled_R, first_Xn.reshape(-1)[slice_R] + within_R, num_devices * P)
  return got.at[source_R].get(mode="fill", fill_value=0)


def _padded(a, W: int, starts_S, sizes_S):
  """Returns W rows from each device, [X W, ...], its slices for this one after each other."""
  num_devices = collectives.devices_along(AXIS)
  starts_Xn, sizes_Xn = (s.reshape(num_devices, -1) for s in (starts_S, sizes_S))
  ends_Xn = jnp.cumsum(sizes_Xn, axis=1, dtype=jnp.int32)
  row_W = jnp.arange(W, dtype=jnp.int32)
  slice_XW = jax.vmap(lambda ends_n: jnp.searchsorted(ends_n, row_W, side="right"))(ends_Xn)
  shift_Xn = starts_Xn - (ends_Xn - sizes_Xn)
  shift_XW = jnp.take_along_axis(shift_Xn, slice_XW, axis=1, mode="clip")
  source_XW = jnp.where(row_W[None] < ends_Xn[:, -1:], row_W[None] + shift_XW, a.shape[0])
  sent_XW = a.at[source_XW].get(mode="fill", fill_value=0)
  got_XW = jax.lax.all_to_all(sent_XW, AXIS, 0, 0, tiled=True)
  return got_XW.reshape(num_devices * W, *a.shape[1:])
