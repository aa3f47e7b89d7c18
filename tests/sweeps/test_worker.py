"""What a worker does with its trials, with runs that only yield points."""

import contextlib
import dataclasses
import errno
import json
import math
import os
import re
import shutil
import types

import numpy as np
import pytest
from etils import epath

from dsmoe import checkpoint
from dsmoe import config as config_lib
from dsmoe.data import folder
from dsmoe.reporting import result
from dsmoe.sweeps import begin, claim, draws, lease, results, space, worker
from dsmoe.sweeps import record as record_lib
from dsmoe.sweeps import study as study_lib
from tests.reporting import test_result
from tests.sweeps import fake_runner, fake_sweep
from tests.sweeps.fake_run import Point, Result

BASE = fake_runner.config()
POINTS = [{"optim.learning_rate": rate} for rate in (1e-3, 2e-3, 4e-3)]
STEPS = (10, 20, 30, 40)  # of BASE


def begun(workdir, points=POINTS, num_seeds=1, base=BASE, **changes):
  """Begins a sweep of points, or of a search that draws so many; returns its record and study."""
  if isinstance(points, int):
    probed = draws.probe(fake_runner.search)
    found = space.of_search(base, fake_runner.search, points, num_seeds, probed)
  else:
    found = space.of_points(base, points, num_seeds, "a test")
  made = fake_runner.record_of(found, base, **changes)
  return begin.begin(workdir, None, base, made, print)


def loss(config, step: int) -> float:
  params = {
    "optim.learning_rate": config.optim.learning_rate,
    "balance.bias_update_speed": config.balance.bias_update_speed,
  }
  return fake_sweep.loss(params, config.seed, step)


class Run:
  """A run that yields the curve of `loss`; `before` is called with the config and each step."""

  def __init__(self, before=lambda config, step: None):
    self.before = before
    self.seen: list[tuple[str, int]] = []  # workdir's name and seed
    self.reasons: list[str] = []
    self.ended: list[str] = []  # those whose generator was closed

  def __call__(self, config, workdir):
    self.seen.append((workdir.name, config.seed))
    try:
      for step in STEPS:
        self.before(config, step)
        reason = yield Point(step, loss(config, step))
        if reason:
          self.reasons.append(reason)
          return Result(step, 5.0, reason, Point(step, loss(config, step)))
      return Result(step, 7.0, "finished", Point(step, loss(config, step)))
    finally:
      self.ended.append(workdir.name)


def work(workdir, run, max_restarts=5, aside_secs=0.0):
  with lease.Leases(workdir) as leases:
    worker.work(workdir, None, leases, run, max_restarts, 0.01, aside_secs)
  return results.read(workdir).trials


def test_trials_are_run_in_order_and_once(tmp_path):
  begun(tmp_path, num_seeds=2)
  run = Run()
  trials = work(tmp_path, run)
  assert run.seen == [(f"{number:04d}", number % 2) for number in range(6)]
  for trial in trials:
    value = fake_sweep.loss(trial.params | {"balance.bias_update_speed": BASE.balance.bias_update_speed}, trial.seed, 40)  # fmt: skip
    assert (trial.state, trial.value, trial.flops, trial.error) == ("complete", value, 7.0, "")
    assert os.path.realpath(trial.workdir / "data") == os.path.realpath(tmp_path / "data")
  assert work(tmp_path, run) == trials and len(run.seen) == 6


def test_a_trial_that_fails_says_why_and_the_others_go_on(tmp_path):
  wrong = {
    1e-3: ValueError("a rule,\n and 3"),
    2e-3: RuntimeError("out of memory"),
    8e-3: KeyError(4),
  }

  def before(config, step):
    if step == 20 and (error := wrong.get(config.optim.learning_rate)):
      raise error

  points = [*POINTS, {"optim.learning_rate": 8e-3}, {"optim.learning_rate": 0.1}]
  begun(tmp_path, points)
  run = Run(before)
  trials = work(tmp_path, run)
  assert [trial.state for trial in trials] == ["failed"] * 2 + ["complete", "failed", "complete"]
  errors = ["a rule, and 3", "RuntimeError: out of memory", "", "KeyError: 4", ""]
  assert [trial.error for trial in trials] == errors
  assert len(run.ended) == 5


