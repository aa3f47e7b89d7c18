"""The compiled programs of a batcher, with the weights and the cache that they run over.

They are compiled for a few numbers of rows and of tokens, to which what is asked for is padded. On
a mesh rows are split into shards, each with its own part of the cache; see `on_mesh`.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from dsmoe.config import ModelConfig
from dsmoe.inference import cache, decode, forward, on_mesh, sampling
from dsmoe.inference.cache import PAGE_TOKENS
from dsmoe.inference.padding import (
  adjustments_of,
  arranged,
  bucket,
  buckets,
  place_of,
  prompt_parts,
  settings_of,
)
from dsmoe.inference.rows import Row

_ROWS_BASE, _TOKENS_BASE = 8, 4  # of the sizes that programs are compiled for, see `bucket`


@dataclasses.dataclass(frozen=True)
class BatcherOptions:
  """How much a `Batcher` does at once, and in how much memory."""

  max_rows: int = 8  # requests decoded together
  cache_bytes: int = 2**30  # upper limit of the cache, on each device
  speculate: bool = False  # draft tokens with the first MTP module
  steps_per_round: int = 8  # decode steps in a round
  prompt_part_tokens: int = 512  # of one prompt in a round; a power of two, at least a page
  prefill_tokens: int = 4096  # of all prompts in a round

  def __post_init__(self):
    for name in ("max_rows", "cache_bytes", "steps_per_round", "prefill_tokens"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
    part = self.prompt_part_tokens
    if part < PAGE_TOKENS or part & (part - 1):
      raise ValueError(
        f"prompt_part_tokens must be a power of two of at least {PAGE_TOKENS}, got {part}"
      )


class Programs:
  """Takes in prompts and decodes, for batches that `arranged` made."""

  def __init__(
    self,
    config: ModelConfig,
    params: Any,
    router_bias: Any,
    options: BatcherOptions,
    mesh: jax.sharding.Mesh | None,
  ):
    """Prepares weights and the cache; see `Batcher`."""
    if mesh is not None:
      on_mesh.check(config, options.max_rows, mesh)
    self._config, self._options = config, options
    self.num_shards = 1 if mesh is None else mesh.shape[on_mesh.ROWS_AXIS]
    self.shard_rows = options.max_rows // self.num_shards
    self.page_bytes = cache.page_bytes(config, options.speculate)
    if options.cache_bytes < self.page_bytes:
      raise ValueError(
        f"cache_bytes ({options.cache_bytes}) must be at least the size of a page "
        f"({self.page_bytes})"
      )
    limit = config.max_position_embeddings
    needed_pages = self.shard_rows * -(-limit // PAGE_TOKENS)
    self.shard_pages = min(needed_pages, options.cache_bytes // self.page_bytes)
    self.max_tokens_per_row = min(limit, self.shard_pages * PAGE_TOKENS)
    pages_per_row = -(-self.max_tokens_per_row // PAGE_TOKENS) + 1
    self._table_width = -(-pages_per_row // cache.BLOCK_PAGES) * cache.BLOCK_PAGES
    self._arch, self.weights = forward.prepare(config, params, router_bias, options.speculate, mesh)
    # On their devices for good, like what programs return: another kind would be compiled anew.
    num_pages = self.num_shards * self.shard_pages
    empty = functools.partial(cache.empty, config, num_pages, options.speculate)
    if mesh is None:
      self._over_rows = None
      arrays = (x for x in jax.tree.leaves(self.weights) if isinstance(x, jax.Array))
      [device] = next(arrays).devices()
      self.kept = jax.device_put(empty(), device)
    else:
      self._over_rows = on_mesh.over_rows(mesh)
      self.kept = jax.jit(empty, out_shardings=self._over_rows)()
    self._unadjusted: dict[int, sampling.Adjustments] = {}  # by the number of rows

  def sizes(self) -> list[tuple[int, int]]:
    """Returns (rows, tokens) of every program; 0 tokens for decoding. See `Batcher.programs`."""
    sizes = buckets(_ROWS_BASE, self.shard_rows)
    longest = min(self._options.prompt_part_tokens, self.max_tokens_per_row)
    tokens = {self.part_tokens(n) for n in range(1, longest + 1)}
    each = [(B, 0) for B in sizes]
    each += [(B, S) for S in sorted(tokens) for B in sizes if B <= self._rows_at_once(S)]
    return [(self.num_shards * B, S) for B, S in each]

  def compile(self) -> Iterator[tuple[int, int]]:
    """Compiles all programs, by running them without a row; yields the size of each."""
    for B, S in self.sizes():
      if S:
        self.prefill([None] * B, S)
      else:
        self.decode([None] * B)
      yield B, S

  def part_tokens(self, num_tokens: int) -> int:
    """Returns the size to which a part of a prompt is padded."""
    most = self._options.prompt_part_tokens
    return max(bucket(min(num_tokens, most), _TOKENS_BASE, most), PAGE_TOKENS)

  def _rows_at_once(self, part_tokens: int) -> int:
    """Returns the number of a shard's prompts taken in together, padding included."""
    most = self._options.prefill_tokens // (part_tokens * self.num_shards)
    sizes = buckets(_ROWS_BASE, self.shard_rows)
    return max(B for B in sizes if B == 1 or B <= most)

  def arranged(self, rows: Sequence[Row], part_tokens: int | None = None) -> list[Row | None]:
    """Returns a batch of rows; of those whose prompts are taken in, as many as it holds at once.

    Args:
      rows: at most `shard_rows` of each shard.
      part_tokens: of their prompts; None: they are decoded.
    """
    most = self.shard_rows
    at_once = most if part_tokens is None else self._rows_at_once(part_tokens)
    return arranged(rows, self.num_shards, _ROWS_BASE, most, at_once)

  def _settings(
    self, batch: Sequence[Row | None]
  ) -> tuple[sampling.RowSampling, sampling.Adjustments]:
    """Returns the rows' settings, and what adjusts their logits."""
    settings, B, V = settings_of(batch), len(batch), self._config.vocab_size
    if any(row is not None and row.sampling.adjusts for row in batch):
      return settings, adjustments_of(batch, V, True, self._over_rows)
    if B not in self._unadjusted:  # nobody reads it, but it has its place in the program
      self._unadjusted[B] = adjustments_of(batch, V, False, self._over_rows)
    return settings, self._unadjusted[B]

  def prefill(self, batch: Sequence[Row | None], part_tokens: int):
    """Takes in the next tokens of each row's prompt.

    Returns:
      (how many tokens of each row, then NumPy arrays: `decode.Drawn`, drafts or None, and the
      prompt's `TokenLogprobs` or None if no row asks for them).
    """
    rows = [row for row in batch if row is not None]
    wanted = decode.Wanted(
      np.bool_(any(row.sampling.logprobs is not None for row in rows)),
      np.bool_(any(row.sampling.prompt_logprobs for row in rows)),
    )
    counts, tokens_BS, next_B = prompt_parts(batch, part_tokens)
    self.kept, *result = decode.prefill(
      self._arch,
      self.weights,
      self.kept,
      tokens_BS,
      next_B,
      place_of(batch, self._table_width, counts),
      *self._settings(batch),
      wanted,
    )
    drawn, drafted_B, of_prompt = result
    of_prompt = of_prompt if wanted.prompt_logprobs else None
    return counts, *jax.device_get((drawn, drafted_B, of_prompt))

  def decode(self, batch: Sequence[Row | None]) -> tuple[decode.Step, Any]:
    """Runs a round of decoding; returns its steps and the newest drafts, as NumPy arrays."""
    place = place_of(batch, self._table_width, [1] * len(batch))
    token_B, remaining_B, draft_B = np.zeros((3, len(batch)), np.int32)
    rows = [(i, row) for i, row in enumerate(batch) if row is not None]
    for i, row in rows:
      token_B[i], remaining_B[i], draft_B[i] = row.tokens[-1], row.remaining, row.draft
    speculate = self._options.speculate
    self.kept, state, steps = decode.decode(
      self._arch,
      self._options.steps_per_round,
      self.weights,
      self.kept,
      decode.Rows(token_B, draft_B if speculate else None, place.first_B, remaining_B),
      place.table_BP,
      *self._settings(batch),
      np.bool_(any(row.sampling.logprobs is not None for _, row in rows)),
    )
    return jax.device_get((steps, state.draft_B))
