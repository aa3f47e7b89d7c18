"""The batcher's events as text, and as log-probabilities in OpenAI's and vLLM's forms."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from dsmoe.inference.batcher import Event, Logprob
from dsmoe.inference.detokenize import Detokenizer, StopStrings, Vocabulary
from dsmoe.inference.text_model import ServedModel
from dsmoe.serving.requests import Request

_LOWEST_LOGPROB = -9999.0  # JSON has no infinity


class Entry(NamedTuple):
  """One token of an answer with its log-probability."""

  token: bytes
  offset: int  # of its first character in the returned text
  logprob: float | None  # None for the first token of an echoed prompt
  top: tuple[tuple[bytes, float], ...]  # the likeliest tokens, descending


class Delta(NamedTuple):
  """What one event adds to a choice."""

  text: str
  entries: tuple[Entry, ...]  # of the tokens whose text is out; empty without log-probabilities
  finish: str | None  # "stop" or "length" in the last delta, otherwise None


class Choice:
  """The text of one choice; what may begin a stop string is held back until that is known."""

  def __init__(self, served: ServedModel, request: Request, index: int):
    self._request = request
    self._prompt, sampling = request.choices[index]
    self._min_tokens = sampling.min_tokens
    self._vocabulary = served.vocabulary
    context = () if request.echo else self._prompt
    skip = request.skip_special_tokens
    self._text = Detokenizer(served.vocabulary, context, skip)
    self._stops = StopStrings(request.stops)
    # A second detokenizer, of the entries' tokens, tells at which character each begins.
    self._reader = Detokenizer(served.vocabulary, context, skip)
    self._num_read = self._num_sent = 0  # characters of the entries, and of the returned text
    self._entries: list[Entry] = []
    self._begun = False
    self.num_tokens = 0  # new ones, up to the one that completes a stop string
    self.num_surplus = 0  # new ones after that: the batcher generates several before it is told
    self.prompt_logprobs: list[dict[str, Any] | None] | None = None

  def push(self, event: Event) -> Delta:
    """Returns the text that is certain after `event`, and the entries of its tokens.

    The choice ends with the first delta that has a `finish`, even if more events come.
    """
    text = "" if self._begun else self._begin(event)
    tokens, finish = event.tokens, event.finish
    if tokens and tokens[-1] in self._request.ends:
      tokens, finish = tokens[:-1], "stop"
    for place, token in enumerate(event.tokens):
      self.num_tokens += 1
      if place < len(tokens):
        exempt = self.num_tokens <= self._min_tokens
        text += self._stops.push(self._text.push([token]), exempt)
      if event.logprobs and self._request.logprobs is not None:
        self._add(token, event.logprobs[place])
      if self._stops.found:
        self.num_surplus += len(event.tokens) - place - 1
        break
    if finish:
      text += self._stops.push(self._text.flush()) + self._stops.flush()
    if self._stops.found:
      finish = "stop"
    self._num_sent += len(text)
    ready = 0
    while ready < len(self._entries) and (
      self._entries[ready].offset < self._num_sent or (finish and not self._stops.found)
    ):
      ready += 1
    entries, self._entries = tuple(self._entries[:ready]), self._entries[ready:]
    return Delta(text, entries, finish)

  def _begin(self, event: Event) -> str:
    """Takes in the prompt with the first event; returns its text if it is echoed."""
    self._begun, request = True, self._request
    if request.prompt_logprobs is not None:
      self.prompt_logprobs = [
        None if value is None else _ranked(self._vocabulary, value, request.prompt_logprobs)
        for value in event.prompt_logprobs
      ]
    if not request.echo:
      return ""
    if request.logprobs is not None:
      for token, value in zip(self._prompt, event.prompt_logprobs):
        self._add(token, value)
    return self._text.push(self._prompt)

  def _add(self, token: int, value: Logprob | None) -> None:
    bytes_of, logprob = self._vocabulary.token_bytes, None
    top: tuple[tuple[bytes, float], ...] = ()
    if value is not None:
      likeliest = value.top[: self._request.logprobs]
      top = tuple((bytes_of(i), _clamp(p)) for i, p in likeliest)
      logprob = _clamp(value.logprob)
    self._entries.append(Entry(bytes_of(token), self._num_read, logprob, top))
    self._num_read += len(self._reader.push([token]))


def _clamp(logprob: float) -> float:
  return max(_LOWEST_LOGPROB, logprob)


def _show(token: bytes) -> str:
  """Returns a token's text, or its bytes spelt out when they are not whole characters."""
  try:
    return token.decode()
  except UnicodeDecodeError:
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)


def _ranked(vocabulary: Vocabulary, value: Logprob, num_top: int) -> dict[str, Any]:
  """Returns one token of vLLM's `prompt_logprobs`: by id, it and the likeliest ones."""
  ranks = {token: (rank, p) for rank, (token, p) in enumerate(value.top[:num_top], 1)}
  ranks |= {value.token: (value.rank, value.logprob)}
  return {
    str(token): {
      "logprob": _clamp(p),
      "rank": rank,
      "decoded_token": vocabulary.token_bytes(token).decode(errors="replace"),
    }
    for token, (rank, p) in ranks.items()
  }


def completion_logprobs(entries: Sequence[Entry]) -> dict[str, Any]:
  """Returns the `logprobs` of a completion; its `top_logprobs` always include the token itself."""
  top = []
  for entry in entries:
    likeliest = {_show(token): p for token, p in reversed(entry.top)}  # the best of equal texts
    if entry.logprob is not None:
      likeliest = {_show(entry.token): entry.logprob} | likeliest
    top.append(likeliest or None)
  return {
    "tokens": [_show(entry.token) for entry in entries],
    "token_logprobs": [entry.logprob for entry in entries],
    "top_logprobs": top,
    "text_offset": [entry.offset for entry in entries],
  }


def chat_logprobs(entries: Sequence[Entry]) -> dict[str, Any]:
  """Returns the `logprobs` of a chat message."""

  def one(token: bytes, logprob: float | None) -> dict[str, Any]:
    return {"token": token.decode(errors="replace"), "logprob": logprob, "bytes": list(token)}

  content = [
    one(e.token, e.logprob) | {"top_logprobs": [one(token, p) for token, p in e.top]}
    for e in entries
  ]
  return {"content": content, "refusal": None}
