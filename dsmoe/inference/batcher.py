"""Continuous batching: requests join and leave a running batch over one paged cache.

Each round processes a part of the new prompts, then decodes a few tokens of every row whose prompt
is complete, so that a long prompt does not stop the other requests. All pages that a request may
need are reserved when it joins, so that no request is ever interrupted for lack of space.
"""

import collections
import dataclasses
import itertools
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from dsmoe import checkpoint
from dsmoe.checkpoint import LoadedRun
from dsmoe.config import Config, MeshConfig, ModelConfig
from dsmoe.inference import cache, decode, on_mesh
from dsmoe.inference.programs import BatcherOptions, Programs
from dsmoe.inference.rows import Event, Logprob, Row, logprob_at
from dsmoe.inference.sampling import Sampling

__all__ = ["Batcher", "BatcherOptions", "Event", "Logprob", "generate", "load", "make"]


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
    self.config, self.options = config, options or BatcherOptions()
    self._programs = Programs(config, params, router_bias, self.options, mesh)
    shards = range(self._programs.num_shards)
    self._pages = [cache.PageTable(self._programs.shard_pages) for _ in shards]
    self._lock = threading.Condition()
    self._numbers = itertools.count()
    self._waiting: collections.deque[Row] = collections.deque()
    self._running: list[Row] = []
    self._cancelled: set[int] = set()
    self._counts: collections.Counter[str] = collections.Counter()

  @property
  def max_tokens_per_row(self) -> int:
    """Upper limit of a prompt and its answer together."""
    return self._programs.max_tokens_per_row

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
      "cache_bytes": pages * self._programs.page_bytes,
      "cache_bytes_used": used * self._programs.page_bytes,
      "programs": decode.num_programs(),
    }

  def programs(self) -> list[tuple[int, int]]:
    """Returns (rows, tokens) of every program that this batcher runs; 0 tokens for decoding.

    Whatever is asked for, no others are compiled: settings are values, and rows and prompts are
    padded to a few sizes.
    """
    return self._programs.sizes()

  def compile(self) -> Iterator[tuple[int, int]]:
    """Compiles all `programs`, so that no request waits for it; yields each that is ready.

    They are run without a row. Nothing may have been submitted.
    """
    return self._programs.compile()

  def submit(self, prompt: Sequence[int], sampling: Sampling) -> int:
    """Puts a request in the queue; returns its number. See `submit_all`."""
    [number] = self.submit_all(prompt, [sampling])
    return number

  def submit_all(self, prompt: Sequence[int], samplings: Sequence[Sampling]) -> list[int]:
    """Puts several requests with one prompt in the queue, which is read once; or none.

    Returns:
      Their numbers, in order.

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
    for each in samplings:
      self._check(len(prompt), each)
    # Log-probabilities of a prompt need all of it computed, so its pages are not looked up.
    keys = [] if all(s.prompt_logprobs for s in samplings) else cache.page_keys(prompt)
    with self._lock:
      rows = [
        Row(next(self._numbers), prompt, s, [] if s.prompt_logprobs else keys) for s in samplings
      ]
      self._waiting.extend(rows)
      self._lock.notify_all()
    return [row.request for row in rows]

  def _check(self, num_prompt: int, sampling: Sampling) -> None:
    """Raises ValueError for more tokens than a row can hold, or one outside the vocabulary."""
    V = self.config.vocab_size
    if num_prompt + sampling.max_tokens > self.max_tokens_per_row:
      raise ValueError(
        f"prompt ({num_prompt} tokens) plus max_tokens ({sampling.max_tokens}) must not exceed "
        f"the {self.max_tokens_per_row} tokens of a row"
      )
    biased = [token for token, _ in sampling.logit_bias]
    for name, tokens in (("stop_tokens", sampling.stop_tokens), ("logit_bias", biased)):
      for token in tokens:
        if not 0 <= token < V:
          raise ValueError(f"{name} must be at least 0 and below vocab_size ({V}), got {token}")

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

    for shard in sorted(range(self._programs.num_shards), key=preference):
      if running[shard] < self._programs.shard_rows:
        num_tokens = len(row.prompt) + row.sampling.max_tokens
        taken = self._pages[shard].take(row.keys, num_tokens)
        if taken is not None:
          row.shard, (row.pages, row.length) = shard, taken
          return True
    return False

  def _leave(self, row: Row) -> None:
    self._running.remove(row)
    self._pages[row.shard].give_back(row.pages)

  def _prefill(self, rows: list[Row]) -> list[Event]:
    if not rows:
      return []
    S = self._programs.part_tokens(len(rows[0].prompt) - rows[0].length)
    batch = self._programs.arranged(rows, S)
    counts, drawn, drafted_B, prompt_logprobs = self._programs.prefill(batch, S)
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

  def _decode(self, rows: list[Row]) -> list[Event]:
    if not rows:
      return []
    batch = self._programs.arranged(rows)
    steps, draft_B = self._programs.decode(batch)
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


def load(
  workdir: epath.PathLike, step: int | None, options: BatcherOptions, mesh: MeshConfig | None = None
) -> tuple[LoadedRun, Batcher]:
  """Loads a checkpoint of a run and builds a `Batcher` for it, which has its weights.

  Args:
    workdir, step: as for `checkpoint.load_run`.
    options: the batcher's.
    mesh: of all devices; None for this process's first one.

  Raises:
    ValueError: for no such checkpoint, and for a mesh that fits the devices, the model or the
      options not, before a weight is read.
  """

  def mesh_for(config: Config) -> jax.sharding.Mesh:
    assert mesh is not None
    return on_mesh.make_mesh(mesh, config.model, options.max_rows)

  run = checkpoint.load_run(workdir, step, None if mesh is None else mesh_for)
  return run, make(run, options, None if mesh is None else run.mesh)


def make(
  run: LoadedRun,
  options: BatcherOptions | None = None,
  mesh: jax.sharding.Mesh | None = None,
) -> Batcher:
  """Builds a `Batcher` for a loaded checkpoint, on a mesh or on this process's first device.

  It takes the weights out of `run`, so that only one copy of the model stays in memory; load the
  run again to evaluate it.
  """
  params, router_bias = run.take_weights()
  if mesh is None:
    params, router_bias = jax.device_put((params, router_bias), jax.local_devices()[0])
  return Batcher(run.config.model, params, router_bias, options, mesh)


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
