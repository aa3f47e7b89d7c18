"""Converts the config.json of DeepSeek-V2 and -V3 models to our config and back."""

import pathlib
import typing
from collections.abc import Mapping
from typing import Any

from dsmoe.config import KernelsConfig, ModelConfig, RopeScaling

# Fields read under their own names, with the defaults of transformers 5.23's
# DeepseekV3Config and DeepseekV2Config.
FIELDS: dict[str, tuple[Any, Any]] = {
  "vocab_size": (129280, 102400),
  "hidden_size": (7168, 4096),
  "num_hidden_layers": (61, 32),
  "first_k_dense_replace": (3, 0),
  "intermediate_size": (18432, 11008),
  "rms_norm_eps": (1e-6, 1e-6),
  "initializer_range": (0.02, 0.02),
  "tie_word_embeddings": (False, False),
  "max_position_embeddings": (4096, 2048),
  "num_attention_heads": (128, 32),
  "q_lora_rank": (1536, 1536),
  "kv_lora_rank": (512, 512),
  "qk_nope_head_dim": (128, 128),
  "qk_rope_head_dim": (64, 64),
  "v_head_dim": (128, 128),
  "attention_bias": (False, False),
  "rope_interleave": (True, True),
  "n_routed_experts": (256, 64),
  "n_shared_experts": (1, 2),
  "num_experts_per_tok": (8, None),
  "moe_intermediate_size": (2048, 1407),
  "scoring_func": ("sigmoid", "softmax"),
  "topk_method": ("noaux_tc", "greedy"),
  "n_group": (8, None),
  "topk_group": (4, None),
  "norm_topk_prob": (True, False),
  "routed_scaling_factor": (2.5, 1.0),
  "num_nextn_predict_layers": (1, 0),
}
MODEL_TYPES = {"deepseek_v3": 0, "kimi_k2": 0, "deepseek_v2": 1}  # to a column of FIELDS
# Values that V2's class uses whatever config.json says.
V2_FIXED = {"scoring_func": "softmax", "norm_topk_prob": False, "rope_interleave": True}
V2_METHODS = ("greedy", "group_limited_greedy")
# Settings of which one value is supported.
ONLY = {"hidden_act": "silu", "moe_layer_freq": 1, "mlp_bias": False, "attention_dropout": 0.0}
ROPE_FIELDS = typing.get_type_hints(RopeScaling)


def fail(message: str) -> typing.NoReturn:
  """Raises ValueError."""
  raise ValueError(message)


def _rope(hf: Mapping[str, Any], longest: int) -> dict[str, Any]:
  """Reads rope_scaling, or transformers 5's rope_parameters, into our two fields."""
  given = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
  if not isinstance(given, Mapping):
    fail(f"config.json: rope_scaling must be an object or null, got {given!r}")
  given = dict(given)
  theta = given.pop("rope_theta", hf.get("rope_theta", 10000.0))
  kind = given.pop("type", "default")
  kind = given.pop("rope_type", kind)
  if kind not in ("default", "yarn"):
    fail(f"config.json: rope_scaling's type must be yarn or default, got {kind!r}")
  given = {name: value for name, value in given.items() if value is not None}
  unknown = set(given) - set(ROPE_FIELDS if kind == "yarn" else ())
  if unknown:
    fail(f"config.json: rope_scaling of type {kind} must not set {min(unknown)}, got {given}")
  longest = _typed({"max_position_embeddings": int}, "max_position_embeddings", longest)
  original = given.get("original_max_position_embeddings", longest)
  if _typed(ROPE_FIELDS, "original_max_position_embeddings", original) < 1:
    fail(
      "config.json: original_max_position_embeddings (without it, max_position_embeddings) must "
      f"be at least 1, got {original}"
    )
  values = {
    "factor": longest / original if kind == "yarn" else 1.0,
    "original_max_position_embeddings": original,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 0.0,
    "mscale_all_dim": 0.0,
    **given,
  }
  values = {name: _typed(ROPE_FIELDS, name, value) for name, value in values.items()}
  return {"rope_theta": theta, "rope_scaling": RopeScaling(**values)}


def _typed(hints: Mapping[str, Any], name: str, value: Any) -> Any:
  if hints[name] is float and type(value) is int:
    return float(value)
  allowed = typing.get_args(hints[name]) or (hints[name],)
  if type(value) not in allowed:
    wanted = " or ".join(kind.__name__ for kind in allowed)
    fail(f"config.json: {name} must be {wanted}, got {value!r}")
  return value


def fp8_block(hf: Mapping[str, Any]) -> tuple[int, int] | None:
  """Returns the block of a config.json's FP8 weights that shares a scale; None without FP8.

  Raises:
    ValueError: for any other quantisation.
  """
  given = hf.get("quantization_config")
  if not given:
    return None
  if not isinstance(given, Mapping):
    fail(f"config.json: quantization_config must be an object or null, got {given!r}")
  block: Any = given.get("weight_block_size")
  is_block = isinstance(block, (list, tuple)) and len(block) == 2
  is_block = is_block and all(type(n) is int and n > 0 for n in block)
  if given.get("quant_method") != "fp8" or given.get("fmt", "e4m3") != "e4m3" or not is_block:
    fail(
      "config.json: quantization_config must be absent or FP8 (quant_method fp8, fmt e4m3, two "
      f"sizes in weight_block_size), nothing else is supported, got {given}"
    )
  return block[0], block[1]


