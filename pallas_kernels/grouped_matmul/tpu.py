"""Grouped matmuls for TPU (Mosaic): tiles of rows, each times its own expert's matrices.

Groups start at multiples of a tile's rows, so that a tile belongs to one expert and none is
visited twice; rows between a group's end and the next tile are computed and never looked at.
A grid step holds whole contractions: rows [m, K] and columns [K, n] of an expert's matrix, so
that nothing is carried between steps. Consecutive tiles of an expert reuse its columns.

Shapes: P rows, D hidden, F inner, E experts, K contraction, N columns, T tiles, m rows of a
tile, n columns of a step.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import traffic
from pallas_kernels.permute import tpu as permute

VMEM_BYTES = 56 * 2**20  # of the 64 MiB of a tpu7x device, the smallest of the chips supported
LANES = 128
BLOCK_COLUMNS = 256  # a multiple of every chip's product

UNROLL = 8  # products of one tile's rows alone are short: their ends overlap

f32, u32 = jnp.float32, jnp.uint32


def tile_rows(rows_per_group: float) -> int:
  """Returns a tile's rows: half a tile a group is lost on average, an eighth unless groups are small.

  At least 128, since the rows' weights lie along lanes.
  """
  tile = 512
  while tile > LANES and tile * 4 > rows_per_group:
    tile //= 2
  return tile


class Schedule(NamedTuple):
  """Which tile of rows each step visits, and for which expert."""

  expert_T: Any  # int32
  tile_T: Any  # int32
  end_T: Any  # int32, the end of the expert's rows
  num_steps: Any  # int32 scalar; steps after it are not taken


def schedule(sizes_E, starts_E, num_rows: int, tile: int, every_group: bool = False, xp: Any = jnp):
  """Lists the tiles that hold rows, expert by expert.

  Args:
    sizes_E, starts_E: int32, each group's rows and its first, a multiple of `tile`.
    num_rows: P, a multiple of `tile`.
    every_group: visit a tile for an empty group too, whose gradient must be written as zeros.
    xp: jnp, or np where the sizes are known.
  """
  E, T = sizes_E.shape[0], num_rows // tile
  visits_E = (sizes_E + tile - 1) // tile
  if every_group:
    visits_E, T = xp.maximum(visits_E, 1), T + E
  last_E = xp.cumsum(visits_E)
  step_T = xp.arange(T, dtype=xp.int32)
  expert_T = xp.minimum(xp.searchsorted(last_E, step_T, side="right"), E - 1).astype(xp.int32)
  within_T = step_T - (last_E - visits_E)[expert_T]
  tile_T = xp.minimum(starts_E[expert_T] // tile + within_T, num_rows // tile - 1)
  end_T = (starts_E + sizes_E)[expert_T]
  return Schedule(expert_T, tile_T.astype(xp.int32), end_T.astype(xp.int32), last_E[-1])


def _full_schedule(E: int, num_rows: int, tile: int, every_group: bool) -> Schedule:
  """The one that costs are counted for: every tile full, experts equally loaded."""
  T = num_rows // tile
  tiles_E = T // E + (np.arange(E) < T % E)
  starts_E = (np.cumsum(tiles_E) - tiles_E) * tile
  return schedule(tiles_E * tile, starts_E, num_rows, tile, every_group, np)


def _step_columns(N: int, fixed_bytes: int, bytes_per_column: int, multiple: int = LANES) -> int:
  """Returns n: the fewest steps that fit VMEM, among those that waste the fewest columns."""
  if N <= multiple:
    return N
  most = (VMEM_BYTES - fixed_bytes) // bytes_per_column // multiple * multiple
  if most < multiple:
    raise ValueError(
      f"{multiple} columns of {bytes_per_column} bytes and {fixed_bytes} bytes of rows must fit "
      f"VMEM ({VMEM_BYTES} bytes)"
    )
  choices = range(multiple, min(most, pl.cdiv(N, multiple) * multiple) + 1, multiple)
  return min(choices, key=lambda n: (pl.cdiv(N, n) * n, -n))


class Matrix(NamedTuple):
  """An expert's matrices as an operand: [E, K, N], or [E, N, K] when transposed."""

  array: Any
  transposed: bool = False


class Product(NamedTuple):
  """What one loop step multiplies to: as wide as the matrix unit, without spilling registers."""

  rows: int
  columns: int


def _product() -> Product:
  """Returns the chip's, by what the compiler spills; v5p's for a chip unknown."""
  try:
    chip = pltpu.get_tpu_info()
  except ValueError:
    return Product(256, 128)
  if chip.mxu_column_size == 128:
    return Product(256, 128)
  return Product(128 if chip.generation == 6 else 256, 256)


