import dataclasses
import importlib
import json
import pathlib

import pytest

from dsmoe import config as config_lib
from tests import runs
from tests.helpers import small_config

ROOT = pathlib.Path(__file__).parent.parent.parent
EXPERIMENTS = sorted(p.stem for p in (ROOT / "experiments").glob("*.py") if p.stem != "__init__")


def _values(**changes):
  """The small config as nested dicts; changes are dotted."""
  values = config_lib.to_dict(small_config())
  for name, value in changes.items():
    *groups, field = name.split(".")
    node = values
    for group in groups:
      node = node[group]
    node[field] = value
  return values


EVEN = {"model.num_attention_heads": 4, "model.moe_intermediate_size": 20}
RULES = [
  ({"model.rope_scaling.factor": 0.5}, "factor must be at least 1.0, got 0.5"),
  (
    {"model.rope_scaling.original_max_position_embeddings": 0},
    "original_max_position_embeddings must be at least 1, got 0",
  ),
  ({"model.rope_scaling.mscale": -1.0}, "mscale must be at least 0.0, got -1.0"),
  ({"model.rope_scaling.mscale_all_dim": -1.0}, "mscale_all_dim must be at least 0.0, got -1.0"),
  (
    {"model.rope_scaling.beta_fast": 0.5},
    "beta_fast (0.5) must be at least beta_slow (1.0), and both must be positive",
  ),
  (
    {"model.rope_scaling.beta_slow": 0.0},
    "beta_fast (32.0) must be at least beta_slow (0.0), and both must be positive",
  ),
  *(
    ({f"model.{name}": 0}, f"{name} must be at least 1, got 0")
    for name in (
      "vocab_size hidden_size num_hidden_layers intermediate_size max_position_embeddings "
      "num_attention_heads kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim "
      "attention_chunk_tokens n_routed_experts num_experts_per_tok moe_intermediate_size "
      "n_group topk_group"
    ).split()
  ),
  *(
    ({f"model.{name}": -1}, f"{name} must be at least 0, got -1")
    for name in ("first_k_dense_replace", "n_shared_experts", "num_nextn_predict_layers")
  ),
  ({"model.rms_norm_eps": 0.0}, "rms_norm_eps must be positive, got 0.0"),
  ({"model.rope_theta": 1.0}, "rope_theta must be above 1, got 1.0"),
  ({"model.initializer_range": -0.1}, "initializer_range must be at least 0, got -0.1"),
  (
    {"balance.methods": ("bias", "bias")},
    "balance.methods must name each method once, got ('bias', 'bias')",
  ),
  (
    {"optim.schedule": "cosine", "optim.warmup_steps": 20, "num_steps": 20},
    "optim.schedule 'cosine' decays after the warm-up: optim.warmup_steps (20) must be below "
    "num_steps (20)",
  ),
  ({"model.q_lora_rank": 0}, "q_lora_rank must be None or at least 1, got 0"),
  ({"model.qk_rope_head_dim": 7}, "qk_rope_head_dim must be even, got 7"),
  (
    {"model.first_k_dense_replace": 6},
    "first_k_dense_replace (6) must not exceed num_hidden_layers (5)",
  ),
  (
    {"model.scoring_func": "tanh"},
    "scoring_func must be one of sigmoid, softmax, sqrtsoftplus, got 'tanh'",
  ),
  (
    {"model.topk_method": "best"},
    "topk_method must be one of noaux_tc, group_limited_greedy, greedy, got 'best'",
  ),
  ({"model.compute_dtype": "f16"}, "compute_dtype must be one of bfloat16, float32, got 'f16'"),
  ({"model.remat": "all"}, "remat must be one of none, dots, full, got 'all'"),
  (
    {"model.dispatch": "far"},
    "dispatch must be one of local, dense, all_gather, all_to_all, ring, replicated, hierarchical, "
    "got 'far'",
  ),
  (
    {"model.exchange.receive_capacity": 0.0},
    "exchange.receive_capacity must be positive, got 0.0",
  ),
  ({"model.exchange.devices_per_group": 0}, "devices_per_group must be at least 1, got 0"),
  (
    {"mesh.expert": 4, "model.dispatch": "hierarchical"},
    "mesh.expert (4) must be divisible by model.exchange.devices_per_group (8)",
  ),
  ({"model.exchange.moe_chunks": 0}, "exchange.moe_chunks must be at least 1, got 0"),
  (
    {"model.exchange.dropless_fallback": "all"},
    "exchange.dropless_fallback must be one of none, step, layer, got 'all'",
  ),
  (
    {"model.exchange.precision": "int8"},
    "exchange.precision must be one of compute_dtype, fp8, got 'int8'",
  ),
  (
    {"model.exchange.receive_capacity": 3.0},
    "exchange.receive_capacity (3.0) must be 2.0 with dispatch 'local', which does not read it",
  ),
  (
    {"model.matmul_precision": "fp4"},
    "matmul_precision must be one of compute_dtype, fp8, fp8_ue8m0, got 'fp4'",
  ),
  (
    {"model.matmul_precision": "fp8", "model.dispatch": "dense"},
    "matmul_precision 'fp8' needs another dispatch than 'dense'",
  ),
  (
    {"model.kernels.routing": "fastest"},
    "kernels.routing must be one of None, reference, mosaic_tpu, mosaic_gpu, got 'fastest'",
  ),
  ({"model.n_group": 5}, "n_routed_experts (12) must be divisible by n_group (5)"),
  ({"model.topk_group": 5}, "topk_group (5) must not exceed n_group (4)"),
  (
    {"model.topk_method": "greedy"},
    "topk_method 'greedy' does not group experts: n_group must be 1, got 4",
  ),
  (
    {"model.num_experts_per_tok": 7},
    "num_experts_per_tok (7) must not exceed topk_group (2) times the 3 experts of a group",
  ),
  (
    {"model.n_group": 12, "model.topk_group": 4},
    "topk_method 'noaux_tc' ranks a group by its best 2 experts: n_routed_experts (12) / "
    "n_group (12) must be at least 2",
  ),
  (
    {"balance.methods": ("bias", "luck")},
    "balance.methods must be one of bias, sequence, got 'luck'",
  ),
  ({"balance.bias_update_speed": -0.1}, "bias_update_speed must be at least 0.0, got -0.1"),
  ({"balance.sequence_loss_weight": -1.0}, "sequence_loss_weight must be at least 0.0, got -1.0"),
  ({"balance.bias_freeze_step": -2}, "bias_freeze_step must be at least -1, got -2"),
  (
    {"balance.methods": ("bias",), "model.topk_method": "group_limited_greedy"},
    "balance.methods 'bias' needs model.topk_method 'noaux_tc', got 'group_limited_greedy'",
  ),
  (
    {"loss.cross_entropy_chunk_tokens": 0},
    "cross_entropy_chunk_tokens must be at least 1, got 0",
  ),
  *(
    ({f"loss.{name}": -0.5}, f"{name} must be at least 0.0, got -0.5")
    for name in ("z_loss_weight", "mtp_loss_weight", "mtp_final_loss_weight")
  ),
  ({"loss.mtp_switch_step": -2}, "mtp_switch_step must be at least -1, got -2"),
  ({"optim.name": "sgd"}, "optim.name must be one of adamw, got 'sgd'"),
  ({"optim.schedule": "step"}, "optim.schedule must be one of cosine, wsd, got 'step'"),
  (
    {"optim.moment_dtype": "int8"},
    "optim.moment_dtype must be one of float32, bfloat16, got 'int8'",
  ),
  *(
    ({f"optim.{name}": -1}, f"{name} must be at least 0, got -1")
    for name in ("warmup_steps", "decay_steps")
  ),
  ({"optim.weight_decay": -1.0}, "weight_decay must be at least 0, got -1.0"),
  ({"optim.clip_norm": -1.0}, "clip_norm must be at least 0, got -1.0"),
  ({"optim.learning_rate": -1.0}, "learning_rate must be at least 0.0, got -1.0"),
  ({"optim.final_learning_rate": -1.0}, "final_learning_rate must be at least 0.0, got -1.0"),
  ({"optim.beta1": 1.0}, "optim.beta1 must be from 0 to the largest float32 below 1, got 1.0"),
  (
    {"optim.beta2": 0.99999999},
    "optim.beta2 must be from 0 to the largest float32 below 1, got 0.99999999",
  ),
  ({"optim.beta2": -0.1}, "optim.beta2 must be from 0 to the largest float32 below 1, got -0.1"),
  ({"optim.epsilon": 0.0}, "optim.epsilon must be positive, got 0.0"),
  (
    {"optim.warmup_steps": 21},
    "optim.warmup_steps (21) must not exceed num_steps (20)",
  ),
  (
    {"optim.schedule": "wsd", "optim.decay_steps": 19},
    "optim.warmup_steps (2) plus decay_steps (19) must not exceed num_steps (20)",
  ),
  ({"data.train_globs": ()}, "data.train_globs must name at least one source, got ()"),
  (
    {"data.train_weights": (1.0, 2.0)},
    "data.train_weights (2 values) must have one weight for each of data.train_globs (1)",
  ),
  ({"data.train_weights": (0.0,)}, "data.train_weights must be positive, got (0.0,)"),
  ({"data.sequence_length": 1}, "sequence_length must be at least 2, got 1"),
  ({"data.fim_rate": 1.5}, "data.fim_rate must be in [0, 1], got 1.5"),
  (
    {"data.sequence_length": 5000},
    "data.sequence_length (5000) must not exceed model.max_position_embeddings (4096)",
  ),
  (
    {"data.sequence_length": 3},
    "num_nextn_predict_layers (2) must be less than data.sequence_length - 1 (2): the deepest "
    "module predicts from the tokens left",
  ),
  ({"mesh.expert": 0}, "expert must be at least 1, got 0"),
  (
    {"mesh.expert": 2},
    "mesh.expert (2) above 1 needs an exchange as model.dispatch, such as 'all_to_all', got 'local'",
  ),
  (
    {"mesh.expert": 5, "model.dispatch": "all_gather"},
    "model.n_routed_experts (12) must be divisible by mesh.expert (5); the nearest that divides "
    "it is 6",
  ),
  ({"mesh.data": 0}, "mesh.data must be -1 or at least 1, got 0"),
  *(
    ({f"mesh.{axis}": 2}, f"mesh.{axis} must be 1 (that axis does not exist yet), got 2")
    for axis in ("stage",)
  ),
  ({"mesh.context": 0}, "context must be at least 1, got 0"),
  (
    {"mesh.context": 2},
    "data.sequence_length (14) must be divisible by twice mesh.context (2): each device has two "
    "chunks of a row, an early one and a late one",
  ),
  (
    {"mesh.context": 7, "model.kernels.attention": "mosaic_gpu"},
    "mesh.context (7) above 1 needs model.kernels.attention to be one of None, reference, xla, "
    "mosaic_tpu, got 'mosaic_gpu'",
  ),
  ({"mesh.model": 0}, "model must be at least 1, got 0"),
  ({"mesh.across_slices": "model"}, "mesh.across_slices must be one of data, expert, got 'model'"),
  *(
    (
      {**EVEN, f"model.{name}": number, "mesh.model": 4},
      f"model.{name} ({number}) must be divisible by mesh.model (4); the nearest that divides it "
      f"is {near}",
    )
    for name, number, near in (
      ("num_attention_heads", 6, 3),
      ("vocab_size", 99, 3),
      ("intermediate_size", 50, 5),
      ("moe_intermediate_size", 21, 3),
    )
  ),
  ({"checkpoint.save_every_steps": 0}, "save_every_steps must be at least 1, got 0"),
  ({"checkpoint.keep_last": 0}, "keep_last must be at least 1, got 0"),
  ({"checkpoint.keep_every_steps": -1}, "keep_every_steps must be at least 0, got -1"),
  ({"checkpoint.copy_keep": -1}, "copy_keep must be at least 0, got -1"),
  *(
    (
      {f"checkpoint.{name}": 40},
      f"checkpoint.{name} (40) must be 0 without checkpoint.copy_to, the folder that checkpoints are "
      "copied to",
    )
    for name in ("copy_every_steps", "copy_keep")
  ),
  *(
    (
      {
        "checkpoint.copy_to": "c",
        "checkpoint.copy_every_steps": n,
        "checkpoint.save_every_steps": 4,
      },
      f"checkpoint.copy_every_steps ({n}) must be a positive multiple of "
      "checkpoint.save_every_steps (4): what is copied are the checkpoints",
    )
    for n in (0, 6)
  ),
  ({"log.log_every_steps": 0}, "log_every_steps must be at least 1, got 0"),
  ({"log.eval_every_steps": 0}, "eval_every_steps must be at least 1, got 0"),
  ({"log.eval_batches": -2}, "log.eval_batches must be -1 (all) or at least 1, got -2"),
  ({"log.eval_batches": 0}, "log.eval_batches must be -1 (all) or at least 1, got 0"),
  *(
    (
      {"profile.steps": steps},
      "profile.steps must be '' for none or FIRST:END, such as '100:103' for the steps 100, 101 "
      f"and 102, with 1 <= FIRST < END, got {steps!r}",
    )
    for steps in ("7", "7:7", "9:7", "0:2", "-1:2", "1:2:3", "a:b", "1: 2", ":3", "¹:²", "1" * 11)
  ),
  (
    {"profile.steps": "3:6", "log.routing_trace_steps": (2, 5)},
    "profile.steps (3:6) must have none of log.routing_trace_steps ([5]), which run another program",
  ),
  ({"seed": -1}, "seed must be from 0 to 4294967295, got -1"),
  ({"data.seed": 2**32}, "seed must be from 0 to 4294967295, got 4294967296"),
  ({"num_steps": 2**31}, "num_steps must be below 2147483648, got 2147483648"),
  ({"log.sample_tokens": -1}, "sample_tokens must be at least 0, got -1"),
  *(
    ({name: 0}, f"{name} must be at least 1, got 0")
    for name in ("batch_size", "num_microbatches", "num_steps")
  ),
  ({"num_microbatches": 3}, "batch_size (16) must be divisible by num_microbatches (3)"),
]


