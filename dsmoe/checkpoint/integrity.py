"""Whether a state is finite, and checksums of its arrays; computed on the devices that hold it."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsmoe.checkpoint import contents

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
  sums = jax.device_get(_sums([x for _, x in named]))
  return {
    name: (f"{x.dtype} {int(checksum):08x}", bool(finite))
    for (name, x), (checksum, finite) in zip(named, sums)
  }


def checksum_of_blocks(blocks: Iterable[np.ndarray]) -> str:
  """Returns the checksum of an array whose rows come in blocks, joined in row-major order."""
  total, offset, dtype = 0, 0, ""
  for block in blocks:
    bits = np.ascontiguousarray(block).view(f"u{block.dtype.itemsize}").reshape(-1)
    place = np.arange(offset, offset + block.size, dtype=np.uint64).astype(np.uint32)
    total += int(_mixed(bits.astype(np.uint32), place).sum(dtype=np.uint64))
    offset, dtype = offset + block.size, block.dtype.name
  return f"{dtype} {total % 2**32:08x}"


@jax.jit
def _sums(arrays: list) -> list:
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
