"""Grouped matmuls for TPU (Mosaic): tiles of rows, each times its own expert's matrices.

Groups start at multiples of a tile's rows, so that a tile belongs to one expert and none is
visited twice; rows between a group's end and the next tile are computed and never looked at.
A grid step holds whole contractions: rows [m, K] and columns [K, n] of an expert's matrix, so
that nothing is carried between steps. Consecutive tiles of an expert, a run, reuse its columns;
those of the next run arrive meanwhile, in the memory of one matrix more than a step needs.

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
  run_T: Any  # int32, how many experts came before
  next_T: Any  # int32, the expert that comes next, -1 after the last
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
  run_T = (xp.cumsum(visits_E > 0) - 1)[expert_T]
  after_T = last_E[expert_T]
  next_T = xp.where(after_T < last_E[-1], expert_T[xp.minimum(after_T, T - 1)], -1)
  tile_T, end_T, run_T, next_T = (a.astype(xp.int32) for a in (tile_T, end_T, run_T, next_T))
  return Schedule(expert_T, tile_T, end_T, run_T, next_T, last_E[-1])


def _full_schedule(E: int, num_rows: int, tile: int, every_group: bool) -> Schedule:
  """The one that costs are counted for: every tile full, experts equally loaded."""
  T = num_rows // tile
  tiles_E = T // E + (np.arange(E) < T % E)
  starts_E = (np.cumsum(tiles_E) - tiles_E) * tile
  return schedule(tiles_E * tile, starts_E, num_rows, tile, every_group, np)


def _step_columns(
  N: int, fixed_bytes: int, bytes_per_column: int, multiple: int = LANES, product: int = LANES
) -> int | None:
  """Returns n, which divides N: of those that fit VMEM one of the fewest products, then steps."""
  most = (VMEM_BYTES - fixed_bytes) // bytes_per_column
  fitting = [n for n in {*range(multiple, N, multiple), N} if n <= most and N % n == 0]
  return min(fitting, key=lambda n: (N // n * pl.cdiv(n, product), -n), default=None)


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


def _blocks(length: int, size: int, body: Callable, unroll: int = 1) -> None:
  """Calls body(slice) on slices of one size, and on what is left."""
  whole, rest = divmod(length, size)

  def block(i, _):
    body(pl.ds(pl.multiple_of(i * size, size), size))

  if whole == 1:
    body(pl.ds(0, size))
  elif whole:
    jax.lax.fori_loop(0, whole, block, None, unroll=unroll)
  if rest:
    body(pl.ds(whole * size, rest))


def _each_block(
  num_rows: int, num_columns: int, product: Callable, size: Product, unroll: int = 1
) -> None:
  """Calls product(rows, columns) on blocks of one product's size."""

  def row_block(rows):
    _blocks(num_columns, size.columns, functools.partial(product, rows), unroll)

  _blocks(num_rows, size.rows, row_block)


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


