"""Tests of dsmoe/evaluation/multiple_choice.py, against NumPy on logits and on given scores."""

import json

import numpy as np
import pytest

from dsmoe.evaluation import multiple_choice
from tests.data.cases import VOCAB
from tests.evaluation.oracle import log_probabilities
from tests.helpers import assert_close


def test_loglikelihoods_match_numpy(run):
  rng = np.random.default_rng(0)
  lengths = [(1, 1), (3, 2), (1, 9), (20, 1), (7, 13), (5, 5), (2, 2), (9, 1), (30, 4)]
  pairs = [tuple(rng.integers(0, VOCAB, n).tolist() for n in pair) for pair in lengths]
  actual = multiple_choice.loglikelihoods(run, pairs, batch_size=3)
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
    multiple_choice.loglikelihoods(run, [pair])


def test_choices_are_joined_as_in_running_text(run):
  tokenizer = run.tokenizer()
  for prompt, choice, context, continuation in [
    ("alpha", "beta", "alpha", " beta"),
    ("alpha ", "beta", "alpha", " beta"),
    ("alpha\n", "beta", "alpha", "\nbeta"),
    ("alpha", " beta", "alpha", " beta"),
    ("", "beta", "<|endoftext|>", "beta"),
  ]:
    ids = multiple_choice.encode_choice(tokenizer, prompt, choice, 0)
    texts = [tokenizer.decode(part, skip_special_tokens=False) for part in ids]
    assert texts == [context, continuation]
  assert multiple_choice.encode_choice(tokenizer, "", "x", 7)[0] == [7]


def test_score_choices(run, monkeypatch):
  questions = [
    multiple_choice.Question("a", ["xxxx", "yy"], 0),  # by the sum wrong, by the byte right
    multiple_choice.Question("b", ["xxxx", "y", "zz"], 1),  # right both ways
    multiple_choice.Question("c", ["é", "y"], 1),  # wrong; é has two bytes
  ]
  scores = np.array([-4.0, -3.0, -9.0, -1.0, -8.0, -1.0, -1.5])
  monkeypatch.setattr(multiple_choice, "loglikelihoods", lambda run, pairs: scores[: len(pairs)])
  result = multiple_choice.score_choices(run, questions)
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
    '{"question": "q", "choices": ["a", "b"], "answer": true}',
    '{"question": "q", "choices": ["a", "b"], "answer": -1}',
    '{"question": "q", "choices": ["a", "b"], "answerKey": "A"}',
    '{"question": "q", "choices": "abc", "answer": 0}',
    '{"question": "q", "choices": {"a": 1, "b": 2}, "answer": 0}',
    '{"question": "q", "choices": ["a", 1], "answer": 0}',
    '{"question": ["q"], "choices": ["a", "b"], "answer": 0}',
    '{"question": {"stem": "q"}, "choices": ["a", "b"], "answer": 0}',
    '{"question": "q\\ud83d", "choices": ["a", "b"], "answer": 0}',
    '{"question": "q", "choices": ["a", "\\udc00"], "answer": 0}',
    '{"question": "q", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answer": 0}',
    '{"question": "q", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "C"}',
    '{"question": "q", "choices": {"text": ["a", "b"], "label": ["A", "A"]}, "answerKey": "A"}',
    '{"question": "q", "choices": {"text": ["a", "b"], "label": ["A"]}, "answerKey": "A"}',
    '{"question": "q", "choices": {"text": "ab", "label": "AB"}, "answerKey": "A"}',
    '{"question": "q", "choices": {"text": ["a", "b"], "label": "AB"}, "answerKey": "A"}',
    '{"question": "q", "choices": {"label": ["A", "B"]}, "answerKey": "A"}',
    '{"question": "q", "choices": {"text": ["a"], "label": ["A"]}, "answerKey": "A"}',
    "[" * 100000,
  ],
  ids=lambda line: line[:90],
)
def test_broken_questions_are_refused(tmp_path, line):
  path = tmp_path / "q.jsonl"
  good = json.dumps({"prompt": "p", "choices": ["a", "b"], "answer": 1})
  path.write_text(f"{good}\n\n{line}\n")
  form = (
    r'must be \{"question": text, .* "answer": index\} or \{"question": text, "choices": \{"text"'
  )
  with pytest.raises(ValueError, match=rf"q\.jsonl, line 3: {form}"):
    multiple_choice.read_questions(path)
  path.write_text(f"{good}\n")
  assert multiple_choice.read_questions(path) == [multiple_choice.Question("p", ["a", "b"], 1)]


def test_the_published_form_is_read(tmp_path):
  """That of ARC: the labels are letters or digits, which are not places."""
  rows = [
    {"text": ["a", "b", "c"], "label": ["A", "B", "C"], "key": "C"},
    {"text": ["a", "b"], "label": ["1", "2"], "key": "1"},
  ]
  path = tmp_path / "q.jsonl"
  lines = [
    {"id": "x", "question": "q", "answerKey": row.pop("key"), "choices": row} for row in rows
  ]
  path.write_text("\n".join(map(json.dumps, lines)))
  assert multiple_choice.read_questions(path) == [
    multiple_choice.Question("q", ["a", "b", "c"], 2),
    multiple_choice.Question("q", ["a", "b"], 0),
  ]


def test_separators_of_lines_inside_json_are_text(tmp_path):
  question = {"question": "a\u2028b\x85c", "choices": ["x\u2029", "y"], "answer": 0}
  path = tmp_path / "q.jsonl"
  path.write_bytes(json.dumps(question, ensure_ascii=False).encode() + b"\r\n")
  [raw] = multiple_choice.read_questions(path)
  path.write_text(json.dumps(question))
  assert multiple_choice.read_questions(path) == [raw]
  assert raw.prompt == "a\u2028b\x85c"


def test_no_score_without_questions_or_numbers(run, monkeypatch):
  with pytest.raises(ValueError, match="must be at least 1 question, got 0"):
    multiple_choice.score_choices(run, [])
  questions = [multiple_choice.Question("a", ["x", "y"], 0)]
  for value in (np.nan, -np.inf):
    scores = np.array([-1.0, value])
    monkeypatch.setattr(multiple_choice, "loglikelihoods", lambda *_, scores=scores: scores)
    with pytest.raises(ValueError, match=f"must be finite, got {value} with step 0"):
      multiple_choice.score_choices(run, questions)
