"""Runs of several processes on this machine: the numbers of one, ends that are agreed on or not."""

import json
import random
import signal
import socket
import types

import jax
import pytest

from dsmoe import runtime
from dsmoe.checkpoint import contents
from dsmoe.parallel import processes
from dsmoe.reporting import metrics
from tests import runs
from tests.helpers import assert_close


def steps_and_losses(workdir):
  rows = [row for row in metrics.read_metrics(workdir) if "loss" in row]
  return [row["step"] for row in rows], [row["loss"] for row in rows]


def text_flags(folder):
  """Makes two sources of text; returns the flags to pack and mix them, and to train by four."""
  rng = random.Random(0)
  for source in ("first", "second"):
    (folder / source).mkdir()
    for document in range(12):
      words = (rng.choice(["lorem", "ipsum", "dolor", "sit", "amet", source]) for _ in range(300))
      (folder / source / f"{document}.txt").write_text(" ".join(words))
  return (
    f"--config.data.train_globs=('{folder}/first/*', '{folder}/second/*')",
    "--config.data.train_weights=(1.0, 2.0)",
    "--config.data.validation_globs=()",
    "--config.data.cross_document_attention=False",
    "--config.model.vocab_size=288",
    "--config.model.num_nextn_predict_layers=0",
    "--config.batch_size=12",
    "--config.mesh.data=2",
    "--config.mesh.expert=2",
    "--config.model.dispatch=all_gather",
    "--config.log.log_every_steps=1",
    "--config.num_steps=24",
    "--elastic",
  )


@pytest.mark.slow
def test_a_run_goes_on_with_the_processes_that_are_left(tmp_path):
  """Two are stopped by one signal; of four process 0 is killed; one ends the run.

  Every row of every batch is that of an undisturbed run of one process, and so are the losses.
  """
  flags = text_flags(tmp_path)

  def begin(name, number):
    return runs.start_processes(
      tmp_path / name,
      number,
      *flags,
      program=["tests/recorded_training.py"],
      env={"ROWS_FILE": str(tmp_path / f"{name}.rows")},
    )

  def ends(started):
    return [runs.finish(process) for process in started]

  def reaches(step, started):
    def done():
      return runs.logged_lines(workdir) and (steps_and_losses(workdir)[0] or [0])[-1] >= step

    assert runs.wait_for(done, started[0]), ends(started)

  [(code, out, err)] = ends(begin("one", 1))
  assert code == 0, out + err
  assert "for 1 devices: mesh.data: 2 -> 1; mesh.expert: 2 -> 1; num_microbatches: 1 -> 4" in out

  workdir = tmp_path / "run"
  two = begin("run", 2)
  reaches(2, two)
  two[1].send_signal(signal.SIGTERM)
  (code, out, err), (other_code, other_out, _) = ends(two)
  assert (code, other_code) == (0, 0), out + err
  assert "for 2 devices: mesh.data: 2 -> 1; num_microbatches: 1 -> 2" in out
  assert "stopped by SIGTERM; saved at step" in out and "saved at" not in other_out
  four = begin("run", 4)
  reaches(6, four)
  four[0].kill()
  for code, out, err in ends(four)[1:]:
    assert code == 75 and "process 0 is gone (its connection has closed)" in err, out + err
  [(code, out, err)] = ends(begin("run", 1))
  assert code == 0, out + err

  steps, losses = steps_and_losses(workdir)
  expected_steps, expected_losses = steps_and_losses(tmp_path / "one")
  assert steps == expected_steps == list(range(1, 25))
  assert_close(losses, expected_losses, "model_float32")
  expected, found = (
    [json.loads(line) for line in (tmp_path / f"{name}.rows").read_text().splitlines()]
    for name in ("one", "run")
  )
  digests = dict(expected)
  assert {number for number, _ in found} >= set(range(24 * 12))
  assert all(digests[number] == digest for number, digest in found if number < 24 * 12)


