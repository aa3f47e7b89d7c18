"""Tokens into expert order and back, in plain JAX: sort, gather, sum.

Shapes: M tokens, D hidden, E experts, K experts a token, P = M K rows. An order is the
pair (pair_P, row_MK): which token and choice lies at each row, and where each choice lies.
"""

import jax
import jax.numpy as jnp


def expert_order(expert_MK, num_experts: int):
  """Sorts the (token, choice) pairs by expert, keeping token order within one.

  Args:
    expert_MK: int32 expert of each choice.
    num_experts: E.

  Returns:
    pair_P, the pair m * K + k at each row; row_MK, each pair's row; sizes_E: all int32.
  """
  M, K = expert_MK.shape
  flat_P = expert_MK.reshape(-1)
  pair_P = jnp.argsort(flat_P, stable=True).astype(jnp.int32)
  rows_P = jnp.arange(M * K, dtype=jnp.int32)
  row_P = jnp.zeros_like(pair_P).at[pair_P].set(rows_P, unique_indices=True)
  sizes_E = jnp.bincount(flat_P, length=num_experts).astype(jnp.int32)
  return pair_P, row_P.reshape(M, K), sizes_E


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
