"""The small layers every block is made of: RMSNorm and SwiGLU, as functions and modules.

Shapes: B batch, S sequence, D hidden, F inner; `...` any leading dimensions.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from dsmoe.config import ModelConfig
from pallas_kernels.quantized_matmul import quantized_matmul


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], stddev: float) -> nnx.Param:
  """A float32 parameter drawn from a normal distribution."""
  return nnx.Param(stddev * jax.random.normal(rngs.params(), shape, jnp.float32))


def ones(size: int) -> nnx.Param:
  """A float32 norm scale [size]."""
  return nnx.Param(jnp.ones((size,), jnp.float32))


def zeros(size: int) -> nnx.Param:
  """A float32 bias vector [size]."""
  return nnx.Param(jnp.zeros((size,), jnp.float32))


def project(x, w, config: ModelConfig):
  """Contracts the last dimension of x with the first of w: [..., D] x [D, ...] -> [..., ...].

  As one matmul of two-dimensional arrays, whose gradients XLA:CPU runs without copying a
  transposed operand first.

  Args:
    x: [..., D].
    w: [D, ...], in x's dtype.
    config: matmul_precision, kernels.quantized_matmul.

  Returns:
    x's leading dimensions followed by w's trailing ones, in x's dtype.
  """
  x_MD, w_DF = x.reshape(-1, w.shape[0]), w.reshape(w.shape[0], -1)
  if config.matmul_precision == "compute_dtype":
    y = x_MD @ w_DF
  else:
    y = quantized_matmul(x_MD, w_DF, *config.quantization)
  return y.reshape(*x.shape[:-1], *w.shape[1:])


@functools.partial(jax.checkpoint, static_argnums=2)
def rms_norm(x, scale_D, eps: float):
  """Divides by the root mean square of the last dimension, in float32.

  Args:
    x: [..., D].
    scale_D: float32 [D].
    eps: added to the mean square.

  Returns:
    [..., D] in x's dtype.

  Source: arXiv:1910.07467.
  """
  with jax.named_scope("norm"):
    x32 = x.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
    scale = jnp.expand_dims(scale_D, range(x.ndim - 1))
    return (x32 * jax.lax.rsqrt(mean_square + eps) * scale).astype(x.dtype)


@jax.checkpoint
def silu_times(gate, up):
  """Returns silu(gate) * up, in their shape and dtype; the gradient recomputes it from the two."""
  return jax.nn.silu(gate) * up


class SwiGLU(nnx.Module):
  """w_down(silu(w_gate x) * w_up x). Source: arXiv:2002.05202."""

  def __init__(self, config: ModelConfig, inner_size: int, rngs: nnx.Rngs):
    self.config = config
    D, F, stddev = config.hidden_size, inner_size, config.initializer_range
    self.w_gate = normal(rngs, (D, F), stddev)  # [D, F]
    self.w_up = normal(rngs, (D, F), stddev)  # [D, F]
    self.w_down = normal(rngs, (F, D), stddev)  # [F, D]

  def __call__(self, x):
    """Maps [..., D] to [..., D]; where F is split over `model`, to this device's share of it."""
    gate, up = (project(x, w[...], self.config) for w in (self.w_gate, self.w_up))
    return project(silu_times(gate, up), self.w_down[...], self.config)
