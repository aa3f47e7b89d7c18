"""Tests of dsmoe/checkpoint/verification.py: what a save has damaged does not become a checkpoint."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsmoe import checkpoint
from dsmoe.checkpoint import verification
from dsmoe.config import CheckpointConfig
from dsmoe.training.train_step import TrainState
from tests.helpers import mesh_of
from tests.runs import assert_bitwise_equal, checkpoint_arrays

KEEP_ONE = CheckpointConfig(save_every_steps=1, keep_last=1, keep_every_steps=0)
POSITION = {"sequences": 24, "tokens": (7, 17)}


def state_of(step):
  """Returns a state of arrays of all kinds: split, replicated, bfloat16, scalar."""
  rng, mesh = np.random.default_rng(step), mesh_of(8)

  def place(array, *axes):
    return jax.device_put(array, jax.NamedSharding(mesh, jax.P(*axes)))

  matrix = rng.normal(size=(16, 300)).astype(np.float32)
  cube = rng.normal(size=(3, 8, 5)).astype(jnp.bfloat16)
  return TrainState(
    step=place(np.int32(step)),
    params={"matrix": place(matrix, "data"), "cube": place(cube, None, "data")},
    opt_state={"count": place(np.int32(3 * step))},
    router_bias={"layers": place(rng.normal(size=(2, 6)).astype(np.float32))},
  )


def change_a_byte(folder):
  data = max(pathlib.Path(folder).glob("state/**/d/*"), key=lambda path: path.stat().st_size)
  content = bytearray(data.read_bytes())
  content[len(content) // 2] ^= 16
  data.write_bytes(content)


def truncate(folder):
  data = max(pathlib.Path(folder).glob("state/**/d/*"), key=lambda path: path.stat().st_size)
  data.write_bytes(data.read_bytes()[:-1000])


def delete_the_index(folder):
  (folder / "state" / "manifest.ocdbt").unlink()


def change_the_position(folder):
  path = folder / "data" / "metadata"
  path.write_text(path.read_text().replace("24", "25"))


@pytest.fixture
def before_verifying(monkeypatch):
  """Functions that are called with a save's folder before it is verified."""
  hooks, check = [], verification.Verification.check

  def hooked(self, folder):
    for hook in hooks:
      hook(verification._written(folder, self._step))
    check(self, folder)

  monkeypatch.setattr(verification.Verification, "check", hooked)
  return hooks


@pytest.mark.parametrize(
  "damage, reason",
  [
    (change_a_byte, "."),
    (truncate, "process 0 cannot read it"),
    (delete_the_index, "process 0 cannot read it"),
    (change_the_position, "data is not what was saved"),
  ],
)
def test_a_damaged_save_leaves_the_checkpoint_before_it(
  tmp_path, before_verifying, damage, reason, capfd
):
  with checkpoint.Checkpointer(tmp_path, KEEP_ONE) as checkpoints:
    checkpoints.save(state_of(1), POSITION)
  expected = checkpoint_arrays(tmp_path, 1)
  before_verifying.append(damage)
  with pytest.raises(checkpoint.DamagedSaveError, match=f"of step 2 in {tmp_path} .*{reason}"):
    with checkpoint.Checkpointer(tmp_path, KEEP_ONE) as checkpoints:
      checkpoints.save(state_of(2), POSITION)
      checkpoints.save(state_of(3), POSITION)  # waits for the one before it
  before_verifying.clear()
  assert "Traceback" not in capfd.readouterr().err
  assert checkpoint.find_step(tmp_path) == 1
  assert_bitwise_equal(checkpoint_arrays(tmp_path, 1), expected)
  abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state_of(1)
  )
  with checkpoint.Checkpointer(tmp_path, KEEP_ONE) as checkpoints:
    assert checkpoints.find_step() == 1
    restored, _ = checkpoints.restore(abstract, 1)
    checkpoints.save(restored._replace(step=restored.step + 1), POSITION)
  assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["2"]


def test_the_older_checkpoint_stays_until_the_new_one_is_verified(tmp_path, before_verifying):
  def steps(folder):
    return [int(path.name) for path in folder.iterdir() if path.name.isdigit()]

  seen = []
  before_verifying.append(lambda written: seen.append(steps(written.parent)))
  with checkpoint.Checkpointer(tmp_path, KEEP_ONE) as checkpoints:
    for step in (1, 2, 3):
      checkpoints.save(state_of(step), POSITION)
  assert seen == [[], [1], [2]]
  assert steps(tmp_path / "checkpoints") == [3]
