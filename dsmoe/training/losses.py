"""Losses on hidden states: cross-entropy over the vocabulary in chunks of tokens.

The vocabulary may be split over the mesh axis `model`; each of its devices then has the logits of
its own part only.

Shapes: M tokens, D hidden, V vocabulary of this device.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsmoe.parallel import collectives
from pallas_kernels.varying import zeros_like_operands


class CrossEntropy(NamedTuple):
  """Sums over tokens, each times its weight; float32 scalars."""

  cross_entropy: jax.Array  # nats
  z_loss: jax.Array  # log^2 of the softmax's normaliser; z_loss_weight not applied


def _chunks(a, chunk: int):
  """Pads the leading dimension with zeros and splits it: [M, ...] -> [n, chunk, ...]."""
  missing = -a.shape[0] % chunk
  a = jnp.pad(a, [(0, missing)] + [(0, 0)] * (a.ndim - 1))
  return a.reshape(-1, chunk, *a.shape[1:])


def _own_targets(targets, head_DV):
  """Numbers targets within this device's vocabulary; those of other devices become V."""
  V = head_DV.shape[1]
  own = targets - collectives.first_of_model(V)
  return jnp.where((own >= 0) & (own < V), own, V)


def _chunk_loss(x_cD, head_DV, targets_c, weights_c):
  """Returns the chunk's sums, and what its gradient needs."""
  logits_cV = jnp.matmul(x_cD, head_DV, preferred_element_type=jnp.float32)
  top_c = collectives.max_over_model(jnp.max(logits_cV, axis=-1))
  exp_cV = jnp.exp(logits_cV - top_c[:, None])
  targets_c = _own_targets(targets_c, head_DV)
  # A target of another device's part is out of bounds here.
  target_c = jnp.take_along_axis(logits_cV, targets_c[:, None], -1, "fill", fill_value=0)[:, 0]
  normaliser_c, target_c = collectives.sum_over_model((jnp.sum(exp_cV, axis=-1), target_c))
  log_z_c = jnp.log(normaliser_c) + top_c
  sums = CrossEntropy(
    jnp.sum(weights_c * (log_z_c - target_c)), jnp.sum(weights_c * jnp.square(log_z_c))
  )
  return sums, (exp_cV, normaliser_c, log_z_c)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def chunked_cross_entropy(x_MD, head_DV, targets_M, weights_M, z_loss_weight, chunk_tokens):
  """Sums cross-entropy + z_loss_weight * z-loss over tokens without whole logits in memory.

  Differentiated, it computes the gradient of each chunk while that chunk's logits are
  there, so the logits are neither stored nor computed twice.

  Args:
    x_MD: final hidden states, alike on all devices of `model`.
    head_DV: output projection, in x's dtype; this device's part of the vocabulary.
    targets_M: int32 token ids.
    weights_M: float32; 0 leaves a token out. No gradient.
    z_loss_weight: float32 scalar. No gradient.
    chunk_tokens: tokens whose [chunk_tokens, V] logits are in memory at once.

  Returns:
    (loss, CrossEntropy): the weighted total to differentiate, and its parts. The parts
    have no gradient.
  """
  inputs = [_chunks(a, min(chunk_tokens, x_MD.shape[0])) for a in (x_MD, targets_M, weights_M)]

  each = jax.lax.map(lambda chunk: _chunk_loss(chunk[0], head_DV, *chunk[1:])[0], inputs)
  sums = jax.tree.map(jnp.sum, each)
  return sums.cross_entropy + z_loss_weight * sums.z_loss, sums


def _fwd(x_MD, head_DV, targets_M, weights_M, z_loss_weight, chunk_tokens):
  inputs = [_chunks(a, min(chunk_tokens, x_MD.shape[0])) for a in (x_MD, targets_M, weights_M)]

  def step(dhead_DV, chunk):
    x_cD, targets_c, weights_c = chunk
    sums, (exp_cV, normaliser_c, log_z_c) = _chunk_loss(x_cD, head_DV, targets_c, weights_c)
    scale_c = weights_c * (1 + 2 * z_loss_weight * log_z_c) / normaliser_c
    hit_cV = (
      _own_targets(targets_c, head_DV)[:, None]
      == jnp.arange(head_DV.shape[1], dtype=targets_c.dtype)[None, :]
    )
    dlogits_cV = exp_cV * scale_c[:, None] - jnp.where(hit_cV, weights_c[:, None], 0)
    dlogits_cV = dlogits_cV.astype(x_cD.dtype)
    dx_cD = jnp.matmul(dlogits_cV, head_DV.T)
    dhead_DV += jnp.matmul(x_cD.T, dlogits_cV, preferred_element_type=jnp.float32)
    return dhead_DV, (sums, dx_cD)

  operands = (x_MD, head_DV, targets_M, weights_M)
  dhead_DV = zeros_like_operands(head_DV.shape, jnp.float32, *operands)
  dhead_DV, (each, dx) = jax.lax.scan(step, dhead_DV, inputs)
  sums = jax.tree.map(jnp.sum, each)
  dx_MD = collectives.sum_over_model(dx.reshape(-1, x_MD.shape[1])[: x_MD.shape[0]])
  return (sums.cross_entropy + z_loss_weight * sums.z_loss, sums), (dx_MD, dhead_DV)


def _bwd(chunk_tokens, saved, cotangents):
  dx_MD, dhead_DV = saved
  dloss, _ = cotangents
  # In float32: the total's weight is small against bfloat16's range of exact values.
  dx_MD_scaled = (dx_MD.astype(jnp.float32) * dloss).astype(dx_MD.dtype)
  return dx_MD_scaled, (dhead_DV * dloss).astype(dx_MD.dtype), None, None, None


chunked_cross_entropy.defvjp(_fwd, _bwd)
