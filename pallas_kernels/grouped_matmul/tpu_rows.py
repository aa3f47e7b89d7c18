"""Grouped matmuls for TPU (Mosaic): tiles of rows, each times its own expert's matrices.

A grid step holds whole contractions: rows [m, K] and columns [K, n] of an expert's matrix, so
that nothing is carried between steps. Consecutive tiles of an expert, a run, reuse its columns;
those of the next run arrive meanwhile, in the memory of one matrix more than a step needs.

Shapes: P rows, E experts, K contraction, N columns, m rows of a tile, n columns of a step.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import traffic
from pallas_kernels.grouped_matmul import tpu_tiles as tiles
from pallas_kernels.grouped_matmul.tpu_tiles import LANES
from pallas_kernels.permute import tpu as permute
from pallas_kernels.varying import varying_like

f32, u32 = jnp.float32, jnp.uint32


def _fit_rows(N: int, tile: int, row_bytes: int, column_bytes: int, block_bytes: int, **columns):
  """Returns (m, n): the rows, a tile's or half of it where that needs fewer steps, and columns.

  Args:
    row_bytes, column_bytes, block_bytes: VMEM that a row, a column, and an element take.
    columns: `multiple` and `product`.
  """
  heights = [m for m in (tile, tile // 2) if m == tile or m % tiles.chip_product().rows == 0]
  fitting = [
    (m, n)
    for m in heights
    if (n := tiles.step_columns(N, m * row_bytes, column_bytes + m * block_bytes, **columns))
  ]
  if not fitting:
    raise ValueError(
      f"{tile} rows of {row_bytes} bytes and columns of {column_bytes} must fit VMEM "
      f"({tiles.VMEM_BYTES} bytes) with a divisor of {N} columns"
    )
  return min(fitting, key=lambda fit: N // fit[1])


def fit(tile: int, rows, matrices, extras, outs, transposed: bool = False) -> tuple[int, int]:
  """Returns the rows and columns of a grid step of `over_rows`, whose arguments these are.

  Of arrays only shapes and dtypes count.

  Raises:
    ValueError: where no step fits VMEM.
  """
  dtype, (_, K, N) = matrices[0].dtype, matrices[0].shape
  if transposed:
    K, N = N, K
  size, packed = dtype.itemsize, u32 in outs
  travelled = sum(x.dtype != dtype for x in rows)
  out_bytes = sum(np.dtype(d).itemsize for d in outs)
  return _fit_rows(
    N,
    tile,
    row_bytes=sum(2 * x.shape[1] * x.dtype.itemsize for x in rows) + travelled * K * size,
    column_bytes=(len(matrices) + 1) * K * size,
    block_bytes=2 * (len(extras) * size + out_bytes) + 4 * (len(matrices) - 1 + packed),
    multiple=tiles.BLOCK_COLUMNS if packed else LANES,
    product=tiles.chip_product().columns,
  )


class _Runs:
  """The columns of the matrices of each run, fetched while the run before it is computed."""

  def __init__(self, schedule_refs, matrix_refs, slots_ref, arrived, n: int, transposed: bool):
    self.expert_T, _, self.run_T, self.next_T = schedule_refs
    self.matrix_refs, self.slots_ref, self.arrived = matrix_refs, slots_ref, arrived
    self.n, self.transposed = n, transposed
    self.j, self.t = pl.program_id(0), pl.program_id(1)
    self.run, last = self.run_T[self.t], pl.num_programs(1) - 1
    self.first = (self.t == 0) | (self.run_T[jnp.maximum(self.t - 1, 0)] != self.run)
    self.last = (self.t == last) | (self.run_T[jnp.minimum(self.t + 1, last)] != self.run)

  def slot(self, i: int, run):
    """Returns the slot that holds matrix i of a run; slots are reused in turn."""
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
    """Waits for the columns of matrix i and returns them."""

    @pl.when(self.first)
    def _():
      self._copy(i, self.run, self.expert_T[self.t]).wait()

    return self.slots_ref.at[self.slot(i, self.run)]

  def done(self, i: int):
    """Frees the memory of matrix i, which the run does not need after its last tile."""
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
  travelled = sum(x.dtype != dtype for x in rows)
  chip = tiles.chip_product()
  tile, n = fit(tile, rows, matrices, extras, outs, transposed)

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
  out_specs = [pl.BlockSpec((tile, tiles.share(n, out)), by_both) for out in out_shape]
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
        tiles.unpack_into(row_refs[i], ref)

    def product(i, matrix_ref, own_rows, own_columns):
      row_ref = row_refs[min(i, len(rows) - 1)]
      block = matrix_ref[own_columns, :] if transposed else matrix_ref[:, own_columns]
      return tiles.dot(row_ref[own_rows, :], block, transposed)

    def keep(i, matrix_ref, own_rows, own_columns):
      found_refs[i][own_rows, own_columns] = product(i, matrix_ref, own_rows, own_columns)

    # A loop for each product: two in one would not fit the registers.
    last = len(matrices) - 1
    for i in range(last):
      tiles.each_block(tile, n, functools.partial(keep, i, runs.matrix(i)), chip)
      runs.done(i)
    last_ref = runs.matrix(last)

    def results(own_rows, own_columns):
      found = [ref[own_rows, own_columns] for ref in found_refs[:last]]
      found.append(product(last, last_ref, own_rows, own_columns))
      values = [ref[own_rows, own_columns] for ref in extra_refs]
      weights = [] if weight_ref is None else [tiles.column_of(weight_ref[:, own_rows])]
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
      low, high = (found_refs[-1][own_rows, half] for half in halves)
      out_refs[0][own_rows, word] = permute.pack_halves(low, high)

    if sums:
      out_refs[-1][...] = jnp.zeros_like(out_refs[-1])
    if packed:
      tiles.each_block(tile, n, finish_words, chip._replace(columns=tiles.BLOCK_COLUMNS))
    else:
      tiles.each_block(tile, n, finish, chip)

  def lists(steps: tiles.Schedule):
    return steps.expert_T, steps.tile_T, steps.run_T, steps.next_T

  full = tiles.full_schedule(E, P, tile, False)
  specs = row_specs + matrix_specs + other_specs + out_specs
  moved = traffic.bytes_moved(
    (N // n, int(full.num_steps)), list(zip([*operands, *out_shape], specs)), lists(full)
  )
  sizes_E, starts_E = plan
  steps = tiles.schedule(sizes_E, starts_E, P, tile)
  return pl.pallas_call(
    kernel,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=4,
      grid=(N // n, steps.num_steps),
      in_specs=row_specs + [pl.BlockSpec(memory_space=pl.ANY)] * len(matrices) + other_specs,
      out_specs=out_specs,
      scratch_shapes=scratch,
    ),
    out_shape=varying_like(out_shape, *lists(steps), *operands),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=tiles.VMEM_BYTES + 2**22
    ),
    cost_estimate=pl.CostEstimate(
      flops=2 * P * N * K * len(matrices),
      bytes_accessed=moved,
      transcendentals=P * N * len(extras or matrices[1:]),
    ),
    name=f"grouped_matmul_rows_{K}x{N}x{len(matrices)}",
  )(*lists(steps), *operands)
