"""Runs followed while their files grow, are cut and begin anew."""

import json
import os
import signal
import time

import pytest
import rich.console

from dsmoe.reporting import watch
from tests import runs


def write_config(workdir, num_steps: int, log_every_steps: int = 2) -> None:
  config = {"num_steps": num_steps, "log": {"log_every_steps": log_every_steps}}
  (workdir / "config.json").write_text(json.dumps(config))


def line(step: int, **values) -> str:
  return json.dumps({"step": step, **values}) + "\n"


def append(path, text: str) -> None:
  with path.open("a") as file:
    file.write(text)


def test_a_run_from_its_start_to_its_end(tmp_path):
  workdir = tmp_path / "run"
  run, metrics = watch.Run(workdir), workdir / "metrics.jsonl"
  now = time.time()
  assert run.poll(now).state == "not there yet"
  workdir.mkdir()
  assert run.poll(now) == watch.Status(str(workdir), "starting")
  metrics.write_text("")
  assert run.poll(now).state == "starting" and run.poll(now).num_steps is None
  append(metrics, line(2, loss=5.5, step_secs=0.5, tokens_per_sec=1e3, mfu=None, dropped_rows=3))
  status = run.poll(now)
  assert (status.state, status.step, status.num_steps) == ("running", 2, None)
  assert status.secs_left is None and status.mfu is None
  write_config(workdir, 10)
  append(metrics, line(3, dropped_rows=4) + line(4, loss=4.5, step_secs=0.25, mfu=0.4))
  append(metrics, line(4, validation_loss=6.5) + '{"step": 6, "lo')  # the last one is not whole yet
  status = run.poll(now)
  assert (status.step, status.num_steps, status.loss, status.validation_loss) == (4, 10, 4.5, 6.5)
  assert (status.tokens_per_sec, status.mfu, status.dropped_rows) == (1e3, 0.4, 7)
  assert status.secs_left == 6 * 0.25 and status.age_secs <= 2
  append(metrics, 'ss": 3.5}\n')
  status = run.poll(now)
  assert (status.step, status.loss, status.damaged_lines) == (6, 3.5, 0)
  append(metrics, line(8) + "not JSON\n" + line(10, loss=3.0))
  status = run.poll(now)
  assert (status.state, status.step, status.damaged_lines) == ("finished", 10, 1)
  assert status.secs_left == 0


def test_a_resumed_run_begins_its_files_anew(tmp_path):
  metrics, run = tmp_path / "metrics.jsonl", watch.Run(tmp_path)
  write_config(tmp_path, 9)
  kept = line(1, dropped_rows=5, step_secs=1.0) + line(2, dropped_rows=6)
  metrics.write_text(kept + line(3, dropped_rows=70) + line(4, loss=2.0))
  assert run.poll(0.0).dropped_rows == 81 and run.poll(0.0).dropped_rows == 81
  metrics.write_text(kept)  # cut to the checkpoint
  status = run.poll(0.0)
  assert (status.step, status.dropped_rows, status.loss) == (2, 11, None)
  # Cut, and longer than before when it is looked at next.
  metrics.write_text(
    line(1, dropped_rows=5) + line(2, dropped_rows=1, loss=3.0) + line(3) + line(5)
  )
  status = run.poll(0.0)
  assert (status.step, status.dropped_rows, status.loss) == (5, 6, 3.0)
  metrics.unlink()
  assert run.poll(0.0).step is None


def test_only_what_is_new_is_read(tmp_path):
  path = tmp_path / "metrics.jsonl"
  tail, sizes = watch.Tail(path), []
  read = tail._from
  tail._from = lambda offset: sizes.append(len(found := read(offset))) or found
  for step in range(50):
    append(path, line(step, loss=1.5))
    assert [json.loads(text)["step"] for text in tail.read()[0]] == [step]
  assert max(sizes) < 300 < path.stat().st_size


def test_silent_and_stopped_runs(tmp_path):
  metrics, goodput, run = (
    tmp_path / "metrics.jsonl",
    tmp_path / "goodput.jsonl",
    watch.Run(tmp_path),
  )
  write_config(tmp_path, 100, log_every_steps=4)
  metrics.write_text(line(4, loss=1.0, step_secs=10.0))
  written = metrics.stat().st_mtime
  # A line comes every 40 s.
  assert run.poll(written + 175).state == "running" and run.poll(written).secs_left == 960
  assert run.poll(written + 185).state == "silent"
  append(goodput, line(4, secs={"step": 9.0}))
  assert run.poll(written).state == "running"
  append(goodput, line(5, secs={}, ended=True))
  stopped = run.poll(written + 500)
  assert stopped.state == "stopped" and stopped.secs_left is None
  append(goodput, line(4, secs={}, began=1.0))
  assert run.poll(written).state == "running"


