"""Tests of dsmoe/serving: answers, as the official client and raw sockets see them."""

import concurrent.futures
import math

import openai
import pytest

from dsmoe.serving import requests
from tests.serving.fake_batcher import FakeBatcher, continuation, logprob
from tests.serving.running_server import TOKENIZER, running, served_model


@pytest.fixture(scope="module")
def server():
  with running() as result:
    yield result


@pytest.fixture(scope="module")
def client(server):
  return server.client()


def encode(text):
  return TOKENIZER.encode(text, add_special_tokens=False).ids


def expected(prompt, place=0, **values):
  """The fake's continuation of a prompt (text or ids), as the server should ask for it."""
  ids = encode(prompt) if isinstance(prompt, str) else prompt
  body = {"model": "tiny", "prompt": ids, "n": place + 1, "max_tokens": 16, "seed": 0} | values
  return continuation(ids, requests.parse(body, served_model(), False).choices[place].sampling)


def text(ids):
  return TOKENIZER.decode(ids)


def complete(client, prompt, **kwargs):
  return client.completions.create(**{"model": "tiny", "prompt": prompt, "seed": 0} | kwargs)


def chat(client, content="hello", **kwargs):
  messages = [{"role": "user", "content": content}]
  values = {"model": "tiny", "messages": messages, "seed": 0, "max_tokens": 20}
  return client.chat.completions.create(**values | kwargs)


CHAT_PROMPT = "<user>hello<assistant>"


def test_models(client):
  assert [model.id for model in client.models.list()] == ["tiny"]
  assert client.models.retrieve("tiny").id == "tiny"
  with pytest.raises(openai.NotFoundError, match="'huge' does not exist"):
    client.models.retrieve("huge")


def test_completion(client):
  answer = complete(client, "def f1(x):", max_tokens=7)
  [choice] = answer.choices
  assert choice.text == text(expected("def f1(x):", max_tokens=7))
  assert (choice.finish_reason, choice.index, choice.logprobs) == ("length", 0, None)
  assert answer.object == "text_completion" and answer.model == "tiny"
  assert answer.usage.prompt_tokens == len(encode("def f1(x):"))
  assert answer.usage.completion_tokens == 7
  assert answer.usage.total_tokens == answer.usage.prompt_tokens + 7


