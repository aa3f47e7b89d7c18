"""Tests of dsmoe/checkpoint/checkpointer.py: round trips, other meshes, what is kept, changed configs."""

import dataclasses
import functools
import json
import pathlib

import jax
import numpy as np
import pytest

from dsmoe import checkpoint
from dsmoe import config as config_lib
from dsmoe.config import CheckpointConfig
from dsmoe.training import train_step
from tests.helpers import assert_close, mesh_of, random_batch, small_config
from tests.runs import TWO_LAYERS, assert_bitwise_equal, checkpoint_arrays

# What orbax leaves half read when it refuses, found by the garbage collector in any later test.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

KEEP_ALL = CheckpointConfig(save_every_steps=1, keep_last=100, keep_every_steps=0)


config_of_two_layers = functools.partial(small_config, **TWO_LAYERS)


@functools.cache
def compiled_step(num_devices):
  return train_step.make_train_step(config_of_two_layers(), mesh_of(num_devices))


def trained(num_devices, state, steps):
  """Takes steps on fixed batches; returns the state and the losses."""
  losses = []
  for step in range(int(state.step), int(state.step) + steps):
    batch = random_batch(config_of_two_layers(), step)
    state, metrics = compiled_step(num_devices)(state, batch)
    losses.append(float(metrics["losses"].total))
  return state, losses


def by_path(tree):
  return {jax.tree_util.keystr(k): np.asarray(v) for k, v in jax.tree.leaves_with_path(tree)}


def save(workdir, state, position):
  with checkpoint.Checkpointer(workdir, KEEP_ALL) as checkpoints:
    checkpoints.save(state, position)


def test_round_trip_is_bitwise(tmp_path):
  config, mesh = config_of_two_layers(**{"optim.moment_dtype": "bfloat16"}), mesh_of(8)
  state = train_step.init_state(config, mesh)
  state = jax.tree.map(lambda x: (x + 2).astype(x.dtype), state)  # nothing is 0 any more
  save(tmp_path, state, 7)
  abstract = train_step.abstract_state(config, mesh)
  with checkpoint.Checkpointer(tmp_path, KEEP_ALL) as checkpoints:
    assert checkpoints.latest_step() == 2
    restored, position = checkpoints.restore(abstract, 2)
  assert position == 7
  assert_bitwise_equal(by_path(restored), by_path(state))
  assert jax.tree.structure(restored) == jax.tree.structure(state)
  jax.tree.map(lambda a, b: np.testing.assert_equal(a.sharding, b.sharding), restored, abstract)
  params, bias, step = checkpoint.restore_weights(tmp_path, abstract.params, abstract.router_bias)
  assert step == 2
  assert_bitwise_equal(by_path((params, bias)), by_path((state.params, state.router_bias)))


@pytest.mark.parametrize("before, after", [(8, 1), (1, 8)])
def test_goes_on_with_other_devices(tmp_path, before, after):
  config = config_of_two_layers()
  state, _ = trained(before, train_step.init_state(config, mesh_of(before)), 2)
  save(tmp_path, state, 2)
  with checkpoint.Checkpointer(tmp_path, KEEP_ALL) as checkpoints:
    restored, _ = checkpoints.restore(train_step.abstract_state(config, mesh_of(after)), 2)
  assert_bitwise_equal(by_path(restored), by_path(state))
  _, expected = trained(before, state, 3)
  _, actual = trained(after, restored, 3)
  assert_close(np.array(actual), np.array(expected))


@pytest.mark.parametrize(
  "keep_last, keep_every, expected", [(2, 0, [6, 7]), (1, 3, [3, 6, 7]), (3, 2, [2, 4, 5, 6, 7])]
)
def test_what_is_kept(tmp_path, keep_last, keep_every, expected):
  keep = CheckpointConfig(save_every_steps=1, keep_last=keep_last, keep_every_steps=keep_every)
  state = train_step.TrainState(
    np.int32(0), {"norm": np.ones(3, np.float32)}, {}, {"bias": np.zeros(2, np.float32)}
  )
  with checkpoint.Checkpointer(tmp_path, keep) as checkpoints:
    for step in range(1, 8):
      checkpoints.save(state._replace(step=np.int32(step)), step)
    checkpoints.save(state._replace(step=np.int32(7)), 99)  # is left as it is
  names = [path.name for path in (tmp_path / "checkpoints").iterdir()]
  assert sorted(map(int, names)) == expected
  metadata = list((tmp_path / "checkpoints" / "7" / "data").rglob("metadata"))
  assert [json.loads(path.read_text()) for path in metadata] == [7]


