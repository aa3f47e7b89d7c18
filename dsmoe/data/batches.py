"""Batches of tokens for training and validation, computed from an index.

`prepare` (dsmoe/data/records.py) stores every document's tokens, ended by the end-of-document id,
and its length. Lengths and a seed determine which tokens of which documents any row holds. The
position of the input is therefore a few numbers, the rows and tokens consumed, whatever the number
of processes; see dsmoe/data/position.py.

Rows. A source is an endless stream of tokens: epoch after epoch, each with every document once in
a new order. Row r has the S tokens from r * S on as `tokens` and those from r * S + 1 on as
`targets`: nothing is lost, and each token is a target once. A row comes from one source.

A batch is a dict of five arrays [B, S], B being the rows of this process:
  tokens, targets: int32.
  positions: int32, from 0 at each document's first token in the row; with cross_document_attention
    from 0 to S - 1.
  segments: int32, the number of the document in the row, from 1; with cross_document_attention 1;
    0 is padding. The end-of-document token belongs to the document it ends.
  weights: float32, of the targets in the loss. Without cross_document_attention 0 where the target
    belongs to the next document; 0 in padding; else 1.
"""

from collections.abc import Iterator

import grain
import numpy as np
from absl import logging

from dsmoe.config import DataConfig
from dsmoe.data import sources
from dsmoe.data.packing import MixedRows, SyntheticRows, TrainRows, ValidationRows, pack
from dsmoe.data.position import Position as Position
from dsmoe.data.position import first_position as first_position
from dsmoe.data.position import position_from_dict as position_from_dict
from dsmoe.data.position import rows_of_sources
from dsmoe.data.records import SYNTHETIC_VALIDATION_ROWS, PreparedData
from dsmoe.data.records import prepare as prepare

Batch = dict[str, np.ndarray]

_THREADS = 4
_PREFETCH_BATCHES = 8


def train_iterator(
  prepared: PreparedData,
  config: DataConfig,
  batch_size: int,
  process_index: int = 0,
  process_count: int = 1,
  position: Position | None = None,
) -> Iterator[Batch]:
  """Reads an endless stream of training batches, from any row on.

  Global batch n is the same whatever the number of processes; process p has its rows
  p * B .. (p + 1) * B - 1, so that the processes' rows joined in order are the global batch.

  A warning names a source that has fewer tokens than its share of one batch.

  Args:
    prepared: from `prepare` with the same `config`.
    config: mixture weights (their ratios are rounded by less than 1%), sequence length S,
      attention, fill-in-the-middle, seed.
    batch_size: rows of a global batch.
    process_index: this process, in [0, process_count).
    process_count: divides `batch_size`; B = batch_size / process_count.
    position: what was consumed before; it is not computed again. None for nothing.

  Returns:
    An iterator over batches [B, S]; see the module's docstring.

  Raises:
    ValueError: if the numbers do not fit, or the tokenizer lacks the fill-in-the-middle marks.
  """
  local_size = _local_size(batch_size, process_index, process_count)
  _warn_of_small_sources(prepared, config, batch_size)
  position = position or first_position(config)
  rows_before = rows_of_sources(position.sequences, config.train_weights)
  tokens_before = position.tokens_of_sources(config.train_globs)
  numbers = position.numbers_of_sources(config.train_globs)
  S = config.sequence_length
  rows = [
    # Row `rows_before` begins with the first token that was not consumed.
    TrainRows(paths, prepared, config, number, tokens_before[source] - rows_before[source] * S)
    if paths
    else SyntheticRows(prepared.vocab_size, S, (config.seed, number))
    for source, (number, paths) in enumerate(zip(numbers, prepared.train, strict=True))
  ]
  mixture = grain.MapDataset.source(MixedRows(rows, config.train_weights))[position.sequences :]
  batches = mixture.batch(local_size)[process_index::process_count]
  options = grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=_PREFETCH_BATCHES)
  return iter(batches.to_iter_dataset(options))


def validation_batches(
  prepared: PreparedData,
  config: DataConfig,
  batch_size: int,
  process_index: int = 0,
  process_count: int = 1,
) -> Iterator[Batch]:
  """Reads the validation set once, in order.

  The stream is one end-of-document id and then the documents; rows overlap by one token as in
  training. Every token of the set, the ends of documents among them, is a target of weight 1
  exactly once, also a document's first (predicted from the end of the one before), so that the sum
  of the weights is `prepared.validation_tokens` and

    bits per byte = sum of weights * nats / ln 2 / prepared.validation_bytes

  leaves no byte out. The last batch is filled with rows of weight 0. With several processes each
  has its rows as in `train_iterator`.

  Raises:
    ValueError: if the process numbers do not fit.
  """
  local_size = _local_size(batch_size, process_index, process_count)
  S = config.sequence_length
  rows: SyntheticRows | ValidationRows
  if sources.SYNTHETIC in config.validation_globs:
    rows = SyntheticRows(prepared.vocab_size, S, (config.seed, 2**32), SYNTHETIC_VALIDATION_ROWS)
  elif prepared.validation:
    rows = ValidationRows(prepared, config)
  else:
    return
  padding = pack([], S, cross_document_attention=False)
  for first in range(0, len(rows), batch_size):
    start = first + process_index * local_size
    batch = [rows[i] if i < len(rows) else padding for i in range(start, start + local_size)]
    yield {name: np.stack([row[name] for row in batch]) for name in padding}


def _warn_of_small_sources(prepared: PreparedData, config: DataConfig, batch_size: int) -> None:
  for source, paths in enumerate(prepared.train):
    share = config.train_weights[source] / sum(config.train_weights)
    wanted, tokens = (
      round(share * batch_size * config.sequence_length),
      prepared.train_tokens[source],
    )
    if paths and tokens < wanted:
      logging.warning(
        "every batch repeats text: %r has %d tokens, and its share of a batch is %d",
        *(config.train_globs[source], tokens, wanted),
      )


def _local_size(batch_size: int, process_index: int, process_count: int) -> int:
  if batch_size % process_count:
    raise ValueError(
      f"batch_size ({batch_size}) must be divisible by process_count ({process_count})"
    )
  if not 0 <= process_index < process_count:
    raise ValueError(
      f"process_index ({process_index}) must be at least 0 and below process_count ({process_count})"
    )
  return batch_size // process_count
