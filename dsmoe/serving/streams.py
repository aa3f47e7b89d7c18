"""Answers on their way out, and clients that do not wait for them."""

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine, Sequence
from typing import Any

from absl import logging
from starlette.requests import ClientDisconnect, Request
from starlette.responses import StreamingResponse

from dsmoe.serving.answers import Answer
from dsmoe.serving.choices import Piece
from dsmoe.serving.engine import Job
from dsmoe.serving.prometheus import Metrics
from dsmoe.serving.requests import ApiError

SEND_SECS = 10.0  # a client that reads nothing for so long after its time is up is cut off


async def collect(pieces: AsyncIterator[tuple[int, Piece]], num_choices: int) -> list[list[Piece]]:
  result: list[list[Piece]] = [[] for _ in range(num_choices)]
  async for place, piece in pieces:
    result[place].append(piece)
  return result


async def unless_gone(request: Request, work: Coroutine[Any, Any, Any]) -> Any:
  """Returns the result of `work`; raises ClientDisconnect if the client leaves before."""

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


async def lines(answer: Answer, pieces: AsyncIterator[tuple[int, Piece]]) -> AsyncIterator[str]:
  """Yields server-sent events; an error after the beginning is an event too."""

  def lines(chunks: Sequence[dict[str, Any]]) -> str:
    return "".join(f"data: {json.dumps(c, separators=(',', ':'))}\n\n" for c in chunks)

  try:
    yield lines(answer.opening())
    async for place, piece in pieces:
      yield lines(answer.chunks(place, piece))
    yield lines(answer.closing()) + "data: [DONE]\n\n"
  except ApiError as error:
    yield lines([error.body])


class EventStream(StreamingResponse):
  """A stream of events whose rows end when it ends, however it ends."""

  def __init__(self, lines: AsyncIterator[str], job: Job, limit_secs: float, metrics: Metrics):
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    super().__init__(lines, media_type="text/event-stream", headers=headers)
    self._job, self._limit_secs, self._metrics = job, limit_secs, metrics

  async def __call__(self, scope, receive, send) -> None:
    try:
      async with asyncio.timeout(self._limit_secs):
        await super().__call__(scope, receive, send)
    except TimeoutError:
      logging.warning("cut off a client that does not read its answer")
    finally:
      if self._job.running:
        self._metrics.vanished.inc()
      self._job.cancel()