def test_the_config_of_a_step(tmp_path):
  """Of the run that saved it, however often the config was changed after it."""
  for batch_size, step in ((8, 0), (4, 20), (2, 20), (16, 30)):
    config = config_of_two_layers(batch_size=batch_size)
    checkpoint.record_config(tmp_path, config, step, True)
  steps = {step: checkpoint.config_of_step(tmp_path, step).batch_size for step in (20, 30, 40)}
  assert steps == {20: 8, 30: 2, 40: 16}


def test_changed_model_does_not_restore(tmp_path):
  config, mesh = config_of_two_layers(), mesh_of(1)
  save(tmp_path, train_step.init_state(config, mesh), 0)
  other = config_of_two_layers(**{"model.hidden_size": 48})
  with checkpoint.Checkpointer(tmp_path, KEEP_ALL) as checkpoints:
    with pytest.raises(ValueError, match=r"48"):
      checkpoints.restore(train_step.abstract_state(other, mesh), 0)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"model.hidden_size": 48}, r"kv_a_proj has the shape \[1, 48, 24\] there, got \[1, 40, 24\]"),
    ({"model.q_lora_rank": None}, r"q_proj has the shape .* there, got None"),
  ],
)
def test_weights_of_another_model_are_refused_by_name(tmp_path, change, message):
  save(tmp_path, train_step.init_state(config_of_two_layers(), mesh_of(1)), 0)
  other = train_step.abstract_state(config_of_two_layers(**change), mesh_of(1))
  with pytest.raises(ValueError, match=message):
    checkpoint.restore_weights(tmp_path, other.params, other.router_bias)


def test_broken_config_is_named(tmp_path):
  path = tmp_path / "config.json"
  for text in ("{,", "3", "{}"):
    path.write_text(text)
    with pytest.raises(ValueError, match=f"^{path}: "):
      checkpoint.load_config(tmp_path)


def test_config_is_recorded_and_changes_refused(tmp_path):
  config = config_of_two_layers()
  checkpoint.record_config(tmp_path, config, 0, False)
  assert checkpoint.load_config(tmp_path) == config
  checkpoint.record_config(tmp_path, config, 5, False)

  changed = config_of_two_layers(**{"optim.learning_rate": 0.5, "seed": 3})
  with pytest.raises(ValueError) as error:
    checkpoint.record_config(tmp_path, changed, 5, False)
  assert "optim.learning_rate: 0.001 -> 0.5; seed: 0 -> 3" in str(error.value)
  assert checkpoint.load_config(tmp_path) == config

  checkpoint.record_config(tmp_path, changed, 5, True)
  assert checkpoint.load_config(tmp_path) == changed
  checkpoint.record_config(tmp_path, config, 5, True)
  asides = [tmp_path / f"config.before_step_5{n}.json" for n in ("", ".1")]
  old = [config_lib.from_dict(json.loads(path.read_text())) for path in asides]
  assert old == [config, changed]


def test_absent_runs_and_steps_are_refused(tmp_path):
  abstract = train_step.abstract_state(config_of_two_layers(), mesh_of(1))
  weights = (abstract.params, abstract.router_bias)
  with pytest.raises(ValueError, match=r"must hold config.json"):
    checkpoint.load_config(tmp_path)
  with pytest.raises(ValueError, match=r"\(\[\]\), got None"):
    checkpoint.restore_weights(tmp_path, *weights)
  assert list(tmp_path.iterdir()) == []  # asking leaves nothing behind
  save(tmp_path, train_step.init_state(config_of_two_layers(), mesh_of(1)), 0)
  with pytest.raises(ValueError, match=r"\(\[0\]\), got 3"):
    checkpoint.restore_weights(tmp_path, *weights, step=3)


def test_weights_of_one_optimizer_are_read_without_it(tmp_path):
  """Generation needs neither the moments nor a config that still names the optimizer."""
  config, mesh = config_of_two_layers(), mesh_of(1)
  state = train_step.init_state(config, mesh)
  save(tmp_path, state, 0)
  other = dataclasses.replace(config, optim=dataclasses.replace(config.optim, clip_norm=0.0))
  abstract = train_step.abstract_state(other, mesh)
  params, _, _ = checkpoint.restore_weights(tmp_path, abstract.params, abstract.router_bias)
  assert_bitwise_equal(by_path(params), by_path(state.params))
  stored = checkpoint_arrays(pathlib.Path(tmp_path), 0)
  assert len(stored) == len(jax.tree.leaves(state))
