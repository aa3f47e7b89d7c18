"""Attention on the latent cache, as a block's `attend`, in two forms.

`expanded` makes keys and values from the latents, for many new tokens. `in_latent_space` folds
that expansion into queries and outputs (absorbed form) and reads the latents alone, once for
all heads, for one or a few.

Shapes: B rows, S new tokens of a row, H heads, N qk_nope, R qk_rope, A = N + R, C kv_lora,
W = C + R (more where the cache is padded), U v head dim, P pages of a row.
Source: DeepSeek-V2 (arXiv:2405.04434) section 2.1.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dsmoe.config import ModelConfig
from dsmoe.inference import cache
from dsmoe.model import rope
from pallas_kernels.mla_attention import decode_attention, prefill_attention


class Absorbed(NamedTuple):
  """kv_b_proj in two parts, transposed for the absorbed form."""

  k_HNC: jax.Array
  v_HCU: jax.Array


def absorb(config: ModelConfig, kv_b_CHX) -> Absorbed:
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


def _store(pages_NTW, c_BSC, k_BSR, place: Place):
  """Returns the pages with the new tokens, which are stored before anything is read.

  The order is then plain to the compiler, and no copy of the cache is made.
  """
  return cache.write(pages_NTW, jnp.concatenate([c_BSC, k_BSR], axis=-1), *place)


def expanded(absorbed: Absorbed, pages_NTW, place: Place) -> Callable:
  """Returns the `attend` of taking in a prompt; beside its output it returns the new pages."""

  def attend(mla, q_BSHA, c_BSC, k_BSR):
    config = mla.config
    C, R = config.kv_lora_rank, config.qk_rope_head_dim
    pages = _store(pages_NTW, c_BSC, k_BSR, place)
    k_BSHA, v_BSHU = mla.expand(c_BSC, k_BSR)
    out_BSHU = prefill_attention(
      q_BSHA,
      k_BSHA,
      v_BSHU,
      lambda latents_BTW: mla.expand(latents_BTW[..., :C], latents_BTW[..., C : C + R]),
      pages,
      place.table_BP,
      place.first_B,
      rope.softmax_scale(config),
      config.kernels.attention,
      config.attention_chunk_tokens,
    )
    return out_BSHU, pages

  return attend


def _by_head(x_BSHX, w_HXY):
  """Multiplies each head's numbers by its own matrix: [B, S, H, X] x [H, X, Y] -> [B, S, H, Y].

  As one batched matmul, heads first: on CPU four times faster than an einsum of a few tokens.
  """
  B, S, H, X = x_BSHX.shape
  x_HMX = x_BSHX.reshape(B * S, H, X).swapaxes(0, 1)
  return jnp.matmul(x_HMX, w_HXY).swapaxes(0, 1).reshape(B, S, H, -1)


def in_latent_space(absorbed: Absorbed, pages_NTW, place: Place) -> Callable:
  """Returns the `attend` of decoding; beside its output it returns the new pages."""

  def attend(mla, q_BSHA, c_BSC, k_BSR):
    config = mla.config
    C, N = config.kv_lora_rank, config.qk_nope_head_dim
    S, W = q_BSHA.shape[1], pages_NTW.shape[-1]
    pages = _store(pages_NTW, c_BSC, k_BSR, place)
    q_BSHC = _by_head(q_BSHA[..., :N], absorbed.k_HNC)
    q_BSHW = jnp.concatenate([q_BSHC, q_BSHA[..., N:]], axis=-1)
    q_BSHW = jnp.pad(q_BSHW, ((0, 0), (0, 0), (0, 0), (0, W - q_BSHW.shape[3])))
    out_BSHC = decode_attention(
      q_BSHW,
      pages,
      place.table_BP,
      place.position_BS(S) + 1,
      rope.softmax_scale(config),
      C,
      config.kernels.decode_attention,
    )
    return _by_head(out_BSHC, absorbed.v_HCU), pages

  return attend
