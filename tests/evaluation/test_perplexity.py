"""Tests of dsmoe/evaluation/perplexity.py, against NumPy on `model.logits`."""

import math

import pytest

from dsmoe.evaluation import perplexity
from tests.data.cases import EOS, texts_of
from tests.evaluation.oracle import SEQUENCE_LENGTH as S
from tests.evaluation.oracle import log_probabilities
from tests.helpers import assert_close


def test_score_text_counts_everything(run, folder):
  result = perplexity.score_text(run, f"{folder}/v/*.txt")
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
    perplexity.score_text(run, "/nowhere/*.txt")
