"""Tests of dsmoe/parallel/watch.py: one process of three as the others see it."""

import json
import queue
import socket
import threading
import time
import types
from concurrent import futures

import jax
import pytest

from dsmoe.parallel import processes, watch

# A watch whose process would have ended ends in `Ended`.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
LIMIT_SECS = 60


class Ended(BaseException):
  """In place of the end of the process that a watch belongs to."""


@pytest.fixture
def left(monkeypatch):
  """A queue of what ended a process: (exit code, message)."""
  ends = queue.Queue()

  def leave(code, message=""):
    ends.put((code, message))
    raise Ended

  monkeypatch.setattr(processes, "leave", leave)
  monkeypatch.setattr(watch, "_BEAT_SECS", 0.01)
  monkeypatch.setattr(watch, "_FAIL_SECS", 0)
  monkeypatch.setattr(watch, "_LAST_SECS", 0)
  return ends


def connected(process, *peers):
  """Starts the watch of a process; returns its connections, each as (its own end, the other end)."""
  pairs = {peer: socket.socketpair() for peer in peers}
  watch.Watch(process, 3, {peer: pair[0] for peer, pair in pairs.items()}).start()
  for _, other in pairs.values():
    other.settimeout(LIMIT_SECS)
  return list(pairs.values())


def watches(process, *peers):
  """Starts the watch of a process; returns the other ends of its connections."""
  return [other for _, other in connected(process, *peers)]


def await_reading(own_end):
  """Waits until the watch has read all that was sent to its end of a connection."""
  end = time.monotonic() + LIMIT_SECS
  while time.monotonic() < end:
    try:
      own_end.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
      return
    time.sleep(0.001)
  raise AssertionError("the watch must read what it is sent")


def messages(connection):
  """Yields what comes over a connection, without the beats."""
  for line in connection.makefile():
    if message := json.loads(line):
      yield message


def test_process_0_names_the_one_that_is_gone_and_tells_the_others(left):
  one, two = watches(0, 1, 2)
  two.close()
  code, message = left.get(timeout=LIMIT_SECS)
  assert code == processes.RESTART_CODE
  assert "process 2 is gone (its connection has closed), and process 0 of 3 ends" in message
  told = next(messages(one))
  assert (told["process"], told["code"]) == (2, code)
  assert "process 2 is gone" in f"process {told['process']} {told['what']}"


def test_the_others_pass_on_what_process_0_tells(left):
  (zero,) = watches(1, 0)
  zero.sendall(b'{}\n{"process": 2, "what": "is ')
  zero.sendall(b'gone (x)", "code": 75}\n')
  code, message = left.get(timeout=LIMIT_SECS)
  assert code == 75 and message.startswith("process 2 is gone (x), and process 1 of 3 ends; start")


def test_the_loss_of_process_0_is_noticed(left):
  (zero,) = watches(2, 0)
  zero.close()
  code, message = left.get(timeout=LIMIT_SECS)
  assert code == processes.RESTART_CODE and message.startswith("process 0 is gone")


@pytest.fixture
def board(monkeypatch):
  """Texts that processes publish, in place of JAX's service."""
  texts, changed = {}, threading.Condition()

  def publish(key, text):
    with changed:
      texts[key] = text
      changed.notify_all()
      if key == "watch/address":  # process 1 is never late, however busy this machine is
        changed.wait_for(lambda: "watch/tried/1" in texts, LIMIT_SECS)

  def await_text(key, limit_secs=LIMIT_SECS):
    with changed:
      if not changed.wait_for(lambda: key in texts, limit_secs):
        raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: x")
      return texts[key]

  monkeypatch.setattr(processes, "publish", publish)
  monkeypatch.setattr(processes, "await_text", await_text)
  monkeypatch.setattr(watch, "_CONNECT_SECS", 0.3)
  monkeypatch.setattr(watch, "_TRIED_SECS", 0.1)
  monkeypatch.setattr(watch.distributed.global_state, "coordinator_address", "localhost:1")
  return texts


