"""A server on a port of this machine, in a thread, and raw connections to it."""

import contextlib
import json
import socket
import sys
import threading
import time

from openai import OpenAI

from dsmoe.data import tokenizer as tokenizer_lib
from dsmoe.inference.chat import ChatTemplate
from dsmoe.inference.text_model import ServedModel
from dsmoe.serving.batcher_thread import BatcherThread
from dsmoe.serving.http import HttpServer
from dsmoe.serving.server import Limits, Server
from tests.serving.fake_batcher import FakeBatcher

TEXTS = [f"def f{i}(x):\n    return x * {i}\n" for i in range(50)] + ["naïve 日本語 🙂"]
TOKENIZER = tokenizer_lib.train_tokenizer(TEXTS, 400)
TEMPLATE = """\
{%- for message in messages %}{{ '<' + message.role + '>' + message.content }}{% endfor -%}
{%- if system_is_wanted is defined and messages[0].role != 'system' -%}
{{- raise_exception('there must be a system message') }}{% endif -%}
{%- if add_generation_prompt %}<assistant>{% endif %}"""


GOOD = {"model": "tiny", "prompt": [5, 6], "max_tokens": 4}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
CHAT_PATH = "/v1/chat/completions"


def served_model(**changes) -> ServedModel:
  values = dict(name="tiny", tokenizer=TOKENIZER, max_tokens_per_row=512, stop_tokens=(0,))
  return ServedModel(**values | {"template": ChatTemplate(TEMPLATE)} | changes)


class Running:
  """A started server."""

  def __init__(self, batcher, port, http):
    self.batcher, self.port, self.http = batcher, port, http
    self.url = f"http://127.0.0.1:{port}"

  def client(self, **kwargs) -> OpenAI:
    values = dict(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)
    return OpenAI(**values | kwargs)

  def raw(self, method, path, body=b"", headers=(), content_type="application/json"):
    """Sends one request on a socket; returns (status, headers, body)."""
    with self.connect() as connection:
      send(connection, method, path, body, headers, content_type)
      return read(connection)

  def post(self, body, path="/v1/completions", **kwargs):
    """Posts JSON; returns (status, the answer's JSON)."""
    status, _, answer = self.raw("POST", path, json.dumps(body).encode(), **kwargs)
    return status, json.loads(answer)

  def connect(self) -> socket.socket:
    return socket.create_connection(("127.0.0.1", self.port), timeout=60)

  def metric(self, name) -> float:
    lines = self.raw("GET", "/metrics")[2].decode().splitlines()
    return float(next(line for line in lines if line.startswith(f"{name} ")).split()[1])


def send(connection, method, path, body=b"", headers=(), content_type="application/json"):
  lines = [f"{method} {path} HTTP/1.1", "Host: x", "Connection: close"]
  lines += [f"Content-Type: {content_type}", f"Content-Length: {len(body)}", *headers]
  connection.sendall("\r\n".join(lines).encode() + b"\r\n\r\n" + body)


def read(connection):
  data = b""
  while part := connection.recv(65536):
    data += part
  head, _, body = data.partition(b"\r\n\r\n")
  first, *lines = head.decode().split("\r\n")
  headers = {k.lower(): v for k, v in (line.split(": ", 1) for line in lines)}
  return int(first.split()[1]), headers, body


def refusal(status, answer, code=None, param=None):
  """Checks the form of an error; returns its message."""
  error = answer["error"]
  assert set(error) == {"message", "type", "param", "code"}, answer
  assert (error["code"], error["param"]) == (code, param), answer
  assert error["type"] == {429: "rate_limit_error"}.get(status, "invalid_request_error")
  return error["message"]


def wait_until(condition):
  """Waits until something holds; fails if it does not in time."""
  end = time.monotonic() + 60
  while not condition():
    assert time.monotonic() < end, "it did not happen in time"
    time.sleep(0.005)


@contextlib.contextmanager
def running(batcher=None, max_rows=4, max_queue=64, drain_secs=5, limits=None, **kwargs):
  """Runs a server; `kwargs` go to `served_model`, but for api_key."""
  batcher = batcher or FakeBatcher(max_rows)
  api_key = kwargs.pop("api_key", "")
  thread = BatcherThread(batcher, max_rows, max_queue)
  server = Server(served_model(**kwargs), thread, limits or Limits(), api_key)
  http = HttpServer(server, "127.0.0.1", 0, drain_secs)
  http_thread = threading.Thread(target=http.run)
  http_thread.start()
  try:
    wait_until(lambda: http.started)
    yield Running(batcher, http.bound_port, http)
  finally:
    http.should_exit = True
    http_thread.join(60)
    assert not http_thread.is_alive()


def main() -> None:
  """Serves a slow fake until a signal comes; its address is printed."""
  thread = BatcherThread(FakeBatcher(secs_per_step=0.02), 4, 4)
  HttpServer(Server(served_model(), thread), "127.0.0.1", 0, float(sys.argv[1])).run()


if __name__ == "__main__":
  main()
