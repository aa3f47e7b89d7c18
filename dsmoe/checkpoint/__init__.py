"""A run's checkpoints: saving, resuming, loading for use; `slices` handles parts of arrays."""

from dsmoe.checkpoint.checkpointer import (
  Checkpointer,
  NotFiniteError,
  find_step,
  restore_weights,
)
from dsmoe.checkpoint.contents import CHECKPOINTS, check_path, step_folder
from dsmoe.checkpoint.loading import LoadedRun, load_run
from dsmoe.checkpoint.lock import InUseError, owned
from dsmoe.checkpoint.run_config import (
  CONFIG_FILE,
  check_config,
  config_of_step,
  load_config,
  record_config,
)
from dsmoe.checkpoint.source import tokenizer_path, with_tokenizer_of
from dsmoe.checkpoint.verification import DamagedSaveError

__all__ = [
  "CHECKPOINTS",
  "CONFIG_FILE",
  "Checkpointer",
  "DamagedSaveError",
  "InUseError",
  "LoadedRun",
  "NotFiniteError",
  "check_config",
  "check_path",
  "config_of_step",
  "find_step",
  "load_config",
  "load_run",
  "owned",
  "record_config",
  "restore_weights",
  "step_folder",
  "tokenizer_path",
  "with_tokenizer_of",
]
