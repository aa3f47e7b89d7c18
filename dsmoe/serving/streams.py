"""Sends answers, whole or as streams, to clients that may leave or stop reading."""

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine, Sequence
from typing import Any

from absl import logging
from starlette.requests import ClientDisconnect, Request
from starlette.responses import StreamingResponse

from dsmoe.serving.answers import Answer
from dsmoe.serving.batcher_thread import Job
from dsmoe.serving.choices import Delta
from dsmoe.serving.fields import ApiError
from dsmoe.serving.prometheus import Metrics

SEND_SECS = 10.0  # given to a client to read the rest once a request's time is over


async def collect(deltas: AsyncIterator[tuple[int, Delta]], num_choices: int) -> list[list[Delta]]:
  """Returns all deltas of each choice."""
  result: list[list[Delta]] = [[] for _ in range(num_choices)]
  async for index, delta in deltas:
    result[index].append(delta)
  return result


async def unless_gone(request: Request, work: Coroutine[Any, Any, Any]) -> Any:
  """Returns the result of `work`, or raises ClientDisconnect when the client leaves before."""

  async def gone():
    while (await request.receive())["type"] != "http.disconnect":
      pass

  tasks = [asyncio.create_task(work), asyncio.create_task(gone())]
  try:
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    if not tasks[0].done():
      raise ClientDisconnect
    return tasks[0].result()
  finally:
    for task in tasks:
      task.cancel()


async def lines(answer: Answer, deltas: AsyncIterator[tuple[int, Delta]]) -> AsyncIterator[str]:
  """Yields server-sent events; an error that comes after the first one is an event too."""

  def events(chunks: Sequence[dict[str, Any]]) -> str:
    return "".join(f"data: {json.dumps(c, separators=(',', ':'))}\n\n" for c in chunks)

  try:
    yield events(answer.opening())
    async for index, delta in deltas:
      yield events(answer.chunks(index, delta))
    yield events(answer.closing()) + "data: [DONE]\n\n"
  except ApiError as error:
    yield events([error.body])


class EventStream(StreamingResponse):
  """A stream of server-sent events; whatever ends it also cancels the choices still running."""

  def __init__(self, lines: AsyncIterator[str], job: Job, limit_secs: float, metrics: Metrics):
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    super().__init__(lines, media_type="text/event-stream", headers=headers)
    self._job, self._limit_secs, self._metrics = job, limit_secs, metrics

  async def __call__(self, scope, receive, send) -> None:
    try:
      async with asyncio.timeout(self._limit_secs):
        await super().__call__(scope, receive, send)
    except TimeoutError:
      logging.warning("closed the stream of a client that does not read its answer")
    finally:
      if self._job.running:
        self._metrics.vanished.inc()
      self._job.cancel()
