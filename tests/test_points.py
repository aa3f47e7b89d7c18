"""A run as a function: the points of its validation curve, stopping it early, and its result."""

import concurrent.futures
import contextlib
import json
import re
import signal
import textwrap
import threading
import time
import types

import pytest

from dsmoe import config as config_lib
from dsmoe import train
from dsmoe.reporting import metrics, result
from dsmoe.training import train_step
from tests import runs
from tests.helpers import mesh_of, small_config

make_train_step, make_eval_step = train_step.make_train_step, train_step.make_eval_step
STEP_TOKENS = 16 * 14


def config_of(**fields):
  """Two layers on synthetic data, of six steps; a checkpoint every three, a point every two."""
  quick = {**runs.TWO_LAYERS, "num_steps": 6, "optim.warmup_steps": 1, "log.tensorboard": False}
  quick |= {"log.log_every_steps": 1, "log.eval_every_steps": 2, "log.eval_batches": 1}
  return small_config(**quick | {"checkpoint.save_every_steps": 3} | fields)


@pytest.fixture(scope="module")
def programs():
  return {}


@pytest.fixture(autouse=True)
def compiled_once(programs, monkeypatch):
  """All runs here share two compiled programs, on two of the devices."""

  def make_step(config, mesh, **options):
    def lower(*args):
      if "step" not in programs:
        programs["step"] = make_train_step(config, mesh, **options).lower(*args).compile()
      return types.SimpleNamespace(compile=lambda: programs["step"])

    return types.SimpleNamespace(lower=lower)

  def make_eval(config, mesh):
    return programs.setdefault("eval", make_eval_step(config, mesh))

  monkeypatch.setattr(train_step, "make_train_step", make_step)
  monkeypatch.setattr(train_step, "make_eval_step", make_eval)
  monkeypatch.setattr(train_step, "make_mesh", lambda config: mesh_of(2))


def handlers():
  return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


def threads():
  return {thread.name for thread in threading.enumerate()}


def ended(before):
  """Whether threads that a run has started are gone, or go within seconds."""
  end = time.monotonic() + 20
  while threads() - before and time.monotonic() < end:
    time.sleep(0.01)
  return threads() <= before


def saved_steps(workdir):
  return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


def losses_of(workdir):
  rows = metrics.read_metrics(workdir)
  return {row["step"]: row["validation_loss"] for row in rows if "validation_loss" in row}


@pytest.mark.slow
def test_a_run_that_is_stopped_at_a_point_goes_on_as_if_it_had_not_been(tmp_path):
  whole = train.train(config_of(), tmp_path / "whole")
  losses = losses_of(tmp_path / "whole")
  assert list(losses) == [2, 4, 6] and len(set(losses.values())) == 3
  assert (whole.step, whole.tokens, whole.why) == (6, 6 * STEP_TOKENS, "finished")
  assert whole.final == train.Point(
    **{"step": 6, "tokens": 6 * STEP_TOKENS, "loss": pytest.approx(losses[6], rel=1e-6)},
    **{name: getattr(whole.final, name) for name in train.Point._fields[3:]},
  )
  best = min(losses, key=losses.get)
  assert whole.best.step == best and whole.best.tokens == best * STEP_TOKENS
  assert whole.final.whole_loss is not None and whole.seconds > 0
  line = [row for row in metrics.read_metrics(tmp_path / "whole") if "gflops_per_sec" in row][-1]
  step_flops = line["gflops_per_sec"] * 1e9 * line["step_secs"]
  assert whole.flops == pytest.approx(6 * step_flops, rel=1e-6)

  # Stopped at the point of step 2, of which there is no checkpoint otherwise.
  workdir, before, had = tmp_path / "stopped", handlers(), threads()
  run = train.points(config_of(), workdir)
  point = next(run)
  assert (point.step, point.loss) == (2, pytest.approx(losses[2], rel=1e-6))
  pruned = train.stop(run, "pruned")
  assert (pruned.step, pruned.why) == (2, "pruned") and pruned.final == pruned.best == point
  assert saved_steps(workdir) == [2] and list(losses_of(workdir)) == [2]
  assert result.read(workdir).result == pruned
  assert handlers() == before and ended(had)
  with pytest.raises(StopIteration):
    next(run)

  # Resumed, and left at the point of step 4, which has no checkpoint: step 4 is made again.
  with contextlib.closing(train.points(config_of(), workdir)) as run:
    assert [next(run).step, next(run).step] == [2, 4]
    with pytest.raises(ValueError, match="in use by process"):
      next(train.points(config_of(), workdir))
  assert handlers() == before and ended(had) and saved_steps(workdir) == [2, 3]
  assert result.read(workdir).why == "closed" and result.read(workdir).step == 4
  seen = []

  def watched():
    seen.append((yield from train.points(config_of(), workdir)))

  shown = list(watched())
  assert [point.step for point in shown] == [2, 4, 6]
  [again] = seen
  assert (again.step, again.why, again.final.step) == (6, "finished", 6)
  assert again.final == whole.final and again.best == whole.best
  assert again.flops == pytest.approx(7 * step_flops, rel=1e-6)
  recorded = result.read(workdir)
  assert recorded.result == again and recorded.num_starts == 3
  assert recorded.model_flops_made_again == pytest.approx(step_flops, rel=1e-6)
  assert config_lib.from_dict(recorded.config) == config_of() and "dsmoe/data" in recorded.versions
  manifest = json.loads((workdir / "data" / "manifest.json").read_text())
  assert recorded.dataset_sha256 == manifest["manifest_sha256"]
  arrays = [runs.checkpoint_arrays(folder, 6) for folder in (tmp_path / "whole", workdir)]
  runs.assert_bitwise_equal(*arrays)
  assert runs.comparable_metrics(workdir) == runs.comparable_metrics(tmp_path / "whole")
  # A finished run shows its curve again; what is sent at its last point changes nothing.
  run = train.points(config_of(), workdir)
  assert [next(run).step for _ in range(3)] == [2, 4, 6]
  assert train.stop(run, "pruned").why == "finished"


