"""The grouped matmul that gives weights' gradients, for TPU (Mosaic): it sums over a group's rows.

A grid step adds a tile's product to its expert's block of the gradient, which stays in VMEM.

Shapes: P rows, E experts, K and N the gradient's sides, k and n those of a step's block.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import traffic
from pallas_kernels.grouped_matmul import tpu_tiles as tiles
from pallas_kernels.grouped_matmul.tpu_tiles import LANES
from pallas_kernels.varying import varying_like

UNROLL = 8  # products of one tile's rows alone are short: their ends overlap

f32 = jnp.float32


def fit(lhs, rhs, tile: int, dtype) -> tuple[int, int]:
  """Returns the sides of the block of the gradient that a grid step of `over_groups` adds to.

  Of arrays only shapes and dtypes count.

  Raises:
    ValueError: where no block fits VMEM.
  """
  K, N = tiles.width(lhs), tiles.width(rhs[0])
  size = np.dtype(dtype).itemsize

  def column_bytes(x):
    """VMEM of a column of one row: two buffers of what is copied in, and its plain form."""
    return 2 * x.shape[1] * x.dtype.itemsize // tiles.width(x) + size * (x.dtype != dtype)

  of_rhs = tile * sum(map(column_bytes, rhs))
  of_sum, of_lhs = len(rhs) * (4 + 2 * size), tile * (column_bytes(lhs) + size)
  multiple = tiles.BLOCK_COLUMNS if any(x.dtype != dtype for x in (lhs, *rhs)) else LANES
  chip = tiles.chip_product()
  least_k = min(K, tiles.BLOCK_COLUMNS)
  n = tiles.step_columns(N, 0, least_k * of_sum + of_rhs, multiple, chip.columns)
  k = n and tiles.step_columns(K, n * of_rhs, of_lhs + n * of_sum, multiple, chip.rows)
  if not n or not k:
    raise ValueError(
      f"{tile} rows and a block of a [{K}, {N}] gradient, whose sides divide it and are multiples "
      f"of {multiple} or the whole, must fit VMEM ({tiles.VMEM_BYTES} bytes)"
    )
  return k, n


def over_groups(lhs, rhs, plan, tile: int, dtype):
  """Returns lhs^T rhs of each group's rows, [E, K, N] in `dtype` for each of rhs [P, N]."""
  P, K, N = lhs.shape[0], tiles.width(lhs), tiles.width(rhs[0])
  E = plan[0].shape[0]
  travels = [x.dtype != dtype for x in (lhs, *rhs)]
  chip = tiles.chip_product()
  k, n = fit(lhs, rhs, tile, dtype)
  grid_k, grid_n = K // k, N // n

  in_specs = [
    pl.BlockSpec((tile, tiles.share(k, lhs)), lambda i, j, t, e, r, _: (r[t], i)),
    *(pl.BlockSpec((tile, tiles.share(n, x)), lambda i, j, t, e, r, _: (r[t], j)) for x in rhs),
  ]
  out_specs = [pl.BlockSpec((None, k, n), lambda i, j, t, e, r, _: (e[t], i, j))] * len(rhs)
  out_shape = [jax.ShapeDtypeStruct((E, K, N), dtype)] * len(rhs)
  sizes_E, starts_E = plan
  steps = tiles.schedule(sizes_E, starts_E, P, tile, every_group=True)

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
        tiles.unpack_into(in_refs[i], ref)
    lhs_ref, *rhs_refs = in_refs
    # Rows after the group's last one are undefined, and may be NaN.
    left = end_T[t] - tile_T[t] * tile

    def own(block):
      row = jax.lax.broadcasted_iota(jnp.int32, block.shape, 0)
      return jnp.where(row < left, block, jnp.zeros((), block.dtype))

    turned_km[...] = own(lhs_ref[...]).T

    def add(rhs_ref, sum_ref, own_k, own_n):
      sum_ref[own_k, own_n] += tiles.dot(turned_km[own_k, :], own(rhs_ref[:, own_n]))

    for rhs_ref, sum_ref in zip(rhs_refs, sum_refs):
      tiles.each_block(k, n, functools.partial(add, rhs_ref, sum_ref), chip, UNROLL)

    @pl.when(last)
    def _():
      for out_ref, sum_ref in zip(out_refs, sum_refs):
        out_ref[...] = sum_ref[...].astype(out_ref.dtype)

  full = tiles.full_schedule(E, P, tile, True)
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
    out_shape=varying_like(out_shape, *steps[:3], lhs, *rhs),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel", "arbitrary"),
      vmem_limit_bytes=tiles.VMEM_BYTES + 2**22,
    ),
    cost_estimate=pl.CostEstimate(
      flops=2 * num_steps * tile * K * N * len(rhs),
      bytes_accessed=moved,
      transcendentals=0,
    ),
    name=f"grouped_matmul_weights_{K}x{N}x{len(rhs)}",
  )(*steps[:3], lhs, *rhs)
