"""Tests of dsmoe/checkpoint/checkpointer.py: round trips, other meshes, what is kept."""

import dataclasses
import functools
import json
import math
import pathlib
import shutil

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from dsmoe import checkpoint
from dsmoe.config import CheckpointConfig, MeshConfig
from dsmoe.parallel import mesh as mesh_lib
from dsmoe.training import hyperparameters, train_step
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
    config = config_of_two_layers()
    args = random_batch(config, step), hyperparameters.of(config)
    state, metrics = compiled_step(num_devices)(state, *args)
    losses.append(float(metrics["losses"].total))
  return state, losses


def by_path(tree):
  return {jax.tree_util.keystr(k): np.asarray(v) for k, v in jax.tree.leaves_with_path(tree)}


def save(workdir, state, position):
  with checkpoint.Checkpointer(workdir, KEEP_ALL) as checkpoints:
    checkpoints.save(state, position)


@pytest.mark.slow
def test_round_trip_is_bitwise(tmp_path):
  config, mesh = config_of_two_layers(**{"optim.moment_dtype": "bfloat16"}), mesh_of(8)
  state = train_step.init_state(config, mesh)
  state = jax.tree.map(lambda x: (x + 2).astype(x.dtype), state)  # nothing is 0 any more
  save(tmp_path, state, 7)
  abstract = train_step.abstract_state(config, mesh)
  with checkpoint.Checkpointer(tmp_path, KEEP_ALL) as checkpoints:
    assert checkpoints.find_step() == 2
    restored, position = checkpoints.restore(abstract, 2)
  assert position == 7
  assert_bitwise_equal(by_path(restored), by_path(state))
  assert jax.tree.structure(restored) == jax.tree.structure(state)
  jax.tree.map(lambda a, b: np.testing.assert_equal(a.sharding, b.sharding), restored, abstract)
  params, bias, step = checkpoint.restore_weights(tmp_path, abstract.params, abstract.router_bias)
  assert step == 2
  assert_bitwise_equal(by_path((params, bias)), by_path((state.params, state.router_bias)))


@pytest.mark.slow
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


def state_on(sizes, seed):
  """Returns (random state, abstract state) on a mesh (data, expert, context, model).

  Of the parameters and one moment they have a layer's experts, its attention's and the embedding:
  orbax takes its time for each array and device.
  """
  fields = {"model.num_attention_heads": 4, "model.moe_intermediate_size": 20}
  config = config_of_two_layers(**fields, **{"model.v_head_dim": 12})
  axes = MeshConfig(1, *sizes)
  mesh = mesh_lib.make_mesh(axes, jax.devices()[: math.prod(sizes)])
  abstract = train_step.abstract_state(config, mesh)
  mu = optax.tree_utils.tree_get(abstract.opt_state, "mu")

  def some(params):
    layer = params["moe_layers"]
    parts = {"o_proj": layer["attention"]["o_proj"], "experts": layer["mlp"]["experts"]}
    return parts | {"embed": params["embed"]}

  abstract = abstract._replace(params=some(abstract.params), opt_state={"mu": some(mu)})
  rng = np.random.default_rng(seed)
  draw = lambda a: (9 * rng.standard_normal(a.shape)).astype(a.dtype)  # noqa: E731
  state = jax.tree.map(lambda a: jax.device_put(draw(a), a.sharding), abstract)
  return state._replace(step=jax.device_put(np.int32(3), abstract.step.sharding)), abstract


