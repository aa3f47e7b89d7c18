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
from dsmoe.layers import normal, ones, project, rms_norm, zeros

LATENT_NORM_EPS = 1e-6  # whatever rms_norm_eps says, as in every released checkpoint's code


def _visible(segments_S, first: int, end: int):
  """Returns bool [s, T]: which of the keys 0..end each of the queries first..end may see."""
  visible_sT = jnp.arange(first, end)[:, None] >= jnp.arange(end)[None, :]
  if segments_S is not None:
    visible_sT &= segments_S[first:end, None] == segments_S[None, :end]
  # Made once for all heads, rather than inside the elementwise work on [H, s, T].
  return jax.lax.optimization_barrier(visible_sT)[None]


def _exp(logits_HsT, shift_Hs1, visible_1sT):
  """exp of shifted logits, 0 where hidden. Masked after the fact: exp(-inf) is slow on CPU."""
  return jnp.where(visible_1sT, jnp.exp(logits_HsT - shift_Hs1), 0)


def _swap(*arrays):
  """Swaps the last two dimensions of each array now, not inside the matmul that reads it.

  The products below are then all plain row-major ones, with the large [s, T] operand never
  transposed: two to four times faster on CPU.
  """
  swapped = jax.lax.optimization_barrier([a.swapaxes(-1, -2) for a in arrays])
  return swapped if len(swapped) > 1 else swapped[0]


def _chunks(S: int, chunk_tokens: int):
  return [(first, min(first + chunk_tokens, S)) for first in range(0, S, chunk_tokens)]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def causal_attention(q_BSHA, k_BSHA, v_BSHU, segments_BS, scale: float, chunk_tokens: int):
  """Softmax attention of each token to itself and earlier ones of its segment.

  One row at a time, and of its queries `chunk_tokens` at a time against the keys up to the
  chunk's end: memory is linear in S, and the triangle beyond the diagonal chunks costs
  nothing. The gradient recomputes each chunk's probabilities from the saved normaliser.

  Args:
    q_BSHA, k_BSHA: queries and keys; A = N + R.
    v_BSHU: values.
    segments_BS: int32 document number of each token, or None for one document a row.
    scale: factor on the logits.
    chunk_tokens: queries handled at once.

  Returns:
    [B, S, H, U] in v's dtype; logits and softmax are float32.

  Source: FlashAttention-2 (arXiv:2307.08691), algorithms 1 and 2.
  """
  return _attention_fwd(q_BSHA, k_BSHA, v_BSHU, segments_BS, scale, chunk_tokens)[0]


def causal_attention_with_normaliser(q_BSHA, k_BSHA, v_BSHU, segments_BS, scale, chunk_tokens):
  """`causal_attention`, and the log of each softmax's normaliser, float32 [B, H, S]; no gradient."""
  out_BSHU, saved = _attention_fwd(q_BSHA, k_BSHA, v_BSHU, segments_BS, scale, chunk_tokens)
  return out_BSHU, saved[-1]


def _heads_first(a):
  """[B, S, H, x] to [B, H, S, x], all rows at once: inside the loop over rows it is slower."""
  return jax.lax.optimization_barrier(a.swapaxes(1, 2))


def _attention_fwd(q_BSHA, k_BSHA, v_BSHU, segments_BS, scale, chunk_tokens):
  S, dtype = q_BSHA.shape[1], v_BSHU.dtype
  q_BHSA, k_BHTA, v_BHTU = (_heads_first(a) for a in (q_BSHA * scale, k_BSHA, v_BSHU))

  def one_row(row):
    q_HSA, k_HTA, v_HTU, segments_S = row
    k_HAT = _swap(k_HTA)
    outs, log_z = [], []
    for first, end in _chunks(S, chunk_tokens):
      visible = _visible(segments_S, first, end)
      logits_HsT = jnp.matmul(
        q_HSA[:, first:end], k_HAT[..., :end], preferred_element_type=jnp.float32
      )
      top_Hs1 = jnp.max(logits_HsT, axis=-1, keepdims=True, initial=-jnp.inf, where=visible)
      exp_HsT = _exp(logits_HsT, top_Hs1, visible)
      z_Hs1 = jnp.sum(exp_HsT, axis=-1, keepdims=True)
      out_HsU = jnp.matmul(
        exp_HsT.astype(dtype), v_HTU[:, :end], preferred_element_type=jnp.float32
      )
      outs.append((out_HsU / z_Hs1).astype(dtype))
      log_z.append((top_Hs1 + jnp.log(z_Hs1))[..., 0])
    return jnp.concatenate(outs, axis=1), jnp.concatenate(log_z, axis=1)

  inputs = (q_BHSA, k_BHTA, v_BHTU, segments_BS)
  out_BHSU, log_z_BHS = jax.lax.map(one_row, inputs)
  return out_BHSU.swapaxes(1, 2), (*inputs, out_BHSU, log_z_BHS)