@pytest.mark.parametrize("changes, message", RULES, ids=[m for _, m in RULES])
def test_a_broken_rule_is_named_with_its_values(changes, message):
  with pytest.raises(ValueError) as error:
    config_lib.from_dict(_values(**changes))
  assert str(error.value) == message


def _floats(values, path=()):
  """Lists the dotted names of all floats in nested dicts, and of tuples of floats."""
  for name, value in values.items():
    here = (*path, name)
    if isinstance(value, dict):
      yield from _floats(value, here)
    elif isinstance(value, float) or (isinstance(value, (tuple, list)) and 1.0 in value):
      yield ".".join(here)


FLOATS = sorted(_floats(_values()))


def test_the_list_of_floats_is_not_empty():
  assert len(FLOATS) >= 20 and "data.train_weights" in FLOATS


@pytest.mark.parametrize("number", [float("inf"), -float("inf"), float("nan"), 1e39, 1e-60])
@pytest.mark.parametrize("name", FLOATS)
def test_every_float_must_be_finite(name, number):
  """1e39 is infinite in float32, and 1e-60 is zero."""
  value = (number,) if name == "data.train_weights" else number
  field = name.split(".")[-1]
  with pytest.raises(ValueError, match=f"^{field} must be a finite number of float32, got "):
    config_lib.from_dict(_values(**{name: value}))


