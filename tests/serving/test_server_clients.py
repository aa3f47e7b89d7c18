"""Tests of dsmoe/serving: clients that are wrong, too many, too slow or gone; the end."""

import contextlib
import json
import re
import signal
import threading
import time
import urllib.request

import openai
import pytest

from dsmoe.serving import streams
from dsmoe.serving.server import Limits
from tests import runs
from tests.serving.fake_batcher import FakeBatcher
from tests.serving.running_server import (
  GOOD,
  TOKENIZER,
  Running,
  read,
  refusal,
  running,
  send,
  served_model,
  wait_until,
)

LONG = GOOD | {"max_tokens": 500}


@pytest.fixture(scope="module")
def server():
  with running(limits=Limits(max_body_bytes=20_000)) as result:
    yield result


@pytest.mark.parametrize("size", [20_001, 3_000_000])
def test_bodies_that_are_too_large(server, size):
  status, answer = server.post(GOOD | {"user": "x" * size})
  assert status == 413 and "at most 20000 bytes" in refusal(status, answer)
  with pytest.raises(openai.APIStatusError, match="at most 20000 bytes"):
    server.client().completions.create(**GOOD, user="x" * size)
  assert server.post(GOOD)[0] == 200


def test_a_body_without_length_is_limited_too(server):
  with server.connect() as connection:
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
    head += "Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunk = b"2000\r\n" + b" " * 0x2000 + b"\r\n"
    connection.sendall(head.encode() + 3 * chunk + b"0\r\n\r\n")
    assert read(connection)[0] == 413


def test_a_body_that_does_not_come():
  with running(limits=Limits(body_secs=0.5)) as server, server.connect() as connection:
    lines = ["POST /v1/completions HTTP/1.1", "Host: x", "Content-Type: application/json"]
    lines += ["Connection: close", "Content-Length: 10", "", "{"]
    connection.sendall("\r\n".join(lines).encode())
    status, _, answer = read(connection)
    assert status == 408
    assert "must arrive within 0.5 s" in refusal(status, json.loads(answer))


def test_api_key():
  with running(api_key="sésame") as server:
    for headers in ((), ("Authorization: Bearer wrong",), ("Authorization: sésame",)):
      status, answer = server.post(GOOD, headers=headers)
      assert status == 401
      assert refusal(status, answer, "invalid_api_key")
    assert server.post(GOOD, headers=["Authorization: Bearer sésame"])[0] == 200
    assert server.raw("GET", "/v1/models")[0] == server.raw("GET", "/metrics")[0] == 401
    assert server.raw("GET", "/health")[0] == 200
    with pytest.raises(openai.AuthenticationError):
      server.client().models.list()


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_takes_its_rows_along(stream):
  with running(FakeBatcher(secs_per_step=0.1)) as server:  # the rows' own end takes 20 s
    with server.connect() as connection:
      body = json.dumps(LONG | {"n": 2, "stream": stream}).encode()
      send(connection, "POST", "/v1/completions", body)
      wait_until(lambda: server.batcher.num_running == 2)
      if stream:
        read_some(connection)
    wait_until(lambda: server.batcher.num_running == 0)
    assert len(server.batcher.cancelled) == 2
    assert server.metric("dsmoe_vanished_clients_total") == 1
    assert server.post(GOOD)[0] == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_while_it_waits(stream):
  with running() as server:
    server.batcher.held.set()
    with server.connect() as connection:
      send(connection, "POST", "/v1/completions", json.dumps(LONG | {"stream": stream}).encode())
      wait_until(lambda: server.batcher.num_waiting == 1)
    wait_until(lambda: server.batcher.num_waiting == 0)
    server.batcher.held.clear()
    assert server.post(GOOD)[0] == 200


def test_a_full_queue():
  with running(max_rows=2, max_queue=1) as server:
    server.batcher.held.set()
    connections = [server.connect() for _ in range(3)]
    for connection in connections:
      send(connection, "POST", "/v1/completions", json.dumps(GOOD).encode())
    wait_until(lambda: server.batcher.num_waiting == 3)
    status, headers, answer = server.raw("POST", "/v1/completions", json.dumps(GOOD).encode())
    assert status == 429 and int(headers["retry-after"]) >= 1
    assert "3 of at most 3" in refusal(status, json.loads(answer), "rate_limit_exceeded")
    with pytest.raises(openai.RateLimitError):
      server.client().completions.create(**GOOD)
    status, answer = server.post(GOOD | {"n": 4})
    assert status == 400 and "at most 3" in refusal(status, answer, None, "prompt")
    server.batcher.held.clear()
    for connection in connections:  # nobody who had a place lost it
      status, _, answer = read(connection)
      assert status == 200 and json.loads(answer)["usage"]["completion_tokens"] == 4
    assert server.client(max_retries=2).completions.create(**GOOD).choices[0].text


