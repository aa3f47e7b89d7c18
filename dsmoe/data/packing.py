"""Computes rows of tokens from their index: the tokens, targets, positions and masks.

dsmoe/data/batches.py describes the arrays of a row. S is the number of tokens of a row.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from etils import epath

from dsmoe.config import DataConfig
from dsmoe.data import tokenizer as tokenizer_lib
from dsmoe.data.position import rows_of_sources
from dsmoe.data.records import PreparedData
from dsmoe.data.shards import Documents

PackedRow = dict[str, np.ndarray]

# Rows of a stream without end. grain adds to and multiplies lengths, which must stay below 2**63.
ENDLESS = 2**48


def pack(
  pieces: Sequence[np.ndarray],
  sequence_length: int,
  cross_document_attention: bool,
  first_token_weight: float = 0.0,
) -> PackedRow:
  """Builds a row from consecutive pieces of documents.

  Args:
    pieces: integer arrays, each of one document, S + 1 tokens together; fewer are padded.
    sequence_length: S.
    cross_document_attention: see dsmoe/data/batches.py.
    first_token_weight: weight of a target that belongs to the next document, which is 1 with
      `cross_document_attention`.

  Returns:
    {tokens, targets, positions, segments, weights}, each [S].
  """
  S = sequence_length
  stream = np.concatenate([*pieces, np.zeros(0, np.uint32)]).astype(np.int32)
  lengths = np.array([len(piece) for piece in pieces], np.int64)
  document = np.repeat(np.arange(1, len(pieces) + 1, dtype=np.int32), lengths)
  starts = np.repeat(np.cumsum(lengths) - lengths, lengths)
  n = max(len(stream) - 1, 0)  # inputs
  row = {name: np.zeros(S, np.int32) for name in ("tokens", "targets", "positions", "segments")}
  weights = np.zeros(S, np.float32)
  row["tokens"][:n] = stream[:-1]
  row["targets"][:n] = stream[1:]
  if cross_document_attention:
    row["positions"][:n] = np.arange(n)
    row["segments"][:n] = 1
    weights[:n] = 1
  else:
    row["positions"][:n] = (np.arange(len(stream)) - starts)[:-1]
    row["segments"][:n] = document[:-1]
    weights[:n] = np.where(document[1:] == document[:-1], 1, first_token_weight)
  return row | {"weights": weights}


def fill_in_the_middle(
  read: Callable[[int, int], np.ndarray],
  length: int,
  marks: tuple[int, int, int],
  entropy: Sequence[int],
  start: int,
  stop: int,
) -> np.ndarray:
  """Turns a document into prefix mark, prefix, suffix mark, suffix, middle mark, middle, end.

  Args:
    read: reads the document's tokens from one place up to another.
    length: of the document in tokens, n + 1; the last one is its end, which stays last.
    marks: ids of the prefix, suffix and middle marks.
    entropy: non-negative numbers that decide where to split.
    start, stop: which of the n + 4 resulting ids are wanted.

  Returns:
    [stop - start] ids, uint32.

  Source: arXiv:2207.14255, section 3 (PSM). Splits lie between tokens, not characters, so that a
  document's length is known without tokenising it again.
  """
  n = length - 1
  a, b = np.sort(_random(entropy, 2) % np.uint64(n + 1)).tolist()
  parts: list[np.ndarray] = []
  position = 0
  for mark, begin, end in ((marks[0], 0, a), (marks[1], b, n), (marks[2], a, b), (None, n, n + 1)):
    if mark is not None:
      if start <= position < stop:
        parts.append(np.array([mark], np.uint32))
      position += 1
    low, high = max(start - position, 0), min(stop - position, end - begin)
    if low < high:
      parts.append(read(begin + low, begin + high))
    position += end - begin
  return np.concatenate([*parts, np.zeros(0, np.uint32)])


class TrainRows:
  """The endless rows of one source, by index; row 0 begins with the token `first_token`.

  An epoch's order takes about 40 bytes per document; at most four epochs are in memory.
  """

  def __init__(
    self,
    paths: Sequence[epath.Path],
    prepared: PreparedData,
    config: DataConfig,
    source: int,
    first_token: int = 0,
  ):
    self._first_token = first_token  # negative where the first rows are never asked for
    self._documents = Documents(paths)
    self._lengths = self._documents.lengths
    self._config, self._entropy = config, (config.seed, source)
    # The same number of documents every epoch, so that every epoch has as many tokens.
    self._num_fim = round(config.fim_rate * len(self._lengths))
    if self._num_fim:
      assert prepared.tokenizer is not None
      self._marks = tokenizer_lib.fim_ids(prepared.tokenizer)
    self._epoch_tokens = int(self._lengths.sum()) + 3 * self._num_fim
    self._plan = functools.lru_cache(4)(self._compute_plan)

  def __len__(self) -> int:
    return ENDLESS

  def __getitem__(self, index: int) -> PackedRow:
    S = self._config.sequence_length
    position, needed, pieces = self._first_token + index * S, S + 1, []
    while needed:
      epoch, offset = divmod(position, self._epoch_tokens)
      ends = self._plan(epoch)[2]
      pieces += _cut(functools.partial(self._read, epoch), ends, offset, needed)
      taken = min(needed, self._epoch_tokens - offset)
      position, needed = position + taken, needed - taken
    return pack(pieces, S, self._config.cross_document_attention)

  def _compute_plan(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the documents in order, whether each is filled in the middle, and where each ends."""
    N = len(self._lengths)
    random = _random((*self._entropy, epoch), 2 * N)
    order = np.argsort(random[:N], kind="stable")
    is_fim = np.zeros(N, bool)
    is_fim[np.argsort(random[N:], kind="stable")[: self._num_fim]] = True
    return order, is_fim, np.cumsum((self._lengths + 3 * is_fim)[order])

  def _read(self, epoch: int, rank: int, start: int, stop: int) -> np.ndarray:
    """Returns some tokens of a document of an epoch's order."""
    order, is_fim, _ = self._plan(epoch)
    document = int(order[rank])
    if not is_fim[document]:
      return self._documents.read(document, start, stop)
    read = functools.partial(self._documents.read, document)
    entropy = (*self._entropy, epoch, document)
    return fill_in_the_middle(read, int(self._lengths[document]), self._marks, entropy, start, stop)