def test_a_process_that_dies_between_joining_and_the_watch_is_named(left, board, monkeypatch):
  """Process 2 does nothing any more; one that only cannot connect is no loss."""
  state = watch.distributed.global_state
  monkeypatch.setattr(state, "num_processes", 3)
  with futures.ThreadPoolExecutor() as pool:
    first, one = pool.submit(watch._accept, 3), pool.submit(watch._connect, 1)
    (peers, gone), (own, same) = first.result(), one.result()
  assert gone == same == [2] and set(peers) == {1} and own == {}
  monkeypatch.setattr(watch, "_accept", lambda number: (peers, gone))
  monkeypatch.setattr(watch, "_connect", lambda process: (own, gone))
  for process in (0, 1):
    monkeypatch.setattr(state, "process_id", process)
    with pytest.raises(Ended):
      watch.start()
    code, message = left.get_nowait()
    assert code == 75 and message.startswith("process 2 is gone (nothing came from it for 0 s aft")
    assert f"and process {process} of 3 ends; start all" in message


def test_a_process_that_cannot_connect_is_no_loss(left, board, capsys):
  board["watch/tried/2"] = ""
  with futures.ThreadPoolExecutor() as pool:
    first, one = pool.submit(watch._accept, 3), pool.submit(watch._connect, 1)
    assert first.result() == one.result() == ({}, [])
  assert "0 s for processes [2] to connect to localhost:" in capsys.readouterr().err


def test_process_0_may_die_before_the_watch(left, board, monkeypatch):
  state = watch.distributed.global_state
  for name, value in (("num_processes", 3), ("process_id", 1)):
    monkeypatch.setattr(state, name, value)
  wait = processes.await_text
  monkeypatch.setattr(processes, "await_text", lambda key: wait(key, 0.01))
  with pytest.raises(Ended):
    watch.start()
  code, message = left.get_nowait()
  assert code == 75 and message.startswith("process 0 is gone (its service does not answer: DEAD")


def test_silence_is_a_loss(left, monkeypatch):
  """By a clock that the test moves: process 1 is heard every 25 s, process 2 never."""
  now = 1000.0
  clock = types.SimpleNamespace(monotonic=lambda: now, sleep=time.sleep)
  monkeypatch.setattr(watch, "time", clock)
  (own_end, one), silent = connected(0, 1, 2)
  assert len(silent) == 2
  for _ in range(3):
    assert left.empty()
    one.sendall(b"{}\n")
    await_reading(own_end)
    now += 25
  code, message = left.get(timeout=LIMIT_SECS)
  assert code == processes.RESTART_CODE
  assert message.startswith("process 2 is gone (nothing came from it for 60 s)")


def test_who_has_ended_well_is_not_missed(left, monkeypatch):
  ends = connected(0, 1, 2)
  for own_end, peer in ends:
    peer.sendall(b'{"ended": true}\n')
    await_reading(own_end)
  one, two = (peer for _, peer in ends)
  monkeypatch.setattr(watch, "SILENT_SECS", 0.05)
  two.close()
  with pytest.raises(queue.Empty):
    left.get(timeout=0.5)
  one.sendall(b'{"process": 1, "what": "has failed (y)", "code": 3}\n')  # the watch lives
  assert left.get(timeout=LIMIT_SECS)[0] == 3


@pytest.mark.parametrize(
  "error, code, reason",
  [
    (SystemExit(2), 2, "rates must be the same"),
    (KeyError("rates must be the same"), 1, "rates must be the same"),
  ],
)
def test_who_fails_says_so_with_its_exit_code(left, monkeypatch, capsys, error, code, reason):
  ours, other = socket.socketpair()
  monkeypatch.setattr(watch, "_watch", watch.Watch(1, 3, {0: ours}))
  with pytest.raises(Ended), watch.ending_together():
    error.__context__ = ValueError(reason)
    raise error
  assert left.get_nowait() == (code, "")
  told = next(messages(other))
  assert told["process"] == 1 and told["code"] == code and reason in told["what"]
  assert ("Traceback" in capsys.readouterr().err) == isinstance(error, KeyError)


@pytest.mark.parametrize("error", [None, SystemExit(None), SystemExit(0)])
def test_an_end_that_is_well_is_said(monkeypatch, error):
  ours, other = socket.socketpair()
  monkeypatch.setattr(watch, "_watch", watch.Watch(1, 3, {0: ours}))
  try:
    with watch.ending_together():
      if error:
        raise error
  except SystemExit:
    pass
  assert next(messages(other)) == {"ended": True}
