"""ArrayRecord files of documents' tokens, and beside each the documents' lengths.

A document is one record for every `RECORD_TOKENS` of its tokens, little-endian uint32. Beside
`x.arrayrecord` is `x.lengths.npy`, the documents' lengths in tokens (int64). A file gets its name
when it is complete. ArrayRecord keeps a checksum of each record and checks it on reading.
"""

import collections
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from array_record.python import array_record_data_source, array_record_module
from etils import epath
from tokenizers import Tokenizer

from dsmoe.data import encoding, folder, sources
from dsmoe.data import tokenizer as tokenizer_lib
from dsmoe.data.files import Piece

RECORD_TOKENS = 1 << 20
SHARD_BYTES = 64 << 20  # text in one ArrayRecord file; an interruption loses at most one file

_RECORDS_IN_MEMORY = 16  # neighbouring rows share long documents


def lengths_path(path: epath.Path) -> epath.Path:
  """Returns where the lengths of an ArrayRecord file's documents are."""
  return path.with_suffix(".lengths.npy")


def make(
  tokenizer: Tokenizer,
  pieces: Iterable[Piece],
  directory: epath.Path,
  prefix: str,
  advance: Callable[[int], None],
) -> dict[str, dict[str, Any]]:
  """Writes documents into ArrayRecord files, unless they are there; returns facts by name."""
  encoder, end = tokenizer_lib.text_only(tokenizer), tokenizer_lib.eos_id(tokenizer, directory)
  shards = {}
  for i, group in enumerate(sources.groups(pieces, SHARD_BYTES)):
    path = directory / f"{prefix}-{i:05d}.arrayrecord"
    size = 0

    def counted(group: Iterator[Piece] = group) -> Iterator[Piece]:
      nonlocal size
      for piece in group:
        num_bytes = sources.num_bytes(piece)
        size += num_bytes
        advance(num_bytes)
        yield piece

    if path.exists() and lengths_path(path).exists():
      collections.deque(counted(), maxlen=0)
    else:
      _write(encoder, end, counted(), path)
    lengths = load_lengths(path)
    shards[path.name] = {
      "documents": len(lengths),
      "bytes": size,
      "tokens": int(lengths.sum(dtype=np.int64)),
      "size": path.stat().length,
      "sha256": sources.file_sha256(path),
    }
  return shards


def _write(encoder: Tokenizer, end: int, pieces: Iterator[Piece], path: epath.Path) -> None:
  """Writes one ArrayRecord file and its lengths; the former gets its name last."""
  lengths, length, left = [], 0, np.zeros(0, np.uint32)
  with folder.whole(path) as temporary:
    # One record a group: documents are read one by one, in any order.
    writer = array_record_module.ArrayRecordWriter(str(temporary), "group_size:1")
    for tokens, is_end in encoding.encode(encoder, end, pieces):
      left = np.concatenate([left, tokens])
      length += len(tokens)
      while len(left) > RECORD_TOKENS or (is_end and len(left)):
        writer.write(left[:RECORD_TOKENS].astype("<u4").tobytes())
        left = left[RECORD_TOKENS:]
      if is_end:
        lengths.append(length)
        length = 0
    writer.close()
    with folder.whole(lengths_path(path)) as other, other.open("wb") as f:
      np.save(f, np.array(lengths, np.int64))


def load_lengths(path: epath.Path) -> np.ndarray:
  """Reads the lengths of an ArrayRecord file's documents, in tokens, int64.

  Raises:
    ValueError: if they are missing or damaged.
  """
  try:
    lengths = np.load(lengths_path(path), allow_pickle=False).astype(np.int64)
    if lengths.ndim != 1 or (lengths < 1).any():
      raise ValueError("a document has at least one token")
  except Exception as error:  # a damaged header ends in errors of many kinds, MemoryError too
    raise folder.ChangedDataError(
      f"{lengths_path(path)} must hold lengths of documents, got {error}; {mend(path)}"
    ) from error
  return lengths


def mend(path: epath.Path) -> str:
  """Returns what to do about a damaged ArrayRecord file or its lengths."""
  return f"delete {path.name} and manifest.json, and the next start makes both again"


def _open(paths: Sequence[epath.Path]) -> Sequence[bytes]:
  """Opens ArrayRecord files as one sequence of records; raises ValueError for a damaged one."""
  try:
    return array_record_data_source.ArrayRecordDataSource([str(path) for path in paths])
  except (RuntimeError, ValueError, OSError) as error:
    if len(paths) > 1:
      for path in paths:
        _open([path])  # finds which it is
    raise folder.ChangedDataError(f"{paths[0]} is damaged: {error}; {mend(paths[0])}") from error


class Documents:
  """The documents of ArrayRecord files, in order; records that were read are cached.

  `lengths` has the number of tokens of each, int64.
  """

  def __init__(self, paths: Sequence[epath.Path]):
    lengths = [load_lengths(path) for path in paths]
    self.lengths = np.concatenate(lengths)
    self._paths, self._ends_of_paths = paths, np.cumsum([len(part) for part in lengths])
    self._records = _open(paths)
    self._record_tokens = RECORD_TOKENS
    counts = -(-self.lengths // RECORD_TOKENS)
    if len(self._records) == len(self.lengths):  # data made when each document was one record
      self._record_tokens = int(self.lengths.max())
      counts = np.ones_like(counts)
    if len(self._records) != counts.sum():
      raise folder.ChangedDataError(
        f"the lengths beside {paths[0]} and the files after it must be those of their "
        f"{len(self._records)} records, got lengths for {counts.sum()}; {mend(paths[0])}"
      )
    self._first_record = np.cumsum(counts) - counts
    self._record = functools.lru_cache(_RECORDS_IN_MEMORY)(self._read_record)

  def read(self, document: int, start: int, stop: int) -> np.ndarray:
    """Returns a document's tokens from `start` up to `stop` or its end, uint32.

    Raises:
      ValueError: if a record is damaged, naming the file.
    """
    size = self._record_tokens
    stop = min(stop, int(self.lengths[document]))
    parts = [
      self._record(document, number)[max(start - number * size, 0) : stop - number * size]
      for number in range(start // size, -(-stop // size))
    ]
    return np.concatenate([*parts, np.zeros(0, np.uint32)]) if len(parts) != 1 else parts[0]

  def _read_record(self, document: int, number: int) -> np.ndarray:
    path = self._paths[int(np.searchsorted(self._ends_of_paths, document, side="right"))]
    try:
      tokens = np.frombuffer(self._records[int(self._first_record[document]) + number], "<u4")
    except (RuntimeError, ValueError, IndexError) as error:
      raise folder.ChangedDataError(f"{path} is damaged: {error}; {mend(path)}") from error
    left = int(self.lengths[document]) - number * self._record_tokens
    if len(tokens) != min(left, self._record_tokens):
      raise folder.ChangedDataError(
        f"a record of {path} has {len(tokens)} tokens, but the lengths beside it say "
        f"{min(left, self._record_tokens)}; {mend(path)}"
      )
    return tokens
