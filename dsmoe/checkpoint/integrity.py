"""Whether a state is finite, and checksums of its arrays; computed on the devices that hold it."""

from typing import Any

import jax
import jax.numpy as jnp

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


@jax.jit
def _sums(arrays: list) -> list:
  return [(_checksum(x), jnp.all(jnp.isfinite(x))) for x in arrays]


def _checksum(x):
  """Sums, modulo 2**32, the bits of each number, mixed with its place by MurmurHash3's last step.

  Source: Austin Appleby's MurmurHash3, fmix32; each of its steps can be undone, so that another
  value of a number is another summand.
  """
  bits = jax.lax.bitcast_convert_type(x, _UNSIGNED[x.dtype.itemsize]).astype(jnp.uint32)
  place = jnp.zeros(x.shape, jnp.uint32)
  for axis, size in enumerate(x.shape):
    place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
  mixed = bits ^ (place * jnp.uint32(0x9E3779B9))
  mixed = (mixed ^ (mixed >> 16)) * jnp.uint32(0x85EBCA6B)
  mixed = (mixed ^ (mixed >> 13)) * jnp.uint32(0xC2B2AE35)
  return jnp.sum(mixed ^ (mixed >> 16), dtype=jnp.uint32)
