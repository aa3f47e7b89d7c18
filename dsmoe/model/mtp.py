"""Multi-token prediction: module k predicts the token k + 1 places ahead.

Each module joins the hidden state of the depth before it with the embedding of the next
known token and runs one block; embedding and head are the main model's.

Source: DeepSeek-V3 (arXiv:2412.19437) section 2.2. As in DeepSeek's and Hugging Face's
code, and unlike the paper's text, the hidden state is taken after the final norm, and the
embedding comes first in the projection's input.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from dsmoe.config import ModelConfig
from dsmoe.model.layers import normal, ones, rms_norm


class MTPModule(nnx.Module):
  """One depth of multi-token prediction around a transformer block."""

  def __init__(self, config: ModelConfig, block: nnx.Module, rngs: nnx.Rngs):
    self.config = config
    D = config.hidden_size
    self.embed_norm = ones(D)
    self.hidden_norm = ones(D)
    self.eh_proj = normal(rngs, (2 * D, D), config.initializer_range)
    self.block = block
    self.norm = ones(D)

  def __call__(self, hidden_BSD, embedded_BSD, *block_args):
    """Advances one depth: joins the inputs, runs the block and norms its output.

    Args:
      hidden_BSD: of the depth before, after its norm.
      embedded_BSD: embedding of the token that this depth looks at next.
      *block_args: what the block is called with besides hidden states; see `Block`.

    Returns:
      ([B, S, D] after this depth's norm, the block's other results).
    """
    eps = self.config.rms_norm_eps
    embedded_BSD = rms_norm(embedded_BSD, self.embed_norm[...], eps)
    hidden_BSD = rms_norm(hidden_BSD, self.hidden_norm[...], eps)
    joined = jnp.concatenate([embedded_BSD, hidden_BSD], axis=-1)
    x_BSD, stats, attended = self.block(joined @ self.eh_proj[...], *block_args)
    return rms_norm(x_BSD, self.norm[...], eps), stats, attended


def shift(x_BS, by: int):
  """Moves each row `by` places to the left; the places freed hold the row's last value."""
  return jnp.concatenate([x_BS[:, by:], jnp.repeat(x_BS[:, -1:], by, axis=1)], axis=1)


def depth_weights(weights_BS, segments_BS, depth: int):
  """Returns the weight of predicting the target `depth` places further on.

  It is the later target's own weight, and zero where that lies beyond the row's end or,
  with documents kept apart, in another document.

  Args:
    weights_BS: float32 weights of the next-token targets.
    segments_BS: int32 document numbers, or None.
    depth: 1 for the first module.

  Returns:
    float32 [B, S].
  """
  inside = jnp.arange(weights_BS.shape[1])[None, :] < weights_BS.shape[1] - depth
  if segments_BS is not None:
    inside = inside & (shift(segments_BS, depth) == segments_BS)
  return jax.lax.select(
    inside & jnp.ones_like(weights_BS, bool), shift(weights_BS, depth), jnp.zeros_like(weights_BS)
  )