def test_rows_of_a_refused_request_do_not_stay():
  with running(max_rows=2, max_queue=2) as server:
    server.batcher.held.set()
    assert server.post(GOOD | {"prompt": [[5], [6], [999]]})[0] == 400
    assert server.batcher.num_waiting == 0
    server.batcher.held.clear()
    assert server.post(GOOD | {"n": 4})[0] == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_takes_too_long(stream):
  with running(limits=Limits(request_secs=1)) as server:  # in which the request must be read
    server.batcher.held.set()
    status, _, answer = server.raw(
      "POST", "/v1/completions", json.dumps(GOOD | {"stream": stream}).encode()
    )
    assert status == (200 if stream else 504) and b"not answered within 1 s" in answer
    assert server.batcher.num_waiting == 0
    assert server.metric("dsmoe_vanished_clients_total") == 0


def test_limits_must_be_positive():
  with pytest.raises(ValueError, match="body_secs must be positive, got 0"):
    Limits(body_secs=0)
  with pytest.raises(ValueError, match="a name and 1 to 8 stop tokens, got 'tiny' and"):
    served_model(stop_tokens=())


def test_a_failing_batcher_ends_every_request():
  with running(FakeBatcher(secs_per_step=0.1)) as server:  # no request ends before the failure
    results = []

    def ask(stream):
      results.append(server.raw("POST", "/v1/completions", json.dumps(stream).encode()))

    threads = [
      threading.Thread(target=ask, args=(LONG | {"stream": stream},))
      for stream in (False, True, False, True, False, True)  # two of them wait
    ]
    for thread in threads:
      thread.start()
    wait_until(lambda: len(server.batcher.submitted) == 6)
    assert server.raw("GET", "/health")[0] == 200
    server.batcher.failure = RuntimeError("out of memory")
    for thread in threads:
      thread.join(60)
    assert sorted(status for status, _, _ in results) == [200] * 3 + [500] * 3
    for _, _, answer in results:
      assert b'"code":"engine_failed"' in answer and b"[DONE]" not in answer
    status, _, answer = server.raw("GET", "/health")
    assert status == 503 and json.loads(answer)["status"] == "failed"
    assert server.post(GOOD)[0] == 500
    with pytest.raises(openai.APIError, match="generation failed: RuntimeError"):
      list(server.client().completions.create(**GOOD, stream=True))


def start_process(drain_secs):
  """Starts a server of its own; returns the process and a way to it."""
  process = runs.start("-m", "tests.serving.running_server", drain_secs)
  port = int(re.search(r":(\d+)$", process.stdout.readline().strip()).group(1))
  return process, Running(None, port, None)


def read_some(connection):
  """Reads a stream until some of its text has come."""
  data = b""
  while b"data: " not in data:
    part = connection.recv(4096)
    assert part, data
    data += part


def ask_streaming(server, max_tokens=500):
  """Begins a long stream; returns its connection once text has come."""
  connection = server.connect()
  body = LONG | {"stream": True, "max_tokens": max_tokens}
  send(connection, "POST", "/v1/completions", json.dumps(body).encode())
  read_some(connection)
  return connection


def test_a_signal_finishes_what_runs_and_refuses_the_rest():
  process, server = start_process(30)
  connection = ask_streaming(server, 300)
  process.send_signal(signal.SIGTERM)
  wait_until(lambda: server.raw("GET", "/health")[0] == 503)
  assert json.loads(server.raw("GET", "/health")[2])["status"] == "draining"
  status, headers, answer = server.raw("POST", "/v1/completions", json.dumps(GOOD).encode())
  assert status == 503 and headers["retry-after"]
  assert json.loads(answer)["error"]["code"] == "draining"
  with pytest.raises(urllib.error.HTTPError, match="503"):
    urllib.request.urlopen(f"{server.url}/v1/models")
  rest = b""
  while part := connection.recv(65536):
    rest += part
  assert b"[DONE]" in rest and b'"finish_reason":"length"' in rest
  code, _, err = runs.finish(process)
  assert code == 0 and "Traceback" not in err, err


