"""Tests of dsmoe/serving/requests.py through HTTP: each wrong request is refused by name."""

import json

import pytest

from tests.serving.running_server import CHAT, CHAT_PATH, GOOD, refusal, running


@pytest.fixture(scope="module")
def server():
  with running() as result:
    yield result


@pytest.mark.parametrize(
  "body",
  [
    *(b"", b"{", b"[1]", b'"x"', b"null", b"\xff\xfe{}", b'{"model": NaN}', b"[" * 5000),
    *(b'{"model": "tiny", "prompt": "a"} x', b'{"n": ' + b"1" * 5000 + b"}"),
  ],
)
def test_malformed_json(server, body):
  status, _, answer = server.raw("POST", "/v1/completions", body)
  assert status == 400 and "JSON" in refusal(status, json.loads(answer))


WRONG = [
  ("model", 5),
  ("prompt", []),
  ("prompt", {}),
  ("prompt", 7),
  ("prompt", [[]]),
  ("prompt", [[1], "a", 2]),
  ("prompt", [1, True]),
  ("prompt", [1, 2.0]),
  ("prompt", [5, 400]),
  ("prompt", [-1]),
  ("prompt", "half \ud800 a pair"),
  ("max_tokens", -1),
  ("max_tokens", 1.5),
  ("max_tokens", "4"),
  ("max_tokens", True),
  ("temperature", 2.1),
  ("temperature", -0.1),
  ("temperature", "hot"),
  ("temperature", True),
  ("temperature", 10**400),
  ("top_p", 1.01),
  ("min_p", -1),
  ("top_k", -1),
  ("repetition_penalty", 0),
  ("n", 0),
  ("n", 129),
  ("best_of", 3),
  ("seed", 2**63),
  ("seed", 0.5),
  ("logprobs", 21),
  ("logprobs", True),
  ("echo", "yes"),
  ("stream", 1),
  ("stop", ["a", "b", "c", "d", "e"]),
  ("stop", ""),
  ("stop", [1]),
  ("stop", "\udfff"),
  ("stop", "x" * 257),
  ("stream_options", {"include_usage": True}),
  ("presence_penalty", 0.5),
  ("frequency_penalty", -1),
  ("logit_bias", {"5": 1}),
  ("suffix", "end"),
  ("no_such_field", 1),
]


@pytest.mark.parametrize("name, value", WRONG)
def test_wrong_fields_are_named(server, name, value):
  unsupported = name in ("presence_penalty", "frequency_penalty", "logit_bias", "suffix")
  code = "unsupported_parameter" if unsupported or name.startswith("no_such") else None
  status, answer = server.post(GOOD | {name: value})
  if name == "model":
    status, code = status - 4, "model_not_found"
  assert status == 400
  assert refusal(status, answer, code, name)


WRONG_IN_CHAT = [
  ("messages", []),
  ("messages", "hi"),
  ("messages", [{"role": "robot", "content": "x"}]),
  ("messages", [{"role": "user"}]),
  ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]),
  ("messages", [{"role": "user", "content": "\ud83d"}]),
  ("max_tokens", 0),
  ("max_completion_tokens", 0),
  ("top_logprobs", 2),
  ("chat_template_kwargs", {"messages": []}),
  ("tools", [{"type": "function"}]),
  ("response_format", {"type": "json_object"}),
]


@pytest.mark.parametrize("name, value", WRONG_IN_CHAT)
def test_wrong_fields_of_chats_are_named(server, name, value):
  code = "unsupported_parameter" if name in ("tools", "response_format") else None
  status, answer = server.post(CHAT | {name: value}, CHAT_PATH)
  assert status == 400
  if name == "messages":
    assert "messages" in answer["error"]["message"]
  else:
    refusal(status, answer, code, name)


def test_fields_that_change_nothing_are_accepted(server):
  neutral = {"user": "me", "presence_penalty": 0, "logit_bias": {}, "suffix": None, "best_of": 1}
  neutral |= {"metadata": {"a": "b"}, "stop": None, "temperature": None, "stream_options": None}
  assert server.post(GOOD | neutral)[0] == 200
  neutral = {"tools": [], "tool_choice": "auto", "response_format": {"type": "text"}}
  assert server.post(CHAT | neutral, CHAT_PATH)[0] == 200


def test_odd_names_come_back_as_text(server):
  status, answer = server.post(GOOD | {"\ud800": 1})
  assert status == 400 and "\\ud800" in answer["error"]["message"]
  status, answer = server.post(GOOD | {"model": "\ud800"})
  assert status == 404 and "\\ud800" in answer["error"]["message"]


def test_a_template_may_refuse(server):
  status, answer = server.post(
    CHAT | {"chat_template_kwargs": {"system_is_wanted": True}}, CHAT_PATH
  )
  assert status == 400
  assert "there must be a system message" in refusal(status, answer, None, "messages")
  with running(template=None) as other:
    status, answer = other.post(CHAT, CHAT_PATH)
    assert status == 400 and "no chat template" in answer["error"]["message"]


@pytest.mark.parametrize("path, body", [("/v1/completions", GOOD), (CHAT_PATH, CHAT)])
def test_context_length(server, path, body):
  status, answer = server.post(body | {"max_tokens": 512}, path)
  param = "prompt" if body is GOOD else "messages"
  message = refusal(status, answer, "context_length_exceeded", param)
  assert status == 400 and "maximum context length is 512 tokens" in message
  assert server.post(GOOD | {"prompt": [5] * 508})[0] == 200
  assert server.post({"model": "tiny", "prompt": [5] * 511})[0] == 200  # the default gives way
  assert server.post({"model": "tiny", "prompt": [5] * 512})[0] == 400


def test_unknown_routes_and_methods(server):
  for method, path, status in (
    *(("GET", "/v2/x", 404), ("GET", "/v1/completions", 405), ("DELETE", "/v1/models", 405)),
    ("GET", "/v1/models/other", 404),
  ):
    got, _, answer = server.raw(method, path)
    assert got == status and json.loads(answer)["error"]["message"]
  assert server.post(GOOD, content_type="text/plain")[0] == 415
