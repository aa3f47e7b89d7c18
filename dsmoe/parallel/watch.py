"""Every process of a run learns that another is gone or has failed, says which, and ends too.

JAX alone leaves them in a collective that cannot end, until its service has missed a process for
minutes and aborts the rest without naming it. Here each process keeps a connection to process 0.
The operating system closes the connections of a process that is killed; where a host or the network
stands still, nothing comes for `SILENT_SECS`. Process 0 tells the others. A process that fails says
so before it ends, and one that ends well says that.

Over a connection go lines of JSON: {} every `_BEAT_SECS`; {"ended": true}, an end that is none of
the others' concern; {"process": which, "what": "is gone (...)", "code": exit code} ends all.
"""

import contextlib
import ctypes
import json
import secrets
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
from jax._src import distributed

from dsmoe.parallel import processes

SILENT_SECS = 60.0  # after which a process that sends nothing is taken for dead
SERVICE_SECS = 120  # after which JAX's own service does
_BEAT_SECS = 2.0
_CONNECT_SECS = 30.0
_TRIED_SECS = 10.0  # after these, in which a process that cannot connect says that it has tried
_FAIL_SECS = 3.0  # in which a process may end by itself, when another has failed
_LAST_SECS = 1.0  # that process 0 ends after the others
_watch: "Watch | None" = None


def start() -> None:
  """Starts the watch; every process calls it once it has joined JAX's service."""
  global _watch
  state = distributed.global_state
  if state.num_processes == 1:
    return
  is_first, who = state.process_id == 0, f"process {state.process_id} of {state.num_processes}"
  try:
    peers, gone = _accept(state.num_processes) if is_first else _connect(state.process_id)
  except jax.errors.JaxRuntimeError as error:
    reason = f"its service does not answer: {str(error).splitlines()[0]}"
    processes.leave(processes.RESTART_CODE, _lost(0, f"is gone ({reason})", who))
  if gone:
    if is_first:
      time.sleep(_LAST_SECS)  # with this process goes the service that tells the others
    reason = f"nothing came from it for {_CONNECT_SECS + _TRIED_SECS:.0f} s after it had joined"
    processes.leave(processes.RESTART_CODE, _lost(gone[0], f"is gone ({reason})", who))
  if peers:
    _watch = Watch(state.process_id, state.num_processes, peers)
    _watch.start()


def _lost(process: int, what: str, who: str, code: int = processes.RESTART_CODE) -> str:
  """Returns the message of a process that ends since another one is gone or has failed."""
  advice = processes.advice() if code == processes.RESTART_CODE else ""
  return f"process {process} {what}, and {who} ends{advice}"


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
  """Tells the other processes how the program inside ends; one that fails ends at once.

  The usual end would wait for the others, to which it would not yet have told anything.
  """
  try:
    yield
  except BaseException as error:
    code = 1
    if isinstance(error, SystemExit):
      code = error.code if isinstance(error.code, int) else int(error.code is not None)
    if _watch is None or code == 0:
      _end_well()
      raise
    reason = error.__context__ or error if isinstance(error, SystemExit) else error
    if isinstance(reason, Exception):
      processes.leave_if_alone(reason)
    if not isinstance(error, SystemExit):
      sys.excepthook(type(error), error, error.__traceback__)
    _watch.fail(" ".join(str(reason).split())[:300] or type(reason).__name__, code)
    processes.leave(code)
  else:
    _end_well()


def _end_well() -> None:
  if _watch is not None:
    _watch.send({"ended": True})


