"""Whether a state is finite, and checksums of its arrays; computed on the devices that hold it."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsmoe.checkpoint import contents

_BLOCK = 1 << 18  # numbers that NumPy mixes at once
_UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


def measure(tree: Any) -> dict[str, tuple[str, bool]]:
  """Reads every array once.

  Args:
    tree: of arrays of up to 4 bytes a number, on any mesh.

  Returns:
    By dotted name, (checksum, whether all numbers are finite). A checksum is the dtype and eight
    hexadecimal digits, equal for equal arrays whatever devices hold them. Another value of a
    single number always changes it; other damage leaves it as it is once in 2**32 times.
  """
  named = [(contents.name_of(path), x) for path, x in jax.tree.leaves_with_path(tree)]
  # One program: several with collectives at once can block XLA's threads on CPU.
  compiled = iter(jax.device_get(_measured([x for _, x in named if not _is_on_host(x)])))
  sums = [_on_host(x) if _is_on_host(x) else next(compiled) for _, x in named]
  return {
    name: (f"{x.dtype} {int(checksum):08x}", bool(finite))
    for (name, x), (checksum, finite) in zip(named, sums)
  }


def checksum_of_blocks(blocks: Iterable[np.ndarray]) -> str:
  """Returns the checksum of an array whose rows come in blocks, joined in row-major order."""
  total, offset, dtype = 0, 0, ""
  for block in blocks:
    total += _sum(block.reshape(-1), offset)
    offset, dtype = offset + block.size, block.dtype.name
  return f"{dtype} {total % 2**32:08x}"


def sum_of_part(part: np.ndarray, starts: Sequence[int], shape: Sequence[int]) -> int:
  """Returns what a part of an array adds to the array's checksum.

  The eight digits of a checksum are the sum over parts that make up the array, modulo 2**32.

  Args:
    part: a rectangular part of the array, of as many dimensions.
    starts: the place of its first number along each dimension.
    shape: the whole array's.
  """
  strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
  offset = sum(start * stride for start, stride in zip(starts, strides, strict=True))
  return _sum_of_part(part, offset, strides) % 2**32


def _sum_of_part(part: np.ndarray, offset: int, strides: Sequence[int]) -> int:
  """The same, of a part whose first number has the place `offset`."""
  if part.size == 0:
    return 0
  if part.ndim <= 1:
    return _sum(part.reshape(-1), offset)
  size = part[0].size
  if size > _BLOCK:
    rows = enumerate(part)
    return sum(_sum_of_part(row, offset + i * strides[0], strides[1:]) for i, row in rows)
  total, num_rows = 0, _BLOCK // size
  for first in range(0, len(part), num_rows):
    block = part[first : first + num_rows]
    place: np.ndarray = np.full((), offset + first * strides[0], np.uint64)
    for length, stride in zip(block.shape, strides):
      place = place[..., None] + np.arange(length, dtype=np.uint64) * np.uint64(stride)
    total += int(_mixed(_bits(block), place.astype(np.uint32)).sum(dtype=np.uint64))
  return total


def _is_on_host(x) -> bool:
  """Whether NumPy can read an array in place; compiling for it would take seconds."""
  if isinstance(x, np.ndarray | np.generic):
    return True
  return len(x.devices()) == 1 and next(iter(x.devices())).platform == "cpu"


def _on_host(x) -> tuple[int, bool]:
  flat = np.asarray(x).reshape(-1)
  finite = all(np.isfinite(flat[i : i + _BLOCK]).all() for i in range(0, flat.size, _BLOCK))
  return _sum(flat, 0) % 2**32, finite


def _sum(flat: np.ndarray, offset: int) -> int:
  """Returns what numbers add to a checksum, of which the first has the place `offset`."""
  total = 0
  for first in range(0, flat.size, _BLOCK):
    block = flat[first : first + _BLOCK]
    start = offset + first
    place = np.arange(start, start + block.size, dtype=np.uint64).astype(np.uint32)
    total += int(_mixed(_bits(block), place).sum(dtype=np.uint64))
  return total


def _bits(block: np.ndarray) -> np.ndarray:
  block = np.ascontiguousarray(block)
  return block.view(f"u{block.dtype.itemsize}").astype(np.uint32)


@jax.jit
def _measured(arrays: list) -> list:
  return [(_checksum(x), jnp.all(jnp.isfinite(x))) for x in arrays]


def _checksum(x):
  """Sums, modulo 2**32, the bits of each number, mixed with its place in row-major order."""
  bits = jax.lax.bitcast_convert_type(x, _UNSIGNED[x.dtype.itemsize]).astype(jnp.uint32)
  place = jnp.zeros(x.shape, jnp.uint32)
  for axis, size in enumerate(x.shape):
    place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
  return jnp.sum(_mixed(bits, place), dtype=jnp.uint32)


def _mixed(bits, place):
  """Mixes two arrays of uint32; each step can be undone, so that other bits give another result.

  Source: Austin Appleby's MurmurHash3, fmix32.
  """
  mixed = bits ^ (place * np.uint32(0x9E3779B9))
  mixed = (mixed ^ (mixed >> 16)) * np.uint32(0x85EBCA6B)
  mixed = (mixed ^ (mixed >> 13)) * np.uint32(0xC2B2AE35)
  return mixed ^ (mixed >> 16)
