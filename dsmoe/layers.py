"""The small layers every block is made of: RMSNorm and SwiGLU, as functions and modules.

Shapes: B batch, S sequence, D hidden, F inner; `...` any leading dimensions.
"""

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


class SwiGLU(nnx.Module):
  """w_down(silu(w_gate x) * w_up x). Source: arXiv:2002.05202."""

  def __init__(self, hidden_size: int, inner_size: int, stddev: float, rngs: nnx.Rngs):
    self.w_gate = normal(rngs, (hidden_size, inner_size), stddev)  # [D, F]
    self.w_up = normal(rngs, (hidden_size, inner_size), stddev)  # [D, F]
    self.w_down = normal(rngs, (inner_size, hidden_size), stddev)  # [F, D]

  def __call__(self, x):
    """Maps [..., D] to [..., D]."""
    inner = jax.nn.silu(x @ self.w_gate[...]) * (x @ self.w_up[...])
    # The gradient of w_down transposes `inner`; without this XLA:CPU would redo the silu in
    # transposed order, element by element, while it does.
    return jax.lax.optimization_barrier(inner) @ self.w_down[...]
