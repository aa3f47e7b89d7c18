"""The path of decoding: runs only the chosen experts, each on all tokens.

For few tokens reading the weights dominates, and multiplying all tokens with an expert takes no
longer than multiplying its own. Not differentiable.

Shapes: M tokens, D hidden, E experts, F an expert's inner size, K experts a token.
"""

import functools

import jax
import jax.numpy as jnp

from dsmoe import platforms
from dsmoe.parallel.experts import ExpertWeights
from pallas_kernels.routing import Routed


def chosen(x_MD, routed: Routed, experts: ExpertWeights, real_M=None):
  """Sums each token's experts, reading the weights of experts that a counting token chose once.

  Where every expert is chosen, all are multiplied in one batch, without the copy that taking a
  single expert out of the array makes.

  Args:
    x_MD: tokens.
    routed: their experts and gates.
    experts: the layer's weights, in x's dtype.
    real_M: bool, tokens that count; None: all of them. With M = 1 it is not looked at; with more,
      the other tokens' results are zeros.

  Returns:
    [M, D] in x's dtype.
  """
  # The loop takes choices by traced numbers, which NumPy's own arrays refuse.
  expert_MK, gate_MK = jnp.asarray(routed.expert_MK), jnp.asarray(routed.gate_MK)
  M, K = expert_MK.shape
  if M == 1:

    def add(k, y_MD):
      return y_MD + _expert(x_MD, experts, expert_MK[0, k], gate_MK[:, k])

    # Written out, XLA:CPU would copy each choice's expert into a buffer of its own.
    return jax.lax.fori_loop(0, K, add, jnp.zeros(x_MD.shape, jnp.float32)).astype(x_MD.dtype)
  E = experts.num_experts
  if real_M is not None:
    expert_MK = jnp.where(real_M[:, None], expert_MK, E)  # dropped
  gate_ME = jnp.zeros((M, E), jnp.float32)
  gate_ME = gate_ME.at[jnp.arange(M)[:, None], expert_MK].set(gate_MK, mode="drop")
  chosen_E = jnp.zeros(E, bool).at[expert_MK].set(True, mode="drop")
  each = functools.partial(_each_chosen, x_MD, experts, gate_ME, chosen_E)
  if M * K < 2 * E:  # hardly ever are all of them chosen
    return each().astype(x_MD.dtype)
  every = functools.partial(_every_expert, x_MD, experts, gate_ME)
  return jax.lax.cond(jnp.all(chosen_E), every, each).astype(x_MD.dtype)


def _expert(x_MD, experts: ExpertWeights, expert, gate_M):
  """Returns one expert's share of every token's output, float32."""
  w_gate_DF, w_up_DF, w_down_FD = experts.take(expert)
  inner_MF = jax.nn.silu(x_MD @ w_gate_DF) * (x_MD @ w_up_DF)
  inner_MF = (inner_MF.astype(jnp.float32) * gate_M[:, None]).astype(x_MD.dtype)
  return jnp.matmul(inner_MF, w_down_FD, preferred_element_type=jnp.float32)


def _each_chosen(x_MD, experts: ExpertWeights, gate_ME, chosen_E):
  """Sums the chosen experts' shares, float32, some experts a round."""
  order_E = jnp.argsort(~chosen_E, stable=True)  # the chosen ones first
  num_chosen = jnp.sum(chosen_E)
  at_once = platforms.experts_at_once()

  def add_some(step, y_MD):
    for i in range(at_once):
      place = step * at_once + i
      # Past the end the last chosen expert is read again and counts nothing.
      expert = order_E[jnp.minimum(place, num_chosen - 1)]
      gate_M = jnp.where(place < num_chosen, gate_ME[:, expert], 0)
      y_MD += _expert(x_MD, experts, expert, gate_M)
    return y_MD

  num_steps = (num_chosen + at_once - 1) // at_once
  return jax.lax.fori_loop(0, num_steps, add_some, jnp.zeros(x_MD.shape, jnp.float32))


def _every_expert(x_MD, experts: ExpertWeights, gate_ME):
  """Sums all experts' shares, float32, as batched matmuls."""
  w_gate_EDF, w_up_EDF, w_down_EFD = experts.own()
  x_EMD = jnp.broadcast_to(x_MD[None], (gate_ME.shape[1], *x_MD.shape))
  inner_EMF = jax.nn.silu(x_EMD @ w_gate_EDF) * (x_EMD @ w_up_EDF)
  inner_EMF = (inner_EMF.astype(jnp.float32) * gate_ME.T[..., None]).astype(x_MD.dtype)
  return jnp.sum(jnp.matmul(inner_EMF, w_down_EFD, preferred_element_type=jnp.float32), axis=0)
