"""The order of rows by expert, and moving tokens' rows into it and out of it, in plain JAX.

Shapes: M tokens, D hidden, E experts, K experts a token, P rows: M K of them, or more where
groups are aligned. An order is the pair (pair_P, row_MK): which token and choice lies at each
row, and at which row each choice lies.
"""

import jax.numpy as jnp


def group_starts(sizes_E, alignment: int = 1):
  """Returns each group's first row, int32: groups in order, each from a multiple of alignment."""
  room_E = (sizes_E + alignment - 1) // alignment * alignment
  return (jnp.cumsum(room_E) - room_E).astype(jnp.int32)


def num_rows(num_pairs: int, num_experts: int, alignment: int = 1) -> int:
  """Returns P, the number of rows that suffices for any load when groups are aligned."""
  most = num_pairs + min(num_experts, num_pairs) * (alignment - 1)
  return most // alignment * alignment


def expert_order(expert_MK, rank_MK, sizes_E, alignment: int = 1):
  """Lays (token, choice) pairs out by expert, tokens in order within one; no sort.

  Args:
    expert_MK, rank_MK: int32, each choice's expert, and its rank among that expert's choices.
    sizes_E: int32, each expert's number of choices.
    alignment: groups start at multiples of this.

  Returns:
    pair_P, the pair m * K + k that lies at each row, or M * K where none does; row_MK, the row of
    each pair.
  """
  M, K = expert_MK.shape
  row_MK = group_starts(sizes_E, alignment)[expert_MK] + rank_MK
  pair_P = jnp.full(num_rows(M * K, sizes_E.shape[0], alignment), M * K, jnp.int32)
  pairs = jnp.arange(M * K, dtype=jnp.int32)
  pair_P = pair_P.at[row_MK.reshape(-1)].set(pairs, unique_indices=True)
  return pair_P, row_MK


def permute(x_MD, pair_P, row_MK):
  """See `api.permute`; a gather."""
  return x_MD[pair_P // row_MK.shape[1]]


def combine(y_PD, row_MK):
  """See `api.combine`; K gathers and their sum in float32."""
  rows = [y_PD[row_MK[:, k]].astype(jnp.float32) for k in range(row_MK.shape[1])]
  return sum(rows[1:], rows[0]).astype(y_PD.dtype)


def in_a_group(num_rows: int, sizes_E, starts_E):
  """Returns whether each row lies in a group, bool [P]; starts ascend."""
  row_P = jnp.arange(num_rows)
  group_P = jnp.searchsorted(starts_E, row_P, side="right") - 1
  return (group_P >= 0) & (row_P < (starts_E + sizes_E)[group_P])


def weights_of_rows(gate_MK, row_MK, num_rows: int):
  """Returns each row's gate, float32 [P], 0 at rows where no choice lies."""
  weight_P = jnp.zeros(num_rows, jnp.float32)
  return weight_P.at[row_MK.reshape(-1)].set(gate_MK.reshape(-1), unique_indices=True)
