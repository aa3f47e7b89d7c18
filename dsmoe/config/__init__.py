"""Experiment configs as frozen dataclasses: types, rules, conversion from dicts and JSON."""

from dsmoe.config.build import differences, from_config_dict, from_dict, to_dict, with_defaults
from dsmoe.config.schema import (
  EXCHANGE_FIELDS,
  BalanceConfig,
  CheckpointConfig,
  Config,
  DataConfig,
  ExchangeConfig,
  KernelsConfig,
  LogConfig,
  LossConfig,
  MeshConfig,
  ModelConfig,
  OptimConfig,
  ProfileConfig,
  RopeScaling,
)

__all__ = [
  "EXCHANGE_FIELDS",
  "BalanceConfig",
  "CheckpointConfig",
  "Config",
  "DataConfig",
  "ExchangeConfig",
  "KernelsConfig",
  "LogConfig",
  "LossConfig",
  "MeshConfig",
  "ModelConfig",
  "OptimConfig",
  "ProfileConfig",
  "RopeScaling",
  "differences",
  "from_config_dict",
  "from_dict",
  "to_dict",
  "with_defaults",
]
