"""The frozen config dataclasses and all their rules, checked once, before anything is traced.

An experiment's `get_config` returns an `ml_collections.ConfigDict`, which
`build.from_config_dict` converts to a `Config`. Library code sees only these dataclasses. Values,
and what each field means, are in `experiments/base.py`.
"""

import dataclasses
import re
from collections.abc import Iterable

from dsmoe.config.recovery import RecoveryConfig
from dsmoe.config.rules import at_least, numbers, one_of, require, splits
from pallas_kernels import grouped_matmul, mla_attention, quantized_matmul, routing
from pallas_kernels.routing import SCORING_FUNCS


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """YaRN context extension; with `factor` 1, rotary embeddings are not scaled.

  Source: YaRN (arXiv:2309.00071), and the names of DeepSeek's config.json.
  """

  factor: float
  original_max_position_embeddings: int
  beta_fast: float
  beta_slow: float
  mscale: float
  mscale_all_dim: float

  def __post_init__(self):
    numbers(self)
    at_least(self, 1.0, "factor")
    at_least(self, 1, "original_max_position_embeddings")
    at_least(self, 0.0, "mscale", "mscale_all_dim")
    require(
      self.beta_fast >= self.beta_slow > 0,
      f"beta_fast ({self.beta_fast}) must be at least beta_slow ({self.beta_slow}), and both must "
      "be positive",
    )


