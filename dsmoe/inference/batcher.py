"""Continuous batching: requests join and leave a running batch over one paged cache.

Each round processes a part of the new prompts, then decodes a few tokens of every row whose prompt
is complete, so that a long prompt does not stop the other requests. All pages that a request may
need are reserved when it joins, so that no request is ever interrupted for lack of space.
"""

import collections
import dataclasses
import functools
import itertools
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from dsmoe.checkpoint import LoadedRun
from dsmoe.config import ModelConfig
from dsmoe.inference import cache, decode, forward, on_mesh, sampling
from dsmoe.inference.cache import PAGE_TOKENS
from dsmoe.inference.padding import (
  adjustments_of,
  arranged,
  bucket,
  buckets,
  place_of,
  settings_of,
)
from dsmoe.inference.rows import Event, Logprob, Row, logprob_at
from dsmoe.inference.sampling import Sampling

_ROWS_BASE, _TOKENS_BASE = 8, 4  # of the sizes that programs are compiled for, see `bucket`

__all__ = ["Batcher", "BatcherOptions", "Event", "Logprob", "generate", "make"]


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


class Batcher:
  """Generates tokens for many requests at once; behind generate.py and serve.py.

  Any thread may call `submit`, `cancel` and `wait`; one thread at a time may call `step`.
  """

  def __init__(
    self,
    config: ModelConfig,
    params: Any,
    router_bias: Any,
    options: BatcherOptions | None = None,
    mesh: jax.sharding.Mesh | None = None,
  ):
    """Prepares weights and the cache.

    Args:
      config: the model's.
      params, router_bias: as `model.split` returns them, on one device or split over a mesh.
      options: None for the defaults.
      mesh: to generate on, see `on_mesh`: experts are split over `expert`, heads over `model`, rows
        and pages over `data`. None: the device of the parameters.

    Raises:
      ValueError: when the cache cannot hold one page, for drafts without an MTP module, and for a
        mesh that fits the model or the options not.
    """
    options = options or BatcherOptions()
    if mesh is not None:
      on_mesh.check(config, options.max_rows, mesh)
    self._num_shards = 1 if mesh is None else mesh.shape[on_mesh.ROWS_AXIS]
    self._shard_rows = options.max_rows // self._num_shards
    page_bytes = cache.page_bytes(config, options.speculate)
    if options.cache_bytes < page_bytes:
      raise ValueError(
        f"cache_bytes ({options.cache_bytes}) must be at least the size of a page ({page_bytes})"
      )
    limit = config.max_position_embeddings
    needed_pages = self._shard_rows * -(-limit // PAGE_TOKENS)
    num_pages = min(needed_pages, options.cache_bytes // page_bytes)
    self.max_tokens_per_row = min(limit, num_pages * PAGE_TOKENS)
    pages_per_row = -(-self.max_tokens_per_row // PAGE_TOKENS) + 1
    self._table_width = -(-pages_per_row // cache.BLOCK_PAGES) * cache.BLOCK_PAGES
    self.config, self.options, self._page_bytes = config, options, page_bytes
    self._arch, self._weights = forward.prepare(
      config, params, router_bias, options.speculate, mesh
    )
    # On their devices for good, like what programs return: another kind would be compiled anew.
    self._over_rows = None if mesh is None else on_mesh.over_rows(mesh)
    empty = functools.partial(cache.empty, config, self._num_shards * num_pages, options.speculate)
    if mesh is None:
      arrays = (x for x in jax.tree.leaves(self._weights) if isinstance(x, jax.Array))
      [device] = next(arrays).devices()
      self._kept = jax.device_put(empty(), device)
    else:
      self._kept = jax.jit(empty, out_shardings=self._over_rows)()
    self._pages = [cache.PageTable(num_pages) for _ in range(self._num_shards)]
    self._lock = threading.Condition()
    self._numbers = itertools.count()
    self._waiting: collections.deque[Row] = collections.deque()
    self._running: list[Row] = []
    self._cancelled: set[int] = set()
    self._counts: collections.Counter[str] = collections.Counter()
    self._unadjusted: dict[int, sampling.Adjustments] = {}  # by the number of rows

  @property
  def num_waiting(self) -> int:
    return len(self._waiting)

  @property
  def num_running(self) -> int:
    return len(self._running)

  def stats(self) -> dict[str, float]:
    """Returns the numbers of tokens and drafts so far, and how full the cache is."""
    names = ("prompt_tokens", "new_tokens", "prefix_hit_tokens", "drafts", "drafts_accepted")
    counts: dict[str, float] = {name: self._counts[name] for name in names}
    used, pages = (sum(getattr(p, n) for p in self._pages) for n in ("num_used", "num_pages"))
    return counts | {
      "cache_pages_used": used,
      "cache_pages": pages,
      "cache_bytes": pages * self._page_bytes,
      "cache_bytes_used": used * self._page_bytes,
      "programs": decode.num_programs(),
    }

  def programs(self) -> list[tuple[int, int]]:
    """Returns (rows, tokens) of every program that this batcher runs; 0 tokens for decoding.

    Whatever is asked for, no others are compiled: settings are values, and rows and prompts are
    padded to a few sizes.
    """
    sizes = buckets(_ROWS_BASE, self._shard_rows)
    longest = min(self.options.prompt_part_tokens, self.max_tokens_per_row)
    tokens = {self._part_tokens(n) for n in range(1, longest + 1)}
    each = [(B, 0) for B in sizes]
    each += [(B, S) for S in sorted(tokens) for B in sizes if B <= self._rows_at_once(S)]
    return [(self._num_shards * B, S) for B, S in each]

  def compile(self) -> Iterator[tuple[int, int]]:
    """Compiles all `programs`, so that no request waits for it; yields each that is ready.

    They are run without a row. Nothing may have been submitted.
    """
    for B, S in self.programs():
      if S:
        nothing = np.zeros((B, S), np.int32), np.full(B, -1, np.int32)
        self._run_prefill([None] * B, *nothing, [0] * B)
      else:
        self._run_decode([None] * B)
      yield B, S

  def submit(self, prompt: Sequence[int], sampling: Sampling) -> int:
    """Puts a request in the queue; returns its number.

    Raises:
      ValueError: for an empty prompt, a token outside the vocabulary (of stop tokens and biases
        too), or more tokens than a row can hold.
    """
    prompt, V = list(prompt), self.config.vocab_size
    if not prompt:
      raise ValueError("a prompt must have at least 1 token, got 0")
    for token in (min(prompt), max(prompt)):
      if not 0 <= token < V:
        raise ValueError(f"tokens must be at least 0 and below vocab_size ({V}), got {token}")
    if len(prompt) + sampling.max_tokens > self.max_tokens_per_row:
      raise ValueError(
        f"prompt ({len(prompt)} tokens) plus max_tokens ({sampling.max_tokens}) must not exceed "
        f"the {self.max_tokens_per_row} tokens of a row"
      )
    biased = [token for token, _ in sampling.logit_bias]
    for name, tokens in (("stop_tokens", sampling.stop_tokens), ("logit_bias", biased)):
      for token in tokens:
        if not 0 <= token < V:
          raise ValueError(f"{name} must be at least 0 and below vocab_size ({V}), got {token}")
    # Log-probabilities of a prompt need all of it computed, so its pages are not looked up.
    keys = [] if sampling.prompt_logprobs else cache.page_keys(prompt)
    with self._lock:
      row = Row(next(self._numbers), prompt, sampling, keys)
      self._waiting.append(row)
      self._lock.notify_all()
    return row.request

  def cancel(self, request: int) -> None:
    """Ends a request, which has no more events after the current round.

    Nothing happens when it is finished or unknown.
    """
    with self._lock:
      if any(row.request == request for row in (*self._waiting, *self._running)):
        self._cancelled.add(request)
      self._lock.notify_all()

  def wait(self, timeout_secs: float) -> bool:
    """Blocks until a request waits or runs, or the time is over; returns whether one does."""
    with self._lock:
      return self._lock.wait_for(lambda: bool(self._waiting or self._running), timeout_secs)

  def step(self) -> list[Event]:
    """Does one round of work; returns the new events, none when there are no requests."""
    self._admit()
    ready = [row for row in self._running if row.is_ready]
    events = self._prefill([row for row in self._running if not row.is_ready])
    # Rows whose prompt was completed in this round decode in the next one, so that their first
    # tokens are returned sooner.
    return events + self._decode(ready)

  def _admit(self) -> None:
    with self._lock:
      for row in [row for row in self._running if row.request in self._cancelled]:
        self._leave(row)
      self._waiting = collections.deque(
        row for row in self._waiting if row.request not in self._cancelled
      )
      self._cancelled.clear()
      while self._waiting and self._take_pages(self._waiting[0]):
        row = self._waiting.popleft()
        self._counts["prefix_hit_tokens"] += row.length
        self._running.append(row)

  def _take_pages(self, row: Row) -> bool:
    """Reserves a row's pages in one part of the cache; returns whether there was room.

    It is the part that knows most of the prompt's beginning, of several the one with fewest rows.
    """
    running = collections.Counter(other.shard for other in self._running)

    def preference(shard: int):
      return -len(self._pages[shard].known_pages(row.keys)), running[shard]

    for shard in sorted(range(self._num_shards), key=preference):
      if running[shard] < self._shard_rows:
        num_tokens = len(row.prompt) + row.sampling.max_tokens
        taken = self._pages[shard].take(row.keys, num_tokens)
        if taken is not None:
          row.shard, (row.pages, row.length) = shard, taken
          return True
    return False

  def _leave(self, row: Row) -> None:
    self._running.remove(row)
    self._pages[row.shard].give_back(row.pages)

  def _part_tokens(self, num_tokens: int) -> int:
    """Returns the size to which a part of a prompt is padded."""
    most = self.options.prompt_part_tokens
    return max(bucket(min(num_tokens, most), _TOKENS_BASE, most), PAGE_TOKENS)

  def _rows_at_once(self, part_tokens: int) -> int:
    """Returns the number of a shard's prompts taken in together, padding included."""
    most = self.options.prefill_tokens // (part_tokens * self._num_shards)
    sizes = buckets(_ROWS_BASE, self._shard_rows)
    return max(B for B in sizes if B == 1 or B <= most)

  def _arranged(self, rows: Sequence[Row], at_once: int) -> list[Row | None]:
    return arranged(rows, self._num_shards, _ROWS_BASE, self._shard_rows, at_once)

  def _settings(
    self, batch: Sequence[Row | None]
  ) -> tuple[sampling.RowSampling, sampling.Adjustments]:
    """Returns the rows' settings, and what adjusts their logits."""
    settings, B, V = settings_of(batch), len(batch), self.config.vocab_size
    if any(row is not None and row.sampling.adjusts for row in batch):
      return settings, adjustments_of(batch, V, True, self._over_rows)
    if B not in self._unadjusted:  # nobody reads it, but it has its place in the program
      self._unadjusted[B] = adjustments_of(batch, V, False, self._over_rows)
    return settings, self._unadjusted[B]

  def _run_prefill(self, batch: list[Row | None], tokens_BS, next_B, counts: list[int]):
    """Runs the model on a part of each row's prompt; returns NumPy arrays."""
    rows = [row for row in batch if row is not None]
    wanted = decode.Wanted(
      np.bool_(any(row.sampling.logprobs is not None for row in rows)),
      np.bool_(any(row.sampling.prompt_logprobs for row in rows)),
    )
    self._kept, *result = decode.prefill(
      self._arch,
      self._weights,
      self._kept,
      tokens_BS,
      next_B,
      place_of(batch, self._table_width, counts),
      *self._settings(batch),
      wanted,
    )
    drawn, drafted_B, prompt_logprobs = result
    return jax.device_get((drawn, drafted_B, prompt_logprobs if wanted.prompt_logprobs else None))

  def _prefill(self, rows: list[Row]) -> list[Event]:
    if not rows:
      return []
    S = self._part_tokens(len(rows[0].prompt) - rows[0].length)
    batch = self._arranged(rows, self._rows_at_once(S))
    counts = [min(len(row.prompt) - row.length, S) if row else 0 for row in batch]
    B = len(batch)
    tokens_BS, next_B = np.zeros((B, S), np.int32), np.full(B, -1, np.int32)
    for i, (row, count) in enumerate(zip(batch, counts)):
      if row is not None:
        end = row.length + count
        tokens_BS[i, :count] = row.prompt[row.length : end]
        next_B[i] = row.prompt[end] if end < len(row.prompt) else -1
    drawn, drafted_B, prompt_logprobs = self._run_prefill(batch, tokens_BS, next_B, counts)
    events = []
    for i, (row, count) in enumerate(zip(batch, counts)):
      if row is None:
        continue
      self._counts["prompt_tokens"] += count
      if row.sampling.prompt_logprobs:
        known = row.prompt[row.length + 1 : row.length + 1 + count]
        row.prompt_logprobs += [
          logprob_at(prompt_logprobs, (i, s), token, row) for s, token in enumerate(known)
        ]
      row.length += count
      if not row.is_ready:
        continue
      with self._lock:
        self._pages[row.shard].publish(row.keys, row.pages)
      row.draft = int(drafted_B[i]) if drafted_B is not None else 0
      new = [int(drawn.token_B[i])] if row.sampling.max_tokens else []
      events.append(self._event(row, new, [(drawn.logprobs, (i,))] * len(new), is_first=True))
    return events

  def _run_decode(self, batch: list[Row | None]) -> tuple[decode.Step, Any]:
    """Runs a round of decoding; returns its steps and the newest drafts, as NumPy arrays."""
    place = place_of(batch, self._table_width, [1] * len(batch))
    token_B, remaining_B, draft_B = np.zeros((3, len(batch)), np.int32)
    rows = [(i, row) for i, row in enumerate(batch) if row is not None]
    for i, row in rows:
      token_B[i], remaining_B[i], draft_B[i] = row.tokens[-1], row.remaining, row.draft
    self._kept, state, steps = decode.decode(
      self._arch,
      self.options.steps_per_round,
      self._weights,
      self._kept,
      decode.Rows(token_B, draft_B if self.options.speculate else None, place.first_B, remaining_B),
      place.table_BP,
      *self._settings(batch),
      np.bool_(any(row.sampling.logprobs is not None for _, row in rows)),
    )
    return jax.device_get((steps, state.draft_B))

  def _decode(self, rows: list[Row]) -> list[Event]:
    if not rows:
      return []
    batch = self._arranged(rows, self._shard_rows)
    steps, draft_B = self._run_decode(batch)
    self._counts["drafts"] += int(steps.drafted_B.sum())
    if self.options.speculate:
      self._counts["drafts_accepted"] += int((steps.token_BX[..., 1] >= 0).sum())
    events = []
    for i, row in enumerate(batch):
      if row is None:
        continue
      places = [(n, i, x) for n, x in np.argwhere(steps.token_BX[:, i] >= 0).tolist()]
      new = [int(steps.token_BX[p]) for p in places]
      row.length += len(new)
      row.draft = int(draft_B[i]) if self.options.speculate else 0
      events.append(self._event(row, new, [(steps.logprobs, p) for p in places]))
    return events

  def _event(self, row: Row, new: list[int], logprobs: list, is_first: bool = False) -> Event:
    """Adds new tokens to a row and returns its event.

    The row leaves the batch when the last one is a stop token, or when it has all its tokens.

    Args:
      row: the request's.
      new: the tokens drawn.
      logprobs: of each: (`TokenLogprobs` of the batch, the token's index there).
      is_first: whether this is the row's first event, which has the prompt's log-probabilities.
    """
    row.tokens += new
    stopped = bool(new) and new[-1] in row.sampling.stop_tokens
    shown = new[:-1] if stopped else new
    self._counts["new_tokens"] += len(new)
    finish = "stop" if stopped else "length" if row.remaining == 0 else None
    if finish:
      with self._lock:
        self._leave(row)
    of_shown: tuple[Logprob, ...] = ()
    of_prompt: tuple[Logprob | None, ...] = ()
    if row.sampling.logprobs is not None:
      of_shown = tuple(logprob_at(v, at, token, row) for (v, at), token in zip(logprobs, shown))
    if is_first and row.sampling.prompt_logprobs:
      of_prompt = tuple(row.prompt_logprobs)
    return Event(row.request, tuple(shown), of_shown, of_prompt, finish)


def make(run: LoadedRun, options: BatcherOptions | None = None) -> Batcher:
  """Builds a `Batcher` for a loaded checkpoint, on this process's first device.

  It takes the weights out of `run`, so that only one copy of the model stays in memory; load the
  run again to evaluate it.
  """
  params, router_bias = jax.device_put(run.take_weights(), jax.local_devices()[0])
  return Batcher(run.config.model, params, router_bias, options)


def generate(
  batcher: Batcher, prompts: Sequence[Sequence[int]], settings: Sampling
) -> list[list[int]]:
  """Continues each prompt to its end; returns the new tokens of each.

  Prompt i is sampled with the seed `settings.seed` + i, so that equal calls give equal tokens.

  Raises:
    ValueError: for no prompt, or one that `Batcher.submit` refuses.
  """
  if not prompts:
    raise ValueError("prompts must have at least 1 prompt, got 0")
  answers: dict[int, list[int]] = {}
  unfinished: set[int] = set()
  try:
    for i, prompt in enumerate(prompts):
      request = batcher.submit(prompt, dataclasses.replace(settings, seed=settings.seed + i))
      answers[request] = []
      unfinished.add(request)
    while unfinished:
      for event in batcher.step():
        if event.request in answers:
          answers[event.request] += event.tokens
          if event.finish:
            unfinished.discard(event.request)
  finally:
    for request in unfinished:
      batcher.cancel(request)
  return list(answers.values())
