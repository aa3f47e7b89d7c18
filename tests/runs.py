"""Training runs as processes of their own, and what they leave behind."""

import contextlib
import functools
import json
import os
import pathlib
import random
import socket
import subprocess
import sys
import tempfile
import time
import warnings

import jax
import numpy as np
import orbax.checkpoint as ocp

from dsmoe.reporting import metrics

ROOT = pathlib.Path(__file__).resolve().parent.parent
SHORT_RUN = "tests/configs/short_run.py"
LIMIT_SECS = 600
# For helpers.small_config: one dense and one MoE layer, quick to compile.
TWO_LAYERS = {
  "model.num_hidden_layers": 2,
  "model.first_k_dense_replace": 1,
  "model.num_nextn_predict_layers": 0,
}
# Measured, not computed: differ from run to run.
TIMINGS = ("step_secs", "tokens_per_sec", "gflops_per_sec", "mfu")


def start(*args, **options) -> subprocess.Popen:
  """Starts a Python process in the repository on one CPU device; output is captured as text."""
  env = (
    os.environ
    | options.pop("env", {})
    | {
      "PYTHONPATH": str(ROOT),
      "JAX_PLATFORMS": "cpu",
      "JAX_COMPILATION_CACHE_DIR": str(
        pathlib.Path(jax.config.jax_compilation_cache_dir).resolve()
      ),
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
      "COLUMNS": "200",
    }
  )
  return subprocess.Popen(
    [sys.executable, *map(str, args)],
    cwd=ROOT,
    env=env,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    **options,
  )


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
  """Waits for the end; returns (exit code, stdout, stderr)."""
  try:
    out, err = process.communicate(timeout=LIMIT_SECS)
  finally:
    process.kill()
  return process.returncode, out, err


@functools.cache
def _prepared() -> subprocess.Popen:
  """Returns the process that forks; it ends with this one, which closes its stdin."""
  # With this variable set, dsmoe.train does not execute itself again.
  env = {"GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES", "")}
  return start("tests/prepared_process.py", stdin=subprocess.PIPE, env=env)


def call(*args) -> tuple[int, str, str]:
  """Runs a Python program of this repository to its end, without the seconds that imports take.

  Args:
    *args: a file and its arguments, or `-m`, a module and its arguments.

  Returns:
    (exit code, stdout, stderr).
  """
  process = _prepared()
  with tempfile.TemporaryDirectory() as folder:
    files = {name: pathlib.Path(folder) / name for name in ("out", "err")}
    task = {"args": list(map(str, args))} | {name: str(path) for name, path in files.items()}
    process.stdin.write(json.dumps(task) + "\n")
    process.stdin.flush()
    code = int(process.stdout.readline())
    return code, *(path.read_text() for path in files.values())


def run(*args) -> str:
  """Runs a Python program of this repository that must succeed; returns its stdout."""
  code, out, err = call(*args)
  assert code == 0, f"{args} ended with {code}:\n{out[-2000:]}\n{err[-4000:]}"
  return out


def run_fresh(*args) -> str:
  """Runs a Python process of its own, which must succeed; returns its stdout."""
  code, out, err = finish(start(*args))
  assert code == 0, f"{args} ended with {code}:\n{out[-2000:]}\n{err[-4000:]}"
  return out


def free_port() -> int:
  """Returns a port that nobody has, and that the system does not give to who asks for any port.

  A process that is told this number may need a minute until it listens. Linux gives out ports from
  32768 on.
  """
  while True:
    port = random.SystemRandom().randrange(15_000, 32_000)
    with socket.socket() as free, contextlib.suppress(OSError):
      free.bind(("", port))
      return port


def start_training(workdir, *overrides) -> subprocess.Popen:
  """Starts a short training run."""
  (process,) = start_processes(workdir, 1, *overrides)
  return process


def start_processes(workdir, number: int, *overrides, program=("-m", "dsmoe.train"), **options):
  """Starts a short training run of several processes, on a port that is free.

  Args:
    workdir: the run's.
    number: of processes.
    *overrides: flags.
    program: what Python runs.
    **options: for each process a list of further flags `of_each`; what `start` takes.
  """
  coordinator = f"localhost:{free_port()}"
  of_each = options.pop("of_each", [()] * number)
  flags = (f"--config={SHORT_RUN}", f"--workdir={workdir}", *overrides)
  if number > 1:
    flags += (f"--coordinator={coordinator}", f"--num_processes={number}")
  return [
    start(*program, *flags, *([f"--process_id={i}"] if number > 1 else []), *of_each[i], **options)
    for i in range(number)
  ]


def wait_for(condition, process: subprocess.Popen) -> bool:
  """Waits until `condition()`; returns False if the process ended before."""
  end = time.monotonic() + LIMIT_SECS
  while time.monotonic() < end:
    if condition():
      return True
    if process.poll() is not None:
      return False
    time.sleep(0.002)
  process.kill()
  raise TimeoutError(f"nothing happened in {LIMIT_SECS} s")


def logged_lines(workdir) -> int:
  """Returns the number of lines in metrics.jsonl."""
  path = pathlib.Path(workdir) / metrics.METRICS_FILE
  return path.read_bytes().count(b"\n") if path.exists() else 0


def comparable_metrics(workdir) -> list[dict]:
  """Returns metrics.jsonl without what was timed."""
  rows = metrics.read_metrics(workdir)
  return [{k: v for k, v in row.items() if k not in TIMINGS} for row in rows]


def checkpoint_arrays(workdir, step: int) -> dict[str, np.ndarray]:
  """Reads everything a checkpoint holds, by path, without dsmoe's help."""
  folder = pathlib.Path(workdir).resolve() / "checkpoints" / str(step) / "state"
  with warnings.catch_warnings(action="ignore"):  # about shardings, which are not wanted here
    tree = ocp.PyTreeCheckpointer().restore(folder)
  return {jax.tree_util.keystr(k): np.asarray(v) for k, v in jax.tree.leaves_with_path(tree)}


def assert_bitwise_equal(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
  """Compares shape, dtype and bytes of every array."""
  assert sorted(a) == sorted(b)
  for name in a:
    assert a[name].dtype == b[name].dtype and a[name].shape == b[name].shape, name
    assert a[name].tobytes() == b[name].tobytes(), name
