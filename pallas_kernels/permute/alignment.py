"""Moving groups of rows to where each group fills whole tiles, and back, in plain JAX.

Kernels whose tiles belong to one expert each need groups that start at multiples of a tile. Rows
that already lie so are not moved.

Shapes: P rows as given, A rows laid out by tiles, N columns, E groups.
"""

import jax.numpy as jnp

from pallas_kernels.permute.api import combine, permute
from pallas_kernels.permute.reference import group_starts, num_rows


class AlignedRows:
  """Rows of groups, each group starting at a multiple of a tile.

  Attributes:
    starts_E: int32, each group's first row in the new layout.
    num_rows: A.
  """

  def __init__(self, P: int, sizes_E, starts_E, alignment: int, tile: int):
    """Plans the moves.

    Args:
      P: how many rows there are; a row may belong to no group.
      sizes_E, starts_E: int32, each group's rows, and its first row, ascending.
      alignment: what divides every start.
      tile: what must divide every start, and the number of rows.
    """
    E = sizes_E.shape[0]
    if alignment % tile == 0 and P % tile == 0:
      self.moved, self.starts_E, self.num_rows = False, starts_E, P
      return
    self.moved, self.starts_E = True, group_starts(sizes_E, tile)
    self.num_rows = num_rows(P, E, tile)
    row_P = jnp.arange(P, dtype=jnp.int32)
    group_P = jnp.clip(jnp.searchsorted(starts_E, row_P, side="right") - 1, 0, E - 1)
    within_P = row_P - starts_E[group_P]
    own_P = (within_P >= 0) & (within_P < sizes_E[group_P])
    place_P = jnp.where(own_P, self.starts_E[group_P] + within_P, self.num_rows)
    self.own_P1, self.place_P1 = own_P[:, None], place_P[:, None]
    source_A = jnp.full(self.num_rows, P, jnp.int32)
    self.source_A = source_A.at[place_P].set(row_P, mode="drop")

  def rows(self, x_PN):
    """Returns the rows in the new layout, [A, N]; rows outside all groups are undefined."""
    if not self.moved:
      return x_PN
    own_PN = jnp.where(self.own_P1, x_PN, 0)
    return permute(own_PN, self.source_A, self.place_P1, "reference")

  def numbers(self, weight_P):
    """Returns one number a row in the new layout, [A], 0 outside all groups."""
    if not self.moved:
      return weight_P
    return jnp.asarray(weight_P).at[self.source_A].get(mode="fill", fill_value=0)

  def back(self, y_AN):
    """Returns rows in the given layout, [P, N], 0 outside all groups if they were moved."""
    if not self.moved:
      return y_AN
    y_PN = combine(y_AN, self.source_A, self.place_P1, "reference")
    return jnp.where(self.own_P1, y_PN, 0)
