"""Uvicorn that drains after SIGTERM, and whose connections may not be idle for long."""

import asyncio
import functools
import resource
import time

import uvicorn
from absl import logging
from uvicorn.protocols.http.h11_impl import H11Protocol

from dsmoe.serving.server import Server, shutting_down

_IDLE_CONNECTIONS = 256  # allowed beside connections with a request
_OTHER_FILES = 128  # that the process may have open beside connections
_END_SECS = 1  # that clients have to read why they get no answer


class Connection(H11Protocol):
  """A connection that knows since when it is idle, and that makes others give way to it.

  Of more than `most` connections, the one that has been idle for longest is closed: clients that
  only connect keep nobody out.
  """

  def __init__(self, *args, most: int, **kwargs):
    super().__init__(*args, **kwargs)
    self._most = most
    self._quiet_since = self.loop.time()
    self._num_unread = 0  # bytes written that the system has not taken yet, because nobody reads

  def connection_made(self, transport) -> None:
    super().connection_made(transport)
    if len(self.connections) <= self._most:
      return
    others = [c for c in self.connections if isinstance(c, Connection) and c is not self]
    idle = [c for c in others if c.is_idle]
    if idle:
      oldest = min(idle, key=lambda c: c._quiet_since)
      self.connections.discard(oldest)
      oldest.transport.close()

  def on_response_complete(self) -> None:
    self._quiet_since = self.loop.time()
    super().on_response_complete()

  @property
  def is_idle(self) -> bool:
    """Whether it has no request, or only the beginning of one's header."""
    return self.cycle is None or self.cycle.response_complete

  def end_if_idle(self, limit_secs: float) -> None:
    """Closes it after that time without a request, or with an answer that nobody reads on."""
    num_unread = self.transport.get_write_buffer_size()
    if num_unread < self._num_unread:
      self._quiet_since = self.loop.time()
    self._num_unread = num_unread
    over = self.loop.time() - self._quiet_since > limit_secs
    if over and (self.is_idle or self.transport.is_closing()):
      self.transport.abort()


class HttpServer(uvicorn.Server):
  """Drains at the first signal; at the second, those who wait are told that it ends."""

  def __init__(self, server: Server, host: str, port: int, drain_secs: float):
    """Prepares to listen.

    Args:
      server: the application.
      host, port: where; port 0 for any free one.
      drain_secs: time that running requests have to finish after the first signal.
    """
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = 2 * server.batcher_thread.capacity + _IDLE_CONNECTIONS
    most = max(1, min(most, files - _OTHER_FILES))
    super().__init__(
      uvicorn.Config(
        server.app,
        host=host,
        port=port,
        lifespan="on",
        loop="asyncio",
        http=functools.partial(Connection, most=most),  # type: ignore[arg-type]
        ws="none",
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=5,
      )
    )
    self._server, self._drain_secs = server, drain_secs
    self._loop: asyncio.AbstractEventLoop | None = None

  @property
  def bound_port(self) -> int:
    """The port that the started server listens on, also when port 0 was asked for."""
    return self.servers[0].sockets[0].getsockname()[1]

  async def startup(self, sockets=None) -> None:
    self._loop = asyncio.get_running_loop()
    await super().startup(sockets)
    if self.started:
      host = f"[{self.config.host}]" if ":" in self.config.host else self.config.host
      print(f"serving {self._server.served.name} on http://{host}:{self.bound_port}", flush=True)

  async def on_tick(self, counter: int) -> bool:
    """Does what is done ten times a second; returns whether to end."""
    if counter % 5 == 0:
      for connection in list(self.server_state.connections):
        assert isinstance(connection, Connection)
        connection.end_if_idle(self._server.limits.idle_secs)
    return await super().on_tick(counter)

  def handle_exit(self, sig, frame) -> None:
    """Begins to drain; ends at once, with an answer for all, when that has begun already."""
    loop = self._loop
    if loop is None:
      self.should_exit = self.force_exit = True
    elif self._server.draining:
      loop.call_soon_threadsafe(self._end)
    else:
      self._server.draining = True
      loop.call_soon_threadsafe(lambda: loop.create_task(self._drain()))

  async def _drain(self) -> None:
    server = self._server
    end = time.monotonic() + self._drain_secs
    while server.num_active and time.monotonic() < end and not self.should_exit:
      await asyncio.sleep(0.02)
    if server.num_active and not self.should_exit:
      logging.warning(
        "%d requests are not finished after %g s", server.num_active, self._drain_secs
      )
      server.batcher_thread.end(shutting_down())
    self.should_exit = True

  def _end(self) -> None:
    """Ends all requests; those that are still being read are cancelled after a moment."""
    self._server.batcher_thread.end(shutting_down())
    self.config.timeout_graceful_shutdown = _END_SECS
    self.should_exit = True
