"""Whole runs: killed at any moment, stopped, changed, exploding; they go on bitwise."""

import json
import pathlib
import random
import signal
import time

import numpy as np
import orbax.checkpoint as ocp
import pytest

from dsmoe import checkpoint, train
from dsmoe.data import batches as data
from dsmoe.evaluation import perplexity
from dsmoe.reporting import metrics
from dsmoe.training import train_step
from tests import runs
from tests.data.cases import VOCAB, make_folder
from tests.helpers import assert_close, random_batch, small_config

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


@pytest.mark.slow
def test_uninterrupted_run_logs_each_step_once(uninterrupted):
  rows = metrics.read_metrics(uninterrupted)
  assert [row["step"] for row in rows if "loss" in row] == list(range(2, LAST_STEP + 1, 2))
  assert [row["step"] for row in rows if "validation_loss" in row] == [10, 20, 30, 40]
  assert [row["step"] for row in rows if "whole_validation_loss" in row] == [40]
  assert checkpoint_steps(uninterrupted) == [39, 40]


@pytest.mark.slow
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
    ("after more lines", after_lines(10, 14)),
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


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_saves_and_exits(uninterrupted, tmp_path, name):
  """Meanwhile a second run in the same workdir is refused."""
  process = runs.start_training(tmp_path)
  assert runs.wait_for(lambda: runs.logged_lines(tmp_path) >= 4, process)
  process.send_signal(signal.SIGSTOP)  # else it may end before the second run asks for the workdir
  try:
    with pytest.raises(ValueError, match=f"in use by process {process.pid} on .*another --workdir"):
      train.train(small_config(**runs.TWO_LAYERS), tmp_path)
  finally:
    process.send_signal(signal.Signals[name])
    process.send_signal(signal.SIGCONT)
  code, out, err = runs.finish(process)
  assert code == 0 and "Traceback" not in err, out + err
  [saved] = [line for line in out.splitlines() if line.startswith(f"stopped by {name}")]
  step = int(saved.split()[-1])
  assert 8 <= step < LAST_STEP and checkpoint_steps(tmp_path)[-1] == step
  if name == "SIGTERM":
    code, out, err = runs.finish(runs.start_training(tmp_path))
    assert code == 0 and f"resumed from step {step}" in out, out + err
    assert_same_end(tmp_path, uninterrupted)


# Trains, but for the preparation of the data, which takes until somebody interrupts it.
PREPARING = """
import time
from absl import flags
from dsmoe import train
from dsmoe.data import records
from dsmoe.reporting import output

def prepare(*_):
  print("preparing", flush=True)
  time.sleep(600)

records.prepare = prepare
flags.mark_flags_as_required(["config", "workdir"])
output.run_script(train.main)
"""


def test_ctrl_c_before_the_first_step_says_so(tmp_path):
  """While Python's own code runs: elsewhere Python may drop it, and the run stops at its first step."""
  process = runs.start("-c", PREPARING, f"--config={runs.SHORT_RUN}", f"--workdir={tmp_path}")
  assert "preparing\n" in iter(process.stdout.readline, ""), runs.finish(process)
  process.send_signal(signal.SIGINT)
  code, out, err = runs.finish(process)
  assert code == 130 and "Traceback" not in err, out + err
  assert err.splitlines()[-1].startswith("error: stopped by Ctrl-C; the same command starts again")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_ctrl_c_that_python_drops_stops_the_run(tmp_path, monkeypatch):
  """An exception in a destructor is printed and forgotten."""
  first_position = data.first_position

  class Interrupt:
    def __del__(self):
      signal.raise_signal(signal.SIGINT)

  def interrupted(config):
    Interrupt()
    return first_position(config)

  monkeypatch.setattr(data, "first_position", interrupted)
  assert train.train(quick_config(), tmp_path).step == 1
  assert checkpoint_steps(tmp_path) == [1]


