"""Causal attention of one long row in plain XLA operations: loops over blocks of queries and keys.

What `cpu.py` does for rows of many chunks, and for queries that are only some of a row's tokens. The
program holds one block of logits however long the row is, and it does not grow with the row.

Shapes: S queries, T keys, n blocks of s tokens, Y runs of queries, H heads, A query and key dim, U
value dim.

Source: FlashAttention-2 (arXiv:2307.08691), algorithms 1 and 2.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels import varying

f32 = jnp.float32

# Below every logit, and unlike -inf its difference to itself is a number.
NOTHING_SEEN = -1e30


def _blocks(a_HSx, block: int, runs: int = 1):
  """Pads each run of tokens with zeros to whole blocks: [H, S, x] to [n, H, s, x]."""
  H, S, x = a_HSx.shape
  a_HYSx = a_HSx.reshape(H, runs, S // runs, x)
  a_HYSx = jnp.pad(a_HYSx, ((0, 0), (0, 0), (0, -(S // runs) % block), (0, 0)))
  return a_HYSx.reshape(H, -1, block, x).swapaxes(0, 1)


def _tokens(a_nHsx, S: int, runs: int = 1):
  """Undoes `_blocks`: [n, H, s, x] to [H, S, x]."""
  n, H, s, x = a_nHsx.shape
  a_HYSx = a_nHsx.swapaxes(0, 1).reshape(H, runs, n // runs * s, x)
  return a_HYSx[:, :, : S // runs].reshape(H, S, x)


def _places(starts_Y, S: int, block: int):
  """Returns the place in the row of each block of queries' first one, int32 [n]."""
  if starts_Y is None:
    return jnp.arange(0, S, block, dtype=jnp.int32)
  within = jnp.arange(0, S // starts_Y.shape[0], block, dtype=jnp.int32)
  return (starts_Y[:, None] + within[None, :]).reshape(-1)


def _visibility(segments_T, block: int) -> Callable:
  """Returns (place, j) -> bool [1, s, s]: which keys of block j the queries from a place on see."""
  offset_s = jnp.arange(block)
  if segments_T is not None:
    # A run's last block of queries may reach beyond the row by less than a block.
    segments_T = jnp.pad(segments_T, (0, -segments_T.shape[0] % block + block))

  def visible(place, j):
    seen_ss = (place + offset_s)[:, None] >= (j * block + offset_s)[None, :]
    if segments_T is not None:
      query_s, key_s = (
        jax.lax.dynamic_slice_in_dim(segments_T, first, block) for first in (place, j * block)
      )
      seen_ss &= query_s[:, None] == key_s[None, :]
    return seen_ss[None]

  return visible


def forward(q_HSA, k_HTA, v_HTU, segments_T, block: int, starts_Y=None):
  """Attends within one row; queries are already scaled.

  A block of queries meets the blocks of keys up to its own last token and no others, wherever its
  run starts.

  Args:
    q_HSA, k_HTA, v_HTU: queries, keys, values.
    segments_T: int32 document number of each token, or None for one document.
    block: tokens of a block.
    starts_Y: as in `api.causal_attention`.

  Returns:
    Outputs [H, S, U] in v's dtype, and the log of each softmax's normaliser, float32 [H, S].
  """
  (H, S, _), U = q_HSA.shape, v_HTU.shape[2]
  runs = 1 if starts_Y is None else starts_Y.shape[0]
  q_nHsA, v_nHsU = _blocks(q_HSA, block, runs), _blocks(v_HTU, block)
  k_nHAs = jax.lax.optimization_barrier(_blocks(k_HTA, block).swapaxes(2, 3))
  visible, place_n = _visibility(segments_T, block), _places(starts_Y, S, block)

  def attend(i):
    q_HsA, place = q_nHsA[i], place_n[i]

    def add_keys(j, softmax):
      top_Hs1, z_Hs1, sum_HsU = softmax
      logits_Hst = jnp.matmul(q_HsA, k_nHAs[j], preferred_element_type=f32)
      seen = visible(place, j)
      new_top = jnp.max(logits_Hst, axis=-1, keepdims=True, initial=NOTHING_SEEN, where=seen)
      new_top = jnp.maximum(top_Hs1, new_top)
      p_Hst, kept = jnp.where(seen, jnp.exp(logits_Hst - new_top), 0), jnp.exp(top_Hs1 - new_top)
      values_HsU = jnp.matmul(p_Hst.astype(v_HTU.dtype), v_nHsU[j], preferred_element_type=f32)
      z_Hs1 = z_Hs1 * kept + jnp.sum(p_Hst, axis=-1, keepdims=True)
      return new_top, z_Hs1, sum_HsU * kept + values_HsU

    fills = ((1, NOTHING_SEEN), (1, 0), (U, 0))
    start = tuple(jnp.full((H, block, x), fill, f32) for x, fill in fills)
    start = varying.varying_like(start, q_HSA, k_HTA, v_HTU, segments_T, starts_Y)
    end = _key_blocks(place, block, v_nHsU.shape[0])
    top_Hs1, z_Hs1, sum_HsU = jax.lax.fori_loop(0, end, add_keys, start)
    return (sum_HsU / z_Hs1).astype(v_HTU.dtype), top_Hs1 + jnp.log(z_Hs1)

  out_nHsU, log_z_nHs1 = jax.lax.map(attend, jnp.arange(q_nHsA.shape[0]))
  return _tokens(out_nHsU, S, runs), _tokens(log_z_nHs1, S, runs)[..., 0]


def _key_blocks(place, block: int, most: int):
  """Returns how many blocks of keys the block of queries from a place on meets."""
  return jnp.minimum((place + block - 1) // block + 1, most)


def backward(
  q_HSA, k_HTA, v_HTU, segments_T, log_z_HS, dout_HSU, shared_HS1, block: int, starts_Y=None
):
  """Returns the gradients of `forward`'s outputs in one row.

  Args:
    q_HSA, k_HTA, v_HTU, segments_T, block, starts_Y: as in `forward`.
    log_z_HS: its second result.
    dout_HSU: the gradient of its first.
    shared_HS1: float32, each query's sum over U of dout times out.

  Returns:
    float32 dq [H, S, A], dk [H, A, T] and dv [H, U, T].
  """
  S, T, dtype = q_HSA.shape[1], k_HTA.shape[1], v_HTU.dtype
  runs = 1 if starts_Y is None else starts_Y.shape[0]
  k_nHsA, v_nHsU = _blocks(k_HTA, block), _blocks(v_HTU, block)
  of_queries = (q_HSA, dout_HSU, shared_HS1, log_z_HS[..., None])
  q_nHsA, dout_nHsU, shared_nHs1, log_z_nHs1 = (_blocks(a, block, runs) for a in of_queries)
  transposed = (a.swapaxes(2, 3) for a in (q_nHsA, k_nHsA, v_nHsU, dout_nHsU))
  q_nHAs, k_nHAs, v_nHUs, dout_nHUs = jax.lax.optimization_barrier(tuple(transposed))
  visible, place_n = _visibility(segments_T, block), _places(starts_Y, S, block)

  def add_queries(sums, i):
    place = place_n[i]

    def add_keys(j, sums):
      dq_HsA, dk_nHAs, dv_nHUs = sums
      logits_Hst = jnp.matmul(q_nHsA[i], k_nHAs[j], preferred_element_type=f32)
      p_Hst = jnp.where(visible(place, j), jnp.exp(logits_Hst - log_z_nHs1[i]), 0)
      dv_HUt = jnp.matmul(dout_nHUs[i], p_Hst.astype(dtype), preferred_element_type=f32)
      dp_Hst = jnp.matmul(dout_nHsU[i], v_nHUs[j], preferred_element_type=f32)
      dlogits_Hst = (p_Hst * (dp_Hst - shared_nHs1[i])).astype(dtype)
      dk_HAt = jnp.matmul(q_nHAs[i], dlogits_Hst, preferred_element_type=f32)
      dq_HsA += jnp.matmul(dlogits_Hst, k_nHsA[j], preferred_element_type=f32)
      return dq_HsA, dk_nHAs.at[j].add(dk_HAt), dv_nHUs.at[j].add(dv_HUt)

    start = varying.varying_like(jnp.zeros(q_nHsA.shape[1:], f32), sums)
    end = _key_blocks(place, block, v_nHsU.shape[0])
    dq_HsA, *sums = jax.lax.fori_loop(0, end, add_keys, (start, *sums))
    return tuple(sums), dq_HsA

  zeros = (jnp.zeros(k_nHAs.shape, f32), jnp.zeros(v_nHUs.shape, f32))
  operands = (q_HSA, k_HTA, v_HTU, segments_T, dout_HSU, starts_Y)
  zeros = varying.varying_like(zeros, *operands)
  (dk_nHAs, dv_nHUs), dq_nHsA = jax.lax.scan(add_queries, zeros, jnp.arange(q_nHsA.shape[0]))
  dk_HTA, dv_HTU = (_tokens(a.swapaxes(2, 3), T) for a in (dk_nHAs, dv_nHUs))
  return _tokens(dq_nHsA, S, runs), dk_HTA.swapaxes(1, 2), dv_HTU.swapaxes(1, 2)
