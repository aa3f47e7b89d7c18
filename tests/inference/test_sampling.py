"""Draws against NumPy: what may come, how often, and what it depends on."""

import dataclasses
import re

import jax.numpy as jnp
import numpy as np
import pytest

from dsmoe.inference import sampling
from dsmoe.inference.sampling import Sampling
from tests import oracles

V = 31


def _logits(seed, rows):
  return np.random.default_rng(seed).normal(0, 2, (rows, V)).astype(np.float32)


def _allowed(logits, s: Sampling):
  """The log-probabilities by sorting one row, one filter after the other."""
  scaled = logits.astype(np.float64) / s.temperature
  order = np.argsort(-scaled, kind="stable")
  kept = order[: s.top_k or V]
  probs = oracles.softmax(scaled[kept])
  num = next(i for i in range(1, len(kept) + 1) if i == len(kept) or probs[:i].sum() >= s.top_p)
  # Shares of the filtered distribution; a later filter does not see an earlier one's tokens.
  kept = [t for t, p in zip(kept[:num], probs) if p >= s.min_p * probs[0]]
  result = np.full(V, -np.inf)
  result[kept] = scaled[kept]
  return result


SETTINGS = [
  Sampling(temperature=0.7),
  Sampling(temperature=1.3, top_k=5),
  Sampling(top_k=V + 9),
  Sampling(top_p=0.6),
  Sampling(temperature=2.0, min_p=0.2),
  Sampling(temperature=0.9, top_k=9, top_p=0.8, min_p=0.1),
  Sampling(top_p=1e-6),
]


def test_filters_keep_what_sorting_keeps():
  logits = _logits(0, len(SETTINGS))
  found = np.asarray(sampling.log_distribution(jnp.asarray(logits), sampling.stack(SETTINGS)))
  for row, (one, s) in enumerate(zip(logits, SETTINGS)):
    expected = _allowed(one, s)
    np.testing.assert_array_equal(np.isfinite(found[row]), np.isfinite(expected), err_msg=str(s))
    assert 0 < np.isfinite(expected).sum() <= V
    kept = np.isfinite(expected)
    np.testing.assert_allclose(found[row][kept], expected[kept], rtol=1e-5, atol=1e-6)


