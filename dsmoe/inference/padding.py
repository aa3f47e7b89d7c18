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


def place_of(rows: Sequence[Row], B: int, table_width: int, counts: Sequence[int]) -> Place:
  """Returns where the next `counts` tokens of each row stand; padding has none."""
  table_BP = np.zeros((B, table_width), np.int32)
  first_B, count_B = np.zeros((2, B), np.int32)
  for i, (row, count) in enumerate(zip(rows, counts)):
    table_BP[i, : len(row.pages)] = row.pages
    first_B[i], count_B[i] = row.length, count
  return Place(table_BP, first_B, count_B)


def settings_of(rows: Sequence[Row], B: int) -> sampling.RowSampling:
  """Returns how the rows draw; padding takes the likeliest token."""
  padding = [Sampling(temperature=0.0)] * (B - len(rows))
  return sampling.stack([row.sampling for row in rows] + padding)


def adjustments_of(rows: Sequence[Row], B: int, V: int) -> sampling.Adjustments:
  """Returns what changes the rows' logits by token, on the device; not wanted without rows."""
  in_prompt_BV, count_BV = np.zeros((B, V), bool), np.zeros((B, V), np.int32)
  bias_BV = np.zeros((B, V), np.float32)
  for i, row in enumerate(rows):
    in_prompt_BV[i, row.prompt] = True
    np.add.at(count_BV[i], row.tokens, 1)
    for token, bias in row.sampling.logit_bias:
      bias_BV[i, token] = bias
  on_device = jax.device_put((in_prompt_BV, count_BV, bias_BV))
  return sampling.Adjustments(np.bool_(bool(rows)), *on_device)
