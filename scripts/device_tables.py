"""Writes BENCHMARKS.md's tables about GPUs, from the results of scripts/on_device.py.

  python scripts/device_tables.py

Every file of the folder experiments/measurements/ becomes a section, the newest first.
"""

import pathlib

from absl import flags

from dsmoe.on_device import record, tables
from dsmoe.reporting import output

_ROOT = pathlib.Path(__file__).resolve().parent.parent
_FOLDER = flags.DEFINE_string(
  "folder", str(_ROOT / "experiments" / "measurements"), "The folder of results."
)
_DOCUMENT = flags.DEFINE_string(
  "document", str(_ROOT / "BENCHMARKS.md"), "The file with the marks."
)


def sections(folder: pathlib.Path) -> list[str]:
  """Returns the section of every file of results, the newest first.

  Raises:
    ValueError: for a folder without results, or a file that is none.
  """
  files = [record.read(path) for path in sorted(folder.glob("*.json"))]
  files = [rows for rows in files if rows]
  if not files:
    raise ValueError(f"{folder} must have a JSON file with rows, it has none")
  return [tables.section(rows) for rows in sorted(files, key=lambda rows: rows[0]["date"])[::-1]]


def main(argv: list[str]) -> None:
  output.refuse_arguments(argv)
  document = pathlib.Path(_DOCUMENT.value)
  text = document.read_text(encoding="utf-8")
  document.write_text(
    tables.replaced(text, sections(pathlib.Path(_FOLDER.value))), encoding="utf-8"
  )


if __name__ == "__main__":
  output.run_script(main)
