"""Leases: one process has each, and whose holder is gone is free."""

import os
import signal
import subprocess
import sys
import time

import pytest

from dsmoe.sweeps import lease

QUICK = {"renewal_secs": 0.02, "stale_secs": 4.0, "settle_secs": 0.05}


def until(condition) -> None:
  """Waits for a condition that must come true."""
  for _ in range(3000):
    if condition():
      return
    time.sleep(0.01)
  raise AssertionError("it did not come true in 30 s")


def test_one_process_has_a_lease(tmp_path):
  one, other = lease.Leases(tmp_path), lease.Leases(tmp_path)
  with one, other:
    assert one.take("0007") and not one.take("0007") and not other.take("0007")
    assert other.take("0008") and not one.is_lost("0007") and one.is_lost("0008")
    one.release("0007")
    assert one.is_lost("0007") and other.take("0007") and not other.is_lost("0007")
  with lease.Leases(tmp_path) as third:
    assert third.take("0007") and third.take("0008")


def test_who_made_a_leases_file_does_not_damage_who_took_it(tmp_path, monkeypatch):
  """Another process takes the lease between the file's making and its lock."""
  one, other = lease.Leases(tmp_path), lease.Leases(tmp_path)
  make = os.open

  def late(path, *args):
    file = make(path, *args)
    if "0005" not in other._held:
      monkeypatch.setattr(lease.os, "open", make)
      assert other.take("0005")
    return file

  with one, other:
    monkeypatch.setattr(lease.os, "open", late)
    assert not one.take("0005")
    assert other._is_mine("0005", other._held["0005"])


def test_the_lease_of_a_killed_process_is_free_at_once(tmp_path):
  program = (
    "import sys, time; from dsmoe.sweeps import lease; held = lease.Leases(sys.argv[1]); "
    "held.__enter__(); print(held.take('0001'), flush=True); time.sleep(600)"
  )
  arguments = [sys.executable, "-c", program, str(tmp_path)]
  process = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)
  assert process.stdout.readline() == "True\n"
  with lease.Leases(tmp_path) as mine:
    assert not mine.take("0001") and lease.is_held(tmp_path, "0001")
    os.kill(process.pid, signal.SIGSTOP)  # one that stands still keeps it
    assert not mine.take("0001") and lease.is_held(tmp_path, "0001")
    process.kill()
    process.wait()
    assert not lease.is_held(tmp_path, "0001")
    assert mine.take("0001") and lease.is_held(tmp_path, "0001")
  assert not lease.is_held(tmp_path, "0001") and not lease.is_held(tmp_path, "0002")


@pytest.mark.parametrize("has_locks", [True, False])
def test_another_machines_lease_is_held_while_its_file_is_young(tmp_path, monkeypatch, has_locks):
  """Its lock does not show here."""
  if not has_locks:

    def refuse(*_):
      raise OSError("no locks")

    monkeypatch.setattr(lease.fcntl, "flock", refuse)
  path = tmp_path / lease.FOLDER / "0003"
  path.parent.mkdir()
  path.write_text('{"machine": "other", "token": "a"}')
  assert lease.is_held(tmp_path, "0003", "mine")
  assert lease.is_held(tmp_path, "0003", "other") == (not has_locks)
  old = time.time() - 61
  os.utime(path, (old, old))
  assert not lease.is_held(tmp_path, "0003", "mine")
  os.utime(path)
  path.write_text("free ")
  assert not lease.is_held(tmp_path, "0003", "mine")


@pytest.fixture(params=["a disk without locks", "an object store"])
def machine(request, monkeypatch):
  """Returns what makes the leases of a machine where the kernel's locks do not help."""

  def refuse(*_):
    raise OSError("no locks")

  monkeypatch.setattr(lease.fcntl, "flock", refuse)

  def made(workdir, name: str) -> lease.Leases:
    leases = lease.Leases(workdir, name, **QUICK)
    leases._is_on_disk = request.param != "an object store"
    return leases

  return made


@pytest.mark.slow
def test_another_machines_lease_is_free_when_it_is_no_longer_renewed(tmp_path, machine):
  one = machine(tmp_path, "one")
  other = machine(tmp_path, "other")
  with other:
    with one:
      assert one.take("0003")
      began = time.monotonic()
      while time.monotonic() - began < 1.5 * QUICK["stale_secs"]:
        assert not other.take("0003")
        time.sleep(0.01)
      assert not one.is_lost("0003")
      one._ended.set()  # as if its machine were gone: nothing is renewed or released
      one._renewal.join()
      until(lambda: other.take("0003"))
      assert not other.is_lost("0003")
      # The first comes back: it finds out, and does not take the other's lease away.
      one._ended.clear()
      one._ended.wait = lambda secs: one._ended.is_set() or time.sleep(secs)
      one._renewal = type(other._renewal)(target=one._renew)
      one._renewal.start()
      until(lambda: one.is_lost("0003"))
    assert not other.is_lost("0003")
  with machine(tmp_path, "third") as third:
    assert third.take("0003")  # it was released, so nobody waits


def test_a_lease_that_cannot_be_renewed_is_lost(tmp_path, monkeypatch):
  def fail(*_):
    raise OSError("the disk is gone")

  with lease.Leases(tmp_path, **QUICK) as mine:
    assert mine.take("0004")
    monkeypatch.setattr(mine, "_put", fail)
    until(lambda: mine.is_lost("0004"))
