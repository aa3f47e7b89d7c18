"""Attention on the latent cache, in two forms, a block of pages at a time.

`expanded` makes keys and values from the latents, for many new tokens. `in_latent_space` folds
that expansion into queries and outputs (absorbed form) and reads the latents alone, once for
all heads, for one or a few. The loop over blocks ends with the longest row: cost follows the
tokens present, not the most a row may hold.

Shapes: B rows, S new tokens of a row, T tokens of a block, H heads, N qk_nope, R qk_rope,
A = N + R, C kv_lora, W = C + R, U v head dim, P pages of a row; G groups of queries that share
keys, X queries of each.
Source: DeepSeek-V2 (arXiv:2405.04434) section 2.1.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dsmoe.config import ModelConfig
from dsmoe.inference import cache
from dsmoe.model import rope
from dsmoe.model.layers import project
from pallas_kernels.mla_attention import causal_attention_with_normaliser, decode_attention

f32 = jnp.float32


class Absorbed(NamedTuple):
  """kv_b_proj as the absorbed form wants it."""

  k_HNC: jax.Array
  v_HCU: jax.Array


def absorbed(config: ModelConfig, kv_b_CHX) -> Absorbed:
  """Splits and transposes kv_b_proj [C, H, N + U], once."""
  k_CHN, v_CHU = jnp.split(kv_b_CHX, [config.qk_nope_head_dim], axis=-1)
  return Absorbed(k_CHN.transpose(1, 2, 0), v_CHU.transpose(1, 0, 2))


class Place(NamedTuple):
  """Where the new tokens of a batch of rows stand."""

  table_BP: Any  # int32, each row's pages
  first_B: Any  # int32, tokens before the new ones
  count_B: Any  # int32, new tokens that are real

  def position_BS(self, S: int):
    return self.first_B[:, None] + jnp.arange(S)[None, :]

  def real_BS(self, S: int):
    return jnp.arange(S)[None, :] < self.count_B[:, None]


def _attend_to_cache(carry, q_BGXA, expand, pages_NTW, table_BP, end_BX, num_tokens):
  """Goes on with a softmax over the cached tokens, a block of pages at a time.

  Args:
    carry: (largest logit [B, G, X, 1], sum of exp, weighted sum of values) so far, float32.
    q_BGXA: scaled queries, X of each of G groups that share keys.
    expand: turns latents [B, T, W] into keys [B, G, T, A] and values [B, G, T, U].
    end_BX: int32, each query sees the row's tokens before this one.
    num_tokens: int32 scalar, the longest row's.

  Returns:
    [B, G, X, U] float32.
  """
  block_tokens = cache.BLOCK_PAGES * cache.PAGE_TOKENS

  def block(j, carry):
    top, z, acc = carry
    keys_BGTA, values_BGTU = expand(cache.read(pages_NTW, table_BP, j))
    logits = jnp.einsum("bgxa,bgta->bgxt", q_BGXA, keys_BGTA, preferred_element_type=f32)
    place_T = j * block_tokens + jnp.arange(block_tokens)
    visible_BXT = place_T[None, None, :] < end_BX[:, :, None]
    logits = jnp.where(visible_BXT[:, None], logits, -jnp.inf)
    new_top = jnp.maximum(top, jnp.max(logits, axis=-1, keepdims=True))
    p, kept = jnp.exp(logits - new_top), jnp.exp(top - new_top)
    values = jnp.einsum(
      "bgxt,bgtu->bgxu", p.astype(values_BGTU.dtype), values_BGTU, preferred_element_type=f32
    )
    return new_top, z * kept + jnp.sum(p, axis=-1, keepdims=True), acc * kept + values

  num_blocks = (num_tokens + block_tokens - 1) // block_tokens
  _, z, acc = jax.lax.fori_loop(0, num_blocks, block, carry)
  return acc / z


def expanded(mla, weights: Absorbed, q_BSHA, new_BSW, pages_NTW, place: Place):
  """Attention with keys and values expanded from the latents: for many new tokens."""
  config = mla.config
  C, scale = config.kv_lora_rank, rope.softmax_scale(config)
  W = C + config.qk_rope_head_dim

  def expand(latents_BTW):
    kv_BTHX = project(latents_BTW[..., :C], mla.kv_b_proj[...], config)
    k_BTHN, v_BTHU = jnp.split(kv_BTHX, [config.qk_nope_head_dim], axis=-1)
    shared = jnp.broadcast_to(
      latents_BTW[:, :, None, C:W], (*k_BTHN.shape[:3], config.qk_rope_head_dim)
    )
    return jnp.concatenate([k_BTHN, shared], axis=-1), v_BTHU

  k_BSHA, v_BSHU = expand(new_BSW)
  out_BSHU, log_z_BHS = causal_attention_with_normaliser(
    q_BSHA, k_BSHA, v_BSHU, None, scale, config.attention_chunk_tokens
  )
  top = log_z_BHS[..., None]
  carry = (top, jnp.ones_like(top), out_BSHU.swapaxes(1, 2).astype(f32))
  out_BHSU = _attend_to_cache(
    carry,
    (q_BSHA * scale).swapaxes(1, 2),
    lambda latents_BTW: tuple(a.swapaxes(1, 2) for a in expand(latents_BTW)),
    *(pages_NTW, place.table_BP, place.first_B[:, None], jnp.max(place.first_B)),
  )
  return out_BHSU.swapaxes(1, 2)


def _by_head(x_BSHX, w_HXY):
  """Multiplies each head's numbers by its own matrix: [B, S, H, X] x [H, X, Y] -> [B, S, H, Y].

  As one batched matmul, heads first: on CPU four times faster than an einsum of a few tokens.
  """
  B, S, H, X = x_BSHX.shape
  x_HMX = x_BSHX.reshape(B * S, H, X).swapaxes(0, 1)
  return jnp.matmul(x_HMX, w_HXY).swapaxes(0, 1).reshape(B, S, H, -1)


def in_latent_space(mla, weights: Absorbed, q_BSHA, new_BSW, pages_NTW, place: Place):
  """Attention to the latents themselves, all heads at once: for one or a few new tokens."""
  config = mla.config
  C, N = config.kv_lora_rank, config.qk_nope_head_dim
  B, S, H, _ = q_BSHA.shape
  W = pages_NTW.shape[-1]
  q_BSHC = _by_head(q_BSHA[..., :N], weights.k_HNC)
  q_BSHW = jnp.concatenate([q_BSHC, q_BSHA[..., N:]], axis=-1)
  q_BSHW = jnp.pad(q_BSHW, ((0, 0), (0, 0), (0, 0), (0, W - q_BSHW.shape[3])))
  end_BS, scale = place.position_BS(S) + 1, rope.softmax_scale(config)
  implementation = config.kernels.decode_attention
  if implementation is not None or jax.default_backend() != "cpu":
    args = (q_BSHW, pages_NTW, place.table_BP, end_BS, scale, C, implementation)
    return _by_head(decode_attention(*args), weights.v_HCU)

  def as_they_are(latents_BTW):
    # The rotated key is carried along in the values: cutting it off would copy the latents.
    return latents_BTW[:, None], latents_BTW[:, None]

  # -1e30 and not -inf, whose difference to itself is no number.
  carry = [
    jnp.full((B, 1, S * H, width), fill, f32) for width, fill in ((1, -1e30), (1, 0), (W, 0))
  ]
  end_BX = jnp.repeat(end_BS, H, axis=1)
  out = _attend_to_cache(
    tuple(carry),
    (q_BSHW * scale).reshape(B, 1, S * H, -1),
    as_they_are,
    *(pages_NTW, place.table_BP, end_BX, jnp.max(place.first_B) + S),
  )
  out_BSHC = out.reshape(B, S, H, W)[..., :C].astype(q_BSHA.dtype)
  return _by_head(out_BSHC, weights.v_HCU)
