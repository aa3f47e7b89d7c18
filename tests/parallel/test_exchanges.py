"""Exchanges along the expert axis whose programs serve every routing, against loops over tokens."""

import math
import re

import numpy as np
import pytest

from dsmoe.config import ExchangeConfig
from tests.helpers import assert_close
from tests.parallel.exchanges import program, tpu_gradients
from tests.parallel.test_all_gather import E, _inputs, _sizes
from tests.parallel.test_dispatch import _by_loops, _config
from tests.parallel.test_shares import devices_by_loops

PER_GROUP = 2  # devices of a group of `hierarchical`
EXCHANGES = {
  "dense": ExchangeConfig(),
  "all_gather": ExchangeConfig(),
  "ring": ExchangeConfig(),
  "replicated": ExchangeConfig(),
  "hierarchical": ExchangeConfig(devices_per_group=PER_GROUP, receive_capacity=8.0),
}
# These compile for long: `make test` tests the others.
SLOW = ("ring", "replicated", "hierarchical")
KINDS = ("even", "zipf", "one_device", "empty")


def _of(back_end: str, **fields):
  return _config(dispatch=back_end, exchange=EXCHANGES[back_end], **fields)


def _sent(back_end: str, experts, X: int) -> list[int]:
  """Rows of x that each device along the expert axis sends to others, counted one by one."""
  M, O = len(experts) // X, E // X
  owner = experts // O
  home = np.arange(len(experts)) // M
  if back_end in ("dense", "all_gather", "ring"):
    return [M * (X - 1)] * X
  if back_end == "replicated":
    device = devices_by_loops(experts.reshape(-1), X, O).reshape(experts.shape)
    return [int((device[home == x] != x).sum()) for x in range(X)]
  sent = [0] * X
  for token, x in enumerate(home):
    for group in set(owner[token] // PER_GROUP):
      first = group * PER_GROUP + x % PER_GROUP  # where the token enters the group
      sent[x] += group != x // PER_GROUP
      inside = set(owner[token][owner[token] // PER_GROUP == group])
      sent[first] += len(inside - {first})
  return sent


@pytest.mark.parametrize("back_end", EXCHANGES)
@pytest.mark.parametrize(
  "data, expert, tokens", [(1, 2, 5), (2, 4, 5), pytest.param(1, 8, 1, marks=pytest.mark.slow)]
)
def test_match_loops_in_value_and_every_gradient(back_end, data, expert, tokens):
  run = program(_of(back_end), data, expert)
  for kind in KINDS:
    inputs = _inputs(kind, tokens * data * expert)
    actual, stats = run(*inputs)
    assert_close(actual, _by_loops(*inputs))
    assert not stats.dropped_rows.any()
    sent = [_sent(back_end, rows, expert) for rows in np.split(inputs[1], data)]
    np.testing.assert_array_equal(stats.sent_rows, np.concatenate(sent))


@pytest.mark.parametrize(
  "back_end",
  [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in EXCHANGES],
)
def test_under_scan_and_rematerialisation(back_end):
  x, experts, gates, weights, dy = inputs = _inputs("zipf", 24)
  actual, _ = program(_of(back_end), 2, 4, twice=True)(*inputs)
  middle, _ = _by_loops(*inputs)
  y, (dmiddle, dgates, dweights) = _by_loops(middle, experts, gates, weights, dy)
  _, (dx, first_dgates, first_dweights) = _by_loops(x, experts, gates, weights, dmiddle)
  dweights = tuple(a + b for a, b in zip(dweights, first_dweights))
  assert_close(actual, (y, (dx, dgates + first_dgates, dweights)))


@pytest.mark.parametrize(
  "back_end",
  [
    pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else [])
    for name in EXCHANGES
    if name != "dense"
  ],
)
def test_fp8_equals_one_device(back_end):
  """Tiles of the weights' gradient are of a device's rows of an expert: others are rounded alike."""
  inputs = _inputs("even", 24)
  y, (dx, dgates, dweights) = program(_of(back_end, matmul_precision="fp8_ue8m0"), 1, 4)(*inputs)[0]
  one = _config(dispatch="local", matmul_precision="fp8_ue8m0")
  expected_y, (*expected, expected_dweights) = program(one, 1, 1)(*inputs)[0]
  assert_close((y, dx, dgates), (expected_y, *expected))
  # All rows of an expert lie on one device, in one tile.
  whole = back_end in ("all_gather", "hierarchical")
  assert_close(dweights, expected_dweights, "op_float32" if whole else "bfloat16")


@pytest.mark.tpu
def test_gathered_tokens_compile_for_a_tpu_and_no_row_is_summed():
  """The gradient over 2 x 2 devices: weights and rows are scattered, and no row is all-reduced."""
  M, K = 256, 2
  text = tpu_gradients("all_gather", data=2, expert=2, M=M, D=512, E=4, F=256, K=K)
  for name in ("matmul_rows", "matmul_weights", "all-gather", "reduce-scatter"):
    assert name in text
  # XLA makes all-reduces of the exchanges of counts and gates; nothing larger may become one.
  shapes = re.findall(r"= (.*?) all-reduce(?:-start)?\(", text)
  assert shapes and all(math.prod(sizes) <= 2 * M * K for s in shapes for sizes in _sizes(s))


@pytest.mark.tpu
@pytest.mark.parametrize("back_end", ["replicated", "hierarchical"])
def test_compiles_for_a_tpu_and_sums_no_rows(back_end):
  """Over 2 x 2 devices: rows, and copies of experts, are exchanged; nothing large is all-reduced."""
  M, D, K = 256, 512, 2
  text = tpu_gradients(back_end, data=2, expert=2, M=M, D=D, E=4, F=256, K=K)
  for name in ("matmul_rows", "matmul_weights"):
    assert name in text
  # Of gradients as well: nothing as large as rows or weights is padded.
  for shape in re.findall(r"= (.*?) all-to-all(?:-start)?\(", text):
    assert all(math.prod(sizes) <= 2 * M * K * K for sizes in _sizes(shape))
  least = {"replicated": 3 + 3 + 2 * 2, "hierarchical": 2 * 2 * 2}[back_end]
  assert len(re.findall(r"ragged-all-to-all(?:-start)?\(", text)) >= least
  # XLA makes all-reduces of the exchanges of counts and gates.
  shapes = re.findall(r"= (.*?) all-reduce(?:-start)?\(", text)
  assert all(math.prod(sizes) <= 2 * M * K for s in shapes for sizes in _sizes(s))
