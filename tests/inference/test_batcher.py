"""Requests that join, leave and share a cache get what each would get alone."""

import dataclasses
import functools
import itertools
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from dsmoe import checkpoint
from dsmoe import model as model_lib
from dsmoe.inference import batcher as batcher_lib
from dsmoe.inference import cache
from dsmoe.inference.sampling import Sampling
from tests import oracles
from tests.helpers import assert_close, mesh_of, random_model, random_parts, small_config

CONFIG = small_config(
  **{
    "model.num_hidden_layers": 2,
    "model.first_k_dense_replace": 1,
    "model.num_nextn_predict_layers": 1,
    "model.max_position_embeddings": 250,
  }
)
V = CONFIG.model.vocab_size
GREEDY = Sampling(max_tokens=11, temperature=0)
PAGES = 24
# Programs with drafts compile slowly.
WITHOUT_AND_WITH_DRAFTS = [False, pytest.param(True, marks=pytest.mark.slow)]


@functools.cache
def _parts():
  _, params, bias = random_parts(CONFIG, 0)
  return params, bias


def _batcher(speculate=False, **options):
  """Prompts in parts of 32 tokens, few pages: most of what can happen happens."""
  return batcher_lib.Batcher(CONFIG.model, *_parts(), _options(speculate, **options))


def _options(speculate=False, **options):
  page_bytes = cache.page_bytes(CONFIG.model, speculate)
  options = dict(max_rows=4, cache_bytes=PAGES * page_bytes, prompt_part_tokens=32) | options
  return batcher_lib.BatcherOptions(speculate=speculate, **options)


def _prompts(seed, lengths):
  rng = np.random.default_rng(seed)
  return [rng.integers(0, V, n).tolist() for n in lengths]


@functools.cache
def _model():
  return random_model(CONFIG, 0)


