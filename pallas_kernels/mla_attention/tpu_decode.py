"""Decoding in latent space for TPU (Mosaic): a row's pages are read once, for all its heads.

A grid step is a row. Its pages come through the page table, a block of them at a time, by
asynchronous copies into one of three buffers, two blocks ahead, be they this row's or the
next ones'. A block meets all the row's queries twice: as keys, whole, and as values, its first
C columns. The matmul of the next block's logits runs beside the softmax of this one's.

The rows are dealt to two parts, one for each TensorCore of a v5p. A single long row is not
split: a core takes its blocks in turn either way, and only a v5p with one row has a core idle.

W should be a multiple of 128, MLA's 576 numbers padded to 640 with zeros. The chip's memory pads
to that anyway (512 and 64 apart would pad to 640 too); an array [N, 16, 576] XLA lays out with the
pages minor instead and copies the whole cache before the kernel.

Shapes: B rows, S new tokens, H heads, X = S H queries, N pages of T tokens, W numbers a token, C
numbers of a value, P pages of a row, K tokens of a block, g blocks of all rows in order.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import traffic
from pallas_kernels.varying import varying_like

BLOCK_TOKENS = 512
BUFFERS = 3  # blocks: one of values, one of keys, one under way
# Tokens of a tile. In tiles of 8 a page lies in VMEM as it does in HBM, and its copy is a
# plain one; in bfloat16's larger tiles of a tpu7x it is strided, and costs twice the scalar work.
TILE = 8
SCALAR_BYTES = 2**19  # of scalar memory, for the page table
NONE_SEEN = -1e30  # a logit; not -inf, whose difference to itself is no number

f32 = jnp.float32


def _kernel(
  table_ref, end_ref, first_ref, pages_of_ref, start_ref,
  q_ref, pages_ref, out_ref,
  buffer_ref, logits_ref, end_ref_X1, top_ref, z_ref, acc_ref, sems,
  *, scale, block_pages,
):  # fmt: skip
  X, W = q_ref.shape
  C, R = out_ref.shape[1], pages_ref.shape[1]
  T = R * TILE
  K = block_pages * T
  B = start_ref.shape[0]
  S = end_ref.shape[0] // B
  row = pl.program_id(0) * pl.num_programs(1) + pl.program_id(1)
  ends = [end_ref[row * S + s] for s in range(S)]
  length = functools.reduce(jnp.maximum, ends)
  num_blocks = jax.lax.div(length + (K - 1), jnp.int32(K))  # `//` would mind negative numbers
  precision = jax.lax.Precision.HIGHEST if q_ref.dtype == f32 else None

  def copy(page, slot, i):
    to = buffer_ref.at[slot, pl.ds(i * R, R)]
    return pltpu.make_async_copy(pages_ref.at[page], to, sems.at[slot])

  def fetch(g):
    """Starts the copies of block g's pages: no loop, each under a predicate."""
    first, count, slot = first_ref[g], pages_of_ref[g], jax.lax.rem(g, BUFFERS)
    for i in range(block_pages):

      @pl.when(i < count)
      def _(i=i):
        copy(table_ref[first + i], slot, i).start()

  def wait(g):
    count, slot = pages_of_ref[g], jax.lax.rem(g, BUFFERS)

    @pl.when(count == block_pages)
    def _():  # one wait for all: it counts bytes
      pltpu.make_async_copy(buffer_ref.at[slot], buffer_ref.at[slot], sems.at[slot]).wait()

    @pl.when(count < block_pages)
    def _():
      one = lambda i, _: copy(0, slot, i).wait()  # noqa: E731
      jax.lax.fori_loop(0, count, one, None)

  def clear_behind_the_end(g, j):
    """Zeroes what lies past the row's end: it is undefined, and 0 x NaN is NaN."""
    count, slot = pages_of_ref[g], jax.lax.rem(g, BUFFERS)
    last = pl.ds((count - 1) * R, R)
    shape = (R, TILE, W)
    tile, within = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
    place = tile * TILE + within + j * K + (count - 1) * T
    page = buffer_ref[slot, last].astype(f32)
    buffer_ref[slot, last] = jnp.where(place < length, page, 0).astype(buffer_ref.dtype)

    def clear(i, _):
      buffer_ref[slot, pl.ds(i * R, R)] = jnp.zeros((R, TILE, W), buffer_ref.dtype)

    jax.lax.fori_loop(count, block_pages, clear, None)

  def arrive(g, j):
    wait(g)

    @pl.when((j + 1) * K > length)
    def _():
      clear_behind_the_end(g, j)

  def score(g, side):
    """Writes the logits of block g, in units of log 2, to one side."""
    logits_XK = jax.lax.dot_general(
      q_ref[...],
      buffer_ref[jax.lax.rem(g, BUFFERS)].reshape(K, W),
      (((1,), (1,)), ((), ())),
      precision=precision,
      preferred_element_type=f32,
    )
    logits_ref[side] = logits_XK * (scale * math.log2(math.e))

  def attend(g, j, side):
    """Goes on with the softmax over block g, the row's j-th."""
    visible_XK = jax.lax.broadcasted_iota(jnp.int32, (X, K), 1) + j * K < end_ref_X1[...]
    logits_XK = jnp.where(visible_XK, logits_ref[side], NONE_SEEN)
    top_X1 = jnp.maximum(top_ref[...], jnp.max(logits_XK, axis=1, keepdims=True))
    p_XK = jnp.where(visible_XK, jnp.exp2(logits_XK - top_X1), 0)
    kept_X1 = jnp.exp2(top_ref[...] - top_X1)
    top_ref[...] = top_X1
    z_ref[...] = z_ref[...] * kept_X1 + jnp.sum(p_XK, axis=1, keepdims=True)
    values_XC = jax.lax.dot_general(
      p_XK.astype(buffer_ref.dtype),
      buffer_ref[jax.lax.rem(g, BUFFERS), :, :, :C].reshape(K, C),
      (((1,), (0,)), ((), ())),
      precision=precision,
      preferred_element_type=f32,
    )
    acc_ref[...] = acc_ref[...] * kept_X1 + values_XC

  first_g = start_ref[row]

  @pl.when(pl.program_id(1) == 0)
  def _():
    fetch(first_g)
    fetch(first_g + 1)

  query_X1 = jax.lax.broadcasted_iota(jnp.int32, (X, 1), 0)
  end_X1 = jnp.full((X, 1), ends[0], jnp.int32)
  for s in range(1, S):  # query x belongs to new token x // H
    end_X1 = jnp.where(query_X1 >= s * (X // S), ends[s], end_X1)
  end_ref_X1[...] = end_X1
  top_ref[...] = jnp.full((X, 1), NONE_SEEN, f32)
  z_ref[...] = jnp.zeros((X, 1), f32)
  acc_ref[...] = jnp.zeros((X, C), f32)

  @pl.when(num_blocks > 0)
  def _():
    arrive(first_g, 0)
    score(first_g, 0)

    def step(j, side):
      # The next block's matmul before this one's softmax: the compiler keeps the order of
      # matmuls, and runs the softmax beside the first of them. The copies last, since it keeps
      # them behind every read of the buffers.
      g = first_g + j
      arrive(g + 1, j + 1)
      score(g + 1, 1 - side)
      attend(g, j, side)
      fetch(g + 2)

    def two_steps(i, _):  # so that a side is a constant
      step(2 * i, 0)
      step(2 * i + 1, 1)

    last = num_blocks - 1
    jax.lax.fori_loop(0, jax.lax.div(last, jnp.int32(2)), two_steps, None)
    last_side = jax.lax.rem(last, jnp.int32(2))

    @pl.when(last_side == 1)
    def _():
      step(last - 1, 0)

    for side in (0, 1):

      @pl.when(last_side == side)
      def _(side=side):
        attend(first_g + last, last, side)

    fetch(first_g + last + 2)

  z_X1 = z_ref[...]
  out_ref[...] = (acc_ref[...] / jnp.where(z_X1 > 0, z_X1, 1)).astype(out_ref.dtype)


def _blocks(length_B, parts: int, num_pages: int, page_tokens: int, block_pages: int):
  """Lists each part's blocks in the order they are read.

  Returns:
    int32 first_g, a block's first entry in the flat page table, and pages_g, how many it has,
    of `parts` equally long lists that end with empty blocks; start_B, each row's first block.
  """
  B = length_B.shape[0]
  pages_B = (length_B + page_tokens - 1) // page_tokens
  blocks_B = (pages_B + block_pages - 1) // block_pages
  G = B // parts * -(-num_pages // block_pages) + BUFFERS
  last_B = jnp.cumsum(blocks_B.reshape(parts, -1), axis=1, dtype=jnp.int32)
  last_B = (last_B + jnp.arange(parts, dtype=jnp.int32)[:, None] * G).reshape(B)
  start_B = last_B - blocks_B
  g_G1 = jnp.arange(parts * G, dtype=jnp.int32)[:, None]
  mine_GB = (start_B[None, :] <= g_G1) & (g_G1 < last_B[None, :])
  done_GB = (g_G1 - start_B[None, :]) * block_pages
  first_GB = jnp.arange(B, dtype=jnp.int32)[None, :] * num_pages + done_GB
  left_GB = jnp.minimum(pages_B[None, :] - done_GB, block_pages)
  first_g, pages_g = (jnp.sum(jnp.where(mine_GB, a, 0), axis=1) for a in (first_GB, left_GB))
  return first_g, pages_g, start_B


def refused(pages_NTW, table_BP) -> str | None:
  """Returns the rule that the operands break, or None."""
  T = pages_NTW.shape[1]
  if T % TILE:
    return f"mosaic_tpu takes pages of a multiple of {TILE} tokens, got {T}"
  if table_BP.size * 4 > SCALAR_BYTES:
    B, P = table_BP.shape
    return (
      f"mosaic_tpu takes page tables of at most {SCALAR_BYTES // 4} entries, got {B} x {P}; "
      "implementation 'xla' takes any"
    )
  return None


def decode_attention(
  q_BSHW,
  pages_NTW,
  table_BP,
  end_BS,
  scale: float,
  value_width: int,
  block_tokens: int = BLOCK_TOKENS,
):
  """See `api.decode_attention`; pages hold a multiple of 8 tokens, W is best one of 128."""
  B, S, H, W = q_BSHW.shape
  T, P = pages_NTW.shape[1], table_BP.shape[1]
  X, C = S * H, value_width
  if rule := refused(pages_NTW, table_BP):
    raise ValueError(rule)
  block_pages = max(1, min(block_tokens // T, P))
  K = block_pages * T
  parts = 2 if B % 2 == 0 else 1
  blocks = _blocks(jnp.max(end_BS, axis=1), parts, P, T, block_pages)
  scalars = (table_BP.reshape(-1), end_BS.reshape(-1), *blocks)

  grid = (parts, B // parts)
  by_row = lambda part, r, *_: (part * (B // parts) + r, 0, 0)  # noqa: E731
  q_spec = pl.BlockSpec((None, X, W), by_row)
  out_spec = pl.BlockSpec((None, X, C), by_row)
  q = jax.ShapeDtypeStruct((B, X, W), q_BSHW.dtype)
  out = jax.ShapeDtypeStruct((B, X, C), q_BSHW.dtype)
  out = varying_like(out, q_BSHW, pages_NTW, *scalars)
  # The table's every page once: how many are used is known only at run time.
  cache_bytes = B * P * T * W * pages_NTW.dtype.itemsize
  stand_ins = [np.zeros(s.shape, np.int32) for s in scalars]
  cost = pl.CostEstimate(
    flops=2 * B * X * P * T * (W + C),
    transcendentals=B * X * P * T,
    bytes_accessed=traffic.bytes_moved(grid, [(q, q_spec), (out, out_spec)], stand_ins)
    + cache_bytes,
  )
  call = pl.pallas_call(
    functools.partial(_kernel, scale=scale, block_pages=block_pages),
    out_shape=out,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=len(scalars),
      grid=grid,
      in_specs=[q_spec, pl.BlockSpec(memory_space=pl.ANY)],
      out_specs=out_spec,
      scratch_shapes=[
        pltpu.VMEM((BUFFERS, K // TILE, TILE, W), pages_NTW.dtype),
        pltpu.VMEM((2, X, K), f32),
        pltpu.VMEM((X, 1), jnp.int32),
        pltpu.VMEM((X, 1), f32),
        pltpu.VMEM((X, 1), f32),
        pltpu.VMEM((X, C), f32),
        pltpu.SemaphoreType.DMA((BUFFERS,)),
      ],
    ),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "arbitrary"),
      disable_bounds_checks=True,  # of copies: they cost more scalar work than the copies
    ),
    cost_estimate=cost,
    name="mla_decode",
  )
  tiles = pages_NTW.reshape(-1, T // TILE, TILE, W)
  out_BXC = call(*scalars, q_BSHW.reshape(B, X, W), tiles)
  return out_BXC.reshape(B, S, H, C)
