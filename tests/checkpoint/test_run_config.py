"""Tests of dsmoe/checkpoint/run_config.py: config.json, and which changes a checkpoint can follow."""

import functools
import json

import jax
import numpy as np
import pytest

from dsmoe import checkpoint
from dsmoe import config as config_lib
from dsmoe.config import CheckpointConfig
from dsmoe.training import train_step
from tests.helpers import mesh_of, small_config
from tests.runs import TWO_LAYERS

KEEP_ALL = CheckpointConfig(save_every_steps=1, keep_last=100, keep_every_steps=0)
STEP = 3
config_of_two_layers = functools.partial(small_config, **TWO_LAYERS)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  """Of a run that saved step 3."""
  folder = tmp_path_factory.mktemp("run")
  config = config_of_two_layers()
  shapes = train_step.state_shapes(config)
  state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)._replace(step=np.int32(STEP))
  with checkpoint.Checkpointer(folder, KEEP_ALL) as checkpoints:
    checkpoints.save(state, STEP)
  checkpoint.record_config(folder, config, 0)
  return folder


def check(workdir, allow_change=True, step=STEP, **change):
  config = config_of_two_layers(**change)
  abstract = train_step.abstract_state(config, mesh_of(1))
  checkpoint.check_config(workdir, config, step, abstract, allow_change)


@pytest.mark.parametrize(
  ("name", "value"),
  [
    ("model.hidden_size", 48),
    ("model.vocab_size", 97),
    ("model.intermediate_size", 60),
    ("model.q_lora_rank", None),
    ("model.kv_lora_rank", 17),
    ("model.n_routed_experts", 16),
    ("model.n_shared_experts", 1),
    ("model.num_nextn_predict_layers", 1),
    ("model.tie_word_embeddings", True),
    ("model.attention_bias", True),
    ("model.num_hidden_layers", 3),
    ("model.first_k_dense_replace", 0),
    ("optim.clip_norm", 0.0),
  ],
)
def test_a_change_that_the_checkpoint_cannot_follow_is_named(workdir, name, value):
  """Also among changes that it can follow, and although changes are allowed."""
  before = (workdir / "config.json").read_bytes()
  others = {"optim.learning_rate": 0.5, "log.log_every_steps": 7, name: value}
  if name == "model.tie_word_embeddings":
    others["model.rms_norm_eps"] = 1e-5
  with pytest.raises(ValueError) as error:
    check(workdir, **others)
  message = str(error.value)
  assert message.startswith(f"checkpoint 3 in {workdir} cannot follow {name}: "), message
  assert "\n" not in message and "learning_rate" not in message and "log_every" not in message
  assert (workdir / "config.json").read_bytes() == before


def test_two_changes_that_only_together_keep_a_rule(workdir):
  with pytest.raises(
    ValueError, match=r"cannot follow model\.n_group: 4 -> 5; model\.n_routed_exp"
  ):
    check(workdir, **{"model.n_routed_experts": 15, "model.n_group": 5})


@pytest.mark.parametrize(
  "change",
  [
    {"optim.learning_rate": 0.5},
    {"optim.clip_norm": 0.25},
    {"optim.schedule": "wsd", "optim.decay_steps": 2},
    {"optim.moment_dtype": "bfloat16"},
    {"model.remat": "full"},
    {"model.num_experts_per_tok": 2},
    {"batch_size": 8},
    {"num_steps": 30},
  ],
)
def test_other_changes_need_to_be_allowed(workdir, change):
  check(workdir, **change)
  with pytest.raises(ValueError, match=f"differs from this run's config: .*{[*change][-1]}: "):
    check(workdir, allow_change=False, **change)


def test_without_a_config_the_arrays_decide(workdir, tmp_path):
  (tmp_path / "checkpoints").symlink_to(workdir / "checkpoints")
  check(tmp_path, allow_change=False, **{"optim.learning_rate": 0.5})
  with pytest.raises(
    ValueError, match=r"cannot follow this config: params\..* must have the shape"
  ):
    check(tmp_path, **{"model.hidden_size": 48})
  assert not (tmp_path / "config.json").exists()


def test_config_is_recorded_and_the_old_one_kept(tmp_path):
  config, changed = config_of_two_layers(), config_of_two_layers(seed=3)
  checkpoint.record_config(tmp_path, config, 0)
  assert checkpoint.load_config(tmp_path) == config
  checkpoint.record_config(tmp_path, config, 5)
  assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
  checkpoint.record_config(tmp_path, changed, 5)
  assert checkpoint.load_config(tmp_path) == changed
  checkpoint.record_config(tmp_path, config, 5)
  asides = [tmp_path / f"config.before_step_5{n}.json" for n in ("", ".1")]
  old = [config_lib.from_dict(json.loads(path.read_text())) for path in asides]
  assert old == [config, changed]
  checkpoint.record_config(tmp_path, changed, 0)  # nothing was trained: nothing is kept
  assert checkpoint.load_config(tmp_path) == changed
  assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("text", ["{,", "3", "", "[1]", "\x00", '{"seed": 1'])
def test_a_damaged_config_is_named_with_what_to_do(workdir, tmp_path, text):
  (tmp_path / "checkpoints").symlink_to(workdir / "checkpoints")
  path = tmp_path / "config.json"
  path.write_text(text)
  for act in (checkpoint.load_config, check):
    with pytest.raises(ValueError, match=f"^{path}: .*damaged.*put a copy.*or delete it"):
      act(tmp_path)


def test_an_incomplete_config_is_named(tmp_path):
  (tmp_path / "config.json").write_text("{}")
  with pytest.raises(ValueError, match=f"^{tmp_path}/config.json: config must have a value for"):
    checkpoint.load_config(tmp_path)
