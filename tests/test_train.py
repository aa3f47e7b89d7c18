"""Whole runs: killed at any moment, stopped, changed, exploding; they go on bitwise."""

import json
import pathlib
import random
import signal
import time

import numpy as np
import orbax.checkpoint as ocp
import pytest

from dsmoe import train
from dsmoe.reporting import metrics
from tests import runs
from tests.data.cases import VOCAB, make_folder
from tests.helpers import small_config

LAST_STEP = 40


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
  """The workdir of a run that nothing disturbed."""
  workdir = tmp_path_factory.mktemp("uninterrupted")
  code, out, err = runs.finish(runs.start_training(workdir))
  assert code == 0, out + err
  return workdir


def assert_same_end(workdir, uninterrupted):
  runs.assert_bitwise_equal(
    runs.checkpoint_arrays(workdir, LAST_STEP), runs.checkpoint_arrays(uninterrupted, LAST_STEP)
  )
  assert runs.comparable_metrics(workdir) == runs.comparable_metrics(uninterrupted)


def checkpoint_steps(workdir) -> list[int]:
  folder = pathlib.Path(workdir) / "checkpoints"
  return sorted(int(path.name) for path in folder.glob("*") if path.name.isdigit())


def unfinished_saves(workdir) -> list[pathlib.Path]:
  folder = pathlib.Path(workdir) / "checkpoints"
  return [path for path in folder.glob("*") if not path.name.isdigit()]


def test_uninterrupted_run_logs_each_step_once(uninterrupted):
  rows = metrics.read_metrics(uninterrupted)
  assert [row["step"] for row in rows if "loss" in row] == list(range(2, LAST_STEP + 1, 2))
  assert [row["step"] for row in rows if "validation_loss" in row] == [10, 20, 30, 40]
  assert checkpoint_steps(uninterrupted) == [39, 40]


def test_killed_run_ends_as_if_never_stopped(uninterrupted, tmp_path):
  seed = random.SystemRandom().randrange(2**32)
  print(f"seed of the kills: {seed}")  # shown when the test fails
  rng = random.Random(seed)

  def after_lines(low, high):
    lines = rng.randint(low, high)
    return lambda: runs.logged_lines(tmp_path) >= lines

  latest = max(checkpoint_steps(uninterrupted))
  moments = [
    ("after some lines", after_lines(1, 7)),
    ("during a save", lambda: unfinished_saves(tmp_path) and checkpoint_steps(tmp_path)),
    ("after more lines", after_lines(10, 16)),
  ]
  kills = []
  for name, moment in moments:
    process = runs.start_training(tmp_path)
    if runs.wait_for(moment, process):
      if name != "during a save":
        time.sleep(rng.uniform(0, 0.1))
      process.send_signal(signal.SIGKILL)
    code, out, err = runs.finish(process)
    kills.append((name, code, checkpoint_steps(tmp_path)))
    assert code == -signal.SIGKILL, f"{kills}\n{out}\n{err}"
    assert latest not in checkpoint_steps(tmp_path), kills
  print(kills)
  code, out, err = runs.finish(runs.start_training(tmp_path))
  assert code == 0, out + err
  assert "resumed from step" in out
  assert_same_end(tmp_path, uninterrupted)


def test_sigterm_saves_and_exits(uninterrupted, tmp_path):
  process = runs.start_training(tmp_path)
  assert runs.wait_for(lambda: runs.logged_lines(tmp_path) >= 4, process)
  process.send_signal(signal.SIGTERM)
  code, out, err = runs.finish(process)
  assert code == 0, out + err
  [saved] = [line for line in out.splitlines() if line.startswith("stopped by SIGTERM")]
  step = int(saved.split()[-1])
  assert 8 <= step < LAST_STEP and checkpoint_steps(tmp_path)[-1] == step
  code, out, err = runs.finish(runs.start_training(tmp_path))
  assert code == 0 and f"resumed from step {step}" in out, out + err
  assert_same_end(tmp_path, uninterrupted)


def test_changed_config_is_refused_by_name(uninterrupted):
  before = (uninterrupted / "config.json").read_text()
  process = runs.start_training(uninterrupted, "--config.model.routed_scaling_factor=2.0")
  code, _, err = runs.finish(process)
  assert code == 1 and "Traceback" not in err
  assert "model.routed_scaling_factor: 2.5 -> 2.0" in err and "--allow_config_change" in err
  assert (uninterrupted / "config.json").read_text() == before
  assert checkpoint_steps(uninterrupted) == [39, 40]


def test_explosion_stops_with_the_last_good_state_saved(tmp_path):
  overrides = ("--config.optim.learning_rate=1e30", "--config.optim.clip_norm=0.0")
  code, out, err = runs.finish(runs.start_training(tmp_path, *overrides))
  assert code == 1 and "Traceback" not in err, out + err
  [line] = [line for line in err.splitlines() if "must be finite, at step" in line]
  assert line.startswith("train: loss (")
  good = int(line.split("the state after step ")[1].split()[0])
  assert checkpoint_steps(tmp_path)[-1] == good
  arrays = runs.checkpoint_arrays(tmp_path, good)
  assert arrays["['step']"] == good
  assert all((array == array).all() for array in arrays.values())  # no NaN


