"""Scalars of kernels, taken out of a program whose large arguments are not there."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dsmoe.compilers import scalar_operands

ROWS, COLUMNS = 32, 128


def _copy_tiles(x, tiles_T, num_tiles):
  return pl.pallas_call(
    lambda tiles_ref, x_ref, out_ref: out_ref.__setitem__(..., x_ref[...]),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=(num_tiles,),
      in_specs=[pl.BlockSpec((8, COLUMNS), lambda i, tiles: (tiles[i], 0))],
      out_specs=pl.BlockSpec((8, COLUMNS), lambda i, tiles: (tiles[i], 0)),
    ),
    out_shape=jax.ShapeDtypeStruct((ROWS, COLUMNS), x.dtype),
    name="copy_tiles",
  )(tiles_T, x)


def _program(x, sizes_E):
  """A kernel inside a jitted function, its scalars the work of another."""
  tiles_E = jax.jit(lambda sizes: (sizes + 7) // 8)(sizes_E)
  first_T = jnp.searchsorted(jnp.cumsum(tiles_E), jnp.arange(4), side="right").astype(jnp.int32)
  return jax.jit(_copy_tiles)(jnp.tanh(x), first_T, tiles_E.sum())


def test_grid_and_prefetched_indices():
  x = jax.ShapeDtypeStruct((ROWS, COLUMNS), jnp.float32)
  found = scalar_operands.of_kernels(_program, x, np.array([9, 0, 3], np.int32))
  ((scalars,),) = found.values()
  assert list(found) == ["copy_tiles"] and set(scalars) == {0, 1}
  assert scalars[0] == 3  # 2 + 0 + 1 tiles
  np.testing.assert_array_equal(scalars[1], [0, 0, 2, 3])


def test_nothing_is_known_of_unknown_sizes():
  x = jax.ShapeDtypeStruct((ROWS, COLUMNS), jnp.float32)
  sizes = jax.ShapeDtypeStruct((3,), jnp.int32)
  assert scalar_operands.of_kernels(_program, x, sizes) == {"copy_tiles": [{}]}


def test_each_call_counts():
  x = jax.ShapeDtypeStruct((ROWS, COLUMNS), jnp.float32)

  def twice(x, sizes_E):
    return _program(_program(x, sizes_E), sizes_E + 8)

  found = scalar_operands.of_kernels(twice, x, np.array([9, 0, 3], np.int32))
  assert [int(call[0]) for call in found["copy_tiles"]] == [3, 6]
