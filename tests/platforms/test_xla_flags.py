"""The sets of XLA's flags: what is chosen and refused, and that the compilers know every one."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsmoe.compilers import compile_only
from dsmoe.planning import chips
from dsmoe.platforms import xla_flags

GPU_SETS = [s for s in xla_flags.SETS if "h100" in s.kinds]


def test_sets_are_of_known_chips_and_agree():
  for flag_set in xla_flags.SETS:
    assert set(flag_set.kinds) <= set(chips.CHIPS)
    assert all(flag.reason for flag in flag_set.flags)
  for kind in chips.CHIPS:
    sets = [s for s in xla_flags.SETS if kind in s.kinds]
    assert len({s.purpose for s in sets}) == len(sets)
    names = [flag.name for s in sets for flag in s.flags]
    assert len(names) == len(set(names))  # so that no set undoes another
    xla_flags.check(kind, xla_flags.chosen(kind, xla_flags.purposes(kind)))


def test_what_is_chosen():
  assert xla_flags.chosen("v5p", ["none"]) == xla_flags.chosen("a_new_chip", ["default"]) == {}
  one, two = (xla_flags.chosen("v6e", ["default"], slices) for slices in (1, 2))
  more = {
    "xla_tpu_enable_data_parallel_all_reduce_opt",
    "xla_tpu_data_parallel_opt_different_sized_ops",
  }
  assert set(two) - set(one) == more
  offloaded = xla_flags.chosen("v6e", ["default", "sparse_core"])
  assert one.items() < offloaded.items()
  assert xla_flags.parse(xla_flags.text(offloaded)) == offloaded
  assert xla_flags.variable("h100") == "XLA_FLAGS"
  assert xla_flags.variable("tpu7x") == "LIBTPU_INIT_ARGS"
  with pytest.raises(ValueError, match="among default, none, overlap, combine for h100, got 'spar"):
    xla_flags.chosen("h100", ["default", "sparse_core"])


@pytest.mark.parametrize("true", ["=true", "=1", "=ENABLED", ""])
def test_flags_known_to_compute_nan_are_refused(true):
  first = f"--xla_tpu_enable_async_collective_fusion{true}"
  second = "--xla_tpu_overlap_compute_collective_tc=true"
  with pytest.raises(ValueError, match=r"together on v6e: .* NaN .*jax/issues/38741"):
    xla_flags.check("v6e", xla_flags.parse(f"{first} --xla_other=3 {second}"))
  xla_flags.check("v5p", xla_flags.parse(f"{first} {second}"))
  xla_flags.check("v6e", xla_flags.parse(first))
  xla_flags.check("v6e", xla_flags.parse(f"{first} {second.replace('true', 'false')}"))


@pytest.mark.parametrize("flag_set", GPU_SETS, ids=[s.purpose for s in GPU_SETS])
def test_xla_knows_the_gpu_flags(flag_set):
  """Its options are one list for all platforms, so that compiling for a CPU checks the names."""
  values = {"true": True, "false": False}  # which only the variable spells as XLA does
  known = [flag for flag in flag_set.flags if flag.is_known]
  assert known
  options = {flag.name: values.get(flag.value, flag.value) for flag in known}
  double = jax.jit(lambda x: x + x, compiler_options=options)
  assert double(np.float32(2)) == 4
  with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option: 'xla_gpu_typo'"):
    jax.jit(lambda x: x + x, compiler_options=options | {"xla_gpu_typo": "true"})(np.float32(2))


def compile_with(topologies: list[str], variable: str, flags: str) -> list[str]:
  """Compiles a layer over all devices of each topology; returns the compiled programs' text.

  Call it in a new process: the compiler reads the flags when it is loaded.
  """
  os.environ[variable] = flags
  found = []
  for topology in topologies:
    devices = compile_only.tpu_devices(topology)
    mesh = jax.sharding.Mesh(np.array(devices).reshape(2, -1), ("data", "expert"))
    split = jax.sharding.PartitionSpec("data", "expert")

    def layer(x, w, sizes):
      w = jax.lax.all_gather(w, "expert", axis=1, tiled=True)
      w = jax.lax.all_gather(w, "data", axis=0, tiled=True)
      y = jax.lax.all_to_all(x @ w, "expert", 0, 0, tiled=True)
      parts = jax.lax.axis_size("expert")
      starts = jnp.arange(parts, dtype=jnp.int32) * (y.shape[0] // parts)
      sizes = sizes[0]
      y = jax.lax.ragged_all_to_all(
        y, jnp.zeros_like(y), starts, sizes, starts, sizes, axis_name="expert"
      )
      return jax.lax.psum_scatter(y.T @ x, "data", scatter_dimension=0, tiled=True)

    rows, weights = jax.sharding.PartitionSpec(("data", "expert")), split
    out = jax.sharding.PartitionSpec("data", None)
    fn = jax.shard_map(
      layer, mesh=mesh, in_specs=(rows, weights, rows), out_specs=out, check_vma=False
    )
    shape = jax.ShapeDtypeStruct
    x = shape((2048, 512), np.float32, sharding=jax.sharding.NamedSharding(mesh, rows))
    w = shape((512, 512), np.float32, sharding=jax.sharding.NamedSharding(mesh, weights))
    parts = (mesh.size, mesh.shape["expert"])
    sizes = shape(parts, np.int32, sharding=jax.sharding.NamedSharding(mesh, rows))
    found.append(compile_only.compile_lowered(jax.jit(fn).lower(x, w, sizes)).as_text())
  return found


TPU_SETS = [s for s in xla_flags.SETS if "v5p" in s.kinds]


@pytest.mark.tpu
@pytest.mark.parametrize("flag_set", TPU_SETS, ids=[s.purpose for s in TPU_SETS])
def test_the_tpus_compiler_accepts_every_set(flag_set):
  topologies = [f"{kind}:2x2x1" for kind in flag_set.kinds]
  if missing := compile_only.missing_compiler(topologies[0]):
    pytest.skip(missing)
  given = xla_flags.text({flag.name: flag.value for flag in flag_set.flags})
  found = compile_only.in_fresh_process(compile_with, topologies, "LIBTPU_INIT_ARGS", given)
  # What the compiler makes of them, and does not without them: see the next test.
  signs = {"exchange": " all-to-all-start", "sparse_core": "sparsecore"}
  for text in found:
    assert "all-gather" in text and "reduce-scatter" in text and "ragged-all-to-all" in text
    assert signs.get(flag_set.purpose, "") in text.lower()
  if flag_set.purpose == "exchange":
    assert ["ragged-all-to-all-start" in text for text in found] == [True, True, False]


@pytest.mark.tpu
def test_without_flags_exchanges_wait_and_nothing_is_offloaded():
  """But on tpu7x, whose SparseCores take gathers and exchanges by default."""
  if missing := compile_only.missing_compiler("v5p:2x2x1"):
    pytest.skip(missing)
  topologies = ["v5p:2x2x1", "v6e:2x2x1", "tpu7x:2x2x1"]
  found = compile_only.in_fresh_process(compile_with, topologies, "LIBTPU_INIT_ARGS", "")
  assert not any("all-to-all-start" in text for text in found)
  assert ["sparsecore" in text.lower() for text in found] == [False, False, True]


@pytest.mark.tpu
def test_a_flag_that_the_tpus_compiler_does_not_know_ends_the_process():
  if missing := compile_only.missing_compiler("v5p:2x2x1"):
    pytest.skip(missing)
  with pytest.raises(RuntimeError, match="xla_tpu_typo"):
    compile_only.in_fresh_process(
      compile_with, ["v5p:2x2x1"], "LIBTPU_INIT_ARGS", "--xla_tpu_typo=true"
    )
