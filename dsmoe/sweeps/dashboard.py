"""Serves the page of a sweep's report on the loopback interface, refreshed while the sweep runs.

The page is made in a thread of its own, by reading files only, in a process beside the sweep's.
A request is answered with the page that was made last, so that it neither waits nor makes work.
"""

import contextlib
import datetime
import multiprocessing
import multiprocessing.connection
import multiprocessing.process
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable

import uvicorn
from absl import logging
from etils import epath
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from dsmoe.reporting import html
from dsmoe.sweeps import progress, results, sections

HOST = "127.0.0.1"
_HOSTS = [
  "127.0.0.1",
  "localhost",
]  # other names would let other sites read the page (DNS rebinding)
_LEAST_REFRESH_SECS = 1
_END_SECS = 5.0


class Pages:
  """Makes a page again and again in a thread, and holds the last one that was made."""

  def __init__(self, make: Callable[[], str], every_secs: float):
    """Makes nothing yet.

    Args:
      make: returns the page; ValueError and OSError are shown if there was no page before.
      every_secs: between two pages.
    """
    self._make, self._every_secs = make, every_secs
    self._latest = _message("The sweep is being read.")
    self._has_page = False
    self._is_over = threading.Event()
    self._thread = threading.Thread(target=self._run, daemon=True)

  @property
  def latest(self) -> str:
    """The last page."""
    return self._latest

  @property
  def refresh_secs(self) -> int:
    """After how long a browser should ask again."""
    return max(round(self._every_secs), _LEAST_REFRESH_SECS) if self._has_page else 1

  def start(self) -> None:
    """Begins to make pages."""
    self._thread.start()

  def stop(self) -> None:
    """Makes no more pages; waits a little for the one that is being made."""
    self._is_over.set()
    self._thread.join(_END_SECS)

  def _run(self) -> None:
    while not self._is_over.is_set():
      try:
        self._latest, self._has_page = self._make(), True
      except (ValueError, OSError) as error:  # a storage or a disk may fail for a moment
        logging.warning("the sweep's page could not be made: %s", error)
        if not self._has_page:
          self._latest = _message(f"The sweep cannot be read: {error}")
      self._is_over.wait(self._every_secs)


def _message(sentence: str) -> str:
  return html.page("Sweep", [html.Section("Waiting", [sentence])])


def application(pages: Pages) -> Starlette:
  """Returns the ASGI application, which starts and stops `pages` with itself."""

  async def index(request: Request) -> Response:
    headers = {"Refresh": str(pages.refresh_secs), "Cache-Control": "no-store"}
    headers |= {"X-Content-Type-Options": "nosniff", "X-Frame-Options": "DENY"}
    return HTMLResponse(pages.latest, headers=headers)

  @contextlib.asynccontextmanager
  async def lifespan(app: Starlette) -> AsyncIterator[None]:
    pages.start()
    try:
      yield
    finally:
      pages.stop()

  hosts = Middleware(TrustedHostMiddleware, allowed_hosts=_HOSTS, www_redirect=False)
  return Starlette(routes=[Route("/", index)], middleware=[hosts], lifespan=lifespan)


def maker(
  workdir: epath.PathLike,
  storage: str | None = None,
  price_per_device_hour: float | None = None,
) -> Callable[[], str]:
  """Returns a function that reads a sweep's files and makes its page; see `sections.of_sweep`."""
  follower = progress.Follower()

  def make() -> str:
    sweep = results.read(workdir, storage)
    found = follower.poll(sweep, time.time())
    note = f"{workdir}, as of {datetime.datetime.now():%Y-%m-%d %H:%M:%S}"
    return sections.page(sweep, price_per_device_hour, found, note)

  return make


def start(
  workdir: epath.PathLike,
  storage: str | None = None,
  port: int = 0,
  every_secs: float = 10.0,
  price_per_device_hour: float | None = None,
) -> tuple[multiprocessing.process.BaseProcess, str]:
  """Serves a sweep's page from a process of its own, which ends with the one that started it.

  Args:
    workdir, storage: see `results.read`.
    port: of the loopback interface; 0: one that is free.
    every_secs: between two readings of the sweep.
    price_per_device_hour: see `sections.of_sweep`.

  Returns:
    The process, which `terminate` ends, and the address of the page.

  Raises:
    ValueError: for a port that cannot be had.
  """
  try:
    listening = socket.create_server((HOST, port))
  except (OSError, OverflowError) as error:
    raise ValueError(f"the dashboard's port must be free, {port} is not: {error}") from error
  address = f"http://{HOST}:{listening.getsockname()[1]}/"
  arguments = (str(workdir), storage, price_per_device_hour)
  process = multiprocessing.get_context("spawn").Process(
    target=_serve, args=(listening, every_secs, arguments), daemon=True
  )
  process.start()
  listening.close()
  return process, address


def _serve(listening: socket.socket, every_secs: float, arguments: tuple) -> None:
  pages = Pages(maker(*arguments), every_secs)
  config = uvicorn.Config(application(pages), log_level="warning", access_log=False)
  server = uvicorn.Server(config)
  parent = multiprocessing.parent_process()

  def end_with_parent() -> None:
    if parent is not None:
      multiprocessing.connection.wait([parent.sentinel])
      server.should_exit = True

  threading.Thread(target=end_with_parent, daemon=True).start()
  server.run(sockets=[listening])