@pytest.mark.slow
def test_changed_config_is_refused_by_name(uninterrupted):
  before = (uninterrupted / "config.json").read_text()
  process = runs.start_training(uninterrupted, "--config.model.routed_scaling_factor=2.0")
  code, _, err = runs.finish(process)
  assert code == 2 and "Traceback" not in err
  assert "model.routed_scaling_factor: 2.5 -> 2.0" in err and "--allow_config_change" in err
  assert (uninterrupted / "config.json").read_text() == before
  assert checkpoint_steps(uninterrupted) == [39, 40]


@pytest.mark.slow
def test_explosion_stops_with_the_last_good_state_saved(tmp_path):
  overrides = ("--config.optim.learning_rate=1e30", "--config.optim.clip_norm=0.0")
  code, out, err = runs.finish(runs.start_training(tmp_path, *overrides))
  assert code == 1 and "Traceback" not in err, out + err
  [line] = [line for line in err.splitlines() if "must be finite, at step" in line]
  assert line.startswith(("error: loss (", "error: gradient norm ("))
  good = int(line.split("the state after step ")[1].split()[0])
  assert checkpoint_steps(tmp_path)[-1] == good
  arrays = runs.checkpoint_arrays(tmp_path, good)
  assert arrays["['step']"] == good
  assert all((array == array).all() for array in arrays.values())  # no NaN


def quick_config(**fields):
  """Two layers on synthetic data, a checkpoint every step."""
  quick = {**runs.TWO_LAYERS, "num_steps": 4, "optim.warmup_steps": 1, "log.tensorboard": False}
  quick |= {"checkpoint.save_every_steps": 1, "checkpoint.keep_last": 9, "log.log_every_steps": 1}
  return small_config(**quick | fields)


@pytest.mark.parametrize("save_every", [pytest.param(1, marks=pytest.mark.slow), 9])
def test_an_update_that_is_not_finite_is_not_saved(tmp_path, save_every):
  """The loss and the gradient of step 2 are finite, its update is not."""
  fields = {"optim.learning_rate": 3.4e38, "optim.weight_decay": 3.0}
  config = quick_config(**fields, **{"checkpoint.save_every_steps": save_every})
  with pytest.raises((train.NonFiniteError, checkpoint.NotFiniteError)) as error:
    train.train(config, tmp_path)
  assert "the state after step 2 must be finite to be saved" in str(error.value)
  assert checkpoint_steps(tmp_path) == [1][: save_every == 1]
  end = "is that of step 1" if save_every == 1 else f"there is no checkpoint in {tmp_path} yet"
  assert end in str(error.value)


def shared(make):
  """Makes `make` return what it returned first, whatever the config."""
  made = []

  def make_once(*args, **options):
    made[:] = made or [make(*args, **options)]
    return made[0]

  return make_once


@pytest.mark.slow
def test_points_of_the_validation_curve_share_their_subset(tmp_path, capsys, monkeypatch):
  """With a learning rate of 0 they are equal, while the whole set has another loss.

  A resumed run with another subset says so, and its points tell.
  """
  still = {"optim.learning_rate": 0.0, "optim.final_learning_rate": 0.0, "balance.methods": ()}
  fields = {"log.eval_every_steps": 1, "log.eval_batches": 1}
  for name in ("make_train_step", "make_eval_step"):  # both runs share the programs
    monkeypatch.setattr(train_step, name, shared(getattr(train_step, name)))
  train.train(quick_config(**still, **fields), tmp_path)
  rows = [row for row in metrics.read_metrics(tmp_path) if "validation_loss" in row]
  assert [row["step"] for row in rows] == [1, 2, 3, 4]
  [curve] = {row["validation_loss"] for row in rows}
  assert ["whole_validation_loss" in row for row in rows] == [False, False, False, True]
  assert rows[-1]["whole_validation_loss"] != curve
  assert abs(rows[-1]["whole_validation_loss"] - curve) < 0.5
  assert "a new validation curve" not in capsys.readouterr().out
  path = tmp_path / metrics.METRICS_FILE
  lines = path.read_text().splitlines(keepends=True)
  assert "whole_validation_loss" in lines[-1]
  path.write_text("".join(lines[:-1]))  # as a run stopped before its last evaluation leaves it
  fields |= {"log.eval_batches": 2}
  train.train(quick_config(**still, **fields), tmp_path, allow_config_change=True)
  assert "a new validation curve: of 448 tokens" in capsys.readouterr().out
  rows = [row for row in metrics.read_metrics(tmp_path) if "validation_loss" in row]
  assert [row["validation_tokens"] for row in rows] == [224, 224, 224, 448]


