"""Tests of dsmoe/data/tokenizer.py."""

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from dsmoe.data import tokenizer as tokenizer_lib

TEXTS = [f"def f{i}(x):\n    return x * {i} + {i % 7}\n" for i in range(200)] + ["naïve 日本語 🙂"]
TOKENIZER = tokenizer_lib.train_tokenizer(TEXTS, 400)
ENCODER = tokenizer_lib.text_only(TOKENIZER)


def test_ids_of_special_tokens_and_bytes():
  assert [TOKENIZER.id_to_token(i) for i in range(5)] == list(tokenizer_lib.SPECIAL_TOKENS)
  assert TOKENIZER.token_to_id("<|endoftext|>") == tokenizer_lib.eos_id(TOKENIZER) == 0
  assert tokenizer_lib.fim_ids(TOKENIZER) == (1, 2, 3)
  assert TOKENIZER.get_vocab_size() == 400
  assert len(TOKENIZER.encode(" return").ids) == 1  # frequent words have become one token


@settings(max_examples=50, deadline=None)
@given(st.text())
def test_any_text_survives(text):
  ids = ENCODER.encode(text).ids
  assert TOKENIZER.decode(ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("name", tokenizer_lib.SPECIAL_TOKENS)
def test_a_special_token_named_in_a_document_is_text(name):
  text = f"the mark {name} ends a document"
  (tokens,) = tokenizer_lib.encode_documents(tokenizer_lib.text_only(TOKENIZER), [text], 0)
  assert tokens[-1] == 0
  assert all(token >= len(tokenizer_lib.SPECIAL_TOKENS) for token in tokens[:-1])
  assert TOKENIZER.decode(tokens[:-1].tolist()) == text
  assert TOKENIZER.encode(name).ids == [TOKENIZER.token_to_id(name)]  # the original is unchanged


def test_training_twice_gives_the_same_tokenizer():
  # Another process hashes differently; ties between merges must not depend on it.
  program = (
    "from dsmoe.data import tokenizer\n"
    "texts = [f'def f{i}(x):\\n    return x * {i} + {i % 7}\\n' for i in range(200)]\n"
    "print(tokenizer.train_tokenizer([*texts, 'na\\u00efve \\u65e5\\u672c\\u8a9e \\U0001f642'], 400).to_str())"
  )
  for _ in range(2):
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert printed.stdout.decode().strip() == TOKENIZER.to_str()


def test_save_and_load(tmp_path):
  path = tmp_path / "tokenizer.json"
  path.write_text(TOKENIZER.to_str(pretty=True), encoding="utf-8")
  loaded = tokenizer_lib.load_tokenizer(path, vocab_size=400)
  assert loaded.to_str() == TOKENIZER.to_str()
  with pytest.raises(ValueError, match=r"vocabulary \(400 ids\).*vocab_size \(399\)"):
    tokenizer_lib.load_tokenizer(path, vocab_size=399)


@pytest.mark.parametrize("name", ["<|endoftext|>", "</s>", "<｜end▁of▁sentence｜>"])
def test_end_of_document_of_a_foreign_tokenizer(tmp_path, name):
  foreign = Tokenizer(models.WordLevel({"a": 0, name: 7, "?": 2}, unk_token="?"))
  foreign.save(str(tmp_path / "foreign.json"))
  loaded = tokenizer_lib.load_tokenizer(tmp_path / "foreign.json", vocab_size=8)
  assert tokenizer_lib.eos_id(loaded) == 7
  with pytest.raises(ValueError, match=r"\(8 ids\).*\(7\)"):  # ids count, not their number
    tokenizer_lib.load_tokenizer(tmp_path / "foreign.json", vocab_size=7)
  with pytest.raises(ValueError, match=r"fill-in-the-middle needs.*<\|fim_prefix\|>"):
    tokenizer_lib.fim_ids(loaded)


def test_fill_in_the_middle_marks_of_deepseek():
  marks = {"<｜fim▁begin｜>": 4, "<｜fim▁hole｜>": 2, "<｜fim▁end｜>": 9}
  assert tokenizer_lib.fim_ids(Tokenizer(models.WordLevel(marks))) == (4, 2, 9)


def test_errors(tmp_path):
  with pytest.raises(ValueError, match=r"vocab_size \(260\) must be at least 261"):
    tokenizer_lib.train_tokenizer(TEXTS, 260)
  with pytest.raises(ValueError, match=r"readable tokenizer.json, got .*absent.json"):
    tokenizer_lib.load_tokenizer(tmp_path / "absent.json")
  (tmp_path / "bad.json").write_text("{}")
  with pytest.raises(ValueError, match=r"readable tokenizer.json, got .*bad.json"):
    tokenizer_lib.load_tokenizer(tmp_path / "bad.json")
  Tokenizer(models.WordLevel({"a": 0})).save(str(tmp_path / "endless.json"))
  with pytest.raises(ValueError, match=r"one of <\|endoftext\|>, </s>, <｜end▁of▁sentence｜>"):
    tokenizer_lib.load_tokenizer(tmp_path / "endless.json")