def _attention_bwd(scale, chunk_tokens, saved, dout_BSHU):
  S, dtype = dout_BSHU.shape[1], dout_BSHU.dtype
  f32 = jnp.float32

  def one_row(row):
    q_HSA, k_HTA, v_HTU, segments_S, out_HSU, log_z_HS, dout_HSU = row
    q_HAS, k_HAT, v_HUT, dout_HUS = _swap(q_HSA, k_HTA, v_HTU, dout_HSU)
    # Sum over keys of p dp, the part of the softmax's gradient all logits of a row share.
    shared_HS1 = jnp.sum(dout_HSU.astype(f32) * out_HSU, axis=-1, keepdims=True)
    dq = []
    dk_HAT, dv_HUT = jnp.zeros_like(k_HAT, f32), jnp.zeros_like(v_HUT, f32)
    for first, end in _chunks(S, chunk_tokens):
      logits_HsT = jnp.matmul(q_HSA[:, first:end], k_HAT[..., :end], preferred_element_type=f32)
      p_HsT = _exp(logits_HsT, log_z_HS[:, first:end, None], _visible(segments_S, first, end))
      dv = jnp.matmul(dout_HUS[..., first:end], p_HsT.astype(dtype), preferred_element_type=f32)
      dp_HsT = jnp.matmul(dout_HSU[:, first:end], v_HUT[..., :end], preferred_element_type=f32)
      dlogits_HsT = (p_HsT * (dp_HsT - shared_HS1[:, first:end])).astype(dtype)
      dq.append(jnp.matmul(dlogits_HsT, k_HTA[:, :end], preferred_element_type=f32))
      dk = jnp.matmul(q_HAS[..., first:end], dlogits_HsT, preferred_element_type=f32)
      dk_HAT = dk_HAT.at[..., :end].add(dk)
      dv_HUT = dv_HUT.at[..., :end].add(dv)
    dq_HSA = jnp.concatenate(dq, axis=1)
    return dq_HSA.astype(dtype), dk_HAT.astype(dtype), dv_HUT.astype(dtype)

  gradients = jax.lax.map(one_row, (*saved, _heads_first(dout_BSHU)))
  dq_BHSA, dk_BHAT, dv_BHUT = jax.lax.optimization_barrier(gradients)
  dk_BTHA, dv_BTHU = (a.transpose(0, 3, 1, 2) for a in (dk_BHAT, dv_BHUT))
  return dq_BHSA.swapaxes(1, 2) * scale, dk_BTHA, dv_BTHU, None


causal_attention.defvjp(_attention_fwd, _attention_bwd)


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
      q_BSHA = project(x_BSD, self._rope_columns(self.q_proj[...]))
    else:
      q_BSQ = project(x_BSD, self.q_a_proj[...])
      if self.config.attention_bias:
        q_BSQ = q_BSQ + self.q_a_bias[...].astype(q_BSQ.dtype)[None, None]
      q_BSQ = rms_norm(q_BSQ, self.q_a_norm[...], LATENT_NORM_EPS)
      q_BSHA = project(q_BSQ, self._rope_columns(self.q_b_proj[...]))
    q_BSHN, q_BSHR = jnp.split(q_BSHA, [self.config.qk_nope_head_dim], axis=-1)
    q_BSHR = rope.rotate(q_BSHR, cos_BSr[:, :, None], sin_BSr[:, :, None])
    return jnp.concatenate([q_BSHN, q_BSHR], axis=-1)

  def latents(self, x_BSD, cos_BSr, sin_BSr):
    """Returns the normalised latent [B, S, C] and the rotated shared key [B, S, R]."""
    kv = project(x_BSD, self._rope_columns(self.kv_a_proj[...]))
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
    kv = project(c_BSC, self.kv_b_proj[...])
    k_BSHN, v_BSHU = jnp.split(kv, [config.qk_nope_head_dim], axis=-1)
    k_BSHR = jnp.broadcast_to(k_BSR[:, :, None], (*k_BSHN.shape[:3], config.qk_rope_head_dim))
    k_BSHA = jnp.concatenate([k_BSHN, k_BSHR], axis=-1)
    out_BSHU = causal_attention(
      q_BSHA, k_BSHA, v_BSHU, segments_BS, rope.softmax_scale(config), config.attention_chunk_tokens
    )
    return self.output(out_BSHU)

  def output(self, out_BSHU):
    """Joins the heads' outputs to [B, S, D]."""
    B, S, H, U = out_BSHU.shape
    out_BSD = project(out_BSHU.reshape(B, S, H * U), self.o_proj[...].reshape(H * U, -1))
    if self.config.attention_bias:
      out_BSD = out_BSD + self.o_bias[...].astype(out_BSD.dtype)[None, None]
    return out_BSD
