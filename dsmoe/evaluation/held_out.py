"""Says when a text that measures a model is also one that it was trained on."""

import json
from collections.abc import Mapping
from typing import Any

from absl import logging
from etils import epath

_EMPTY = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"  # SHA-256 of no bytes


def overlap(evaluated: Mapping[str, Any], trained: Mapping[str, Any]) -> list[tuple[str, str]]:
  """Returns the files of a validation set that are also training files, by their content.

  Args:
    evaluated: a manifest.json, whose validation sources count.
    trained: a manifest.json, whose training sources count; it may be the same.

  Returns:
    (validation file, training file) for each validation file that has a twin, empty files aside.
  """
  of_training = {digest: file for file, digest in _files(trained, "train-") if digest != _EMPTY}
  held_out = _files(evaluated, "validation-")
  return [(file, of_training[digest]) for file, digest in held_out if digest in of_training]


def _files(manifest: Mapping[str, Any], prefix: str) -> list[tuple[str, str]]:
  by_name = manifest["inputs"]["sources"]
  found = [source["sha256"].items() for name, source in by_name.items() if name.startswith(prefix)]
  return [pair for pairs in found for pair in pairs]


def warn_of_overlap(evaluated: epath.Path, trained: epath.Path) -> None:
  """Warns when `overlap` finds files; does nothing where a manifest does not exist.

  Args:
    evaluated: path of the manifest.json of what is measured.
    trained: path of that of the training data; an imported checkpoint has none.
  """
  if not evaluated.exists() or not trained.exists():
    return
  try:
    found = overlap(*(json.loads(path.read_text()) for path in (evaluated, trained)))
  except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
    logging.warning("whether the text was also training data is unknown: %s is damaged", trained)
    return
  if found:
    logging.warning(
      "the loss is not that of unseen text: %d validation files are also training data, such as "
      "%s, which is %s",
      *(len(found), *found[0]),
    )
