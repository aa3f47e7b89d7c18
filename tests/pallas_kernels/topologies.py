"""Devices that exist for the compiler alone, for tests of what it makes of a kernel."""

import jax
import pytest

from dsmoe.compilers import compile_only


def tpu_devices(name: str) -> list[jax.Device]:
  """Returns a topology's devices ("v5p:2x2x1", "tpu7x:2x2x1"); without libtpu the test skips."""
  if missing := compile_only.missing_compiler(name):
    pytest.skip(missing)
  return compile_only.tpu_devices(name)


def compile_for(name: str, fn, *args) -> jax.stages.Compiled:
  """Compiles fn for one device of a topology.

  Args:
    name: of the topology.
    fn: a function of arrays.
    *args: trees of `jax.ShapeDtypeStruct`, one an argument.
  """
  return compile_only.compile_for(tpu_devices(name)[0], fn, *args)
