"""The small layers every block is made of: RMSNorm and SwiGLU, as functions and modules.

Shapes: B batch, S sequence, D hidden, F inner; `...` any leading dimensions.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], stddev: float) -> nnx.Param:
  """A float32 parameter drawn from a normal distribution."""
  return nnx.Param(stddev * jax.random.normal(rngs.params(), shape, jnp.float32))


def ones(size: int) -> nnx.Param:
  """A float32 norm scale [size]."""
  return nnx.Param(jnp.ones((size,), jnp.float32))


def zeros(size: int) -> nnx.Param:
  """A float32 bias vector [size]."""
  return nnx.Param(jnp.zeros((size,), jnp.float32))


def project(x, w):
  """Contracts the last dimension of x with the first of w: [..., D] x [D, ...] -> [..., ...].

  As one matmul of two-dimensional arrays, whose gradients XLA:CPU runs without copying a
  transposed operand first.

  Args:
    x: [..., D].
    w: [D, ...], in x's dtype.

  Returns:
    x's leading dimensions followed by w's trailing ones, in x's dtype.
  """
  y = x.reshape(-1, w.shape[0]) @ w.reshape(w.shape[0], -1)
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

  def __init__(self, hidden_size: int, inner_size: int, stddev: float, rngs: nnx.Rngs):
    self.w_gate = normal(rngs, (hidden_size, inner_size), stddev)  # [D, F]
    self.w_up = normal(rngs, (hidden_size, inner_size), stddev)  # [D, F]
    self.w_down = normal(rngs, (inner_size, hidden_size), stddev)  # [F, D]

  def __call__(self, x):
    """Maps [..., D] to [..., D]."""
    gate, up = project(x, self.w_gate[...]), project(x, self.w_up[...])
    return project(silu_times(gate, up), self.w_down[...])
