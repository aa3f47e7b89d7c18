"""Tests of dsmoe/serving/requests.py through HTTP: each wrong request is refused by name."""

import concurrent.futures
import json
import threading

import pytest

from dsmoe.inference.chat import ChatTemplate
from dsmoe.serving import prompts, requests
from dsmoe.serving.fields import ApiError
from tests.serving.running_server import (
  CHAT,
  CHAT_PATH,
  GOOD,
  TOKENIZER,
  refusal,
  running,
  served_model,
)


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
  ("top_k", -2),
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
  ("stop", ["a"] * 65),
  ("stop", ["a", ""]),
  ("stop", [1]),
  ("stop", "\udfff"),
  ("stop", "x" * 257),
  ("stream_options", {"include_usage": True}),
  ("presence_penalty", 2.1),
  ("frequency_penalty", -3),
  ("frequency_penalty", "often"),
  ("logit_bias", [5]),
  ("logit_bias", {"five": 1}),
  ("logit_bias", {"5": 101}),
  ("logit_bias", {"5": "1"}),
  ("logit_bias", {"\u0665": 1}),
  ("logit_bias", {str(i): 1 for i in range(1025)}),
  ("min_tokens", -1),
  ("min_tokens", 5),
  ("min_tokens", 1.0),
  ("stop_token_ids", 5),
  ("stop_token_ids", [-1]),
  ("stop_token_ids", [True]),
  ("stop_token_ids", list(range(50, 60))),
  ("ignore_eos", 1),
  ("skip_special_tokens", "no"),
  ("add_special_tokens", 0),
  ("truncate_prompt_tokens", 0),
  ("truncate_prompt_tokens", -2),
  ("prompt_logprobs", 21),
  ("prompt_logprobs", -1),
  ("suffix", "end"),
  ("bad_words", ["no"]),
  ("use_beam_search", True),
  ("include_stop_str_in_output", True),
  ("no_such_field", 1),
]


@pytest.mark.parametrize("name, value", WRONG)
def test_wrong_fields_are_named(server, name, value):
  unsupported = ("suffix", "bad_words", "use_beam_search", "include_stop_str_in_output")
  lacking = name in unsupported or name.startswith("no_such")
  code = "unsupported_parameter" if lacking else None
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
  ("chat_template_kwargs", {"self": 1}),
  ("chat_template_kwargs", {"add_generation_prompt": False}),
  ("chat_template_kwargs", {"raise_exception": 1}),
  ("chat_template_kwargs", [1]),
  ("add_generation_prompt", "no"),
  ("continue_final_message", True),
  ("tools", [{"type": "function"}]),
  ("response_format", {"type": "json_object"}),
]


@pytest.mark.parametrize("name, value", WRONG_IN_CHAT)
def test_wrong_fields_of_chats_are_named(server, name, value):
  lacking = name in ("tools", "response_format", "continue_final_message")
  code = "unsupported_parameter" if lacking else None
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


@pytest.mark.parametrize(
  "body, at_most",
  [
    ({"prompt": ["x"] * 100_000, "n": 128}, 68),
    ({"prompt": [[5]] * 100_000, "n": 128}, 68),
    ({"prompt": ["x"] * 69}, 68),
    ({"prompt": "x", "n": 69}, 68),
  ],
)
def test_choices_are_counted_before_anything_is_encoded(server, monkeypatch, body, at_most):
  monkeypatch.setattr(prompts, "_encode", lambda *args: pytest.fail("it was encoded"))
  status, answer = server.post({"model": "tiny"} | body)
  assert status == 400
  assert f"must be at most {at_most}" in refusal(status, answer, None, "prompt")


@pytest.mark.parametrize("path, body", [("/v1/completions", GOOD), (CHAT_PATH, CHAT)])
def test_a_text_that_cannot_fit_is_not_encoded(server, monkeypatch, path, body):
  monkeypatch.setattr(prompts, "_encode", lambda *args: pytest.fail("it was encoded"))
  text = "x" * 100_000
  changes = {"prompt": text} if body is GOOD else {"messages": [{"role": "user", "content": text}]}
  status, answer = server.post(body | changes, path)
  name = "prompt" if body is GOOD else "messages"
  message = refusal(status, answer, "context_length_exceeded", name)
  assert status == 400 and f"the text of {name} must be at most" in message


def test_the_longest_text_that_can_fit_is_encoded():
  served = served_model(max_tokens_per_row=30)
  longest = max(TOKENIZER.get_vocab(), key=len)
  size = len(served.vocabulary.token_bytes(TOKENIZER.token_to_id(longest)))
  assert served.max_prompt_bytes == 30 * size
  ids = TOKENIZER.encode("x" * served.max_prompt_bytes).ids
  assert len(ids) > 30  # the rule is far from the limit for most texts


def test_the_event_loop_goes_on_while_a_text_is_encoded(server, monkeypatch):
  """Encoding holds no lock that other threads need."""
  begun, release = threading.Event(), threading.Event()
  encode = prompts._encode

  def slow(*args):
    begun.set()
    assert release.wait(20)
    return encode(*args)

  monkeypatch.setattr(prompts, "_encode", slow)
  with concurrent.futures.ThreadPoolExecutor() as pool:
    answers = [pool.submit(server.post, GOOD | {"prompt": "def"}) for _ in range(4)]
    assert begun.wait(20)
    assert server.raw("GET", "/health")[0] == server.raw("GET", "/metrics")[0] == 200
    release.set()
    assert [answer.result()[0] for answer in answers] == [200] * 4


@pytest.mark.parametrize("name", ["no_such_field", "stop", "messages", "logit_bias", "prompt"])
def test_values_of_very_many_levels(server, name):
  for depth in (300, 480, 900, 990):
    deep = "[" * depth + "]" * depth
    body = f'{{"model": "tiny", "prompt": [5], "{name}": {deep}}}'.encode()
    status, _, answer = server.raw("POST", "/v1/completions", body)
    assert status == 400 and "error" in json.loads(answer)
  deep = '{"a":' * 400 + "1" + "}" * 400
  body = f'{{"model": "tiny", "max_tokens": 4, "chat_template_kwargs": {{"a": {deep}}}, '
  body += '"messages": [{"role": "user", "content": "x"}]}'
  assert server.raw("POST", CHAT_PATH, body.encode())[0] in (200, 400)


def test_an_endless_template_is_refused_and_the_server_goes_on():
  with running(template=ChatTemplate("{{ messages[0].content * 10 ** 9 }}")) as other:
    status, answer = other.post(CHAT, CHAT_PATH)
    assert status == 400
    assert "more than 512 MiB of memory" in refusal(status, answer, None, "messages")
    assert other.post(GOOD)[0] == 200


def test_log_probabilities_of_prompts_are_counted():
  """A small request could ask for gigabytes of them."""
  body = {"model": "tiny", "prompt": [[5] * 500] * 68, "max_tokens": 0, "echo": True}
  served = served_model()
  assert len(requests.parse(body | {"logprobs": 20}, served, False).choices) == 68
  for fields in ({"logprobs": 20, "n": 3}, {"prompt_logprobs": 20, "n": 3, "echo": False}):
    with pytest.raises(ApiError, match="must be at most 2097152, got 2142000"):
      requests.parse(body | fields, served, False)
  assert len(requests.parse(body | {"n": 3}, served, False).choices) == 204
