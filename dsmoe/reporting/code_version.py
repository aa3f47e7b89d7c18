"""Which code a run was made by."""

import importlib.metadata
import json
import os
import pathlib
import subprocess
from typing import Any

import dsmoe
import pallas_kernels
from dsmoe import config as config_lib
from dsmoe.config import Config
from dsmoe.parallel import processes

_LIBRARIES = ("dsmoe", "jax", "jaxlib")
_GIT_SECS = 20.0


def versions() -> dict[str, str]:
  """Returns the versions of libraries, and a digest of each folder of this code, by their names."""
  found = {name: importlib.metadata.version(name) for name in _LIBRARIES}
  return found | processes.source_digests(dsmoe, pallas_kernels)


def check_processes(config: Config) -> dict[str, str]:
  """Checks that all processes of a run have the same config, libraries and source code.

  Returns:
    See `versions`.

  Raises:
    ValueError: naming a process that differs, and the difference.
  """

  def differences(one: str, other: str) -> str:
    return "; ".join(config_lib.differences(json.loads(one), json.loads(other)))

  found = versions()
  for what, value in (("config", config_lib.to_dict(config)), ("versions", found)):
    processes.check_same(what, json.dumps(value), differences)
  return found


def git(folder: str | os.PathLike | None = None) -> dict[str, Any] | None:
  """Returns the commit that the code was checked out from.

  Args:
    folder: in which the packages lie; None: that of this code.

  Returns:
    `commit`, and `is_changed`: whether a file that git knows differs from the commit; None where the
    code is no part of a checkout, or git is not there or does not answer.
  """
  if folder is None:
    folder = pathlib.Path(dsmoe.__path__[0]).parent

  def ask(*arguments: str) -> str:
    # Git is to look at this folder's checkout, whatever it was told of another, and to write nothing.
    env = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    env["GIT_OPTIONAL_LOCKS"] = "0"
    command = ["git", "-C", os.fspath(folder), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=_GIT_SECS)
    done.check_returncode()
    return done.stdout.strip()

  try:
    ask("ls-files", "--error-unmatch", "dsmoe/__init__.py")  # installed inside another checkout?
    commit = ask("rev-parse", "HEAD")
    return {
      "commit": commit,
      "is_changed": bool(ask("status", "--porcelain", "--untracked-files=no")),
    }
  except (OSError, subprocess.SubprocessError):
    return None