class Watch(threading.Thread):
  """The thread that hears from the other processes, and ends this one when it must."""

  def __init__(self, process: int, num_processes: int, peers: dict[int, socket.socket]):
    """Takes over connections.

    Args:
      process: number of this one.
      num_processes: of the run.
      peers: connections by the number of the process at their other end.
    """
    super().__init__(name="watch", daemon=True)
    self._process, self._who = process, f"process {process} of {num_processes}"
    self._peers, self._connected = peers, set(peers)
    self._leaves = False
    for peer in peers.values():
      peer.setblocking(False)

  def send(self, message: dict[str, Any]) -> None:
    """Sends a message to every connected process that can take it now."""
    for peer in self._peers.values():
      with contextlib.suppress(OSError):  # a connection that has failed is found when it is read
        peer.send(json.dumps(message).encode() + b"\n")

  def fail(self, reason: str, code: int) -> None:
    """Tells the others that this process has failed; the first one then lets them end before it.

    Its end breaks JAX's service, which the others would report at length.
    """
    self._leaves = True
    self.send({"process": self._process, "what": f"has failed ({reason})", "code": code})
    end = time.monotonic() + _FAIL_SECS + _LAST_SECS
    while self._process == 0 and self._connected and time.monotonic() < end:
      time.sleep(0.02)

  def run(self) -> None:
    heard = dict.fromkeys(self._peers, time.monotonic())
    unread = dict.fromkeys(self._peers, b"")
    ended: set[int] = set()
    with selectors.DefaultSelector() as selector:
      for process, peer in self._peers.items():
        selector.register(peer, selectors.EVENT_READ, process)
      beat = time.monotonic()
      while True:
        for key, _ in selector.select(_BEAT_SECS):
          process, received = key.data, b""
          try:
            received = self._peers[process].recv(1 << 16)
          except BlockingIOError:
            continue
          except OSError:
            pass  # as if it had closed
          heard[process] = time.monotonic()
          *lines, unread[process] = (unread[process] + received).split(b"\n")
          for message in map(json.loads, lines):
            if "code" in message:
              self._end(**message)
            if "ended" in message:
              ended.add(process)
          if not received:
            if process not in ended:
              self._end(process, "is gone (its connection has closed)", processes.RESTART_CODE)
            selector.unregister(key.fileobj)
            del heard[process]
            self._connected.discard(process)
        now = time.monotonic()
        if now - beat >= _BEAT_SECS:
          self.send({})
          beat = now
        for process, time_heard in heard.items():
          if now - time_heard > SILENT_SECS and process not in ended:
            what = f"is gone (nothing came from it for {SILENT_SECS:.0f} s)"
            self._end(process, what, processes.RESTART_CODE)

  def _end(self, process: int, what: str, code: int) -> None:
    """Ends this process for what has happened to another one, which the others are told."""
    if self._leaves:
      return
    if self._process == 0:
      self.send({"process": process, "what": what, "code": code})
    if what.startswith("has failed"):
      time.sleep(_FAIL_SECS)  # this one may be about to say the same
    if self._process == 0:
      time.sleep(_LAST_SECS)
    processes.leave(code, _lost(process, what, self._who, code))


def _accept(num_processes: int) -> tuple[dict[int, socket.socket], list[int]]:
  """Waits for a connection from every other process.

  Returns:
    The connections, by the number of the process, {} if one has not come; the processes that have
    not even tried, which are gone.
  """
  address = distributed.global_state.coordinator_address
  assert address is not None  # since there are several processes
  peers: dict[int, socket.socket] = {}
  token = secrets.token_hex(16)
  with _listener() as listener:
    host, port = address.rpartition(":")[0].strip("[]"), listener.getsockname()[1]
    processes.publish("watch/address", json.dumps([host, port, token]))
    end = time.monotonic() + _CONNECT_SECS
    while len(peers) < num_processes - 1 and (left := end - time.monotonic()) > 0:
      with contextlib.suppress(OSError, ValueError):
        listener.settimeout(left)
        peer = listener.accept()[0]
        peer.settimeout(left)
        greeting = peer.makefile("rb").readline(200).split()
        if len(greeting) == 2 and greeting[0] == token.encode():
          peers[int(greeting[1])] = peer
  missing = [process for process in range(1, num_processes) if process not in peers]
  gone = [process for process in missing if not _has_tried(process)]
  processes.publish("watch/missing", json.dumps([missing, gone]))
  if not missing or gone:
    return peers, gone
  print(
    f"process 0 waited {_CONNECT_SECS:.0f} s for processes {missing} to connect to {host}:{port}: "
    f"when a process is lost, the others may need {SERVICE_SECS} s to notice",
    file=sys.stderr,
    flush=True,
  )
  return {}, []


def _has_tried(process: int) -> bool:
  try:
    processes.await_text(f"watch/tried/{process}", _TRIED_SECS)
  except jax.errors.JaxRuntimeError:
    return False
  return True


def _listener() -> socket.socket:
  if socket.has_dualstack_ipv6():
    with contextlib.suppress(OSError):
      return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
  return socket.create_server(("", 0))


def _connect(process: int) -> tuple[dict[int, socket.socket], list[int]]:
  """Returns the connection to process 0, {} if some process has none, and which ones are gone."""
  host, port, token = json.loads(processes.await_text("watch/address"))
  peer = None
  with contextlib.suppress(OSError):
    peer = socket.create_connection((host, port), timeout=_CONNECT_SECS)
    peer.sendall(f"{token} {process}\n".encode())
  processes.publish(f"watch/tried/{process}", "")
  missing, gone = json.loads(processes.await_text("watch/missing"))
  return ({0: peer} if peer is not None and not missing else {}), gone


def delay_aborts() -> None:
  """Delays an abort of this process by six seconds, in which the watch may say who is gone.

  JAX aborts a process as soon as the connection to its service in process 0 breaks, which may be
  before this watch has read the same from its own connection. The handler of the signal is `sleep`
  of the C library, which takes the number of SIGABRT as seconds: it is safe in a handler, and needs
  no Python in the thread that aborts.
  """
  libc = ctypes.CDLL(None)
  libc.signal(signal.SIGABRT, libc.sleep)
