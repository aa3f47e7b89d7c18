"""The FP8 matmuls for TPU (Mosaic): one kernel quantises, one multiplies.

Operands are quantised once, in HBM, and the matmul reads one byte a number. Where the chip
multiplies E4M3 it is given the codes; elsewhere they become bfloat16 on chip, which holds them
exactly. With scales that are powers of two, bfloat16 holds the scaled numbers exactly too: then
operands are scaled before they are multiplied, and only the order of sums differs.

Shapes: M rows, K contraction, N columns, T = ceil(K / 128) tiles; m, k, n, t those of a step.
"""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import traffic
from pallas_kernels.permute import tpu as permute
from pallas_kernels.quantized_matmul.e4m3 import (
  CODE,
  TILE,
  Quantized,
  encode,
  f32,
  largest_magnitude,
  nearest,
  scale_of,
)
from pallas_kernels.varying import varying_like

VMEM_BYTES = 48 * 2**20  # of the 64 MiB of v5p and tpu7x; v6e has 128
# Loops take this many tiles at a time, as many as a register of float32 has rows, in code
# without branches: as long as what it computes, so at most this many sums.
LOOP_TILES = 8
MXU_TILES = 2  # tiles a matrix unit multiplies at once: it is 256 deep on v6e and tpu7x
STEP_SUMS = 512 * 1024
QUANTIZE_ROWS = 512  # or columns, a step; one MiB of bfloat16

bf16 = jnp.bfloat16


def out(shape, dtype, *operands):
  """An output that varies over the mesh axes any of the operands varies over."""
  return varying_like(jax.ShapeDtypeStruct(shape, dtype), *operands)


def call(
  kernel,
  name: str,
  grid,
  operands,
  outputs,
  in_specs,
  out_specs,
  flops: int,
  scratch=(),
  parallel: int = 2,
  scalars=(),
  assumed=None,
  vmem_bytes: int = VMEM_BYTES,
):
  """Runs a kernel and counts what it costs.

  Args:
    flops: for the cost estimate, whose bytes are counted.
    parallel: how many dimensions of the grid, from the first on, have independent steps.
    scalars: int32 arrays that index maps and kernel are given too.
    assumed: (grid, scalars) to count with, where the true ones are only known at run time.
    The rest is as in `pl.pallas_call`.
  """
  counted_grid, counted_scalars = assumed or (grid, ())
  pairs = list(zip([*operands, *outputs], [*in_specs, *out_specs]))
  moved = traffic.bytes_moved(counted_grid, pairs, counted_scalars)
  order: list[Any] = ["parallel"] * parallel + ["arbitrary"] * (len(grid) - parallel)
  return pl.pallas_call(
    kernel,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=len(scalars),
      grid=grid,
      in_specs=in_specs,
      out_specs=out_specs,
      scratch_shapes=list(scratch),
    ),
    out_shape=outputs,
    compiler_params=pltpu.CompilerParams(dimension_semantics=order, vmem_limit_bytes=vmem_bytes),
    cost_estimate=pl.CostEstimate(flops=flops, bytes_accessed=moved, transcendentals=0),
    name=name,
  )(*scalars, *operands)


def _upto(size: int, most: int) -> int:
  """A block of `most`, or of the whole tiles that hold fewer."""
  return min(most, pl.cdiv(size, TILE) * TILE)


def inside(x, axis: int, first, size: int):
  """Zeroes what lies past an array's end, where a block is undefined."""
  index = first + jax.lax.broadcasted_iota(jnp.int32, x.shape, axis)
  return jnp.where(index < size, x, 0)


def scales_of_tiles(tile_of: Callable, m: int, tiles: int, power_of_two: bool):
  """Returns the scales of m rows' tiles, at most 128 of them, [m, 128] with one lane a tile.

  So the arithmetic of all scales is done at once. `tile_of` takes a number to [m, 128] float32.
  """
  lane = jax.lax.broadcasted_iota(jnp.int32, (m, TILE), 1)
  largest_mt = jnp.zeros((m, TILE), f32)
  for t in range(tiles):
    largest_m1 = largest_magnitude(tile_of(t), axis=1, keepdims=True)
    largest_mt = jnp.where(lane == t, largest_m1, largest_mt)
  return scale_of(largest_mt, power_of_two)


