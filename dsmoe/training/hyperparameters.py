"""What of a config is an argument of the compiled programs, and what is a part of them.

Runs that differ in arguments only, such as the learning rate, share their programs. Which field is
which stands in two tables: `ARGUMENTS`, and `OUTSIDE`, which names what no program reads. Every
other field is a part of the programs, a new one too until a table names it.
"""

from typing import Any, NamedTuple

import numpy as np

from dsmoe import config as config_lib
from dsmoe.config import Config


class Hyperparameters(NamedTuple):
  """Arguments of the train step: float32 scalars, or int32 where the config has an integer."""

  num_steps: Any
  learning_rate: Any
  final_learning_rate: Any
  warmup_steps: Any
  decay_steps: Any
  beta1: Any
  beta2: Any
  epsilon: Any
  weight_decay: Any
  clip_norm: Any  # that there is clipping at all is a part of the program
  bias_update_speed: Any
  bias_freeze_step: Any
  sequence_loss_weight: Any
  z_loss_weight: Any
  mtp_loss_weight: Any
  mtp_final_loss_weight: Any
  mtp_switch_step: Any


class Initialisation(NamedTuple):
  """Arguments of the program that creates the state."""

  seed: Any  # uint32 scalar
  initializer_range: Any  # float32 scalar


# Each argument's field of the config, with the value that it has in `program_key`, whose type is the
# argument's.
ARGUMENTS: dict[str, Any] = {
  "num_steps": np.int32(1),
  "optim.learning_rate": np.float32(0),
  "optim.final_learning_rate": np.float32(0),
  "optim.warmup_steps": np.int32(0),
  "optim.decay_steps": np.int32(0),
  "optim.beta1": np.float32(0),
  "optim.beta2": np.float32(0),
  "optim.epsilon": np.float32(1),
  "optim.weight_decay": np.float32(0),
  "optim.clip_norm": np.float32(0),
  "balance.bias_update_speed": np.float32(0),
  "balance.bias_freeze_step": np.int32(-1),
  "balance.sequence_loss_weight": np.float32(0),
  "loss.z_loss_weight": np.float32(0),
  "loss.mtp_loss_weight": np.float32(0),
  "loss.mtp_final_loss_weight": np.float32(0),
  "loss.mtp_switch_step": np.int32(-1),
  "seed": np.uint32(0),
  "model.initializer_range": np.float32(1),
}

# Fields that no program of training or validation reads, with their values in `program_key`.
OUTSIDE: dict[str, Any] = {
  "data.train_globs": ("synthetic",),
  "data.train_weights": (1.0,),
  "data.validation_globs": ("synthetic",),
  "data.text_field": "",
  "data.tokenizer": "",
  "data.cache_dir": "",
  "data.fim_rate": 0.0,
  "data.seed": 0,
  "data.skip_null_rows": False,
  "data.eos_token": "",
  "checkpoint.save_every_steps": 1,
  "checkpoint.keep_last": 1,
  "checkpoint.keep_every_steps": 0,
  "checkpoint.copy_to": "",
  "checkpoint.copy_every_steps": 0,
  "checkpoint.copy_keep": 0,
  "log.log_every_steps": 1,
  "log.eval_every_steps": 1,
  "log.eval_batches": 1,
  "log.sample_tokens": 0,
  "log.tensorboard": False,
  "log.plots": False,
  "log.routing_trace_steps": (),
  "recovery.bad_step": "stop",
  "recovery.spike_deviations": 0.0,
  "recovery.spike_window_steps": 128,
  "recovery.max_in_a_row": 10,
  "recovery.rewind_more_batches": 0,
  "recovery.watchdog_secs": 0.0,
  "profile.steps": "",
}


def of(config: Config) -> Hyperparameters:
  """Returns the train step's arguments, NumPy scalars."""
  return Hyperparameters(**_scalars(config, Hyperparameters._fields))


def initialisation_of(config: Config) -> Initialisation:
  """Returns the arguments of the program that creates the state, NumPy scalars."""
  return Initialisation(**_scalars(config, Initialisation._fields))


def program_key(config: Config) -> Config:
  """Returns the config of the compiled programs: arguments and unread fields have fixed values.

  Configs with equal keys have the very same programs on one mesh. Of three fields the key has a
  part: whether there is clipping, whether the step after a bad one goes on (recovery.bad_step
  "skip"), and whether a step is traced, because a traced program must have the names of this code.
  """
  values = config_lib.to_dict(config)
  fixed = {name: value.item() for name, value in ARGUMENTS.items()} | OUTSIDE
  fixed["optim.clip_norm"] = float(config.optim.clip_norm > 0)
  fixed["recovery.bad_step"] = "skip" if config.recovery.bad_step == "skip" else "stop"
  fixed["profile.steps"] = "1:2" if config.profile.traced else ""
  for name, value in fixed.items():
    group, field = _group(values, name)
    group[field] = value
  return config_lib.from_dict(values)


def _group(values: dict[str, Any], name: str) -> tuple[dict[str, Any], str]:
  """Returns the nested dict that has the field of a dotted name, and the field's own name."""
  *groups, field = name.split(".")
  for group in groups:
    values = values[group]
  return values, field


def _scalars(config: Config, fields: tuple[str, ...]) -> dict[str, Any]:
  """Returns those of `ARGUMENTS` whose own names are `fields`, by these names."""
  values, scalars = config_lib.to_dict(config), {}
  for name, fixed in ARGUMENTS.items():
    group, field = _group(values, name)
    if field in fields:
      scalars[field] = fixed.dtype.type(group[field])
  return scalars
