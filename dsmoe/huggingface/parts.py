"""The place of a published tensor in our parameters, and parts of parameters read out of tensors.

A parameter is made of one tensor, or of one a layer, or one a layer and expert. Of a part of it only
the tensors that it touches are read, and of each only its rows, which are outputs. A part of the
inputs is cut out of whole rows: a row's numbers lie together in the file.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np


class Slot(NamedTuple):
  """The place of a published tensor in our parameters."""

  path: tuple[str, ...]  # path of the leaf
  at: tuple[int, ...]  # index into the leaf's layer and expert dimensions
  shape: tuple[int, ...]  # shape of the leaf at that index
  inputs: int  # leading dimensions that are inputs, see `loading.BLOCK`

  @property
  def hf_shape(self) -> tuple[int, ...]:
    if not self.inputs:
      return self.shape
    return math.prod(self.shape[self.inputs :]), math.prod(self.shape[: self.inputs])

  @property
  def rows(self) -> int:
    """Returns the published rows for one index of our first output dimension."""
    return math.prod(self.shape[self.inputs + 1 :]) if self.inputs else 1

  def to_ours(self, rows):
    """Turns a published tensor, or whole outputs of it, into our part."""
    if not self.inputs:
      return rows
    return _transposed(rows).reshape(*self.shape[: self.inputs], -1, *self.shape[self.inputs + 1 :])

  def to_hf(self, part):
    """Turns our part, or some of its first output dimension, into published rows."""
    if not self.inputs:
      return part
    return _transposed(part.reshape(math.prod(self.shape[: self.inputs]), -1))

  def block(self, limit: int) -> int:
    """Returns how much of the first output dimension makes a piece of about `limit` numbers.

    A piece has all rows, or a multiple of 128 rows, so that FP8 scales are not divided.
    """
    size = self.shape[self.inputs]
    unit = 128 // math.gcd(128, self.rows)
    return min(max(limit * size // math.prod(self.shape) // unit, 1) * unit, size)

  def pieces(self, limit: int) -> Iterator[tuple[slice, tuple[Any, ...]]]:
    """Yields slices of the published rows and the matching indices of our leaf."""
    size, block, rows = self.shape[self.inputs], self.block(limit), self.rows
    for first in range(0, size, block):
      last = min(first + block, size)
      index = (*self.at, *(slice(None),) * self.inputs, slice(first, last))
      yield slice(first * rows, last * rows), index


def _transposed(matrix: np.ndarray) -> np.ndarray:
  """Copies a matrix's transpose in strips, three times as fast as NumPy does it at once."""
  result = np.empty(matrix.shape[::-1], matrix.dtype)
  for i in range(0, len(matrix), 16):
    result[:, i : i + 16] = matrix[i : i + 16].T
  return result


def read_part(
  read: Callable[[str, int, int], np.ndarray],
  slots: Mapping[str, Slot],
  shape: tuple[int, ...],
  index: tuple[slice, ...],
) -> np.ndarray:
  """Returns a part of a parameter, float32.

  Args:
    read: (name, first row, row behind the last) -> rows of a published tensor.
    slots: the parameter's tensors, by name.
    shape: of the whole parameter.
    index: contiguous slices of all its dimensions.
  """
  spans = [range(*part.indices(size)) for part, size in zip(index, shape, strict=True)]
  names = {slot.at: name for name, slot in slots.items()}
  lead = len(next(iter(names)))
  part = np.empty([len(span) for span in spans], np.float32)
  for place in itertools.product(*map(range, part.shape[:lead])):
    name = names[tuple(span[i] for span, i in zip(spans, place))]
    part[place] = _of_tensor(read, name, slots[name], spans[lead:])
  return part


def _of_tensor(read: Callable, name: str, slot: Slot, spans: list[range]) -> np.ndarray:
  """Returns a part of one tensor, as our parameter has it."""
  outputs = spans[slot.inputs]
  rows = read(name, outputs.start * slot.rows, outputs.stop * slot.rows)
  within = [slice(span.start, span.stop) for span in spans]
  within[slot.inputs] = slice(None)
  return slot.to_ours(rows)[tuple(within)]
