"""Runs a benchmark as a process of its own: afresh, with a limit, its peak memory seen."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import rich

ROOT = Path(__file__).resolve().parent.parent.parent


def can_import(python: str, *names: str) -> bool:
  """Whether that interpreter exists and finds those packages; none is imported."""
  code = f"import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, {names!r})))"
  try:
    return subprocess.run([python, "-c", code], capture_output=True).returncode == 0
  except OSError:
    return False


def num_cores() -> int:
  """Cores this process may use; XLA takes as many."""
  return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run(name: str, command: list[str], metric: str, timeout_secs: int) -> dict[str, Any]:
  """Runs one process to its end; returns its JSON line, with peak memory as the kernel saw it.

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
      timer.cancel()
    process.returncode = os.waitstatus_to_exitcode(status)
    lines = out.read_text().strip().splitlines()
    if process.returncode or not lines:
      tail = " | ".join(err.read_text().strip().splitlines()[-3:])
      raise RuntimeError(f"{name} ended with {process.returncode}: {tail or 'no output'}")
    warnings = [x for x in err.read_text().splitlines() if "WARNING: experts" in x]
  unit_bytes = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
  result = json.loads(lines[-1])
  result = result.get("runs", [result])[0] | {"peak_rss_mib": usage.ru_maxrss * unit_bytes / 2**20}
  rich.print(f"{name}: {result[metric]:,.0f} tokens/s", *warnings)
  return result
