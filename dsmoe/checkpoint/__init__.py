"""A run's checkpoints: saving, resuming, loading for use; `slices` handles parts of arrays."""

from dsmoe.checkpoint.checkpointer import (
  CHECKPOINTS,
  CONFIG_FILE,
  Checkpointer,
  check_whole,
  find_step,
  load_config,
  record_config,
  restore_weights,
  step_folder,
)
from dsmoe.checkpoint.loading import LoadedRun, load_run
from dsmoe.checkpoint.source import tokenizer_path, with_tokenizer_of

__all__ = [
  "CHECKPOINTS",
  "CONFIG_FILE",
  "Checkpointer",
  "LoadedRun",
  "check_whole",
  "find_step",
  "load_config",
  "load_run",
  "record_config",
  "restore_weights",
  "step_folder",
  "tokenizer_path",
  "with_tokenizer_of",
]
