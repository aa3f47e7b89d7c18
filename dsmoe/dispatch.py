"""Tokens to their experts and back, on one device; the chooser of back ends.

Every back end has one signature, `(x_MD, expert_MK, gate_MK, experts) -> y_MD`, and equals
the dense oracle in value and gradient.

Shapes: M tokens, D hidden, E experts, K experts a token, P = M K rows.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.grouped_matmul import grouped_swiglu


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
  row_P = (
    jnp.zeros_like(pair_P).at[pair_P].set(jnp.arange(M * K, dtype=jnp.int32), unique_indices=True)
  )
  sizes_E = jnp.bincount(flat_P, length=num_experts).astype(jnp.int32)
  return pair_P, row_P.reshape(M, K), sizes_E


@jax.custom_vjp
def permute(x_MD, pair_P, row_MK):
  """Copies each token's row to its K places: x_PD[p] = x_MD[pair_P[p] // K]."""
  return x_MD[pair_P // row_MK.shape[1]]


@jax.custom_vjp
def combine(y_PD, pair_P, row_MK):
  """Sums each token's K rows: y_MD[m] = sum over k of y_PD[row_MK[m, k]]."""
  return _sum_rows(y_PD, row_MK)


def _sum_rows(y_PD, row_MK):
  rows = [y_PD[row_MK[:, k]].astype(jnp.float32) for k in range(row_MK.shape[1])]
  return sum(rows[1:], rows[0]).astype(y_PD.dtype)


# Each is the other's transpose; written out, since autodiff would scatter where a gather does.
permute.defvjp(
  lambda x_MD, pair_P, row_MK: (permute(x_MD, pair_P, row_MK), (pair_P, row_MK)),
  lambda saved, dx_PD: (_sum_rows(dx_PD, saved[1]), None, None),
)
combine.defvjp(
  lambda y_PD, pair_P, row_MK: (combine(y_PD, pair_P, row_MK), (pair_P, row_MK)),
  lambda saved, dy_MD: (dy_MD[saved[0] // saved[1].shape[1]], None, None),
)


def local(x_MD, expert_MK, gate_MK, experts):
  """Permutes rows into expert order, applies each expert to its own, sums them back."""
  w_gate_EDF, w_up_EDF, w_down_EFD = experts
  with jax.named_scope("dispatch"):
    pair_P, row_MK, sizes_E = expert_order(expert_MK, w_gate_EDF.shape[0])
    x_PD = permute(x_MD, pair_P, row_MK)
    weight_P = gate_MK.reshape(-1)[pair_P]
  with jax.named_scope("experts"):
    y_PD = grouped_swiglu(x_PD, weight_P, w_gate_EDF, w_up_EDF, w_down_EFD, sizes_E)
  with jax.named_scope("combine"):
    return combine(y_PD, pair_P, row_MK)


def dense(x_MD, expert_MK, gate_MK, experts):
  """Applies every expert to every token and masks: the oracle, E / K times the work."""
  w_gate_EDF, w_up_EDF, w_down_EFD = experts
  gate_ME = jnp.sum(
    gate_MK[:, :, None] * (expert_MK[:, :, None] == jnp.arange(w_gate_EDF.shape[0])[None, None, :]),
    axis=1,
  )
  inner_EMF = jax.nn.silu(jnp.einsum("md,edf->emf", x_MD, w_gate_EDF)) * jnp.einsum(
    "md,edf->emf", x_MD, w_up_EDF
  )
  y_EMD = jnp.einsum("emf,efd->emd", inner_EMF, w_down_EFD)
  return jnp.einsum("emd,me->md", y_EMD, gate_ME.astype(x_MD.dtype))


BACK_ENDS: dict[str, Callable] = {"local": local, "dense": dense}
