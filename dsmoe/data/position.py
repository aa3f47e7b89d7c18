"""The place of a run in its training data, which is saved beside each checkpoint.

It counts what was consumed, so that a run goes on at the very next token of every source whatever
has changed: the batch size, the sequence length, the weights of the mixture or its sources.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dsmoe.config import Config, DataConfig

_PROPORTION = 100  # what the smallest weight becomes before weights are rounded down


@dataclasses.dataclass(frozen=True)
class Position:
  """What a run has consumed since its first step.

  Attributes:
    sequences: rows of all batches.
    tokens: of those rows.
    sources: the name of each source that was ever read, and the tokens of it in those rows. Its
      place here is its number, which decides the order of its documents.
    order: the numbers of `data.train_globs`, in their order; None for all, as they are in `sources`.
  """

  sequences: int
  tokens: int
  sources: tuple[tuple[str, int], ...]
  order: tuple[int, ...] | None = None

  def __post_init__(self):
    if self.order is None:
      object.__setattr__(self, "order", tuple(range(len(self.sources))))

  def advance(self, config: DataConfig, sequences: int) -> "Position":
    """Returns the position after that many more rows were read with this config."""
    before = rows_of_sources(self.sequences, config.train_weights)
    after = rows_of_sources(self.sequences + sequences, config.train_weights)
    S, numbers = config.sequence_length, self.numbers_of_sources(config.train_globs)
    consumed = self.tokens_of_sources(config.train_globs)
    sources = dict(enumerate(self.sources))
    for number, name, tokens, a, b in zip(
      numbers, config.train_globs, consumed, before, after, strict=True
    ):
      sources[number] = name, tokens + (b - a) * S
    return Position(
      self.sequences + sequences,
      self.tokens + sequences * S,
      tuple(sources[number] for number in range(len(sources))),
      tuple(numbers),
    )

  def numbers_of_sources(self, globs: Sequence[str]) -> list[int]:
    """Returns the number of each source, found by its name, also of one that was away for a while.

    A name that is not known is that of a renamed source, if the one in its place has gone, or else
    of a new one, whose number is the next.
    """
    order = self.order or ()
    known = {name: n for n, (name, _) in reversed(list(enumerate(self.sources)))}
    numbers: list[int] = []
    for place, name in enumerate(globs):
      number = order[place] if place < len(order) else None
      if number is None or self.sources[number][0] != name:
        if name in known:
          number = known[name]
        elif number is not None and self.sources[number][0] in globs:
          number = None
      if number is None or number in numbers:
        number = max([len(self.sources) - 1, *numbers]) + 1
      numbers.append(number)
    return numbers

  def tokens_of_sources(self, globs: Sequence[str]) -> list[int]:
    """Returns the tokens consumed of each source; see `numbers_of_sources`."""
    numbers = self.numbers_of_sources(globs)
    return [self.sources[n][1] if n < len(self.sources) else 0 for n in numbers]

  def to_dict(self) -> dict[str, Any]:
    """Returns plain values for JSON."""
    return dataclasses.asdict(self)


def first_position(config: DataConfig) -> Position:
  """Returns the position of a run that has read nothing."""
  return Position(0, 0, tuple((name, 0) for name in config.train_globs))


def position_from_dict(
  saved: Mapping[str, Any], read_config_then: Callable[[], Config]
) -> Position:
  """Reads a position that was saved beside a checkpoint.

  Args:
    saved: from `Position.to_dict`, or {"next_batch": n} of older versions, which counted batches.
    read_config_then: reads the config of the run that saved it, by which batches become rows;
      called for the latter only.

  Raises:
    ValueError: if it is neither.
  """
  try:
    if "next_batch" in saved:
      batches, config = _count(saved["next_batch"]), read_config_then()
      return first_position(config.data).advance(config.data, batches * config.batch_size)
    sources = tuple((str(name), _count(tokens)) for name, tokens in saved["sources"])
    order = tuple(map(_count, saved.get("order", range(len(sources)))))  # older ones have none
    if len({*order}) < len(order) or not {*order} <= {*range(len(sources))}:
      raise ValueError(f"{order} must be numbers of the sources")
    return Position(_count(saved["sequences"]), _count(saved["tokens"]), sources, order)
  except (KeyError, TypeError, ValueError) as error:
    raise ValueError(
      f"the data position of a checkpoint must have its counts of sequences and tokens, got "
      f"{saved} ({error!r})"
    ) from error


def _count(value: Any) -> int:
  if type(value) is not int or value < 0:
    raise ValueError(f"{value!r} is no count")
  return value


def rows_of_sources(num_rows: int, weights: Sequence[float]) -> list[int]:
  """Returns how many of a mixture's first rows come from each source.

  The order of a mixture: row n comes from the source whose number grows from n to n + 1 rows. These
  numbers never differ from a source's share by more than a row for each source before it. Ratios of
  weights are rounded by less than 1%.

  Args:
    num_rows: at least 0.
    weights: positive, one for each source.

  Source: grain 0.2.18, `MixedMapDataset`, which gives the same order; written here because
  positions in checkpoints depend on it.
  """
  scale = _PROPORTION / min(weights)
  proportions = [int(weight * scale) for weight in weights]
  remaining, rows = sum(proportions), num_rows
  counts = []
  for proportion in proportions:
    others = rows * (remaining - proportion) // remaining
    counts.append(rows - others)
    remaining, rows = remaining - proportion, others
  return counts