def test_what_a_run_used_is_read_from_its_result(tmp_path):
  begun(tmp_path)

  def run(config, workdir):
    yield Point(10, 2.0)
    path = workdir / result.RESULT_FILE
    if workdir.name == "0001":
      path.write_text("{}")
    elif workdir.name == "0002":
      test_result.end(workdir, [])
      found = {"model_flops_made_again": 2e12, "num_devices": 4}
      path.write_text(json.dumps(json.loads(path.read_text()) | found))
      raise RuntimeError("the end")
    return Result(10, 7.0, "finished", Point(10, 2.0))

  trials = work(tmp_path, run)
  used = [(trial.state, trial.flops, trial.lost_flops, trial.num_devices) for trial in trials]
  assert used == [("complete", 7.0, 0.0, 1), ("complete", 7.0, 0.0, 1), ("failed", 7e12, 2e12, 4)]


@pytest.mark.parametrize("points", [[*POINTS, {"optim.learning_rate": 8e-3}], 4])
def test_failed_trials_can_be_tried_again(tmp_path, points):
  _, study = begun(tmp_path, points)
  wrong = {1: 10, 3: 20}  # the step after whose point a trial fails

  def before(config, step):
    if step > wrong.get(int(run.seen[-1][0]), 99):
      raise RuntimeError("no memory")

  run = Run(before)
  once = work(tmp_path, run)
  assert [trial.state for trial in once] == ["complete", "failed", "complete", "failed"]
  wrong.pop(1)
  assert begin.retry_failed(tmp_path, study, print) == 2
  waiting = results.read(tmp_path).trials
  assert [trial.state for trial in waiting] == ["complete", "waiting", "complete", "waiting"]
  begun_trials = study.begun()  # from which another worker may draw before one takes them up
  draws.draw(fake_runner.search, [begun_trials[n] for n in sorted(begun_trials)], 1)
  assert [t._replace(state="failed", error=once[1].error) for t in waiting] == [
    t._replace(state="failed", error=once[1].error) for t in once
  ]
  assert set(study.begun()[3].intermediate_values) == {10, 20}
  twice = work(tmp_path, run)
  assert [name for name, _ in run.seen[4:]] == ["0001", "0003"]
  assert [trial.state for trial in twice] == ["complete"] * 3 + ["failed"]
  assert (twice[1].params, twice[1].error) == (once[1].params, "")
  assert twice[1].seconds > once[1].seconds and twice[3].error == "RuntimeError: no memory"
  wrong.clear()
  assert begin.retry_failed(tmp_path, study, print) == 1
  assert [trial.state for trial in work(tmp_path, run)] == ["complete"] * 4
  assert begin.retry_failed(tmp_path, study, print) == 0
  begun(tmp_path, points)  # the same command still goes on with it