def quantize_rows(x_MK, power_of_two_scales: bool = False) -> Quantized:
  """See `api.quantize_rows`."""
  M, K = x_MK.shape
  T = pl.cdiv(K, TILE)
  m, tiles = _upto(M, QUANTIZE_ROWS), min(LOOP_TILES, T)
  k = tiles * TILE

  def kernel(x_ref, codes_ref, scale_ref):
    def tile_of(t):
      x_mk = x_ref[:, t * TILE : (t + 1) * TILE].astype(f32)
      return inside(x_mk, 1, pl.program_id(1) * k + t * TILE, K) if K % TILE else x_mk

    scale_mt = scales_of_tiles(tile_of, m, tiles, power_of_two_scales)
    scale_ref[...] = scale_mt.T[:tiles]
    inverse_mt = 1 / scale_mt
    for t in range(tiles):
      codes_ref[:, t * TILE : (t + 1) * TILE] = encode(tile_of(t), inverse_mt[:, t : t + 1])

  wide = pl.BlockSpec((m, k), lambda i, j: (i, j))
  codes, scale = call(
    kernel,
    "quantize_rows",
    (pl.cdiv(M, m), pl.cdiv(T, tiles)),
    [x_MK],
    [out((M, K), CODE, x_MK), out((T, M), f32, x_MK)],
    [wide],
    [wide, pl.BlockSpec((tiles, m), lambda i, j: (j, i))],
    flops=2 * M * K,
  )
  return Quantized(codes, scale)


