"""An OpenAI-compatible HTTP server over the continuous batcher.

Routes: /v1/models, /v1/completions, /v1/chat/completions, /health, /metrics. An HTTP request is
checked and turned into a request to the batcher for each choice (requests.py); one thread runs the
batcher (batcher_thread.py). Its events become text (choices.py) and OpenAI's JSON (answers.py),
which is sent whole or as a stream (streams.py). When a client leaves, its choices are cancelled.
http.py listens on the port.
"""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import functools
import hmac
import time
from collections.abc import AsyncIterator
from typing import Any

from absl import logging
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from dsmoe.inference.text_model import ServedModel
from dsmoe.serving import fields, requests, streams
from dsmoe.serving.answers import Answer
from dsmoe.serving.batcher_thread import BatcherThread, Job
from dsmoe.serving.choices import Delta
from dsmoe.serving.fields import ApiError
from dsmoe.serving.prometheus import Metrics

_GENERATION = ("/v1/completions", "/v1/chat/completions")
_ROUTES = (*_GENERATION, "/v1/models", "/health", "/metrics")
_NUM_READERS = 2
_CLIENT_GONE = 499  # only the metrics show this status: the client has left


@dataclasses.dataclass(frozen=True)
class Limits:
  """The largest size and the longest times of one request."""

  max_body_bytes: int = 4 * 2**20
  idle_secs: float = 20.0  # of a connection without a request, or with an answer nobody reads
  body_secs: float = 30.0  # until the body has arrived
  request_secs: float = 600.0  # until the answer is complete

  @property
  def answer_secs(self) -> float:
    """Until a client has read its answer to the end."""
    return self.body_secs + self.request_secs + streams.SEND_SECS

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if value <= 0:
        raise ValueError(f"{field.name} must be positive, got {value}")


