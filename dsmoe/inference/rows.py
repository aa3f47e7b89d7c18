"""One request in the batch, and the events that report its progress."""

import dataclasses
from typing import NamedTuple

from dsmoe.inference.sampling import Sampling, TokenLogprobs


class Logprob(NamedTuple):
  """A token's log-probability under the model, before temperature, penalties and filters."""

  token: int
  logprob: float
  top: tuple[tuple[int, float], ...]  # the likeliest (token, logprob), descending
  rank: int = 0  # the token's among all; 1 is the likeliest


class Event(NamedTuple):
  """What one round added to a request."""

  request: int  # its number, from `Batcher.submit`
  tokens: tuple[int, ...]  # the new ones
  logprobs: tuple[Logprob, ...]  # of each new token; empty when not asked for
  # Of the prompt's tokens, None for the first; in a request's first event if asked for.
  prompt_logprobs: tuple[Logprob | None, ...]
  finish: str | None  # "stop" or "length" in the last event, otherwise None


@dataclasses.dataclass(eq=False)
class Row:
  """A request in the batch or in its queue, with the state of its generation."""

  request: int  # its number, from `Batcher.submit`
  prompt: list[int]
  sampling: Sampling
  keys: list[bytes]  # of the prompt's pages
  shard: int = 0  # the part of the rows, and of the cache, to which it belongs on a mesh
  pages: list[int] = dataclasses.field(default_factory=list)
  length: int = 0  # tokens in the cache
  tokens: list[int] = dataclasses.field(default_factory=list)  # generated, a stop token included
  draft: int = 0  # the token guessed to come after the newest one
  prompt_logprobs: list[Logprob | None] = dataclasses.field(default_factory=lambda: [None])

  @property
  def is_ready(self) -> bool:
    """Whether the whole prompt is in the cache."""
    return self.length >= len(self.prompt)

  @property
  def remaining(self) -> int:
    """The number of tokens still to generate."""
    return self.sampling.max_tokens - len(self.tokens)


def logprob_at(values: TokenLogprobs, at: tuple[int, ...], token: int, row: Row) -> Logprob:
  """Returns one token's log-probability out of a batch's, and as many others as `row` asks for."""
  shown = row.sampling.logprobs or 0
  top = zip(values.top_tokens[at][:shown].tolist(), values.top[at][:shown].tolist())
  return Logprob(token, float(values.chosen[at]), tuple(top), int(values.rank[at]))
