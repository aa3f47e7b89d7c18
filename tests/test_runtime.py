import os
import sys

import jax
import pytest

from dsmoe import runtime

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
  monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **__: done.append("joined"))
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
