"""Multi-head latent attention, expanded form, for training and full forward passes.

Keys and values are expanded from one latent of kv_lora_rank numbers a token; a rotary key
of qk_rope_head_dim numbers is shared by all heads. Source: DeepSeek-V2 (arXiv:2405.04434)
section 2.1, DeepSeek-V3 (arXiv:2412.19437) section 2.1.1.

Shapes: B batch, S queries, T keys, D hidden, H heads, N qk_nope, R qk_rope, U v head dim,
Q q_lora, C kv_lora.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from dsmoe import rope
from dsmoe.config import ModelConfig
from dsmoe.layers import normal, ones, rms_norm, zeros

LATENT_NORM_EPS = 1e-6  # whatever rms_norm_eps says, as in every released checkpoint's code


def causal_attention(q_BSHA, k_BSHA, v_BSHU, segments_BS, scale: float, chunk_tokens: int):
  """Softmax attention of each token to itself and earlier ones of its segment.

  Queries are taken `chunk_tokens` at a time against the keys up to the chunk's end, and
  each chunk's probabilities are recomputed for the gradient: memory stays linear in S and
  the upper triangle beyond the diagonal chunks costs nothing.

  Args:
    q_BSHA, k_BSHA: queries and keys; A = N + R.
    v_BSHU: values.
    segments_BS: int32 document number of each token, or None for one document a row.
    scale: factor on the logits.
    chunk_tokens: queries handled at once.

  Returns:
    [B, S, H, U] in v's dtype; logits and softmax are float32.
  """
  S = q_BSHA.shape[1]

  @functools.partial(jax.checkpoint, static_argnums=(4,))
  def attend(q_BsHA, k_BTHA, v_BTHU, segments, first):
    s, T = q_BsHA.shape[1], k_BTHA.shape[1]
    logits = jnp.einsum("bsha,btha->bhst", q_BsHA, k_BTHA, preferred_element_type=jnp.float32)
    visible = (first + jnp.arange(s))[:, None] >= jnp.arange(T)[None, :]
    visible = visible[None, None]
    if segments is not None:
      query_segments, key_segments = segments
      same = query_segments[:, :, None] == key_segments[:, None, :]
      visible = visible & same[:, None]
    probs = jax.nn.softmax(jnp.where(visible, logits * scale, -jnp.inf), axis=-1)
    return jnp.einsum("bhst,bthu->bshu", probs.astype(v_BTHU.dtype), v_BTHU)

  outs = []
  for first in range(0, S, chunk_tokens):
    end = min(first + chunk_tokens, S)
    segments = None if segments_BS is None else (segments_BS[:, first:end], segments_BS[:, :end])
    outs.append(attend(q_BSHA[:, first:end], k_BSHA[:, :end], v_BSHU[:, :end], segments, first))
  return jnp.concatenate(outs, axis=1)


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
    """Splits off the last R columns of a weight, as half-split rotation wants them."""
    kept, turned = jnp.split(w, [w.shape[-1] - self.config.qk_rope_head_dim], axis=-1)
    if self.config.rope_interleave:
      turned = rope.deinterleave(turned)
    return jnp.concatenate([kept, turned], axis=-1)

  def queries(self, x_BSD, cos_BSr, sin_BSr):
    """Returns rotated queries [B, S, H, N + R]."""
    if self.config.q_lora_rank is None:
      q_BSHA = jnp.einsum("bsd,dha->bsha", x_BSD, self._rope_columns(self.q_proj[...]))
    else:
      q_BSQ = x_BSD @ self.q_a_proj[...]
      if self.config.attention_bias:
        q_BSQ = q_BSQ + self.q_a_bias[...].astype(q_BSQ.dtype)[None, None]
      q_BSQ = rms_norm(q_BSQ, self.q_a_norm[...], LATENT_NORM_EPS)
      q_BSHA = jnp.einsum("bsq,qha->bsha", q_BSQ, self._rope_columns(self.q_b_proj[...]))
    q_BSHN, q_BSHR = jnp.split(q_BSHA, [self.config.qk_nope_head_dim], axis=-1)
    q_BSHR = rope.rotate(q_BSHR, cos_BSr[:, :, None], sin_BSr[:, :, None])
    return jnp.concatenate([q_BSHN, q_BSHR], axis=-1)

  def latents(self, x_BSD, cos_BSr, sin_BSr):
    """Returns the normalised latent [B, S, C] and the rotated shared key [B, S, R]."""
    kv = x_BSD @ self._rope_columns(self.kv_a_proj[...])
    if self.config.attention_bias:
      kv = kv + self._rope_columns(self.kv_a_bias[...]).astype(kv.dtype)[None, None]
    c_BSC, k_BSR = jnp.split(kv, [self.config.kv_lora_rank], axis=-1)
    c_BSC = rms_norm(c_BSC, self.kv_a_norm[...], LATENT_NORM_EPS)
    return c_BSC, rope.rotate(k_BSR, cos_BSr, sin_BSr)

  def __call__(self, x_BSD, cos_BSr, sin_BSr, segments_BS):
    """Attends within each row.

    Args:
      x_BSD: normalised hidden states.
      cos_BSr, sin_BSr: float32 [B, S, R / 2], from `rope.cos_sin`.
      segments_BS: int32, or None for one document a row.

    Returns:
      [B, S, D].
    """
    config = self.config
    q_BSHA = self.queries(x_BSD, cos_BSr, sin_BSr)
    c_BSC, k_BSR = self.latents(x_BSD, cos_BSr, sin_BSr)
    kv = jnp.einsum("bsc,che->bshe", c_BSC, self.kv_b_proj[...])
    k_BSHN, v_BSHU = jnp.split(kv, [config.qk_nope_head_dim], axis=-1)
    k_BSHR = jnp.broadcast_to(k_BSR[:, :, None], (*k_BSHN.shape[:3], config.qk_rope_head_dim))
    k_BSHA = jnp.concatenate([k_BSHN, k_BSHR], axis=-1)
    out_BSHU = causal_attention(
      q_BSHA, k_BSHA, v_BSHU, segments_BS, rope.softmax_scale(config), config.attention_chunk_tokens
    )
    out_BSD = jnp.einsum("bshu,hud->bsd", out_BSHU, self.o_proj[...])
    if config.attention_bias:
      out_BSD = out_BSD + self.o_bias[...].astype(out_BSD.dtype)[None, None]
    return out_BSD
