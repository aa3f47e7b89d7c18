"""Routing traces: what training records is what the step counted, on any mesh, in batch order."""

import json

import jax
import numpy as np
import pytest

from dsmoe import train
from dsmoe.parallel import mesh as mesh_lib
from dsmoe.reporting import metrics, routing_trace
from dsmoe.training import hyperparameters, train_step
from tests import runs
from tests.helpers import random_batch, small_config
from tests.training.test_train_step import MARGIN_SEED

SMALL = {**runs.TWO_LAYERS, "model.num_nextn_predict_layers": 2, "model.v_head_dim": 12}
SMALL |= {"data.sequence_length": 16}


def counts_of(expert_LMK, num_experts: int):
  """Counts tokens an expert in each layer, one choice at a time."""
  counts_LE = np.zeros((expert_LMK.shape[0], num_experts), int)
  for (layer, _, _), expert in np.ndenumerate(expert_LMK):
    counts_LE[layer, expert] += 1
  return counts_LE


def recorded(folder, num_devices: int, **overrides):
  """Makes one step and returns its trace, read from the file, and its counts."""
  config = small_config(**SMALL, **overrides)
  mesh = mesh_lib.make_mesh(config.mesh, jax.devices()[:num_devices])
  step = train_step.make_train_step(config, mesh, record_routing=True)
  state = train_step.init_state(config, mesh)
  batch = mesh_lib.to_global(random_batch(config, MARGIN_SEED), mesh)
  _, found = step(state, batch, hyperparameters.of(config))
  counts_LE = np.asarray(found["load"].counts_LE)
  path = routing_trace.write(
    folder, 7, found["expert_LBSK"], counts_LE, overrides.get("num_microbatches", 1)
  )
  return routing_trace.read(path), counts_LE, path


@pytest.mark.slow
def test_eight_devices_and_two_microbatches_record_what_one_device_does(tmp_path):
  one, counts_LE, _ = recorded(tmp_path / "one", 1)
  options = {"num_microbatches": 2, "mesh.expert": 2, "mesh.context": 2}
  eight, _, _ = recorded(tmp_path / "eight", 8, **options, **{"model.dispatch": "all_gather"})
  np.testing.assert_array_equal(one.expert_LMK, eight.expert_LMK)
  np.testing.assert_array_equal(counts_of(one.expert_LMK, one.num_experts), counts_LE)
  np.testing.assert_array_equal(eight.counts_LE, counts_LE)
  # One MoE layer and two MTP modules, 16 rows of 16 tokens, 3 experts each.
  assert one.expert_LMK.shape == (3, 16 * 16, 3) and one.expert_LMK.dtype == np.uint8
  assert (one.num_rows, one.sequence_length, one.num_microbatches) == (16, 16, 1)
  assert (eight.num_microbatches, eight.step) == (2, 7)


@pytest.mark.slow
def test_a_run_records_the_steps_asked_for(tmp_path):
  config = small_config(
    **SMALL, **{"num_steps": 3, "log.log_every_steps": 1, "log.routing_trace_steps": (1, 3)}
  )
  assert train.train(config, tmp_path).step == 3
  folder = tmp_path / routing_trace.FOLDER
  names = ["step_1_process_0.npz", "step_3_process_0.npz"]
  assert sorted(path.name for path in folder.iterdir()) == names
  rows = {row["step"]: row for row in metrics.read_metrics(tmp_path) if "expert_counts" in row}
  for step, name in zip((1, 3), names):
    trace = routing_trace.read(folder / name)
    assert trace.step == step
    counts = counts_of(trace.expert_LMK, trace.num_experts)
    np.testing.assert_array_equal(counts, rows[step]["expert_counts"])
    np.testing.assert_array_equal(counts, trace.counts_LE)
  assert "routing_trace_steps" in json.loads((tmp_path / "config.json").read_text())["log"]


def write_parts(folder, num_processes: int, missing_tokens: int = 0):
  """Writes the files of several processes, each with every so manieth token."""
  rng = np.random.default_rng(0)
  expert_LMK = rng.integers(0, 300, (2, 24 - missing_tokens, 3)).astype(np.uint16)
  scalars = dict(step=5, num_rows=4, sequence_length=6, num_microbatches=1)
  for process in range(num_processes):
    own = slice(process, None, num_processes)
    np.savez_compressed(
      folder / f"step_5_process_{process}.npz",
      expert_LMK=expert_LMK[:, own],
      place_M=np.arange(expert_LMK.shape[1])[own],
      counts_LE=np.zeros((2, 300), np.int32),
      num_processes=num_processes,
      **scalars,
    )
  return expert_LMK


def test_the_files_of_several_processes_are_joined(tmp_path):
  expert_LMK = write_parts(tmp_path, 3)
  trace = routing_trace.read(tmp_path / "step_5_process_1.npz")
  np.testing.assert_array_equal(trace.expert_LMK, expert_LMK)
  (tmp_path / "step_5_process_2.npz").unlink()
  with pytest.raises(ValueError, match=r"of 3 processes .*step_5_process_2\.npz is missing"):
    routing_trace.read(tmp_path / "step_5_process_1.npz")


def test_what_is_no_trace_is_refused(tmp_path):
  write_parts(tmp_path, 2, missing_tokens=2)
  with pytest.raises(ValueError, match=r"each of its 24 tokens once, .* hold 22"):
    routing_trace.read(tmp_path / "step_5_process_0.npz")
  with pytest.raises(ValueError, match=r"must exist, got /nowhere\.npz"):
    routing_trace.read("/nowhere.npz")
  (tmp_path / "a.npz").write_bytes(b"text")
  np.savez(tmp_path / "b.npz", expert_LMK=np.zeros(3))
  for name in ("a.npz", "b.npz"):
    with pytest.raises(ValueError, match=f"{name} must be a routing trace that training wrote"):
      routing_trace.read(tmp_path / name)


@pytest.mark.parametrize(
  "overrides, message",
  [
    ({"log.routing_trace_steps": (3, 21)}, r"from 1 to num_steps \(20\), got \(3, 21\)"),
    (
      {"log.routing_trace_steps": (3,), "model.first_k_dense_replace": 5},
      r"first_k_dense_replace \(5\) must be below num_hidden_layers \(5\)",
    ),
  ],
)
def test_rules(overrides, message):
  with pytest.raises(ValueError, match=message):
    small_config(**overrides)