def test_what_is_not_finished_in_time_gets_an_error():
  process, server = start_process(0.2)
  connection = ask_streaming(server)
  process.send_signal(signal.SIGTERM)
  rest = b""
  while part := connection.recv(65536):
    rest += part
  assert b"shutting down" in rest and b"[DONE]" not in rest
  code, _, err = runs.finish(process)
  assert code == 0 and "Traceback" not in err, err


def test_a_second_signal_tells_those_who_wait():
  process, server = start_process(30)
  streaming = ask_streaming(server)
  waiting, sending = server.connect(), server.connect()
  send(waiting, "POST", "/v1/completions", json.dumps(LONG).encode())
  lines = ["POST /v1/completions HTTP/1.1", "Host: x", "Content-Type: application/json"]
  sending.sendall("\r\n".join([*lines, "Content-Length: 10", "", "{"]).encode())
  wait_until(lambda: server.metric("dsmoe_running_rows") == 2)
  process.send_signal(signal.SIGTERM)
  wait_until(lambda: server.raw("GET", "/health")[0] == 503)
  started = time.monotonic()
  process.send_signal(signal.SIGTERM)
  for connection in (waiting, sending):
    status, _, answer = read(connection)
    assert status == 503 and "shutting down" in json.loads(answer)["error"]["message"]
  rest = b""
  while part := streaming.recv(65536):
    rest += part
  assert b"shutting down" in rest and b"[DONE]" not in rest
  code, _, err = runs.finish(process)
  assert code == 0 and "Traceback" not in err, err
  assert time.monotonic() - started < 25  # of the 30 s that the first signal leaves


def is_closed(connection) -> bool:
  """Waits for what a server says on a connection; it resets one of which it had not read all."""
  try:
    return connection.recv(100) == b""
  except ConnectionResetError:
    return True


def test_idle_connections_keep_nobody_out():
  with running(max_queue=4) as server:  # with 8 places 272 connections are kept
    idle = [server.connect() for _ in range(330)]
    for connection in idle[::2]:
      connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost:")
    for path in ("/health", "/metrics", "/v1/models"):
      assert server.raw("GET", path)[0] == 200
    assert server.post(GOOD)[0] == 200
    assert is_closed(idle[0])  # the oldest had to go
    idle[-1].sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert read(idle[-1])[0] == 200
    for connection in idle:
      connection.close()


def test_connections_without_a_whole_header_are_closed():
  with running(limits=Limits(idle_secs=1)) as server:
    used, silent, slow = (server.connect() for _ in range(3))
    used.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
    answer = b""
    while not answer.endswith(b"}"):
      part = used.recv(4096)
      assert part, answer
      answer += part
    for _ in range(6):  # a byte now and then does not help
      with contextlib.suppress(ConnectionError):  # where the time has passed already
        slow.sendall(b"G")
        used.sendall(b"G")
      time.sleep(0.05)
    for connection in (silent, slow, used):
      connection.settimeout(15)  # less than a server waits by default
      assert is_closed(connection)
    assert server.post(LONG)[0] == 200


def test_an_answer_that_nobody_reads_is_given_up(monkeypatch):
  """Of any kind: whole ones too, larger than what the system keeps for the client."""
  monkeypatch.setattr(streams, "SEND_SECS", 0.3)
  limits = Limits(idle_secs=0.3, body_secs=1, request_secs=3)
  batcher = FakeBatcher(max_tokens_per_row=10**6)
  longest = TOKENIZER.token_to_id(max(TOKENIZER.get_vocab(), key=len))
  body = GOOD | {"prompt": [[longest] * 20_000] * 30, "echo": True, "max_tokens": 0}
  with running(batcher, limits=limits, max_tokens_per_row=10**6) as server:
    with server.connect() as connection:
      send(connection, "POST", "/v1/completions", json.dumps(body).encode())
      wait_until(lambda: server.http.server_state.tasks)
      wait_until(lambda: not server.http.server_state.connections)
    assert server.post(GOOD)[0] == 200


def test_more_requests_than_can_be_read():
  with running(max_rows=1, max_queue=0, limits=Limits(body_secs=20)) as server:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n"
    head += b"Content-Type: application/json\r\n\r\n{"
    slow = [server.connect() for _ in range(2)]
    for connection in slow:
      connection.sendall(head)
    wait_until(lambda: len(server.http.server_state.tasks) == 2)
    status, answer = server.post(GOOD)
    assert status == 429
    assert "2 of at most 2 requests" in refusal(status, answer, "rate_limit_exceeded")
    assert server.raw("GET", "/health")[0] == server.raw("GET", "/metrics")[0] == 200
    for connection in slow:
      connection.close()
    wait_until(lambda: server.post(GOOD)[0] == 200)
