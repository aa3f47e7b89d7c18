"""A batcher without a model: its tokens are a function of prompt and seed."""

import collections
import itertools
import threading
import time

from dsmoe.inference.batcher import Event, Logprob


def continuation(prompt, sampling) -> list[int]:
  """What the fake writes after a prompt: the prompt, turned by the seed and backwards."""
  turn = sampling.seed % len(prompt)
  cycle = itertools.cycle((prompt[turn:] + prompt[:turn])[::-1])
  return list(itertools.islice(cycle, sampling.max_tokens))


def logprob(token, num_top) -> Logprob:
  """A token's log-probability, and those of its successors, each less likely."""
  return Logprob(token, -token / 8, tuple((token + i, -(token + i) / 8) for i in range(num_top)))


class FakeBatcher:
  """Has the interface of dsmoe.inference.batcher.Batcher."""

  def __init__(self, max_rows=4, max_tokens_per_row=512, secs_per_step=0.001):
    self.max_tokens_per_row = max_tokens_per_row
    self.max_rows, self.secs_per_step = max_rows, secs_per_step
    self.held = threading.Event()  # set: rows wait in the queue
    self.failure = None
    self.cancelled = set()
    self.submitted = []
    self.num_prompts = 0  # read by the batcher
    self._lock = threading.Condition()
    self._numbers = itertools.count(100)
    self._waiting, self._running = collections.deque(), {}
    self._num_steps = 0

  @property
  def num_waiting(self):
    return len(self._waiting)

  @property
  def num_running(self):
    return len(self._running)

  def stats(self):
    return {"new_tokens": 7.0, "cache_pages": 64, "cache_pages_used": len(self._running)}

  def submit(self, prompt, sampling):
    if not all(0 <= token < 400 for token in prompt):
      raise ValueError(f"tokens must be below vocab_size (400), got {max(prompt)}")
    if len(prompt) + sampling.max_tokens > self.max_tokens_per_row:
      raise ValueError(f"too long: {len(prompt)} + {sampling.max_tokens}")
    with self._lock:
      number = next(self._numbers)
      self._waiting.append((number, list(prompt), sampling))
      self.submitted.append((list(prompt), sampling))
      self._lock.notify_all()
    return number

  def submit_all(self, prompt, samplings):
    self.num_prompts += 1
    return [self.submit(prompt, sampling) for sampling in samplings]

  def cancel(self, request):
    with self._lock:
      self.cancelled.add(request)
      self._running.pop(request, None)
      self._waiting = collections.deque(row for row in self._waiting if row[0] != request)

  def wait(self, timeout_secs):
    with self._lock:
      return self._lock.wait_for(lambda: self._waiting or self._running, timeout_secs)

  def step(self):
    if self.failure is not None:
      raise self.failure
    time.sleep(self.secs_per_step)
    with self._lock:
      self._num_steps += 1
      while not self.held.is_set() and self._waiting and len(self._running) < self.max_rows:
        number, prompt, sampling = self._waiting.popleft()
        self._running[number] = [prompt, sampling, continuation(prompt, sampling), 0]
      rows = list(self._running.items())
      if self._num_steps % 2:
        rows.reverse()
      return [self._advance(number, row) for number, row in rows]

  def _advance(self, number, row) -> Event:
    prompt, sampling, left, steps = row
    # By the row's own steps: how many there were before it depends on how busy the machine is.
    count = 1 + (number + steps) % 3
    tokens, row[2], row[3] = left[:count], left[count:], steps + 1
    finish = None if row[2] else "length"
    for place, token in enumerate(tokens):
      if token in sampling.stop_tokens:
        tokens, finish = tokens[:place], "stop"
        break
    if finish:
      del self._running[number]
    num_top, of_prompt = sampling.logprobs, ()
    logprobs = () if num_top is None else tuple(logprob(t, num_top) for t in tokens)
    if steps == 0 and sampling.prompt_logprobs:
      of_prompt = (None, *(logprob(t, num_top) for t in prompt[1:]))
    return Event(number, tuple(tokens), logprobs, of_prompt, finish)
