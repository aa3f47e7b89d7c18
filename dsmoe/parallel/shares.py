"""Who computes which rows when hot experts are copied, so that every device has equally many.

Every device keeps rows of its own experts up to its share, the mean. What lies above it is taken
over by devices below it. The devices below are filled one after the other, each by a single
device above, in the manner of Walker's alias tables: a device goes on giving rows away until it
has none above its share; if the last device it filled left it below its share, the next device
above fills it in turn. So:

- every device computes exactly its share, whatever the loads;
- a device takes over rows from at most one other, the donor, and so needs copies of at most O
  experts: as many as it owns. With a donor of O experts alike and a device without any rows of its
  own, it needs all O: no plan of this kind can promise fewer.

A donor gives away the rows of its hottest experts first, which takes few copies. All is computed
from counts alone, alike on every device.

Source: A. J. Walker, An efficient method for generating discrete random variables with general
distributions, ACM TOMS 3 (1977).

Shapes: X devices along the axis `expert`, E experts of the layer, O = E / X of each device, M
tokens, K experts a token.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Shares(NamedTuple):
  """The plan, int32. A device's rows have places: the hottest expert's first, then the next's."""

  place_E: jax.Array  # the place of each expert's first row among the rows of its owner
  given_X: jax.Array  # each device gives away its rows at places below this
  donor_X: jax.Array  # the device whose rows each takes over; itself where it takes none
  first_X: jax.Array  # the places of the rows it takes: from here on,
  taken_X: jax.Array  # and how many
  heat_E: jax.Array  # how many experts of the same device are hotter
  kept_E: jax.Array  # rows of each expert that its owner keeps
  lent_XO: jax.Array  # rows that each device takes of its donor's experts, the hottest first


def plan(counts_E, num_devices: int) -> Shares:
  """Plans the shares of the devices along an axis.

  Args:
    counts_E: int32, rows of each expert, of all the axis' tokens; their sum is a multiple of
      `num_devices`. A device owns neighbouring experts.
    num_devices: X.
  """
  counts_XO = counts_E.reshape(num_devices, -1)
  heat_XO = jnp.argsort(jnp.argsort(-counts_XO, axis=1, stable=True), axis=1).astype(jnp.int32)
  sorted_XO = -jnp.sort(-counts_XO, axis=1)
  end_XO = jnp.cumsum(sorted_XO, axis=1, dtype=jnp.int32)
  place_E = jnp.take_along_axis(end_XO - sorted_XO, heat_XO, axis=1).reshape(-1)
  load_X = end_XO[:, -1]
  over_X = load_X - jnp.sum(load_X) // num_devices

  # What is above the share and what below, counted through the devices.
  surplus_X, need_X = jnp.maximum(over_X, 0), jnp.maximum(-over_X, 0)
  surplus_end_X, need_end_X = (jnp.cumsum(a, dtype=jnp.int32) for a in (surplus_X, need_X))
  surplus_start_X, need_start_X = surplus_end_X - surplus_X, need_end_X - need_X
  # A device above its share goes on giving until the device it fills has all it needs.
  last_X = jnp.searchsorted(need_end_X, surplus_end_X, side="left")
  given_end_X = need_end_X[last_X]
  given_X = jnp.where(over_X > 0, given_end_X - surplus_start_X, 0)
  # What it then lacks itself comes first from the next device above.
  taken_X = jnp.where(over_X > 0, given_end_X - surplus_end_X, need_X)
  reached_X = jnp.where(over_X > 0, surplus_end_X, need_start_X)
  donor_X = jnp.searchsorted(surplus_end_X, reached_X, side="right")
  donor_X = jnp.where(taken_X > 0, donor_X, jnp.arange(num_devices))
  first_X = jnp.where(over_X > 0, 0, need_start_X - surplus_start_X[donor_X])
  first_X = jnp.where(taken_X > 0, first_X, 0)

  kept_E = counts_E - jnp.clip(jnp.repeat(given_X, counts_XO.shape[1]) - place_E, 0, counts_E)
  end_XO = end_XO[donor_X]
  start_XO = end_XO - sorted_XO[donor_X]
  until_X = (first_X + taken_X)[:, None]
  lent_XO = jnp.minimum(end_XO, until_X) - jnp.maximum(start_XO, first_X[:, None])
  lent_XO = jnp.maximum(lent_XO, 0)
  plan = Shares(place_E, given_X, donor_X, first_X, taken_X, heat_XO.reshape(-1), kept_E, lent_XO)
  return Shares(*(a.astype(jnp.int32) for a in plan))


def device_of_rows(shares: Shares, expert_MK, rank_MK):
  """Returns the device that computes each row.

  Args:
    shares: the plan.
    expert_MK, rank_MK: int32, each row's expert, and its rank among all rows of that expert along
      the axis.
  """
  X = shares.donor_X.shape[0]
  O = shares.place_E.shape[0] // X
  owner_MK, place_MK = expert_MK // O, shares.place_E[expert_MK] + rank_MK
  donor_X, first_X, end_X = (
    a[None, None] for a in (shares.donor_X, shares.first_X, shares.first_X + shares.taken_X)
  )
  owner_MK1, place_MK1 = owner_MK[..., None], place_MK[..., None]
  takes_MKX = (donor_X == owner_MK1) & (first_X <= place_MK1) & (place_MK1 < end_X)
  taker_MK = jnp.argmax(takes_MKX, axis=-1).astype(jnp.int32)
  return jnp.where(place_MK < shares.given_X[owner_MK], taker_MK, owner_MK)
