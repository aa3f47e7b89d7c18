"""Attention in plain XLA operations: causal attention in chunks, decoding in blocks of pages.

Shapes: B rows, S queries, T keys, H heads, A query and key dim, U value dim; of decoding S new
tokens, N pages of T tokens, W numbers a token, P pages of a row, C numbers of a value.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import varying
from pallas_kernels.mla_attention import cpu_blocks

BLOCK_TOKENS = 128  # of the cache, read at once

# Written out, chunks take no more than their triangle of products, but XLA keeps the logits of many
# at once and compiles each anew. Rows of more chunks than this loop over blocks of keys as well.
MAX_WRITTEN_OUT_CHUNKS = 4

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


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _attention(q_BSHA, k_BTHA, v_BTHU, segments_BT, starts_Y, scale: float, chunk_tokens: int):
  """See `causal_attention`."""
  return _attention_fwd(q_BSHA, k_BTHA, v_BTHU, segments_BT, starts_Y, scale, chunk_tokens)[0]


def causal_attention(
  q_BSHA, k_BTHA, v_BTHU, segments_BT, scale: float, chunk_tokens: int, starts_Y=None
):
  """Softmax attention of each token to itself and earlier ones of its segment.

  One row at a time, and of its queries `chunk_tokens` at a time against the keys up to the
  chunk's end, in a long row against as many keys at a time (`cpu_blocks`): memory is linear in T,
  and the triangle beyond the diagonal chunks costs nothing. The gradient recomputes each chunk's
  probabilities from the saved normaliser.

  Args:
    q_BSHA, k_BTHA: queries and keys; A = N + R.
    v_BTHU: values.
    segments_BT: int32 document number of each token, or None for one document a row.
    scale: factor on the logits.
    chunk_tokens: queries handled at once.
    starts_Y: as in `api.causal_attention`.

  Returns:
    [B, S, H, U] in v's dtype; logits and softmax are float32.

  Source: FlashAttention-2 (arXiv:2307.08691), algorithms 1 and 2.
  """
  return _attention(q_BSHA, k_BTHA, v_BTHU, segments_BT, starts_Y, scale, chunk_tokens)


def causal_attention_with_normaliser(q_BSHA, k_BSHA, v_BSHU, segments_BS, scale, chunk_tokens):
  """Also returns the log of each softmax's normaliser, float32 [B, H, S]; no gradient."""
  operands = (q_BSHA, k_BSHA, v_BSHU, segments_BS, None)
  out_BSHU, saved = _attention_fwd(*operands, scale, chunk_tokens)
  return out_BSHU, saved[-1]


def _heads_first(a):
  """[B, S, H, x] to [B, H, S, x], all rows at once: inside the loop over rows it is slower."""
  return jax.lax.optimization_barrier(a.swapaxes(1, 2))


