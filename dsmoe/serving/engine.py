"""One thread that runs the batcher, and the event loop's side of it.

Rows are submitted, cancelled and told their events on the event loop only, so a row is known
before its first event arrives and nothing needs a lock.
"""

import asyncio
import threading
from collections.abc import Sequence

from absl import logging

from dsmoe.inference.batcher import Batcher, Event
from dsmoe.serving.requests import ApiError, Row

_IDLE_SECS = 0.1


class Job:
  """The rows of one HTTP request, and what is new of them."""

  def __init__(self, engine: "Engine"):
    self._engine = engine
    self.news: asyncio.Queue[tuple[int, Event] | ApiError] = asyncio.Queue()
    self.running: dict[int, int] = {}  # the batcher's number of each unfinished row -> its place

  async def next_event(self) -> tuple[int, Event]:
    """Returns a row's place in the job and its event; raises ApiError when the engine ends."""
    news = await self.news.get()
    if isinstance(news, ApiError):
      raise news
    return news

  def cancel(self, place: int | None = None) -> None:
    """Ends one row, or all; those that are over are left alone."""
    for number in [n for n, p in self.running.items() if place in (None, p)]:
      self._engine.cancel(number)


class Engine:
  """The batcher behind a bounded queue."""

  def __init__(self, batcher: Batcher, max_rows: int, max_queue: int):
    """Wraps `batcher`, which decodes `max_rows` rows at once; `max_queue` more may wait."""
    self.batcher, self.capacity = batcher, max_rows + max_queue
    self.error: ApiError | None = None  # why nothing runs any more
    self._jobs: dict[int, Job] = {}  # by the batcher's number of each row
    self._stopping = False
    self._thread: threading.Thread | None = None

  def start(self) -> None:
    """Starts the thread; the running event loop gets its news."""
    loop = asyncio.get_running_loop()
    self._thread = threading.Thread(target=self._run, args=(loop,), name="batcher", daemon=True)
    self._thread.start()

  def stop(self) -> None:
    """Ends the thread after its current step; jobs that still run get an error."""
    self._stopping = True
    self.end(ApiError("the server is shutting down", None, None, 503, "server_error"))
    if self._thread is not None:
      self._thread.join()

  def submit(self, rows: Sequence[Row]) -> Job:
    """Queues all rows, or none.

    Raises:
      ApiError: when they do not fit in the queue, now or ever, or the batcher refuses one.
    """
    if self.error is not None:
      raise self.error
    if len(rows) > self.capacity:
      raise ApiError(f"n times prompts ({len(rows)}) must be at most {self.capacity}", "prompt")
    if len(self._jobs) + len(rows) > self.capacity:
      message = f"{len(self._jobs)} of at most {self.capacity} rows are taken; try again later"
      raise ApiError(message, None, "rate_limit_exceeded", 429, "rate_limit_error")
    job = Job(self)
    try:
      for place, (prompt, sampling) in enumerate(rows):
        number = self.batcher.submit(prompt, sampling)
        self._jobs[number], job.running[number] = job, place
    except ValueError as error:
      job.cancel()
      raise ApiError(str(error), "prompt") from error
    return job

  def cancel(self, number: int) -> None:
    """Forgets a row and frees its place."""
    job = self._jobs.pop(number, None)
    if job is not None:
      del job.running[number]
      self.batcher.cancel(number)

  def _run(self, loop: asyncio.AbstractEventLoop) -> None:
    try:
      while not self._stopping:
        if self.batcher.wait(_IDLE_SECS):
          loop.call_soon_threadsafe(self._deliver, self.batcher.step())
    except Exception as error:
      if self._stopping:
        return  # the loop may be gone
      logging.exception("the batcher failed")
      message = f"the engine failed: {type(error).__name__}"
      failure = ApiError(message, None, "engine_failed", 500, "server_error")
      loop.call_soon_threadsafe(self.end, failure)

  def _deliver(self, events: Sequence[Event]) -> None:
    for event in events:
      job = self._jobs.get(event.request)
      if job is None:
        continue  # cancelled meanwhile
      job.news.put_nowait((job.running[event.request], event))
      if event.finish:
        del self._jobs[event.request], job.running[event.request]

  def end(self, error: ApiError) -> None:
    """Ends all jobs, and those to come, with `error`."""
    self.error = self.error or error
    jobs = set(self._jobs.values())
    for job in jobs:
      job.cancel()
      job.news.put_nowait(error)