def test_prompts_of_every_form_and_choices_in_order(client):
  texts = ["return x", "def f2", "naïve"]
  ids = [encode(entry) for entry in texts]
  for prompt in (texts, ids):
    choices = complete(client, prompt, n=2, max_tokens=12).choices
    assert [choice.index for choice in choices] == list(range(6))
    for place, choice in enumerate(choices):
      seed = {"seed": place}  # each choice has a seed of its own
      assert choice.text == text(expected(texts[place // 2], max_tokens=12, **seed))
  assert complete(client, ids[0]).choices[0].text == text(expected(ids[0]))
  assert complete(client, "", max_tokens=3).usage.prompt_tokens == 1  # the end of a document


def test_each_prompt_is_read_once_whatever_n(server, client):
  before = server.batcher.num_prompts
  texts = ["def f", "def f", "return"]
  answer = client.completions.create(model="tiny", prompt=texts, n=5, seed=3, max_tokens=2)
  assert server.batcher.num_prompts - before == 3
  assert [choice.index for choice in answer.choices] == [*range(15)]
  for place, choice in enumerate(answer.choices):
    sampling = {"max_tokens": 2, "seed": 3 + place}
    assert choice.text == text(expected(texts[place // 5], **sampling))


def test_default_length_and_seed(server, client):
  del server.batcher.submitted[:]
  for _ in range(2):
    client.completions.create(model="tiny", prompt="def", temperature=0.5, top_p=0.25)
  first, second = (sampling for _, sampling in server.batcher.submitted)
  assert (first.max_tokens, first.temperature, first.top_p) == (16, 0.5, 0.25)
  assert first.seed != second.seed and first.stop_tokens == (0,)


def test_echo_with_logprobs_as_harnesses_ask(client):
  # One token more than is scored; the prompt's tokens carry the answer.
  prompt = [5, 300, 41, 42]
  [choice] = complete(client, prompt, max_tokens=1, logprobs=2, echo=True).choices
  ids = prompt + expected(prompt, max_tokens=1)
  assert choice.text == text(ids)
  assert choice.logprobs.token_logprobs == [None, *(logprob(i, 2).logprob for i in ids[1:])]
  assert "".join(choice.logprobs.tokens) == choice.text
  starts = [len(text(ids[:n])) for n in range(len(ids))]
  assert choice.logprobs.text_offset == starts
  assert choice.logprobs.top_logprobs[0] is None
  for token, top in zip(choice.logprobs.tokens[1:], choice.logprobs.top_logprobs[1:]):
    assert max(top, key=top.get) == token and len(top) == 2


def test_echo_alone(client):
  [choice] = complete(client, "naïve 日本語", max_tokens=0, logprobs=1, echo=True).choices
  assert choice.text == "naïve 日本語" and choice.finish_reason == "length"
  assert len(choice.logprobs.tokens) == len(encode("naïve 日本語"))
  [choice] = complete(client, "def f", max_tokens=4, echo=True).choices
  assert choice.text == "def f" + text(expected("def f", max_tokens=4))


def test_the_only_token_has_its_logprob_even_if_it_ends_the_text(client):
  # The fake repeats the last token of its prompt: here the end of a document.
  [choice] = complete(client, [40, 0], max_tokens=1, logprobs=1, echo=True).choices
  assert choice.finish_reason == "stop" and len(choice.logprobs.token_logprobs) == 3
  assert choice.text == text([40])
  [choice] = complete(client, [40, 0], max_tokens=5).choices
  assert (choice.text, choice.finish_reason) == ("", "stop")


def test_logprobs_of_tokens_that_are_no_characters(client):
  ids = encode("日🙄")
  [choice] = complete(client, ids, max_tokens=0, echo=True, logprobs=0).choices
  assert choice.text == "日🙄"
  spelt = [token for token in choice.logprobs.tokens if token.startswith("bytes:\\x")]
  assert len(spelt) >= 4 and choice.logprobs.text_offset[-1] == 1


def test_impossible_tokens_have_finite_logprobs():
  class Certain(FakeBatcher):
    def _advance(self, number, row):
      event = super()._advance(number, row)
      low = tuple(entry._replace(logprob=-math.inf) for entry in event.logprobs)
      return event._replace(logprobs=low)

  with running(Certain()) as server:
    [choice] = complete(server.client(), [40, 41], logprobs=0, max_tokens=2).choices
  assert choice.logprobs.token_logprobs == [-9999.0, -9999.0]


def streamed(stream):
  """Joins a stream's text by choice; returns it with the finish reasons and the last chunk."""
  texts, finishes, last = {}, {}, None
  for last in stream:
    for choice in last.choices:
      delta = choice.text if hasattr(choice, "text") else choice.delta.content
      texts[choice.index] = texts.get(choice.index, "") + (delta or "")
      assert choice.index not in finishes
      if choice.finish_reason:
        finishes[choice.index] = choice.finish_reason
  return texts, finishes, last


def test_completion_stream(client):
  whole = complete(client, ["def f", "naïve"], n=2, max_tokens=30)
  stream = complete(client, ["def f", "naïve"], n=2, max_tokens=30, stream=True)
  texts, finishes, _ = streamed(stream)
  assert texts == {choice.index: choice.text for choice in whole.choices}
  assert finishes == {choice.index: "length" for choice in whole.choices}


def test_stream_with_usage_and_logprobs(client):
  options = {"include_usage": True}
  stream = complete(client, "def f", logprobs=1, echo=True, stream=True, stream_options=options)
  chunks = list(stream)
  assert all(chunk.usage is None for chunk in chunks[:-1])
  assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 16
  whole = complete(client, "def f", logprobs=1, echo=True).choices[0]
  choices = [choice for chunk in chunks for choice in chunk.choices]
  assert "".join(choice.text for choice in choices) == whole.text
  for name in ("tokens", "token_logprobs", "text_offset", "top_logprobs"):
    parts = [value for choice in choices for value in getattr(choice.logprobs, name)]
    assert parts == getattr(whole.logprobs, name)


def test_chat(client):
  answer = chat(client)
  [choice] = answer.choices
  assert choice.message.role == "assistant" and choice.finish_reason == "length"
  assert choice.message.content == text(expected(CHAT_PROMPT, max_tokens=20))
  assert answer.usage.prompt_tokens == len(encode(CHAT_PROMPT))
  parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
  assert chat(client, parts).choices[0].message.content == choice.message.content


def test_chat_stream(client):
  stream = chat(client, n=2, stream=True, stream_options={"include_usage": True})
  chunks = list(stream)
  roles = [choice.delta.role for chunk in chunks for choice in chunk.choices if choice.delta.role]
  assert roles == ["assistant", "assistant"]
  texts, finishes, last = streamed(iter(chunks))
  for place, seed in ((0, 0), (1, 1)):
    assert texts[place] == text(expected(CHAT_PROMPT, max_tokens=20, seed=seed))
  assert finishes == {0: "length", 1: "length"} and last.usage.completion_tokens == 40


def test_chat_logprobs(client):
  [choice] = chat(client, logprobs=True, top_logprobs=2).choices
  ids = expected(CHAT_PROMPT, max_tokens=20)
  assert b"".join(bytes(entry.bytes) for entry in choice.logprobs.content) == text(ids).encode()
  assert [entry.logprob for entry in choice.logprobs.content] == [-i / 8 for i in ids]
  assert all(len(entry.top_logprobs) == 2 for entry in choice.logprobs.content)
  [choice] = chat(client, logprobs=True).choices
  assert all(entry.top_logprobs == [] for entry in choice.logprobs.content)


def test_chat_as_long_as_there_is_room(server, client):
  del server.batcher.submitted[:]
  chat(client, max_tokens=None)
  chat(client, max_tokens=None, max_completion_tokens=9)
  room = 512 - len(encode(CHAT_PROMPT))
  assert [sampling.max_tokens for _, sampling in server.batcher.submitted] == [room, 9]


def test_a_stop_string_ends_the_text_and_the_row(server, client):
  prompt = encode("return x * 1\n")
  full = text(expected(prompt, max_tokens=400))
  stop = full[9:12]
  for stops in (stop, ["never in there", stop]):
    [choice] = complete(client, prompt, max_tokens=400, stop=stops, logprobs=0).choices
    assert choice.text == full[: full.index(stop)] and choice.finish_reason == "stop"
    assert all(offset < len(choice.text) for offset in choice.logprobs.text_offset)
  stream = complete(client, prompt, max_tokens=400, stop=stop, stream=True)
  assert streamed(stream)[:2] == ({0: full[: full.index(stop)]}, {0: "stop"})
  assert server.batcher.num_running == 0


def test_what_may_begin_a_stop_string_comes_at_the_end(client):
  full = text(expected("def f", max_tokens=9))
  [choice] = complete(client, "def f", max_tokens=9, stop=full[-3:] + "!").choices
  assert choice.text == full and choice.finish_reason == "length"


def test_sixteen_clients_at_once_each_get_their_own_answer(server):
  def one(number):
    prompt = f"def f{number}(x): return {number * 7}"
    own = server.client()
    for turn in range(4):
      values = {"max_tokens": 20 + number, "seed": number * turn}
      if turn % 2:
        texts, finishes, _ = streamed(complete(own, prompt, n=2, stream=True, **values))
        assert finishes == {0: "length", 1: "length"}
      else:
        answer = complete(own, prompt, n=2, **values)
        texts = {choice.index: choice.text for choice in answer.choices}
      for place in range(2):
        seed = {"seed": number * turn + place}
        assert texts[place] == text(expected(prompt, **values | seed))
    return number

  with concurrent.futures.ThreadPoolExecutor(16) as pool:
    assert sorted(pool.map(one, range(16))) == list(range(16))
  assert server.batcher.num_running == server.batcher.num_waiting == 0


def test_metrics(server, client):
  names = ("dsmoe_new_tokens_total", "dsmoe_prompt_tokens_total", "dsmoe_request_secs_count")
  before = [server.metric(name) for name in names]
  complete(client, [7, 8, 9], max_tokens=11)
  grown = [server.metric(name) - old for name, old in zip(names, before)]
  assert grown == [11, 3, 1]
  assert server.metric("dsmoe_batcher_cache_pages") == 64
  assert server.metric("dsmoe_batcher_new_tokens_total") == 7
  assert server.metric("dsmoe_queue_length") == server.metric("dsmoe_running_rows") == 0
  assert server.metric("dsmoe_first_token_secs_count") >= 1
  assert server.metric('dsmoe_requests_total{route="/v1/completions",status="200"}') >= 1
  server.raw("GET", "/some/where")
  assert server.metric('dsmoe_requests_total{route="other",status="404"}') >= 1


def test_settings_arrive():
  body = {"model": "tiny", "prompt": [1, 2], "temperature": 0, "top_p": 0, "top_k": 3, "min_p": 0.5}
  body |= {"repetition_penalty": 1.5, "seed": -1, "logprobs": 4, "echo": True, "max_tokens": 9}
  [(prompt, sampling)] = requests.parse(body, served_model(), False).choices
  assert prompt == [1, 2] and sampling.seed == 2**63 - 1 and 0 < sampling.top_p < 1e-6
  assert (sampling.temperature, sampling.top_k, sampling.min_p) == (0, 3, 0.5)
  assert (sampling.repetition_penalty, sampling.logprobs) == (1.5, 4)
  assert sampling.prompt_logprobs and sampling.max_tokens == 9


def test_a_prefix_goes_before_text_only():
  served = served_model(prefix=(3,))
  for prompt, ids in (("def", [3, *encode("def")]), ([9], [9]), ("", [3])):
    body = {"model": "tiny", "prompt": prompt}
    assert requests.parse(body, served, False).choices[0].prompt == ids


def test_special_tokens_are_added_once_and_when_asked_for():
  served = served_model(prefix=(3,))

  def prompt_of(prompt, **fields):
    body = {"model": "tiny", "prompt": prompt, **fields}
    return requests.parse(body, served, False).choices[0].prompt

  mark = TOKENIZER.id_to_token(3)
  assert prompt_of(mark + "def") == prompt_of("def") == [3, *encode("def")]
  assert prompt_of("def", add_special_tokens=True) == [3, *encode("def")]
  assert prompt_of("def", add_special_tokens=False) == encode("def")
  assert prompt_of(mark + "def", add_special_tokens=False) == [3, *encode("def")]
  assert prompt_of([9], add_special_tokens=True) == [9]
  chat = {"model": "tiny", "messages": [{"role": "user", "content": "def"}]}
  plain = requests.parse(chat, served, True).choices[0].prompt
  assert (
    requests.parse(chat | {"add_special_tokens": False}, served, True).choices[0].prompt == plain
  )
  added = requests.parse(chat | {"add_special_tokens": True}, served, True).choices[0].prompt
  assert added == [3, *plain]
  with pytest.raises(requests.ApiError, match="add_special_tokens must be a boolean, got 1"):
    prompt_of("def", add_special_tokens=1)


def parsed(is_chat=False, served=None, **fields):
  body = {"model": "tiny"} | ({"messages": MESSAGES} if is_chat else {"prompt": [1, 2]})
  return requests.parse(body | fields, served or served_model(), is_chat)


MESSAGES = [{"role": "user", "content": "hello"}]


def test_settings_of_vllm_arrive():
  request = parsed(
    top_k=-1,
    presence_penalty=1.5,
    frequency_penalty=-2,
    logit_bias={"7": -100, "9": 2.5},
    min_tokens=3,
    stop_token_ids=[5, 0, 5],
    stop=[str(i) for i in range(9)],
    add_special_tokens=False,
    spaces_between_special_tokens=False,
    use_beam_search=False,
    length_penalty=1.0,
    best_of=1,
  )
  [(_, sampling)] = request.choices
  assert (sampling.top_k, sampling.presence_penalty, sampling.frequency_penalty) == (0, 1.5, -2)
  assert sampling.logit_bias == ((7, -100.0), (9, 2.5)) and sampling.min_tokens == 3
  assert sampling.stop_tokens == request.ends == (0, 5) and len(request.stops) == 9
  assert parsed(stop="").stops == () == parsed(stop=None).stops
  request = parsed(ignore_eos=True, stop_token_ids=[4])
  assert request.ends == request.choices[0].sampling.stop_tokens == (4,)


def test_prompts_are_cut_from_the_left():
  ids = list(range(5, 30))
  served = served_model(max_tokens_per_row=20, prefix=(3,))

  def prompt(**fields):
    return parsed(served=served, max_tokens=4, **fields).choices[0].prompt

  assert prompt(prompt=ids, truncate_prompt_tokens=7) == ids[-7:]
  assert prompt(prompt=ids[:5], truncate_prompt_tokens=7) == ids[:5]
  assert prompt(prompt=ids, truncate_prompt_tokens=-1) == ids[-16:]  # with 4 more there are 20
  text = "def f1(x): return x"
  whole = encode(text)
  assert prompt(prompt=text, truncate_prompt_tokens=5) == [3, *whole[-4:]]
  assert prompt(prompt=text, truncate_prompt_tokens=1) == whole[-1:]
  chat = parsed(True, served, max_tokens=4, truncate_prompt_tokens=6).choices[0].prompt
  assert chat == encode(CHAT_PROMPT)[-6:]


def test_special_tokens_of_prompts():
  served = served_model(prefix=(3,))
  assert parsed(served=served, prompt="def").choices[0].prompt == [3, *encode("def")]
  plain = parsed(served=served, prompt="def", add_special_tokens=False).choices[0].prompt
  assert plain == encode("def")
  begun = TOKENIZER.id_to_token(3) + "def"  # has one already
  assert parsed(served=served, prompt=begun).choices[0].prompt == [3, *encode("def")]
  assert parsed(True, served).choices[0].prompt == encode(CHAT_PROMPT)
  prompt = parsed(True, served, add_special_tokens=True).choices[0].prompt
  assert prompt == [3, *encode(CHAT_PROMPT)]
  prompt = parsed(True, served, add_generation_prompt=False).choices[0].prompt
  assert prompt == encode("<user>hello")


def test_the_end_of_a_document_can_be_ignored_and_shown(client):
  # The fake goes through its prompt backwards, again and again.
  answer = complete(client, [40, 0], max_tokens=5, extra_body={"ignore_eos": True})
  [choice] = answer.choices
  assert (choice.text, choice.finish_reason) == (text([0, 40, 0, 40, 0]), "length")
  assert answer.usage.completion_tokens == 5
  shown = {"ignore_eos": True, "skip_special_tokens": False}
  [choice] = complete(client, [40, 0], max_tokens=3, extra_body=shown).choices
  assert choice.text == f"<|endoftext|>{text([40])}<|endoftext|>"
  # A stop token has no text either way.
  shown = {"stop_token_ids": [41], "skip_special_tokens": False}
  [choice] = complete(client, [41, 42, 43], max_tokens=9, extra_body=shown).choices
  assert (choice.text, choice.finish_reason) == (text([43, 42]), "stop")


def test_usage_counts_up_to_the_token_that_completes_a_stop_string(server, client):
  prompt = encode("return x * 1\n")
  ids = expected(prompt, max_tokens=400)
  names = ("dsmoe_new_tokens_total", "dsmoe_surplus_tokens_total")
  surplus = 0
  for start in range(3, 11):
    stop = text(ids)[start : start + 3]
    counted = next(n for n in range(1, 400) if stop in text(ids[:n]))
    before = [server.metric(name) for name in names]
    answer = complete(client, prompt, max_tokens=400, stop=stop)
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == counted
    assert answer.usage.total_tokens == len(prompt) + counted
    grown = [server.metric(name) - old for name, old in zip(names, before)]
    assert grown[0] == counted
    surplus += grown[1]
    options = {"include_usage": True}
    *_, last = complete(
      client, prompt, max_tokens=400, stop=stop, stream=True, stream_options=options
    )
    assert last.usage.completion_tokens == counted
  assert surplus > 0  # the fake, too, generates several tokens at once


def test_no_stop_string_ends_a_text_before_min_tokens(client):
  prompt = encode("return x * 1\n")
  ids = expected(prompt, max_tokens=60)
  stop = text(ids)[:2]
  answer = complete(client, prompt, max_tokens=60, stop=stop, extra_body={"min_tokens": 20})
  kept = text(ids[:20])
  end = text(ids).index(stop, len(kept) - len(stop) + 1)
  assert answer.choices[0].text == text(ids)[:end] and end > 2
  assert complete(client, prompt, max_tokens=60, stop=stop).choices[0].text == ""


def test_prompt_logprobs_in_the_form_of_vllm(server, client):
  prompt = [5, 300, 41]
  body = {"model": "tiny", "prompt": prompt, "prompt_logprobs": 2, "max_tokens": 2}
  _, answer = server.post(body)
  [choice] = answer["choices"]
  assert choice["logprobs"] is None  # nobody asked for those of new tokens
  first, *rest = choice["prompt_logprobs"]
  assert first is None and len(rest) == 2
  for token, ranked in zip(prompt[1:], rest):
    assert list(ranked) == [str(token), str(token + 1)]
    value = logprob(token, 2)
    assert ranked[str(token)] == {
      "logprob": value.logprob,
      "rank": value.rank,
      "decoded_token": TOKENIZER.decode([token]),
    }
  _, answer = server.post(body | {"logprobs": 3, "echo": True, "prompt_logprobs": 0})
  [choice] = answer["choices"]
  assert [len(ranked) for ranked in choice["prompt_logprobs"][1:]] == [1, 1]
  assert [len(top) for top in choice["logprobs"]["top_logprobs"][1:]] == [3] * 4
  chat_body = {"model": "tiny", "messages": MESSAGES, "prompt_logprobs": 1, "max_tokens": 2}
  _, answer = server.post(chat_body, "/v1/chat/completions")
  assert len(answer["prompt_logprobs"]) == len(encode(CHAT_PROMPT))
  status, answer = server.post(body | {"stream": True})
  assert status == 400 and answer["error"]["param"] == "prompt_logprobs"


@pytest.mark.parametrize(
  "fields",
  [
    # lm-eval's local-completions for humaneval, and a client of vLLM's issue 6521.
    {
      "temperature": 0,
      "seed": 1234,
      "max_tokens": 16,
      "stop": ["\nclass", "\n#", "\nif", "\nprint", "\n```", "\n```\n\n", "<|eot_id|>", "</s>"]
      + ["<|endoftext|>"],
    },
    {"temperature": 0, "top_p": 1.0, "top_k": -1, "best_of": 1, "repetition_penalty": 1.0}
    | {"max_tokens": 0, "n": 1, "echo": True, "logprobs": 1},
  ],
)
def test_requests_of_published_clients(server, fields):
  status, answer = server.post({"model": "tiny", "prompt": "def f(x):\n"} | fields)
  assert status == 200 and answer["choices"][0]["finish_reason"] in ("length", "stop")
