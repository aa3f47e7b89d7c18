"""Uvicorn that drains: after SIGTERM running requests are finished and new ones refused."""

import asyncio
import time

import uvicorn
from absl import logging

from dsmoe.serving.requests import ApiError
from dsmoe.serving.server import Server

_IDLE_CONNECTIONS = 256  # allowed beside connections with a request


class HttpServer(uvicorn.Server):
  """Drains at the first signal; ends at once at the second."""

  def __init__(self, server: Server, host: str, port: int, drain_secs: float):
    """Prepares to listen.

    Args:
      server: the application.
      host, port: where; port 0 for any free one.
      drain_secs: time that running requests have to finish after the first signal.
    """
    super().__init__(
      uvicorn.Config(
        server.app,
        host=host,
        port=port,
        lifespan="on",
        loop="asyncio",
        http="h11",
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=5,
        limit_concurrency=2 * server.batcher_thread.capacity + _IDLE_CONNECTIONS,
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

  def handle_exit(self, sig, frame) -> None:
    """Begins to drain, or ends at once when draining has begun already."""
    loop = self._loop
    if self._server.draining or loop is None:
      self.should_exit = self.force_exit = True
    else:
      self._server.draining = True
      loop.call_soon_threadsafe(lambda: loop.create_task(self._drain()))

  async def _drain(self) -> None:
    server = self._server
    end = time.monotonic() + self._drain_secs
    while server.num_active and time.monotonic() < end:
      await asyncio.sleep(0.02)
    if server.num_active:
      logging.warning(
        "%d requests are not finished after %g s", server.num_active, self._drain_secs
      )
      message = "the server is shutting down"
      server.batcher_thread.end(ApiError(message, None, "draining", 503, "server_error"))
    self.should_exit = True