def test_an_int_beyond_every_float():
  with pytest.raises(ValueError, match=r"^config.optim.beta1 must be a finite number of float32"):
    config_lib.from_dict(_values(**{"optim.beta1": 10**400}))


@pytest.mark.parametrize(
  "changes, message",
  [
    (
      {"model.hidden_sise": 3},
      "config.model has no field 'hidden_sise'; did you mean 'hidden_size'?",
    ),
    ({"num_step": 3}, "config has no field 'num_step'; did you mean 'num_steps'?"),
    (
      {"model.rope_scaling.mscale_all": 1.0},
      "config.model.rope_scaling has no field 'mscale_all'; did you mean 'mscale_all_dim'?",
    ),
    ({"batch_size": 8.0}, "config.batch_size must be int, got 8.0 of type float"),
    ({"batch_size": True}, "config.batch_size must be int, got True of type bool"),
    ({"optim.beta1": False}, "config.optim.beta1 must be float, got False of type bool"),
    ({"optim.beta1": "0.9"}, "config.optim.beta1 must be float, got '0.9' of type str"),
    ({"log.plots": 1}, "config.log.plots must be bool, got 1 of type int"),
    ({"model.q_lora_rank": 1.5}, "config.model.q_lora_rank must be int, got 1.5 of type float"),
    (
      {"model.hidden_size": None},
      "config.model.hidden_size must be int, got None of type NoneType",
    ),
    ({"data.train_globs": "stdlib"}, "config.data.train_globs must be a tuple, got 'stdlib'"),
    ({"data.train_globs": (1,)}, "config.data.train_globs must be str, got 1 of type int"),
    ({"balance": None}, "config.balance must be a group of fields, got None"),
  ],
)
def test_a_wrong_name_or_type_is_named(changes, message):
  with pytest.raises(ValueError) as error:
    config_lib.from_dict(_values(**changes))
  assert str(error.value) == message


