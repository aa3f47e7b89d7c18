"""Counts what a Pallas kernel moves, from its grid and its blocks' index maps.

A pipelined kernel copies a block when its index differs from the step before (inputs: on the
way in, outputs: on the way out). Counting that, step by step, gives the bytes between HBM and
the chip; a kernel's `cost_estimate` is this count.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import pallas as pl


def block_bytes(array, spec: pl.BlockSpec, index: Sequence[int]) -> int:
  """Returns the bytes of one block, without what lies past the array's end."""
  lengths, blocks = [], tuple[Any, ...](spec.block_shape or ())
  for size, block, i in zip(array.shape, blocks, index):
    length = 1 if block is None else int(getattr(block, "block_size", block))
    lengths.append(min(length, size - i * length))
  return math.prod(lengths) * np.dtype(array.dtype).itemsize


def bytes_moved(
  grid: Sequence[int], operands: Sequence[tuple[Any, pl.BlockSpec]], scalars: Sequence[Any] = ()
) -> int:
  """Returns the bytes a pipelined grid copies between HBM and VMEM.

  Args:
    grid: its sizes, the last running fastest.
    operands: (array or its `jax.ShapeDtypeStruct`, spec) of each input and output.
    scalars: NumPy arrays that stand for the prefetched scalars in index maps; their own bytes
      are counted once.
  """
  total = sum(np.asarray(s).nbytes for s in scalars)
  steps = list(itertools.product(*map(range, grid)))
  for array, spec in operands:
    assert spec.index_map is not None
    last = None
    for step in steps:
      index = tuple(int(i) for i in spec.index_map(*step, *scalars))
      if index != last:
        total += block_bytes(array, spec, index)
      last = index
  return total


def struct(a) -> jax.ShapeDtypeStruct:
  """Returns an array's shape and dtype."""
  return jax.ShapeDtypeStruct(a.shape, a.dtype)
