"""The exchange of one row for each chosen expert, against loops over tokens."""

import numpy as np
import pytest

from dsmoe.config import ExchangeConfig
from tests.helpers import assert_close
from tests.parallel.exchanges import program
from tests.parallel.test_all_gather import E, K, _inputs
from tests.parallel.test_dispatch import _by_loops, _config

KINDS = ("even", "zipf", "one_device", "empty")


def _of(receive_capacity=8.0, precision="compute_dtype", chunks=1, fallback="none", **fields):
  exchange = ExchangeConfig(receive_capacity, fallback, chunks, precision)
  return _config(dispatch="all_to_all", exchange=exchange, **fields)


def _kept(experts, X: int, capacity: float, chunks: int = 1):
  """Which rows find room, bool [tokens, K], on X devices along the axis: one row at a time."""
  M, O = len(experts) // X, E // X
  kept = np.zeros(experts.shape, bool)
  for owner in range(X):
    for chunk in range(chunks):
      room = int(np.ceil(capacity * M * K / chunks))
      for source in range(X):
        first = source * M + chunk * (M // chunks)
        for e in range(owner * O, (owner + 1) * O):
          for m in range(first, first + M // chunks):
            for k in np.flatnonzero(experts[m] == e):
              kept[m, k] = room > 0
              room -= 1
  return kept


def _sent(experts, kept, X: int) -> list[int]:
  """Rows that each device sends to others, counted one by one."""
  home = np.arange(len(experts))[:, None] // (len(experts) // X)
  remote = kept & (experts // (E // X) != home)
  return [int(remote[(home == x)[:, 0]].sum()) for x in range(X)]


def _by_loops_of(kept, x, experts, gates, weights, dy):
  """`_by_loops` without the dropped rows, whose gates get no gradient."""
  y, (dx, dgates, dweights) = _by_loops(x, experts, gates * kept, weights, dy)
  return y, (dx, dgates * kept, dweights)


def _check(run, kind: str, tokens: int, data: int, expert: int, capacity: float, chunks: int = 1):
  """Returns how many rows were dropped."""
  inputs = _inputs(kind, tokens * data * expert)
  actual, stats = run(*inputs)
  parts = np.split(inputs[1], data)
  kept = [_kept(part, expert, capacity, chunks) for part in parts]
  assert_close(actual, _by_loops_of(np.concatenate(kept), *inputs))
  sent = [_sent(part, k, expert) for part, k in zip(parts, kept)]
  np.testing.assert_array_equal(stats.sent_rows, np.concatenate(sent))
  dropped = [(~k).reshape(expert, -1).sum(axis=1) for k in kept]
  np.testing.assert_array_equal(stats.dropped_rows, np.concatenate(dropped))
  return stats.dropped_rows.sum()


@pytest.mark.parametrize("data, expert, tokens", [(1, 2, 5), (2, 4, 5), (1, 8, 1), (2, 1, 3)])
def test_matches_loops_in_value_and_every_gradient(data, expert, tokens):
  run = program(_of(), data, expert)
  for kind in KINDS:
    assert _check(run, kind, tokens, data, expert, 8.0) == 0


def test_rows_that_find_room_are_exact_and_the_others_are_counted_once():
  run = program(_of(0.75), 2, 4)
  dropped = [_check(run, kind, 5, 2, 4, 0.75) for kind in KINDS]
  assert all(dropped) and len(set(dropped)) > 1


def test_chunks_of_tokens_have_buffers_of_their_own():
  assert _check(program(_of(chunks=3), 1, 4), "zipf", 6, 1, 4, 8.0, 3) == 0
  assert _check(program(_of(0.75, chunks=3), 1, 4), "zipf", 6, 1, 4, 0.75, 3) > 0


def test_under_scan_and_rematerialisation():
  x, experts, gates, weights, dy = inputs = _inputs("zipf", 24)
  actual, _ = program(_of(), 2, 4, twice=True)(*inputs)
  middle, _ = _by_loops(*inputs)
  y, (dmiddle, dgates, dweights) = _by_loops(middle, experts, gates, weights, dy)
  _, (dx, first_dgates, first_dweights) = _by_loops(x, experts, gates, weights, dmiddle)
  dweights = tuple(a + b for a, b in zip(dweights, first_dweights))
  assert_close(actual, (y, (dx, dgates + first_dgates, dweights)))
