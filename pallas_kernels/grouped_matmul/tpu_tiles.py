"""What the TPU's grouped matmuls share: which tiles are visited, and how a grid step is divided.

Groups start at multiples of a tile's rows, so that a tile belongs to one expert and no tile is
visited twice. Rows between a group's end and the next tile are computed and not used.

Shapes: P rows, E experts, K contraction, N columns, T tiles, m rows of a tile, n columns of a step.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.permute import tpu as permute

VMEM_BYTES = 56 * 2**20  # of the 64 MiB of a tpu7x device, the smallest of the chips supported
LANES = 128
BLOCK_COLUMNS = 256  # a multiple of every chip's product

f32, u32 = jnp.float32, jnp.uint32


def tile_rows(rows_per_group: float) -> int:
  """Returns a tile's rows; half a tile a group is lost on average.

  At least 128, since the rows' weights lie along lanes. Taller tiles lose less at the ends of
  products. Compiled for v5p with 768 rows a group (DeepSeek-V2-Lite), `routed_swiglu` takes 10.2
  million cycles in tiles of 128 and 9.7 in tiles of 256, and its gradient 28.5 and 26.5. With 2,048
  rows a group (V3 on 8 devices) the gradients of weights take 16.2 in tiles of 256 and 15.6 in 512.
  """
  return 512 if rows_per_group >= 2048 else 256 if rows_per_group >= 768 else LANES


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


def full_schedule(E: int, num_rows: int, tile: int, every_group: bool) -> Schedule:
  """Returns the schedule that costs are counted for: every tile full, experts equally loaded."""
  T = num_rows // tile
  tiles_E = T // E + (np.arange(E) < T % E)
  starts_E = (np.cumsum(tiles_E) - tiles_E) * tile
  return schedule(tiles_E * tile, starts_E, num_rows, tile, every_group, np)


def step_columns(
  N: int, fixed_bytes: int, bytes_per_column: int, multiple: int = LANES, product: int = LANES
) -> int | None:
  """Returns the divisor of N that fits VMEM with the fewest products, then steps; or None."""
  most = (VMEM_BYTES - fixed_bytes) // bytes_per_column
  fitting = [n for n in {*range(multiple, N, multiple), N} if n <= most and N % n == 0]
  return min(fitting, key=lambda n: (N // n * pl.cdiv(n, product), -n), default=None)


class Product(NamedTuple):
  """What one loop step multiplies to: as wide as the matrix unit, without spilling registers."""

  rows: int
  columns: int


def chip_product() -> Product:
  """Returns the largest product that the chip's compiler does not spill; v5p's without a chip."""
  try:
    chip = pltpu.get_tpu_info()
  except ValueError:
    return Product(256, 128)
  if chip.mxu_column_size == 128:
    return Product(256, 128)
  return Product(128 if chip.generation == 6 else 256, 256)


def blocks(length: int, size: int, body: Callable, unroll: int = 1) -> None:
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


def each_block(
  num_rows: int, num_columns: int, product: Callable, size: Product, unroll: int = 1
) -> None:
  """Calls product(rows, columns) on blocks of one product's size."""

  def row_block(rows):
    blocks(num_columns, size.columns, functools.partial(product, rows), unroll)

  blocks(num_rows, size.rows, row_block)


def width(rows) -> int:
  """Returns the columns of rows that may be words of two."""
  return 2 * rows.shape[1] if rows.dtype == u32 else rows.shape[1]


def share(n: int, rows) -> int:
  """Returns how many of an array's own columns n columns are."""
  return n // 2 if rows.dtype == u32 else n


def unpack_into(scratch_ref, ref) -> None:
  """Writes rows, packed into words or not, in the dtype of the matrices."""
  if ref.dtype != u32:
    scratch_ref[...] = ref[...].astype(scratch_ref.dtype)
    return
  for c in range(0, ref.shape[1], LANES):
    for h, half in enumerate(permute.unpack_halves(ref[:, c : c + LANES])):
      own = slice(2 * c + h * LANES, 2 * c + (h + 1) * LANES)
      scratch_ref[:, own] = half.astype(scratch_ref.dtype)


def dot(rows_mK, matrix, transposed: bool = False):
  dims = (((1,), (1 if transposed else 0,)), ((), ()))
  return jax.lax.dot_general(rows_mK, matrix, dims, preferred_element_type=f32)


def column_of(row_1m):
  """[1, m] to [m, 1]: one number a row, kept compact in memory."""
  return jnp.broadcast_to(row_1m, (8, row_1m.shape[1])).T[:, :1]


def row(column_m1):
  """[m, 1] to [1, m]."""
  return jnp.broadcast_to(column_m1, (column_m1.shape[0], LANES)).T[:1]
