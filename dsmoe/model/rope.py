"""Rotary position embeddings with YaRN scaling: frequencies, rotation, softmax scale.

Rotations act on the half-split layout. DeepSeek's checkpoints rotate adjacent pairs
instead: `deinterleave` moves the columns of a weight so that the two agree, which costs
one small copy of the weight and nothing on the activations.
"""

import math

import jax.numpy as jnp
import numpy as np

from dsmoe.config import ModelConfig, RopeScaling


def _mscale(factor: float, mscale: float) -> float:
  return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def frequencies(dim: int, theta: float, scaling: RopeScaling) -> np.ndarray:
  """Returns the angle a position adds, of each pair: float32 [dim / 2], radians.

  Pairs that turn more than `beta_fast` times over the original context keep their
  frequency, those under `beta_slow` are slowed by `factor`, with a ramp between.

  Source: YaRN (arXiv:2309.00071) as in DeepSeek-V3's inference/model.py; the ramp's upper
  end is clamped to dim - 1.
  """
  base = theta ** -(np.arange(0, dim, 2, dtype=np.float32) / dim)
  if scaling.factor <= 1:
    return base.astype(np.float32)

  def pair_turning(turns: float) -> float:
    length = scaling.original_max_position_embeddings
    return dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))

  low = max(math.floor(pair_turning(scaling.beta_fast)), 0)
  high: float = min(math.ceil(pair_turning(scaling.beta_slow)), dim - 1)
  if low == high:
    high += 0.001
  ramp = np.clip((np.arange(dim // 2, dtype=np.float32) - low) / (high - low), 0, 1)
  return (base / scaling.factor * ramp + base * (1 - ramp)).astype(np.float32)


def softmax_scale(config: ModelConfig) -> float:
  """Returns the factor on attention logits: 1/sqrt(q and k size), times YaRN's mscale squared."""
  scaling = config.rope_scaling
  scale = config.qk_head_dim**-0.5
  if scaling.factor > 1 and scaling.mscale_all_dim:
    scale *= _mscale(scaling.factor, scaling.mscale_all_dim) ** 2
  return scale


def cos_sin(positions, config: ModelConfig):
  """Returns cos and sin of every position's angles, float32 [..., R / 2] each.

  With both `mscale` and `mscale_all_dim` given they are scaled by the ratio of the two
  (1 in DeepSeek's releases), else by YaRN's own 0.1 ln(factor) + 1.
  """
  scaling = config.rope_scaling
  angles = positions[..., None].astype(jnp.float32) * jnp.asarray(
    frequencies(config.qk_rope_head_dim, config.rope_theta, scaling)
  ).reshape(*[1] * positions.ndim, -1)
  if scaling.mscale and scaling.mscale_all_dim:
    ratio = _mscale(scaling.factor, scaling.mscale) / _mscale(
      scaling.factor, scaling.mscale_all_dim
    )
  else:
    ratio = _mscale(scaling.factor, 1.0)
  return jnp.cos(angles) * ratio, jnp.sin(angles) * ratio


def rotate(x, cos, sin):
  """Rotates pair i, made of elements i and i + R/2 of the last dimension.

  Args:
    x: [..., R].
    cos, sin: float32, broadcastable to [..., R / 2].

  Returns:
    [..., R] in x's dtype.
  """
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def deinterleave(w):
  """Reorders the last dimension (0 1 2 3 ...) to (0 2 ... 1 3 ...): pairs become halves."""
  *lead, R = w.shape
  return w.reshape(*lead, R // 2, 2).swapaxes(-1, -2).reshape(*lead, R)


def half_split_columns(w, config: ModelConfig):
  """Returns a weight [..., R at the end] with its last R columns deinterleaved."""
  kept, turned = jnp.split(w, [w.shape[-1] - config.qk_rope_head_dim], axis=-1)
  return jnp.concatenate([kept, deinterleave(turned)], axis=-1)
