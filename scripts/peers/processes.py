"""Runs benchmarks as processes of their own, with a time limit, and reads their peak memory."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent


def can_import(python: str, *names: str) -> bool:
  """Returns whether that interpreter exists and finds those packages; none is imported."""
  code = f"import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, {names!r})))"
  try:
    return subprocess.run([python, "-c", code], capture_output=True).returncode == 0
  except OSError:
    return False


def num_cores() -> int:
  """Returns the cores this process may use; XLA uses as many threads."""
  return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run(name: str, command: list[str], timeout_secs: int) -> tuple[str, str, float]:
  """Runs one process to its end, without caches of compiled code from earlier ones.

  Returns:
    What it wrote to stdout and to stderr, and the most memory it held, in MiB.

  Raises:
    RuntimeError: if it fails or takes longer than `timeout_secs`.
  """
  with tempfile.TemporaryDirectory() as scratch:
    out, err = Path(scratch, "out"), Path(scratch, "err")
    fresh = {"TORCHINDUCTOR_CACHE_DIR": scratch, "JAX_ENABLE_COMPILATION_CACHE": "false"}
    with out.open("w") as stdout, err.open("w") as stderr:
      process = subprocess.Popen(
        command, cwd=ROOT, env=os.environ | fresh, stdout=stdout, stderr=stderr, process_group=0
      )
      timer = threading.Timer(timeout_secs, os.killpg, (process.pid, signal.SIGKILL))
      timer.start()
      _, status, usage = os.wait4(process.pid, 0)
      in_time = timer.is_alive()
      timer.cancel()
    process.returncode = os.waitstatus_to_exitcode(status)
    written, errors = out.read_text(), err.read_text()
  if not in_time:
    raise RuntimeError(f"{name} took longer than {timeout_secs} s")
  if process.returncode:
    tail = " | ".join(errors.strip().splitlines()[-3:])
    raise RuntimeError(f"{name} ended with {process.returncode}: {tail or 'no message'}")
  unit_bytes = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
  return written, errors, usage.ru_maxrss * unit_bytes / 2**20


def measure(name: str, command: list[str], metric: str, timeout_secs: int) -> dict[str, Any]:
  """Runs a benchmark, whose output ends with a JSON object; returns that and its peak memory.

  Raises:
    RuntimeError: if it fails, takes longer than `timeout_secs` or prints no JSON.
  """
  written, errors, peak_mib = run(name, command, timeout_secs)
  lines = written.splitlines(keepends=True)
  starts = [n for n, line in enumerate(lines) if line.startswith("{")]
  if not starts:
    raise RuntimeError(f"{name} must end with a JSON object, got {written.strip()[-80:]!r}")
  result = json.loads("".join(lines[starts[-1] :]))
  result = result.get("runs", [result])[0] | {"peak_rss_mib": peak_mib}
  warnings = [line for line in errors.splitlines() if "WARNING: experts" in line]
  print(f"{name}: {result[metric]:,.0f} tokens/s", *warnings, file=sys.stderr, flush=True)
  return result
