"""Measures kernels, training, decoding and serving on an attached GPU, within 8 minutes, into one JSON file.

  scripts/on_device.sh
  python scripts/on_device.py --out=runs/on_device
  python scripts/on_device.py --out=runs/on_device --parts=kernels_v3,decode
  python scripts/on_device.py --out=runs/dry --dry_run

The parts: the values of every kernel (tests), and beside them a run on real text that is killed and
resumed, and requests to a server of it; then, alone on the device, every kernel beside its
baselines, a training step in bfloat16 and in FP8, decoding with a full cache. Each part has its own
time; one that fails or is cut off keeps what it has measured, and the next one runs. results.json
is written after each part, every row with chip, versions and commit; log.txt has what the commands
wrote. scripts/device_tables.py makes BENCHMARKS.md's tables of such files. With --dry_run every part
runs on a CPU at tiny sizes, so that no time on a GPU is lost to a mistake.
"""

import pathlib
import signal
import sys
import tempfile
import time

from absl import app, flags

from dsmoe.on_device import parts, record
from dsmoe.on_device.session import Session
from dsmoe.reporting import output

_OUT = flags.DEFINE_string("out", None, "Folder for results.json and log.txt.", required=True)
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Run every part on a CPU, at tiny sizes.")
_PARTS = flags.DEFINE_list("parts", list(parts.NAMES), "The parts to run.")

_DRY_RUN_PATIENCE = 20.0  # times a part's limit: a CPU may be busy, and nobody lends its time


def _stop(number: int, _) -> None:
  sys.exit(128 + number)


def main(argv: list[str]) -> int:
  output.refuse_arguments(argv)
  if unknown := [name for name in _PARTS.value if name not in parts.NAMES]:
    raise app.UsageError(f"--parts must be among {', '.join(parts.NAMES)}, got {unknown[0]!r}")
  out = pathlib.Path(_OUT.value)
  out.mkdir(parents=True, exist_ok=True)
  results = out / "results.json"
  signal.signal(signal.SIGTERM, _stop)
  began = time.monotonic()
  found = record.Record(results, record.stamp(_DRY_RUN.value))
  with tempfile.TemporaryDirectory() as folder:
    patience = _DRY_RUN_PATIENCE if _DRY_RUN.value else 1.0
    session = Session(pathlib.Path(folder), found, out / "log.txt", _DRY_RUN.value, patience)
    is_well = session.run(parts.STAGES, _PARTS.value)
  print(f"{results}: {len(found.rows)} rows in {time.monotonic() - began:.0f} s", file=sys.stderr)
  return 0 if is_well else 1


if __name__ == "__main__":
  output.run_script(main)
