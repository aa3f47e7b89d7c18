"""The goodput log by files, with a clock that the test moves."""

import json

import pytest

from dsmoe.reporting import final, goodput


class Clock:
  """Seconds since 1970, which pass when the test says so."""

  def __init__(self, time: float):
    self.time = time

  def __call__(self) -> float:
    return self.time

  def pass_secs(self, secs: float) -> None:
    self.time += secs


def begin(workdir, clock, process=0, before=0.0):
  """Returns the log of a process that was started `before` seconds ago."""
  path = goodput.file_of(workdir, process)
  return goodput.Goodput(path, clock.time - before, clock=clock, now=clock)


def make_steps(log, clock, first, last, save_secs=0.0):
  """Ten seconds a step, of which the last second is a stall; a line for each, saved at `last`."""
  for step in range(first, last + 1):
    clock.pass_secs(10)
    log.stalled(clock.time - 4, clock.time, idle_since=clock.time - 1)
    log.beat(step)
    log.write(step)
  if save_secs:
    with log.during("save"):
      clock.pass_secs(save_secs)
    log.write(last)


def test_every_second_is_in_one_phase(tmp_path):
  clock = Clock(1000.0)
  with begin(tmp_path, clock, before=7) as log:
    clock.pass_secs(3)
    log.enter("data")
    clock.pass_secs(20)
    log.enter("compile")
    clock.pass_secs(30)
    log.enter("step")
    log.start(0, num_processes=1)
    make_steps(log, clock, 1, 4, save_secs=2)
    clock.pass_secs(6)  # the batch was there before the device was idle
    log.stalled(clock.time - 5, clock.time - 1, idle_since=clock.time)
    with log.during("evaluate"):
      for _ in log.beats([1, 2]):
        clock.pass_secs(4)
        assert log.phase == "evaluate" and log.step == 4
    log.write(4)
    assert log.fraction == pytest.approx(42 / 116)
    log.enter("save")
    clock.pass_secs(5)
  secs, num_starts = goodput.account(goodput.read(tmp_path / "goodput.jsonl"))
  assert num_starts == 1
  assert {name: value for name, value in secs.items() if value} == pytest.approx(
    dict(start_up=10, data=20, compile=30, step=42, data_stall=4, save=7, evaluate=8)
  )
  assert sum(secs.values()) == pytest.approx(clock.time - (1000 - 7))


def test_a_kill_loses_what_came_after_the_checkpoint_and_the_time_until_the_next_start(tmp_path):
  clock = Clock(5000.0)
  log = begin(tmp_path, clock)
  log.enter("step")
  log.start(0, 1)
  make_steps(log, clock, 1, 3, save_secs=2)  # 32 s that are kept
  make_steps(log, clock, 4, 5)  # 20 s that are made again
  clock.pass_secs(8)  # of the next step, and then the process was killed; nobody knows when
  clock.pass_secs(100)
  path = tmp_path / "goodput.jsonl"
  with path.open("a") as file:
    file.write('{"step": 6, "ti')

  log = begin(tmp_path, clock, before=1)
  with log:
    clock.pass_secs(4)
    log.enter("step")
    log.start(3, 1)
    make_steps(log, clock, 4, 6)
    log.write(6)
    with log.during("start_up"):  # a loss that was not finite: back to the checkpoint
      clock.pass_secs(2)
    log.write(3, resumed_from=3)
    make_steps(log, clock, 4, 7)
  assert [json.loads(line)["step"] for line in path.read_text().splitlines()][:7] == [
    *(0, 1, 2, 3, 3, 4, 5)
  ]
  clock.pass_secs(50)
  with begin(tmp_path, clock) as log:
    log.start(7, 1)
    clock.pass_secs(1)
  secs, num_starts = goodput.account(goodput.read(path))
  assert num_starts == 3
  assert {name: value for name, value in secs.items() if value} == pytest.approx(
    dict(step=63, data_stall=7, save=2, start_up=6, made_again=52, down=107, stopped=50)
  )
  assert sum(secs.values()) == pytest.approx(clock.time - 5000)
  assert goodput.rows(tmp_path)[:2] == [
    ("wall time, starts", "0:04:47, 3"),
    ("  stepping", "0:01:03, 22.0%"),
  ]


