"""Frozen configs and every rule about them, checked once, before any tracing.

An experiment's ConfigDict is turned into a `Config` by `from_config_dict`; below
`train.py` there are only these dataclasses. Literals live in `experiments/base.py`.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from ml_collections import config_dict

from pallas_kernels import grouped_matmul, mla_attention, quantized_matmul, routing
from pallas_kernels.routing import SCORING_FUNCS


def _require(condition: bool, message: str) -> None:
  if not condition:
    raise ValueError(message)


def _one_of(name: str, value: Any, choices: tuple[str | None, ...]) -> None:
  _require(value in choices, f"{name} must be one of {', '.join(map(str, choices))}, got {value!r}")


def _at_least(config: Any, minimum: float, *names: str) -> None:
  for name in names:
    value = getattr(config, name)
    _require(value >= minimum, f"{name} must be at least {minimum}, got {value}")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """YaRN; `factor` 1 means plain RoPE. Source: arXiv:2309.00071 and DeepSeek's config.json."""

  factor: float
  original_max_position_embeddings: int
  beta_fast: float
  beta_slow: float
  mscale: float
  mscale_all_dim: float

  def __post_init__(self):
    _at_least(self, 1.0, "factor")
    _at_least(self, 1, "original_max_position_embeddings")
    _at_least(self, 0.0, "mscale", "mscale_all_dim")
    _require(
      self.beta_fast >= self.beta_slow > 0,
      f"beta_fast ({self.beta_fast}) must be at least beta_slow ({self.beta_slow}), both positive",
    )