@pytest.mark.slow
def test_only_a_text_ends_a_run_early(tmp_path):
  run = train.points(config_of(), tmp_path)
  next(run)
  with pytest.raises(ValueError, match="the reason to stop a run must be a text, got 3"):
    run.send(3)
  del run
  run = train.points(config_of(), tmp_path)  # whose lock is free; nothing was saved
  assert next(run).step == 2
  del run
  assert train.train(config_of(num_steps=2), tmp_path).why == "finished"


def test_only_the_main_thread_trains(tmp_path):
  with concurrent.futures.ThreadPoolExecutor(1, "worker") as pool:
    ended = pool.submit(train.train, config_of(), tmp_path)
    with pytest.raises(ValueError, match="by the main thread of its process, got thread worker_0"):
      ended.result()
  assert not list(tmp_path.iterdir())


def test_the_example_in_the_readme(tmp_path, monkeypatch):
  """Its run is one of the short ones here; the loss of their first point is above its limit."""
  text = (runs.ROOT / "README.md").read_text()
  [code] = re.findall(r"\n(    from dsmoe import config, train\n(?:    .*\n|\n)*)", text)
  names = {}
  monkeypatch.chdir(tmp_path)
  config = config_of()
  monkeypatch.setattr(config_lib, "from_config_dict", lambda _: config)
  exec(textwrap.dedent(code), names)
  assert names["result"].why == "the loss is too high" and names["result"].step == 2


@pytest.mark.slow
def test_processes_stop_at_the_point_at_which_one_of_them_is_told_to(tmp_path):
  """Process 1 is; process 0 writes the reason."""
  flags = ("--config.log.eval_every_steps=4", "--config.mesh.data=2")
  program = ["tests/stopped_run.py"]
  ends = map(runs.finish, runs.start_processes(tmp_path, 2, *flags, program=program))
  for code, out, err in ends:
    assert code == 0 and "result: 4 pruned" in out, out + err
  assert result.read(tmp_path).result[::4] == (4, "pruned")
  assert result.read(tmp_path).num_processes == 2
  assert saved_steps(tmp_path) == [3, 4]


@pytest.mark.slow
def test_a_run_leaves_nothing_behind_in_its_process(tmp_path):
  """The third of three runs in one process has the numbers of one alone, and all leave no array."""
  workdirs = [tmp_path / f"{seed}" for seed in (1, 2, 3)]
  out = runs.run_fresh("tests/runs_in_turn.py", *(f"{w.name}={w}" for w in workdirs))
  lefts = [json.loads(line[6:]) for line in out.splitlines() if line.startswith("left: ")]
  alone = tmp_path / "alone"
  runs.run_fresh("tests/runs_in_turn.py", f"3={alone}")
  runs.assert_bitwise_equal(
    runs.checkpoint_arrays(alone, 7), runs.checkpoint_arrays(workdirs[2], 7)
  )
  assert runs.comparable_metrics(alone) == runs.comparable_metrics(workdirs[2])
  assert losses_of(alone) != losses_of(workdirs[1])
  [left] = {json.dumps(left) for left in lefts}
  assert json.loads(left)["array_bytes"] == 0 and json.loads(left)["threads"] == ["MainThread"]
