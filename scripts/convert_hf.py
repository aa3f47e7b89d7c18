"""Converts Hugging Face checkpoints to a run's workdir and back, and compares two checkpoints.

python scripts/convert_hf.py import --folder=DeepSeek-V2-Lite --workdir=runs/v2_lite
python scripts/convert_hf.py export --workdir=runs/tiny --folder=out/tiny --format=bfloat16
python scripts/convert_hf.py verify --first=DeepSeek-V2-Lite --second=runs/v2_lite

Reads DeepSeek V2, V2-Lite, V3, R1, V3.1, Moonlight and Kimi K2, with FP8 weights or without. An
interrupted `import` or `export` resumes when the same command is given again. `verify` exits with
code 1 if the logits of random tokens differ by more than --tolerance.
"""

import numpy as np
import rich
from absl import app, flags

from dsmoe import config as config_lib
from dsmoe import runtime
from dsmoe.huggingface import convert, verify
from dsmoe.reporting import output, progress
from experiments import base

_FOLDER = flags.DEFINE_string(
  "folder", None, "Folder of Hugging Face's files: read by import, created by export."
)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "A run's folder, on disk: read by export, created by import."
)
_DTYPE = flags.DEFINE_enum(
  "dtype",
  None,
  ["float32", "bfloat16"],
  "import: dtype of matrices on disk; by default bfloat16 if all are published so, else float32.",
)
_COMPUTE_DTYPE = flags.DEFINE_enum(
  "compute_dtype",
  "bfloat16",
  ["float32", "bfloat16"],
  "import: dtype of the model's matrix products.",
)
_NO_MTP = flags.DEFINE_bool("no_mtp", False, "import: leave out multi-token prediction layers.")
_FORMAT = flags.DEFINE_enum("format", "bfloat16", convert.FORMATS, "export: format of the weights.")
_UE8M0 = flags.DEFINE_bool(
  "ue8m0", False, "export: whether FP8 scales are powers of two, a byte each."
)
_MAX_SHARD_BYTES = flags.DEFINE_integer(
  "max_shard_bytes", 5 * 10**9, "export: upper limit of a file of weights, in bytes.", lower_bound=1
)
_STEP = flags.DEFINE_integer("step", None, "export: step of the checkpoint; by default the newest.")
_FIRST = flags.DEFINE_string("first", None, "verify: a Hugging Face folder or a workdir.")
_SECOND = flags.DEFINE_string("second", None, "verify: the other one, likewise.")
_BATCH_SIZE = flags.DEFINE_integer(
  "batch_size", 2, "verify: number of rows of tokens.", lower_bound=1
)
_SEQUENCE_LENGTH = flags.DEFINE_integer(
  "sequence_length", 32, "verify: tokens in a row.", lower_bound=2
)
_SEED = flags.DEFINE_integer("seed", 0, "verify: seed of the random tokens.", lower_bound=0)
_TOLERANCE = flags.DEFINE_float(
  "tolerance", 2e-4, "verify: upper limit of the difference of logits."
)


def _required(*options: flags.FlagHolder) -> list[str]:
  for option in options:
    if option.value is None or not option.value.strip():
      raise app.UsageError(f"--{option.name} must be given, and not empty")
  return [str(option.value) for option in options]


def _import() -> None:
  folder, workdir = _required(_FOLDER, _WORKDIR)
  defaults = config_lib.from_config_dict(base.get_config())
  account = convert.import_folder(
    folder, workdir, defaults, _COMPUTE_DTYPE.value, dtype=_DTYPE.value, no_mtp=_NO_MTP.value
  )
  rows = [(name.replace("_", " "), f"{len(value):,}") for name, value in account._asdict().items()]
  rich.print(progress.final_table(rows, title="tensors"))
  reasons = {
    why if why.startswith("follows") else why.split()[0].rstrip(",")
    for why in account.not_kept.values()
  }
  for reason in sorted(reasons):
    names = [name for name, why in account.not_kept.items() if why.startswith(reason)]
    print(f"not kept, {reason}: {len(names)}, such as {names[0]} ({account.not_kept[names[0]]})")


def _export() -> None:
  workdir, folder = _required(_WORKDIR, _FOLDER)
  options = (_FORMAT.value, _UE8M0.value, _MAX_SHARD_BYTES.value, _STEP.value)
  step = convert.export_workdir(workdir, folder, *options)
  print(f"{folder}: step {step} of {workdir}, {_FORMAT.value}")


def _verify() -> None:
  if not 0 <= _TOLERANCE.value < float("inf"):
    raise app.UsageError(f"--tolerance must be at least 0 and finite, got {_TOLERANCE.value}")
  first, second = (verify.open_source(path) for path in _required(_FIRST, _SECOND))
  shape = (_BATCH_SIZE.value, _SEQUENCE_LENGTH.value)
  tokens = np.random.default_rng(_SEED.value).integers(0, first.config.vocab_size, shape)
  rows = list(verify.compare(first, second, tokens.astype(np.int32)))
  rich.print(verify.table(rows))
  [logits] = [row for row in rows if row.name == "logits"]
  print(f"logits differ by {logits.difference:.3g}; worst: {verify.worst(rows).name}")
  if verify.exceeds(rows, _TOLERANCE.value):
    output.fail(f"logits must not differ by more than --tolerance={_TOLERANCE.value:g}", 1)


# The function of each command, and the flags that it reads.
COMMANDS = {
  "import": (_import, (_FOLDER, _WORKDIR, _DTYPE, _COMPUTE_DTYPE, _NO_MTP)),
  "export": (_export, (_FOLDER, _WORKDIR, _FORMAT, _UE8M0, _MAX_SHARD_BYTES, _STEP)),
  "verify": (_verify, (_FIRST, _SECOND, _BATCH_SIZE, _SEQUENCE_LENGTH, _SEED, _TOLERANCE)),
}


def _check_flags(command: str) -> None:
  own = [option.name for option in COMMANDS[command][1]]
  for name in [option.name for _, options in COMMANDS.values() for option in options]:
    if name not in own and flags.FLAGS[name].present:
      raise app.UsageError(
        f"--{name} must not be given with {command}, which reads --{', --'.join(own)}"
      )


def main(argv: list[str]) -> None:
  if len(argv) != 2 or argv[1] not in COMMANDS:
    raise app.UsageError(f"one of {', '.join(COMMANDS)} must be given, got {' '.join(argv[1:])!r}")
  command = argv[1]
  _check_flags(command)
  try:
    if command == "verify":
      runtime.start()
    COMMANDS[command][0]()
  except KeyboardInterrupt:
    again = "" if command == "verify" else "; the same command resumes it"
    output.fail(f"interrupted{again}", 130)


if __name__ == "__main__":
  output.run_script(main)
