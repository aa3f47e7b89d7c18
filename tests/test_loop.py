"""The loop's order: a step is dispatched before the metrics of the one before it are fetched."""

import itertools
import json
import threading
import types

import jax
import numpy as np
import pytest

from dsmoe import checkpoint, train
from dsmoe.data import batches as data
from dsmoe.parallel import mesh as mesh_lib
from dsmoe.profiling import capture
from dsmoe.reporting import goodput, metrics
from dsmoe.training import hyperparameters, train_step
from tests import runs
from tests.helpers import mesh_of, random_batch, small_config

make_train_step = train_step.make_train_step
CALLS: list[tuple[str, int]] = []  # of the present test
DISPATCHED: dict[int, threading.Event] = {}


def config_of(**fields):
  """Two layers on synthetic data, without validation."""
  quick = {**runs.TWO_LAYERS, "num_steps": 9, "optim.warmup_steps": 1, "log.tensorboard": False}
  quick |= {"log.log_every_steps": 1, "data.validation_globs": ()}
  return small_config(**quick | fields)


class Compiled:
  """Steps that are compiled once for all tests here, and note when they are dispatched."""

  def __init__(self):
    self.programs = {}

  def make(self, config, mesh, **options):
    def lower(*args):
      key = repr((config.model, config.optim, config.recovery.bad_step == "skip", options))
      if key not in self.programs:
        self.programs[key] = make_train_step(config, mesh, **options).lower(*args).compile()

      def run(state, batch, hyper, gate):
        CALLS.append(("dispatch", int(gate.step) + 1))
        made = self.programs[key](state, batch, hyper, gate)
        DISPATCHED[int(gate.step) + 1].set()
        return made

      return types.SimpleNamespace(compile=lambda: run)

    return types.SimpleNamespace(lower=lower)


@pytest.fixture(scope="module")
def compiled():
  return Compiled()


@pytest.fixture(autouse=True)
def noted(compiled, monkeypatch):
  """Notes dispatches; runs on two of the devices, for which a step is compiled in seconds."""
  CALLS.clear()
  DISPATCHED.clear()
  DISPATCHED.update({step: threading.Event() for step in range(99)})
  monkeypatch.setattr(train.train_step, "make_train_step", compiled.make)
  monkeypatch.setattr(train.train_step, "make_mesh", lambda config: mesh_of(2))


def batches_of(config, bad=()):
  """Yields batches, of which those of the steps `bad` give a loss that is not finite."""
  for step in itertools.count(1):
    batch = random_batch(config, step)
    if step in bad:
      batch["weights"] = batch["weights"] * np.float32(np.nan)
    yield batch


