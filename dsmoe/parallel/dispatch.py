"""Tokens to their experts and back, on one device; the chooser of back ends.

Every back end has one signature, `(x_MD, routed, experts, config) -> y_MD`, and equals the dense
oracle in value and gradient.

Shapes: M tokens, D hidden, E experts, K experts a token, P = M K rows.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from dsmoe.config import ModelConfig
from dsmoe.model.routing import Routing
from pallas_kernels.grouped_matmul import routed_swiglu, tile_table
from pallas_kernels.quantized_matmul import quantized_routed_swiglu

# When few tokens meet few experts. XLA:CPU gives part of what is ready to run to another core once
# more than eight operations are, and an expert is three to begin with: the copies of its matrices.
EXPERTS_AT_ONCE = 5


def local(x_MD, routed: Routing, experts, config: ModelConfig):
  """Takes rows in expert order, applies each expert to its own, sums each token's back."""
  if config.matmul_precision != "compute_dtype":
    return quantized_routed_swiglu(x_MD, routed, experts, *config.quantization)
  kernels, (E, D, F) = config.kernels, experts[0].shape
  tile = tile_table.tile(
    kernels.tuned, kernels.grouped_matmul, routed.expert_MK.size, E, D, F, x_MD.dtype
  )
  return routed_swiglu(x_MD, routed, experts, kernels.grouped_matmul, tile)


def dense(x_MD, routed: Routing, experts, config: ModelConfig):
  """Applies every expert to every token and masks: the oracle, E / K times the work."""
  expert_MK, gate_MK = routed.expert_MK, routed.gate_MK
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


def few(x_MD, routed: Routing, experts, real_M):
  """Takes the chosen experts, a few at once, each on all tokens: for decoding.

  Reads the weights of experts that a real token chose, once, and of no others; where all are
  chosen, without the copy that taking one out makes. Multiplying all M tokens with each costs no
  time while M is small, since then the weights' way from memory is what takes it. Not
  differentiable. `real_M` is bool; of several tokens, others get zeros.
  """
  expert_MK, gate_MK = routed.expert_MK, routed.gate_MK
  M, K = expert_MK.shape
  if M == 1:
    y_MD = jnp.zeros(x_MD.shape, jnp.float32)
    for k in range(K):
      y_MD += _expert(x_MD, experts, expert_MK[0, k], gate_MK[:, k])
    return y_MD.astype(x_MD.dtype)
  E = experts[0].shape[0]
  expert_MK = jnp.where(real_M[:, None], expert_MK, E)  # dropped
  gate_ME = jnp.zeros((M, E), jnp.float32)
  gate_ME = gate_ME.at[jnp.arange(M)[:, None], expert_MK].set(gate_MK, mode="drop")
  chosen_E = jnp.zeros(E, bool).at[expert_MK].set(True, mode="drop")
  each = functools.partial(_each_chosen, x_MD, experts, gate_ME, chosen_E)
  if M * K < 2 * E:  # all of them hardly ever are
    return each().astype(x_MD.dtype)
  every = functools.partial(_every_expert, x_MD, experts, gate_ME)
  return jax.lax.cond(jnp.all(chosen_E), every, each).astype(x_MD.dtype)


def _expert(x_MD, experts, expert, gate_M):
  """Returns one expert's share of every token's output, float32."""
  w_gate_DF, w_up_DF, w_down_FD = (
    jax.lax.dynamic_index_in_dim(w, expert, keepdims=False) for w in experts
  )
  inner_MF = jax.nn.silu(x_MD @ w_gate_DF) * (x_MD @ w_up_DF)
  inner_MF = (inner_MF.astype(jnp.float32) * gate_M[:, None]).astype(x_MD.dtype)
  return jnp.matmul(inner_MF, w_down_FD, preferred_element_type=jnp.float32)


def _each_chosen(x_MD, experts, gate_ME, chosen_E):
  """Sums the chosen experts' shares, float32."""
  order_E = jnp.argsort(~chosen_E, stable=True)  # the chosen ones first
  num_chosen = jnp.sum(chosen_E)

  def add_some(step, y_MD):
    for i in range(EXPERTS_AT_ONCE):
      place = step * EXPERTS_AT_ONCE + i
      expert = order_E[jnp.minimum(place, num_chosen - 1)]  # past the end: the last, for nothing
      y_MD += _expert(x_MD, experts, expert, jnp.where(place < num_chosen, gate_ME[:, expert], 0))
    return y_MD

  num_steps = (num_chosen + EXPERTS_AT_ONCE - 1) // EXPERTS_AT_ONCE
  return jax.lax.fori_loop(0, num_steps, add_some, jnp.zeros(x_MD.shape, jnp.float32))


def _every_expert(x_MD, experts, gate_ME):
  """Sums all experts' shares, float32, as batched matmuls."""
  w_gate_EDF, w_up_EDF, w_down_EFD = experts
  x_EMD = jnp.broadcast_to(x_MD[None], (gate_ME.shape[1], *x_MD.shape))
  inner_EMF = jax.nn.silu(x_EMD @ w_gate_EDF) * (x_EMD @ w_up_EDF)
  inner_EMF = (inner_EMF.astype(jnp.float32) * gate_ME.T[..., None]).astype(x_MD.dtype)
  return jnp.sum(jnp.matmul(inner_EMF, w_down_EFD, preferred_element_type=jnp.float32), axis=0)


# Those that training may use, by their names in the config.
BACK_ENDS: dict[str, Callable] = {"local": local, "dense": dense}
