"""Tests of dsmoe/data/encoding.py: a long document has the ids of its whole text."""

import functools
import random

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from dsmoe.data import encoding, files
from dsmoe.data import tokenizer as tokenizer_lib
from tests.data.cases import words

# The splits of GPT-4's tokenizer, and of DeepSeek-V3's in its order.
GPT4 = (
  r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]"
  r"|\s+(?!\S)|\s+"
)
DEEPSEEK = (
  r"\p{N}{1,3}",
  r"[一-龥぀-ゟ゠-ヿ]+",
  r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
  r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)


def split(pattern):
  return pre_tokenizers.Split(Regex(pattern), "isolated")


byte_level = functools.partial(pre_tokenizers.ByteLevel, add_prefix_space=False, use_regex=False)


def trained(model, trainer, normalizer=None, pre_tokenizer=None):
  tokenizer = Tokenizer(model)
  if normalizer is not None:
    tokenizer.normalizer = normalizer
  if pre_tokenizer is not None:
    tokenizer.pre_tokenizer = pre_tokenizer
  rng = random.Random(1)
  lines = [words(i, 40) + f" {rng.random()} don't  \n\n\tif x: ACGT" for i in range(60)]
  tokenizer.train_from_iterator(lines, trainer)
  tokenizer.encode_special_tokens = True
  return tokenizer


def bpe(**parts):
  trainer = trainers.BpeTrainer(
    vocab_size=420,
    special_tokens=["<|endoftext|>", "<unk>"],
    show_progress=False,
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
  )
  return trained(models.BPE(unk_token="<unk>"), trainer, **parts)


def llama2():
  """Byte-pair encoding of the whole text at once, behind a space that is put before it."""
  normalizer = normalizers.Sequence(
    [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁"), normalizers.NFKC()]
  )
  trainer = trainers.BpeTrainer(
    vocab_size=400,
    special_tokens=["<unk>", "<|endoftext|>"],
    show_progress=False,
  )
  tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
  tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
  tokenizer.train_from_iterator([words(i, 40) for i in range(60)], trainer)
  tokenizer.pre_tokenizer, tokenizer.normalizer = None, normalizer
  assert tokenizer.pre_tokenizer is None
  return tokenizer


def unigram():
  trainer = trainers.UnigramTrainer(
    vocab_size=200,
    special_tokens=["<unk>", "<|endoftext|>"],
    unk_token="<unk>",
    show_progress=False,
  )
  return trained(
    models.Unigram(), trainer, normalizers.NFKC(), pre_tokenizers.Metaspace(prepend_scheme="first")
  )


def word_level():
  trainer = trainers.WordLevelTrainer(
    vocab_size=60, special_tokens=["<unk>", "<|endoftext|>"], show_progress=False
  )
  return trained(
    models.WordLevel(unk_token="<unk>"),
    trainer,
    normalizers.Sequence([normalizers.NFD(), normalizers.Lowercase(), normalizers.Strip()]),
    pre_tokenizers.Whitespace(),
  )


def own():
  texts = [words(i, 40) + "\n\ndef f(x):\n    return 1234567" for i in range(60)]
  return tokenizer_lib.text_only(tokenizer_lib.train_tokenizer(texts, 400))


def with_added_tokens():
  tokenizer = own()
  tokenizer.add_tokens(["alpha beta", "\n\n\n", "delta "])
  return tokenizer


TOKENIZERS = {
  "own": own,
  "added tokens": with_added_tokens,
  "GPT-4": lambda: bpe(pre_tokenizer=pre_tokenizers.Sequence([split(GPT4), byte_level()])),
  "DeepSeek": lambda: bpe(
    pre_tokenizer=pre_tokenizers.Sequence([*map(split, DEEPSEEK), byte_level()])
  ),
  "prefix space": lambda: bpe(pre_tokenizer=byte_level(add_prefix_space=True, use_regex=True)),
  "no pre-tokenizer": llama2,
  "unigram": unigram,
  "words": word_level,
}
rng = random.Random(0)
DOCUMENTS = {
  "prose": " ".join(words(i, 30) for i in range(100)),
  "one line": words(3, 4000).replace("\n", " "),
  "code": "".join(
    f"\n\n\n\ndef f{i}(x):\n{' ' * rng.randrange(9)}return '{words(i, 3)}'  \n\t"
    for i in range(400)
  ),
  "digits": "".join(rng.choice("0123456789") for _ in range(6000)),
  "letters": "".join(rng.choice("ACGT") for _ in range(6000)),
  "one letter": "a" * 6000,
  "white space": "a" + " " * 2000 + "\n" * 2000 + "b\n" * 2000,
  "Chinese": "".join(chr(rng.randrange(0x4E00, 0x9FA5)) for _ in range(6000)),
  "combining": "e\u0301n\u0303 한글 " * 1500,
  "emoji": "👩‍👩‍👧 " * 1500,
  "marks": "<|endoftext|>" * 500,
}


def pieces_of(text, size):
  return [files.Piece(text[i : i + size], i + size >= len(text)) for i in range(0, len(text), size)]


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
  monkeypatch.setattr(encoding, "_WINDOW_CHARS", 1000)
  monkeypatch.setattr(encoding, "_MARGIN_CHARS", 200)
  monkeypatch.setattr(encoding, "_LONGEST_WINDOW_CHARS", 16_000)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_long_document_has_the_ids_of_its_whole_text(name):
  tokenizer = TOKENIZERS[name]()
  for kind, text in DOCUMENTS.items():
    (expected,) = tokenizer_lib.encode_documents(tokenizer, [text], 7)
    made = list(encoding.encode(tokenizer, 7, pieces_of(text, 700)))
    np.testing.assert_array_equal(np.concatenate([ids for ids, _ in made]), expected, err_msg=kind)
    assert [is_end for _, is_end in made] == [False] * (len(made) - 1) + [True]
    if kind in ("prose", "code", "one line"):
      assert max(len(ids) for ids, _ in made) < len(expected) / 2, kind


def test_long_and_short_documents_keep_their_order():
  tokenizer = own()
  texts = [words(i, n) for i, n in enumerate((3, 900, 1, 1, 700, 2, 2))]
  stream = [piece for text in texts for piece in pieces_of(text, 700)]
  found: list[list[int]] = [[]]
  for ids, is_end in encoding.encode(tokenizer, 7, stream):
    found[-1] += ids.tolist()
    if is_end:
      found.append([])
  assert found == [e.tolist() for e in tokenizer_lib.encode_documents(tokenizer, texts, 7)] + [[]]


def test_a_document_without_a_place_to_cut_is_refused():
  """The normalizer changes the first letter of whatever it is given."""
  tokenizer = own()
  tokenizer.normalizer = normalizers.Replace(Regex(r"\Ab"), "zz")
  with pytest.raises(ValueError, match=r"more than \d+ characters must have places .*'bbbb"):
    list(encoding.encode(tokenizer, 7, pieces_of("b" * 40_000, 700)))