class Server:
  """The ASGI application, `app`, and its state."""

  def __init__(
    self,
    served: ServedModel,
    batcher_thread: BatcherThread,
    limits: Limits | None = None,
    api_key: str = "",
  ):
    """Makes the application.

    Args:
      served: the model's name, tokenizer and limits.
      batcher_thread: not yet started; the application starts and stops it.
      limits: of one request; None for the defaults.
      api_key: the key that clients must send; "" for none.
    """
    self.served, self.batcher_thread = served, batcher_thread
    self.limits = limits or Limits()
    self.metrics = Metrics(batcher_thread.batcher)
    self.draining = False
    self.num_active = 0  # requests for text whose answer is not complete
    # Requests are read in threads, since long texts take long to encode.
    self._readers = concurrent.futures.ThreadPoolExecutor(_NUM_READERS, "reader")
    self._api_key = api_key.encode()
    self._created = int(time.time())
    handlers: dict[Any, Any] = {
      ApiError: lambda request, error: _refusal(error),
      HTTPException: lambda request, error: _refusal(
        ApiError(f"{error.detail}: {request.method} {request.url.path!a}", status=error.status_code)
      ),
      Exception: lambda request, error: _refusal(
        ApiError("an error inside the server", status=500, type="server_error")
      ),
      ClientDisconnect: lambda request, error: Response(status_code=_CLIENT_GONE),
    }
    routes = [
      Route("/v1/completions", self._completions, methods=["POST"]),
      Route("/v1/chat/completions", self._chat, methods=["POST"]),
      Route("/v1/models", self._models),
      Route("/v1/models/{name:path}", self._model),
      Route("/health", self._health),
      Route("/metrics", self._metrics),
    ]
    inner = Starlette(routes=routes, exception_handlers=handlers, lifespan=self._lifespan)
    self.app = self._gate(inner)

  @contextlib.asynccontextmanager
  async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
    self.batcher_thread.start()
    yield
    self._readers.shutdown(wait=False, cancel_futures=True)
    self.batcher_thread.stop()

  def _gate(self, inner: Starlette):
    """Wraps the application: counts requests, checks the key, refuses requests while draining."""

    async def app(scope, receive, send):
      if scope["type"] != "http":
        return await inner(scope, receive, send)
      path, status = scope["path"], None

      async def counted_send(message):
        nonlocal status
        if message["type"] == "http.response.start":
          status = message["status"]
        await send(message)

      generates = path in _GENERATION
      self.num_active += generates
      try:
        refusal = self._refuse(path, dict(scope["headers"]).get(b"authorization", b""))
        async with asyncio.timeout(self.limits.answer_secs):
          await (refusal or inner)(scope, receive, counted_send)
      except TimeoutError:
        logging.warning("closed the connection of a client that does not read its answer")
      except asyncio.CancelledError:  # the server ends
        if status is None:
          await _refusal(shutting_down())(scope, receive, counted_send)
      finally:
        self.num_active -= generates
        route = path if path in _ROUTES else "other"
        self.metrics.requests.labels(route, status or 500).inc()

    return app

  def _refuse(self, path: str, authorization: bytes) -> Response | None:
    if path == "/health":
      return None
    expected = b"Bearer " + self._api_key
    if self._api_key and not hmac.compare_digest(authorization, expected):
      message = "the API key is missing or wrong: send Authorization: Bearer KEY"
      return _refusal(ApiError(message, None, "invalid_api_key", 401))
    if self.draining and path != "/metrics":
      return _refusal(shutting_down())
    most = 2 * self.batcher_thread.capacity  # some are being read, or their answers sent
    if self.num_active > most and path in _GENERATION:
      message = f"{self.num_active - 1} of at most {most} requests are being answered"
      message += "; try again later"
      return _refusal(ApiError(message, None, "rate_limit_exceeded", 429, "rate_limit_error"))
    return None

  async def _health(self, request: Request) -> Response:
    if self.batcher_thread.error is not None:
      return JSONResponse({"status": "failed", "reason": str(self.batcher_thread.error)}, 503)
    return JSONResponse(
      {"status": "draining" if self.draining else "ok"}, 503 if self.draining else 200
    )

  async def _metrics(self, request: Request) -> Response:
    return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

  def _card(self) -> dict[str, Any]:
    card = {"id": self.served.name, "object": "model", "created": self._created}
    return card | {"owned_by": "dsmoe", "max_model_len": self.served.max_tokens_per_row}

  async def _models(self, request: Request) -> Response:
    return JSONResponse({"object": "list", "data": [self._card()]})

  async def _model(self, request: Request) -> Response:
    if request.path_params["name"] != self.served.name:
      message = f"The model {request.path_params['name']!a} does not exist"
      raise ApiError(message, "model", "model_not_found", 404)
    return JSONResponse(self._card())

  async def _completions(self, request: Request) -> Response:
    return await self._generate(request, is_chat=False)

  async def _chat(self, request: Request) -> Response:
    return await self._generate(request, is_chat=True)

  async def _generate(self, request: Request, is_chat: bool) -> Response:
    start = time.monotonic()
    values = fields.parse_json(await self._body(request))
    parse = functools.partial(
      requests.parse, values, self.served, is_chat, self.batcher_thread.capacity
    )
    loop = asyncio.get_running_loop()
    deadline = loop.time() + self.limits.request_secs
    async with self._until(deadline):
      parsed = await loop.run_in_executor(self._readers, parse)
    job = self.batcher_thread.submit(parsed.choices)
    self.metrics.prompt_tokens.inc(parsed.num_prompt_tokens)
    answer = Answer(self.served, parsed)
    deltas = self._deltas(job, answer, start, deadline)
    if parsed.stream:
      limit = self.limits.request_secs + streams.SEND_SECS
      return streams.EventStream(streams.lines(answer, deltas), job, limit, self.metrics)
    try:
      collecting = streams.collect(deltas, len(parsed.choices))
      collected = await streams.unless_gone(request, collecting)
    except ClientDisconnect:
      self.metrics.vanished.inc()
      raise
    finally:
      job.cancel()
    return JSONResponse(answer.complete(collected))

  @contextlib.asynccontextmanager
  async def _until(self, deadline: float, job: Job | None = None) -> AsyncIterator[None]:
    """Ends what takes longer, and the job with it, with an error for the client."""
    try:
      async with asyncio.timeout_at(deadline):
        yield
    except TimeoutError:
      if job is not None:
        job.cancel()
      message = f"not answered within {self.limits.request_secs:g} s"
      raise ApiError(message, None, "timeout", 504, "server_error") from None

  async def _deltas(
    self, job: Job, answer: Answer, start: float, deadline: float
  ) -> AsyncIterator[tuple[int, Delta]]:
    """Yields choices' indices and deltas until all choices are finished."""
    unfinished, begun = set(range(len(answer.choices))), False
    while unfinished:
      async with self._until(deadline, job):
        index, event = await job.next_event()
      choice = answer.choices[index]
      if index not in unfinished:
        # This event was on its way when a stop string ended the choice.
        self.metrics.surplus_tokens.inc(len(event.tokens))
        continue
      delta = choice.push(event)
      self.metrics.new_tokens.inc(len(event.tokens) - choice.num_surplus)
      self.metrics.surplus_tokens.inc(choice.num_surplus)
      if not begun:
        begun = True
        self.metrics.first_token_secs.observe(time.monotonic() - start)
      if delta.finish:
        unfinished.remove(index)
        job.cancel(index)
      yield index, delta
    self.metrics.request_secs.observe(time.monotonic() - start)

  async def _body(self, request: Request) -> bytes:
    """Returns the body; reads even one that is too long, so that its client gets the error."""
    if request.headers.get("content-type", "").split(";")[0].strip() != "application/json":
      raise ApiError("Content-Type must be application/json", status=415)
    limit, parts, size = self.limits.max_body_bytes, [], 0
    try:
      async with asyncio.timeout(self.limits.body_secs):
        async for part in request.stream():
          size += len(part)
          if size <= limit:
            parts.append(part)
    except TimeoutError:
      message = f"the body must arrive within {self.limits.body_secs:g} s"
      raise ApiError(message, status=408) from None
    if size > limit:
      raise ApiError(f"the body must be at most {limit} bytes", status=413)
    return b"".join(parts)


def shutting_down() -> ApiError:
  """Returns the error of those whom the server's end leaves without an answer."""
  return ApiError("the server is shutting down", None, "draining", 503, "server_error")


def _refusal(error: ApiError) -> Response:
  headers = {"Retry-After": "1"} if error.status in (429, 503) else {}
  if error.status == 401:
    headers["WWW-Authenticate"] = "Bearer"
  return JSONResponse(error.body, error.status, headers)
