"""Parts that fail, that hang and that take their time: what they measured is kept, the rest runs."""

import json
import os
import threading
import time

import pytest

from dsmoe.on_device import parts, training
from dsmoe.on_device.parts import Part
from dsmoe.on_device.processes import Failed, Runner
from dsmoe.on_device.record import STAMP, Record
from dsmoe.on_device.session import Session

STAMPED = dict.fromkeys(STAMP, "x")


def of_python(
  code: str, row: dict | None = None, limit_secs: float = 60, name: str = "one"
) -> Part:
  """A part that adds a row and runs a program."""

  def measure(runner, rows, is_dry_run):
    assert is_dry_run
    rows += [row] if row else []
    runner.run("-c", code)

  return Part(name, limit_secs, measure, {"NOT_IN_A_DRY_RUN": "1"})


def run(tmp_path, *stages, wanted=None) -> tuple[bool, list[dict], str]:
  """Runs stages; returns whether all ended well, the rows of the file, and the log."""
  path, log = tmp_path / "results.json", tmp_path / "log.txt"
  session = Session(tmp_path, Record(path, STAMPED), log, is_dry_run=True)
  names = [part.name for stage in stages for lane in stage for part in lane]
  is_well = session.run(stages, names if wanted is None else wanted)
  return is_well, json.loads(path.read_text()), log.read_text()


def is_alive(pid: int) -> bool:
  """Whether a process runs; one that ended may wait for a parent that has not asked for its code."""
  try:
    with open(f"/proc/{pid}/stat") as file:
      return file.read().rpartition(")")[2].split()[0] != "Z"
  except (FileNotFoundError, ProcessLookupError):
    return False


def test_a_part_that_fails_keeps_its_rows_and_the_next_one_runs(tmp_path, capfd):
  seen = []

  def after(runner, rows, is_dry_run):
    seen.append(json.loads((tmp_path / "results.json").read_text()))
    rows.append({"figure": 2})

  def defect(runner, rows, is_dry_run):
    raise KeyError("gone")

  first = of_python("import sys; print('why it', 'failed'); sys.exit(3)", {"figure": 1}, name="a")
  lane = (first, Part("b", 60, defect), Part("c", 60, after))
  is_well, rows, log = run(tmp_path, (lane,))
  assert not is_well
  ends = {row["part"]: row["ended"] for row in rows if "ended" in row}
  assert ends.pop("a").endswith("ended with 3: why it failed")
  assert ends == {"b": "KeyError: 'gone'", "c": "well"}
  assert [row["figure"] for row in rows if "figure" in row] == [1, 2]
  assert all(row[name] == "x" for row in rows for name in STAMP)
  assert [row["part"] for row in seen[0]] == ["a", "a", "b"]  # the file is written after each part
  assert "=== a: " in log and "why it failed" in log
  shown = capfd.readouterr().err
  assert "a: begins, at most 60 s" in shown and "c: 1 rows" in shown


def test_a_part_that_hangs_is_killed_with_what_it_started(tmp_path):
  code = (
    "import subprocess, sys, time; "
    "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); "
    "print(child.pid, flush=True); time.sleep(600)"
  )

  def hang(runner, rows, is_dry_run):
    rows.append({"figure": 1})
    process = runner.start("-c", code)
    runner.wait_for(process, lambda: runner.text(process).endswith("\n"), "its child")
    runner._limit_secs = 1.0  # of which the start of two processes has taken some
    runner.finish(process)

  is_well, rows, log = run(tmp_path, ((Part("one", 600, hang),),))
  assert not is_well and rows[0]["figure"] == 1
  assert "took longer than the 1 s left until its end" in rows[1]["ended"]
  child = int(log.splitlines()[1])
  end = time.monotonic() + 60
  while is_alive(child):
    assert time.monotonic() < end
    time.sleep(0.01)


def test_time_left_over_goes_to_the_next_part(tmp_path):
  """The second part's own time is less than it needs."""
  lane = (
    of_python("", limit_secs=60, name="a"),
    of_python("import time; time.sleep(0.5)", limit_secs=0.1, name="b"),
  )
  is_well, *_ = run(tmp_path, (lane,))
  assert is_well
  is_well, *_ = run(tmp_path, (lane[:1],), (lane[1:],))  # in the next stage too
  assert is_well


def test_lanes_run_beside_each_other_and_stages_after_one_another(tmp_path):
  """Both parts of the first stage wait for the other; only those that are wanted run."""
  together, order = threading.Barrier(2, timeout=60), []

  def meet(name):
    def measure(runner, rows, is_dry_run):
      together.wait()
      order.append(name)

    return Part(name, 60, measure)

  last = Part("last", 60, lambda *_: order.append("last"))
  unwanted = Part("unwanted", 60, lambda *_: order.append("unwanted"))
  stages = (((meet("a"),), (meet("b"), unwanted)), ((last,),))
  is_well, *_ = run(tmp_path, *stages, wanted=("a", "b", "last"))
  assert is_well and order[2:] == ["last"] and set(order[:2]) == {"a", "b"}


def test_a_session_that_is_stopped_kills_its_parts_and_starts_no_more(tmp_path):
  pids, started = [], threading.Event()

  def hang(runner, rows, is_dry_run):
    process = runner.start("-c", "import time; time.sleep(600)")
    pids.append(process.popen.pid)
    started.set()
    runner.finish(process)

  def stop(runner, rows, is_dry_run):
    started.wait(60)
    raise KeyboardInterrupt

  order = []
  after = Part("after", 600, lambda *_: order.append("after"))
  with pytest.raises(KeyboardInterrupt):
    run(tmp_path, ((Part("stop", 600, stop),), (Part("hang", 600, hang), after)))
  assert not is_alive(pids[0]) and not order


def test_all_parts_fit_into_eight_minutes():
  assert parts.longest_secs() <= 480
  assert len(set(parts.NAMES)) == len(parts.NAMES)


def test_what_is_waited_for_may_not_come(tmp_path):
  with Runner(tmp_path, "part", 60, {"VALUE": "of the part"}) as runner:
    process = runner.start("-c", "import os; print(os.environ['VALUE'])")
    with pytest.raises(Failed, match="ended before the end of days: of the part"):
      runner.wait_for(process, lambda: False, "the end of days")
  with Runner(tmp_path, "late", 0.2, {}) as runner:
    process = runner.start("-c", "import time; time.sleep(600)")
    with pytest.raises(Failed, match="longer than the 0 s left until then: it wrote nothing"):
      runner.wait_for(process, lambda: False, "then")
  assert not is_alive(process.popen.pid) and os.path.exists(process.output)


def test_losses_of_steps_that_were_made_twice_are_compared():
  before = {1: {"cross_entropy": 4.0}, 2: {"cross_entropy": 3.5}, 3: {"cross_entropy": 3.25}}
  after = {1: {"cross_entropy": 4.0}, 2: {"cross_entropy": 3.0}}
  after |= {4: {"cross_entropy": 2.0, "tokens_per_sec": 7.0, "validation_loss": 2.5}}
  assert training.figures(before, after) == {
    **{"steps": 3, "killed_at_step": 3, "largest_difference": 0.5, "first_loss": 4.0},
    **{"last_loss": 2.0, "validation_loss": 2.5, "tokens_per_sec": 7.0},
  }
