"""Causal attention of one long row in plain XLA operations: loops over blocks of queries and keys.

What `cpu.py` does for rows of many chunks. The program holds one block of logits however long the
row is, and it does not grow with the row.

Shapes: n blocks of s tokens, H heads, A query and key dim, U value dim.

Source: FlashAttention-2 (arXiv:2307.08691), algorithms 1 and 2.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels import varying

f32 = jnp.float32

# Below every logit, and unlike -inf its difference to itself is a number.
NOTHING_SEEN = -1e30


def _blocks(a_HSx, block: int):
  """Pads a row's tokens with zeros to whole blocks: [H, S, x] to [n, H, s, x]."""
  H, S, x = a_HSx.shape
  a_HSx = jnp.pad(a_HSx, ((0, 0), (0, -S % block), (0, 0)))
  return a_HSx.reshape(H, -1, block, x).swapaxes(0, 1)


def _tokens(a_nHsx, S: int):
  """Undoes `_blocks`: [n, H, s, x] to [H, S, x]."""
  n, H, s, x = a_nHsx.shape
  return a_nHsx.swapaxes(0, 1).reshape(H, n * s, x)[:, :S]


def _visibility(segments_S, block: int) -> Callable:
  """Returns (i, j) -> bool [1, s, s]: which keys of block j the queries of block i may see."""
  place_s = jnp.arange(block)
  if segments_S is not None:
    segments_ns = jnp.pad(segments_S, (0, -segments_S.shape[0] % block)).reshape(-1, block)

  def visible(i, j):
    seen_ss = (i * block + place_s)[:, None] >= (j * block + place_s)[None, :]
    if segments_S is not None:
      seen_ss &= segments_ns[i][:, None] == segments_ns[j][None, :]
    return seen_ss[None]

  return visible


def forward(q_HSA, k_HSA, v_HSU, segments_S, block: int):
  """Attends within one row; queries are already scaled.

  Args:
    q_HSA, k_HSA, v_HSU: queries, keys, values.
    segments_S: int32 document number of each token, or None for one document.
    block: tokens of a block.

  Returns:
    Outputs [H, S, U] in v's dtype, and the log of each softmax's normaliser, float32 [H, S].
  """
  H, S, U = v_HSU.shape
  q_nHsA, v_nHsU = _blocks(q_HSA, block), _blocks(v_HSU, block)
  k_nHAs = jax.lax.optimization_barrier(_blocks(k_HSA, block).swapaxes(2, 3))
  visible = _visibility(segments_S, block)

  def attend(i):
    q_HsA = q_nHsA[i]

    def add_keys(j, softmax):
      top_Hs1, z_Hs1, sum_HsU = softmax
      logits_Hst = jnp.matmul(q_HsA, k_nHAs[j], preferred_element_type=f32)
      seen = visible(i, j)
      new_top = jnp.max(logits_Hst, axis=-1, keepdims=True, initial=NOTHING_SEEN, where=seen)
      new_top = jnp.maximum(top_Hs1, new_top)
      p_Hst, kept = jnp.where(seen, jnp.exp(logits_Hst - new_top), 0), jnp.exp(top_Hs1 - new_top)
      values_HsU = jnp.matmul(p_Hst.astype(v_HSU.dtype), v_nHsU[j], preferred_element_type=f32)
      z_Hs1 = z_Hs1 * kept + jnp.sum(p_Hst, axis=-1, keepdims=True)
      return new_top, z_Hs1, sum_HsU * kept + values_HsU

    fills = ((1, NOTHING_SEEN), (1, 0), (U, 0))
    start = tuple(jnp.full((H, block, x), fill, f32) for x, fill in fills)
    start = varying.varying_like(start, q_HSA, k_HSA, v_HSU, segments_S)
    top_Hs1, z_Hs1, sum_HsU = jax.lax.fori_loop(0, i + 1, add_keys, start)
    return (sum_HsU / z_Hs1).astype(v_HSU.dtype), top_Hs1 + jnp.log(z_Hs1)

  out_nHsU, log_z_nHs1 = jax.lax.map(attend, jnp.arange(q_nHsA.shape[0]))
  return _tokens(out_nHsU, S), _tokens(log_z_nHs1, S)[..., 0]


def backward(q_HSA, k_HSA, v_HSU, segments_S, log_z_HS, dout_HSU, shared_HS1, block: int):
  """Returns the gradients of `forward`'s outputs in one row.

  Args:
    q_HSA, k_HSA, v_HSU, segments_S, block: as in `forward`.
    log_z_HS: its second result.
    dout_HSU: the gradient of its first.
    shared_HS1: float32, each query's sum over U of dout times out.

  Returns:
    float32 dq [H, S, A], dk [H, A, S] and dv [H, U, S].
  """
  S, dtype = q_HSA.shape[1], v_HSU.dtype
  q_nHsA, k_nHsA, v_nHsU = (_blocks(a, block) for a in (q_HSA, k_HSA, v_HSU))
  dout_nHsU, shared_nHs1 = _blocks(dout_HSU, block), _blocks(shared_HS1, block)
  log_z_nHs1 = _blocks(log_z_HS[..., None], block)
  transposed = (a.swapaxes(2, 3) for a in (q_nHsA, k_nHsA, v_nHsU, dout_nHsU))
  q_nHAs, k_nHAs, v_nHUs, dout_nHUs = jax.lax.optimization_barrier(tuple(transposed))
  visible = _visibility(segments_S, block)

  def add_queries(sums, i):
    def add_keys(j, sums):
      dq_HsA, dk_nHAs, dv_nHUs = sums
      logits_Hst = jnp.matmul(q_nHsA[i], k_nHAs[j], preferred_element_type=f32)
      p_Hst = jnp.where(visible(i, j), jnp.exp(logits_Hst - log_z_nHs1[i]), 0)
      dv_HUt = jnp.matmul(dout_nHUs[i], p_Hst.astype(dtype), preferred_element_type=f32)
      dp_Hst = jnp.matmul(dout_nHsU[i], v_nHUs[j], preferred_element_type=f32)
      dlogits_Hst = (p_Hst * (dp_Hst - shared_nHs1[i])).astype(dtype)
      dk_HAt = jnp.matmul(q_nHAs[i], dlogits_Hst, preferred_element_type=f32)
      dq_HsA += jnp.matmul(dlogits_Hst, k_nHsA[j], preferred_element_type=f32)
      return dq_HsA, dk_nHAs.at[j].add(dk_HAt), dv_nHUs.at[j].add(dv_HUt)

    start = varying.varying_like(jnp.zeros(q_nHsA.shape[1:], f32), sums)
    dq_HsA, *sums = jax.lax.fori_loop(0, i + 1, add_keys, (start, *sums))
    return tuple(sums), dq_HsA

  zeros = (jnp.zeros(k_nHAs.shape, f32), jnp.zeros(v_nHUs.shape, f32))
  zeros = varying.varying_like(zeros, q_HSA, k_HSA, v_HSU, segments_S, dout_HSU)
  (dk_nHAs, dv_nHUs), dq_nHsA = jax.lax.scan(add_queries, zeros, jnp.arange(q_nHsA.shape[0]))
  dk_HSA, dv_HSU = (_tokens(a.swapaxes(2, 3), S) for a in (dk_nHAs, dv_nHUs))
  return _tokens(dq_nHsA, S), dk_HSA.swapaxes(1, 2), dv_HSU.swapaxes(1, 2)
