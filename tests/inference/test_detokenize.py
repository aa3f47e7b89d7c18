"""Tests of dsmoe/inference/detokenize.py."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from dsmoe.data import tokenizer as tokenizer_lib
from dsmoe.inference.detokenize import Detokenizer, StopStrings, Vocabulary

TEXTS = [f"def f{i}(x):\n    return x * {i}\n" for i in range(50)] + ["naïve 日本語 🙂"]
TOKENIZER = tokenizer_lib.train_tokenizer(TEXTS, 300)
VOCABULARY = Vocabulary(TOKENIZER)
ENCODER = tokenizer_lib.text_only(TOKENIZER)
# Sentencepiece's way: pieces with a mark for spaces, and bytes.
PIECES = ["<unk>", "▁the", "▁cat", "s", "▁", *(f"<0x{byte:02X}>" for byte in range(256))]
SENTENCEPIECE = Tokenizer(models.BPE({p: i for i, p in enumerate(PIECES)}, [], byte_fallback=True))
SENTENCEPIECE.decoder = decoders.Sequence(
  [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
)


def cut(items, sizes):
  """Cuts a sequence into pieces of the given sizes, again and again."""
  sizes, start = itertools.cycle(sizes), 0
  while start < len(items):
    end = start + next(sizes)
    yield items[start:end]
    start = end


def pushed(detokenizer, pieces):
  return [detokenizer.push(piece) for piece in pieces] + [detokenizer.flush()]


SIZES = st.lists(st.integers(1, 30), min_size=1, max_size=3)


@settings(max_examples=100)
@given(st.text(), SIZES)
def test_pieces_joined_are_the_text_and_whole_characters(text, sizes):
  ids = ENCODER.encode(text).ids
  pieces = pushed(Detokenizer(VOCABULARY), cut(ids, sizes))
  assert "".join(pieces) == text
  if "\ufffd" not in text:
    assert not any("\ufffd" in piece for piece in pieces)


@settings(max_examples=100)
@given(st.lists(st.integers(0, TOKENIZER.get_vocab_size() + 3)), SIZES)
def test_any_tokens_give_what_decode_gives(ids, sizes):
  # Most are no valid UTF-8; some are special, some have no token at all.
  pieces = pushed(Detokenizer(VOCABULARY), cut(ids, sizes))
  assert "".join(pieces) == TOKENIZER.decode(ids, skip_special_tokens=True)


def test_a_character_comes_with_its_last_byte():
  ids = ENCODER.encode("a🙄b").ids
  assert len(ids) > 3  # the character is not one token
  pieces = pushed(Detokenizer(VOCABULARY), [[i] for i in ids])
  assert [piece for piece in pieces if piece] == ["a", "🙄", "b"]


def test_context_is_not_returned_but_its_unfinished_character_is():
  ids = ENCODER.encode("ab🙄c").ids
  for length in range(len(ids) + 1):
    text = "".join(pushed(Detokenizer(VOCABULARY, ids[:length]), [[i] for i in ids[length:]]))
    known = TOKENIZER.decode(ids[:length]).rstrip("\ufffd")
    assert known + text == "ab🙄c"


def test_a_space_before_the_first_word_is_kept_after_a_context():
  the, cat, s = (PIECES.index(piece) for piece in ("▁the", "▁cat", "s"))
  assert pushed(Detokenizer(Vocabulary(SENTENCEPIECE)), [[the], [cat, s]]) == ["the", " cats", ""]
  assert pushed(Detokenizer(Vocabulary(SENTENCEPIECE), [the]), [[cat], [s], [cat]]) == [
    " cat",
    "s",
    " cat",
    "",
  ]


def test_byte_fallback():
  ids = [PIECES.index(f"<0x{byte:02X}>") for byte in "é🙂".encode()]
  assert [p for p in pushed(Detokenizer(Vocabulary(SENTENCEPIECE)), [[i] for i in ids]) if p] == [
    "é",
    "🙂",
  ]


def first_stop(text, stops):
  """The text before the stop that is complete first, looking at every beginning in turn."""
  for end in range(len(text) + 1):
    found = [stop for stop in stops if text[:end].endswith(stop)]
    if found:
      return text[: end - max(map(len, found))], True
  return text, False


@settings(max_examples=300)
@given(
  st.text("abc", max_size=40),
  st.lists(st.text("abc", min_size=1, max_size=5), max_size=4),
  SIZES,
)
def test_stops_do_not_depend_on_pieces(text, stops, sizes):
  matcher = StopStrings(stops)
  result, returned_late = "", False
  for piece in cut(text, sizes):
    result += matcher.push(piece)
    returned_late |= not first_stop(text, stops)[0].startswith(result)
  result += matcher.flush()
  assert (result, matcher.found) == first_stop(text, stops)
  assert not returned_late


def test_only_what_may_begin_a_stop_is_held_back():
  matcher = StopStrings(["\n\nUser:"])
  pieces = [matcher.push(piece) for piece in ("one", "\n", "two\n", "\nUs", "e", "r", ": x", "y")]
  assert pieces == ["one", "", "\ntwo", "", "", "", "", ""]
  assert matcher.found and matcher.flush() == ""


def test_an_empty_stop_is_refused():
  with pytest.raises(ValueError, match="at least 1 character each, got"):
    StopStrings(["a", ""])


@settings(max_examples=50)
@given(st.text())
def test_bytes_of_tokens_are_those_of_the_text(text):
  assert b"".join(map(VOCABULARY.token_bytes, ENCODER.encode(text).ids)) == text.encode()


def test_bytes_of_odd_tokens():
  assert VOCABULARY.token_bytes(0) == b"<|endoftext|>"
  assert VOCABULARY.token_bytes(9999) == b""
  token_bytes = Vocabulary(SENTENCEPIECE).token_bytes
  pieces = [token_bytes(PIECES.index(p)) for p in ("▁cat", "<0xF0>", "<unk>")]
  assert pieces == [b" cat", b"\xf0", b"<unk>"]


def test_another_decoder_is_refused():
  tokenizer = Tokenizer(models.WordPiece({"a": 0}))
  tokenizer.decoder = decoders.WordPiece()
  with pytest.raises(ValueError, match=r"byte-level or Sentencepiece's, got \['WordPiece'\]"):
    Vocabulary(tokenizer)


@settings(max_examples=300)
@given(
  st.text("abc", max_size=30),
  st.integers(0, 30),
  st.lists(st.text("abc", min_size=1, max_size=5), max_size=4),
  SIZES,
)
def test_no_stop_ends_in_an_exempt_beginning(text, num_exempt, stops, sizes):
  matcher = StopStrings(stops)
  result = "".join(matcher.push(piece, exempt=True) for piece in cut(text[:num_exempt], sizes))
  result += "".join(matcher.push(piece) for piece in cut(text[num_exempt:], sizes))
  result += matcher.flush()
  ends = [
    (place + len(stop), place)
    for stop in stops
    for place in range(len(text))
    if text.startswith(stop, place) and place + len(stop) > num_exempt
  ]
  assert (result, matcher.found) == ((text[: min(ends)[1]], True) if ends else (text, False))


def test_special_tokens_have_a_text_for_those_who_want_it():
  ids = [0, *ENCODER.encode("ab").ids, 0]
  assert "".join(pushed(Detokenizer(VOCABULARY), [ids])) == "ab"
  text = "".join(pushed(Detokenizer(VOCABULARY, skip_special=False), [ids]))
  assert text == "<|endoftext|>ab<|endoftext|>" == TOKENIZER.decode(ids, skip_special_tokens=False)