@pytest.mark.parametrize("final", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_a_failure(tmp_path, final):
  begun(tmp_path, POINTS[:1])

  def run(config, workdir):
    yield Point(10, 1.0)
    return Result(10, math.nan, "finished", Point(10, final))

  (trial,) = work(tmp_path, run)
  assert trial.state == "failed" and f"must be finite, got {final}" in trial.error


def test_a_signal_hands_the_trial_back_and_the_next_worker_goes_on_with_it(tmp_path):
  begun(tmp_path)

  def stopped(config, workdir):
    yield Point(10, loss(config, 10))
    return Result(12, 3.0, "stopped by SIGTERM", Point(10, loss(config, 10)))

  def interrupted(config, workdir):
    yield Point(10, loss(config, 10))
    raise KeyboardInterrupt

  for run, error in ((stopped, worker.Handed), (interrupted, KeyboardInterrupt)):
    with pytest.raises(error):
      work(tmp_path, run)
    assert [trial.state for trial in results.read(tmp_path).trials] == ["waiting"] * 3
  trials = work(tmp_path, Run())
  assert [trial.state for trial in trials] == ["complete"] * 3 and trials[0].seconds > 0


def test_a_signal_that_comes_when_a_trial_ends_ends_its_worker(tmp_path):
  begun(tmp_path)

  def finished(config, workdir):
    yield Point(10, loss(config, 10))
    return Result(10, 3.0, "finished", Point(10, loss(config, 10)), ("SIGTERM",))

  with pytest.raises(worker.Handed, match="stopped by SIGTERM, after trial 0"):
    work(tmp_path, finished)
  states = [trial.state for trial in results.read(tmp_path).trials]
  assert states == ["complete", "waiting", "waiting"]


def test_a_full_disk_is_the_machines_fault(tmp_path):
  begun(tmp_path)

  def before(config, step):
    raise OSError(errno.ENOSPC, "No space left on device")

  with pytest.raises(worker.MachineError, match="No space left"):
    work(tmp_path, Run(before))
  assert [trial.state for trial in results.read(tmp_path).trials] == ["waiting"] * 3


def test_a_trial_in_whose_workdir_another_process_trains_is_tried_later(tmp_path, capsys):
  begun(tmp_path)
  run, seen = Run(), []

  def owning(config, workdir):
    if workdir.name == "0002":
      seen.append(results.read(tmp_path).trials[0])
      other.close()
    with checkpoint.owned(workdir):
      return (yield from run(config, workdir))

  with contextlib.ExitStack() as other:
    other.enter_context(checkpoint.owned(results.trial_folder(tmp_path, 0)))
    trials = work(tmp_path, owning, aside_secs=0.5)
  assert [name for name, _ in run.seen] == ["0001", "0002", "0000"]
  assert [(trial.state, trial.error) for trial in trials] == [("complete", "")] * 3
  assert seen[0].state == "waiting" and "must have one run at a time" in seen[0].error
  assert f"trial 0: waiting: {seen[0].error}\n" in capsys.readouterr().out


def texts(place) -> config_lib.Config:
  """Returns BASE with a text to train on, and writes that."""
  path = place / "text.txt"
  path.write_text("A text of some words. " * 200)
  data = dataclasses.replace(BASE.data, train_globs=(str(path),))
  return dataclasses.replace(BASE, data=data, model=dataclasses.replace(BASE.model, vocab_size=300))


def change_text(folder) -> None:
  with (folder / "text.txt").open("a") as file:
    file.write("More of it.")


def remake_data(folder) -> None:
  change_text(folder)
  shutil.rmtree(folder / "sweep" / "data")


def damage_data(folder) -> None:
  next((folder / "sweep" / "data").glob("train-0*.arrayrecord")).write_bytes(b"")


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (change_text, "data made from other sources or settings"),
    (lambda folder: (folder / "text.txt").unlink(), "must match a file"),
    (remake_data, "its digest was"),
    (damage_data, "it has 0; delete train-0"),
  ],
)
def test_a_changed_text_stops_the_worker_and_fails_no_trial(tmp_path, change, message):
  workdir = tmp_path / "sweep"
  base = texts(tmp_path)
  begun(workdir, base=base)
  kept = shutil.copytree(workdir / "data", tmp_path / "kept")
  run = Run(lambda config, step: change(tmp_path) if len(run.seen) == 1 and step == 40 else None)
  with pytest.raises(folder.ChangedDataError, match=f"must stay as it was .*{message}"):
    work(workdir, run)
  states = [(trial.state, message in trial.error) for trial in results.read(workdir).trials]
  assert states == [("complete", False), ("waiting", True), ("waiting", False)]
  texts(tmp_path)
  shutil.copytree(kept, workdir / "data", dirs_exist_ok=True)
  trials = work(workdir, run)
  assert [(trial.state, trial.error) for trial in trials] == [("complete", "")] * 3