def test_missing_fields_are_named():
  values = _values()
  del values["model"]["v_head_dim"], values["model"]["remat"]
  with pytest.raises(ValueError) as error:
    config_lib.from_dict(values)
  assert str(error.value) == "config.model must have a value for v_head_dim, remat; it has none"


def test_ints_for_floats_none_and_lists_are_accepted():
  config = config_lib.from_dict(
    _values(**{"optim.clip_norm": 2, "model.q_lora_rank": None, "data.train_weights": [3]})
  )
  assert type(config.optim.clip_norm) is float and config.optim.clip_norm == 2.0
  assert config.model.q_lora_rank is None
  assert config.data.train_weights == (3.0,) and type(config.data.train_weights[0]) is float


def test_experts_are_not_asked_of_a_dense_model():
  changes = {"model.first_k_dense_replace": 5, "model.n_routed_experts": 0, "model.n_group": 7}
  model = config_lib.from_dict(_values(**changes)).model
  assert model.num_moe_layers == 0 and not model.uses_router_bias


def test_derived_sizes():
  model = small_config().model
  assert (model.num_moe_layers, model.qk_head_dim, model.uses_router_bias) == (3, 20, True)
  assert not dataclasses.replace(model, topk_method="group_limited_greedy").uses_router_bias


def test_json_and_back_is_the_same_config():
  config = small_config(**{"model.q_lora_rank": None, "balance.methods": ()})
  text = json.dumps(config_lib.to_dict(config))
  again = config_lib.from_dict(json.loads(text))
  assert again == config and hash(again) == hash(config)


