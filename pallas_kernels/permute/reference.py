"""Tokens into expert order and back, in plain JAX: gather and sum.

Shapes: M tokens, D hidden, E experts, K experts a token, P rows: M K of them, or more where
groups are aligned. An order is the pair (pair_P, row_MK): which token and choice lies at each
row, and where each choice lies.
"""

import jax
import jax.numpy as jnp


def group_starts(sizes_E, alignment: int = 1):
  """Returns each group's first row, int32: groups in order, each from a multiple of alignment."""
  room_E = (sizes_E + alignment - 1) // alignment * alignment
  return (jnp.cumsum(room_E) - room_E).astype(jnp.int32)


def num_rows(num_pairs: int, num_experts: int, alignment: int = 1) -> int:
  """Returns P, the rows that suffice for any load when groups are aligned."""
  most = num_pairs + min(num_experts, num_pairs) * (alignment - 1)
  return most // alignment * alignment


def expert_order(expert_MK, rank_MK, sizes_E, alignment: int = 1):
  """Lays (token, choice) pairs out by expert, tokens in order within one; no sort.

  Args:
    expert_MK, rank_MK: int32, each choice's expert and its place among that expert's.
    sizes_E: int32, each expert's number of choices.
    alignment: groups start at multiples of this.

  Returns:
    pair_P, the pair m * K + k at each row, M * K where none lies; row_MK, each pair's row.
  """
  M, K = expert_MK.shape
  row_MK = group_starts(sizes_E, alignment)[expert_MK] + rank_MK
  pair_P = jnp.full(num_rows(M * K, sizes_E.shape[0], alignment), M * K, jnp.int32)
  pairs = jnp.arange(M * K, dtype=jnp.int32)
  pair_P = pair_P.at[row_MK.reshape(-1)].set(pairs, unique_indices=True)
  return pair_P, row_MK


@jax.custom_vjp
def permute(x_MD, pair_P, row_MK):
  """Copies each token's row to its K places: x_PD[p] = x_MD[pair_P[p] // K]."""
  return x_MD[pair_P // row_MK.shape[1]]


@jax.custom_vjp
def combine(y_PD, pair_P, row_MK):
  """Sums each token's K rows: y_MD[m] = sum over k of y_PD[row_MK[m, k]]."""
  return sum_rows(y_PD, row_MK)


def sum_rows(y_PD, row_MK):
  """`combine` without its gradient, in float32, in y's dtype at the end."""
  rows = [y_PD[row_MK[:, k]].astype(jnp.float32) for k in range(row_MK.shape[1])]
  return sum(rows[1:], rows[0]).astype(y_PD.dtype)


# Each is the other's transpose; written out, since autodiff would scatter where a gather does.
permute.defvjp(
  lambda x_MD, pair_P, row_MK: (permute(x_MD, pair_P, row_MK), (pair_P, row_MK)),
  lambda saved, dx_PD: (sum_rows(dx_PD, saved[1]), None, None),
)
combine.defvjp(
  lambda y_PD, pair_P, row_MK: (combine(y_PD, pair_P, row_MK), (pair_P, row_MK)),
  lambda saved, dy_MD: (dy_MD[saved[0] // saved[1].shape[1]], None, None),
)
