"""Tests of dsmoe/checkpoint/loading.py: a run's weights on this process's devices."""

import json
import shutil

import jax
import numpy as np
import pytest

from dsmoe import checkpoint
from dsmoe.config import CheckpointConfig
from dsmoe.data import records
from dsmoe.training import train_step
from tests import runs
from tests.data.cases import VOCAB, make_folder
from tests.helpers import mesh_of, small_config

KEEP_ALL = CheckpointConfig(save_every_steps=1, keep_last=100, keep_every_steps=0)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  """Two checkpoints that a run on one device left; the second has every weight doubled."""
  folder = tmp_path_factory.mktemp("run")
  corpus = make_folder(tmp_path_factory.mktemp("corpus"))
  config = small_config(
    **runs.TWO_LAYERS,
    **{"model.vocab_size": VOCAB, "data.train_globs": (f"{corpus}/a/*.txt",)},
    **{"mesh.data": 1},
  )
  checkpoint.record_config(folder, config, 0)
  records.prepare(config.data, VOCAB, folder / "data")
  state = train_step.init_state(config, mesh_of(1))
  with checkpoint.Checkpointer(folder, KEEP_ALL) as checkpoints:
    checkpoints.save(state, 0)
    doubled = jax.tree.map(lambda x: 2 * x, (state.params, state.router_bias))
    state = state._replace(step=np.int32(4), params=doubled[0], router_bias=doubled[1])
    checkpoints.save(state, 4)
  return folder


def test_the_newest_weights_come_onto_all_devices(workdir):
  run = checkpoint.load_run(workdir)
  assert run.step == 4 and run.mesh.size == jax.device_count() == 8
  stored = runs.checkpoint_arrays(workdir, 4)
  found = {"params": run.params, "router_bias": run.router_bias}
  found = {jax.tree_util.keystr(k): np.asarray(x) for k, x in jax.tree.leaves_with_path(found)}
  assert len(found) > 10
  runs.assert_bitwise_equal(found, {name: stored[name] for name in found})
  assert any(not x.sharding.is_fully_replicated for x in jax.tree.leaves(run.params))
  assert run.tokenizer().get_vocab_size() <= VOCAB


def test_an_older_step_and_an_absent_one(workdir):
  new, old = checkpoint.load_run(workdir), checkpoint.load_run(workdir, 0)
  assert old.step == 0
  np.testing.assert_array_equal(new.params["embed"], 2 * np.asarray(old.params["embed"]))
  with pytest.raises(ValueError, match=r"\(\[0, 4\]\), got 3"):
    checkpoint.load_run(workdir, 3)


def test_kernels_of_another_platform_become_none_here(workdir, tmp_path, caplog):
  folder = shutil.copytree(workdir, tmp_path / "run")
  values = json.loads((folder / "config.json").read_text())
  values["model"]["kernels"] |= {"attention": "mosaic_tpu", "routing": "reference", "tuned": "/no"}
  (folder / "config.json").write_text(json.dumps(values))
  with caplog.at_level("WARNING"):
    kernels = checkpoint.load_run(folder).config.model.kernels
  assert (kernels.attention, kernels.routing, kernels.tuned) == (None, "reference", None)
  # Other tests leave asyncio records behind: of reads that failed, as they should.
  warnings = [record.getMessage() for record in caplog.records if record.name != "asyncio"]
  assert [warning.split(" is None here: ")[0] for warning in warnings] == [
    f"kernels.{field} of {folder}" for field in ("attention", "tuned")
  ]


def test_rows_that_training_split_are_whole_here(workdir, tmp_path):
  folder = shutil.copytree(workdir, tmp_path / "run")
  values = json.loads((folder / "config.json").read_text())
  values["mesh"] |= {"data": 1, "context": 7}  # rows have 14 tokens
  (folder / "config.json").write_text(json.dumps(values))
  run = checkpoint.load_run(folder)
  assert run.config.mesh.context == 1 and run.mesh.shape["data"] == 8


def test_a_run_without_a_tokenizer_says_so(workdir, tmp_path):
  run = checkpoint.load_run(workdir)
  run.tokenizer_path = tmp_path / "tokenizer.json"
  with pytest.raises(ValueError, match=r"must have a tokenizer, .*tokenizer.json does not exist"):
    run.tokenizer()


def test_taken_weights_are_kept_by_nobody_else(workdir):
  run = checkpoint.load_run(workdir)
  params, router_bias = run.take_weights()
  assert run.params is None and run.router_bias is None
  before = sum(x.nbytes for x in jax.live_arrays())
  size = sum(x.nbytes for x in jax.tree.leaves((params, router_bias)))
  del params, router_bias
  assert before - sum(x.nbytes for x in jax.live_arrays()) == size
  with pytest.raises(ValueError, match="the weights of step 4 were taken before"):
    run.take_weights()
