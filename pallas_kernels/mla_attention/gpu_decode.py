"""Decoding in latent space for H100 (Mosaic GPU): a row's pages are read once for 128 queries.

A thread block holds 64 queries of a row and goes over the row's tokens, 64 at a time, whose
latents are keys, whole, and values, their first C numbers, from one copy on chip. Of its three
warpgroups one brings the pages, through the page table, and makes the logits and the softmax; two
sum the values, half the columns each, a block behind. So the tensor cores work on the values of
one block during the softmax of the next. A slot is filled again as soon as its values are summed,
during the logits of the other.

A row of more than 64 queries takes clusters of two thread blocks that stay on the same tokens:
each fetches half of every page and the copy engine hands it to both. The cache is thus read once
by 128 queries, such as V3's heads; S new tokens of them read it S times. The loop is as long as
the row's own tokens, its last block filled up with a page read again. A row's tokens are split
over several clusters where rows alone would leave multiprocessors idle; XLA puts the parts
together, float32 [B, n, X, C] written and read.

Shapes: B rows, S new tokens, H heads, X = S H queries filled up to tiles of ROWS, N pages of T
tokens, W numbers a token, C numbers of a value, P pages of a row, n parts of a row.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_gpu import call

ROWS = 64  # queries of a thread block
CLUSTER = 2  # thread blocks that go over a row's tokens together
BLOCK = 64  # tokens at a time
SLOTS = 2  # blocks on chip
MOST_WIDTH = 576  # numbers a token: queries and blocks fill the 227 KiB of a thread block
ACC_COLUMNS = 256  # of float32 sums a warpgroup has registers for
VALUE_WGS, SCORE = 2, 2  # warpgroups 0 and 1 sum values, 2 does the rest
SMS = 132  # multiprocessors
START_BLOCKS = 8  # what beginning and storing a part takes, in blocks of tokens
LOG2E = math.log2(math.e)
NONE_SEEN = -1e30  # a largest logit; not -inf, whose difference to itself is no number

f32, i32 = jnp.float32, jnp.int32
WGMMA = plgpu.Layout.WGMMA


def num_parts(clusters: int, cluster: int, most_blocks: int) -> int:
  """Returns in how many parts to take rows of up to `most_blocks` blocks: the soonest done."""
  at_once = SMS // cluster
  blocks = lambda n: -(-clusters * n // at_once) * (-(-most_blocks // n) + START_BLOCKS)  # noqa: E731
  return min(range(1, most_blocks + 1), key=blocks)


def _along(value, shape):
  """Spreads a number a query over the columns."""
  return plgpu.layout_cast(jax.lax.broadcast_in_dim(value, shape, (0,)), WGMMA)


def _full(value, *shape):
  layout = WGMMA if len(shape) == 2 else WGMMA.reduce(1)
  return plgpu.layout_cast(jnp.full(shape, value, f32), layout)


def _token(shape, axis: int):
  return plgpu.broadcasted_iota(i32, shape, axis, layout=WGMMA)


def refused(q_BSHW, pages_NTW, C: int) -> str | None:
  """Returns the rule that the operands break, or None."""
  _, T, W = pages_NTW.shape
  if q_BSHW.dtype != jnp.bfloat16:
    return f"q and pages must be bfloat16, got {q_BSHW.dtype}"
  if W % 64 or W > MOST_WIDTH:
    return f"W must be a multiple of 64, at most {MOST_WIDTH}, got {W}"
  if C % 128 or C > VALUE_WGS * ACC_COLUMNS:
    return f"value_width must be a multiple of 128, at most {VALUE_WGS * ACC_COLUMNS}, got {C}"
  if T not in (16, 32, 64):
    return f"a page must have 16, 32 or 64 tokens, got {T}"
  return None


def decode_attention(
  q_BSHW,
  pages_NTW,
  table_BP,
  end_BS,
  scale: float,
  value_width: int,
  parts: int | None = None,
):
  """See `api.decode_attention`; bfloat16, C a multiple of 128, W of 64 up to 576.

  Args:
    q_BSHW, pages_NTW, table_BP, end_BS, scale, value_width: as there; 16 tokens a page, or 32, 64.
    parts: how many thread blocks, or clusters, share a row's tokens; None: `num_parts`.

  Source: the tiles and parts are FlashMLA's (github.com/deepseek-ai/FlashMLA); its warpgroups
    differ: there both, of two, make logits and sum values, and thread blocks do not share copies.
  """
  (B, S, H, W), (_, T, _), C = q_BSHW.shape, pages_NTW.shape, value_width
  if rule := refused(q_BSHW, pages_NTW, C):
    raise ValueError(rule)
  if parts is not None and parts < 1:
    raise ValueError(f"parts must be at least 1, got {parts}")
  dtype, X = q_BSHW.dtype, S * H
  cluster = CLUSTER if X > ROWS else 1
  q_BXW = jnp.pad(q_BSHW.reshape(B, X, W), ((0, 0), (0, -X % (ROWS * cluster)), (0, 0)))
  tiles = q_BXW.shape[1] // ROWS
  if parts is None:
    parts = num_parts(B * tiles // cluster, cluster, -(-table_BP.shape[1] * T // BLOCK))
  n, columns, block_pages = parts, C // VALUE_WGS, BLOCK // T

  def kernel(q_hbm, pages_hbm, table_hbm, end_hbm, out_hbm, sums_hbm, *scratch):
    q_smem, latents_smem, p_smem, factor_smem, *barriers = scratch
    q_arrived, arrived, freed, p_ready, p_free = barriers
    b, part, tile = (jax.lax.axis_index(name) for name in ("row", "part", "tile"))
    if cluster > 1:
      tile = tile * cluster + jax.lax.axis_index("half")
    wg = jax.lax.axis_index("wg")
    ends = [end_hbm[b, s] for s in range(S)]
    length = functools.reduce(jnp.maximum, ends)
    shortest = functools.reduce(jnp.minimum, ends)
    num_blocks = jax.lax.div(length + (BLOCK - 1), i32(BLOCK))
    part_blocks = jax.lax.div(num_blocks + (n - 1), i32(n))
    first = part * part_blocks
    count = jnp.clip(num_blocks - first, 0, part_blocks)
    slot_of = lambda i: jax.lax.rem(i, i32(SLOTS))  # noqa: E731

    def fetch(i):
      """Starts the copies of the part's block i, into a slot that the values no longer need."""
      slot, place = slot_of(i), (first + i) * block_pages
      last = jax.lax.div(length - 1, i32(T))  # again where there are no more, for the count
      pages = [table_hbm[b, jnp.minimum(place + k, last)] for k in range(block_pages)]
      pl.when(i >= SLOTS)(lambda: plgpu.barrier_wait(freed.at[slot]))
      for k, page in enumerate(pages):
        plgpu.copy_gmem_to_smem(
          pages_hbm.at[page],
          latents_smem.at[slot, pl.ds(k * T, T)],
          arrived.at[slot],
          collective_axes="half" if cluster > 1 else None,
        )

    def hide(logits, begin):
      """-inf where a query does not see a token."""
      query, token = (_token(logits.shape, axis) for axis in (0, 1))
      end = jnp.full(logits.shape, ends[0], i32)
      for s in range(1, S):  # query x belongs to new token x // H
        end = jnp.where(query + tile * ROWS >= s * H, ends[s], end)
      return jnp.where(token + begin < end, logits, -jnp.inf)

    def clear(slot, begin):
      """Zeroes the values past the row's end: they are undefined, and 0 x NaN is NaN."""
      own = _token((BLOCK, 64), 0) + begin < length
      for c in range(0, C, 64):
        values = latents_smem.at[slot, :, c : c + 64]
        values[...] = jnp.where(own, values[...], jnp.zeros((), dtype))

    def score(i, carry):
      """Goes on with the softmax over the part's block i."""
      top, total = carry
      slot, begin = slot_of(i), (first + i) * BLOCK
      plgpu.barrier_wait(arrived.at[slot])

      def product(acc):
        plgpu.wgmma(acc, q_smem, latents_smem.at[slot].T)
        ahead = i - 1 + SLOTS
        pl.when((i > 0) & (ahead < count))(lambda: fetch(ahead))  # beside the product
        return acc[...]

      logits = pl.run_scoped(product, plgpu.ACC((ROWS, BLOCK), f32)) * (scale * LOG2E)
      logits = jax.lax.cond(begin + BLOCK > shortest, lambda x: hide(x, begin), lambda x: x, logits)
      before, top = top, jnp.maximum(top, jnp.max(logits, axis=1))
      p = jnp.exp2(logits - _along(top, logits.shape))
      fade = jnp.exp2(before - top)
      total = total * fade + jnp.sum(p, axis=1)
      pl.when(begin + BLOCK > length)(lambda: clear(slot, begin))
      pl.when(i > 0)(lambda: plgpu.barrier_wait(p_free))
      p_smem[...] = p.astype(dtype)
      factor_smem[...] = fade
      plgpu.commit_smem()
      plgpu.barrier_arrive(p_ready)
      return top, total

    @pl.when(wg == SCORE)
    def _():
      @pl.when(count > 0)
      def _():
        own = q_hbm.at[b, pl.ds(tile * ROWS, ROWS)]
        plgpu.copy_gmem_to_smem(own, q_smem, q_arrived)
        for i in range(SLOTS):
          pl.when(i < count)(functools.partial(fetch, i32(i)))
        plgpu.barrier_wait(q_arrived)

      top, total = jax.lax.fori_loop(0, count, score, (_full(NONE_SEEN, ROWS), _full(0, ROWS)))
      pl.when(count > 0)(lambda: plgpu.barrier_wait(p_free))
      seen = total > 0
      factor_smem[...] = 1 / jnp.where(seen, total, 1)
      plgpu.barrier_arrive(p_ready)
      sums_hbm[b, part, tile] = jnp.where(seen, top + jnp.log2(total), NONE_SEEN)
      # Not to end before the cluster's other block has freed its last slots, which it says here.
      wait = lambda i, _: plgpu.barrier_wait(freed.at[slot_of(i)])  # noqa: E731
      jax.lax.fori_loop(jnp.maximum(count - SLOTS, 0), count, wait, None)

    here = pl.ds(wg * columns, columns)

    def faded(acc):
      factor = plgpu.layout_cast(factor_smem[...], WGMMA.reduce(1))
      return acc * _along(factor, acc.shape)

    def add(i, acc):
      """Goes on with the sum over the part's block i."""
      slot = slot_of(i)
      plgpu.barrier_wait(arrived.at[slot])
      plgpu.barrier_wait(p_ready)
      product = lambda acc: plgpu.wgmma(acc, p_smem, latents_smem.at[slot, :, here])  # noqa: E731
      acc = pl.run_state(product)(plgpu.ACC.init(faded(acc)))
      plgpu.barrier_arrive(freed.at[slot])
      plgpu.barrier_arrive(p_free)
      return acc

    @pl.when(wg < VALUE_WGS)
    def _():
      acc = jax.lax.fori_loop(0, count, add, _full(0, ROWS, columns))
      plgpu.barrier_wait(p_ready)
      out_hbm[b, part, pl.ds(tile * ROWS, ROWS), here] = faded(acc).astype(out_hbm.dtype)

  tiled = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
  smem = lambda *shape: plgpu.SMEM(shape, dtype, transforms=tiled)  # noqa: E731
  freed_type: Callable = plgpu.Barrier
  if cluster > 1:
    freed_type = functools.partial(plgpu.ClusterBarrier, collective_axes=("half",))
  out_BnXC, sums_BnX = call(
    kernel,
    "mla_decode",
    [q_BXW, pages_NTW, table_BP, end_BS],
    [
      jax.ShapeDtypeStruct((B, n, tiles * ROWS, C), dtype if n == 1 else f32),
      jax.ShapeDtypeStruct((B, n, tiles, ROWS), f32),
    ],
    {"row": B, "part": n, "tile": tiles // cluster},
    [
      smem(ROWS, W),
      smem(SLOTS, BLOCK, W),
      smem(ROWS, BLOCK),
      plgpu.SMEM((ROWS,), f32),
      plgpu.Barrier(),
      plgpu.Barrier(num_arrivals=block_pages, num_barriers=SLOTS),
      freed_type(num_arrivals=VALUE_WGS, num_barriers=SLOTS),
      plgpu.Barrier(),
      plgpu.Barrier(num_arrivals=VALUE_WGS),
    ],
    warpgroups=VALUE_WGS + 1,
    reduction_bytes=0,  # no sum crosses warps
    cluster={"half": cluster} if cluster > 1 else None,
  )
  out_BXC = out_BnXC[:, 0]
  if n > 1:
    log_BnX = sums_BnX.reshape(B, n, -1)
    weight_BnX = jnp.exp2(log_BnX - jnp.max(log_BnX, axis=1, keepdims=True))
    weight_BnX /= jnp.sum(weight_BnX, axis=1, keepdims=True)
    out_BXC = jnp.sum(out_BnXC * weight_BnX[..., None], axis=1).astype(dtype)
  return out_BXC[:, :X].reshape(B, S, H, C)