def _each_block(
  num_rows: int, num_columns: int, product: Callable, size: Product, unroll: int = 1
) -> None:
  """Calls product(rows, columns) on blocks of one product's size: a loop, or once if small."""
  m, columns = min(num_rows, size.rows), size.columns
  if num_columns % columns:
    columns = num_columns

  def row_block(i, _):
    def block(j, _):
      product(
        pl.ds(pl.multiple_of(i * m, m), m), pl.ds(pl.multiple_of(j * columns, columns), columns)
      )

    jax.lax.fori_loop(0, num_columns // columns, block, None, unroll=unroll)

  if (num_rows, num_columns) == (m, columns):
    product(pl.ds(0, m), pl.ds(0, columns))
  else:
    jax.lax.fori_loop(0, num_rows // m, row_block, None)


def _width(rows) -> int:
  """Returns the columns of rows that may be words of two."""
  return 2 * rows.shape[1] if rows.dtype == u32 else rows.shape[1]


def _share(n: int, rows) -> int:
  """Returns how many of an array's own columns n columns are."""
  return n // 2 if rows.dtype == u32 else n


def _unpack_into(scratch_ref, ref) -> None:
  """Rows as they travelled to rows in the dtype of the matrices."""
  if ref.dtype != u32:
    scratch_ref[...] = ref[...].astype(scratch_ref.dtype)
    return
  for c in range(0, ref.shape[1], LANES):
    for h, half in enumerate(permute.unpack_halves(ref[:, c : c + LANES])):
      own = slice(2 * c + h * LANES, 2 * c + (h + 1) * LANES)
      scratch_ref[:, own] = half.astype(scratch_ref.dtype)


def _dot(rows_mK, matrix, transposed: bool = False):
  dims = (((1,), (1 if transposed else 0,)), ((), ()))
  return jax.lax.dot_general(rows_mK, matrix, dims, preferred_element_type=f32)


def _column(row_1m):
  """[1, m] to [m, 1]: one number a row, kept compact in memory."""
  return jnp.broadcast_to(row_1m, (8, row_1m.shape[1])).T[:, :1]


def row(column_m1):
  """[m, 1] to [1, m]."""
  return jnp.broadcast_to(column_m1, (column_m1.shape[0], LANES)).T[:1]


def over_rows(
  body: Callable, plan, tile: int, rows, matrices, extras=(), weight=None, outs=(), sums=False
):
  """Runs `body` on each tile of rows and block of columns.

  Args:
    body: (each product, extras, weight_m1) -> the outputs' values, [m, n] each, all float32, and
      with `sums` a [1, m] to be summed over columns.
    plan: (sizes_E, starts_E).
    rows, matrices: arrays [P, K] (or their words), one for each `Matrix` or one for all.
    extras: arrays [P, N].
    weight: float32 [P] or None.
    outs: the dtype of each output [P, N]; uint32 stands for words.
    sums: whether an output [N / n, 1, P] float32 follows.
  """
  P, dtype = rows[0].shape[0], matrices[0].array.dtype
  E = matrices[0].array.shape[0]
  N = matrices[0].array.shape[1 if matrices[0].transposed else 2]
  out_shape = [jax.ShapeDtypeStruct((P, N // 2 if d == u32 else N), d) for d in outs]
  packed = u32 in outs
  K = [_width(x) for x in rows]
  size = dtype.itemsize
  travelled = [k for k, x in zip(K, rows) if x.dtype != dtype]
  fixed = tile * sum(2 * x.shape[1] * x.dtype.itemsize for x in rows) + tile * sum(travelled) * size
  a_column = 2 * sum(m.array.size // (E * N) for m in matrices) * size
  a_column += tile * (2 * (len(extras) * size + sum(np.dtype(d).itemsize for d in outs)))
  a_column += tile * 4 * (len(matrices) + packed)
  chip = _product()
  n = _step_columns(N, fixed, a_column, BLOCK_COLUMNS if packed else chip.columns)
  steps_n = pl.cdiv(N, n)

  by_row = lambda j, t, e, r, end: (r[t], 0)  # noqa: E731
  by_both = lambda j, t, e, r, end: (r[t], j)  # noqa: E731
  in_specs = [pl.BlockSpec((tile, x.shape[1]), by_row) for x in rows]
  in_specs += [
    pl.BlockSpec((None, n, m.array.shape[2]), lambda j, t, e, r, end: (e[t], j, 0))
    if m.transposed
    else pl.BlockSpec((None, m.array.shape[1], n), lambda j, t, e, r, end: (e[t], 0, j))
    for m in matrices
  ]
  in_specs += [pl.BlockSpec((tile, n), by_both)] * len(extras)
  operands = [*rows, *(m.array for m in matrices), *extras]
  if weight is not None:
    in_specs.append(pl.BlockSpec((1, tile), lambda j, t, e, r, end: (0, r[t])))
    operands.append(weight[None])
  out_specs = [pl.BlockSpec((tile, _share(n, out)), by_both) for out in out_shape]
  if sums:
    out_specs.append(pl.BlockSpec((None, 1, tile), lambda j, t, e, r, end: (j, 0, r[t])))
    out_shape.append(jax.ShapeDtypeStruct((steps_n, 1, P), f32))
  scratch = [pltpu.VMEM((tile, k), dtype) for k in travelled]
  scratch += [pltpu.VMEM((tile, n), f32)] * (len(matrices) - 1 + packed)

  def kernel(expert_T, tile_T, end_T, *refs):
    del expert_T, tile_T, end_T
    left = iter(refs)
    take = lambda count: [next(left) for _ in range(count)]  # noqa: E731
    row_refs, matrix_refs, extra_refs = take(len(rows)), take(len(matrices)), take(len(extras))
    weight_ref = None if weight is None else next(left)
    out_refs, plain_refs, found_refs = take(len(out_specs)), take(len(travelled)), list(left)

    plain = iter(plain_refs)
    for i, ref in enumerate(row_refs):
      if ref.dtype != dtype:
        row_refs[i] = next(plain)
        _unpack_into(row_refs[i], ref)

    def product(i, own_rows, own_columns):
      row_ref, matrix_ref = row_refs[min(i, len(rows) - 1)], matrix_refs[i]
      transposed = matrices[i].transposed
      block = matrix_ref[own_columns, :] if transposed else matrix_ref[:, own_columns]
      return _dot(row_ref[own_rows, :], block, transposed)

    def keep(i, own_rows, own_columns):
      found_refs[i][own_rows, own_columns] = product(i, own_rows, own_columns)

    def results(own_rows, own_columns):
      last = len(matrices) - 1
      found = [ref[own_rows, own_columns] for ref in found_refs[:last]]
      found.append(product(last, own_rows, own_columns))
      values = [ref[own_rows, own_columns] for ref in extra_refs]
      weights = [] if weight_ref is None else [_column(weight_ref[:, own_rows])]
      return body(*found, *values, *weights)

    def finish(own_rows, own_columns):
      values = results(own_rows, own_columns)
      for ref, value in zip(out_refs[: len(outs)], values):
        ref[own_rows, own_columns] = value.astype(ref.dtype)
      if sums:
        out_refs[-1][:, own_rows] += values[-1]

    def finish_words(own_rows, own_columns):
      first = own_columns.start
      word = pl.ds(pl.multiple_of(jax.lax.div(first, 2), LANES), LANES)
      if chip.columns == 2 * LANES:
        value = results(own_rows, own_columns)[0]
        out_refs[0][own_rows, word] = permute.pack_halves(value[:, :LANES], value[:, LANES:])
        return
      halves = [pl.ds(pl.multiple_of(first + h * LANES, LANES), LANES) for h in range(2)]
      for half in halves:
        found_refs[-1][own_rows, half] = results(own_rows, half)[0]
      out_refs[0][own_rows, word] = permute.pack_halves(
        *(found_refs[-1][own_rows, half] for half in halves)
      )

    if sums:
      out_refs[-1][...] = jnp.zeros_like(out_refs[-1])
    # A loop for each product: two in one would not fit the registers.
    for i in range(len(matrices) - 1):
      _each_block(tile, n, functools.partial(keep, i), chip)
    if packed:
      _each_block(tile, n, finish_words, chip._replace(columns=BLOCK_COLUMNS))
    else:
      _each_block(tile, n, finish, chip)

  full = _full_schedule(E, P, tile, False)
  flops = 2 * P * steps_n * n * sum(m.array.size // (E * N) for m in matrices)
  moved = traffic.bytes_moved(
    (steps_n, int(full.num_steps)),
    list(zip([*operands, *out_shape], in_specs + out_specs)),
    full[:3],
  )
  sizes_E, starts_E = plan
  steps = schedule(sizes_E, starts_E, P, tile)
  return pl.pallas_call(
    kernel,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=3,
      grid=(steps_n, steps.num_steps),
      in_specs=in_specs,
      out_specs=out_specs,
      scratch_shapes=scratch,
    ),
    out_shape=traffic.varying_like([*steps[:3], *operands], out_shape),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES + 2**22
    ),
    cost_estimate=pl.CostEstimate(
      flops=flops, bytes_accessed=moved, transcendentals=P * N * len(extras or matrices[1:])
    ),
    name="grouped_matmul_rows",
  )(*steps[:3], *operands)


def over_groups(lhs, rhs, plan, tile: int, dtype):
  """Returns lhs^T rhs of each group's rows, [E, K, N] in `dtype` for each of rhs [P, N]."""
  P, K, N = lhs.shape[0], _width(lhs), _width(rhs[0])
  E = plan[0].shape[0]
  size = np.dtype(dtype).itemsize
  travels = [x.dtype != dtype for x in (lhs, *rhs)]
  # bytes of a row and column: what comes in, twice, and its plain form
  column = lambda x: 2 * x.shape[1] * x.dtype.itemsize // _width(x) + size * (x.dtype != dtype)  # noqa: E731
  of_rhs = tile * sum(column(x) for x in rhs)
  n = _step_columns(N, 0, BLOCK_COLUMNS * len(rhs) * (4 + 2 * size) + of_rhs, BLOCK_COLUMNS)
  of_lhs = tile * (column(lhs) + size)
  k = _step_columns(K, n * of_rhs, of_lhs + len(rhs) * n * (4 + 2 * size), BLOCK_COLUMNS)
  grid_k, grid_n = pl.cdiv(K, k), pl.cdiv(N, n)

  in_specs = [
    pl.BlockSpec((tile, _share(k, lhs)), lambda i, j, t, e, r, end: (r[t], i)),
    *(pl.BlockSpec((tile, _share(n, x)), lambda i, j, t, e, r, end: (r[t], j)) for x in rhs),
  ]
  out_specs = [pl.BlockSpec((None, k, n), lambda i, j, t, e, r, end: (e[t], i, j))] * len(rhs)
  out_shape = [jax.ShapeDtypeStruct((E, K, N), dtype)] * len(rhs)
  sizes_E, starts_E = plan
  steps = schedule(sizes_E, starts_E, P, tile, every_group=True)

  def kernel(expert_T, tile_T, end_T, *refs):
    left_refs = iter(refs)
    take = lambda count: [next(left_refs) for _ in range(count)]  # noqa: E731
    in_refs, out_refs, sum_refs = take(1 + len(rhs)), take(len(rhs)), take(len(rhs))
    turned_km, plain = next(left_refs), left_refs
    t, num_steps = pl.program_id(2), pl.num_programs(2)
    expert = expert_T[t]
    first = (t == 0) | (expert_T[jnp.maximum(t - 1, 0)] != expert)
    last = (t == num_steps - 1) | (expert_T[jnp.minimum(t + 1, num_steps - 1)] != expert)

    @pl.when(first)
    def _():
      for sum_ref in sum_refs:
        sum_ref[...] = jnp.zeros_like(sum_ref)

    for i, ref in enumerate(in_refs):
      if travels[i]:
        in_refs[i] = next(plain)
        _unpack_into(in_refs[i], ref)
    lhs_ref, *rhs_refs = in_refs
    # Rows behind the group's may hold anything, NaN too.
    left = end_T[t] - tile_T[t] * tile

    def own(block):
      row = jax.lax.broadcasted_iota(jnp.int32, block.shape, 0)
      return jnp.where(row < left, block, jnp.zeros((), block.dtype))

    turned_km[...] = own(lhs_ref[...]).T

    def add(rhs_ref, sum_ref, own_k, own_n):
      sum_ref[own_k, own_n] += _dot(turned_km[own_k, :], own(rhs_ref[:, own_n]))

    for rhs_ref, sum_ref in zip(rhs_refs, sum_refs):
      _each_block(k, n, functools.partial(add, rhs_ref, sum_ref), _product(), UNROLL)

    @pl.when(last)
    def _():
      for out_ref, sum_ref in zip(out_refs, sum_refs):
        out_ref[...] = sum_ref[...].astype(out_ref.dtype)

  full = _full_schedule(E, P, tile, True)
  num_steps = int(full.num_steps)
  moved = traffic.bytes_moved(
    (grid_k, grid_n, num_steps),
    list(zip([lhs, *rhs, *out_shape], in_specs + out_specs)),
    full[:3],
  )
  plain_shapes = [(tile, w) for w, moves in zip((k, *[n] * len(rhs)), travels) if moves]
  return pl.pallas_call(
    kernel,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=3,
      grid=(grid_k, grid_n, steps.num_steps),
      in_specs=in_specs,
      out_specs=out_specs,
      scratch_shapes=[
        *[pltpu.VMEM((k, n), f32)] * len(rhs),
        *(pltpu.VMEM(shape, dtype) for shape in [(k, tile), *plain_shapes]),
      ],
    ),
    out_shape=traffic.varying_like([*steps[:3], lhs, *rhs], out_shape),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES + 2**22
    ),
    cost_estimate=pl.CostEstimate(
      flops=2 * num_steps * tile * grid_k * k * grid_n * n * len(rhs),
      bytes_accessed=moved,
      transcendentals=0,
    ),
    name="grouped_matmul_weights",
  )(*steps[:3], lhs, *rhs)
