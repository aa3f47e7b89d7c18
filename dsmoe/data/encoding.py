"""Encodes documents that come in pieces, a long one with the ids of its whole text.

A long document is encoded window by window. A window ends at a place that the tokenizer cannot see
across: what follows it has the same ids when it is encoded alone. This is tried with each tokenizer
and at each place, with `_MARGIN_CHARS` of text behind the place, so that a tokenizer may look ahead
that far.
"""

import itertools
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from dsmoe.data import tokenizer as tokenizer_lib
from dsmoe.data.files import Piece

_BATCH_CHARS = 1 << 20  # of short documents, encoded at once
_WINDOW_CHARS = 1 << 20
_LONGEST_WINDOW_CHARS = 16 << 20  # an encoding takes over 100 bytes of memory a character
_MARGIN_CHARS = 1 << 14
# Where to cut, best first, and how many places of each kind are tried: at the beginning of a line,
# before the space between two words, anywhere.
_PLACES = ((r"(?<=\n)(?=\w)", 16), (r"(?<=\w)(?= \w)", 16), (r"(?=.)", 64))


def encode(
  tokenizer: Tokenizer, end: int, pieces: Iterable[Piece]
) -> Iterator[tuple[np.ndarray, bool]]:
  """Encodes a stream of documents in bounded memory.

  Args:
    tokenizer: see `text_only` in dsmoe/data/tokenizer.py.
    end: id of the token that ends a document.
    pieces: of whole documents.

  Returns:
    uint32 ids and whether a document ends with them, in which case its end-of-document token is the
    last. The ids of a document, joined, are those that `encode_documents` gives for its
    whole text.

  Raises:
    ValueError: if a long document has no place where it can be cut.
  """
  pieces = iter(pieces)
  batch: list[str] = []
  size = 0
  for piece in pieces:
    if not piece.is_end:
      yield from _whole(tokenizer, end, batch)
      batch, size = [], 0
      yield from _long(tokenizer, end, itertools.chain([piece], pieces))
      continue
    batch.append(piece.text)
    size += len(piece.text)
    if size >= _BATCH_CHARS:
      yield from _whole(tokenizer, end, batch)
      batch, size = [], 0
  yield from _whole(tokenizer, end, batch)


def _whole(tokenizer: Tokenizer, end: int, texts: list[str]) -> Iterator[tuple[np.ndarray, bool]]:
  for tokens in tokenizer_lib.encode_documents(tokenizer, texts, end) if texts else ():
    yield tokens, True


def _long(
  tokenizer: Tokenizer, end: int, pieces: Iterator[Piece]
) -> Iterator[tuple[np.ndarray, bool]]:
  """Encodes one document; `pieces` is read up to its end and no further."""
  text, window, continuing = "", _WINDOW_CHARS, _without_prefix(tokenizer)
  for piece in pieces:
    text += piece.text
    if piece.is_end:
      break
    if len(text) < window:
      continue
    tokens, text_left = _first_part(tokenizer, continuing, text)
    if tokens is None:
      window *= 2
      if window > _LONGEST_WINDOW_CHARS:
        raise ValueError(
          f"a document of more than {len(text)} characters must have places where the tokenizer can "
          f"go on as at a beginning; there is none in the part that begins with {text[:40]!r}"
        )
      continue
    yield tokens, False
    text, tokenizer, window = text_left, continuing, _WINDOW_CHARS
  yield from _whole(tokenizer, end, [text])


def _first_part(
  tokenizer: Tokenizer, continuing: Tokenizer, text: str
) -> tuple[np.ndarray | None, str]:
  """Returns the ids of a text up to a place near its end, and the text from there on."""
  tokens = _ids(tokenizer, text)
  region = max(len(text) - 2 * _MARGIN_CHARS, 1), len(text) - _MARGIN_CHARS
  for pattern, count in _PLACES:
    for match in itertools.islice(re.compile(pattern, re.DOTALL).finditer(text, *region), count):
      tail = _ids(continuing, text[match.start() :])
      if 0 < len(tail) < len(tokens) and np.array_equal(tokens[-len(tail) :], tail):
        return tokens[: -len(tail)], text[match.start() :]
  return None, text


def _ids(tokenizer: Tokenizer, text: str) -> np.ndarray:
  """Returns the ids without the end of a document."""
  return tokenizer_lib.encode_documents(tokenizer, [text], 0)[0][:-1]


def _without_prefix(tokenizer: Tokenizer) -> Tokenizer:
  """Returns a copy that puts nothing before the text, for what is not a document's beginning."""
  copy = Tokenizer.from_str(json.dumps(_changed(json.loads(tokenizer.to_str()))))
  copy.encode_special_tokens = tokenizer.encode_special_tokens
  return copy


def _changed(value: Any) -> Any:
  """Removes from a tokenizer.json whatever puts a space or its like before a text."""
  if isinstance(value, list):
    return [_changed(item) for item in value if not _is_prepend(item)]
  if not isinstance(value, dict):
    return value
  changed = {
    key: None if key == "normalizer" and _is_prepend(item) else _changed(item)
    for key, item in value.items()
    if key not in ("vocab", "merges", "added_tokens")
  }
  if "add_prefix_space" in changed:
    changed["add_prefix_space"] = False
  if "prepend_scheme" in changed:
    changed["prepend_scheme"] = "never"
  return value | changed


def _is_prepend(value: Any) -> bool:
  return isinstance(value, dict) and value.get("type") == "Prepend"
