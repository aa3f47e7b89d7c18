"""A request on its way through the batcher, and what is told of it."""

import dataclasses
from typing import NamedTuple

from dsmoe.inference.sampling import Sampling, TokenLogprobs


class Logprob(NamedTuple):
  """Of one token, under the model itself."""

  token: int
  logprob: float
  top: tuple[tuple[int, float], ...]  # the likeliest (token, logprob), descending


class Event(NamedTuple):
  """News of one request."""

  request: int
  tokens: tuple[int, ...]  # new ones
  logprobs: tuple[Logprob, ...]  # of each, or none when not asked for
  prompt_logprobs: tuple[Logprob | None, ...]  # once, the first None; or none
  finish: str | None  # "stop", "length"; then nothing comes after it


@dataclasses.dataclass(eq=False)
class Row:
  """A request and how far it is."""

  request: int
  prompt: list[int]
  sampling: Sampling
  keys: list[bytes]  # of the prompt's pages
  pages: list[int] = dataclasses.field(default_factory=list)
  length: int = 0  # tokens in the cache
  tokens: list[int] = dataclasses.field(default_factory=list)  # drawn, stop token included
  draft: int = 0
  prompt_logprobs: list[Logprob | None] = dataclasses.field(default_factory=lambda: [None])

  @property
  def is_ready(self) -> bool:
    """Whether the whole prompt is in the cache."""
    return self.length >= len(self.prompt)

  @property
  def remaining(self) -> int:
    return self.sampling.max_tokens - len(self.tokens)


def logprob_at(values: TokenLogprobs, at: tuple[int, ...], token: int, row: Row) -> Logprob:
  """Picks one token's log-probabilities out of a batch's, with as many others as `row` wants."""
  shown = row.sampling.logprobs or 0
  top = zip(values.top_tokens[at][:shown].tolist(), values.top[at][:shown].tolist())
  return Logprob(token, float(values.chosen[at]), tuple(top))
