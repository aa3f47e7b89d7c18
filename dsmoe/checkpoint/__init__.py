"""What a run leaves to go on from; `slices` reads and writes its arrays a part at a time."""

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

__all__ = [
  "CHECKPOINTS",
  "CONFIG_FILE",
  "Checkpointer",
  "check_whole",
  "find_step",
  "load_config",
  "record_config",
  "restore_weights",
  "step_folder",
]