@pytest.mark.slow
def test_an_evaluation_that_fails_comes_after_the_save(tmp_path, monkeypatch):
  """And the next run makes up for it."""
  config = quick_config(**{"log.eval_every_steps": 2})

  def fail(*_):
    raise RuntimeError("out of memory")

  with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="out of memory"):
    patch.setattr(perplexity, "validation_nats", fail)
    train.train(config, tmp_path)
  assert checkpoint_steps(tmp_path) == [1, 2]
  assert train.train(config, tmp_path).step == 4
  rows = metrics.read_metrics(tmp_path)
  kinds = [(row["step"], "validation_loss" in row) for row in rows]
  assert kinds == [(1, False), (2, False), (2, True), (3, False), (4, False), (4, True)]


@pytest.mark.slow
def test_a_run_goes_on_from_an_older_checkpoint(tmp_path):
  """The newest is damaged; what came after the older one is kept aside."""
  config = quick_config()
  assert train.train(config, tmp_path).step == 4
  whole = runs.checkpoint_arrays(tmp_path, 4)
  before = (tmp_path / "metrics.jsonl").read_bytes()
  files = [path for path in (tmp_path / "checkpoints" / "4").rglob("d/*")]
  largest = max(files, key=lambda path: path.stat().st_size)
  content = bytearray(largest.read_bytes())
  for place in range(0, len(content), 97):  # where no array lies is not read
    content[place] ^= 1
  largest.write_bytes(content)
  with pytest.raises(ValueError, match=r"checkpoint 4 in .* --resume_from=STEP.*\(here: 1, 2, 3\)"):
    train.train(config, tmp_path)
  with pytest.raises(ValueError, match=r"\(1, 2, 3, 4\), got 7"):
    train.train(config, tmp_path, resume_from=7)
  with pytest.raises(ValueError, match=r"num_steps \(2\) must be at least .* reached \(3\)"):
    train.train(quick_config(num_steps=2), tmp_path, True, resume_from=3)
  assert train.train(config, tmp_path, resume_from=2).step == 4
  runs.assert_bitwise_equal(runs.checkpoint_arrays(tmp_path, 4), whole)
  aside = tmp_path / "checkpoints_after_step_2"
  assert sorted(path.name for path in aside.iterdir()) == ["3", "4", "metrics.jsonl"]
  assert (aside / "metrics.jsonl").read_bytes() == before
  assert [row["step"] for row in metrics.read_metrics(tmp_path)] == [1, 2, 3, 4, 4]


@pytest.mark.slow
def test_weights_of_another_run_are_not_forgotten(tmp_path, monkeypatch):
  """A run that was stopped before its first step goes on with them, though they are not named."""
  config = quick_config(num_steps=2)
  assert train.train(config, tmp_path / "a").step == 2
  still = {"optim.learning_rate": 0.0, "optim.final_learning_rate": 0.0, "balance.methods": ()}
  config = quick_config(num_steps=2, seed=7, **still)

  def fail(*_):
    raise RuntimeError("killed")

  with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
    patch.setattr(train.runtime, "stop_signals", fail)
    train.train(config, tmp_path / "b", init_from=tmp_path / "a")
  assert checkpoint_steps(tmp_path / "b") == [0] and not (tmp_path / "b" / "config.json").exists()
  assert train.train(config, tmp_path / "b").step == 2
  a, b = (runs.checkpoint_arrays(tmp_path / name, 2) for name in ("a", "b"))
  weights = [path for path in a if "params" in path]
  runs.assert_bitwise_equal({p: a[p] for p in weights}, {p: b[p] for p in weights})