class MixedRows:
  """The endless rows of several sources, by index, in the order of `rows_of_sources`."""

  def __init__(self, sources: Sequence[Any], weights: Sequence[float]):
    self._sources, self._weights = sources, weights

  def __len__(self) -> int:
    return ENDLESS

  def __getitem__(self, index: int) -> PackedRow:
    before = rows_of_sources(index, self._weights)
    after = rows_of_sources(index + 1, self._weights)
    (source,) = [i for i, (a, b) in enumerate(zip(before, after)) if a != b]
    return self._sources[source][before[source]]


class ValidationRows:
  """The rows of the validation set, by index; see `data.validation_batches`."""

  def __init__(self, prepared: PreparedData, config: DataConfig):
    assert prepared.tokenizer is not None
    self._documents = Documents(prepared.validation)
    folder = prepared.manifest.parent
    self._start = np.array([tokenizer_lib.eos_id(prepared.tokenizer, folder)], np.uint32)
    self._ends = np.cumsum(np.concatenate([[1], self._documents.lengths]))
    self._config = config

  def __len__(self) -> int:
    return -(-(int(self._ends[-1]) - 1) // self._config.sequence_length)

  def __getitem__(self, index: int) -> PackedRow:
    S = self._config.sequence_length
    pieces = _cut(self._read, self._ends, index * S, S + 1)
    return pack(pieces, S, self._config.cross_document_attention, first_token_weight=1.0)

  def _read(self, rank: int, start: int, stop: int) -> np.ndarray:
    return self._start[start:stop] if rank == 0 else self._documents.read(rank - 1, start, stop)


class SyntheticRows:
  """Rows of uniform random tokens for benchmarks, each one document, computed from their index.

  Args:
    vocab_size: ids are below it.
    sequence_length: S.
    entropy: non-negative numbers that decide the tokens.
    num_rows: number of rows; endless by default.
  """

  def __init__(
    self,
    vocab_size: int,
    sequence_length: int,
    entropy: tuple[int, ...],
    num_rows: int = ENDLESS,
  ):
    self._vocab_size, self._sequence_length = vocab_size, sequence_length
    self._entropy, self._num_rows = entropy, num_rows

  def __len__(self) -> int:
    return self._num_rows

  def __getitem__(self, index: int) -> PackedRow:
    random = _random((*self._entropy, index), self._sequence_length + 1)
    return pack([random % np.uint64(self._vocab_size)], self._sequence_length, False)


def _random(entropy: Sequence[int], n: int) -> np.ndarray:
  """Returns uint64 [n] of the raw stream, which NumPy promises not to change."""
  return np.random.Philox(np.random.SeedSequence(tuple(entropy))).random_raw(n)


def _cut(
  read: Callable[[int, int, int], np.ndarray], ends: np.ndarray, position: int, count: int
) -> list[np.ndarray]:
  """Returns up to `count` tokens from `position` of joined documents, one piece a document.

  Args:
    read: returns the tokens of a document from one place up to another.
    ends: where each document ends in the joined ones.
    position, count: the tokens that are wanted.
  """
  rank = int(np.searchsorted(ends, position, side="right"))
  pieces = []
  while count and rank < len(ends):
    start = position - (int(ends[rank - 1]) if rank else 0)
    taken = min(int(ends[rank]) - position, count)
    pieces.append(read(rank, start, start + taken))
    position, count, rank = position + taken, count - taken, rank + 1
  return pieces
