"""Tests of dsmoe/evaluation/evaluate.py, against NumPy on `model.logits` and on given scores."""

import json
import math

import jax
import numpy as np
import pytest
from flax import nnx

from dsmoe import model as model_lib
from dsmoe.data import batches
from dsmoe.data import tokenizer as tokenizer_lib
from dsmoe.evaluation import evaluate
from dsmoe.training import train_step
from tests import runs
from tests.data.cases import EOS, VOCAB, make_folder, text_config, texts_of
from tests.helpers import assert_close, mesh_of, small_config

S = 16
LONGEST = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return make_folder(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
  """Fresh weights and a tokenizer trained on the small corpus, on eight devices."""
  config = small_config(
    **runs.TWO_LAYERS,
    **{"model.vocab_size": VOCAB, "model.initializer_range": 0.3, "data.sequence_length": S},
    **{"batch_size": 3, "data.train_globs": (f"{folder}/a/*.txt",)},
  )
  mesh = mesh_of(8)
  state = train_step.init_state(config, mesh)
  cache = tmp_path_factory.mktemp("cache")
  batches.prepare(text_config(folder), VOCAB, cache)
  return evaluate.Run(config, cache / "tokenizer.json", state.params, state.router_bias, mesh, 0)


def log_probabilities(run, ids):
  """log p(ids[i] | ids[:i]) for i from 1, in NumPy, from the model's logits."""
  graphdef, *_ = train_step.model_parts(run.config)
  params, bias = jax.device_get((run.params, run.router_bias))
  tokens_1S = np.zeros((1, LONGEST), np.int32)  # later tokens change nothing: one shape
  tokens_1S[0, : len(ids) - 1] = ids[:-1]
  logits_1SV = model_lib.logits(nnx.merge(graphdef, params, bias), tokens_1S)
  logits_SV = np.asarray(logits_1SV, np.float64)[0, : len(ids) - 1]
  log_z_S = np.log(np.exp(logits_SV).sum(-1))
  return np.array([row[i] for row, i in zip(logits_SV, ids[1:])]) - log_z_S


def test_loglikelihoods_match_numpy(run):
  rng = np.random.default_rng(0)
  lengths = [(1, 1), (3, 2), (1, 9), (20, 1), (7, 13), (5, 5), (2, 2), (9, 1), (30, 4)]
  pairs = [tuple(rng.integers(0, VOCAB, n).tolist() for n in pair) for pair in lengths]
  actual = evaluate.loglikelihoods(run, pairs, batch_size=3)
  expected = [log_probabilities(run, a + b)[-len(b) :].sum() for a, b in pairs]
  assert_close(actual, np.array(expected), "model_float32")


@pytest.mark.parametrize(
  "pair, message",
  [
    (([], [1]), r"at least 1 token each, got 0 and 1 in pair 0"),
    (([1], []), r"at least 1 token each, got 1 and 0"),
    (([1] * 4000, [1] * 98), r"\(4000 \+ 98 tokens, pair 0\) must not exceed .*\(4096\)"),
  ],
)
def test_pairs_that_do_not_fit_are_refused(run, pair, message):
  with pytest.raises(ValueError, match=message):
    evaluate.loglikelihoods(run, [pair])


def test_score_text_counts_everything(run, folder):
  result = evaluate.score_text(run, f"{folder}/v/*.txt")
  tokenizer = run.tokenizer()
  stream, starts = [EOS], [0]
  for text in texts_of(folder, "v"):
    starts.append(len(stream))
    stream += tokenizer.encode(text, add_special_tokens=False).ids + [EOS]
  assert result["tokens"] == len(stream) - 1
  assert result["bytes"] == sum(len(text.encode()) for text in texts_of(folder, "v"))
  # Token i is predicted from what its row holds of its predecessor's document.
  nats = 0.0
  for row in range(0, len(stream) - 1, S):
    for i in range(row + 1, min(row + S, len(stream) - 1) + 1):
      first = max(row, max(start for start in [0, *starts] if start <= i - 1))
      nats -= log_probabilities(run, stream[first : i + 1])[-1]
  assert_close(result["nats_per_token"], nats / result["tokens"], "model_float32")
  assert result["perplexity"] == pytest.approx(math.exp(result["nats_per_token"]))
  bits = result["nats_per_token"] * result["tokens"] / math.log(2) / result["bytes"]
  assert result["bits_per_byte"] == pytest.approx(bits)


def test_text_must_exist(run):
  with pytest.raises(ValueError, match=r"nowhere.*matches none"):
    evaluate.score_text(run, "/nowhere/*.txt")


def test_choices_are_joined_as_in_running_text(run):
  tokenizer = run.tokenizer()
  for prompt, choice, context, continuation in [
    ("alpha", "beta", "alpha", " beta"),
    ("alpha ", "beta", "alpha", " beta"),
    ("alpha\n", "beta", "alpha", "\nbeta"),
    ("alpha", " beta", "alpha", " beta"),
    ("", "beta", "<|endoftext|>", "beta"),
  ]:
    ids = evaluate.encode_choice(tokenizer, prompt, choice)
    texts = [tokenizer.decode(part, skip_special_tokens=False) for part in ids]
    assert texts == [context, continuation]
  assert evaluate.encode_choice(tokenizer, "", "x")[0] == [tokenizer_lib.eos_id(tokenizer)]


def test_score_choices(run, monkeypatch):
  questions = [
    evaluate.Question("a", ["xxxx", "yy"], 0),  # by the sum wrong, by the byte right
    evaluate.Question("b", ["xxxx", "y", "zz"], 1),  # right both ways
    evaluate.Question("c", ["é", "y"], 1),  # wrong; é has two bytes
  ]
  scores = np.array([-4.0, -3.0, -9.0, -1.0, -8.0, -1.0, -1.5])
  monkeypatch.setattr(evaluate, "loglikelihoods", lambda run, pairs: scores[: len(pairs)])
  result = evaluate.score_choices(run, questions)
  assert result["questions"] == 3
  assert result["accuracy"] == pytest.approx(1 / 3)
  assert result["margin"] == pytest.approx((-1.0 + 7.0 - 0.5) / 3)
  per_byte = [-1.0 + 1.5, -1.0 + 2.25, -1.5 + 0.5]
  assert result["accuracy_per_byte"] == pytest.approx(2 / 3)
  assert result["margin_per_byte"] == pytest.approx(np.mean(per_byte))


@pytest.mark.parametrize(
  "line",
  [
    "{",
    "[]",
    '{"choices": ["a", "b"], "answer": 0}',
    '{"question": "q", "choices": ["a", "b"], "answer": 2}',
    '{"question": "q", "choices": ["a", ""], "answer": 0}',
    '{"question": "q", "choices": ["a"], "answer": 0}',
    '{"question": "q", "choices": ["a", "b"], "answer": "a"}',
  ],
)
def test_broken_questions_are_refused(tmp_path, line):
  path = tmp_path / "q.jsonl"
  good = json.dumps({"prompt": "p", "choices": ["a", "b"], "answer": 1})
  path.write_text(f"{good}\n\n{line}\n")
  with pytest.raises(ValueError, match=r"q\.jsonl, line 3: must be"):
    evaluate.read_questions(path)
  path.write_text(f"{good}\n")
  assert evaluate.read_questions(path) == [evaluate.Question("p", ["a", "b"], 1)]
