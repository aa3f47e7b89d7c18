"""The file of a session: a list of rows, each with its figures, its part, its chip and its versions."""

import datetime
import importlib.metadata
import json
import os
import pathlib
import subprocess
import threading
from collections.abc import Iterable
from typing import Any

from dsmoe.reporting import code_version, output

# Of every row, beside its part; None where it is not known.
STAMP = ("date", "chip", "driver", "jax", "jaxlib", "commit", "dry_run")
_NVIDIA_SMI = ("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")


def stamp(is_dry_run: bool) -> dict[str, Any]:
  """Returns what every row of a session carries, see `STAMP`.

  The commit is that of the checkout, with the word "changed" where files differ from it; outside a
  checkout it is the variable DSMOE_COMMIT. No backend of JAX is started.
  """
  git = code_version.git()
  commit = os.environ.get("DSMOE_COMMIT") or None
  if git is not None:
    commit = git["commit"] + " changed" * git["is_changed"]
  chip, driver = ("cpu", None) if is_dry_run else _gpu()
  versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")}
  today = datetime.datetime.now(datetime.UTC).date().isoformat()
  found = {"date": today, "chip": chip, "driver": driver, **versions}
  return found | {"commit": commit, "dry_run": is_dry_run}


def _gpu() -> tuple[str, str]:
  """Returns the name of the first GPU and its driver's version.

  Raises:
    ValueError: where there is none.
  """
  try:
    done = subprocess.run(_NVIDIA_SMI, capture_output=True, text=True, check=True, timeout=60)
    name, driver = done.stdout.splitlines()[0].split(", ")
  except (OSError, subprocess.SubprocessError, IndexError, ValueError) as error:
    raise ValueError(
      "an NVIDIA GPU must be attached, or --dry_run given: nvidia-smi names none"
    ) from error
  return name, driver


class Record:
  """Collects rows, from any thread, and writes all of them to the file each time."""

  def __init__(self, path: pathlib.Path, stamped: dict[str, Any]):
    """Begins a file without rows; one that is there is replaced.

    Args:
      path: the file's.
      stamped: what `stamp` returned.
    """
    self._path, self._stamp, self._lock = path, stamped, threading.Lock()
    self.rows: list[dict[str, Any]] = []
    self.add("", [])

  def add(self, part: str, rows: Iterable[dict[str, Any]]) -> None:
    """Adds the rows of a part and writes the file, which is replaced at once."""
    with self._lock:
      self.rows += [{"part": part} | row | self._stamp for row in rows]
      output.write_json_so_far(str(self._path), self.rows)


def read(path: pathlib.Path) -> list[dict[str, Any]]:
  """Returns the rows of a file.

  Raises:
    ValueError: for a file that is no list of rows, each with a part and a stamp.
  """
  try:
    rows = json.loads(path.read_text())
  except json.JSONDecodeError as error:
    raise ValueError(f"{path} must be JSON, got {error}") from error
  if not isinstance(rows, list):
    raise ValueError(f"{path} must be a list of rows, got {type(rows).__name__}")
  for number, row in enumerate(rows):
    if missing := [name for name in ("part", *STAMP) if name not in row]:
      raise ValueError(f"every row of {path} must have {', '.join(missing)}, row {number} has not")
  return rows
