"""Tests of dsmoe/checkpoint/integrity.py: checksums against a loop, on meshes, of changed numbers."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsmoe.checkpoint import integrity
from tests.helpers import mesh_of

RNG = np.random.default_rng(0)
ARRAYS = {
  "matrix": RNG.normal(size=(16, 5)).astype(np.float32),
  "cube": RNG.normal(size=(2, 8, 3)).astype(jnp.bfloat16),
  "counts": RNG.integers(-9, 9, 7).astype(np.int32),
  "scalar": np.array(-2.5, np.float32),
  "empty": np.zeros((0, 3), np.float32),
}


def checksum_by_loop(array):
  width = array.dtype.itemsize
  data = array.tobytes()
  total = 0
  for place in range(array.size):
    word = int.from_bytes(data[place * width : (place + 1) * width], "little")
    word ^= place * 0x9E3779B9 % 2**32
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
      word = (word ^ (word >> shift)) * factor % 2**32
    total += word ^ (word >> 16)
  return f"{array.dtype} {total % 2**32:08x}"


def test_checksums_match_a_loop(monkeypatch):
  monkeypatch.setattr(integrity, "_BLOCK", 9)
  measured = integrity.measure(ARRAYS)
  assert measured == {name: (checksum_by_loop(x), True) for name, x in ARRAYS.items()}


def test_checksums_of_blocks_are_those_of_the_whole():
  for array in ARRAYS.values():
    rows = array.reshape(-1, array.shape[-1]) if array.ndim > 1 else array.reshape(-1)
    blocks = [rows[first : first + 3] for first in range(0, max(len(rows), 1), 3)]
    assert integrity.checksum_of_blocks(blocks) == checksum_by_loop(array)


@pytest.mark.parametrize("block", [4, 9, 1 << 18])
def test_checksums_are_the_sums_of_parts(monkeypatch, block):
  monkeypatch.setattr(integrity, "_BLOCK", block)
  for array in ARRAYS.values():
    cuts = [sorted({0, RNG.integers(0, n + 1), n}) for n in array.shape]
    total = 0
    for ranges in itertools.product(*(itertools.pairwise(cut) for cut in cuts)):
      part = array[tuple(slice(*r) for r in ranges)]
      total += integrity.sum_of_part(part, [first for first, _ in ranges], array.shape)
    assert f"{array.dtype} {total % 2**32:08x}" == checksum_by_loop(array)


def test_what_is_compiled_matches_what_the_host_computes(monkeypatch):
  alone = integrity.measure(ARRAYS)
  assert integrity.measure(jax.tree.map(jnp.asarray, ARRAYS)) == alone
  monkeypatch.setattr(integrity, "_is_on_host", lambda x: False)
  assert integrity.measure(ARRAYS) == alone
  broken = {"matrix": ARRAYS["matrix"] * np.float32(np.inf)}
  assert not integrity.measure(broken)["matrix"][1]


def test_checksums_do_not_depend_on_the_mesh():
  alone = integrity.measure(ARRAYS)
  spec = jax.sharding.PartitionSpec("data")
  split = {"matrix": spec, "cube": jax.sharding.PartitionSpec(None, "data")}
  for devices in (2, 8):
    place = {name: jax.sharding.NamedSharding(mesh_of(devices), s) for name, s in split.items()}
    arrays = {name: jax.device_put(ARRAYS[name], place[name]) for name in split}
    assert integrity.measure(arrays) == {name: alone[name] for name in split}


def test_every_bit_counts_and_so_does_the_order():
  array = ARRAYS["matrix"]
  seen = {integrity.measure([array])["0"][0]}
  for place in (0, 41, array.size - 1):
    for bit in range(32):
      changed = array.copy()
      changed.view(np.uint32).reshape(-1)[place] ^= np.uint32(1 << bit)
      seen.add(integrity.measure([changed])["0"][0])
  seen.add(integrity.measure([array[::-1].copy()])["0"][0])
  assert len(seen) == 1 + 3 * 32 + 1


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_told(value):
  arrays = ARRAYS | {"matrix": ARRAYS["matrix"].copy()}
  arrays["matrix"][3, 4] = value
  measured = integrity.measure(arrays)
  assert {name for name, (_, finite) in measured.items() if not finite} == {"matrix"}
