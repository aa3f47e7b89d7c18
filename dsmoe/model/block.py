"""One transformer block: attention and a feed-forward part, each behind a norm and a residual.

The same block trains, takes in a prompt and decodes. What differs is what attention reads, rows or
the cache, and is passed in.

Shapes: B batch, S sequence, D hidden, E routed experts.
"""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from dsmoe.config import ModelConfig
from dsmoe.model.attention import MLA
from dsmoe.model.layers import SwiGLU, ones, rms_norm
from dsmoe.model.moe import TRAINING, MoE, MoEOptions, MoEStats
from dsmoe.parallel import collectives


class Block(nnx.Module):
  """Latent attention, then a dense SwiGLU or a mixture of experts."""

  def __init__(self, config: ModelConfig, use_moe: bool, rngs: nnx.Rngs):
    self.config = config
    self.use_moe = use_moe
    self.attention_norm = ones(config.hidden_size)
    self.attention = MLA(config, rngs)
    self.mlp_norm = ones(config.hidden_size)
    self.mlp: nnx.Module = (
      MoE(config, rngs) if use_moe else SwiGLU(config, config.intermediate_size, rngs)
    )

  def __call__(
    self, x_BSD, cos_sin, attend: Callable, moe: MoEOptions = TRAINING
  ) -> tuple[jax.Array, MoEStats | None, Any]:
    """Runs the block.

    Args:
      x_BSD: hidden states.
      cos_sin: float32 [B, S, R / 2] each, from `rope.cos_sin`.
      attend: what the queries read; see `MLA`.
      moe: how the experts are run.

    Returns:
      (hidden states [B, S, D]; the `MoEStats` of a mixture of experts, else None; what `attend`
      returns beside its output).
    """
    eps = self.config.rms_norm_eps
    with jax.named_scope("attention"):
      h_BSD = rms_norm(x_BSD, self.attention_norm[...], eps)
      out_BSD, attended = self.attention(h_BSD, cos_sin, attend)
      x_BSD = x_BSD + out_BSD
    with jax.named_scope("moe" if self.use_moe else "dense_ffn"):
      h_BSD = rms_norm(x_BSD, self.mlp_norm[...], eps)
      if self.use_moe:
        out_BSD, stats = self.mlp(h_BSD, moe)
      else:
        partial_BSD, stats = self.mlp(collectives.enter_model_axis(h_BSD)), None
        out_BSD = collectives.sum_over_model(partial_BSD)
      x_BSD = x_BSD + out_BSD
    return x_BSD, stats, attended