def _fit_rows(N: int, tile: int, row_bytes: int, column_bytes: int, block_bytes: int, **columns):
  """Returns (m, n): a tile's rows, or half of them where that makes steps fewer, and columns.

  Args:
    row_bytes, column_bytes, block_bytes: of a row, of a column, and of both at once.
    columns: `multiple` and `product`.
  """
  tiles = [m for m in (tile, tile // 2) if m == tile or m % _product().rows == 0]
  fitting = [
    (m, n)
    for m in tiles
    if (n := _step_columns(N, m * row_bytes, column_bytes + m * block_bytes, **columns))
  ]
  if not fitting:
    raise ValueError(
      f"{tile} rows of {row_bytes} bytes and columns of {column_bytes} must fit VMEM "
      f"({VMEM_BYTES} bytes) with a divisor of {N} columns"
    )
  return min(fitting, key=lambda fit: N // fit[1])


class _Runs:
  """The columns of the matrices of each run, fetched while the run before is computed."""

  def __init__(self, schedule_refs, matrix_refs, slots_ref, arrived, n: int, transposed: bool):
    self.expert_T, _, self.run_T, self.next_T = schedule_refs
    self.matrix_refs, self.slots_ref, self.arrived = matrix_refs, slots_ref, arrived
    self.n, self.transposed = n, transposed
    self.j, self.t = pl.program_id(0), pl.program_id(1)
    self.run, last = self.run_T[self.t], pl.num_programs(1) - 1
    self.first = (self.t == 0) | (self.run_T[jnp.maximum(self.t - 1, 0)] != self.run)
    self.last = (self.t == last) | (self.run_T[jnp.minimum(self.t + 1, last)] != self.run)

  def slot(self, i: int, run):
    """Returns where matrix i of a run lies: where the one that came that many before it lay."""
    return jax.lax.rem(run * len(self.matrix_refs) + i, len(self.matrix_refs) + 1)

  def _copy(self, i: int, run, expert):
    whole, n = slice(None), self.n
    N = self.matrix_refs[i].shape[1 if self.transposed else 2]
    own = whole if n == N else pl.ds(pl.multiple_of(self.j * n, n), n)
    block = (own, whole) if self.transposed else (whole, own)
    slot = self.slot(i, run)
    source = self.matrix_refs[i].at[(expert, *block)]
    return pltpu.make_async_copy(source, self.slots_ref.at[slot], self.arrived.at[slot])

  def _fetch_next(self, i: int, when):
    @pl.when(when & (self.next_T[self.t] >= 0))
    def _():
      self._copy(i, self.run + 1, self.next_T[self.t]).start()

  def begin(self):
    @pl.when(self.t == 0)
    def _():
      for i in range(len(self.matrix_refs)):
        self._copy(i, self.run, self.expert_T[0]).start()

    self._fetch_next(0, self.first)

  def matrix(self, i: int):
    """Returns the columns of matrix i, having waited for them."""

    @pl.when(self.first)
    def _():
      self._copy(i, self.run, self.expert_T[self.t]).wait()

    return self.slots_ref.at[self.slot(i, self.run)]

  def done(self, i: int):
    """Gives the memory of matrix i away: the run needs it no more after its last tile."""
    if i + 1 < len(self.matrix_refs):
      self._fetch_next(i + 1, self.last)


def over_rows(
  body: Callable,
  plan,
  tile: int,
  rows,
  matrices,
  extras=(),
  weight=None,
  outs=(),
  transposed=False,
  sums=False,
):
  """Runs `body` on each tile of rows and block of columns.

  Args:
    body: (each product, extras, weight_m1) -> the outputs' values, [m, n] each, all float32, and
      with `sums` a [1, m] to be summed over columns.
    plan: (sizes_E, starts_E).
    rows, matrices: arrays [P, K] (or their words), one for each [E, K, N] or one for all.
    extras: arrays [P, N].
    weight: float32 [P] or None.
    outs: the dtype of each output [P, N]; uint32 stands for words.
    transposed: whether the matrices are [E, N, K].
    sums: whether an output [N / n, 1, P] float32 follows.
  """
  P, dtype = rows[0].shape[0], matrices[0].dtype
  E, K, N = matrices[0].shape
  if transposed:
    K, N = N, K
  out_shape = [jax.ShapeDtypeStruct((P, N // 2 if d == u32 else N), d) for d in outs]
  packed = u32 in outs
  size = dtype.itemsize
  travelled = sum(x.dtype != dtype for x in rows)
  chip = _product()
  tile, n = _fit_rows(
    *(N, tile),
    row_bytes=sum(2 * x.shape[1] * x.dtype.itemsize for x in rows) + travelled * K * size,
    column_bytes=(len(matrices) + 1) * K * size,
    block_bytes=2 * (len(extras) * size + sum(np.dtype(d).itemsize for d in outs))
    + 4 * (len(matrices) - 1 + packed),
    multiple=BLOCK_COLUMNS if packed else LANES,
    product=chip.columns,
  )

  by_row = lambda j, t, e, r, *_: (r[t], 0)  # noqa: E731
  by_both = lambda j, t, e, r, *_: (r[t], j)  # noqa: E731
  row_specs = [pl.BlockSpec((tile, x.shape[1]), by_row) for x in rows]
  # What is counted; `_Runs` fetches them.
  matrix_specs = [
    pl.BlockSpec((None, n, K), lambda j, t, e, *_: (e[t], j, 0))
    if transposed
    else pl.BlockSpec((None, K, n), lambda j, t, e, *_: (e[t], 0, j))
  ] * len(matrices)
  other_specs = [pl.BlockSpec((tile, n), by_both)] * len(extras)
  operands = [*rows, *matrices, *extras]
  if weight is not None:
    other_specs.append(pl.BlockSpec((1, tile), lambda j, t, e, r, *_: (0, r[t])))
    operands.append(weight[None])
  out_specs = [pl.BlockSpec((tile, _share(n, out)), by_both) for out in out_shape]
  if sums:
    out_specs.append(pl.BlockSpec((None, 1, tile), lambda j, t, e, r, *_: (j, 0, r[t])))
    out_shape.append(jax.ShapeDtypeStruct((N // n, 1, P), f32))
  slots = len(matrices) + 1
  scratch = [pltpu.VMEM((slots, n, K) if transposed else (slots, K, n), dtype)]
  scratch.append(pltpu.SemaphoreType.DMA((slots,)))
  scratch += [pltpu.VMEM((tile, K), dtype)] * travelled
  scratch += [pltpu.VMEM((tile, n), f32)] * (len(matrices) - 1 + packed)

  def kernel(*refs):
    left = iter(refs)
    take = lambda count: [next(left) for _ in range(count)]  # noqa: E731
    schedule_refs, row_refs, matrix_refs = take(4), take(len(rows)), take(len(matrices))
    extra_refs, weight_ref = take(len(extras)), None if weight is None else next(left)
    out_refs, (slots_ref, arrived), plain_refs = take(len(out_specs)), take(2), take(travelled)
    found_refs = list(left)
    runs = _Runs(schedule_refs, matrix_refs, slots_ref, arrived, n, transposed)
    runs.begin()

    plain = iter(plain_refs)
    for i, ref in enumerate(row_refs):
      if ref.dtype != dtype:
        row_refs[i] = next(plain)
        _unpack_into(row_refs[i], ref)

    def product(i, matrix_ref, own_rows, own_columns):
      row_ref = row_refs[min(i, len(rows) - 1)]
      block = matrix_ref[own_columns, :] if transposed else matrix_ref[:, own_columns]
      return _dot(row_ref[own_rows, :], block, transposed)

    def keep(i, matrix_ref, own_rows, own_columns):
      found_refs[i][own_rows, own_columns] = product(i, matrix_ref, own_rows, own_columns)

    # A loop for each product: two in one would not fit the registers.
    last = len(matrices) - 1
    for i in range(last):
      _each_block(tile, n, functools.partial(keep, i, runs.matrix(i)), chip)
      runs.done(i)
    last_ref = runs.matrix(last)

    def results(own_rows, own_columns):
      found = [ref[own_rows, own_columns] for ref in found_refs[:last]]
      found.append(product(last, last_ref, own_rows, own_columns))
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
    if packed:
      _each_block(tile, n, finish_words, chip._replace(columns=BLOCK_COLUMNS))
    else:
      _each_block(tile, n, finish, chip)

  def lists(steps: Schedule):
    return steps.expert_T, steps.tile_T, steps.run_T, steps.next_T

  full = _full_schedule(E, P, tile, False)
  specs = row_specs + matrix_specs + other_specs + out_specs
  moved = traffic.bytes_moved(
    (N // n, int(full.num_steps)), list(zip([*operands, *out_shape], specs)), lists(full)
  )
  sizes_E, starts_E = plan
  steps = schedule(sizes_E, starts_E, P, tile)
  return pl.pallas_call(
    kernel,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=4,
      grid=(N // n, steps.num_steps),
      in_specs=row_specs + [pl.BlockSpec(memory_space=pl.ANY)] * len(matrices) + other_specs,
      out_specs=out_specs,
      scratch_shapes=scratch,
    ),
    out_shape=traffic.varying_like([*lists(steps), *operands], out_shape),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES + 2**22
    ),
    cost_estimate=pl.CostEstimate(
      flops=2 * P * N * K * len(matrices),
      bytes_accessed=moved,
      transcendentals=P * N * len(extras or matrices[1:]),
    ),
    name=f"grouped_matmul_rows_{K}x{N}x{len(matrices)}",
  )(*lists(steps), *operands)


def over_groups(lhs, rhs, plan, tile: int, dtype):
  """Returns lhs^T rhs of each group's rows, [E, K, N] in `dtype` for each of rhs [P, N]."""
  P, K, N = lhs.shape[0], _width(lhs), _width(rhs[0])
  E = plan[0].shape[0]
  size = np.dtype(dtype).itemsize
  travels = [x.dtype != dtype for x in (lhs, *rhs)]
  # bytes of a row and column: what comes in, twice, and its plain form
  column = lambda x: 2 * x.shape[1] * x.dtype.itemsize // _width(x) + size * (x.dtype != dtype)  # noqa: E731
  of_rhs = tile * sum(column(x) for x in rhs)
  multiple = BLOCK_COLUMNS if any(travels) else LANES
  of_sum = len(rhs) * (4 + 2 * size)
  n = _step_columns(N, 0, min(K, BLOCK_COLUMNS) * of_sum + of_rhs, multiple, _product().columns)
  of_lhs = tile * (column(lhs) + size)
  k = n and _step_columns(K, n * of_rhs, of_lhs + n * of_sum, multiple, _product().rows)
  if not n or not k:
    raise ValueError(
      f"{tile} rows and a block of a [{K}, {N}] gradient, whose sides divide it and are multiples "
      f"of {multiple} or the whole, must fit VMEM ({VMEM_BYTES} bytes)"
    )
  grid_k, grid_n = K // k, N // n

  in_specs = [
    pl.BlockSpec((tile, _share(k, lhs)), lambda i, j, t, e, r, _: (r[t], i)),
    *(pl.BlockSpec((tile, _share(n, x)), lambda i, j, t, e, r, _: (r[t], j)) for x in rhs),
  ]
  out_specs = [pl.BlockSpec((None, k, n), lambda i, j, t, e, r, _: (e[t], i, j))] * len(rhs)
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
      flops=2 * num_steps * tile * K * N * len(rhs),
      bytes_accessed=moved,
      transcendentals=0,
    ),
    name=f"grouped_matmul_weights_{K}x{N}x{len(rhs)}",
  )(*steps[:3], lhs, *rhs)
