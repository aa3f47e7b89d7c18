"""Programs that stand for ssh, srun and others: scripts in a folder that goes first in PATH."""

import os
import pathlib
import subprocess


def put(folder: pathlib.Path, **scripts: str) -> dict[str, str]:
  """Writes each script, lines for bash, under its name; returns an environment that finds it."""
  folder.mkdir(exist_ok=True)
  for name, text in scripts.items():
    path = folder / name
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)
  return os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"}


def start(script: str, env: dict[str, str], folder: pathlib.Path) -> subprocess.Popen:
  """Starts a bash script in a folder; its output is captured as text."""
  checked = subprocess.run(["bash", "-n", "-c", script], capture_output=True, text=True)
  assert (checked.returncode, checked.stderr) == (0, "")
  return subprocess.Popen(
    ["bash", "-c", script],
    cwd=folder,
    env=env,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


# A program that says what it was given and ends with $CODE; with $CODE_AFTER_TERM when that is set:
# then it waits for SIGTERM first. A loop over $(seq 1200) would now and then lose the signal, with
# bash 5.2, where that comes while `seq` runs.
PYTHON = """
trap 'echo terminated; exit ${CODE_AFTER_TERM:-0}' TERM
printf '%s\\n' "$@"
if [ -n "${CODE_AFTER_TERM:-}" ]; then
  touch waiting
  for ((i = 0; i < 1200; i++)); do sleep 0.05; done
fi
exit ${CODE:-0}
"""
