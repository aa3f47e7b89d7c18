"""Arrays read and written by slices, against orbax itself; fails first when orbax changes."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath

from dsmoe import checkpoint, config
from dsmoe.checkpoint import slices
from dsmoe.training import train_step

STEP = 3
RNG = np.random.default_rng(0)
LEAVES = {
  ("params", "w"): RNG.normal(size=(5, 6)).astype(np.float32),
  ("params", "moe", "w_up"): RNG.normal(size=(2, 3, 4)).astype(jnp.bfloat16),
  ("params", "zeros"): np.zeros((4, 2), np.float32),
  ("router_bias", "moe", "router_bias"): RNG.normal(size=(7,)).astype(np.float32),
}
SHAPES = {path: leaf.shape for path, leaf in LEAVES.items()}
CHUNKS = {5: (2, 6), 2: (1, 3, 4), 4: (4, 2), 7: (7,)}  # by first dimension


def nested(leaves):
  tree = {}
  for path, leaf in leaves.items():
    node = tree
    for key in path[:-1]:
      node = node.setdefault(key, {})
    node[path[-1]] = leaf
  return tree


def manager(workdir):
  folder = epath.Path(workdir) / checkpoint.CHECKPOINTS
  return ocp.CheckpointManager(folder, item_names=("state",))


def save_by_orbax(workdir):
  with manager(workdir) as m:
    tree = nested({path: jnp.asarray(leaf) for path, leaf in LEAVES.items()})
    m.save(STEP, args=ocp.args.Composite(state=ocp.args.StandardSave(tree)))
  return epath.Path(workdir) / checkpoint.CHECKPOINTS / str(STEP)


def save_by_slices(workdir):
  step_folder = epath.Path(workdir) / checkpoint.CHECKPOINTS / str(STEP)
  (step_folder / "state").mkdir(parents=True)
  for path, leaf in LEAVES.items():
    chunk = CHUNKS[leaf.shape[0]]
    array = slices.create(step_folder / "state", path, leaf.shape, leaf.dtype.name, chunk)
    for start in range(0, leaf.shape[0], chunk[0]):
      rows = slice(start, min(start + chunk[0], leaf.shape[0]))
      array[rows].write(leaf[rows]).result()
  slices.write_metadata(step_folder, SHAPES)
  return step_folder


def test_metadata_is_what_the_installed_orbax_writes(tmp_path):
  theirs, ours = save_by_orbax(tmp_path / "orbax"), save_by_slices(tmp_path / "slices")
  changed = f"orbax {ocp.__version__} writes other metadata than dsmoe/checkpoint/slices.py: "

  def read(name):
    return [json.loads((folder / name).read_text()) for folder in (theirs, ours)]

  wanted, written = read("state/_METADATA")
  # orbax gathers small arrays in OCDBT files; arrays written by slices are folders of chunks.
  assert written == wanted | {"use_ocdbt": False}, f"{changed}state/_METADATA"
  wanted, written = read("state/_sharding")
  assert written == wanted, f"{changed}state/_sharding"
  wanted, written = read("_CHECKPOINT_METADATA")
  times = ("init_timestamp_nsecs", "commit_timestamp_nsecs")
  assert set(times) <= set(wanted) and all(type(written[name]) is int for name in times)
  assert written == wanted | dict.fromkeys(times, 0), f"{changed}_CHECKPOINT_METADATA"


def test_orbax_restores_what_is_written_by_slices(tmp_path):
  save_by_slices(tmp_path)
  for args in (ocp.args.StandardRestore(), ocp.args.PyTreeRestore()):
    with manager(tmp_path) as m:
      assert m.all_steps() == [STEP]
      restored = m.restore(STEP, args=ocp.args.Composite(state=args))["state"]
    found = {tuple(k.key for k in p): x for p, x in jax.tree.leaves_with_path(restored)}
    assert set(found) == set(LEAVES)
    for path, leaf in LEAVES.items():
      assert found[path].dtype == leaf.dtype
      np.testing.assert_array_equal(np.asarray(found[path]), leaf)


@pytest.mark.parametrize("save", [save_by_orbax, save_by_slices])
def test_slices_are_read_from_either(tmp_path, save):
  save(tmp_path)
  arrays = slices.open_step(tmp_path, STEP, SHAPES)
  for path, leaf in LEAVES.items():
    assert arrays[path].dtype.numpy_dtype == leaf.dtype
    np.testing.assert_array_equal(arrays[path][1:].read().result(), leaf[1:])


@pytest.mark.parametrize("save", [save_by_orbax, save_by_slices])
def test_absent_arrays_and_other_shapes_are_named(tmp_path, save):
  save(tmp_path)
  with pytest.raises(ValueError, match=r"state must hold the array params\.absent: "):
    slices.open_step(tmp_path, STEP, {("params", "absent"): (5, 6)})
  with pytest.raises(ValueError, match=r"array params\.w in .* must have the shape .*got \[5, 6\]"):
    slices.open_step(tmp_path, STEP, {("params", "w"): (6, 5)})


@pytest.mark.parametrize("block_bytes", [1, 50, 1 << 20])
def test_arrays_of_a_run_are_compared_with_their_checksums(tmp_path, monkeypatch, block_bytes):
  """Read by slices; a checkpoint without checksums passes."""
  monkeypatch.setattr(slices, "_BLOCK_BYTES", block_bytes)
  state = train_step.TrainState(
    np.array(STEP, np.int32), **{"opt_state": {}, "router_bias": {}} | nested(LEAVES)
  )
  with checkpoint.Checkpointer(tmp_path, config.CheckpointConfig(1, 1, 0)) as checkpoints:
    checkpoints.save(state, 0)

  def check():
    arrays = slices.open_step(tmp_path, STEP, SHAPES)
    slices.check_arrays(tmp_path, STEP, arrays, SHAPES)

  check()
  path = epath.Path(tmp_path) / "checkpoints" / str(STEP) / "checksums" / "metadata"
  sums = json.loads(path.read_text())
  name = "params.moe.w_up"
  path.write_text(json.dumps(sums | {name: "bfloat16 00000000"}))
  with pytest.raises(ValueError, match=f"checkpoint 3 in .*the checksum of {name} must be"):
    check()
  path.parent.rmtree()
  check()


def test_a_missing_chunk_is_an_error(tmp_path):
  folder = save_by_slices(tmp_path)
  (folder / "state" / "params.w" / "1.0").unlink()
  arrays = slices.open_step(tmp_path, STEP, SHAPES)
  np.testing.assert_array_equal(
    arrays["params", "w"][:2].read().result(), LEAVES["params", "w"][:2]
  )
  with pytest.raises(ValueError, match=r"1\.0.* missing"):
    arrays["params", "w"][2:4].read().result()
