"""Multi-head latent attention: queries, latents, and the projections around what is attended to.

Keys and values are expanded from one latent of kv_lora_rank numbers a token; a rotary key
of qk_rope_head_dim numbers is shared by all heads. Source: DeepSeek-V2 (arXiv:2405.04434)
section 2.1, DeepSeek-V3 (arXiv:2412.19437) section 2.1.1.

Over the mesh axis `model` heads are split: what depends on a head is computed where it lies, the
latents everywhere, and each device's part of the output is summed.

Shapes: B batch, S queries, T keys, D hidden, H heads (of this device), N qk_nope, R qk_rope, U v head dim,
Q q_lora, C kv_lora.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from dsmoe.config import ModelConfig
from dsmoe.model import rope
from dsmoe.model.layers import normal, ones, project, rms_norm, zeros
from dsmoe.parallel import collectives, context
from pallas_kernels.mla_attention import causal_attention

LATENT_NORM_EPS = 1e-6  # whatever rms_norm_eps says, as in every released checkpoint's code


class MLA(nnx.Module):
  """Multi-head latent attention."""

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
    self.config = config
    D, H = config.hidden_size, config.num_attention_heads
    N, R, U = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    Q, C = config.q_lora_rank, config.kv_lora_rank
    init = functools.partial(normal, rngs, stddev=config.initializer_range)
    if Q is None:
      self.q_proj = init((D, H, N + R))
    else:
      self.q_a_proj = init((D, Q))
      self.q_a_norm = ones(Q)
      self.q_b_proj = init((Q, H, N + R))
    self.kv_a_proj = init((D, C + R))
    self.kv_a_norm = ones(C)
    self.kv_b_proj = init((C, H, N + U))
    self.o_proj = init((H, U, D))
    if config.attention_bias:
      if Q is not None:
        self.q_a_bias = zeros(Q)
      self.kv_a_bias = zeros(C + R)
      self.o_bias = zeros(D)

  def _rope_columns(self, w):
    """Returns a weight with its last R columns as half-split rotation wants them."""
    return rope.half_split_columns(w, self.config) if self.config.rope_interleave else w

  def queries(self, x_BSD, cos_BSr, sin_BSr):
    """Returns rotated queries [B, S, H, N + R]."""
    if self.config.q_lora_rank is None:
      x_BSD = collectives.enter_model_axis(x_BSD)
      q_BSHA = project(x_BSD, self._rope_columns(self.q_proj[...]), self.config)
    else:
      q_BSQ = project(x_BSD, self.q_a_proj[...], self.config)
      if self.config.attention_bias:
        q_BSQ = q_BSQ + self.q_a_bias[...].astype(q_BSQ.dtype)[None, None]
      q_BSQ = rms_norm(q_BSQ, self.q_a_norm[...], LATENT_NORM_EPS)
      q_BSQ = collectives.enter_model_axis(q_BSQ)
      q_BSHA = project(q_BSQ, self._rope_columns(self.q_b_proj[...]), self.config)
    q_BSHN, q_BSHR = jnp.split(q_BSHA, [self.config.qk_nope_head_dim], axis=-1)
    q_BSHR = rope.rotate(q_BSHR, cos_BSr[:, :, None], sin_BSr[:, :, None])
    return jnp.concatenate([q_BSHN, q_BSHR], axis=-1)

  def latents(self, x_BSD, cos_BSr, sin_BSr):
    """Returns the normalised latent [B, S, C] and the rotated shared key [B, S, R]."""
    kv = project(x_BSD, self._rope_columns(self.kv_a_proj[...]), self.config)
    if self.config.attention_bias:
      kv = kv + self._rope_columns(self.kv_a_bias[...]).astype(kv.dtype)[None, None]
    c_BSC, k_BSR = jnp.split(kv, [self.config.kv_lora_rank], axis=-1)
    c_BSC = rms_norm(c_BSC, self.kv_a_norm[...], LATENT_NORM_EPS)
    return c_BSC, rope.rotate(k_BSR, cos_BSr, sin_BSr)

  def expand(self, c_BSC, k_BSR):
    """Returns the keys [B, S, H, N + R] and values [B, S, H, U] that latents stand for."""
    c_BSC, k_BSR = collectives.enter_model_axis((c_BSC, k_BSR))
    kv = project(c_BSC, self.kv_b_proj[...], self.config)
    k_BSHN, v_BSHU = jnp.split(kv, [self.config.qk_nope_head_dim], axis=-1)
    shape = (*k_BSHN.shape[:3], self.config.qk_rope_head_dim)
    k_BSHR = jnp.broadcast_to(k_BSR[:, :, None], shape)
    return jnp.concatenate([k_BSHN, k_BSHR], axis=-1), v_BSHU

  def __call__(self, x_BSD, cos_sin, attend: Callable):
    """Attends from each token to what `attend` reads.

    Args:
      x_BSD: normalised hidden states.
      cos_sin: float32 [B, S, R / 2] each, from `rope.cos_sin`.
      attend: (this module, queries [B, S, H, N + R], latents [B, S, C], rotated shared keys
        [B, S, R]) -> (outputs [B, S, H, U], anything); `within_rows` for training.

    Returns:
      ([B, S, D], the second value of `attend`).
    """
    q_BSHA = self.queries(x_BSD, *cos_sin)
    c_BSC, k_BSR = self.latents(x_BSD, *cos_sin)
    out_BSHU, attended = attend(self, q_BSHA, c_BSC, k_BSR)
    return self.output(out_BSHU.astype(x_BSD.dtype)), attended

  def output(self, out_BSHU):
    """Joins the heads' outputs to [B, S, D]."""
    B, S, H, U = out_BSHU.shape
    out_BSD = project(
      out_BSHU.reshape(B, S, H * U), self.o_proj[...].reshape(H * U, -1), self.config
    )
    out_BSD = collectives.sum_over_model(out_BSD)
    if self.config.attention_bias:
      out_BSD = out_BSD + self.o_bias[...].astype(out_BSD.dtype)[None, None]
    return out_BSD


def within_rows(segments_BT) -> Callable:
  """Returns the `attend` of training: each token sees itself and earlier ones of its document.

  Where rows are split over the mesh axis `context`, the latents of the other devices' tokens are
  gathered, C + R numbers a token, and each device expands those of whole rows: for every row
  T H (N + R + U) numbers.

  Args:
    segments_BT: int32 document numbers of whole rows, or None for one document a row.
  """

  def attend(mla: MLA, q_BSHA, c_BSC, k_BSR):
    starts_Y = context.own_starts(q_BSHA.shape[1])
    if starts_Y is None:
      c_BTC, k_BTR = c_BSC, k_BSR
    else:
      with jax.named_scope("context"):
        latents_BTW = context.whole_rows(jnp.concatenate([c_BSC, k_BSR], axis=-1))
      c_BTC, k_BTR = jnp.split(latents_BTW, [c_BSC.shape[-1]], axis=-1)
    k_BTHA, v_BTHU = mla.expand(c_BTC, k_BTR)
    out_BSHU = causal_attention(
      q_BSHA,
      k_BTHA,
      v_BTHU,
      segments_BT,
      rope.softmax_scale(mla.config),
      implementation=mla.config.kernels.attention,
      chunk_tokens=mla.config.attention_chunk_tokens,
      starts_Y=starts_Y,
    )
    return out_BSHU, None

  return attend
