"""Who moves the load between experts, and by what rule.

A balancer is two pure functions: a loss on a layer's scores, added to the training loss,
and an update of the router's bias from the step's counts, once an optimizer step. `make`
puts the configured ones together; with none of them both do nothing.

Shapes: B sequences, S tokens of a sequence, E routed experts, L layers.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsmoe.parallel import collectives, context
from dsmoe.training.hyperparameters import Hyperparameters


class Balancer(NamedTuple):
  """One way to balance; see `make`."""

  # (scores_BSE float32 unbiased, K) -> float32 scalar, summed over sequences
  loss: Callable
  # (bias_E or bias_LE float32, counts int32 of the same shape, step) -> bias
  update: Callable


def update_router_bias(bias_LE, counts_LE, speed):
  """Moves each expert's selection bias one step towards balanced load.

  Args:
    bias_LE: float32 [..., E]; added to scores for selection, never to gates.
    counts_LE: int32 [..., E], tokens per expert in this step, summed over devices and
      microbatches.
    speed: gamma, in score units a step.

  Returns:
    float32 [..., E]: up by `speed` where the load is under the mean, down where it is
    over, unchanged where equal. The comparison is exact: integers only.

  Source: DeepSeek-V3 (arXiv:2412.19437) section 2.1.2, arXiv:2408.15664.
  """
  E = counts_LE.shape[-1]
  total = jnp.sum(counts_LE, axis=-1, keepdims=True)
  # count < total / E is count < ceil(total / E) for integers, and so on.
  under = counts_LE < (total + E - 1) // E
  over = counts_LE > total // E
  sign = under.astype(jnp.float32) - over.astype(jnp.float32)
  return bias_LE + jnp.float32(speed) * sign


def sequence_loss(scores_BSE, num_experts_per_tok: int):
  """Penalises sequences whose tokens prefer the same experts; alpha not applied.

  With K experts a token and T tokens: f_i = E / (K T) * tokens whose top K of the
  unbiased scores, over all experts, hold i; P_i = mean of s_i / sum_j s_j; the loss is
  sum_i f_i P_i, 1 when perfectly even. f has no gradient.

  Args:
    scores_BSE: float32 unbiased scores of one layer, of this device's tokens of each sequence.
    num_experts_per_tok: K.

  Returns:
    float32 scalar, summed (not averaged) over the B sequences: this device's tokens' share, which
    the devices of the mesh axis `context` sum to the whole.

  Source: DeepSeek-V3 (arXiv:2412.19437) equations 17-20.
  """
  B, S, E = scores_BSE.shape
  T, K = S * collectives.devices_along(context.AXIS), num_experts_per_tok
  _, top_BSK = jax.lax.top_k(jax.lax.stop_gradient(scores_BSE), K)
  rows = jnp.arange(B, dtype=jnp.int32)[:, None] * E + top_BSK.reshape(B, S * K)
  counts = jnp.bincount(rows.reshape(-1), length=B * E).reshape(B, E)
  f_BE = context.sum_over_rows(counts).astype(jnp.float32) * (E / (K * T))
  P_BE = jnp.sum(scores_BSE / jnp.sum(scores_BSE, axis=-1, keepdims=True), axis=1) / T
  return jnp.sum(f_BE * P_BE)


def _no_loss(scores_BSE, num_experts_per_tok):
  return jnp.zeros((), jnp.float32)


def _no_update(bias, counts, step):
  return bias


NONE = Balancer(_no_loss, _no_update)


def _bias(hyper: Hyperparameters) -> Balancer:
  """The sign update, with speed gamma until `bias_freeze_step` and 0 from there on."""

  def update(bias, counts, step):
    frozen = (hyper.bias_freeze_step >= 0) & (step >= hyper.bias_freeze_step)
    return update_router_bias(bias, counts, jnp.where(frozen, 0.0, hyper.bias_update_speed))

  return Balancer(_no_loss, update)


def _sequence(hyper: Hyperparameters) -> Balancer:
  """The sequence-wise loss times alpha."""

  def loss(scores_BSE, num_experts_per_tok):
    return hyper.sequence_loss_weight * sequence_loss(scores_BSE, num_experts_per_tok)

  return Balancer(loss, _no_update)


MEMBERS: dict[str, Callable[[Hyperparameters], Balancer]] = {"bias": _bias, "sequence": _sequence}


def make(methods: Sequence[str], hyper: Hyperparameters) -> Balancer:
  """Returns one balancer that does what all of the methods do.

  Args:
    methods: names of `MEMBERS`.
    hyper: their numbers, which may be arguments of a compiled step.
  """
  members = [MEMBERS[name](hyper) for name in methods]
  if not members:
    return NONE

  def loss(scores_BSE, num_experts_per_tok):
    return sum(m.loss(scores_BSE, num_experts_per_tok) for m in members)

  def update(bias, counts, step):
    for member in members:
      bias = member.update(bias, counts, step)
    return bias

  return Balancer(loss, update)
