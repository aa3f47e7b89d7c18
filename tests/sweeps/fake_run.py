"""A worker whose trials only sleep: `points` keeps what a training run keeps, and as strictly.

  python tests/sweeps/fake_run.py SWEEP ...

It holds the workdir's lock, saves its step after each point, goes on from there, yields earlier
points first, and ends at SIGTERM. FAKE_SECS is the time between two points. FAKE_HOLD names a file: while
it is there, a run waits before its fourth point.
"""

import contextlib
import json
import os
import signal
import sys
import time
from typing import NamedTuple

from etils import epath

from dsmoe import checkpoint
from dsmoe.sweeps import worker
from tests.sweeps import fake_sweep


class Point(NamedTuple):
  """As of a run."""

  step: int
  loss: float
  whole_loss: float | None = None


class Result(NamedTuple):
  """As of a run."""

  step: int
  flops: float
  why: str
  final: Point | None
  signals: tuple[str, ...] = ()


@contextlib.contextmanager
def noted_signals():
  """Notes SIGTERM and SIGINT, as training does."""
  received = []
  numbers = (signal.SIGTERM, signal.SIGINT)
  before = [
    signal.signal(n, lambda got, _: received.append(signal.Signals(got).name)) for n in numbers
  ]
  try:
    yield received
  finally:
    for number, handler in zip(numbers, before, strict=True):
      signal.signal(number, handler)


def points(config, workdir: epath.Path):
  """Yields points at the tenths of the steps; a learning rate above 1 fails, one of 0.5 kills."""
  params = {
    "optim.learning_rate": config.optim.learning_rate,
    "balance.bias_update_speed": config.balance.bias_update_speed,
  }
  with checkpoint.owned(workdir), noted_signals() as received:
    path = workdir / "saved.json"
    saved = json.loads(path.read_text()) if path.exists() else []
    why = "finished"
    if params["optim.learning_rate"] > 1:
      raise ValueError(f"optim.learning_rate must be at most 1, got {config.optim.learning_rate}")
    held = os.environ.get("FAKE_HOLD", "")
    for tenth in range(1, 11):
      step = config.num_steps * tenth // 10
      while tenth == 4 and not received and held and os.path.exists(held):
        time.sleep(0.01)
      if step > (saved[-1][0] if saved else 0):
        if received:
          why = f"stopped by {received[0]}"
          break
        if params["optim.learning_rate"] == 0.5 and tenth == 3:
          os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(float(os.environ.get("FAKE_SECS", "0")))
        saved.append([step, fake_sweep.loss(params, config.seed, step)])
        temporary = path.with_name("saved.tmp")
        temporary.write_text(json.dumps(saved))
        temporary.replace(path)
      loss = dict(map(tuple, saved))[step]
      reason = yield Point(step, loss)
      if reason is not None and step < config.num_steps:
        why = reason
        break
    return Result(saved[-1][0] if saved else 0, 1e9, why, Point(*saved[-1]) if saved else None)


if __name__ == "__main__":
  sys.exit(worker.main(sys.argv[1:], run=points))