def test_flops_are_those_of_the_steps_that_were_made(tmp_path):
  """Two starts with other batch sizes, the first killed after a save, and a return to step 5."""
  clock = Clock(0.0)
  log = begin(tmp_path, clock)
  log.start(0, 1, step_flops=3.0)
  log.write(4)
  log.write(7)  # it had saved at step 6
  path = tmp_path / "goodput.jsonl"
  assert goodput.flops(goodput.read(path)) == (21, 0)
  with begin(tmp_path, clock) as log:
    log.start(6, 1, step_flops=5.0)
    log.write(10)
    log.write(5, resumed_from=5)
    log.write(8)
    log.write(8)
  kept, again = 5 * 3 + 3 * 5, (1 * 3) + (1 * 3 + 4 * 5)
  assert goodput.flops(goodput.read(path)) == (kept, again)
  lines = goodput.read(path)
  del lines[0]["step_flops"]  # as an older version wrote it
  assert goodput.flops(lines) == (8 * 5, 6 * 5)
  assert goodput.flops([]) == (0, 0)
  path.write_text('{"step": 0, "time": 1, "secs": {}, "step_flops": "many"}\n{}\n')
  with pytest.raises(ValueError, match=r"line 1 .*step_flops 'many' is no number of FLOPs"):
    goodput.read(path)


def test_the_slowest_process_is_the_one_that_did_not_step(tmp_path):
  for process, stalls in enumerate(([9], [1, 0, 2], [1, 5, 6])):
    clock = Clock(100.0)
    log = begin(tmp_path, clock, process)
    log.enter("step")
    log.start(0, 3)
    if process == 0:  # another start was killed after one step
      clock.pass_secs(20)
      log.stalled(clock.time - 9, clock.time, 0)
      log.write(1)
      log, stalls = begin(tmp_path, clock, process), [2, 1, 2]
      log.enter("step")
      log.start(0, 3)
    for step, secs in enumerate(stalls, 1):
      clock.pass_secs(20)
      log.stalled(clock.time - secs, clock.time, idle_since=0.0)
      log.write(step)
  logs = [goodput.read(goodput.file_of(tmp_path, process)) for process in range(3)]
  assert goodput.slowest(logs) == [(1, 0, 1.0), (2, 2, 5.0), (3, 2, 4.0)]
  assert goodput.rows(tmp_path)[-1] == (
    "slowest process, last start",
    "2, at 2 of 3 log points, 9.0 s behind",
  )


def test_a_damaged_line_is_named_and_no_log_has_no_rows(tmp_path):
  assert goodput.rows(tmp_path) == []
  path = tmp_path / "goodput.jsonl"
  path.write_text('{"step": 1}\n{"step": 2, "time": 1.0, "secs": {}}\n')
  with pytest.raises(ValueError, match=r"line 1 must have a step, a time and secs by phase"):
    goodput.rows(tmp_path)


@pytest.mark.parametrize(
  "damage",
  [b"\xff\xfe", b'{"step": 1, "time": 1.0, "secs": {"asleep": 1.0}}', b"[" * 100_000]
  + [b'{"step": "1", "time": 1.0, "secs": {}}', b'{"step": 1, "time": 1.0, "secs": {"step": NaN}}']
  + [b'{"step": 1, "time": 1.0, "secs": {}, "began": "x", "resumed_from": 0}']
  + [b'{"step": 1, "time": 1.0, "secs": {}, "resumed_from": 0.5}', b'{"secs": {"step": 1e400}}'],
)
def test_damage_of_any_kind_is_named_and_does_not_end_a_run_that_has_trained(tmp_path, damage):
  path = tmp_path / "goodput.jsonl"
  whole = b'{"step": 2, "time": 3.0, "secs": {"step": 3.0}}\n'
  path.write_bytes(whole + damage + b"\n" + whole)
  with pytest.raises(ValueError, match=r"goodput.jsonl, line 2 must have a step, a time and secs"):
    goodput.rows(tmp_path)
  (tmp_path / "metrics.jsonl").write_text('{"step": 2, "loss": 1.5}\n')
  found = final.figures(tmp_path)
  assert ("train loss", "1.5000") in found
  name, said = found[-1]
  assert name == "wall time" and said.startswith(f"{path}, line 2 must have")
  path.write_bytes(whole + damage)  # cut short by a kill
  assert goodput.rows(tmp_path)[0] == ("wall time, starts", "0:00:03, 0")
