"""The place in the data from which a run goes on that has gone back to a checkpoint.

A run that goes back passes over data, which the position that was saved with the checkpoint does not
know. It is written into the checkpoint's folder, so that a run that is killed before its next save
passes over the same data, and so that it is deleted, moved and copied with the checkpoint.
"""

import json
from typing import Any

import jax
from etils import epath

from dsmoe.data import folder as folder_lib

_FILE = "amended_position.json"


def write(folder: epath.Path, position: Any) -> None:
  """Writes a position, values of JSON, into a checkpoint's folder, as a whole; the first process does."""
  if jax.process_index() == 0:
    digest = folder_lib.json_sha256(position)
    folder_lib.write_json(folder / _FILE, {"position": position, "sha256": digest})


def read(folder: epath.Path) -> Any | None:
  """Returns the position that was written last; None if there is none.

  Raises:
    ValueError: when the file is damaged.
  """
  path = folder / _FILE
  if not path.exists():
    return None
  text = path.read_text()
  try:
    saved = json.loads(text)
    position = saved["position"]
    is_whole = folder_lib.json_sha256(position) == saved["sha256"]
  except (ValueError, KeyError, TypeError, RecursionError):
    is_whole = False
  if not is_whole:
    raise ValueError(f"{_FILE} must be as it was written, got {text[:100]!r}")
  return position