def _block(S: int, starts_Y, chunk_tokens: int) -> int | None:
  """Returns the tokens of a block of `cpu_blocks`; None where the chunks are written out."""
  if starts_Y is not None:
    return min(chunk_tokens, S // starts_Y.shape[0])
  return chunk_tokens if S > MAX_WRITTEN_OUT_CHUNKS * chunk_tokens else None


def _attention_fwd(q_BSHA, k_BTHA, v_BTHU, segments_BT, starts_Y, scale, chunk_tokens):
  S, dtype = q_BSHA.shape[1], v_BTHU.dtype
  q_BHSA, k_BHTA, v_BHTU = (_heads_first(a) for a in (q_BSHA * scale, k_BTHA, v_BTHU))
  block = _block(S, starts_Y, chunk_tokens)

  def one_row(row):
    q_HSA, k_HTA, v_HTU, segments_S = row
    if block:
      return cpu_blocks.forward(q_HSA, k_HTA, v_HTU, segments_S, block, starts_Y)
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

  inputs = (q_BHSA, k_BHTA, v_BHTU, segments_BT)
  out_BHSU, log_z_BHS = jax.lax.map(one_row, inputs)
  return out_BHSU.swapaxes(1, 2), (starts_Y, *inputs, out_BHSU, log_z_BHS)


def _attention_bwd(scale, chunk_tokens, saved, dout_BSHU):
  S, dtype = dout_BSHU.shape[1], dout_BSHU.dtype
  f32 = jnp.float32
  starts_Y, *saved = saved
  block = _block(S, starts_Y, chunk_tokens)

  def one_row(row):
    q_HSA, k_HTA, v_HTU, segments_S, out_HSU, log_z_HS, dout_HSU = row
    # Sum over keys of p dp, the part of the softmax's gradient all logits of a row share.
    shared_HS1 = jnp.sum(dout_HSU.astype(f32) * out_HSU, axis=-1, keepdims=True)
    if block:
      operands = (q_HSA, k_HTA, v_HTU, segments_S, log_z_HS, dout_HSU, shared_HS1)
      return tuple(a.astype(dtype) for a in cpu_blocks.backward(*operands, block, starts_Y))
    q_HAS, k_HAT, v_HUT, dout_HUS = _swap(q_HSA, k_HTA, v_HTU, dout_HSU)
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
  return dq_BHSA.swapaxes(1, 2) * scale, dk_BTHA, dv_BTHU, None, None


_attention.defvjp(_attention_fwd, _attention_bwd)


class Running(NamedTuple):
  """A softmax over some keys so far, float32 [..., 1] and [..., U]."""

  top: Any  # the largest logit
  z: Any  # sum of exp(logit - top)
  acc: Any  # sum of exp(logit - top) times values


def attend_to_pages(
  running: Running, q_BGXA, expand: Callable, pages_NTW, table_BP, end_BX, scale: float
):
  """Continues a softmax over the cached tokens of each row, a block of pages at a time.

  The loop ends with the longest row: the cost follows the tokens present.

  Args:
    running: of queries [B, G, X]; G groups of X queries share keys.
    q_BGXA: queries, not scaled.
    expand: latents [B, t, W] of a block's tokens -> keys [B, G, t, A] and values [B, G, t, U].
    pages_NTW: the cache. What lies behind a row's last visible token is not read as a number.
    table_BP: int32, each row's pages in order.
    end_BX: int32, each query sees the row's tokens before this one.
    scale: factor on the logits.

  Returns:
    float32 [B, G, X, U]: the weighted mean of values; zeros where a query has seen nothing.
  """
  B, page_tokens = table_BP.shape[0], pages_NTW.shape[1]
  block_pages = max(1, BLOCK_TOKENS // page_tokens)
  block_tokens = block_pages * page_tokens
  table_BP = jnp.pad(table_BP, ((0, 0), (0, -table_BP.shape[1] % block_pages)))
  end_B = jnp.max(end_BX, axis=1)

  # A product of few queries is row-major if it is made transposed: decoding's attention, with 128 to
  # 1,024 tokens in the cache, is 1.1 to 1.2 times as fast on CPU.
  q_BGAX = _swap(q_BGXA) if q_BGXA.shape[2] < q_BGXA.shape[3] else None

  def products_with(keys_BGTA):
    if q_BGAX is None:
      return jnp.einsum("bgxa,bgta->bgxt", q_BGXA, keys_BGTA, preferred_element_type=f32)
    return _swap(jnp.matmul(keys_BGTA, q_BGAX, preferred_element_type=f32))

  def block(j, running: Running):
    page_Bp = jax.lax.dynamic_slice_in_dim(table_BP, j * block_pages, block_pages, axis=1)
    place_T = j * block_tokens + jnp.arange(block_tokens)
    # Behind a row's end may lie infinities, and no mask of logits keeps out 0 x NaN.
    own_BT1 = (place_T[None, :] < end_B[:, None])[..., None]
    latents_BTW = jnp.where(own_BT1, pages_NTW[page_Bp].reshape(B, block_tokens, -1), 0)
    keys_BGTA, values_BGTU = expand(latents_BTW)
    logits = products_with(keys_BGTA) * scale
    visible_BXT = place_T[None, None, :] < end_BX[:, :, None]
    logits = jnp.where(visible_BXT[:, None], logits, -jnp.inf)
    top = jnp.maximum(running.top, jnp.max(logits, axis=-1, keepdims=True))
    p, kept = jnp.exp(logits - top), jnp.exp(running.top - top)
    sums = jnp.matmul(p.astype(values_BGTU.dtype), values_BGTU, preferred_element_type=f32)
    z = running.z * kept + jnp.sum(p, axis=-1, keepdims=True)
    return Running(top, z, running.acc * kept + sums)

  operands = (q_BGXA, pages_NTW, table_BP, end_BX)
  running = varying.varying_like(running, running, *operands)
  num_blocks = (jnp.max(end_B) + block_tokens - 1) // block_tokens
  _, z, acc = jax.lax.fori_loop(0, num_blocks, block, running)
  return acc / jnp.where(z > 0, z, 1)


def decode_attention(q_BSHW, pages_NTW, table_BP, end_BS, scale: float, value_width: int):
  """See `api.decode_attention`."""
  B, S, H, W = q_BSHW.shape

  def as_they_are(latents_BTW):
    # All W numbers are summed and not the C of a value: cutting them off would copy the latents.
    return latents_BTW[:, None], latents_BTW[:, None]

  # -1e30 and not -inf, whose difference to itself is no number.
  start = [jnp.full((B, 1, S * H, n), fill, f32) for n, fill in ((1, -1e30), (1, 0), (W, 0))]
  out_B1XW = attend_to_pages(
    Running(*start),
    q_BSHW.reshape(B, 1, S * H, W),
    as_they_are,
    pages_NTW,
    table_BP,
    jnp.repeat(end_BS, H, axis=1),
    scale,
  )
  return out_B1XW.reshape(B, S, H, W)[..., :value_width].astype(q_BSHW.dtype)