def test_restores_along_every_axis_and_at_another_expert_degree(tmp_path):
  """Bitwise, onto meshes whose devices hold other parts; nothing is compiled."""
  state, _ = state_on((2, 2, 1, 2), 1)
  save(tmp_path, state, 3)
  saved = by_path(state)
  with checkpoint.Checkpointer(tmp_path, KEEP_ALL) as checkpoints:
    for after in ((1, 4, 2, 1), (1, 1, 2, 4)):
      _, abstract = state_on(after, 2)
      restored, _ = checkpoints.restore(abstract, 3)
      assert_bitwise_equal(by_path(restored), saved)
      jax.tree.map(lambda a, b: np.testing.assert_equal(a.sharding, b.sharding), restored, abstract)
      w_gate = restored.params["experts"]["w_gate"]
      part = w_gate.addressable_shards[0].data.shape
      assert part[1] == 12 // after[1] and math.prod(part) * math.prod(after) == w_gate.size


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
    checkpoint.record_config(tmp_path, config, step)
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
    (
      {"model.hidden_size": 48},
      r"kv_a_proj must have the shape \[1, 48, 24\], it has \[1, 40, 24\]",
    ),
    ({"model.q_lora_rank": None}, r"it must hold params\..*q_proj \[.*\], and does not"),
  ],
)
def test_weights_of_another_model_are_refused_by_name(tmp_path, change, message):
  save(tmp_path, train_step.init_state(config_of_two_layers(), mesh_of(1)), 0)
  other = train_step.abstract_state(config_of_two_layers(**change), mesh_of(1))
  with pytest.raises(ValueError, match=message):
    checkpoint.restore_weights(tmp_path, other.params, other.router_bias)


def small_state(step, value=1.0):
  tree = {"w": np.linspace(1, 2, 3000, dtype=np.float32).reshape(30, 100), "b": np.full(3, value)}
  tree["b"] = tree["b"].astype(np.float32)
  moments = {"mu": np.ones((30, 100), np.float32) / 3}
  bias = {"moe": np.arange(12, dtype=np.float32).reshape(2, 6) / 7}
  return train_step.TrainState(np.array(step, np.int32), tree, moments, bias)


def files(folder):
  return sorted(path for path in folder.rglob("*") if path.is_file())


def readers(workdir, step):
  """Returns functions that read a checkpoint with the optimizer's state and without it."""
  state = small_state(step)

  def resume():
    with checkpoint.Checkpointer(workdir, KEEP_ALL) as checkpoints:
      return by_path(checkpoints.restore(state, step)[0]._asdict())

  def load():
    params, bias, _ = checkpoint.restore_weights(workdir, state.params, state.router_bias, step)
    return by_path({"params": params, "router_bias": bias})

  return resume, load


