"""The reference for attention: all logits at once, masked, one softmax.

Shapes: see `api`.
"""

import jax
import jax.numpy as jnp


def _softmax(logits, visible):
  """Over the last axis, of what is visible; all zeros where nothing is."""
  logits = jnp.where(visible, logits, -1e30)
  exp = jnp.where(visible, jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True)), 0)
  z = jnp.sum(exp, axis=-1, keepdims=True)
  return exp / jnp.where(z > 0, z, 1)


def _logits(q_BSHA, k_BTHA, segments_BT, scale: float, starts_Y=None):
  """Returns all logits, float32 [B, H, S, T], and which are visible, bool."""
  place_S = place_T = jnp.arange(k_BTHA.shape[1])
  if starts_Y is not None:
    run = jnp.arange(q_BSHA.shape[1] // starts_Y.shape[0])
    place_S = (starts_Y[:, None] + run[None, :]).reshape(-1)
  visible_BST = (place_S[:, None] >= place_T[None, :])[None]
  if segments_BT is not None:
    visible_BST = visible_BST & (segments_BT[:, place_S, None] == segments_BT[:, None, :])
  logits_BHST = jnp.einsum("bsha,btha->bhst", q_BSHA, k_BTHA, preferred_element_type=jnp.float32)
  return logits_BHST * scale, visible_BST[:, None]


def causal_attention(q_BSHA, k_BTHA, v_BTHU, segments_BT, scale: float, starts_Y=None):
  """See `api.causal_attention`. Holds [B, H, S, T]."""
  p_BHST = _softmax(*_logits(q_BSHA, k_BTHA, segments_BT, scale, starts_Y))
  return jnp.einsum("bhst,bthu->bshu", p_BHST.astype(v_BTHU.dtype), v_BTHU)


def causal_attention_with_normaliser(q_BSHA, k_BSHA, v_BSHU, segments_BS, scale: float):
  """Also returns the log of each softmax's normaliser, float32 [B, H, S]."""
  logits_BHST, visible_BHST = _logits(q_BSHA, k_BSHA, segments_BS, scale)
  log_z_BHS = jax.nn.logsumexp(jnp.where(visible_BHST, logits_BHST, -jnp.inf), axis=-1)
  return causal_attention(q_BSHA, k_BSHA, v_BSHU, segments_BS, scale), log_z_BHS


def decode_attention(q_BSHW, pages_NTW, table_BP, end_BS, scale: float, value_width: int):
  """See `api.decode_attention`. Reads every page of the table."""
  B = table_BP.shape[0]
  latents_BTW = pages_NTW[table_BP].reshape(B, -1, pages_NTW.shape[2])
  visible_BST = jnp.arange(latents_BTW.shape[1])[None, None, :] < end_BS[:, :, None]
  own_BT = jnp.any(visible_BST, axis=1)
  latents_BTW = jnp.where(own_BT[..., None], latents_BTW, 0)  # 0 x NaN is NaN
  logits_BSHT = jnp.einsum(
    "bshw,btw->bsht", q_BSHW, latents_BTW, preferred_element_type=jnp.float32
  )
  p_BSHT = _softmax(logits_BSHT * scale, visible_BST[:, :, None]).astype(q_BSHW.dtype)
  return jnp.einsum("bsht,btc->bshc", p_BSHT, latents_BTW[..., :value_width])
