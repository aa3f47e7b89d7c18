"""Text in pieces, joined, is what decoding all tokens at once gives, up to a stop string."""

import dataclasses
import json

import pytest
from etils import epath

from dsmoe.data import tokenizer as tokenizer_lib
from dsmoe.inference import batcher as batcher_lib
from dsmoe.inference import generate
from dsmoe.inference.detokenize import Vocabulary
from dsmoe.inference.sampling import Sampling
from tests.helpers import random_parts, small_config

TEXT = ["alpha beta gamma delta", "übung mit ümlauten", "def f(x):\n  return x + 1\n"] * 20


@pytest.fixture(scope="module")
def tokenizer():
  return tokenizer_lib.train_tokenizer(TEXT, 300)


@pytest.fixture(scope="module")
def batcher(tokenizer):
  config = small_config(
    **{
      "model.vocab_size": 300,
      "model.num_hidden_layers": 2,
      "model.first_k_dense_replace": 1,
      "model.num_nextn_predict_layers": 0,
      "model.max_position_embeddings": 128,
    }
  )
  _, params, bias = random_parts(config, 0)
  return batcher_lib.Batcher(config.model, params, bias, batcher_lib.BatcherOptions(max_rows=2))


def test_pieces_join_to_the_text_and_stop_before_a_stop_string(batcher, tokenizer):
  prompts = [tokenizer.encode(t).ids for t in ("alpha", "ü", "def f(x")]
  settings = Sampling(max_tokens=40, temperature=1.0, seed=3)
  tokens = batcher_lib.generate(batcher, prompts, settings)
  figures = generate.Figures()
  texts, finishes = ["", "", ""], {}
  vocabulary = Vocabulary(tokenizer)
  for piece in generate.stream(batcher, vocabulary, prompts, settings, (), figures):
    assert piece.prompt not in finishes
    texts[piece.prompt] += piece.text
    if piece.finish:
      finishes[piece.prompt] = piece.finish
  whole = [tokenizer.decode(t) for t in tokens]
  assert texts == whole and set(finishes.values()) == {"length"}
  assert figures.new_tokens == 120 and 0 < figures.first_secs <= figures.secs

  stop = next(whole[0][i : i + 2] for i in range(3, 60) if whole[0].index(whole[0][i : i + 2]) == i)
  short, finish = "", None
  for piece in generate.stream(batcher, vocabulary, prompts[:1], settings, (stop, "\0")):
    short, finish = short + piece.text, piece.finish or finish
  assert short == whole[0][: whole[0].index(stop)] and finish == "stop"


def test_closing_it_ends_what_runs(batcher, tokenizer):
  prompts = [tokenizer.encode(t).ids for t in ("alpha", "beta", "gamma")]
  settings = Sampling(max_tokens=90)
  pieces = generate.stream(batcher, Vocabulary(tokenizer), prompts, settings)
  next(pieces)
  pieces.close()
  assert batcher.step() == [] and batcher.num_running == batcher.num_waiting == 0
  assert batcher.stats()["cache_pages_used"] == 0


def test_a_refused_prompt_leaves_nothing_behind(batcher, tokenizer):
  vocabulary = Vocabulary(tokenizer)
  with pytest.raises(ValueError, match="prompts must have at least 1 prompt, got 0"):
    next(generate.stream(batcher, vocabulary, [], Sampling()))
  settings = dataclasses.replace(Sampling(), max_tokens=120)
  with pytest.raises(ValueError, match=r"prompt \(9 tokens\) plus max_tokens \(120\)"):
    next(generate.stream(batcher, vocabulary, [[1], [2] * 9], settings))
  assert batcher.step() == [] and batcher.num_waiting == 0


@pytest.mark.parametrize("name", ["p.txt", "p.jsonl"])
def test_prompts_are_lines(tmp_path, name):
  prompts = ["a\u2028b", "c\x85\x1cd", "é"]
  as_line = str if name == "p.txt" else lambda p: json.dumps({"prompt": p}, ensure_ascii=False)
  (tmp_path / name).write_bytes("\r\n".join(map(as_line, [*prompts])).encode("utf-8-sig"))
  assert generate.read_prompts(epath.Path(tmp_path / name)) == prompts


@pytest.mark.parametrize(
  "text, message",
  [
    ("\n \n", r"must have at least 1 line, .*p.jsonl has none"),
    ('{"text": "a"}', r"p.jsonl must have {'prompt': text} in each line: KeyError"),
    ('{"prompt": 1}', r"p.jsonl must have {'prompt': text} in each line"),
    ('{"prompt": "\\ud83d"}', r"every prompt of .*p.jsonl must be valid Unicode, got"),
    ("[1]", r"p.jsonl must have {'prompt': text} in each line"),
  ],
)
def test_files_of_prompts_that_are_refused(tmp_path, text, message):
  (tmp_path / "p.jsonl").write_text(text)
  with pytest.raises(ValueError, match=message):
    generate.read_prompts(epath.Path(tmp_path / "p.jsonl"))
  with pytest.raises(ValueError, match=r"prompts must be in a file, .* is a folder"):
    generate.read_prompts(epath.Path(tmp_path))