def fp8_settings(ue8m0: bool) -> dict[str, Any]:
  """Returns a config.json's quantization_config of weights in blocks of 128 x 128."""
  settings = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8"}
  settings |= {"scale_fmt": "ue8m0"} if ue8m0 else {}
  return {**settings, "weight_block_size": [128, 128]}


def config_from_hf(hf: Mapping[str, Any], **fields: Any) -> ModelConfig:
  """Turns the contents of a config.json into our config.

  Args:
    hf: of model_type deepseek_v3, kimi_k2 or deepseek_v2. Missing keys have the defaults of
      transformers' classes; unknown keys, `head_dim` for instance, are ignored.
    **fields: fields of `ModelConfig` that config.json lacks, or whose values override it. The
      defaults are computation in float32, remat none, dispatch local and kernels by platform.

  Raises:
    ValueError: for an unsupported setting, or a value of the wrong type.

  Source: transformers 5.23's DeepseekV3Config and DeepseekV2Config.
  """
  model_type = hf.get("model_type")
  sparse = [key for key in hf if key.startswith("index_")]
  if model_type == "deepseek_v32" or sparse:
    fail(
      f"config.json: sparse attention with an indexer (DeepSeek-V3.2) is not supported, got "
      f"model_type {model_type!r} and the settings {sparse}"
    )
  if not isinstance(model_type, str) or model_type not in MODEL_TYPES:
    fail(f"config.json: model_type must be one of {', '.join(MODEL_TYPES)}, got {model_type!r}")
  fp8_block(hf)
  for name, only in ONLY.items():
    if hf.get(name, only) != only:
      fail(f"config.json: {name} must be {only!r}, nothing else is supported, got {hf[name]!r}")

  is_v2 = MODEL_TYPES[model_type] == 1
  values = {name: hf.get(name, default[is_v2]) for name, default in FIELDS.items()}
  values |= V2_FIXED if is_v2 else {}
  methods = V2_METHODS if is_v2 else ("noaux_tc",)
  if values["topk_method"] not in methods:
    fail(
      f"config.json: topk_method of {model_type} must be {' or '.join(methods)}, got "
      f"{values['topk_method']!r}"
    )
  if not is_v2 and values["scoring_func"] != "sigmoid":
    fail(f"config.json: scoring_func must be 'sigmoid', got {values['scoring_func']!r}")
  if values["topk_method"] == "greedy":
    values |= {"n_group": 1, "topk_group": 1}
  heads = hf.get("num_key_value_heads")
  if heads not in (None, values["num_attention_heads"]):
    fail(
      f"config.json: num_key_value_heads ({heads}) must be num_attention_heads "
      f"({values['num_attention_heads']}): every head has its own keys and values"
    )
  values |= _rope(hf, values["max_position_embeddings"])
  computed: dict[str, Any] = {"compute_dtype": "float32", "remat": "none", "dispatch": "local"}
  computed |= {"matmul_precision": "compute_dtype", "kernels": KernelsConfig()}
  values |= {**computed, "attention_chunk_tokens": 128, **fields}
  hints = typing.get_type_hints(ModelConfig)
  values = {name: _typed(hints, name, value) for name, value in values.items()}
  if values["first_k_dense_replace"] > values["num_hidden_layers"]:  # all layers are dense
    values["first_k_dense_replace"] = values["num_hidden_layers"]
  return ModelConfig(**values)


def config_at(path: pathlib.Path, hf: Mapping[str, Any], **fields: Any) -> ModelConfig:
  """Returns `config_from_hf` of a file's contents; errors begin with its path."""
  try:
    return config_from_hf(hf, **fields)
  except ValueError as error:
    raise ValueError(f"{path}: {str(error).removeprefix('config.json: ')}") from error


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
  """Turns our config into the contents of a config.json, in DeepSeek's own spelling.

  `config_from_hf` turns it back into an equal config, except for the fields about computation and,
  if the factor is 1, the rest of `rope_scaling`, which a published config.json does not have.

  Raises:
    ValueError: if neither the V3 nor the V2 class can express the config.
  """
  values = {name: getattr(config, name) for name in FIELDS}
  is_v3 = (config.scoring_func, config.topk_method) == ("sigmoid", "noaux_tc")
  v2_fits = all(values[name] == value for name, value in V2_FIXED.items())
  if not is_v3 and not (v2_fits and config.topk_method in V2_METHODS):
    fail(
      "a published config.json must be V3's (sigmoid, noaux_tc) or V2's (softmax, greedy or "
      "group_limited_greedy, gates not normalised, rope_interleave), got "
      f"{config.scoring_func}, {config.topk_method}, norm_topk_prob {config.norm_topk_prob}, "
      f"rope_interleave {config.rope_interleave}"
    )
  version = "3" if is_v3 else "2"
  rope = {name: getattr(config.rope_scaling, name) for name in ROPE_FIELDS}
  rope = {name: value for name, value in rope.items() if value}
  return {
    "architectures": [f"DeepseekV{version}ForCausalLM"],
    "model_type": f"deepseek_v{version}",
    **values,
    **ONLY,
    "num_key_value_heads": config.num_attention_heads,
    "rope_theta": config.rope_theta,
    "rope_scaling": {"type": "yarn", **rope} if config.rope_scaling.factor > 1 else None,
    "torch_dtype": "float32",
  }