def test_a_flipped_bit_in_a_checkpoint_is_named(tmp_path):
  """Wherever it is: what is read without an error is what was saved."""
  for step in (2, 5):
    save(tmp_path, small_state(step), step)
  folder = tmp_path / "checkpoints" / "5"
  saved = by_path(small_state(5)._asdict())
  refused = set()
  for path in files(folder):
    whole = path.read_bytes()
    size = len(whole)
    for place in sorted({0, size // 3, size // 2, size - 1} & {*range(size)}):
      path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
      for read in readers(tmp_path, 5):
        try:
          arrays = read()
          assert_bitwise_equal(arrays, {name: saved[name] for name in arrays})
        except ValueError as error:
          message = str(error)
          assert message.startswith(f"checkpoint 5 in {tmp_path} must be whole, it cannot be read")
          assert "\n" not in message and message.endswith("--step=STEP (here: 2)"), message
          refused.add((path, place))
    path.write_bytes(whole)
  largest = max(files(folder), key=lambda path: path.stat().st_size)
  assert (largest, largest.stat().st_size // 2) in refused


@pytest.mark.parametrize("damage", ["cut", "empty", "zeros", "absent"])
def test_a_damaged_file_of_a_checkpoint_is_named(tmp_path, damage):
  save(tmp_path, small_state(5), 5)
  folder = tmp_path / "checkpoints" / "5"
  refused = set()
  for path in files(folder):
    whole = path.read_bytes()
    damaged = {"cut": whole[: len(whole) // 2], "empty": b"", "zeros": bytes(len(whole))}
    path.unlink() if damage == "absent" else path.write_bytes(damaged[damage])
    try:
      assert_bitwise_equal(readers(tmp_path, 5)[0](), by_path(small_state(5)._asdict()))
    except ValueError as error:
      assert "--resume_from=STEP" in str(error) and "\n" not in str(error)
      refused.add(path)
    path.write_bytes(whole)
  assert max(files(folder), key=lambda path: path.stat().st_size) in refused


@pytest.mark.parametrize("text", ["{}", "[1]", "{", '{"data": 1}', "null"])
def test_damaged_checksums_are_named(tmp_path, text):
  save(tmp_path, small_state(5), 5)
  (tmp_path / "checkpoints" / "5" / "checksums" / "metadata").write_text(text)
  for read in readers(tmp_path, 5):
    with pytest.raises(ValueError, match=r"checkpoint 5 in .* must be whole, it cannot be read"):
      read()


def test_another_data_position_is_named(tmp_path):
  save(tmp_path, small_state(5), 50)
  [path] = (tmp_path / "checkpoints" / "5" / "data").glob("metadata")
  path.write_text(path.read_text().replace("50", "51"))
  with pytest.raises(ValueError, match="the checksum of data must be json"):
    readers(tmp_path, 5)[0]()


@pytest.mark.parametrize("has_checksums", [True, False])
def test_the_checkpoint_of_another_step_is_named(tmp_path, has_checksums):
  """A folder that was copied or renamed is whole, and yet not what its name says."""
  for step in (2, 5):
    save(tmp_path, small_state(step), step)
  folder = tmp_path / "checkpoints"
  shutil.rmtree(folder / "5")
  (folder / "2").rename(folder / "5")
  if not has_checksums:
    shutil.rmtree(folder / "5" / "checksums")
  resume, load = readers(tmp_path, 5)
  for read in (resume, load) if has_checksums else (resume,):
    with pytest.raises(ValueError, match=r"checkpoint 5 in .* \(its state is that of another step"):
      read()


def test_a_checkpoint_without_checksums_is_read(tmp_path):
  """As the version before them wrote it."""
  state = small_state(5)
  items = ocp.args.Composite(
    state=ocp.args.StandardSave(state._asdict()), data=ocp.args.JsonSave({"next_batch": 7})
  )
  folder = (tmp_path / "checkpoints").resolve()
  with ocp.CheckpointManager(folder, item_names=("state", "data")) as manager:
    manager.save(5, args=items)
  with checkpoint.Checkpointer(tmp_path, KEEP_ALL) as checkpoints:
    restored, position = checkpoints.restore(state, 5)
  assert position == {"next_batch": 7}
  assert_bitwise_equal(by_path(restored), by_path(state))
  params, _, _ = checkpoint.restore_weights(tmp_path, state.params, state.router_bias)
  assert_bitwise_equal(by_path(params), by_path(state.params))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_state_that_is_not_finite_is_not_saved(tmp_path, value):
  save(tmp_path, small_state(2), 2)
  with checkpoint.Checkpointer(tmp_path, KEEP_ALL) as checkpoints:
    message = r"1 of its 5 arrays are not \(params.b first\); the newest .* is that of step 2"
    with pytest.raises(checkpoint.NotFiniteError, match=message):
      checkpoints.save(small_state(5, value), 5)
    assert checkpoints.find_step() == 2


def test_later_checkpoints_are_set_aside(tmp_path):
  for step in (2, 5, 7):
    save(tmp_path, small_state(step), step)
  with checkpoint.Checkpointer(tmp_path, KEEP_ALL) as checkpoints:
    with pytest.raises(ValueError, match=r"resume_from must be .* \(2, 5, 7\), got 4"):
      checkpoints.find_step(4)
    assert checkpoints.find_step(2) == 2
    assert checkpoints.set_later_aside(7) is None
    aside = checkpoints.set_later_aside(2)
    assert sorted(path.name for path in aside.iterdir()) == ["5", "7"]
    assert checkpoints.find_step() == 2
    checkpoints.save(small_state(5), 5)
    checkpoints.wait()
    again = checkpoints.set_later_aside(2)
  assert aside.name == "checkpoints_after_step_2" and again.name == "checkpoints_after_step_2.1"
  assert [path.name for path in again.iterdir()] == ["5"]
  assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["2"]


def test_what_a_killed_save_left_is_removed_by_the_next_run(tmp_path):
  save(tmp_path, small_state(2), 2)
  left = tmp_path / "checkpoints" / "5.orbax-checkpoint-tmp"
  (left / "state.orbax-checkpoint-tmp").mkdir(parents=True)
  (left / "state.orbax-checkpoint-tmp" / "d").write_text("half")
  with checkpoint.Checkpointer(tmp_path, KEEP_ALL) as checkpoints:
    assert checkpoints.find_step() == 2
    checkpoints.save(small_state(4), 4)
  assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["2", "4"]


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
