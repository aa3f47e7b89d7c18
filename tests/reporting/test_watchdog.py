"""The watchdog, with a clock that the test moves and an end that it notes."""

import threading
import time

import pytest

from dsmoe.reporting import goodput, watchdog


@pytest.fixture
def times():
  return {"now": 100.0}


def log_of(tmp_path, times):
  clock = lambda: times["now"]  # noqa: E731
  return goodput.Goodput(tmp_path / "goodput.jsonl", clock=clock, now=clock)


def wait_in_here(event):
  event.wait()


def test_a_silent_phase_ends_the_process_with_the_stacks_in_a_new_file(tmp_path, times, capfd):
  (tmp_path / "hang.0.txt").write_text("an older one")
  log, codes, left = log_of(tmp_path, times), [], threading.Event()
  stuck = threading.Event()
  thread = threading.Thread(target=wait_in_here, args=(stuck,))
  thread.start()

  def leave(code):
    codes.append(code)
    left.set()

  with watchdog.watching(log, tmp_path, 0.02, leave):
    for phase in ("start_up", "data", "compile"):
      log.enter(phase)
      times["now"] += 5  # far beyond the limit, and not watched
      assert not left.wait(0.03), phase
    log.enter("step")
    log.beat(7)
    times["now"] += 1234
    assert left.wait(60)
  stuck.set()
  thread.join()
  assert codes == [75]
  assert (tmp_path / "hang.0.txt").read_text() == "an older one"
  text = (tmp_path / "hang.0.1.txt").read_text()
  assert "stepping after step 7, for 1,234 s" in text and "in wait_in_here" in text
  assert "in wait_in_here" in capfd.readouterr().err


class Turning:
  """In place of a log: a phase that was not watched ends while the watchdog looks."""

  step, phase, looks = 3, "compile", 0

  def clock(self):
    return 1000.0

  @property
  def beat_time(self):
    self.looks += 1
    self.phase = "step"
    return 1.0 if self.looks == 1 else 1000.0


def test_a_long_phase_that_is_not_watched_is_no_silence_of_the_next(tmp_path):
  log, codes = Turning(), []
  with watchdog.watching(log, tmp_path, 0.02, codes.append):
    end = time.monotonic() + 60
    while log.looks < 3 and not codes and time.monotonic() < end:
      time.sleep(0.001)
  assert log.looks >= 3 and not codes


def test_completed_phases_and_steps_keep_it_quiet(tmp_path, times):
  log = log_of(tmp_path, times)
  with watchdog.watching(log, tmp_path, 3.0, leave=pytest.fail):
    log.enter("evaluate")
    for _ in log.beats(range(4)):
      times["now"] += 2
      assert log.clock() - log.beat_time == 2
    log.enter("save")
    assert log.clock() == log.beat_time
  with watchdog.watching(log, tmp_path, 0.0, leave=pytest.fail):
    assert not [thread for thread in threading.enumerate() if thread.name == "watchdog"]
  assert list(tmp_path.iterdir()) == []
