"""What an exchange of rows reports beside its result."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class DispatchStats(NamedTuple):
  """Counts of one layer on this device, int32 scalars; the caller sums them over devices.

  A row here is a pair of a token and one of its chosen experts. Every token that an exchange is
  given has its rows: a training batch must have no padding, see `train_step.check_no_padding`.
  """

  dropped_rows: jax.Array  # rows that found no room; each is counted once, on one device
  sent_rows: jax.Array  # rows of x that this device sent to other devices, one way
  # How often an exact path computed the layer because a row would have found no room: 0 or 1 with
  # `dropless_fallback="layer"`. All devices take it together, and the mesh's first counts it. With
  # "step" the train step sets it, to once for each microbatch of a step that was computed again.
  fallbacks: jax.Array


def nothing_dropped(sent_rows: int = 0) -> DispatchStats:
  """Returns the stats of an exchange whose shapes are static and hold every row.

  Args:
    sent_rows: rows of x that each device sends to other devices, one way.
  """
  zero = jnp.zeros((), jnp.int32)
  return DispatchStats(zero, jnp.full((), sent_rows, jnp.int32), zero)
