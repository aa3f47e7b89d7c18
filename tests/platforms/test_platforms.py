"""What each platform's compiler likes, and the memory of a process on CPU."""

import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from dsmoe import platforms
from dsmoe.config import KernelsConfig
from dsmoe.parallel import mesh as mesh_lib
from tests.helpers import mesh_of


def test_compiler_options_are_for_cpu_and_this_compiler_knows_them(monkeypatch):
  run = jax.jit(lambda x: x @ x, compiler_options=platforms.compiler_options())
  x = np.array([[1, 2], [3, 4]], np.float32)
  assert run(x).tolist() == [[7, 10], [15, 22]]
  monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
  assert platforms.compiler_options() == {}
  assert platforms.compiler_options("cpu") and platforms.compiler_options("tpu") == {}


def test_kernels_of_another_platform_are_named():
  kernels = KernelsConfig(
    attention="mosaic_tpu", decode_attention="mosaic_gpu", routing="reference"
  )
  assert platforms.unusable_kernels(kernels) == {
    "attention": "kernels.attention must be an implementation for cpu or None, got 'mosaic_tpu', "
    "which runs on tpu only",
    "decode_attention": "kernels.decode_attention must be an implementation for cpu or None, got "
    "'mosaic_gpu', which runs on gpu only",
  }
  with platforms.compiling_for("tpu"):
    assert list(platforms.unusable_kernels(kernels)) == ["decode_attention"]
  with pytest.raises(ValueError, match=r"^kernels\.attention must be"):
    platforms.check_kernels(kernels)
  assert platforms.unusable_kernels(KernelsConfig(attention="xla")) == {}


@pytest.mark.parametrize(
  "content", [None, "", "{", "[1]", '{"cpu": 3}', '{"cpu": {"a": 1.5}}', "\0\0", b"\xff\xfe"]
)
def test_a_table_of_tiles_must_be_one(tmp_path, content):
  path = tmp_path / "tiles.json"
  if content is not None:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
  found = platforms.unusable_kernels(KernelsConfig(tuned=str(path)))
  assert list(found) == ["tuned"] and str(path) in found["tuned"]
  path.write_text('{"cpu": {"a": 16}}')
  assert platforms.unusable_kernels(KernelsConfig(tuned=str(path))) == {}


RELEASE = """
from dsmoe.platforms import cpu
cpu.keep_memory()
def resident_mib():
  return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20
import numpy as np
blocks = [np.ones(2**16, np.uint8) for _ in range(4000)]
last = np.ones(2**16, np.uint8)  # above the others: the heap cannot just shrink
held = resident_mib()
del blocks
kept = resident_mib()
cpu.release_memory()
print(held - kept, kept - resident_mib())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc_trim is on Linux")
def test_freed_memory_is_kept_until_released():
  out = subprocess.run(
    [sys.executable, "-c", RELEASE], check=True, text=True, capture_output=True
  ).stdout
  freed_at_once, released = map(float, out.split())
  assert freed_at_once < 20 and released > 200


STEPS = """
import resource, sys
import jax, jax.numpy as jnp
from dsmoe.platforms import cpu
if sys.argv[1:] == ["configured"]:
  jax.config.update("jax_num_cpu_devices", 2)
cpu.keep_memory()
from jax.sharding import PartitionSpec as P
mesh = jax.make_mesh((len(jax.devices()),), ("data",))
step = lambda x: (x @ x.T) @ x  # 256 MiB in between
run = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=P("data"), out_specs=P("data")))
x = jax.device_put(jnp.ones((2**13 * mesh.size, 16)), jax.NamedSharding(mesh, P("data")))
def faults():
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  run(x).block_until_ready()
  return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults(), min(faults() for _ in range(5)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc is on Linux")
@pytest.mark.parametrize("devices", ["one", "configured", "forced"])
def test_a_steps_buffers_are_mapped_once(devices):
  flags = "--xla_force_host_platform_device_count=2" if devices == "forced" else ""
  out = subprocess.run(
    [sys.executable, "-c", STEPS, devices],
    check=True,
    text=True,
    capture_output=True,
    env=os.environ | {"XLA_FLAGS": flags},
  ).stdout
  first, later = map(int, out.split())
  huge_pages = 2**28 // 2**21
  assert first >= huge_pages and later < huge_pages / 4


@pytest.mark.parametrize("platform, most", [("cpu", 4), ("gpu", 4), ("tpu", 0)])
def test_short_stacks_are_written_out_by_platform(platform, most):
  with platforms.compiling_for(platform):
    assert [n for n in range(1, 7) if platforms.writes_out(n)] == list(range(1, most + 1))


def test_a_program_is_traced_for_the_devices_of_its_mesh(monkeypatch):
  seen = []
  monkeypatch.setattr(mesh_lib, "platform_of", lambda mesh: "tpu")
  spec = jax.sharding.PartitionSpec()
  run = mesh_lib.shard_map(
    lambda x: (seen.append(platforms.current()), x)[1], mesh_of(1), spec, spec
  )
  jax.eval_shape(run, np.zeros(3, np.float32))
  assert seen == ["tpu"] and platforms.current() == "cpu"
