"""Tests of dsmoe/checkpoint/lock.py: one owner of a workdir, on disk and in an object store."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from dsmoe.checkpoint import lock

HOLD = """
import sys, time
from dsmoe.checkpoint import lock
with lock.owned(sys.argv[1]):
  print("owned", flush=True)
  time.sleep(600)
"""


def test_one_owner_and_the_next_after_its_end(tmp_path):
  workdir = tmp_path / "new" / "run"
  with lock.owned(workdir) as check:
    check()
    refusal = f"{workdir} must have one run .* in use by process {os.getpid()} on .* since 20.* UTC"
    with pytest.raises(ValueError, match=refusal), lock.owned(workdir):
      pass
    check()
    with lock.owned(tmp_path / "other"):
      pass
  with pytest.raises(RuntimeError), lock.owned(workdir):
    raise RuntimeError
  with lock.owned(workdir):
    pass


def test_an_owner_whose_lock_was_deleted_learns_of_the_next(tmp_path):
  with lock.owned(tmp_path) as check:
    check()
    (tmp_path / lock.LOCK_FILE).unlink()
    check()
    with lock.owned(tmp_path) as check_next:
      check_next()
      with pytest.raises(ValueError, match=rf"is in use by process {os.getpid()} on "):
        check()


def test_a_lock_that_names_nobody_is_still_one(tmp_path):
  with lock.owned(tmp_path):
    (tmp_path / lock.LOCK_FILE).write_bytes(b"\xff\xfe\0")
    with pytest.raises(ValueError, match="must have one run at a time, and is in use by"):
      with lock.owned(tmp_path):
        pass


def test_a_killed_owner_leaves_the_workdir_free(tmp_path):
  command = [sys.executable, "-c", HOLD, str(tmp_path)]
  with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
    assert process.stdout.readline() == "owned\n"
    with pytest.raises(ValueError, match=f"in use by process {process.pid}"):
      with lock.owned(tmp_path):
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    with lock.owned(tmp_path):
      pass


@pytest.fixture
def quick(monkeypatch):
  """Leases that go stale soon, yet not while a busy machine keeps their owner waiting."""
  for name, seconds in (("_RENEWAL_SECS", 0.05), ("_STALE_SECS", 1.5), ("_SETTLE_SECS", 0.1)):
    monkeypatch.setattr(lock, name, seconds)


def test_a_lease_is_refused_while_it_is_renewed(tmp_path, quick):
  with lock._lease(tmp_path) as check:
    with pytest.raises(ValueError, match=f"in use by process {os.getpid()} on"):
      with lock._lease(tmp_path):
        pass
    check()
  assert list(tmp_path.iterdir()) == []
  with lock._lease(tmp_path):
    pass


def test_a_lease_of_a_killed_owner_goes_stale(tmp_path, quick, capsys):
  (tmp_path / "lock").write_text('{"owner": "process 7 on h", "token": "t", "renewed": 5}')
  start = time.monotonic()
  with lock._lease(tmp_path):
    assert time.monotonic() - start >= 1.5
  assert "names process 7 on h: waiting for" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", "{", "[]", '{"token": 3}'])
def test_a_damaged_lease_goes_stale_too(tmp_path, quick, text):
  (tmp_path / "lock").write_text(text)
  with lock._lease(tmp_path) as check:
    check()


@pytest.fixture
def patient(quick, monkeypatch):
  """Quick leases whose owners look seldom, and in time all the same on a busy machine."""
  monkeypatch.setattr(lock, "_RENEWAL_SECS", 0.5)
  monkeypatch.setattr(lock, "_STALE_SECS", 3.0)


def test_of_several_that_start_at_once_one_owns(tmp_path, patient):
  outcomes = []

  def start():
    try:
      with lock._lease(tmp_path) as check:
        time.sleep(6)
        check()
        outcomes.append("owner")
    except ValueError:
      outcomes.append("refused")

  threads = [threading.Thread(target=start) for _ in range(4)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert sorted(outcomes) == ["owner", "refused", "refused", "refused"]


def test_a_write_that_comes_late_owns_only_after_the_owner_has_seen_it(tmp_path, patient):
  looked, owned = threading.Event(), threading.Event()

  class LatePath(type(tmp_path)):
    """The writes of a process that stands still after it found no owner."""

    def write_text(self, *args, **kwargs):
      looked.set()
      owned.wait()
      return super().write_text(*args, **kwargs)

  outcomes = []

  def start_late():
    with lock._lease(LatePath(tmp_path)) as check_late:
      with pytest.raises(ValueError, match="in use by process"):
        check()
      check_late()
      outcomes.append("owner")

  thread = threading.Thread(target=start_late, daemon=True)
  thread.start()
  looked.wait()
  with lock._lease(tmp_path) as check:
    check()
    owned.set()
    thread.join()
  assert outcomes == ["owner"]


def test_an_owner_that_stood_still_learns_that_it_is_none(tmp_path, quick):
  with lock._lease(tmp_path) as check:
    (tmp_path / "lock").write_text('{"owner": "process 7 on h", "token": "t"}')
    end = time.monotonic() + 60
    with pytest.raises(ValueError, match="in use by process 7 on h"):
      while time.monotonic() < end:
        check()
        time.sleep(0.05)
  assert (tmp_path / "lock").exists()  # the other's