@dataclasses.dataclass(frozen=True)
class KernelsConfig:
  """Which implementation computes what; None picks by platform. No choice changes a value.

  Except FP8 on Hopper, whose tensor cores keep about 14 bits of a sum (DeepSeek-V3, 3.3.2).
  """

  routing: str | None = None
  grouped_matmul: str | None = None
  attention: str | None = None
  decode_attention: str | None = None
  quantized_matmul: str | None = None
  tuned: str | None = None

  def __post_init__(self):
    choices: dict[str, Iterable[str]] = {
      "routing": routing.IMPLEMENTATIONS,
      "grouped_matmul": grouped_matmul.IMPLEMENTATIONS,
      "attention": mla_attention.CAUSAL_IMPLEMENTATIONS,
      "decode_attention": mla_attention.DECODE_IMPLEMENTATIONS,
      "quantized_matmul": quantized_matmul.IMPLEMENTATIONS,
    }
    for name, implementations in choices.items():
      _one_of(f"kernels.{name}", getattr(self, name), (None, *implementations))


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """One model. Field meanings: `experiments/base.py`."""

  vocab_size: int
  hidden_size: int
  num_hidden_layers: int
  first_k_dense_replace: int
  intermediate_size: int
  rms_norm_eps: float
  initializer_range: float
  tie_word_embeddings: bool
  max_position_embeddings: int
  num_attention_heads: int
  q_lora_rank: int | None
  kv_lora_rank: int
  qk_nope_head_dim: int
  qk_rope_head_dim: int
  v_head_dim: int
  attention_bias: bool
  rope_theta: float
  rope_interleave: bool
  rope_scaling: RopeScaling
  n_routed_experts: int
  n_shared_experts: int
  num_experts_per_tok: int
  moe_intermediate_size: int
  scoring_func: str
  topk_method: str
  n_group: int
  topk_group: int
  norm_topk_prob: bool
  routed_scaling_factor: float
  num_nextn_predict_layers: int
  compute_dtype: str
  remat: str
  dispatch: str
  attention_chunk_tokens: int
  # Runs saved before these have neither.
  matmul_precision: str = "compute_dtype"
  kernels: KernelsConfig = KernelsConfig()

  @property
  def num_moe_layers(self) -> int:
    """Layers of the main stack that have experts."""
    return self.num_hidden_layers - self.first_k_dense_replace

  @property
  def qk_head_dim(self) -> int:
    return self.qk_nope_head_dim + self.qk_rope_head_dim

  @property
  def quantization(self) -> tuple[str | None, bool]:
    """What the FP8 matmuls want: an implementation, and whether scales are powers of two."""
    return self.kernels.quantized_matmul, self.matmul_precision == "fp8_ue8m0"

  @property
  def uses_router_bias(self) -> bool:
    return self.topk_method == "noaux_tc" and self.num_moe_layers > 0

  def __post_init__(self):
    _at_least(
      self,
      1,
      *("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size"),
      *("max_position_embeddings", "num_attention_heads", "kv_lora_rank", "qk_nope_head_dim"),
      *("qk_rope_head_dim", "v_head_dim", "attention_chunk_tokens"),
    )
    _at_least(self, 0, "first_k_dense_replace", "n_shared_experts", "num_nextn_predict_layers")
    _require(self.rms_norm_eps > 0, f"rms_norm_eps must be positive, got {self.rms_norm_eps}")
    _require(self.rope_theta > 1, f"rope_theta must be above 1, got {self.rope_theta}")
    _at_least(self, 0, "initializer_range")
    _require(
      self.q_lora_rank is None or self.q_lora_rank >= 1,
      f"q_lora_rank must be None or at least 1, got {self.q_lora_rank}",
    )
    _require(
      self.qk_rope_head_dim % 2 == 0,
      f"qk_rope_head_dim must be even, got {self.qk_rope_head_dim}",
    )
    _require(
      self.first_k_dense_replace <= self.num_hidden_layers,
      f"first_k_dense_replace ({self.first_k_dense_replace}) must not exceed "
      f"num_hidden_layers ({self.num_hidden_layers})",
    )
    _one_of("scoring_func", self.scoring_func, SCORING_FUNCS)
    _one_of("topk_method", self.topk_method, ("noaux_tc", "group_limited_greedy", "greedy"))
    _one_of("compute_dtype", self.compute_dtype, ("bfloat16", "float32"))
    _one_of("remat", self.remat, ("none", "dots", "full"))
    _one_of("dispatch", self.dispatch, ("local", "dense"))
    _one_of("matmul_precision", self.matmul_precision, ("compute_dtype", "fp8", "fp8_ue8m0"))
    _require(
      self.matmul_precision == "compute_dtype" or self.dispatch == "local",
      f"matmul_precision {self.matmul_precision!r} needs dispatch 'local', got {self.dispatch!r}",
    )
    if self.num_moe_layers:
      self._check_experts()

  def _check_experts(self):
    E, G, K = self.n_routed_experts, self.n_group, self.num_experts_per_tok
    _at_least(self, 1, "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size")
    _at_least(self, 1, "n_group", "topk_group")
    _require(E % G == 0, f"n_routed_experts ({E}) must be divisible by n_group ({G})")
    _require(self.topk_group <= G, f"topk_group ({self.topk_group}) must not exceed n_group ({G})")
    _require(
      self.topk_method != "greedy" or G == 1,
      f"topk_method 'greedy' has no groups: n_group must be 1, got {G}",
    )
    reachable = self.topk_group * (E // G)
    _require(
      reachable >= K,
      f"num_experts_per_tok ({K}) must not exceed the {reachable} experts of topk_group "
      f"({self.topk_group}) groups of {E // G}",
    )
    _require(
      self.topk_method != "noaux_tc" or G == 1 or E // G >= 2,
      f"topk_method 'noaux_tc' ranks groups by their top 2: n_routed_experts ({E}) / n_group "
      f"({G}) must be at least 2",
    )


@dataclasses.dataclass(frozen=True)
class BalanceConfig:
  """Who moves the load between experts; see `dsmoe/balance.py`."""

  methods: tuple[str, ...]
  bias_update_speed: float
  bias_freeze_step: int
  sequence_loss_weight: float

  def __post_init__(self):
    for method in self.methods:
      _one_of("balance.methods", method, ("bias", "sequence"))
    _require(
      len(set(self.methods)) == len(self.methods),
      f"balance.methods must name each method once, got {self.methods}",
    )
    _at_least(self, 0.0, "bias_update_speed", "sequence_loss_weight")
    _at_least(self, -1, "bias_freeze_step")


@dataclasses.dataclass(frozen=True)
class LossConfig:
  """Weights of the losses; see `dsmoe/losses.py`."""

  cross_entropy_chunk_tokens: int
  z_loss_weight: float
  mtp_loss_weight: float
  mtp_final_loss_weight: float
  mtp_switch_step: int

  def __post_init__(self):
    _at_least(self, 1, "cross_entropy_chunk_tokens")
    _at_least(self, 0.0, "z_loss_weight", "mtp_loss_weight", "mtp_final_loss_weight")
    _at_least(self, -1, "mtp_switch_step")


@dataclasses.dataclass(frozen=True)
class OptimConfig:
  """Optimizer and learning-rate schedule; see `dsmoe/optim.py`."""

  name: str
  learning_rate: float
  schedule: str
  warmup_steps: int
  decay_steps: int
  final_learning_rate: float
  beta1: float
  beta2: float
  epsilon: float
  weight_decay: float
  clip_norm: float
  moment_dtype: str

  def __post_init__(self):
    _one_of("optim.name", self.name, ("adamw",))
    _one_of("optim.schedule", self.schedule, ("cosine", "wsd"))
    _one_of("optim.moment_dtype", self.moment_dtype, ("float32", "bfloat16"))
    _at_least(self, 0, "warmup_steps", "decay_steps", "weight_decay", "clip_norm")
    _at_least(self, 0.0, "learning_rate", "final_learning_rate")
    for name in ("beta1", "beta2"):
      value = getattr(self, name)
      _require(0 <= value < 1, f"optim.{name} must be in [0, 1), got {value}")
    _require(self.epsilon > 0, f"optim.epsilon must be positive, got {self.epsilon}")


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Where tokens come from; see `dsmoe/data.py`."""

  train_globs: tuple[str, ...]
  train_weights: tuple[float, ...]
  validation_globs: tuple[str, ...]
  text_field: str
  tokenizer: str
  cache_dir: str
  sequence_length: int
  cross_document_attention: bool
  fim_rate: float
  seed: int

  def __post_init__(self):
    _require(len(self.train_globs) > 0, "data.train_globs must name at least one source, got ()")
    _require(
      len(self.train_globs) == len(self.train_weights),
      f"data.train_weights ({len(self.train_weights)} values) must have one weight for each of "
      f"data.train_globs ({len(self.train_globs)})",
    )
    for weight in self.train_weights:
      _require(weight > 0, f"data.train_weights must be positive, got {self.train_weights}")
    _at_least(self, 2, "sequence_length")
    _require(0 <= self.fim_rate <= 1, f"data.fim_rate must be in [0, 1], got {self.fim_rate}")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Devices along each mesh axis; see `dsmoe/sharding.py`."""

  stage: int
  data: int
  expert: int
  context: int
  model: int

  def __post_init__(self):
    _require(
      self.data == -1 or self.data >= 1, f"mesh.data must be -1 or at least 1, got {self.data}"
    )
    for axis in ("stage", "expert", "context", "model"):
      size = getattr(self, axis)
      _require(size == 1, f"mesh.{axis} must be 1 (that axis does not exist yet), got {size}")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
  """What is kept of a run; see `dsmoe/checkpoint.py`."""

  save_every_steps: int
  keep_last: int
  keep_every_steps: int

  def __post_init__(self):
    _at_least(self, 1, "save_every_steps", "keep_last")
    _at_least(self, 0, "keep_every_steps")


@dataclasses.dataclass(frozen=True)
class LogConfig:
  """What is measured and when; see `dsmoe/metrics.py`."""

  log_every_steps: int
  eval_every_steps: int
  eval_batches: int
  sample_tokens: int
  tensorboard: bool
  plots: bool

  def __post_init__(self):
    _at_least(self, 1, "log_every_steps", "eval_every_steps")
    _at_least(self, -1, "eval_batches")
    _at_least(self, 0, "sample_tokens")


@dataclasses.dataclass(frozen=True)
class Config:
  """A whole experiment."""

  seed: int
  batch_size: int
  num_microbatches: int
  num_steps: int
  model: ModelConfig
  balance: BalanceConfig
  loss: LossConfig
  optim: OptimConfig
  data: DataConfig
  mesh: MeshConfig
  checkpoint: CheckpointConfig
  log: LogConfig

  def __post_init__(self):
    _at_least(self, 1, "batch_size", "num_microbatches", "num_steps")
    _require(
      self.batch_size % self.num_microbatches == 0,
      f"batch_size ({self.batch_size}) must be divisible by num_microbatches "
      f"({self.num_microbatches})",
    )
    S, longest = self.data.sequence_length, self.model.max_position_embeddings
    _require(
      S <= longest,
      f"data.sequence_length ({S}) must not exceed model.max_position_embeddings ({longest})",
    )
    _require(
      self.model.num_nextn_predict_layers < S - 1,
      f"num_nextn_predict_layers ({self.model.num_nextn_predict_layers}) must leave targets in a "
      f"sequence of {S} tokens",
    )
    _require(
      "bias" not in self.balance.methods
      or self.model.uses_router_bias
      or not self.model.num_moe_layers,
      f"balance.methods 'bias' needs model.topk_method 'noaux_tc', got {self.model.topk_method!r}",
    )
    o = self.optim
    tail = o.decay_steps if o.schedule == "wsd" else 0
    _require(
      o.warmup_steps + tail <= self.num_steps,
      f"optim.warmup_steps ({o.warmup_steps}) plus decay_steps ({tail}) must not exceed "
      f"num_steps ({self.num_steps})",
    )
    _require(
      o.schedule != "cosine" or o.warmup_steps < self.num_steps,
      f"optim.schedule 'cosine' needs steps after warm-up: optim.warmup_steps ({o.warmup_steps}) "
      f"must be below num_steps ({self.num_steps})",
    )


def from_config_dict(config: config_dict.ConfigDict) -> Config:
  """Turns an experiment's ConfigDict into a checked `Config`; see `from_dict`."""
  return from_dict(config.to_dict())


def from_dict(values: Mapping[str, Any]) -> Config:
  """Turns nested dicts, such as a run's saved config.json, into a checked `Config`.

  Raises:
    ValueError: for an unknown or missing field (naming the nearest), a value of the wrong
      type, or a broken rule.
  """
  return _build(Config, values, "config")


def to_dict(config: Any) -> dict[str, Any]:
  """Turns a config dataclass into nested plain dicts, ready for JSON."""
  return dataclasses.asdict(config)


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
  """Lists the fields in which two configs (nested dicts) differ, as `name: old -> new`."""
  lines = []
  for key in sorted(set(old) | set(new)):
    a, b = old.get(key, "(absent)"), new.get(key, "(absent)")
    if isinstance(a, Mapping) and isinstance(b, Mapping):
      lines += differences(a, b, f"{prefix}{key}.")
    elif _plain(a) != _plain(b):
      lines.append(f"{prefix}{key}: {a} -> {b}")
  return lines


def _plain(value: Any) -> Any:
  return list(value) if isinstance(value, (tuple, list)) else value


def _build(cls: type, values: Mapping[str, Any], path: str) -> Any:
  hints = typing.get_type_hints(cls)
  for name in values:
    if name not in hints:
      near = difflib.get_close_matches(name, hints, n=1, cutoff=0.0)
      raise ValueError(f"{path} has no field {name!r}; did you mean {near[0]!r}?")
  optional = {f.name for f in dataclasses.fields(cls) if f.default is not dataclasses.MISSING}
  missing = [name for name in hints if name not in values and name not in optional]
  _require(not missing, f"{path} lacks the field {', '.join(missing)}")
  return cls(**{k: _convert(h, values[k], f"{path}.{k}") for k, h in hints.items() if k in values})


def _convert(hint: Any, value: Any, path: str) -> Any:
  """Checks `value` against a field's type; ints may stand for floats, lists for tuples."""
  if dataclasses.is_dataclass(hint):
    _require(isinstance(value, Mapping), f"{path} must be a group of fields, got {value!r}")
    return _build(typing.cast(type, hint), value, path)
  if typing.get_origin(hint) is tuple:
    _require(isinstance(value, (tuple, list)), f"{path} must be a tuple, got {value!r}")
    return tuple(_convert(typing.get_args(hint)[0], v, path) for v in value)
  if isinstance(hint, types.UnionType):
    if value is None:
      return None
    hint = next(a for a in typing.get_args(hint) if a is not type(None))
  if hint is float and type(value) is int:
    return float(value)
  _require(
    type(value) is hint,
    f"{path} must be {hint.__name__}, got {value!r} of type {type(value).__name__}",
  )
  return value