def read_batches(monkeypatch, bad=()):
  """Makes runs read `batches_of` their config, from the row on where they are."""

  def iterate(prepared, config, batch_size, index, count, position):
    whole = config_of()
    return itertools.islice(batches_of(whole, bad), position.sequences // batch_size, None)

  monkeypatch.setattr(data, "train_iterator", iterate)


def loop_that_waits(compiled, config, num_steps):
  """Returns the state and the metrics of each step, one step after the other."""
  mesh = train_step.make_mesh(config)
  state = train_step.init_state(config, mesh)
  made, fn = [], None
  for step, batch in zip(range(num_steps), batches_of(config)):
    batch, gate = mesh_lib.to_global(batch, mesh), train_step.Gate(np.int32(step))
    args = batch, hyperparameters.of(config), gate
    fn = fn or compiled.make(config, mesh, is_gated=True).lower(state, *args).compile()
    state, step_metrics = fn(state, *args)
    made.append(jax.device_get((state, step_metrics)))
  return made


def test_a_step_is_dispatched_before_the_one_before_it_is_fetched(compiled, tmp_path, monkeypatch):
  """Saving and the last step wait for all; what is written is what a loop that waits computes."""
  read_batches(monkeypatch)
  fetch, number = train.fetch, itertools.count(1)

  def fetch_late(step_metrics):
    step = next(number)
    if step not in (3, 6, 9):  # after which the state is saved
      assert DISPATCHED[step + 1].wait(60), f"step {step + 1} waits for step {step}"
    CALLS.append(("fetch", step))
    return fetch(step_metrics)

  monkeypatch.setattr(train, "fetch", fetch_late)
  config = config_of(**{"checkpoint.save_every_steps": 3})
  assert train.train(config, tmp_path).step == 9
  order = "d1 d2 f1 d3 f2 f3 d4 d5 f4 d6 f5 f6 d7 d8 f7 d9 f8 f9"
  assert " ".join(f"{what[0]}{step}" for what, step in CALLS) == order
  made, lines = loop_that_waits(compiled, config, 9), metrics.read_metrics(tmp_path)
  assert [line["step"] for line in lines] == list(range(1, 10))
  for (state, step_metrics), line in zip(made, lines):
    for name, value in (
      ("loss", step_metrics["losses"].total),
      ("grad_norm", step_metrics["grad_norm"]),
      ("learning_rate", step_metrics["learning_rate"]),
      ("expert_counts", step_metrics["load"].counts_LE),
      ("router_bias", np.concatenate(jax.tree.leaves(state.router_bias))),
    ):
      np.testing.assert_array_equal(np.asarray(line[name], np.float32), value)
    assert line["tokens"] == line["step"] * 16 * 14
  assert np.ptp(lines[-1]["router_bias"]) > 0
  for step in (6, 9):
    assert saved_state(tmp_path, step) == bytes_of(made[step - 1][0])


def saved_state(workdir, step):
  return sorted(a.tobytes() for a in runs.checkpoint_arrays(workdir, step).values())


def bytes_of(state):
  return sorted(np.asarray(a).tobytes() for a in jax.tree.leaves(state))


def test_no_step_moves_the_state_after_one_that_was_not_finite(compiled, tmp_path, monkeypatch):
  """Step 4, whose batch is a good one, is dispatched before it is known that step 3 is bad."""
  read_batches(monkeypatch, bad=(3,))
  config = config_of()
  with pytest.raises(train.NonFiniteError, match=r"at step 3; the state after step 2 is saved"):
    train.train(config, tmp_path)
  assert ("dispatch", 4) in CALLS
  assert saved_state(tmp_path, 2) == bytes_of(loop_that_waits(compiled, config, 2)[-1][0])
  assert [line["step"] for line in metrics.read_metrics(tmp_path)] == [1, 2]


def lines_of(workdir, name):
  return [(line["step"], line[name]) for line in metrics.read_metrics(workdir) if name in line]


def test_a_skipped_step_moves_nothing_and_the_run_goes_on(compiled, tmp_path, monkeypatch, capsys):
  """Two in a row, the second one a spike by the window of a run that was stopped in between."""
  read_batches(monkeypatch, bad=(6,))
  fields = {"recovery.bad_step": "skip", "recovery.spike_deviations": 1e4}
  fields |= {"recovery.spike_window_steps": 4, "checkpoint.save_every_steps": 1}
  fields |= {"checkpoint.keep_last": 9}
  config = config_of(**fields)
  limits = {}
  run = compiled.make

  def with_a_spike(config, mesh, **options):
    """Step 7's limit is far below its loss; the others' are as the loop gives them."""
    lower = run(config, mesh, **options).lower

    def spiking(state, batch, hyper, gate):
      step = int(gate.step) + 1
      limits.setdefault(step, []).append((gate.max_loss, gate.max_grad_norm))
      gate = gate._replace(max_loss=np.float32(0.5)) if step == 7 else gate
      return fn(state, batch, hyper, gate)

    def lowered(*args):
      nonlocal fn
      fn = lower(*args).compile()
      return types.SimpleNamespace(compile=lambda: spiking)

    fn = None
    return types.SimpleNamespace(lower=lowered)

  monkeypatch.setattr(train.train_step, "make_train_step", with_a_spike)
  assert train.train(config, tmp_path).step == 9
  arrays = {step: runs.checkpoint_arrays(tmp_path, step) for step in range(5, 10)}
  for step in (6, 7):
    assert arrays[step].pop("['step']") == step
    runs.assert_bitwise_equal(arrays[step], {k: v for k, v in arrays[5].items() if k != "['step']"})
  moved = [k for k in arrays[7] if "params" in k and (arrays[8][k] != arrays[7][k]).any()]
  assert len(moved) > 10
  assert lines_of(tmp_path, "skipped_steps") == [(n, int(n in (6, 7))) for n in range(1, 10)]
  rates = dict(lines_of(tmp_path, "learning_rate"))
  assert rates[8] == rates[6] == rates[7] != rates[9]  # the schedule counts the steps that moved
  out = capsys.readouterr().out
  assert "must be finite, at step 6; skipped (1 so far, 1 of at most 10 in a row)" in out
  assert "latest steps, at step 7; skipped (2 so far, 2 of at most 10 in a row)" in out

  # Resumed from step 8, the run computes its limits from the same window.
  before = limits.copy()
  assert train.train(config, tmp_path, resume_from=8).step == 9
  assert before[9][0] == limits[9][1] and np.isfinite(limits[9][1]).all()
  runs.assert_bitwise_equal(runs.checkpoint_arrays(tmp_path, 9), arrays[9])
  saved = json.loads((tmp_path / "checkpoints/9/data/metadata").read_text())
  assert (saved["bad_steps"]["skipped"], saved["bad_steps"]["skipped_in_a_row"]) == (2, 0)


@pytest.mark.slow
def test_steps_that_are_skipped_at_a_start_and_at_a_stop(compiled, tmp_path, monkeypatch):
  """The config counts as known to work although its first step is skipped; no line is missing."""
  fields = {"recovery.bad_step": "skip", "recovery.max_in_a_row": 2}
  fields |= {"recovery.spike_deviations": 1e4, "recovery.spike_window_steps": 8}
  read_batches(monkeypatch)
  assert train.train(config_of(**fields, num_steps=3), tmp_path).step == 3
  read_batches(monkeypatch, bad=(4, 6, 7, 8))
  with pytest.raises(train.NonFiniteError, match=r"at step 8; the state after step 9 is .* 3 bad"):
    train.train(config_of(**fields), tmp_path, allow_config_change=True)
  assert json.loads((tmp_path / "config.json").read_text())["num_steps"] == 9
  assert (tmp_path / "config.before_step_3.json").exists()
  skipped = [(n, int(n in (4, 6, 7, 8))) for n in range(1, 10)]
  assert lines_of(tmp_path, "skipped_steps") == skipped
  window = json.loads((tmp_path / "checkpoints/9/data/metadata").read_text())["recent_steps"]
  assert [step for step, *_ in window] == [1, 2, 3, 5, 9]


def test_a_run_goes_back_and_passes_over_the_data(compiled, tmp_path, monkeypatch, capsys):
  """The batch of step 5 is bad: step 4 and those after it are made from later batches."""
  read_batches(monkeypatch, bad=(5,))
  traced = []  # a trace that is open when the run goes back begins anew
  monkeypatch.setattr(capture.Capture, "_write", lambda self, *_: traced.append(self._traced))
  fields = {"recovery.bad_step": "rewind", "recovery.rewind_more_batches": 2}
  fields |= {"profile.steps": "4:7"}
  config = config_of(**fields, **{"checkpoint.save_every_steps": 3})
  assert train.train(config, tmp_path).step == 9
  assert traced == [[4, 5, 6]]
  out = capsys.readouterr().out
  assert "must be finite, at step 5; back to step 3 (1 return so far, 1 of at most 10 to" in out
  lines = metrics.read_metrics(tmp_path)
  assert [line["step"] for line in lines] == [1, 2, 3, 3, *range(4, 10)]
  assert lines_of(tmp_path, "rewinds") == [(3, 1)] and lines_of(tmp_path, "bad_step") == [(3, 5)]
  batches = list(itertools.islice(batches_of(config), 13))
  kept = [*batches[:3], *batches[7:]]  # without 4 and 5, which are seen, and two more
  mesh, made = train_step.make_mesh(config), []
  state = train_step.init_state(config, mesh)
  for step, batch in enumerate(kept):
    batch, gate = mesh_lib.to_global(batch, mesh), train_step.Gate(np.int32(step))
    args = batch, hyperparameters.of(config), gate
    fn = compiled.make(config, mesh, is_gated=True).lower(state, *args).compile()
    state, step_metrics = fn(state, *args)
    made.append(np.float32(step_metrics["losses"].total))
  losses = [np.float32(loss) for _, loss in lines_of(tmp_path, "loss")]
  assert losses == made
  secs, _ = goodput.account(goodput.read(tmp_path / "goodput.jsonl"))
  assert secs["made_again"] > 0
  position = json.loads((tmp_path / "checkpoints/9/data/metadata").read_text())
  assert position["sequences"] == 13 * 16

  # Without a checkpoint the run begins anew; when it comes back too often, it stops.
  read_batches(monkeypatch, bad=(2, 4, 6))
  config = config_of(**{"recovery.bad_step": "rewind", "recovery.max_in_a_row": 2})
  gone_back = r"the run has gone back to step 0 recovery.max_in_a_row \(2\) times"
  with pytest.raises(train.NonFiniteError, match=f"at step 2; the state after .*; {gone_back}"):
    train.train(config, tmp_path / "again")
  assert lines_of(tmp_path / "again", "rewinds") == [(0, 1), (0, 1)]


@pytest.mark.parametrize(
  "save_every_steps",
  [
    pytest.param(3, id="to a checkpoint"),
    pytest.param(100, id="to the start", marks=pytest.mark.slow),
  ],
)
def test_a_run_that_is_killed_after_it_went_back_passes_over_the_same_data(
  compiled, tmp_path, monkeypatch, save_every_steps
):
  """It has gone back twice when it is killed, before its next save; its count goes on too."""
  read_batches(monkeypatch, bad=(5, 7))
  fields = {"recovery.bad_step": "rewind", "recovery.max_in_a_row": 2}
  config = config_of(**fields, **{"checkpoint.save_every_steps": save_every_steps})
  undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
  assert train.train(config, undisturbed).step == 9
  fetch, number = train.fetch, itertools.count(1)
  back_at = 3 if save_every_steps == 3 else 0

  def interrupt(step_metrics):
    if next(number) == 11:  # after 6 dispatched steps, 3, and the first after the second return
      raise KeyboardInterrupt
    return fetch(step_metrics)

  with monkeypatch.context() as patch:
    patch.setattr(train, "fetch", interrupt)
    with pytest.raises(KeyboardInterrupt):
      train.train(config, killed)
  rewinds = lines_of(killed, "rewinds")
  assert rewinds == [(back_at, 1)] * 2 and rewinds == lines_of(undisturbed, "rewinds")
  assert train.train(config, killed).step == 9
  arrays = (runs.checkpoint_arrays(workdir, 9) for workdir in (killed, undisturbed))
  runs.assert_bitwise_equal(*arrays)
  saved = [
    json.loads((workdir / "checkpoints/9/data/metadata").read_text())
    for workdir in (killed, undisturbed)
  ]
  assert saved[0] == saved[1] and saved[0]["bad_steps"]["returns"] == 2
  assert runs.comparable_metrics(killed) == runs.comparable_metrics(undisturbed)


def test_a_spike_stops_the_run(compiled, tmp_path, monkeypatch):
  read_batches(monkeypatch)
  fields = {"recovery.spike_deviations": 1e-6, "recovery.spike_window_steps": 4}
  with pytest.raises(train.BadStepError, match=r"must be at most .* 1e-06 standard dev") as error:
    train.train(config_of(**fields), tmp_path)
  assert not isinstance(error.value, train.NonFiniteError)
  assert "is saved in" in str(error.value)


@pytest.mark.slow
def test_a_lost_workdir_goes_on_from_its_copies(compiled, tmp_path, monkeypatch, capsys):
  """Bitwise, in metrics too, although the run had gone on after the newest copy."""
  read_batches(monkeypatch)
  quick = {"checkpoint.save_every_steps": 2}
  assert train.train(config_of(**quick), tmp_path / "undisturbed").step == 9
  copy_to = tmp_path / "copy"
  config = config_of(
    **quick, **{"checkpoint.copy_to": str(copy_to), "checkpoint.copy_every_steps": 4}
  )
  beats = itertools.count(1)

  def interrupt(*args):
    if next(beats) == 8:
      raise KeyboardInterrupt
    return fetch(*args)

  fetch = train.fetch
  with monkeypatch.context() as patch:
    patch.setattr(train, "fetch", interrupt)
    with pytest.raises(KeyboardInterrupt):
      train.train(config, tmp_path / "lost")
  assert [path.name for path in (copy_to / "checkpoints").iterdir()] == ["4"]
  capsys.readouterr()
  assert train.train(config, tmp_path / "new").step == 9
  out = capsys.readouterr().out
  assert f"fetched checkpoint 4 from {copy_to}" in out and "resumed from step 4" in out
  for workdir in (tmp_path / "new", copy_to):
    runs.assert_bitwise_equal(
      runs.checkpoint_arrays(workdir, 9), runs.checkpoint_arrays(tmp_path / "undisturbed", 9)
    )
    expected = runs.comparable_metrics(tmp_path / "undisturbed")
    assert runs.comparable_metrics(workdir) == expected
  steps = sorted(int(path.name) for path in (copy_to / "checkpoints").iterdir())
  assert steps == [4, 8, 9]

  # The copy is a workdir: weights are loaded from it, and a run resumes in it.
  run = checkpoint.load_run(copy_to)
  assert run.step == 9 and run.config == config
  assert train.train(config_of(**quick), copy_to, True, resume_from=8).step == 9
  runs.assert_bitwise_equal(
    runs.checkpoint_arrays(copy_to, 9), runs.checkpoint_arrays(tmp_path / "undisturbed", 9)
  )
