"""Attention in plain XLA operations: causal attention in chunks, decoding in blocks of pages.

Shapes: B rows, S queries, T keys, H heads, A query and key dim, U value dim; of decoding S new
tokens, N pages of T tokens, W numbers a token, P pages of a row, C numbers of a value.
"""

import functools

import jax
import jax.numpy as jnp

BLOCK_TOKENS = 128  # of the cache, read at once

f32 = jnp.float32


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


def decode_attention(q_BSHW, pages_NTW, table_BP, end_BS, scale: float, value_width: int):
  """See `api.decode_attention`. The loop over blocks of pages ends with the longest row."""
  B, S, H, W = q_BSHW.shape
  page_tokens = pages_NTW.shape[1]
  block_pages = max(1, BLOCK_TOKENS // page_tokens)
  block_tokens = block_pages * page_tokens
  table_BP = jnp.pad(table_BP, ((0, 0), (0, -table_BP.shape[1] % block_pages)))
  q_BXW, end_BX = q_BSHW.reshape(B, S * H, W), jnp.repeat(end_BS, H, axis=1)
  end_B = jnp.max(end_BS, axis=1)

  def block(j, carry):
    top, z, acc = carry
    page_Bp = jax.lax.dynamic_slice_in_dim(table_BP, j * block_pages, block_pages, axis=1)
    place_T = j * block_tokens + jnp.arange(block_tokens)
    # Behind a row's end may lie anything, and no mask of logits keeps out 0 x NaN.
    own_BT1 = (place_T[None, :] < end_B[:, None])[..., None]
    latents_BTW = jnp.where(own_BT1, pages_NTW[page_Bp].reshape(B, block_tokens, W), 0)
    logits = jnp.einsum("bxw,btw->bxt", q_BXW, latents_BTW, preferred_element_type=f32) * scale
    visible = place_T[None, None, :] < end_BX[:, :, None]
    logits = jnp.where(visible, logits, -jnp.inf)
    new_top = jnp.maximum(top, jnp.max(logits, axis=-1, keepdims=True))
    p, kept = jnp.exp(logits - new_top), jnp.exp(top - new_top)
    # All W numbers are summed and not the C of a value: cutting them off would copy the latents.
    values = jnp.einsum(
      "bxt,btw->bxw", p.astype(q_BXW.dtype), latents_BTW, preferred_element_type=f32
    )
    return new_top, z * kept + jnp.sum(p, axis=-1, keepdims=True), acc * kept + values

  operands = (q_BSHW, pages_NTW, table_BP, end_BS)
  axes = frozenset().union(*(jax.typeof(a).manual_axis_type.varying for a in operands))
  # -1e30 and not -inf, whose difference to itself is no number.
  carry = [jnp.full((B, S * H, n), fill, f32) for n, fill in ((1, -1e30), (1, 0), (W, 0))]
  carry = jax.lax.pcast(tuple(carry), tuple(axes), to="varying")
  num_blocks = (jnp.max(end_B) + block_tokens - 1) // block_tokens
  _, z, acc = jax.lax.fori_loop(0, num_blocks, block, carry)
  out_BXC = acc[..., :value_width] / jnp.where(z > 0, z, 1)
  return out_BXC.reshape(B, S, H, value_width).astype(q_BSHW.dtype)