def test_run_without_validation_data(tmp_path):
  config = small_config(**runs.TWO_LAYERS, **{"num_steps": 3, "data.validation_globs": ()})
  assert train.train(config, tmp_path) == 3
  assert not any("validation_loss" in row for row in metrics.read_metrics(tmp_path))
  assert json.loads((tmp_path / "config.json").read_text())["num_steps"] == 3


def test_a_glob_that_matches_nothing_leaves_no_workdir(tmp_path):
  config = small_config(**runs.TWO_LAYERS, **{"data.validation_globs": (f"{tmp_path}/*.txt",)})
  with pytest.raises(ValueError, match=r"data.validation_globs must match a file; .*/\*.txt"):
    train.train(config, tmp_path / "run")
  assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_that_failed_at_its_first_step_keeps_the_weights_it_started_with(tmp_path):
  fields = {**runs.TWO_LAYERS, "num_steps": 2, "checkpoint.save_every_steps": 1}
  fields |= {"optim.warmup_steps": 1, "balance.methods": ()}
  assert train.train(small_config(**fields), tmp_path / "a") == 2
  exploding = small_config(**fields, seed=7, **{"loss.z_loss_weight": 1e38})
  with pytest.raises(train.NonFiniteError, match="at step 1; the state after step 0 is saved"):
    train.train(exploding, tmp_path / "b", init_from=tmp_path / "a")
  assert train.train(small_config(**fields, seed=7), tmp_path / "b", allow_config_change=True) == 2
  # At warm-up's first step the learning rate is 0: nothing moves.
  a, b = (runs.checkpoint_arrays(tmp_path / name, step) for name, step in (("a", 2), ("b", 1)))
  weights = [path for path in a if "params" in str(path)]
  runs.assert_bitwise_equal({p: a[p] for p in weights}, {p: b[p] for p in weights})


def test_a_new_run_starts_with_anothers_weights(tmp_path, capsys):
  """And says what is wrong with ones that do not fit, or hold no optimizer state."""
  fields = {**runs.TWO_LAYERS, "num_steps": 2, "checkpoint.save_every_steps": 1}
  fields |= {"optim.warmup_steps": 1}
  assert train.train(small_config(**fields), tmp_path / "a") == 2
  # At warm-up's first step the learning rate is 0: nothing but the bias moves.
  config = small_config(**fields, seed=7, **{"balance.methods": ()})
  assert train.train(config, tmp_path / "b", init_from=tmp_path / "a") == 2
  assert "weights of step 2 of" in capsys.readouterr().out
  a, b = (runs.checkpoint_arrays(tmp_path / name, step) for name, step in (("a", 2), ("b", 1)))
  weights = [path for path in a if "params" in str(path) or "router_bias" in str(path)]
  assert len(weights) > 10
  runs.assert_bitwise_equal({p: a[p] for p in weights}, {p: b[p] for p in weights})
  wider = small_config(**fields, **{"model.hidden_size": 48})
  with pytest.raises(ValueError, match="shape"):
    train.train(wider, tmp_path / "c", init_from=tmp_path / "a")
  assert not (tmp_path / "c" / "config.json").exists()

  save = ocp.args.Composite(
    state=ocp.args.StandardSave({"params": {"w": np.ones(3)}}), data=ocp.args.JsonSave({})
  )
  with ocp.CheckpointManager(
    (tmp_path / "imported" / "checkpoints").resolve(), item_names=("state", "data")
  ) as manager:
    manager.save(0, args=save)
  with pytest.raises(ValueError, match="checkpoint 0 must hold the optimizer's state"):
    train.train(config, tmp_path / "imported", allow_config_change=True)


def test_a_new_run_takes_the_tokenizer_of_its_weights(tmp_path):
  """Its first validation loss is then that of the other's end; it resumes by the same command."""
  corpus = make_folder(tmp_path)
  fields = {**runs.TWO_LAYERS, "model.vocab_size": VOCAB, "checkpoint.save_every_steps": 2}
  fields |= {"data.validation_globs": (f"{corpus}/v/*.txt",), "balance.methods": ()}
  fields |= {"log.eval_every_steps": 2, "optim.warmup_steps": 1}
  first = small_config(**fields, **{"data.train_globs": (f"{corpus}/a/*.txt",)}, num_steps=4)
  assert train.train(first, tmp_path / "first") == 4
  fields |= {"data.train_globs": (f"{corpus}/b/*.txt",), "optim.learning_rate": 0.0}
  second = small_config(**fields, **{"optim.final_learning_rate": 0.0}, num_steps=2)
  for _ in range(2):
    assert train.train(second, tmp_path / "second", init_from=tmp_path / "first") == 2
  ends = [
    [row["validation_loss"] for row in metrics.read_metrics(folder) if "validation_loss" in row][-1]
    for folder in (tmp_path / "first", tmp_path / "second")
  ]
  assert ends[1] == pytest.approx(ends[0], rel=1e-5)
  names = [tmp_path / name / "data" / "tokenizer.json" for name in ("first", "second")]
  assert names[0].read_text() == names[1].read_text()