def test_the_table(tmp_path):
  statuses = [
    watch.Status("runs/b", "running", 250, 1000, 2.5, 3.25, 1234.5, 0.375, 17, 4000.0, 3.0),
    watch.Status("runs/a", "silent", 7, None, age_secs=99.9, damaged_lines=2),
    watch.Status("runs/c", "not there yet"),
  ]
  console = rich.console.Console(width=160)
  with console.capture() as captured:
    console.print(watch.table(statuses, 160))
  first, second, third = [row for row in captured.get().splitlines() if "runs/" in row]
  for text in (
    "runs/b",
    "250/1,000",
    "2.5000",
    "3.2500",
    "1,234",
    "37.5%",
    "17",
    "1:06:40",
    "running, 3 s ago",
  ):
    assert text in first
  assert "runs/a" in second and "silent for 99 s; 2 damaged lines" in second and "7/?" in second
  assert third.split() == ["runs/c", "not", "there", "yet"]


@pytest.mark.parametrize("width", [160, 100, 99, 90, 80, 70, 60])
def test_a_narrow_terminal_cuts_no_number(width):
  """First the bar becomes shorter and goes, then columns do, and states take several lines."""
  statuses = [
    watch.Status(
      "runs/" + "tiny" * 3, "running", 250, 1000, 2.5, 3.25, 12345.0, 0.375, 0, 4e3, 3.0
    ),
    watch.Status("runs/b", "finished", 1000, 1000, 1.5, 2.25, 9876.0, 0.125, 0, 0.0, 99.0),
  ]
  console = rich.console.Console(width=width)
  with console.capture() as captured:
    console.print(watch.table(statuses, width))
  text = captured.get()
  assert "…" not in text and all(len(row) <= width for row in text.splitlines())
  for number in ("250/1,000", "2.5000", "1:06:40", "1,000/1,000", "1.5000"):
    assert number in text
  assert (text.count("━") > 0) == (width >= 100)
  assert ("37.5%" in text) == (width >= 90) and ("12,345" in text) == (width >= 80)
  assert ("3.2500" in text) == (width > 60)


def test_the_script(tmp_path):
  workdirs = [tmp_path / name for name in ("b", "a")]
  for workdir, step in zip(workdirs, (4, 8)):
    workdir.mkdir()
    write_config(workdir, 8)
    (workdir / "metrics.jsonl").write_text(line(step, loss=1.25))
  file = tmp_path / "runs.json"
  out = runs.run("scripts/watch.py", "--once", *workdirs, f"{workdirs[0]}/", f"--json={file}")
  assert out.index("4/8") < out.index("8/8") and out.count("1.2500") == 2 and "finished" in out
  found = json.loads(file.read_text())
  assert [row["state"] for row in found] == ["running", "finished"]
  assert [row["workdir"] for row in found] == list(map(str, workdirs))
  assert "8/8" in runs.run("scripts/watch.py", workdirs[1])  # ends with the run
  for args, message in (
    ((), "error: give one workdir or several"),
    (
      ("--once", workdirs[0], "/nowhere"),
      "error: a workdir must be a folder, there is no /nowhere",
    ),
  ):
    code, out, err = runs.call("scripts/watch.py", *args)
    assert (code, out) == (2, "") and err.startswith(message) and err.count("\n") == 1


@pytest.mark.slow
def test_following_until_the_run_ends_or_ctrl_c(tmp_path):
  workdir, later = tmp_path / "run", tmp_path / "later"
  workdir.mkdir()
  write_config(workdir, 4)
  process = runs.start("scripts/watch.py", workdir, later, "--every=0.1")
  try:
    assert "not there yet" in "".join(process.stdout.readline() for _ in range(6))
    later.mkdir()
    for path in (workdir, later):
      write_config(path, 4)
      (path / "metrics.jsonl").write_text(line(2, loss=3.5))
      append(path / "metrics.jsonl", line(4, loss=2.5))
    code, out, err = runs.finish(process)
    assert (code, err) == (0, "") and out.rstrip().count("finished") >= 2
  finally:
    process.kill()
  process = runs.start("scripts/watch.py", tmp_path / "..", "--every=0.1")
  process.stdout.readline()
  os.kill(process.pid, signal.SIGINT)
  assert runs.finish(process)[0] == 0


def test_names_and_numbers_of_any_kind(tmp_path):
  """A workdir's name is no markup, and what no run writes ends nothing."""
  console, runs_shown = rich.console.Console(width=400), []
  rows = ['"step_secs": NaN', '"step_secs": Infinity', '"step_secs": 1e300, "dropped_rows": [3]']
  rows += ['"loss": ' + "9" * 400, '"step_secs": 1e17']
  names = ["a[bold]b", "a[/b]c", ":smile:", "a b'\"", "5"]
  configs = ["[1]", "[" * 100_000, '{"num_steps": 1e999, "log": {"log_every_steps": 1}}']
  for name, row, config in zip(names, rows, [*configs, "\0", None], strict=True):
    workdir = tmp_path / name
    workdir.mkdir(parents=True)
    if config is None:
      write_config(workdir, 10**9)
    else:
      (workdir / "config.json").write_text(config)
    (workdir / "metrics.jsonl").write_text(f'{{"step": 2, {row}}}\n')
    (workdir / "goodput.jsonl").write_text("[" * 100_000 + "\n")
    runs_shown.append(watch.Run(workdir))
  statuses = [run.poll(time.time()) for run in runs_shown]
  with console.capture() as captured:
    console.print(watch.table(statuses, 400))
  for name in names:
    assert str(tmp_path / name) in captured.get()
  assert [status.step for status in statuses] == [2] * 5
