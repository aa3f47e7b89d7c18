import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from dsmoe import platforms, runtime

CLUSTERS = [
  "TPU_WORKER_HOSTNAMES",
  "SLURM_NTASKS",
  "OMPI_COMM_WORLD_SIZE",
  "JAX_COORDINATOR_ADDRESS",
]


@pytest.fixture
def calls(monkeypatch):
  """The calls made, in order, on a Linux machine without a cluster's variables or tunables."""
  done = []
  for name in (*CLUSTERS, "GLIBC_TUNABLES"):
    monkeypatch.setenv(name, "")  # registers the variable, so that it is restored
    monkeypatch.delenv(name)
  monkeypatch.setattr(sys, "platform", "linux")
  monkeypatch.setattr(jax.distributed, "initialize", lambda: done.append("joined"))
  monkeypatch.setattr(os, "execv", lambda path, argv: done.append((path, argv)))
  return done


def test_the_program_starts_again_once_with_its_memory_settings(calls, monkeypatch):
  monkeypatch.setattr(sys, "orig_argv", ["python3", "-m", "dsmoe.train", "--workdir=a b"])
  runtime.start()
  again = [sys.executable, "-m", "dsmoe.train", "--workdir=a b"]
  assert calls == [(sys.executable, again)]
  tunables = dict(x.split("=") for x in os.environ["GLIBC_TUNABLES"].split(":"))
  assert tunables["glibc.malloc.hugetlb"] == "1"
  thresholds = [int(tunables[f"glibc.malloc.{name}_threshold"]) for name in ("mmap", "trim")]
  assert min(thresholds) > 2**35  # more than any buffer
  runtime.start()  # the started program: nothing left to do
  assert len(calls) == 1


def test_the_users_tunables_and_other_systems_are_left_alone(calls, monkeypatch):
  monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.check=3")
  runtime.start()
  assert os.environ["GLIBC_TUNABLES"] == "glibc.malloc.check=3"
  monkeypatch.delenv("GLIBC_TUNABLES")
  monkeypatch.setattr(sys, "platform", "darwin")
  runtime.start()
  assert calls == [] and "GLIBC_TUNABLES" not in os.environ


@pytest.mark.parametrize("variable", CLUSTERS)
def test_a_cluster_is_joined_after_that(calls, monkeypatch, variable):
  monkeypatch.setenv(variable, "1")
  runtime.start()
  assert len(calls) == 2 and calls[1] == "joined"


def test_compiler_options_are_for_cpu_and_this_compiler_knows_them(monkeypatch):
  run = jax.jit(lambda x: x @ x, compiler_options=platforms.compiler_options())
  x = np.array([[1, 2], [3, 4]], np.float32)
  assert run(x).tolist() == [[7, 10], [15, 22]]
  monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
  assert platforms.compiler_options() == {}
  assert platforms.compiler_options("cpu") and platforms.compiler_options("tpu") == {}


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
from dsmoe.platforms import cpu
cpu.keep_memory()
import resource
import jax, jax.numpy as jnp
run = jax.jit(lambda x: (x @ x.T) @ x)  # 256 MiB in between
x = jnp.ones((2**13, 16))
def faults():
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  run(x).block_until_ready()
  return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults(), min(faults() for _ in range(10)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc is on Linux")
def test_a_steps_buffers_are_mapped_once():
  command = [sys.executable, "-c", STEPS]
  out = subprocess.run(command, check=True, text=True, capture_output=True).stdout
  first, later = map(int, out.split())
  huge_pages = 2**28 // 2**21
  assert first >= huge_pages and later < huge_pages / 4