@pytest.mark.slow
def test_a_changed_batch_size_goes_on_at_the_next_row(tmp_path, monkeypatch):
  """The rows themselves are compared in tests/data/test_batches.py."""
  starts = []
  read = data.train_iterator

  def recorded(prepared, config, batch_size, process_index, process_count, position):
    starts.append((batch_size, config.sequence_length, position.sequences, position.tokens))
    return read(prepared, config, batch_size, process_index, process_count, position)

  monkeypatch.setattr(data, "train_iterator", recorded)
  S = small_config().data.sequence_length
  for batch_size, length, last in ((16, S, 2), (8, S, 3), (32, S, 5), (16, S // 2, 6)):
    config = small_config(
      **runs.TWO_LAYERS,
      **{"batch_size": batch_size, "data.sequence_length": length, "num_steps": last},
      **{"data.validation_globs": (), "log.log_every_steps": 1},
      **{"optim.warmup_steps": 1},
    )
    assert train.train(config, tmp_path, allow_config_change=True).step == last
  expected = [(16, S, 0, 0), (8, S, 32, 32 * S), (32, S, 40, 40 * S), (16, S // 2, 104, 104 * S)]
  assert starts == expected
  tokens = [row["tokens"] for row in metrics.read_metrics(tmp_path)]
  assert tokens == [16 * S, 32 * S, 40 * S, 72 * S, 104 * S, 112 * S]


@pytest.mark.slow
def test_a_run_that_counted_batches_goes_on_at_the_same_row(tmp_path, monkeypatch):
  """Older versions saved the number of batches beside a checkpoint."""
  values = runs.TWO_LAYERS | {"batch_size": 16, "data.validation_globs": (), "num_steps": 2}
  values |= {"optim.warmup_steps": 1}
  with monkeypatch.context() as patch:
    patch.setattr(data.Position, "to_dict", lambda position: {"next_batch": 2})
    train.train(small_config(**values), tmp_path)
  changed = small_config(**values | {"batch_size": 8, "num_steps": 3})
  train.train(changed, tmp_path, allow_config_change=True)
  [saved] = (tmp_path / "checkpoints" / "3" / "data").rglob("metadata")
  assert json.loads(saved.read_text())["sequences"] == 2 * 16 + 8


def test_padding_is_refused_before_the_step_is_compiled(monkeypatch, tmp_path):
  config = small_config(**runs.TWO_LAYERS, **{"num_steps": 3})
  batch = random_batch(config, 0)
  batch["segments"][0, 1] = 0
  monkeypatch.setattr(data, "train_iterator", lambda *_: iter([batch]))
  monkeypatch.setattr(train.train_step, "make_init", lambda *_: lambda _: None)
  with pytest.raises(ValueError, match=r"must have no padding .* got 1 such tokens"):
    train.train(config, tmp_path)
  assert not (tmp_path / "config.json").exists()


@pytest.mark.slow
def test_run_without_validation_data(tmp_path):
  config = small_config(**runs.TWO_LAYERS, **{"num_steps": 3, "data.validation_globs": ()})
  assert train.train(config, tmp_path).step == 3
  assert not any("validation_loss" in row for row in metrics.read_metrics(tmp_path))
  assert json.loads((tmp_path / "config.json").read_text())["num_steps"] == 3


@pytest.mark.slow
def test_dropped_rows_are_reported_at_every_step(tmp_path, capsys):
  """Step 1 is not logged otherwise; buffers for half of the mean must drop rows."""
  fields = {**runs.TWO_LAYERS, "num_steps": 3, "optim.warmup_steps": 1, "mesh.expert": 4}
  fields |= {"data.validation_globs": (), "log.log_every_steps": 2, "model.v_head_dim": 12}
  fields |= {"model.dispatch": "all_to_all", "model.exchange.receive_capacity": 0.5}
  train.train(small_config(**fields), tmp_path)
  rows = metrics.read_metrics(tmp_path)
  assert [(row["step"], "loss" in row) for row in rows] == [(1, False), (2, True), (3, True)]
  printed = capsys.readouterr().out
  for row in rows:
    assert row["dropped_rows"] > 0 and f"{row['dropped_rows']:,} rows dropped" in printed
    assert row["fallbacks"] == 0 and "exact path" not in printed


@pytest.mark.slow
def test_a_run_goes_on_with_its_experts_on_other_devices(tmp_path):
  """Along (data, expert, model) 2 x 2 x 2, then 2 x 4 x 1, with losses and counts of data 8."""

  def run(name, num_steps, **mesh):
    fields = {**runs.TWO_LAYERS, "num_steps": num_steps, "optim.schedule": "wsd"}
    fields |= {"optim.warmup_steps": 1, "optim.decay_steps": 0, "model.v_head_dim": 12}
    fields |= {"model.num_attention_heads": 4, "model.moe_intermediate_size": 20}
    fields["log.log_every_steps"] = 1
    fields |= {f"mesh.{axis}": size for axis, size in mesh.items()}
    fields |= {"model.dispatch": "all_gather" if mesh else "local"}
    train.train(small_config(**fields), tmp_path / name, allow_config_change=True)
    rows = [row for row in metrics.read_metrics(tmp_path / name) if "loss" in row]
    return np.array([row["loss"] for row in rows]), [row["expert_counts"] for row in rows]

  run("b", 2, expert=2, model=2)
  losses, counts = run("b", 4, expert=4)
  expected_losses, expected_counts = run("a", 4)
  assert len(losses) == 4
  assert_close(losses, expected_losses)
  np.testing.assert_array_equal(counts, expected_counts)


@pytest.mark.parametrize("name", ["", "  ", "back\\slash"])
def test_a_workdir_that_cannot_be_is_refused(tmp_path, monkeypatch, name):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(ValueError, match="workdir"):
    train.train(small_config(**runs.TWO_LAYERS), name)
  assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_workdir_with_brackets_resumes(tmp_path):
  (tmp_path / "text").mkdir()
  for i in range(4):
    (tmp_path / "text" / f"{i}.txt").write_text(f"{i} is a number; " * 60)
  workdir = tmp_path / "lr=[3e-3]" / "[0:1]"
  fields = {**runs.TWO_LAYERS, "model.vocab_size": 300, "checkpoint.save_every_steps": 1}
  fields |= {"optim.warmup_steps": 1, "data.train_globs": (f"{tmp_path}/text/*.txt",)}
  fields |= {"data.validation_globs": (f"{tmp_path}/text/*.txt",), "log.tensorboard": True}
  assert train.train(small_config(**fields, num_steps=2), workdir).step == 2
  assert (
    train.train(small_config(**fields, num_steps=3), workdir, allow_config_change=True).step == 3
  )
  assert checkpoint_steps(workdir) == [2, 3]
  assert checkpoint.load_run(workdir).step == 3


def test_a_glob_that_matches_nothing_leaves_no_workdir(tmp_path):
  config = small_config(**runs.TWO_LAYERS, **{"data.validation_globs": (f"{tmp_path}/*.txt",)})
  with pytest.raises(ValueError, match=r"data.validation_globs must match a file; .*/\*.txt"):
    train.train(config, tmp_path / "run")
  assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_start_that_failed_leaves_the_workdir_to_a_corrected_one(tmp_path, monkeypatch):
  """Whether there is a checkpoint or not."""
  fields = {**runs.TWO_LAYERS, "checkpoint.save_every_steps": 1, "optim.warmup_steps": 1}
  first, second = small_config(**fields, num_steps=2), small_config(**fields, num_steps=3)

  def fail(*_, **__):
    raise ValueError("this kernel cannot be compiled")

  for config, wrong in ((first, {"seed": 9, "model.hidden_size": 48}), (second, {"batch_size": 8})):
    resumes = (tmp_path / "config.json").exists()
    before = {path: path.read_bytes() for path in tmp_path.glob("*.json")}
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="cannot be compiled"):
      patch.setattr(train_step, "make_train_step", fail)
      failing = small_config(**fields | wrong, num_steps=3)
      train.train(failing, tmp_path, allow_config_change=resumes)
    assert {path: path.read_bytes() for path in tmp_path.glob("*.json")} == before
    assert train.train(config, tmp_path, allow_config_change=resumes).step == config.num_steps
    assert json.loads((tmp_path / "config.json").read_text())["seed"] == 0


@pytest.mark.slow
def test_a_run_that_failed_at_its_first_step_keeps_the_weights_it_started_with(tmp_path):
  fields = {**runs.TWO_LAYERS, "num_steps": 2, "checkpoint.save_every_steps": 1}
  fields |= {"optim.warmup_steps": 1, "balance.methods": ()}
  assert train.train(small_config(**fields), tmp_path / "a").step == 2
  exploding = small_config(**fields, seed=7, **{"loss.z_loss_weight": 1e38})
  with pytest.raises(train.NonFiniteError, match="at step 1; the state after step 0 is saved"):
    train.train(exploding, tmp_path / "b", init_from=tmp_path / "a")
  assert (
    train.train(small_config(**fields, seed=7), tmp_path / "b").step == 2
  )  # nothing was trained yet
  # At warm-up's first step the learning rate is 0: nothing moves.
  a, b = (runs.checkpoint_arrays(tmp_path / name, step) for name, step in (("a", 2), ("b", 1)))
  weights = [path for path in a if "params" in str(path)]
  runs.assert_bitwise_equal({p: a[p] for p in weights}, {p: b[p] for p in weights})


@pytest.mark.slow
def test_a_new_run_starts_with_anothers_weights(tmp_path, capsys):
  """And says what is wrong with ones that do not fit, or hold no optimizer state."""
  fields = {**runs.TWO_LAYERS, "num_steps": 2, "checkpoint.save_every_steps": 1}
  fields |= {"optim.warmup_steps": 1}
  assert train.train(small_config(**fields), tmp_path / "a").step == 2
  # At warm-up's first step the learning rate is 0: nothing but the bias moves.
  config = small_config(**fields, seed=7, **{"balance.methods": ()})
  assert train.train(config, tmp_path / "b", init_from=tmp_path / "a").step == 2
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


@pytest.mark.slow
def test_a_new_run_takes_the_tokenizer_of_its_weights(tmp_path):
  """Its first validation loss is then that of the other's end; it resumes by the same command."""
  corpus = make_folder(tmp_path)
  fields = {**runs.TWO_LAYERS, "model.vocab_size": VOCAB, "checkpoint.save_every_steps": 2}
  fields |= {"data.validation_globs": (f"{corpus}/v/*.txt",), "balance.methods": ()}
  fields |= {"log.eval_every_steps": 2, "optim.warmup_steps": 1}
  first = small_config(**fields, **{"data.train_globs": (f"{corpus}/a/*.txt",)}, num_steps=4)
  assert train.train(first, tmp_path / "first").step == 4
  fields |= {"data.train_globs": (f"{corpus}/b/*.txt",), "optim.learning_rate": 0.0}
  second = small_config(**fields, **{"optim.final_learning_rate": 0.0}, num_steps=2)
  for _ in range(2):
    assert train.train(second, tmp_path / "second", init_from=tmp_path / "first").step == 2
  ends = [
    [row["validation_loss"] for row in metrics.read_metrics(folder) if "validation_loss" in row][-1]
    for folder in (tmp_path / "first", tmp_path / "second")
  ]
  assert ends[1] == pytest.approx(ends[0], rel=1e-5)
  names = [tmp_path / name / "data" / "tokenizer.json" for name in ("first", "second")]
  assert names[0].read_text() == names[1].read_text()
