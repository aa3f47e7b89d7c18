import gc
import http.server
import os
import signal
import socket
import sys
import threading
import time
import types

import jax
import numpy as np
import pytest
from jax._src import clusters
from jax._src.clusters import cloud_tpu_cluster, k8s_cluster
from jax.experimental.compilation_cache import compilation_cache

from dsmoe import runtime

CLUSTERS = runtime.CLUSTER_VARIABLES


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


def test_ctrl_c_in_a_callback_of_the_garbage_collector_interrupts_after_it(capsys):
  """Raised there, it would be printed and forgotten."""
  ended = []

  def interrupt(phase, _):
    if phase == "start" and not ended:
      ended.append(False)
      signal.raise_signal(signal.SIGINT)
      ended.append(True)

  with pytest.raises(KeyboardInterrupt), runtime.noted_interrupts() as received:
    gc.collect()  # what weak references call then, which can drop an interrupt too, has been called
    gc.callbacks.append(interrupt)
    try:
      gc.collect(0)
      gc.callbacks.remove(interrupt)
      time.sleep(60)
    finally:
      assert ended == [False, True]
  assert set(received) == {"SIGINT"}
  assert capsys.readouterr().err == ""


def test_programs_from_the_compilation_cache_are_counted(tmp_path):
  """Two programs compiled anew and one that another jit of the same function left."""
  settings = {
    "jax_compilation_cache_dir": str(tmp_path),
    "jax_persistent_cache_min_compile_time_secs": 0.0,
  }
  saved = {name: getattr(jax.config, name) for name in settings}

  def programs(*factors):
    for factor in factors:
      jax.jit(lambda x, factor=factor: x * factor)(np.float32(1)).block_until_ready()

  try:
    for name, value in settings.items():
      jax.config.update(name, value)
    compilation_cache.reset_cache()
    with runtime.CachedPrograms() as cached:
      assert str(cached) == ""
      programs(11, 13)
      assert (cached.found, cached.asked) == (0, 2)
      programs(13)
    programs(17)
    assert str(cached) == ", 1 of 3 programs from the compilation cache"
  finally:
    for name, value in saved.items():
      jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture
def joined(calls, monkeypatch):
  """What JAX finds when it is told nothing: (address of process 0, processes, own number)."""
  found = []

  def initialize(*given, **_):
    detect = clusters.ClusterEnv.auto_detect_unset_distributed_params
    found.append(detect(*given, None, None, 1)[:3])
    if found[-1][0] is None:
      raise ValueError("coordinator_address should be defined.")

  monkeypatch.setattr(jax.distributed, "initialize", initialize)
  monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.check=0")
  monkeypatch.setattr(socket, "gethostbyname", lambda host: "10.0.0.7")
  return found


def test_slices_of_cloud_tpu_are_joined(joined, monkeypatch):
  monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
  variables = {
    "TPU_WORKER_HOSTNAMES": "host-2,host-3",
    "TPU_WORKER_ID": "1",
    "MEGASCALE_COORDINATOR_ADDRESS": "host-0",
    "MEGASCALE_NUM_SLICES": "2",
    "MEGASCALE_SLICE_ID": "1",
  }
  for name, value in variables.items():
    monkeypatch.setenv(name, value)
  runtime.start()
  assert joined == [("host-0:8482", 4, 3)]


@pytest.mark.tpu  # JAX asks through requests, which jax[tpu] brings
def test_a_cloud_tpu_without_variables_is_asked(joined, monkeypatch):
  class Metadata(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
      assert self.headers["Metadata-Flavor"] == "Google"
      name = self.path.rpartition("/")[2]
      answers = {
        "agent-worker-number": "1",
        "worker-network-endpoints": "a:b:10.1.0.1,a:c:10.1.0.2",
      }
      self.send_response(200)
      self.end_headers()
      self.wfile.write(answers.get(name, "").encode())

    def log_message(self, *_):
      pass

  for module in (cloud_tpu_cluster, runtime.cloud_tpu_init):
    monkeypatch.setattr(module, "running_in_cloud_tpu_vm", True)
  monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
  runtime.start()
  monkeypatch.delenv("TPU_SKIP_MDS_QUERY")
  with http.server.ThreadingHTTPServer(("localhost", 0), Metadata) as server:
    threading.Thread(target=server.serve_forever).start()
    monkeypatch.setenv("GCE_METADATA_IP", f"localhost:{server.server_port}")
    runtime.start()
    server.shutdown()
  runtime.start()  # nobody answers any more
  assert joined == [("10.1.0.1:8482", 2, 1)]


def test_a_jobset_of_kubernetes_is_joined(joined, monkeypatch):
  labels = {"job-name": "run-workers-0", "jobset.sigs.k8s.io/jobset-name": "run"}
  owner = types.SimpleNamespace(controller=True, kind="Job")
  pod = types.SimpleNamespace(
    metadata=types.SimpleNamespace(name="pod", labels=labels, owner_references=[owner]),
    spec=types.SimpleNamespace(subdomain="run"),
  )
  job = types.SimpleNamespace(
    metadata=types.SimpleNamespace(name="run-workers-0", labels=labels),
    spec=types.SimpleNamespace(parallelism=4),
  )
  cluster = k8s_cluster.K8sCluster
  monkeypatch.setattr(cluster, "is_env_present", lambda: "KUBERNETES_SERVICE_HOST" in os.environ)
  for name, value in (("_pod", pod), ("_job", job), ("_controller", owner)):
    monkeypatch.setattr(cluster, name, lambda value=value: value)
  monkeypatch.setenv("JOB_COMPLETION_INDEX", "2")
  monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
  runtime.start()
  assert joined == [("run-workers-0-0.run:55527", 4, 2)]


def test_what_jax_does_not_understand_is_said(joined, monkeypatch):
  monkeypatch.setenv("SLURM_NTASKS", "4")  # in the shell of an allocation, without srun
  with pytest.raises(ValueError, match=r"SLURM_NTASKS tell of several .* such as srun"):
    runtime.start()
