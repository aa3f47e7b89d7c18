"""The arrays of a batch, padded to one of the few sizes that programs are compiled for.

Shapes: B rows, P pages of a row, V vocabulary.
"""

from collections.abc import Sequence

import jax
import numpy as np

from dsmoe.inference import sampling
from dsmoe.inference.cached_attention import Place
from dsmoe.inference.rows import Row
from dsmoe.inference.sampling import Sampling


def bucket(n: int, base: int, most: int) -> int:
  """Returns the next power of `base`, at most `most`: functions are compiled for these sizes."""
  size = 1
  while size < n:
    size *= base
  return min(size, most)


def buckets(base: int, most: int) -> list[int]:
  """Returns the sizes that `bucket` returns for up to `most`."""
  return sorted({bucket(n, base, most) for n in range(1, most + 1)})


def arranged(
  rows: Sequence[Row], num_shards: int, base: int, most: int, at_once: int
) -> list[Row | None]:
  """Returns rows in the order of a batch's arrays: shard by shard, each padded to one size.

  Args:
    rows: any.
    num_shards: into how many parts the batch is split.
    base, most: of the sizes, see `bucket`.
    at_once: upper limit of the rows taken of a shard, its first ones.

  Returns:
    Rows, and None for padding, B in all.
  """
  parts = [[row for row in rows if row.shard == shard][:at_once] for shard in range(num_shards)]
  size = bucket(max(map(len, parts)), base, most)
  return [row for part in parts for row in (*part, *[None] * (size - len(part)))]


def place_of(batch: Sequence[Row | None], table_width: int, counts: Sequence[int]) -> Place:
  """Returns where the next `counts` tokens of each row of an arranged batch stand."""
  table_BP = np.zeros((len(batch), table_width), np.int32)
  first_B, count_B = np.zeros((2, len(batch)), np.int32)
  for i, (row, count) in enumerate(zip(batch, counts, strict=True)):
    if row is not None:
      table_BP[i, : len(row.pages)] = row.pages
      first_B[i], count_B[i] = row.length, count
  return Place(table_BP, first_B, count_B)


def prompt_parts(batch: Sequence[Row | None], S: int):
  """Returns the next tokens of each row's prompt.

  Returns:
    (how many, at most S, a list; the tokens, int32 [B, S]; the prompt's token after them, int32
    [B], -1 where it ends).
  """
  counts = [min(len(row.prompt) - row.length, S) if row else 0 for row in batch]
  tokens_BS, next_B = np.zeros((len(batch), S), np.int32), np.full(len(batch), -1, np.int32)
  for i, (row, count) in enumerate(zip(batch, counts)):
    if row is not None:
      end = row.length + count
      tokens_BS[i, :count] = row.prompt[row.length : end]
      next_B[i] = row.prompt[end] if end < len(row.prompt) else -1
  return counts, tokens_BS, next_B


def settings_of(batch: Sequence[Row | None]) -> sampling.RowSampling:
  """Returns how the rows draw; padding takes the likeliest token."""
  padding = Sampling(temperature=0.0)
  return sampling.stack([padding if row is None else row.sampling for row in batch])


def adjustments_of(
  batch: Sequence[Row | None], V: int, wanted: bool, sharding: jax.sharding.Sharding | None
) -> sampling.Adjustments:
  """Returns what changes the rows' logits by token, on the device or split as `sharding` says."""
  in_prompt_BV, count_BV = np.zeros((len(batch), V), bool), np.zeros((len(batch), V), np.int32)
  bias_BV = np.zeros((len(batch), V), np.float32)
  for i, row in enumerate(batch if wanted else ()):
    if row is not None:
      in_prompt_BV[i, row.prompt] = True
      np.add.at(count_BV[i], row.tokens, 1)
      for token, bias in row.sampling.logit_bias:
        bias_BV[i, token] = bias
  on_device = jax.device_put((in_prompt_BV, count_BV, bias_BV), sharding)
  return sampling.Adjustments(np.bool_(wanted), *on_device)
