"""A run's checkpoints: saving, resuming, loading for use; `slices` handles parts of arrays."""

from dsmoe.checkpoint.checkpointer import (
  CHECKPOINTS,
  CONFIG_FILE,
  Checkpointer,
  check_whole,
  config_of_step,
  find_step,
  load_config,
  record_config,
  restore_weights,
  step_folder,
)
from dsmoe.checkpoint.loading import LoadedRun, load_run

__all__ = [
  "CHECKPOINTS",
  "CONFIG_FILE",
  "Checkpointer",
  "LoadedRun",
  "check_whole",
  "config_of_step",
  "find_step",
  "load_config",
  "load_run",
  "record_config",
  "restore_weights",
  "step_folder",
]