@pytest.mark.slow
def test_a_mistake_of_one_process_ends_both(tmp_path):
  rates = tuple((f"--config.optim.learning_rate=1e-{i + 3}",) for i in range(2))
  nowhere = ((), (f"--config.data.train_globs=('{tmp_path}/nowhere',)",))
  for of_each, message in (
    (rates, "the same config; between process 0 and process 1 differ: optim.learning_rate: 0.001"),
    (nowhere, "process 1: every glob of data.train_globs must match a file"),
  ):
    (code, _, err), (other_code, _, other_err) = map(
      runs.finish, runs.start_processes(tmp_path / "run", 2, of_each=of_each)
    )
    assert (code, other_code) == (2, 2), err + other_err
    assert "Traceback" not in err + other_err and message in err
  assert not (tmp_path / "run").exists()


def test_other_source_code_is_found_by_its_folder(tmp_path):
  (tmp_path / "package" / "inner").mkdir(parents=True)
  files = [tmp_path / "package" / name for name in ("a.py", "inner/b.py", "inner/c.py")]
  for file in files:
    file.write_text(f"# {file.name}\n")
  package = types.SimpleNamespace(__path__=[str(tmp_path / "package")])
  before = processes.source_digests(package)
  assert list(before) == ["package", "package/inner"]
  assert processes.source_digests(package) == before
  files[2].write_text("# d\n")
  after = processes.source_digests(package)
  assert after["package"] == before["package"]
  assert after["package/inner"] != before["package/inner"]
  files[2].rename(files[2].with_name("d.py"))
  assert processes.source_digests(package)["package/inner"] != after["package/inner"]


def test_what_a_lost_process_breaks_is_named_only_when_none_is_found_to_be_gone(
  tmp_path, monkeypatch
):
  """A checkpoint that several processes read is not called damaged since one of them is gone."""
  waited = []
  monkeypatch.setattr(processes.time, "sleep", waited.append)
  monkeypatch.setattr(processes.distributed.global_state, "num_processes", 2)
  (tmp_path / "checkpoints" / "3").mkdir(parents=True)
  lost = jax.errors.JaxRuntimeError("UNKNOWN: Gloo AllGather failed: Connection closed by peer")
  for error, waits in ((lost, 1), (ValueError(str(lost)), 1), (ValueError("DATA_LOSS: short"), 0)):
    waited.clear()
    with pytest.raises(ValueError, match=r"checkpoint 3 in .* must be whole"):
      with contents.named_damage(tmp_path, 3):
        raise error
    assert len(waited) == waits and all(secs == processes._NAMED_SECS for secs in waited)
  left = []
  monkeypatch.setattr(processes, "leave", lambda *args: left.append(args))
  for variables, ends in (({}, True), ({processes.RESTARTED: "1"}, False)):
    with monkeypatch.context() as patch:
      patch.setattr(processes.os, "environ", variables)
      processes.leave_if_alone(lost)
    code, text = left.pop()
    assert code == 75 and "lost another process, or its device failed (UNKNOWN: Gloo" in text
    assert text.endswith("from its newest checkpoint") == ends
  processes.leave_if_alone(ValueError("something else"))
  assert not left


@pytest.mark.parametrize(
  "arguments, message",
  [
    (("localhost:1234", 2, None), "go together, got localhost:1234, 2 and None"),
    (("localhost", 2, 0), "must be an address and a port, got 'localhost'"),
    (("localhost:1234", 2, 2), r"--process_id \(2\) must be below --num_processes \(2\)"),
  ],
)
def test_bad_ways_to_join_are_refused(monkeypatch, arguments, message):
  monkeypatch.setattr(runtime.cpu, "keep_memory", lambda: None)
  with pytest.raises(ValueError, match=message):
    runtime.start(*arguments)


def test_a_process_says_whom_it_waited_for(monkeypatch):
  monkeypatch.setattr(runtime.cpu, "keep_memory", lambda: None)
  monkeypatch.setattr(runtime, "_JOIN_SECS", 0.3)
  with socket.socket() as silent:  # it does not listen
    silent.bind(("localhost", 0))
    coordinator = f"localhost:{silent.getsockname()[1]}"
    with pytest.raises(TimeoutError, match=rf"process 1 of 2 waited 0.3 s for .* at {coordinator}"):
      runtime.start(coordinator, 2, 1)