def test_a_config_cannot_be_changed():
  with pytest.raises(dataclasses.FrozenInstanceError):
    small_config().model.hidden_size = 3


def test_differences():
  old, new = _values(), _values(**{"seed": 5, "model.rope_scaling.factor": 4.0, "log.plots": False})
  assert config_lib.differences(old, new) == [
    "log.plots: True -> False",
    "model.rope_scaling.factor: 1.0 -> 4.0",
    "seed: 0 -> 5",
  ]
  assert config_lib.differences(old, json.loads(json.dumps(old))) == []  # JSON has lists, no tuples
  del old["seed"], new["loss"]["z_loss_weight"]
  lines = config_lib.differences(old, new)
  assert "seed: (absent) -> 5" in lines and "loss.z_loss_weight: 0.001 -> (absent)" in lines


def test_fields_that_a_saved_config_does_not_have_yet():
  new = _values()
  old = json.loads(json.dumps(new))
  del old["data"]["skip_null_rows"], old["model"]["kernels"]["tuned"], old["model"]["rope_scaling"]
  del old["seed"], old["model"]["exchange"]
  lines = config_lib.differences(config_lib.with_defaults(old), new)
  assert [line.split(":")[0] for line in lines] == ["model.rope_scaling", "seed"]
  assert "skip_null_rows" not in old["data"]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_converts(name):
  c = importlib.import_module(f"experiments.{name}").get_config()
  config = config_lib.from_config_dict(c)
  assert json.loads(json.dumps(config_lib.to_dict(config))) == json.loads(c.to_json())


def _train(*flags):
  code, out, err = runs.call("-m", "dsmoe.train", "--config=experiments/tiny.py", *flags)
  assert code != 0
  return out + err


def test_a_mistyped_flag_fails_and_names_the_nearest_field(tmp_path):
  output = _train("--config.model.hidden_sise=3", f"--workdir={tmp_path}/run")
  assert "hidden_sise" in output and "did you mean" in output and '"hidden_size"' in output
  assert not (tmp_path / "run").exists()


def test_a_flag_of_the_wrong_type_fails_and_names_its_field(tmp_path):
  output = _train("--config.model.hidden_size=1.5", f"--workdir={tmp_path}/run")
  assert "hidden_size" in output and "1.5" in output
  assert not (tmp_path / "run").exists()
