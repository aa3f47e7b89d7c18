"""Computes rows of tokens from their index: the tokens, targets, positions and masks.

dsmoe/data/batches.py describes the arrays of a row. S is the number of tokens of a row.
"""

import functools
from collections.abc import Callable, Sequence

import numpy as np
from array_record.python import array_record_data_source
from etils import epath

from dsmoe.config import DataConfig
from dsmoe.data import tokenizer as tokenizer_lib
from dsmoe.data.records import PreparedData, lengths_path

PackedRow = dict[str, np.ndarray]

_DOCUMENTS_IN_MEMORY = 16  # neighbouring rows share long documents
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
  tokens: np.ndarray, marks: tuple[int, int, int], entropy: Sequence[int]
) -> np.ndarray:
  """Turns a document into prefix mark, prefix, suffix mark, suffix, middle mark, middle, end.

  Args:
    tokens: [n + 1] ids, the last one the end of the document, which stays last.
    marks: ids of the prefix, suffix and middle marks.
    entropy: non-negative numbers that decide where to split.

  Returns:
    [n + 4] ids.

  Source: arXiv:2207.14255, section 3 (PSM). Splits lie between tokens, not characters, so that a
  document's length is known without tokenising it again.
  """
  text, end = tokens[:-1], tokens[-1:]
  a, b = np.sort(_random(entropy, 2) % np.uint64(len(text) + 1))
  prefix, suffix, middle = (np.array([mark], tokens.dtype) for mark in marks)
  return np.concatenate([prefix, text[:a], suffix, text[b:], middle, text[a:b], end])


class TrainRows:
  """The endless rows of one source, by index; documents that were read are cached.

  An epoch's order takes about 40 bytes per document; at most four epochs are in memory.
  """

  def __init__(
    self, paths: Sequence[epath.Path], prepared: PreparedData, config: DataConfig, source: int
  ):
    self._records, self._lengths = _open(paths)
    self._config, self._entropy = config, (config.seed, source)
    # The same number of documents every epoch, so that every epoch has as many tokens.
    self._num_fim = round(config.fim_rate * len(self._lengths))
    if self._num_fim:
      assert prepared.tokenizer is not None
      self._marks = tokenizer_lib.fim_ids(prepared.tokenizer)
    self._epoch_tokens = int(self._lengths.sum()) + 3 * self._num_fim
    self._plan = functools.lru_cache(4)(self._compute_plan)
    self._document = functools.lru_cache(_DOCUMENTS_IN_MEMORY)(self._read_document)

  def __len__(self) -> int:
    return ENDLESS

  def __getitem__(self, index: int) -> PackedRow:
    S = self._config.sequence_length
    position, needed, pieces = index * S, S + 1, []
    while needed:
      epoch, offset = divmod(position, self._epoch_tokens)
      ends = self._plan(epoch)[2]
      pieces += _cut(functools.partial(self._document, epoch), ends, offset, needed)
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

  def _read_document(self, epoch: int, rank: int) -> np.ndarray:
    order, is_fim, _ = self._plan(epoch)
    document = int(order[rank])
    tokens = np.frombuffer(self._records[document], "<u4")
    if not is_fim[document]:
      return tokens
    return fill_in_the_middle(tokens, self._marks, (*self._entropy, epoch, document))


class ValidationRows:
  """The rows of the validation set, by index; see `data.validation_batches`."""

  def __init__(self, prepared: PreparedData, config: DataConfig):
    assert prepared.tokenizer is not None
    self._records, lengths = _open(prepared.validation)
    folder = prepared.manifest.parent
    self._start = np.array([tokenizer_lib.eos_id(prepared.tokenizer, folder)], np.uint32)
    self._ends = np.cumsum(np.concatenate([[1], lengths]))
    self._config = config
    self._document = functools.lru_cache(_DOCUMENTS_IN_MEMORY)(self._read_document)

  def __len__(self) -> int:
    return -(-(int(self._ends[-1]) - 1) // self._config.sequence_length)

  def __getitem__(self, index: int) -> PackedRow:
    S = self._config.sequence_length
    pieces = _cut(self._document, self._ends, index * S, S + 1)
    return pack(pieces, S, self._config.cross_document_attention, first_token_weight=1.0)

  def _read_document(self, rank: int) -> np.ndarray:
    return self._start if rank == 0 else np.frombuffer(self._records[rank - 1], "<u4")


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


def _open(paths: Sequence[epath.Path]) -> tuple[Sequence[bytes], np.ndarray]:
  """Opens ArrayRecord files as one sequence; returns it and the documents' lengths, int64."""
  lengths = np.concatenate([np.load(lengths_path(path)) for path in paths]).astype(np.int64)
  return array_record_data_source.ArrayRecordDataSource([str(p) for p in paths]), lengths


def _cut(
  document: Callable[[int], np.ndarray], ends: np.ndarray, position: int, count: int
) -> list[np.ndarray]:
  """Returns up to `count` tokens from `position` of joined documents, one piece a document."""
  rank = int(np.searchsorted(ends, position, side="right"))
  pieces = []
  while count and rank < len(ends):
    left = int(ends[rank]) - position
    piece = document(rank)[-left:][:count]
    pieces.append(piece)
    position, count, rank = position + len(piece), count - len(piece), rank + 1
  return pieces
