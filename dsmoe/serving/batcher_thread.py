"""The thread that runs the batcher, and the event loop's side of it.

Requests are submitted and cancelled, and their events delivered, on the event loop only. A request
is therefore known before its first event arrives, and nothing here needs a lock.
"""

import asyncio
import itertools
import threading
from collections.abc import Sequence

from absl import logging

from dsmoe.inference.batcher import Batcher, Event
from dsmoe.serving.fields import ApiError
from dsmoe.serving.requests import ChoiceRequest

_IDLE_SECS = 0.1  # between two looks at whether the thread should stop


class Job:
  """The choices of one HTTP request: a request to the batcher for each, and their events."""

  def __init__(self, thread: "BatcherThread"):
    self._thread = thread
    self.news: asyncio.Queue[tuple[int, Event] | ApiError] = asyncio.Queue()
    # The index of each unfinished choice, by the batcher's number of its request.
    self.running: dict[int, int] = {}

  async def next_event(self) -> tuple[int, Event]:
    """Returns a choice's index and its event; raises ApiError when generation has ended."""
    news = await self.news.get()
    if isinstance(news, ApiError):
      raise news
    return news

  def cancel(self, index: int | None = None) -> None:
    """Ends one choice, or all for None; nothing happens to finished ones."""
    for number in [n for n, i in self.running.items() if index in (None, i)]:
      self._thread.cancel(number)


class BatcherThread:
  """Runs a batcher on a thread of its own, behind a bounded queue."""

  def __init__(self, batcher: Batcher, max_rows: int, max_queue: int):
    """Wraps `batcher`, which decodes `max_rows` choices at once; `max_queue` more may wait."""
    self.batcher, self.capacity = batcher, max_rows + max_queue
    self.error: ApiError | None = None  # why nothing runs any more
    self._jobs: dict[int, Job] = {}  # by the batcher's number of each request
    self._stopping = False
    self._thread: threading.Thread | None = None

  def start(self) -> None:
    """Starts the thread; its events are delivered on the running event loop."""
    loop = asyncio.get_running_loop()
    self._thread = threading.Thread(target=self._run, args=(loop,), name="batcher", daemon=True)
    self._thread.start()

  def stop(self) -> None:
    """Ends the thread after its current round; unfinished jobs get an error."""
    self._stopping = True
    self.end(ApiError("the server is shutting down", None, None, 503, "server_error"))
    if self._thread is not None:
      self._thread.join()

  def submit(self, choices: Sequence[ChoiceRequest]) -> Job:
    """Queues all choices, or none.

    Raises:
      ApiError: when they do not fit in the queue now, or the batcher refuses one.
    """
    if self.error is not None:
      raise self.error
    if len(self._jobs) + len(choices) > self.capacity:
      message = (
        f"{len(self._jobs)} of at most {self.capacity} choices are being generated or wait; "
        "try again later"
      )
      raise ApiError(message, None, "rate_limit_exceeded", 429, "rate_limit_error")
    job = Job(self)
    try:
      index = itertools.count()
      # The choices of one prompt share it: it is read once, since the event loop waits meanwhile.
      for _, group in itertools.groupby(choices, lambda choice: id(choice.prompt)):
        same = list(group)
        for number in self.batcher.submit_all(same[0].prompt, [c.sampling for c in same]):
          self._jobs[number], job.running[number] = job, next(index)
    except ValueError as error:
      job.cancel()
      fields = {"stop_tokens": "stop_token_ids", "logit_bias": "logit_bias"}
      raise ApiError(str(error), fields.get(str(error).split()[0], "prompt")) from error
    return job

  def cancel(self, number: int) -> None:
    """Ends the batcher's request of that number; nothing happens when it is finished."""
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
        return  # the event loop may be closed already
      logging.exception("the batcher failed")
      message = f"generation failed: {type(error).__name__}"
      failure = ApiError(message, None, "engine_failed", 500, "server_error")
      loop.call_soon_threadsafe(self.end, failure)

  def _deliver(self, events: Sequence[Event]) -> None:
    for event in events:
      job = self._jobs.get(event.request)
      if job is None:
        continue  # cancelled during the round
      job.news.put_nowait((job.running[event.request], event))
      if event.finish:
        del self._jobs[event.request], job.running[event.request]

  def end(self, error: ApiError) -> None:
    """Ends all jobs with `error`, and refuses later ones with the first such error."""
    self.error = self.error or error
    jobs = set(self._jobs.values())
    for job in jobs:
      job.cancel()
      job.news.put_nowait(error)
