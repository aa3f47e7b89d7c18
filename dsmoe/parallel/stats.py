"""What an exchange of rows reports beside its result."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class DispatchStats(NamedTuple):
  """Counts of one layer on this device, int32 scalars; the caller sums them over devices.

  A row here is a pair of a token and one of its chosen experts.
  """

  dropped_rows: jax.Array  # rows that found no room; each is counted once, on one device
  sent_rows: jax.Array  # rows of x that this device sent to other devices, one way


def nothing_dropped(sent_rows: int = 0) -> DispatchStats:
  """Returns the stats of an exchange whose shapes are static and hold every row.

  Args:
    sent_rows: rows of x that each device sends to other devices, one way.
  """
  return DispatchStats(jnp.zeros((), jnp.int32), jnp.full((), sent_rows, jnp.int32))