def test_a_damaged_record_that_a_run_reads_fails_no_trial(tmp_path):
  begun(tmp_path)

  def before(config, step):
    raise folder.ChangedDataError("a.arrayrecord is damaged")

  with pytest.raises(folder.ChangedDataError, match="is damaged"):
    work(tmp_path, Run(before))
  assert [trial.state for trial in results.read(tmp_path).trials] == ["waiting"] * 3


def test_a_trial_whose_process_keeps_dying_is_given_up(tmp_path):
  record, study = begun(tmp_path, POINTS[:2])
  numbers = []
  for death in range(5):  # a process ends without a word: its lease is free, its trial is running
    with lease.Leases(tmp_path) as leases:
      claimed = claim.next_trial(record, study, leases, None, max_restarts=2)
      numbers.append(claimed.number)
      if death == 1:
        study.report(claimed.trial, 10, 3.0)
  # Once after no point, then three times after step 10.
  assert numbers == [0, 0, 0, 0, 1]
  first, second = results.read(tmp_path).trials
  assert first.state == "failed" and second.state == "interrupted"
  assert "at most 2 times in a row after the same point of its curve" in first.error


def test_a_trial_that_another_machine_has_taken_over_is_left_to_it(tmp_path):
  record, study = begun(tmp_path, POINTS[:2])
  with lease.Leases(tmp_path) as leases:

    def before(config, step):
      if step == 20 and config.optim.learning_rate == 1e-3:
        leases._lost.add(lease.trial_name(0))

    run = Run(before)
    claimed = claim.next_trial(record, study, leases, None, 5)
    worker._run_trial(tmp_path, record, study, leases, claimed, run)
  assert run.reasons == ["another machine has taken the trial over"]
  assert study.begun()[0].intermediate_values == {10: loss_of(1e-3, 10)}
  assert study_lib.state_of(study.begun()[0]) == "running"


def loss_of(rate, step):
  speed = BASE.balance.bias_update_speed
  params = {"optim.learning_rate": rate, "balance.bias_update_speed": speed}
  return fake_sweep.loss(params, 0, step)


def test_pruning_looks_at_the_points_only(tmp_path):
  rates = [1.9e-3, 2e-3, 2.1e-3, 2.2e-3, 1.8e-3, 0.1, 2e-2, 2.05e-3]
  pruner = {"name": "median", "n_startup_trials": 5, "n_warmup_steps": 15}
  begun(tmp_path, [{"optim.learning_rate": rate} for rate in rates], pruner=pruner)
  run = Run()
  trials = work(tmp_path, run)
  assert [trial.state for trial in trials[:5]] == ["complete"] * 5
  assert [trial.state for trial in trials[5:7]] == ["pruned", "pruned"]
  assert trials[7].state == "complete" and trials[5].value is None
  study = study_lib.Study(tmp_path, record_lib.read(tmp_path))
  assert max(study.begun()[5].intermediate_values) == 20  # the first point after 15 steps
  assert run.reasons == ["pruned", "pruned"]


def test_points_of_an_earlier_process_are_not_judged_again(tmp_path, monkeypatch):
  pruner = {"name": "median", "n_startup_trials": 1, "n_warmup_steps": 0}
  _, study = begun(tmp_path, POINTS, pruner=pruner)
  trial = study.create(2, POINTS[2], 0, None)  # it died after two points, when nothing was known
  for step in STEPS[:2]:
    study.report(trial, step, loss_of(4e-3, step))
  judged = []
  monkeypatch.setattr(study_lib.Study, "prunes", lambda self, trial: judged.append(trial))
  work(tmp_path, Run())
  assert len(judged) == 3 + 3 + 2  # steps 10 to 30 of two trials, 20 and 30 of the third


