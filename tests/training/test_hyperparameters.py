"""Every field of a config is an argument of the programs, a part of them, or not read by them."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from flax import nnx

from dsmoe import config as config_lib
from dsmoe import model as model_lib
from dsmoe.training import hyperparameters, train_step
from tests.helpers import mesh_of, random_batch, small_config

SMALL = {
  "batch_size": 6,
  "num_steps": 20,
  "model.num_hidden_layers": 1,
  "model.first_k_dense_replace": 0,
  "model.num_nextn_predict_layers": 1,
  "model.rope_scaling.beta_fast": 32.0,
  "model.n_routed_experts": 8,
  "optim.schedule": "wsd",
  "optim.warmup_steps": 4,
  "optim.decay_steps": 6,
  "optim.clip_norm": 1e-3,
  "optim.epsilon": 1e-3,
  "loss.mtp_switch_step": 15,
  "balance.bias_freeze_step": 15,
  "data.tokenizer": "tokenizer.json",
  "data.sequence_length": 8,
  "checkpoint.copy_to": "copies",
  "checkpoint.copy_every_steps": 200,
  "recovery.bad_step": "rewind",
  "recovery.spike_deviations": 6.0,
}
# Another value of each field, which is valid with the others of `SMALL`.
ARGUMENTS = {
  "seed": 2**32 - 3,
  "num_steps": 24,
  "model.initializer_range": 0.07,
  "balance.bias_update_speed": 0.02,
  "balance.bias_freeze_step": 17,
  "balance.sequence_loss_weight": 0.3,
  "loss.z_loss_weight": 0.02,
  "loss.mtp_loss_weight": 0.4,
  "loss.mtp_final_loss_weight": 0.2,
  "loss.mtp_switch_step": 17,
  "optim.learning_rate": 0.02,
  "optim.warmup_steps": 5,
  "optim.decay_steps": 7,
  "optim.final_learning_rate": 0.004,
  "optim.beta1": 0.8,
  "optim.beta2": 0.9,
  "optim.epsilon": 1e-2,
  "optim.weight_decay": 0.3,
  "optim.clip_norm": 5e-4,
}
NOT_READ = {
  "data.train_globs": ("stdlib",),
  "data.train_weights": (2.0,),
  "data.validation_globs": ("stdlib",),
  "data.text_field": "a.b",
  "data.tokenizer": "other.json",
  "data.cache_dir": "cache",
  "data.fim_rate": 0.5,
  "data.seed": 3,
  "data.skip_null_rows": True,
  "data.eos_token": "<end>",
  "checkpoint.save_every_steps": 100,
  "checkpoint.keep_last": 3,
  "checkpoint.keep_every_steps": 7,
  "checkpoint.copy_to": "others",
  "checkpoint.copy_every_steps": 400,
  "checkpoint.copy_keep": 3,
  "log.log_every_steps": 3,
  "log.eval_every_steps": 3,
  "log.eval_batches": 3,
  "log.sample_tokens": 3,
  "log.tensorboard": False,
  "log.plots": False,
  "log.routing_trace_steps": (3,),
  "recovery.bad_step": "stop",
  "recovery.spike_deviations": 5.0,
  "recovery.spike_window_steps": 64,
  "recovery.max_in_a_row": 5,
  "recovery.rewind_more_batches": 4,
  "recovery.watchdog_secs": 5.0,
}
A_PART = {
  "batch_size": 12,
  "num_microbatches": 2,
  "model.vocab_size": 98,
  "model.hidden_size": 44,
  "model.num_hidden_layers": 2,
  "model.first_k_dense_replace": 1,
  "model.intermediate_size": 60,
  "model.rms_norm_eps": 1e-5,
  "model.tie_word_embeddings": True,
  "model.max_position_embeddings": 64,
  "model.num_attention_heads": 5,
  "model.q_lora_rank": None,
  "model.kv_lora_rank": 20,
  "model.qk_nope_head_dim": 14,
  "model.qk_rope_head_dim": 6,
  "model.v_head_dim": 14,
  "model.attention_bias": True,
  "model.rope_theta": 1000.0,
  "model.rope_interleave": False,
  "model.rope_scaling.factor": 2.0,
  "model.rope_scaling.original_max_position_embeddings": 64,
  "model.rope_scaling.beta_fast": 16.0,
  "model.rope_scaling.beta_slow": 2.0,
  "model.rope_scaling.mscale": 1.0,
  "model.rope_scaling.mscale_all_dim": 1.0,
  "model.n_routed_experts": 16,
  "model.n_shared_experts": 1,
  "model.num_experts_per_tok": 2,
  "model.moe_intermediate_size": 22,
  "model.scoring_func": "softmax",
  "model.topk_method": "group_limited_greedy",
  "model.n_group": 2,
  "model.topk_group": 3,
  "model.norm_topk_prob": False,
  "model.routed_scaling_factor": 1.5,
  "model.num_nextn_predict_layers": 2,
  "model.compute_dtype": "bfloat16",
  "model.remat": "full",
  "model.dispatch": "dense",
  "model.attention_chunk_tokens": 4,
  "model.matmul_precision": "fp8",
  "model.kernels.routing": "reference",
  "model.kernels.grouped_matmul": "reference",
  "model.kernels.attention": "reference",
  "model.kernels.decode_attention": "reference",
  "model.kernels.quantized_matmul": "reference",
  "model.kernels.tuned": "tiles.json",
  "model.exchange.receive_capacity": 3.0,
  "model.exchange.dropless_fallback": "layer",
  "model.exchange.moe_chunks": 2,
  "model.exchange.precision": "fp8",
  "model.exchange.devices_per_group": 4,
  "balance.methods": ("sequence",),
  "loss.cross_entropy_chunk_tokens": 16,
  "optim.name": None,
  "optim.schedule": "cosine",
  "optim.moment_dtype": "bfloat16",
  "data.sequence_length": 10,
  "data.cross_document_attention": True,
  "mesh.stage": None,
  "mesh.data": 2,
  "mesh.expert": 2,
  "mesh.context": 2,
  "mesh.model": 2,
  "mesh.across_slices": "expert",
  "profile.steps": "3:5",
}
ONLY_ONE_VALUE = ("optim.name", "mesh.stage")
# What must be changed with a field for the config to stay valid.
WITH = {
  "model.topk_method": {"balance.methods": ("sequence",)},
  "model.exchange.receive_capacity": {"model.dispatch": "all_to_all"},
  "model.exchange.dropless_fallback": {"model.dispatch": "all_to_all"},
  "model.exchange.moe_chunks": {"model.dispatch": "all_to_all"},
  "model.exchange.precision": {"model.dispatch": "all_to_all"},
  "model.exchange.devices_per_group": {"model.dispatch": "hierarchical"},
  "mesh.expert": {"model.dispatch": "all_to_all"},
  "mesh.model": {"model.num_attention_heads": 4},
  "recovery.bad_step": {"recovery.rewind_more_batches": 0, "recovery.max_in_a_row": 10},
}


def _leaves(cls, prefix=""):
  """Yields the dotted name of every field of a config."""
  for field in dataclasses.fields(cls):
    if dataclasses.is_dataclass(field.type):
      yield from _leaves(field.type, f"{prefix}{field.name}.")
    else:
      yield prefix + field.name


def _config(**fields):
  return small_config(**SMALL | fields)


def test_every_field_is_in_one_table():
  tables = ARGUMENTS, NOT_READ, A_PART
  names = [name for table in tables for name in table]
  assert sorted(names) == sorted(_leaves(config_lib.Config))
  ours = hyperparameters.Hyperparameters._fields + hyperparameters.Initialisation._fields
  assert sorted(ours) == sorted(name.split(".")[-1] for name in ARGUMENTS)


@pytest.mark.parametrize("name", [*ARGUMENTS, *NOT_READ, *A_PART])
def test_a_changed_field_changes_the_key_or_its_own_argument_or_nothing(name):
  value = (ARGUMENTS | NOT_READ | A_PART)[name]
  if name in ONLY_ONE_VALUE:
    pytest.skip("the field has one value")
  others = WITH.get(name, {})
  before, after = _config(**others), _config(**others, **{name: value})
  assert before != after
  arguments = [
    hyperparameters.of(c)._asdict() | hyperparameters.initialisation_of(c)._asdict()
    for c in (before, after)
  ]
  changed = [field for field in arguments[0] if arguments[0][field] != arguments[1][field]]
  assert changed == [name.split(".")[-1]] * (name in ARGUMENTS)
  for field in changed:
    assert arguments[1][field] == type(arguments[1][field])(value)
  keys = [hyperparameters.program_key(c) for c in (before, after)]
  assert (keys[0] != keys[1]) == (name in A_PART)
  assert hyperparameters.program_key(keys[0]) == keys[0]


def test_a_part_of_three_fields_is_in_the_key():
  """Whether there is clipping, whether bad steps are skipped, and whether steps are traced."""
  key = hyperparameters.program_key
  assert key(_config(**{"optim.clip_norm": 0.0})) != key(_config())
  skips = {"recovery.bad_step": "skip"}
  assert key(_config(**skips)) != key(_config())
  traced = [key(_config(**{"profile.steps": steps})) for steps in ("", "2:3", "4:9")]
  assert traced[0] != traced[1] == traced[2]


def _programs(config):
  """Returns the text of the programs of train step, initial state and evaluation."""
  mesh = mesh_of(1)
  state, batch = train_step.abstract_state(config, mesh), random_batch(config, 0)
  hyper, initial = hyperparameters.of(config), hyperparameters.initialisation_of(config)
  gate = train_step.Gate(np.int32(0))
  step = train_step.make_train_step(config, mesh, record_routing=True, is_gated=True)
  return (
    step.lower(state, batch, hyper, gate).as_text(),
    train_step.make_init(config, mesh).lower(initial).as_text(),
    train_step.make_eval_step(config, mesh).lower(state, batch).as_text(),
  )


def test_programs_read_no_more_of_a_config_than_its_key(monkeypatch):
  """All other fields are changed at once, and the programs made from the whole config."""
  fields = {"model.initializer_range": 1.0}  # which scales the program's own draws
  changed = ARGUMENTS | NOT_READ | WITH["recovery.bad_step"] | fields
  config, other = _config(), _config(**changed)
  assert hyperparameters.program_key(config) == hyperparameters.program_key(other)
  expected = _programs(config)
  monkeypatch.setattr(hyperparameters, "program_key", lambda config: config)
  for actual, text in zip(_programs(other), expected):
    assert len(text) > 1000
    assert actual == text


@functools.cache
def _step():
  return train_step.make_train_step(_config(), mesh_of(1))


def _made(hyper, step):
  """Returns what a step makes of random arrays when the schedule has made `step` steps."""
  config = _config()
  rng = np.random.default_rng(0)

  def draw(path, x):
    if np.issubdtype(x.dtype, np.integer):
      return np.full(x.shape, step, x.dtype)
    return (0.2 * rng.random(x.shape)).astype(x.dtype)

  state = jax.tree.map_with_path(draw, train_step.abstract_state(config, mesh_of(1)))
  return jax.device_get(_step()(state, random_batch(config, 0), hyper))


@pytest.mark.slow
def test_each_argument_of_the_step_changes_what_it_makes():
  """In the warm-up, or in the decay, where lambda is the later one and the bias is frozen."""
  early = ("optim.warmup_steps", "loss.mtp_loss_weight", "balance.bias_update_speed")
  before = {step: _made(hyperparameters.of(_config()), step) for step in (3, 16)}
  for name, value in ARGUMENTS.items():
    hyper, step = hyperparameters.of(_config(**{name: value})), 3 if name in early else 16
    leaves = [jax.tree.leaves(made) for made in (before[step], _made(hyper, step))]
    is_same = all(np.array_equal(a, b) for a, b in zip(*leaves, strict=True))
    assert is_same == (name in ("seed", "model.initializer_range")), name
  assert _step()._cache_size() == 1


def test_the_initial_state_is_that_of_the_model_with_the_config():
  """Bitwise, for a seed that is no int32; another seed and range run the same program."""
  fields = {"seed": ARGUMENTS["seed"], "model.initializer_range": 0.07}
  config, other = _config(**fields), _config()
  create = train_step.make_init(other, mesh_of(1))
  create(hyperparameters.initialisation_of(other))
  state = create(hyperparameters.initialisation_of(config))
  build = lambda: model_lib.Transformer(config.model, nnx.Rngs(params=config.seed))  # noqa: E731
  expected = jax.jit(lambda: model_lib.split(build())[1:])()
  jax.tree.map(np.testing.assert_array_equal, (state.params, state.router_bias), expected)
  assert create._cache_size() == 1
