import functools

import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from helpers import mesh_of, random_model, random_parts, small_config

from dsmoe import decode
from dsmoe import model as model_lib

CONFIG = small_config(
  **{
    "model.num_hidden_layers": 2,
    "model.first_k_dense_replace": 1,
    "model.num_nextn_predict_layers": 0,
    "model.max_position_embeddings": 20,
  }
)
PROMPTS = [[5, 17, 3, 90], [8], [60, 61]]
NEW = 5


def _generate(prompts=PROMPTS, num_tokens=NEW, devices=1, **options):
  _, params, bias = random_parts(CONFIG, 0)
  options = {"temperature": 0.0} | options
  return decode.generate(CONFIG, params, bias, mesh_of(devices), prompts, num_tokens, **options)


@functools.cache
def _greedy_by_logits():
  """Argmax of a full forward pass, one row and token at a time."""
  model, rows = random_model(CONFIG, 0), []
  for prompt in PROMPTS:
    row = list(prompt)
    for _ in range(NEW):
      padded = np.zeros((1, 9), np.int32)
      padded[0, : len(row)] = row
      row.append(int(jnp.argmax(model_lib.logits(model, padded)[0, len(row) - 1])))
    rows.append(row[len(prompt) :])
  return rows


def test_greedy_is_the_argmax_of_logits_for_prompts_of_any_length():
  expected = _greedy_by_logits()
  assert len({tuple(row) for row in expected}) == 3
  # Three rows over two devices: one row is padding.
  assert _generate(devices=2) == expected


def test_stop_token_ends_its_row_only():
  expected = _greedy_by_logits()
  stop = expected[0][2]
  cut = [row[: row.index(stop)] if stop in row else row for row in expected]
  assert len(cut[0]) <= 2 and max(map(len, cut)) == NEW
  assert _generate(stop_token=stop) == cut


def test_sampling_follows_its_seed_and_row(monkeypatch):
  """With equal logits everywhere, only the seed, the row and the step can tell draws apart."""
  monkeypatch.setattr(
    decode, "make_next_logits", lambda *_: lambda p, b, tokens, last: np.zeros((len(last), 96))
  )
  same = [[1, 2], [1, 2], [1, 2]]
  first = _generate(same, 8, temperature=1.0, seed=3)
  assert first == _generate(same, 8, temperature=1.0, seed=3)
  assert first != _generate(same, 8, temperature=1.0, seed=4)
  assert len({tuple(row) for row in first}) == 3
  assert first[0] == _generate(same[:1], 8, temperature=1.0, seed=3)[0]
  assert all(len(set(row)) > 3 for row in first)


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
def test_sampling_frequencies_follow_the_softmax(temperature):
  logits = np.array([1.0, -0.5, 0.3, 2.0, -1.2], np.float32)
  random, n = np.random.default_rng(0), 4000
  counts = np.zeros(5)
  for _ in range(n):
    counts[decode._sample(logits, temperature, random)] += 1
  expected = n * oracles.softmax(logits / temperature)
  # Chi-square with 4 degrees of freedom: above 18.5 once in a thousand times.
  assert ((counts - expected) ** 2 / expected).sum() < 18.5


def test_temperature_zero_takes_the_first_of_the_likeliest():
  random = np.random.default_rng(0)
  assert decode._sample(np.array([1.0, 3.0, 3.0]), 0, random) == 1


@pytest.mark.parametrize(
  "prompts, options, message",
  [
    ([], {}, "prompts must have at least 1 prompt, got 0"),
    ([[1], []], {}, "each prompt must have at least 1 token, got 0"),
    ([[1]], {"temperature": -0.5}, "temperature must be at least 0, got -0.5"),
    ([[1] * 16, [2]], {}, r"prompt \(16 tokens\) plus num_tokens \(5\) must not exceed .* \(20\)"),
    ([[1], [7, 96]], {}, r"below vocab_size \(96\), got 96"),
    ([[1], [7, -1]], {}, r"got -1"),
  ],
)
def test_bad_requests_are_refused(prompts, options, message):
  with pytest.raises(ValueError, match=message):
    _generate(prompts, **options)
