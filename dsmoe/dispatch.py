"""Tokens to their experts and back, on one device; the chooser of back ends.

Every back end has one signature, `(x_MD, expert_MK, gate_MK, experts) -> y_MD`, and equals
the dense oracle in value and gradient.

Shapes: M tokens, D hidden, E experts, K experts a token, P = M K rows.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.grouped_matmul import grouped_swiglu
from pallas_kernels.permute import combine, expert_order


def local(x_MD, expert_MK, gate_MK, experts):
  """Takes rows in expert order, applies each expert to its own, sums each token's back."""
  w_gate_EDF, w_up_EDF, w_down_EFD = experts
  with jax.named_scope("dispatch"):
    pair_P, row_MK, sizes_E = expert_order(expert_MK, w_gate_EDF.shape[0])
    weight_P = gate_MK.reshape(-1)[pair_P]
  with jax.named_scope("experts"):
    y_PD = grouped_swiglu(
      x_MD, weight_P, w_gate_EDF, w_up_EDF, w_down_EFD, sizes_E, order=(pair_P, row_MK)
    )
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