def test_a_search_draws_each_point_once_and_its_seeds_share_it(tmp_path):
  begun(tmp_path / "one", 6, num_seeds=2)
  trials = work(tmp_path / "one", Run())
  for first, second in zip(trials[::2], trials[1::2], strict=True):
    assert first.params == second.params and (first.seed, second.seed) == (0, 1)
  assert len({str(trial.params) for trial in trials}) == 6
  begun(tmp_path / "again", 6, num_seeds=2)

  def stop(config, step):
    if step == 20 and len(run.seen) % 2:
      raise KeyboardInterrupt

  run = Run(stop)

  for _ in range(30):
    try:
      again = work(tmp_path / "again", run)
      break
    except KeyboardInterrupt:
      continue
  assert [(t.params, t.value) for t in again] == [(t.params, t.value) for t in trials]


def test_a_point_of_another_type_that_is_drawn_late_fails_its_trials_alone(
  tmp_path, monkeypatch, capfd
):
  wrong = {0: {"batch_size": 2.5}, 1: {"seed": 7}, 2: {"batch_size": np.int64(4)}}
  wrong |= {3: {"data.sequence_length": 16}, 4: {"batch_size": 4}}
  calls = []

  def search(trial):
    calls.append(trial.suggest_int("rate", 1, 9))
    if is_late and len(calls) == 6:
      raise ZeroDivisionError("rare")
    return {"optim.learning_rate": calls[-1]} | (wrong if is_late else {}).get(len(calls) - 1, {})

  is_late = False
  found = space.of_search(BASE, search, 7, 2, draws.probe(search))
  made = fake_runner.record_of(found, BASE)
  _, study = begin.begin(tmp_path, None, BASE, made, print)
  monkeypatch.setattr(space, "load", lambda path: types.SimpleNamespace(search=search))
  is_late = True
  calls.clear()
  run = Run()
  trials = work(tmp_path, run)
  assert [name for name, _ in run.seen] == ["0012", "0013"]
  messages = [
    "config.batch_size must be int, got 2.5 of type float",
    r"search\(trial\) must leave the field seed to --seeds, got 7",
    "config.batch_size must be int, got .*4.* of type int64",
    "a sweep must not search data.sequence_length, which this point sets",
    "must set batch_size in all its points or in none",
    r"search\(trial\) must draw a point, and raised ZeroDivisionError: rare",
  ]
  for number, trial in enumerate(trials[:12]):
    assert trial.state == "failed" and re.search(messages[number // 2], trial.error), trial
    assert trial.params.get("optim.learning_rate", 6) == (calls[number // 2] if number < 10 else 6)
  assert [type(t.params["optim.learning_rate"]) for t in trials[12:]] == [float, float]
  assert len(calls) == 7 and "Traceback" not in "".join(capfd.readouterr())
  assert begin.retry_failed(tmp_path, study, print) == 0
  assert "12 failed trials have no point that may be run" in capfd.readouterr().out
  assert [trial.error for trial in work(tmp_path, run)] == [trial.error for trial in trials]
  assert len(run.seen) == 2


def test_two_workers_share_a_sweep(tmp_path):
  """Their runs are interleaved by hand: no trial is run by both."""
  record, study = begun(tmp_path)
  other = study_lib.Study(tmp_path, record)
  with lease.Leases(tmp_path) as one, lease.Leases(tmp_path) as two:
    first = claim.next_trial(record, study, one, None, 5)
    second = claim.next_trial(record, other, two, None, 5)
    third = claim.next_trial(record, study, one, None, 5)
    assert [c.number for c in (first, second, third)] == [0, 1, 2]
    assert claim.next_trial(record, other, two, None, 5) is None
    one.release(first.name)
    assert claim.next_trial(record, other, two, None, 5).number == 0
    assert not claim.is_finished(record, study)


def test_another_space_config_or_corpus_is_refused(tmp_path):
  begun(tmp_path)
  cases = [
    ({"points": POINTS[:2] + [{"optim.learning_rate": 0.5}]}, r"trial 2: optim.learning_rate: 0.004 -> 0.5"),
    ({"points": [*POINTS, {"optim.learning_rate": 0.5}]}, "number of trials: 3 -> 4"),
    ({"points": [{"batch_size": 16}]}, "searched fields: optim.learning_rate -> batch_size"),
    ({"points": POINTS[:2]}, "number of trials: 3 -> 2"),
    ({"points": 3}, "space: a list of values -> a search"),
    ({"config": config_lib.to_dict(BASE) | {"num_steps": 50}}, "config.num_steps: 40 -> 50"),
    ({"pruner": {"name": "median"}}, "pruner.name: none -> median"),
    ({"name": "other"}, "name: made -> other"),
  ]  # fmt: skip
  whole = (tmp_path / "sweep.json").read_bytes()
  for changes, message in cases:
    with pytest.raises(ValueError, match=f"began with another space, config or corpus.*{message}"):
      begun(tmp_path, **changes)
  record = record_lib.read(tmp_path)
  record_lib.write(tmp_path, record._replace(corpus="12"))
  with pytest.raises(ValueError, match=f"corpus: 12 -> {record.corpus}"):
    begun(tmp_path)
  record_lib.write(tmp_path, record)
  begun(tmp_path)
  assert (tmp_path / "sweep.json").read_bytes() == whole


def test_a_workdir_of_something_else_is_refused(tmp_path):
  (tmp_path / "run").mkdir()
  (tmp_path / "run" / "config.json").write_text("{}")
  with pytest.raises(ValueError, match=r"must not be a run's, and .* has config.json"):
    begun(tmp_path / "run")
  (tmp_path / "lost" / "trials" / "0000").mkdir(parents=True)
  with pytest.raises(ValueError, match=r"has 1 trials and no sweep.json"):
    begun(tmp_path / "lost")
  with pytest.raises(ValueError, match=r"must not search data.cache_dir"):
    begun(tmp_path / "new", [{"data.cache_dir": "/tmp"}])
  assert not (tmp_path / "new").exists()
  with pytest.raises(ValueError, match=r"must have a --storage=postgresql://.*--workdir=gs://b/x"):
    begun(epath.Path("gs://b/x"))


@pytest.mark.parametrize("field", ["model.vocab_size", "log.eval_batches", "data.sequence_length"])
def test_losses_of_other_rows_are_not_compared(tmp_path, field):
  with pytest.raises(ValueError, match=f"must not search {field}: .*could not be compared"):
    begun(tmp_path, [{field: size} for size in (96, 128)])
  assert not list(tmp_path.iterdir())


def test_batches_of_other_sizes_are_compared_on_the_whole_validation_set(tmp_path):
  def run(config, workdir):
    yield Point(40, 1.0)
    return Result(40, 1.0, "finished", Point(40, 1.0, whole_loss=1 / config.batch_size))

  begun(tmp_path, [{"batch_size": size} for size in (8, 16)])
  assert [trial.value for trial in work(tmp_path, run)] == [1 / 8, 1 / 16]


@pytest.mark.parametrize("points", [POINTS, 3])
def test_seeds_can_be_added_to_a_sweep_that_has_ended(tmp_path, points, monkeypatch):
  begun(tmp_path, points)
  before = work(tmp_path, Run())
  params = before[1].params
  more = [(params, 5), (params, 6), (params, 0)]
  assert len(begin.add(tmp_path, before, more, print).trials) == 5
  begin.add(tmp_path, before, more, print)
  with pytest.raises(ValueError, match=r"to values that were run, got .'batch_size': 3"):
    begin.add(tmp_path, before, [({"batch_size": 3}, 0)], print)
  begun(tmp_path, points)  # the same command still goes on with it
  monkeypatch.setattr(study_lib.Study, "prunes", lambda self, trial: True)
  after = work(tmp_path, Run())
  assert after[:3] == before
  expected = [(params, 5, "complete"), (params, 6, "complete")]
  assert [(trial.params, trial.seed, trial.state) for trial in after[3:]] == expected