def quantize_down(
  x_EKN, power_of_two: bool, blocks: bool, transposed: bool = False, rows_T=None
) -> Quantized:
  """Quantises tiles of 128 x 1, or blocks of 128 x 128, each block's scale standing 128 times.

  Returns codes of each matrix [K, N], transposed if told, and scales [E, T, N]. With `rows_T`,
  int32, each tile of 128 rows has so many; the others are undefined and count as zeros.
  Words of two bfloat16 (`permute.tpu`) are unpacked first.
  """
  words = x_EKN.dtype == jnp.uint32
  E, K, N = x_EKN.shape
  N *= 2 if words else 1
  T = pl.cdiv(K, TILE)
  n, tiles = _upto(N, QUANTIZE_ROWS), min(LOOP_TILES, T)
  k = tiles * TILE
  scalars = [] if rows_T is None else [jnp.pad(rows_T, (0, -T % tiles))]

  def kernel(*refs):
    *scalar_refs, x_ref, codes_ref, scale_ref = refs

    def tile_of(tile):
      if not words:
        return x_ref[tile].astype(f32)
      pieces = [x_ref[tile, c : c + TILE] for c in range(0, n // 2, TILE)]
      return jnp.concatenate([half for p in pieces for half in permute.unpack_halves(p)], axis=1)

    for t in range(tiles):
      tile = slice(t * TILE, (t + 1) * TILE)
      x_kn = tile_of(tile)
      if scalars:
        x_kn = inside(x_kn, 0, 0, scalar_refs[0][pl.program_id(1) * tiles + t])
      elif K % TILE:
        x_kn = inside(x_kn, 0, pl.program_id(1) * k + t * TILE, K)
      if blocks and N % TILE:
        x_kn = inside(x_kn, 1, pl.program_id(2) * n, N)
      largest_1n = largest_magnitude(x_kn, axis=0, keepdims=True)
      if blocks:
        parts = [largest_1n[:, i : i + TILE] for i in range(0, n, TILE)]
        parts = [jnp.broadcast_to(p.max(axis=1, keepdims=True), p.shape) for p in parts]
        largest_1n = jnp.concatenate(parts, axis=1)
      scale_1n = scale_of(largest_1n, power_of_two)
      scale_ref[t : t + 1] = scale_1n
      if transposed:
        codes_ref[:, tile] = nearest(x_kn * (1 / scale_1n)).T.astype(CODE)
      else:
        codes_ref[tile] = encode(x_kn, 1 / scale_1n)

  def spec(rows: int, columns: int, turned: bool = False):
    if turned:
      return pl.BlockSpec((None, columns, rows), lambda e, i, j, *_: (e, j, i))
    return pl.BlockSpec((None, rows, columns), lambda e, i, j, *_: (e, i, j))

  grid = (E, pl.cdiv(T, tiles), pl.cdiv(N, n))
  varying = (x_EKN, *scalars)
  codes, scale = call(
    kernel,
    "quantize_blocks" if blocks else "quantize_columns",
    grid,
    [x_EKN],
    [out((E, N, K) if transposed else (E, K, N), CODE, *varying), out((E, T, N), f32, *varying)],
    [spec(k, n // 2 if words else n)],
    [spec(k, n, transposed), spec(tiles, n)],
    flops=2 * E * K * N,
    parallel=3,
    scalars=scalars,
    assumed=(grid, [np.zeros(a.shape, np.int32) for a in scalars]),
  )
  return Quantized(codes, scale)


def quantize_columns(
  x_KN, power_of_two_scales: bool = False, transposed: bool = False
) -> Quantized:
  """See `api.quantize_columns`."""
  codes, scale = quantize_down(x_KN[None], power_of_two_scales, False, transposed)
  return Quantized(codes[0], scale[0])


def quantize_blocks(w_KN, power_of_two_scales: bool = False) -> Quantized:
  """See `api.quantize_blocks`."""
  codes, scale = quantize_down(w_KN[None], power_of_two_scales, True)
  return Quantized(codes[0], scale[0, :, ::TILE])


def multiplies_e4m3() -> bool:
  """Whether the chip that is compiled for does."""
  try:
    return pltpu.get_tpu_info().is_matmul_supported(CODE, CODE)
  except ValueError:  # no TPU: interpreted
    return False


class Step(NamedTuple):
  """What one grid step of `product` multiplies: [m, tiles * 128] by [tiles * 128, n]."""

  m: int
  n: int
  tiles: int


def step_of(M: int, N: int, T: int, out_bytes: int, rows: int | None = None) -> Step:
  """Chooses a step, with `rows` if given: least padding, most sums, least traffic of what fits."""

  def fits(step):
    sums = step.m * step.n * (4 + 4 + 2 * out_bytes)  # scratch, a partial product, two outputs
    operands = 2 * (step.m + step.n) * step.tiles * (TILE + 4)  # two buffers of codes and scales
    return step.m * step.n <= STEP_SUMS and sums + operands <= VMEM_BYTES * 7 // 8

  def cost(step):
    steps_m, steps_n = pl.cdiv(M, step.m), pl.cdiv(N, step.n)
    # With whole contractions the right operand stays while rows pass by.
    moved = M * steps_n + N * (steps_m if step.tiles < T else 1)
    return steps_m * step.m * steps_n * step.n, -step.m * step.n, moved

  sizes = lambda size: range(TILE, min(pl.cdiv(size, TILE) * TILE, 2048) + 1, TILE)  # noqa: E731
  rows_of = [rows] if rows else sizes(M)
  depths = [T, *(d for d in (128, 64, 32, 16, 8) if d < T)]
  steps = itertools.starmap(Step, itertools.product(rows_of, sizes(N), depths))
  return min(filter(fits, steps), key=cost)


def add_products(refs, scales, first, count: int, native: bool, power_of_two_scales: bool) -> None:
  """Adds the products of `count` tiles, from `first` on, to a float32 sum.

  Args:
    refs: codes [m, k] and [k, n], and the sum [m, n].
    scales: their values for these tiles, [count, m] and [count, n].
    first: a multiple of `LOOP_TILES`.
    count: tiles, at most `LOOP_TILES`.
    native: whether the chip multiplies E4M3.
    power_of_two_scales: that the scales are.
  """
  lhs_ref, rhs_ref, sum_ref = refs

  def numbers(codes):
    # Chips that do not multiply E4M3 convert another E4M3: the same bits stand for numbers 16
    # times smaller.
    return (codes if native else pltpu.bitcast(codes, jnp.float8_e4m3b11fnuz)).astype(bf16)

  unit = 1.0 if native else 16.0
  lhs_scale_mt, rhs_scale_tn = scales[0].T * unit, scales[1] * unit
  lhs, rhs = [], []
  for t in range(count):
    tile = pl.ds((first + t) * TILE, TILE)
    lhs_scale_m1, rhs_scale_1n = lhs_scale_mt[:, t : t + 1], rhs_scale_tn[t : t + 1]
    if power_of_two_scales:
      lhs.append(numbers(lhs_ref[:, tile]) * lhs_scale_m1.astype(bf16))
      rhs.append(numbers(rhs_ref[tile]) * rhs_scale_1n.astype(bf16))
      if len(lhs) == MXU_TILES or t == count - 1:
        lhs_mk, rhs_kn = jnp.concatenate(lhs, axis=1), jnp.concatenate(rhs)
        sum_ref[...] += jnp.dot(lhs_mk, rhs_kn, preferred_element_type=f32)
        lhs, rhs = [], []
    else:
      operands = (lhs_ref[:, tile], rhs_ref[tile])
      operands = operands if native else tuple(map(numbers, operands))
      partial_mn = jnp.dot(*operands, preferred_element_type=f32)
      sum_ref[...] += partial_mn * lhs_scale_m1 * rhs_scale_1n


def product_kernel(
  T: int, tiles: int, dtype, power_of_two_scales: bool, scalars: int = 0
) -> Callable:
  """Returns the kernel of a product of T tiles, `tiles` a step, that skips so many scalars."""
  native = multiplies_e4m3()

  def kernel(*refs):
    lhs_ref, lhs_scale_ref, rhs_ref, rhs_scale_ref, out_ref, sum_ref = refs[scalars:]
    step = pl.program_id(2)

    @pl.when(step == 0)
    def _():
      sum_ref[...] = jnp.zeros_like(sum_ref)

    def add(first, count):
      scales = lhs_scale_ref[pl.ds(first, count)], rhs_scale_ref[pl.ds(first, count)]
      refs = lhs_ref, rhs_ref, sum_ref
      add_products(refs, scales, first, count, native, power_of_two_scales)

    whole = jnp.minimum(T - step * tiles, tiles) // LOOP_TILES
    if T >= LOOP_TILES:
      pl.loop(0, whole)(lambda i: add(pl.multiple_of(i * LOOP_TILES, LOOP_TILES), LOOP_TILES))

    @pl.when(step == pl.num_programs(2) - 1)
    def _():
      if T % LOOP_TILES:
        add(pl.multiple_of(whole * LOOP_TILES, LOOP_TILES), T % LOOP_TILES)
      out_ref[...] = sum_ref[...].astype(dtype)

  return kernel


def product(lhs: Quantized, rhs: Quantized, dtype, power_of_two_scales: bool = False):
  """See `reference.product`."""
  M, K = lhs.codes.shape
  N, T = rhs.codes.shape[1], pl.cdiv(K, TILE)
  m, n, tiles = step_of(M, N, T, jnp.dtype(dtype).itemsize)
  k = tiles * TILE
  codes_MK = jnp.pad(lhs.codes, ((0, 0), (0, T * TILE - K)))
  codes_KN = jnp.pad(rhs.codes, ((0, T * TILE - K), (0, 0)))
  grid = (pl.cdiv(N, n), pl.cdiv(M, m), pl.cdiv(T, tiles))
  [y_MN] = call(
    product_kernel(T, tiles, dtype, power_of_two_scales),
    "quantized_matmul",
    grid,
    [codes_MK, lhs.scale, codes_KN, rhs.scale],
    [out((M, N), dtype, *lhs, *rhs)],
    [
      pl.BlockSpec((m, k), lambda j, i, s: (i, s)),
      pl.BlockSpec((tiles, m), lambda j, i, s: (s, i)),
      pl.BlockSpec((k, n), lambda j, i, s: (s, j)),
      pl.BlockSpec((tiles, n), lambda j, i, s: (s, j)),
    ],
    [pl.BlockSpec((m, n), lambda j, i, s: (i, j))],
    flops=2 * grid[0] * n * grid[1] * m * T * TILE,
    scratch=[pltpu.VMEM((m, n), f32)],
  )
  return y_MN
