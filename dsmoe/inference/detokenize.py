"""Turns tokens into text as they are generated: whole characters, up to a stop string."""

import codecs
import json
from collections.abc import Iterable, Sequence

from tokenizers import Tokenizer

_KNOWN_DECODERS = {
  "ByteFallback",
  "ByteLevel",
  "Fuse",
  "Metaspace",
  "Replace",
  "Sequence",
  "Strip",
}
# The last tokens of a context tell its unfinished character and whether text has begun.
_CONTEXT_TOKENS = 8


class Vocabulary:
  """The bytes of each token, which need not be whole characters."""

  def __init__(self, tokenizer: Tokenizer):
    """Reads a byte-level tokenizer, or one in the manner of Sentencepiece.

    Raises:
      ValueError: for a decoder of another kind.
    """
    decoder = json.loads(tokenizer.to_str())["decoder"] or {}
    parts = {part.get("type"): part for part in [decoder, *decoder.get("decoders", ())]}
    if not parts.keys() & {"ByteLevel", "Metaspace", "Replace"} or parts.keys() - _KNOWN_DECODERS:
      raise ValueError(
        f"the tokenizer's decoder must be byte-level or Sentencepiece's, got {list(parts)}"
      )
    self._tokenizer = tokenizer
    self._byte_of = byte_characters() if "ByteLevel" in parts else {}
    metaspace = parts.get("Metaspace", {"prepend_scheme": "never"})
    self.strips_first_space = "Strip" in parts or metaspace.get("prepend_scheme") != "never"
    added = tokenizer.get_added_tokens_decoder()
    self._added = {token: entry.content.encode() for token, entry in added.items()}
    self.special = frozenset(token for token, entry in added.items() if entry.special)

  def token_bytes(self, token: int) -> bytes:
    """Returns a token's bytes: of its name if it is special, b"" for an unknown id."""
    if token in self._added:
      return self._added[token]
    name = self._tokenizer.id_to_token(token)
    if name is None:
      return b""
    if self._byte_of:
      if all(c in self._byte_of for c in name):
        return bytes(self._byte_of[c] for c in name)
      return name.encode()
    if len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
      return bytes.fromhex(name[3:5])  # byte fallback
    return name.replace("▁", " ").encode()


def byte_characters() -> dict[str, int]:
  """Returns the byte behind each character of byte-level BPE.

  Printable bytes stand for themselves, the others follow from U+0100 on, in order.
  Source: GPT-2's encoder.
  """
  printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
  others = [byte for byte in range(256) if byte not in printable]
  characters = {chr(byte): byte for byte in printable}
  return characters | {chr(256 + place): byte for place, byte in enumerate(others)}


class Detokenizer:
  """Decodes one sequence of tokens, a few tokens at a time.

  The returned texts joined are `tokenizer.decode` of all tokens without the special ones, except
  that the number of U+FFFD for invalid UTF-8 can be smaller than with a byte-fallback tokenizer.
  """

  def __init__(
    self, vocabulary: Vocabulary, context: Sequence[int] = (), skip_special: bool = True
  ):
    """Starts after the tokens of `context`, whose text is not returned.

    A character that `context` leaves unfinished is returned once it is whole. Special tokens have
    no text, or their names for `skip_special=False`.
    """
    self._vocabulary = vocabulary
    self._skipped = vocabulary.special if skip_special else frozenset()
    self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
    self._strip = vocabulary.strips_first_space
    self.push(context[-_CONTEXT_TOKENS:])

  def push(self, tokens: Iterable[int]) -> str:
    """Returns the characters that are whole with `tokens`, perhaps none."""
    token_bytes = self._vocabulary.token_bytes
    new = b"".join(token_bytes(token) for token in tokens if token not in self._skipped)
    if self._strip and new:
      self._strip, new = False, new.removeprefix(b" ")
    return self._decoder.decode(new)

  def flush(self) -> str:
    """Ends the text; returns U+FFFD for an unfinished character, or ""."""
    return self._decoder.decode(b"", final=True)


class StopStrings:
  """Ends a text before its first stop string, however the text is cut into pieces.

  The first is the one that ends first; of those that end at the same place, the longest.
  """

  def __init__(self, stops: Sequence[str] = ()):
    """Prepares to look for `stops`.

    Raises:
      ValueError: for an empty string.
    """
    if not all(stops):
      raise ValueError(f"stop strings must have at least 1 character each, got {list(stops)}")
    self._stops = tuple(stops)
    self._longest = max(map(len, stops), default=0)
    self._held = ""
    self._num_exempt = 0  # characters at the beginning of _held in which no stop string may end
    self.found = False

  def push(self, text: str, exempt: bool = False) -> str:
    """Returns the text that cannot belong to a stop string; "" once one was found.

    With `exempt` no stop string ends in `text`; one that begins there may end in what follows.
    """
    if self.found:
      return ""
    text = self._held + text
    if exempt:
      self._num_exempt = len(text)
    begin = self._num_exempt + 1
    places = [(text.find(stop, max(0, begin - len(stop))), len(stop)) for stop in self._stops]
    ends = [(place + size, place) for place, size in places if place >= 0]
    if ends:
      self.found, self._held = True, ""
      return text[: min(ends)[1]]
    held = min(self._longest - 1, len(text)) if self._stops else 0
    while held and not any(stop.startswith(text[-held:]) for stop in self._stops):
      held -= 1
    self._held = text[len(text) - held :]
    self._num_exempt = max(0, self._num_exempt - (len(text) - held))
    return text[: len(text) - held]

  def flush(self) -> str:
    """Ends the text; returns what was held back as the possible beginning of a stop string."""
    result, self._held = self._held, ""
    return result