@dataclasses.dataclass(frozen=True)
class KernelsConfig:
  """The implementation of each operation, by name; None chooses one for the platform.

  The choice does not change what is computed, with one exception: Hopper's tensor cores keep
  about 14 bits of a sum of FP8 products (DeepSeek-V3, arXiv:2412.19437, section 3.3.2).
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
      one_of(f"kernels.{name}", getattr(self, name), (None, *implementations))


@dataclasses.dataclass(frozen=True)
class ExchangeConfig:
  """How rows are brought to the devices that own their experts; see `dsmoe/parallel`."""

  receive_capacity: float = 2.0
  dropless_fallback: str = "none"
  moe_chunks: int = 1
  precision: str = "compute_dtype"
  devices_per_group: int = 8

  def __post_init__(self):
    numbers(self)
    at_least(self, 1, "devices_per_group")
    require(
      self.receive_capacity > 0,
      f"exchange.receive_capacity must be positive, got {self.receive_capacity}",
    )
    one_of("exchange.dropless_fallback", self.dropless_fallback, ("none", "step", "layer"))
    require(self.moe_chunks >= 1, f"exchange.moe_chunks must be at least 1, got {self.moe_chunks}")
    one_of("exchange.precision", self.precision, ("compute_dtype", "fp8"))


# Which fields of `ExchangeConfig` each `dispatch` reads; the others must have their defaults.
EXCHANGE_FIELDS: dict[str, tuple[str, ...]] = {
  "local": (),
  "dense": (),
  "all_gather": (),
  "all_to_all": ("receive_capacity", "dropless_fallback", "moe_chunks", "precision"),
  "ring": (),
  "replicated": (),
  "hierarchical": ("receive_capacity", "devices_per_group"),
}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """The model's sizes and how it is computed; `experiments/base.py` explains every field."""

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
  # These have defaults because runs saved before they existed do not have them.
  matmul_precision: str = "compute_dtype"
  kernels: KernelsConfig = KernelsConfig()
  exchange: ExchangeConfig = ExchangeConfig()

  @property
  def num_moe_layers(self) -> int:
    """The number of layers with experts, without multi-token prediction modules."""
    return self.num_hidden_layers - self.first_k_dense_replace

  @property
  def qk_head_dim(self) -> int:
    """The size of one query or key head."""
    return self.qk_nope_head_dim + self.qk_rope_head_dim

  @property
  def quantization(self) -> tuple[str | None, bool]:
    """For FP8 matmuls: the implementation's name, and whether scales are powers of two."""
    return self.kernels.quantized_matmul, self.matmul_precision == "fp8_ue8m0"

  @property
  def uses_router_bias(self) -> bool:
    """Whether a bias is added to router scores when experts are selected."""
    return self.topk_method == "noaux_tc" and self.num_moe_layers > 0

  def __post_init__(self):
    numbers(self)
    at_least(self, 1, "vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size")
    at_least(self, 1, "max_position_embeddings", "num_attention_heads", "kv_lora_rank")
    at_least(self, 1, "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    at_least(self, 1, "attention_chunk_tokens")
    at_least(self, 0, "first_k_dense_replace", "n_shared_experts", "num_nextn_predict_layers")
    require(self.rms_norm_eps > 0, f"rms_norm_eps must be positive, got {self.rms_norm_eps}")
    require(self.rope_theta > 1, f"rope_theta must be above 1, got {self.rope_theta}")
    at_least(self, 0, "initializer_range")
    require(
      self.q_lora_rank is None or self.q_lora_rank >= 1,
      f"q_lora_rank must be None or at least 1, got {self.q_lora_rank}",
    )
    require(
      self.qk_rope_head_dim % 2 == 0,
      f"qk_rope_head_dim must be even, got {self.qk_rope_head_dim}",
    )
    require(
      self.first_k_dense_replace <= self.num_hidden_layers,
      f"first_k_dense_replace ({self.first_k_dense_replace}) must not exceed "
      f"num_hidden_layers ({self.num_hidden_layers})",
    )
    one_of("scoring_func", self.scoring_func, SCORING_FUNCS)
    one_of("topk_method", self.topk_method, ("noaux_tc", "group_limited_greedy", "greedy"))
    one_of("compute_dtype", self.compute_dtype, ("bfloat16", "float32"))
    one_of("remat", self.remat, ("none", "dots", "full"))
    one_of("dispatch", self.dispatch, tuple(EXCHANGE_FIELDS))
    self._check_exchange()
    one_of("matmul_precision", self.matmul_precision, ("compute_dtype", "fp8", "fp8_ue8m0"))
    require(
      self.matmul_precision == "compute_dtype" or self.dispatch != "dense",
      f"matmul_precision {self.matmul_precision!r} needs another dispatch than 'dense'",
    )
    if self.num_moe_layers:
      self._check_experts()

  def _check_exchange(self):
    """Refuses options of the exchange that the chosen dispatch would not read."""
    for field in dataclasses.fields(self.exchange):
      value = getattr(self.exchange, field.name)
      if value != field.default and field.name not in EXCHANGE_FIELDS[self.dispatch]:
        raise ValueError(
          f"exchange.{field.name} ({value!r}) must be {field.default!r} with dispatch "
          f"{self.dispatch!r}, which does not read it"
        )

  def _check_experts(self):
    """Checks the rules that hold only for a model with experts."""
    E, G, K = self.n_routed_experts, self.n_group, self.num_experts_per_tok
    at_least(self, 1, "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size")
    at_least(self, 1, "n_group", "topk_group")
    require(E % G == 0, f"n_routed_experts ({E}) must be divisible by n_group ({G})")
    require(self.topk_group <= G, f"topk_group ({self.topk_group}) must not exceed n_group ({G})")
    require(
      self.topk_method != "greedy" or G == 1,
      f"topk_method 'greedy' does not group experts: n_group must be 1, got {G}",
    )
    reachable = self.topk_group * (E // G)
    require(
      reachable >= K,
      f"num_experts_per_tok ({K}) must not exceed topk_group ({self.topk_group}) times the "
      f"{E // G} experts of a group",
    )
    require(
      self.topk_method != "noaux_tc" or G == 1 or E // G >= 2,
      f"topk_method 'noaux_tc' ranks a group by its best 2 experts: n_routed_experts ({E}) / "
      f"n_group ({G}) must be at least 2",
    )


@dataclasses.dataclass(frozen=True)
class BalanceConfig:
  """How the load of experts is balanced; see `dsmoe/training/balance.py`."""

  methods: tuple[str, ...]
  bias_update_speed: float
  bias_freeze_step: int
  sequence_loss_weight: float

  def __post_init__(self):
    numbers(self)
    for method in self.methods:
      one_of("balance.methods", method, ("bias", "sequence"))
    require(
      len(set(self.methods)) == len(self.methods),
      f"balance.methods must name each method once, got {self.methods}",
    )
    at_least(self, 0.0, "bias_update_speed", "sequence_loss_weight")
    at_least(self, -1, "bias_freeze_step")


@dataclasses.dataclass(frozen=True)
class LossConfig:
  """The terms of the loss and their weights; see `dsmoe/training/losses.py`."""

  cross_entropy_chunk_tokens: int
  z_loss_weight: float
  mtp_loss_weight: float
  mtp_final_loss_weight: float
  mtp_switch_step: int

  def __post_init__(self):
    numbers(self)
    at_least(self, 1, "cross_entropy_chunk_tokens")
    at_least(self, 0.0, "z_loss_weight", "mtp_loss_weight", "mtp_final_loss_weight")
    at_least(self, -1, "mtp_switch_step")


@dataclasses.dataclass(frozen=True)
class OptimConfig:
  """The optimizer and the learning-rate schedule; see `dsmoe/training/optim.py`."""

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
    numbers(self)
    one_of("optim.name", self.name, ("adamw",))
    one_of("optim.schedule", self.schedule, ("cosine", "wsd"))
    one_of("optim.moment_dtype", self.moment_dtype, ("float32", "bfloat16"))
    at_least(self, 0, "warmup_steps", "decay_steps", "weight_decay", "clip_norm")
    at_least(self, 0.0, "learning_rate", "final_learning_rate")
    for name in ("beta1", "beta2"):
      value = getattr(self, name)
      require(
        0 <= value <= 1 - 2**-24,
        f"optim.{name} must be from 0 to the largest float32 below 1, got {value}",
      )
    require(self.epsilon > 0, f"optim.epsilon must be positive, got {self.epsilon}")


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """The text, its tokenizer and how sequences are made; see `dsmoe/data/batches.py`."""

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
  # These have defaults because runs saved before they existed do not have them.
  skip_null_rows: bool = False
  eos_token: str = ""

  def __post_init__(self):
    numbers(self)
    require(
      bool(self.tokenizer) or not self.eos_token,
      f"data.eos_token ({self.eos_token!r}) must be a token of data.tokenizer, which is not set",
    )
    require(len(self.train_globs) > 0, "data.train_globs must name at least one source, got ()")
    require(
      len(self.train_globs) == len(self.train_weights),
      f"data.train_weights ({len(self.train_weights)} values) must have one weight for each of "
      f"data.train_globs ({len(self.train_globs)})",
    )
    for weight in self.train_weights:
      require(weight > 0, f"data.train_weights must be positive, got {self.train_weights}")
    at_least(self, 2, "sequence_length")
    require(0 <= self.fim_rate <= 1, f"data.fim_rate must be in [0, 1], got {self.fim_rate}")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """The number of devices along each mesh axis; see `dsmoe/parallel/sharding.py`."""

  stage: int
  data: int
  expert: int
  context: int
  model: int
  # These have defaults because runs saved before they existed do not have them.
  across_slices: str = "data"

  def __post_init__(self):
    numbers(self)
    one_of("mesh.across_slices", self.across_slices, ("data", "expert"))
    require(
      self.data == -1 or self.data >= 1, f"mesh.data must be -1 or at least 1, got {self.data}"
    )
    at_least(self, 1, "expert", "context", "model")
    require(
      self.stage == 1, f"mesh.stage must be 1 (that axis does not exist yet), got {self.stage}"
    )


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
  """When checkpoints are saved and which are kept; see `dsmoe/checkpoint/checkpointer.py`."""

  save_every_steps: int
  keep_last: int
  keep_every_steps: int
  # These have defaults because runs saved before they existed do not have them.
  copy_to: str = ""
  copy_every_steps: int = 0
  copy_keep: int = 0

  def __post_init__(self):
    numbers(self)
    at_least(self, 1, "save_every_steps", "keep_last")
    at_least(self, 0, "keep_every_steps", "copy_every_steps", "copy_keep")
    for name in () if self.copy_to else ("copy_every_steps", "copy_keep"):
      require(
        getattr(self, name) == 0,
        f"checkpoint.{name} ({getattr(self, name)}) must be 0 without checkpoint.copy_to, the folder "
        "that checkpoints are copied to",
      )
    require(
      not self.copy_to
      or (self.copy_every_steps > 0 and self.copy_every_steps % self.save_every_steps == 0),
      f"checkpoint.copy_every_steps ({self.copy_every_steps}) must be a positive multiple of "
      f"checkpoint.save_every_steps ({self.save_every_steps}): what is copied are the checkpoints",
    )


@dataclasses.dataclass(frozen=True)
class LogConfig:
  """What is logged, evaluated and drawn, and when; see `dsmoe/reporting/metrics.py`."""

  log_every_steps: int
  eval_every_steps: int
  eval_batches: int
  sample_tokens: int
  tensorboard: bool
  plots: bool
  # These have defaults because runs saved before they existed do not have them.
  routing_trace_steps: tuple[int, ...] = ()

  def __post_init__(self):
    numbers(self)
    at_least(self, 1, "log_every_steps", "eval_every_steps")
    require(
      self.eval_batches == -1 or self.eval_batches >= 1,
      f"log.eval_batches must be -1 (all) or at least 1, got {self.eval_batches}",
    )
    at_least(self, 0, "sample_tokens")


@dataclasses.dataclass(frozen=True)
class ProfileConfig:
  """Which steps the profiler traces; see `dsmoe/profiling/capture.py`."""

  steps: str = ""

  def __post_init__(self):
    found = re.fullmatch("([0-9]{1,10}):([0-9]{1,10})", self.steps)
    require(
      not self.steps or (found is not None and 1 <= int(found[1]) < int(found[2])),
      "profile.steps must be '' for none or FIRST:END, such as '100:103' for the steps 100, 101 and "
      f"102, with 1 <= FIRST < END, got {self.steps!r}",
    )

  @property
  def traced(self) -> range:
    """The steps to trace, an empty range for none."""
    return range(*map(int, self.steps.split(":"))) if self.steps else range(0)


@dataclasses.dataclass(frozen=True)
class Config:
  """One experiment: the model, the data, and how it is trained."""

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
  # These have defaults because runs saved before they existed do not have them.
  recovery: RecoveryConfig = RecoveryConfig()  # noqa: RUF009 (it is frozen)
  profile: ProfileConfig = ProfileConfig()

  def __post_init__(self):
    numbers(self)
    at_least(self, 1, "batch_size", "num_microbatches", "num_steps")
    require(
      self.batch_size % self.num_microbatches == 0,
      f"batch_size ({self.batch_size}) must be divisible by num_microbatches "
      f"({self.num_microbatches})",
    )
    S, longest = self.data.sequence_length, self.model.max_position_embeddings
    require(
      S <= longest,
      f"data.sequence_length ({S}) must not exceed model.max_position_embeddings ({longest})",
    )
    require(
      self.model.num_nextn_predict_layers < S - 1,
      f"num_nextn_predict_layers ({self.model.num_nextn_predict_layers}) must be less than "
      f"data.sequence_length - 1 ({S - 1}): the deepest module predicts from the tokens left",
    )
    require(
      "bias" not in self.balance.methods
      or self.model.uses_router_bias
      or not self.model.num_moe_layers,
      f"balance.methods 'bias' needs model.topk_method 'noaux_tc', got {self.model.topk_method!r}",
    )
    traced = self.log.routing_trace_steps
    require(
      all(1 <= step <= self.num_steps for step in traced),
      f"log.routing_trace_steps must be from 1 to num_steps ({self.num_steps}), got {traced}",
    )
    require(
      not traced or self.model.num_moe_layers > 0,
      f"log.routing_trace_steps ({traced}) needs a model with experts: first_k_dense_replace "
      f"({self.model.first_k_dense_replace}) must be below num_hidden_layers "
      f"({self.model.num_hidden_layers})",
    )
    both = [step for step in traced if step in self.profile.traced]
    require(
      not both,
      f"profile.steps ({self.profile.steps}) must have none of log.routing_trace_steps ({both}), "
      "which run another program",
    )
    self._check_context()
    E, devices = self.model.n_routed_experts, self.mesh.expert
    if devices > 1 and self.model.num_moe_layers:
      require(
        self.model.dispatch != "local",
        f"mesh.expert ({devices}) above 1 needs an exchange as model.dispatch, such as "
        f"'all_to_all', got {self.model.dispatch!r}",
      )
      splits("model.n_routed_experts", E, "mesh.expert", devices)
      group = self.model.exchange.devices_per_group
      require(
        self.model.dispatch != "hierarchical" or devices % group == 0,
        f"mesh.expert ({devices}) must be divisible by model.exchange.devices_per_group ({group})",
      )
    if self.mesh.model > 1:
      split = ["num_attention_heads", "vocab_size"]
      split += ["intermediate_size"] if self.model.first_k_dense_replace else []
      split += ["moe_intermediate_size"] if self.model.num_moe_layers else []
      for name in split:
        splits(f"model.{name}", getattr(self.model, name), "mesh.model", self.mesh.model)
    o = self.optim
    tail = o.decay_steps if o.schedule == "wsd" else 0
    require(
      o.warmup_steps + tail <= self.num_steps,
      f"optim.warmup_steps ({o.warmup_steps}){f' plus decay_steps ({tail})' if tail else ''} must not "
      f"exceed num_steps ({self.num_steps})",
    )
    require(
      o.schedule != "cosine" or o.warmup_steps < self.num_steps,
      f"optim.schedule 'cosine' decays after the warm-up: optim.warmup_steps ({o.warmup_steps}) "
      f"must be below num_steps ({self.num_steps})",
    )

  def _check_context(self):
    """Checks the rules that hold where rows are split over devices."""
    S, X, attention = self.data.sequence_length, self.mesh.context, self.model.kernels.attention
    if X == 1:
      return
    require(
      S % (2 * X) == 0,
      f"data.sequence_length ({S}) must be divisible by twice mesh.context ({X}): each device has "
      "two chunks of a row, an early one and a late one",
    )
    choices = (None, *mla_attention.RUN_IMPLEMENTATIONS)
    require(
      attention in choices,
      f"mesh.context ({X}) above 1 needs model.kernels.attention to be one of "
      f"{', '.join(map(str, choices))}, got {attention!r}",
    )