@pytest.mark.parity
def test_hugging_face_filters_the_same():
  torch = pytest.importorskip("torch")
  process = pytest.importorskip("transformers.generation.logits_process")
  logits = _logits(8, len(SETTINGS))
  seen = np.random.default_rng(8).integers(0, V, (len(SETTINGS), 6))
  settings = [dataclasses.replace(s, repetition_penalty=1.4) for s in SETTINGS]
  seen_BV = np.zeros((len(SETTINGS), V), bool)
  np.put_along_axis(seen_BV, seen, True, axis=1)
  rows = sampling.stack(settings)
  penalised = sampling.penalised(jnp.asarray(logits), jnp.asarray(seen_BV), rows)
  found = sampling.log_distribution(penalised, rows)
  for row, s in enumerate(settings):
    chain = [process.RepetitionPenaltyLogitsProcessor(s.repetition_penalty)]
    chain.append(process.TemperatureLogitsWarper(s.temperature))
    chain += [process.TopKLogitsWarper(s.top_k)] if s.top_k else []
    chain += [process.TopPLogitsWarper(s.top_p)] if s.top_p < 1 else []
    chain += [process.MinPLogitsWarper(s.min_p)] if s.min_p else []
    expected = process.LogitsProcessorList(chain)(
      torch.tensor(seen[row : row + 1]), torch.tensor(logits[row : row + 1])
    )[0].numpy()
    np.testing.assert_array_equal(np.isfinite(found[row]), np.isfinite(expected), err_msg=str(s))
    kept = np.isfinite(expected)
    np.testing.assert_allclose(np.asarray(found[row])[kept], expected[kept], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_temperature_zero_takes_the_first_of_the_likeliest_beside_rows_that_sample():
  logits = _logits(1, 2)
  logits[:, [4, 20]] = 9.0
  rows = sampling.stack([Sampling(temperature=0, top_k=3), Sampling(seed=2)])
  position = jnp.asarray([3, 3])
  tokens = set()
  for p in range(40):
    log_probs = sampling.log_distribution(jnp.asarray(logits), rows)
    drawn = sampling.draw(log_probs, rows, position + p)
    assert drawn[0] == 4
    tokens.add(int(drawn[1]))
  assert len(tokens) > 1
  np.testing.assert_array_equal(sampling.argmax(jnp.asarray(logits)), logits.argmax(axis=1))


def test_a_tiny_temperature_is_greedy():
  logits = _logits(6, 1) * 10
  rows = sampling.stack([Sampling(temperature=1e-38)])
  drawn = sampling.draw(
    sampling.log_distribution(jnp.asarray(logits), rows), rows, jnp.zeros(1, int)
  )
  assert drawn.tolist() == [logits[0].argmax()]


def test_a_row_without_filters_keeps_its_tail_beside_one_with():
  logits = np.random.default_rng(7).normal(0, 3, (2, 50_000)).astype(np.float32)
  rows = sampling.stack([Sampling(), Sampling(top_k=3)])
  found = np.asarray(sampling.log_distribution(jnp.asarray(logits), rows))
  assert np.isfinite(found).sum(axis=1).tolist() == [50_000, 3]


def test_repetition_penalty_divides_or_multiplies_by_sign():
  logits, rng = _logits(2, 3), np.random.default_rng(2)
  seen = rng.random((3, V)) < 0.5
  settings = [Sampling(repetition_penalty=p) for p in (1.0, 1.7, 0.6)]
  found = sampling.penalised(jnp.asarray(logits), jnp.asarray(seen), sampling.stack(settings))
  for row, s in enumerate(settings):
    for token in range(V):
      value = logits[row, token]
      if seen[row, token]:
        value = value / s.repetition_penalty if value > 0 else value * s.repetition_penalty
      np.testing.assert_allclose(found[row, token], value, rtol=1e-6)


def test_frequencies_follow_the_filtered_softmax():
  n, s = 6000, Sampling(temperature=0.8, top_k=7)
  one = _logits(3, 1)[0]
  rows = sampling.stack([Sampling(temperature=0.8, top_k=7, seed=i) for i in range(n)])
  log_probs = sampling.log_distribution(jnp.broadcast_to(one, (n, V)), rows)
  counts = np.bincount(sampling.draw(log_probs, rows, jnp.full(n, 5)), minlength=V)
  allowed = _allowed(one, s)
  kept = np.isfinite(allowed)
  expected = n * oracles.softmax(allowed[kept])
  assert counts[~kept].sum() == 0
  # Chi-square with 6 degrees of freedom: above 22.5 once in a thousand times.
  assert ((counts[kept] - expected) ** 2 / expected).sum() < 22.5


def test_a_draw_depends_on_seed_position_and_purpose_only():
  one = _logits(4, 1)

  def drawn(seeds, position, purpose=0):
    rows = sampling.stack([Sampling(seed=s) for s in seeds])
    logits = jnp.broadcast_to(one, (len(seeds), V))
    return sampling.draw(logits, rows, jnp.full(len(seeds), position), purpose).tolist()

  seeds = list(range(40)) + [2**33 + i for i in range(40)]
  first = drawn(seeds, 7)
  assert first == drawn(seeds, 7)
  assert first[::-1] == drawn(seeds[::-1], 7)  # the batch does not matter
  assert drawn(seeds[:1], 7) == first[:1]
  for other in (drawn(seeds, 8), drawn(seeds, 7, 1), drawn([s + 100 for s in seeds], 7)):
    assert sum(a == b for a, b in zip(first, other)) < 40
  assert first[:40] != first[40:]  # the upper half of a seed counts


def test_logprobs_are_the_models_own_and_sorted():
  logits, tokens = _logits(5, 4), np.array([3, 0, 30, 11])
  found = sampling.logprobs_of(jnp.asarray(logits), jnp.asarray(tokens))
  for row in range(4):
    log_probs = np.log(oracles.softmax(logits[row]))
    np.testing.assert_allclose(found.chosen[row], log_probs[tokens[row]], rtol=1e-5)
    assert found.rank[row] == 1 + (log_probs > log_probs[tokens[row]]).sum()
    order = np.argsort(-log_probs, kind="stable")[: sampling.MAX_LOGPROBS]
    np.testing.assert_array_equal(found.top_tokens[row], order)
    np.testing.assert_allclose(found.top[row], log_probs[order], rtol=1e-5)


@pytest.mark.parametrize(
  "field, value",
  [
    *(("max_tokens", -1), ("temperature", -0.5), ("temperature", float("nan"))),
    *(("temperature", float("inf")), ("temperature", 2e300), ("temperature", -float("inf"))),
    *(("top_p", float("nan")), ("min_p", float("nan")), ("repetition_penalty", float("nan"))),
    *(("top_k", -1), ("top_p", 0.0), ("top_p", 1.5)),
    *(
      ("min_p", -0.1),
      ("min_p", 1.1),
      ("repetition_penalty", 0.0),
      ("repetition_penalty", float("inf")),
      ("seed", -1),
      ("seed", 2**63),
    ),
    *(("logprobs", 21), ("logprobs", -1)),
    *(("presence_penalty", float("nan")), ("frequency_penalty", float("inf"))),
    *(("min_tokens", -1), ("min_tokens", 129)),
  ],
)
def test_bad_settings_are_refused(field, value):
  with pytest.raises(ValueError, match=rf"{field} must be .*, got {re.escape(str(value))}"):
    Sampling(**{field: value})


def test_biases_that_are_not_finite_are_refused():
  with pytest.raises(ValueError, match="logit_bias must be finite"):
    Sampling(logit_bias=((5, float("inf")),))
