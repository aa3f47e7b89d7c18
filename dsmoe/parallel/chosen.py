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
from pallas_kernels import varying
from pallas_kernels.routing import Routed


@jax.named_scope("experts")
def chosen(x_MD, routed: Routed, experts: ExpertWeights, real_M=None, first=None):
  """Sums each token's experts, reading the weights of experts that a counting token chose once.

  Where every expert is chosen, all are multiplied in one batch, without the copy that taking a
  single expert out of the array makes.

  Args:
    x_MD: tokens.
    routed: their experts and gates.
    experts: the layer's weights, in x's dtype.
    real_M: bool, tokens that count; None: all of them. Where M = 1 and `first` is None it is not
      looked at; else the other tokens' results are zeros.
    first: int32 scalar, where `experts` are only some of the layer's: the number of the first one.
      Choices of others contribute nothing. None: they are all.

  Returns:
    [M, D] in x's dtype.
  """
  # The loop takes choices by traced numbers, which NumPy's own arrays refuse.
  expert_MK, gate_MK = jnp.asarray(routed.expert_MK), jnp.asarray(routed.gate_MK)
  M, K = expert_MK.shape
  if M == 1 and first is None:

    def add(k, y_MD):
      return y_MD + _expert(x_MD, experts, expert_MK[0, k], gate_MK[:, k])

    # Written out, XLA:CPU would copy each choice's expert into a buffer of its own.
    none_MD = _nothing(x_MD, gate_MK, expert_MK, experts)
    return jax.lax.fori_loop(0, K, add, none_MD).astype(x_MD.dtype)
  E = experts.num_experts
  if first is not None:
    own_MK = (expert_MK >= first) & (expert_MK < first + E)
    expert_MK = jnp.where(own_MK, expert_MK - first, E)  # dropped
  if real_M is not None:
    expert_MK = jnp.where(real_M[:, None], expert_MK, E)  # dropped
  gate_ME = varying.zeros_like_operands((M, E), jnp.float32, expert_MK, gate_MK)
  gate_ME = gate_ME.at[jnp.arange(M)[:, None], expert_MK].set(gate_MK, mode="drop")
  chosen_E = varying.zeros_like_operands(E, bool, expert_MK).at[expert_MK].set(True, mode="drop")
  each = functools.partial(_each_chosen, x_MD, experts, gate_ME, chosen_E)
  if M * K < 2 * E:  # hardly ever are all of them chosen
    return each().astype(x_MD.dtype)
  every = functools.partial(_every_expert, x_MD, experts, gate_ME)
  return jax.lax.cond(jnp.all(chosen_E), every, each).astype(x_MD.dtype)


def _nothing(x_MD, *operands):
  """Returns the sum of no expert's shares, which varies over what x_MD and the operands do."""
  return varying.zeros_like_operands(x_MD.shape, jnp.float32, x_MD, *operands)


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
  none_MD = _nothing(x_MD, gate_ME, chosen_E, experts)
  return jax.lax.fori_loop(0, num_steps, add_some, none_MD)


def _every_expert(x_MD, experts: ExpertWeights, gate_ME):
  """Sums all experts' shares, float32, as batched matmuls."""
  w_gate_EDF, w_up_EDF, w_down_EFD = experts.own()
  x_EMD = jnp.broadcast_to(x_MD[None], (gate_ME.shape[1], *x_MD.shape))
  inner_EMF = jax.nn.silu(x_EMD @ w_gate_EDF) * (x_EMD @ w_up_EDF)
  inner_EMF = (inner_EMF.astype(jnp.float32) * gate_ME.T[..., None]).astype(x_MD.dtype)
  return jnp.sum(jnp.matmul(inner_EMF, w_down_EFD, preferred_element_type=jnp.float32), axis=0)