def _logits(tokens):
  """Of every position, by a full pass; padded so that few sizes are compiled."""
  padded = np.zeros((1, -(-len(tokens) // 64) * 64), np.int32)
  padded[0, : len(tokens)] = tokens
  return np.asarray(model_lib.logits(_model(), padded))[0, : len(tokens)]


def _is_greedy(prompt, new):
  logits = _logits([*prompt, *new])[len(prompt) - 1 : -1]
  return logits.argmax(axis=-1).tolist() == list(new)


def _drain(batcher, limit=400):
  """Steps to the end; returns each request's events."""
  events: dict[int, list[batcher_lib.Event]] = {}
  for _ in range(limit):
    for event in batcher.step():
      assert not (events.get(event.request) and events[event.request][-1].finish)
      events.setdefault(event.request, []).append(event)
    if not batcher.num_running and not batcher.num_waiting:
      return events
  raise AssertionError(f"still running after {limit} steps")


@pytest.mark.parametrize("speculate", WITHOUT_AND_WITH_DRAFTS)
def test_greedy_is_the_argmax_of_full_passes(speculate):
  """More prompts than rows and pages, of all lengths, one longer than a block of the cache."""
  prompts = _prompts(0, (5, 33, 140, 1, 17, 40, 64))
  batcher = _batcher(speculate)
  new = batcher_lib.generate(batcher, prompts, GREEDY)
  assert all(len(tokens) == 11 for tokens in new)
  for prompt, tokens in zip(prompts, new):
    assert _is_greedy(prompt, tokens)
  assert len({tuple(tokens) for tokens in new}) == len(prompts)
  stats = batcher.stats()
  assert stats["prompt_tokens"] == sum(map(len, prompts))
  assert stats["cache_pages_used"] == 0 and stats["cache_pages"] == PAGES
  assert (stats["drafts"] > 0) == speculate


def test_accepted_drafts_save_steps():
  """A model that always repeats a token is easy to draft for."""
  params, bias = _parts()
  params = dict(params, head=params["head"] * 0)  # equal logits: token 0, for ever
  batcher = batcher_lib.Batcher(CONFIG.model, params, bias, _options(speculate=True))
  [new] = batcher_lib.generate(batcher, [[7, 8]], dataclasses.replace(GREEDY, max_tokens=9))
  assert new == [0] * 9
  stats = batcher.stats()
  assert stats["drafts"] == stats["drafts_accepted"] == 4  # 1 + 4 x 2 tokens


@pytest.mark.parametrize("speculate", WITHOUT_AND_WITH_DRAFTS)
def test_a_known_beginning_is_not_computed_again(speculate):
  batcher = _batcher(speculate)
  [base] = _prompts(1, (50,))
  first = batcher_lib.generate(batcher, [base], GREEDY)[0]
  assert batcher.stats()["prefix_hit_tokens"] == 0
  longer = base[:48] + [3, 4, 5]
  answers = batcher_lib.generate(batcher, [base, longer, base[:40]], GREEDY)
  assert answers[0] == first
  for prompt, new in zip((base, longer, base[:40]), answers):
    assert _is_greedy(prompt, new)
  # The third page of `longer` is followed by another token than that of `base`.
  assert batcher.stats()["prefix_hit_tokens"] == 48 + 32 + 32
  assert batcher.stats()["prompt_tokens"] == 50 + 2 + 19 + 8


def test_one_requests_nan_stays_its_own():
  params, bias = _parts()
  params = dict(params, embed=params["embed"].copy())
  params["embed"][5] = np.nan
  batcher = batcher_lib.Batcher(CONFIG.model, params, bias, _options(prompt_part_tokens=512))
  fine = [1, 2, 3]
  expected = batcher_lib.generate(batcher, [fine], GREEDY)[0]
  beside = batcher_lib.generate(batcher, [[5] * 40, fine], GREEDY)[1]
  after = batcher_lib.generate(batcher, [fine], GREEDY)[0]
  assert beside == after == expected and len(set(expected)) > 1


@pytest.mark.parametrize("speculate", WITHOUT_AND_WITH_DRAFTS)
def test_sampled_text_does_not_depend_on_the_company(speculate):
  """The same request alone, later, beside others: equal tokens, since they follow its seed."""
  settings = Sampling(max_tokens=10, temperature=0.9, top_p=0.9, repetition_penalty=1.3, seed=5)
  prompt, *others = _prompts(2, (20, 9, 35, 3))
  alone = batcher_lib.generate(_batcher(speculate), [prompt], settings)[0]
  batcher = _batcher(speculate)
  for i, other in enumerate(others):
    batcher.submit(other, Sampling(max_tokens=15, seed=50 + i))
  batcher.step()
  request = batcher.submit(prompt, settings)
  events = _drain(batcher)
  assert [t for e in events[request] for t in e.tokens] == alone
  again = batcher_lib.generate(_batcher(speculate), [prompt], dataclasses.replace(settings, seed=6))
  assert again[0] != alone


def test_repetition_penalty_counts_prompt_and_answer():
  [prompt] = _prompts(3, (12,))
  settings = Sampling(max_tokens=12, temperature=0, repetition_penalty=1.8)
  new = batcher_lib.generate(_batcher(), [prompt], settings)[0]
  assert not _is_greedy(prompt, new)
  for i, token in enumerate(new):
    seen = [*prompt, *new[:i]]
    logits = _logits(seen)[-1].astype(np.float64)
    for t in set(seen):
      logits[t] = logits[t] / 1.8 if logits[t] > 0 else logits[t] * 1.8
    assert token == logits.argmax()


@pytest.mark.parametrize("speculate", [False, True])
def test_logprobs_are_those_of_full_passes(speculate):
  prompts = _prompts(4, (6, 45))
  settings = [
    Sampling(max_tokens=7, temperature=0.7, logprobs=3, prompt_logprobs=True),
    Sampling(max_tokens=0, logprobs=0, prompt_logprobs=True),
  ]
  batcher = _batcher(speculate)
  requests = [batcher.submit(*each) for each in zip(prompts, settings)]
  events = _drain(batcher)
  for prompt, s, request in zip(prompts, settings, requests):
    mine = events[request]
    new = [t for e in mine for t in e.tokens]
    assert len(new) == s.max_tokens and mine[-1].finish == "length"
    log_probs = np.log(np.array([oracles.softmax(row) for row in _logits([*prompt, *new])]))
    assert all(not e.prompt_logprobs for e in mine[1:])
    first, *rest = mine[0].prompt_logprobs
    assert first is None and len(rest) == len(prompt) - 1
    found = rest + [p for e in mine for p in e.logprobs]
    assert [p.token for p in found] == [*prompt[1:], *new]
    for i, p in enumerate(found):
      assert p.logprob == pytest.approx(log_probs[i, p.token], abs=1e-4)
      order = np.argsort(-log_probs[i])[: s.logprobs]
      assert [t for t, _ in p.top] == order.tolist()
      assert_close(np.array([x for _, x in p.top]), log_probs[i, order], "model_float32")


@pytest.mark.parametrize("speculate", [False, True])
def test_a_stop_token_ends_its_row_only_and_is_not_shown(speculate):
  prompts = _prompts(5, (8, 21))
  whole = batcher_lib.generate(_batcher(speculate), prompts, GREEDY)
  stop = whole[0][3]
  settings = dataclasses.replace(GREEDY, stop_tokens=(V - 1, stop), logprobs=0)
  batcher = _batcher(speculate)
  requests = [batcher.submit(p, settings) for p in prompts]
  events = _drain(batcher)
  for request, tokens in zip(requests, whole):
    cut = tokens[: tokens.index(stop)] if stop in tokens else tokens
    assert [t for e in events[request] for t in e.tokens] == cut
    assert sum(len(e.logprobs) for e in events[request]) == len(cut)
    assert events[request][-1].finish == ("stop" if stop in tokens else "length")


def test_cancelled_rows_leave_and_their_pages_are_used_again():
  batcher = _batcher()
  long = dataclasses.replace(GREEDY, max_tokens=200)
  running, waiting, later = (batcher.submit(p, long) for p in _prompts(6, (30, 40, 20)))
  seen = batcher.step()
  assert batcher.num_running == 1 and batcher.num_waiting == 2  # a row's pages are reserved
  assert {e.request for e in seen} <= {running}
  batcher.cancel(running)
  batcher.cancel(waiting)
  batcher.cancel(12345)
  events = _drain(batcher)
  assert list(events) == [later] and len([t for e in events[later] for t in e.tokens]) == 200
  assert batcher.stats()["cache_pages_used"] == 0
  batcher.cancel(later)  # over: nothing happens
  assert batcher.step() == []


def test_many_threads_submit_and_every_answer_is_their_own():
  batcher, answers = _batcher(), {}
  prompts = _prompts(7, tuple(range(3, 15)))
  requests: dict[int, int] = {}

  def submit(i):
    requests[i] = batcher.submit(prompts[i], dataclasses.replace(GREEDY, max_tokens=5))

  threads = [threading.Thread(target=submit, args=(i,)) for i in range(len(prompts))]
  for thread in threads:
    thread.start()
  assert batcher.wait(10)
  finished = set()
  while len(finished) < len(prompts):
    for event in batcher.step():
      assert event.request not in finished
      answers.setdefault(event.request, []).extend(event.tokens)
      if event.finish:
        finished.add(event.request)
  for thread in threads:
    thread.join()
  assert all(len(answer) == 5 for answer in answers.values())
  assert sorted(answers) == list(range(len(prompts)))
  assert all(_is_greedy(prompts[i], answers[r]) for i, r in requests.items())
  assert not batcher.wait(0.01)


@pytest.mark.parametrize(
  "prompt, settings, message",
  [
    ([], {}, "a prompt must have at least 1 token, got 0"),
    ([7, V], {}, rf"below vocab_size \({V}\), got {V}"),
    ([7, -1], {}, "got -1"),
    ([1] * 240, {"max_tokens": 11}, r"prompt \(240 tokens\) plus max_tokens \(11\) .* 250 tokens"),
    ([1], {"stop_tokens": tuple(range(9))}, "stop_tokens must be at most 8, got 9"),
    ([1], {"stop_tokens": (2**31,)}, rf"stop_tokens must be .* \({V}\), got 2147483648"),
    ([1], {"logit_bias": ((V, 1.0),)}, rf"logit_bias must be .* \({V}\), got {V}"),
  ],
)
def test_bad_requests_are_refused(prompt, settings, message):
  batcher = _batcher()
  with pytest.raises(ValueError, match=message):
    batcher.submit(prompt, Sampling(**settings))
  assert batcher.num_waiting == 0


def test_requests_with_one_prompt_read_it_once(monkeypatch):
  """128 choices of a long prompt would hold up a server's event loop for seconds."""
  batcher, read = _batcher(), []
  page_keys = cache.page_keys
  monkeypatch.setattr(cache, "page_keys", lambda prompt: read.append(prompt) or page_keys(prompt))
  [prompt] = _prompts(12, (40,))
  with pytest.raises(ValueError, match=r"prompt .40 tokens. plus max_tokens"):
    batcher.submit_all(prompt, [GREEDY, dataclasses.replace(GREEDY, max_tokens=10**6)])
  assert (batcher.num_waiting, read) == (0, [])
  numbers = batcher.submit_all(prompt, [dataclasses.replace(GREEDY, seed=i) for i in range(3)])
  assert (len({*numbers}), batcher.num_waiting, read) == (3, 3, [prompt])


def test_the_weights_of_a_loaded_run_are_in_memory_once():
  others = {id(x) for x in jax.live_arrays()}
  params, bias = jax.device_put(_parts(), jax.devices()[0])
  run = checkpoint.LoadedRun(CONFIG, epath.Path("none"), params, bias, mesh_of(1), 0)
  del params, bias
  batcher = batcher_lib.make(run, _options())
  own = {id(x) for x in jax.tree.leaves((batcher._programs.weights, batcher._programs.kept))}
  assert sum(x.nbytes for x in jax.live_arrays() if id(x) not in own | others) == 0
  assert len(own) > 20 and run.params is None


def test_bad_options_are_refused():
  with pytest.raises(ValueError, match="prompts must have at least 1 prompt, got 0"):
    batcher_lib.generate(_batcher(), [], GREEDY)
  for options, message in (
    ({"max_rows": 0}, "max_rows must be at least 1, got 0"),
    ({"steps_per_round": 0}, "steps_per_round must be at least 1, got 0"),
    ({"prompt_part_tokens": 24}, "must be a power of two of at least 16, got 24"),
    ({"cache_bytes": 10}, r"cache_bytes \(10\) must be at least the size of a page"),
  ):
    with pytest.raises(ValueError, match=message):
      _batcher(**options)


@pytest.mark.parametrize("speculate", WITHOUT_AND_WITH_DRAFTS)
@pytest.mark.parametrize("pages", [PAGES, 4])
def test_tokens_that_fit_exactly_are_all_written(speculate, pages):
  """Up to the model's limit, and up to the last place of the last page."""
  batcher = _batcher(speculate, cache_bytes=pages * cache.page_bytes(CONFIG.model, speculate))
  room = batcher.max_tokens_per_row
  assert room == min(250, pages * cache.PAGE_TOKENS)
  [prompt] = _prompts(8, (room - 20,))
  [new] = batcher_lib.generate(batcher, [prompt], dataclasses.replace(GREEDY, max_tokens=20))
  assert len(new) == 20 and _is_greedy(prompt, new)


def test_a_first_token_does_not_wait_for_a_round_of_decoding():
  batcher = _batcher()
  batcher.submit(_prompts(10, (20,))[0], GREEDY)
  [event] = batcher.step()
  assert len(event.tokens) == 1 and event.finish is None
  [event] = batcher.step()
  assert len(event.tokens) == 8


def test_a_refused_prompt_leaves_nothing_behind():
  batcher = _batcher()
  with pytest.raises(ValueError, match=f"got {V}"):
    batcher_lib.generate(batcher, [[1], [V]], GREEDY)
  assert len(batcher_lib.generate(batcher, [[3]], GREEDY)[0]) == 11
  assert batcher.num_waiting == batcher.num_running == 0


def test_a_row_cancelled_amid_its_prompt_leaves():
  batcher = _batcher()
  long = batcher.submit(_prompts(11, (100,))[0], GREEDY)
  other = batcher.submit([4, 5], GREEDY)
  batcher.step()
  assert batcher.stats()["prompt_tokens"] == 32 + 2
  batcher.cancel(long)
  events = _drain(batcher)
  assert set(events) == {other} and batcher.stats()["cache_pages_used"] == 0


@pytest.mark.slow
def test_bfloat16_and_interleaved_and_tied_models_generate():
  for fields in (
    {"model.compute_dtype": "bfloat16"},
    {"model.tie_word_embeddings": True, "model.q_lora_rank": None, "model.attention_bias": True},
  ):
    config = small_config(
      **{"model.num_hidden_layers": 2, "model.first_k_dense_replace": 1}, **fields
    )
    _, params, bias = random_parts(config, 1)
    batcher = batcher_lib.Batcher(
      config.model, params, bias, batcher_lib.BatcherOptions(max_rows=1, cache_bytes=2**20)
    )
    prompt = [5, 6, 7]
    [new] = batcher_lib.generate(batcher, [prompt], dataclasses.replace(GREEDY, max_tokens=4))
    logits = model_lib.logits(random_model(config, 1), jnp.asarray([prompt + new]))[0]
    kind = "bfloat16" if config.model.compute_dtype == "bfloat16" else "model_float32"
    taken = jnp.take_along_axis(logits[2:6], jnp.asarray(new)[:, None], axis=1)[:, 0]
    assert_close(taken, logits[2:6].max(axis=-1), kind)


@pytest.mark.parametrize("speculate", [False, True])
def test_penalties_and_biases_are_those_of_full_passes(speculate):
  """Over several rounds, beside a row without any; in vLLM's order."""
  prompt, other = _prompts(12, (12, 20))
  free = batcher_lib.generate(_batcher(speculate), [prompt], GREEDY)[0]
  settings = Sampling(
    max_tokens=21,
    temperature=0,
    repetition_penalty=1.3,
    presence_penalty=0.4,
    frequency_penalty=0.3,
    logit_bias=((free[0], -100.0), (7, 1.5), (8, 1.0)),
    stop_tokens=(free[1], 9),
    min_tokens=21,
  )
  batcher = _batcher(speculate)
  request, beside = batcher.submit(prompt, settings), batcher.submit(other, GREEDY)
  events = _drain(batcher)
  new = [t for e in events[request] for t in e.tokens]
  assert len(new) == 21 and new != free
  for i, token in enumerate(new):
    logits = _logits([*prompt, *new[:i]])[-1].astype(np.float64)
    for t, bias in settings.logit_bias:
      logits[t] += bias
    for t in {*prompt, *new[:i]}:
      logits[t] = logits[t] / 1.3 if logits[t] > 0 else logits[t] * 1.3
    for t in set(new[:i]):
      logits[t] -= 0.3 * new[:i].count(t) + 0.4
    logits[list(settings.stop_tokens)] = -np.inf
    assert token == logits.argmax()
  assert _is_greedy(other, [t for e in events[beside] for t in e.tokens])


@pytest.mark.parametrize("speculate", [False, True])
def test_a_stop_token_ends_the_row_after_min_tokens(speculate):
  prompts = _prompts(5, (8, 21))
  whole = batcher_lib.generate(_batcher(speculate), prompts, GREEDY)[0]
  for place in (0, 4, 9):
    stop = whole[place]
    for num in range(1, 11):
      settings = dataclasses.replace(GREEDY, stop_tokens=(stop,), min_tokens=num)
      [new] = batcher_lib.generate(_batcher(speculate), prompts[:1], settings)
      assert len(new) >= num and stop not in new
      if num <= whole.index(stop):
        assert new == whole[: whole.index(stop)]


@pytest.mark.slow
@pytest.mark.parametrize("speculate", WITHOUT_AND_WITH_DRAFTS)
def test_nothing_is_compiled_after_the_start_whatever_is_asked(speculate):
  compiled = []
  jax.monitoring.register_event_duration_secs_listener(
    lambda name, *args, **kwargs: compiled.append(name) if "backend_compile" in name else None
  )
  # As `make` puts them: what lies on a device for good is another case for the compiler.
  parts = jax.device_put(_parts(), jax.local_devices()[0])
  batcher = batcher_lib.Batcher(CONFIG.model, *parts, _options(speculate, max_rows=2))
  planned = batcher.programs()
  assert planned == [(1, 0), (2, 0), (1, 16), (2, 16), (1, 32), (2, 32)]
  before = batcher.stats()["programs"]
  assert list(batcher.compile()) == planned
  assert batcher.stats()["programs"] - before == len(planned)
  assert compiled and batcher.stats()["cache_pages_used"] == 0
  del compiled[:]
  before = batcher.stats()["programs"]
  asked = itertools.product(
    (None, 0, 2),  # logprobs
    (False, True),  # prompt_logprobs
    (1.0, 1.3),  # repetition_penalty
    (0.0, 0.5),  # presence_penalty
    ((), ((3, 1.0),)),  # logit_bias
    (0, 2),  # min_tokens
    (0.0, 0.8),  # temperature
  )
  names = "logprobs prompt_logprobs repetition_penalty presence_penalty logit_bias min_tokens"
  for number, values in enumerate(asked):
    settings = dict(zip(f"{names} temperature".split(), values))
    settings |= {"top_k": number % 3, "top_p": 1 - number % 2 / 4, "stop_tokens": (number % V,)}
    lengths = ((1,), (17, 40), (16, 70), (33,))[number % 4]
    for prompt in _prompts(number, lengths):
      batcher.submit(prompt, Sampling(max_tokens=2 + number % 12, **settings))
    _drain(batcher)
  assert not compiled and batcher.stats()["programs"] == before
  assert number == 3 * 2**6 - 1


@pytest.mark.parametrize(
  "options, programs",
  [
    # A server's options by default, with a long context: 2 + 4 x 2.
    ({}, [(1, 0), (8, 0), *[(B, S) for S in (16, 64, 256, 512) for B in (1, 8)]]),
    # Of 64 rows, so many prompts are taken in at once that they have 4096 tokens.
    (
      {"max_rows": 64},
      [(1, 0), (8, 0), (64, 0), (1, 16), (8, 16), (64, 16), (1, 64), (8, 64), (64, 64)]
      + [(B, S) for S in (256, 512) for B in (1, 8)],
    ),
    ({"max_rows": 1}, [(1, 0), (1, 16), (1, 64), (1, 256), (1, 512)]),
  ],
)
def test_programs_are_few(options, programs):
  model = dataclasses.replace(CONFIG.model, max_position_embeddings=4096)
  batcher = batcher_lib.Batcher(model, *_parts(), batcher_lib.BatcherOptions(**options))
  assert batcher.programs() == programs
