"""What exchanges would do with a routing, against loops over tokens, choices and devices."""

import dataclasses

import numpy as np
import pytest

from dsmoe.config import ExchangeConfig
from dsmoe.parallel import eplb
from dsmoe.planning import chips, exchanges, what_if
from dsmoe.reporting.routing_trace import Trace
from dsmoe.training import exchange_layer
from tests.helpers import small_config

N, M, K, E = 8, 5, 3, 12


def experts_of(seed: int = 0, layers: int = 2):
  """int32 [L, N M, K], a token's experts all different, some more often than others."""
  rng = np.random.default_rng(seed)
  share = np.arange(1, E + 1) ** -1.2 / np.sum(np.arange(1, E + 1) ** -1.2)
  draw = lambda: rng.choice(E, K, replace=False, p=share)  # noqa: E731
  return np.array([[draw() for _ in range(N * M)] for _ in range(layers)], np.int32)


def trace_of(expert_LMK, num_microbatches: int = 1):
  """Sequences of one token, so that any split of the rows is a split of the tokens."""
  counts = np.array([np.bincount(e.ravel(), minlength=E) for e in expert_LMK], np.int32)
  return Trace(expert_LMK.astype(np.uint8), counts, 7, N * M, 1, num_microbatches)


def by_loops(expert_NMK, degree: int):
  """Returns rows sent by way of exchanging, and rows computed, by device."""
  sent = {"gathered": np.zeros(N, int), "pair": np.zeros(N, int), "device": np.zeros(N, int)}
  computed = np.zeros(N, int)
  for n, m in np.ndindex(expert_NMK.shape[:2]):
    experts_of_token = expert_NMK[n, m]
    first = n // degree * degree
    owners = [first + int(e) // (E // degree) for e in experts_of_token]
    sent["gathered"][n] += degree - 1
    sent["pair"][n] += sum(owner != n for owner in owners)
    sent["device"][n] += len(set(owners) - {n})
    for owner in owners:
      computed[owner] += 1
  return sent, computed


def with_room_for(expert_NMK, degree: int, room: int):
  """Sends rows one by one, device by device, to owners who take `room` of them."""
  sent, computed, dropped = np.zeros((3, N), int)
  for n, m, k in np.ndindex(expert_NMK.shape):
    owner = n // degree * degree + int(expert_NMK[n, m, k]) // (E // degree)
    if computed[owner] == room:
      dropped[n] += 1
    else:
      computed[owner] += 1
      sent[n] += owner != n
  return sent, computed, dropped


@pytest.mark.parametrize("chunks", [1, 5])
def test_rows_that_find_no_room(chunks):
  expert_NMK = experts_of()[0].reshape(N, M, K)
  options = ExchangeConfig(receive_capacity=1.1, moe_chunks=chunks)
  room = -(-11 * M * K // chunks // 10)
  parts = [with_room_for(part, 4, room) for part in np.split(expert_NMK, chunks, axis=1)]
  expected = np.sum(parts, axis=0)
  work = exchanges.work("all_to_all", expert_NMK, E, 4, options)
  assert work.dropped_N.sum() > 0
  np.testing.assert_array_equal((work.sent_N, work.computed_N, work.dropped_N), expected)
  # With a fallback everything is exchanged, as if there were room.
  options = ExchangeConfig(1.1, "layer", chunks)
  exact = exchanges.work("all_to_all", expert_NMK, E, 4, options)
  sent, computed = by_loops(expert_NMK, 4)
  assert not exact.dropped_N.any() and exact.buffer_factor == work.buffer_factor
  np.testing.assert_array_equal((exact.sent_N, exact.computed_N), (sent["pair"], computed))


@pytest.mark.parametrize("per_group", [1, 2, 4])
def test_a_token_crosses_once_to_each_group(per_group):
  """From there it goes on to each device of the group that owns one of its experts."""
  expert_NMK, sent = experts_of()[0].reshape(N, M, K), np.zeros(N, int)
  for n, m in np.ndindex(N, M):
    first = n // 4 * 4
    owners = {first + int(e) // (E // 4) for e in expert_NMK[n, m]}
    for group in {owner // per_group for owner in owners}:
      middle = group * per_group + n % per_group
      sent[n] += middle != n
      sent[middle] += len({o for o in owners if o // per_group == group} - {middle})
  options = ExchangeConfig(devices_per_group=per_group)
  work = exchanges.work("hierarchical", expert_NMK, E, 4, options)
  np.testing.assert_array_equal(work.sent_N, sent)
  if per_group == 1:
    np.testing.assert_array_equal(sent, by_loops(expert_NMK, 4)[0]["device"])


@pytest.mark.parametrize("degree", [1, 2, 4])
def test_rows_of_each_exchange(degree):
  expert_NMK = experts_of()[0].reshape(N, M, K)
  sent, computed = by_loops(expert_NMK, degree)
  names = {"all_gather": "gathered", "ring": "gathered", "all_to_all": "pair"}
  roomy = ExchangeConfig(receive_capacity=4.0)
  for name, how in names.items():
    work = exchanges.work(name, expert_NMK, E, degree, roomy)
    np.testing.assert_array_equal(work.sent_N, sent[how])
    np.testing.assert_array_equal(work.computed_N, computed)
  least, logical = exchanges.least_rows(expert_NMK, E, degree)
  np.testing.assert_array_equal(least, sent["device"])
  at_home = np.zeros(N, int)
  for n, m in np.ndindex(N, M):
    at_home[n] += any(int(e) // (E // degree) == n % degree for e in expert_NMK[n, m])
  np.testing.assert_array_equal(logical, least + at_home)


@pytest.mark.parametrize(
  "degree, copies", [(4, 2.711), (8, 4.633), (16, 6.116), (32, 7.040), (64, 7.556)]
)
def test_deduplicated_copies_of_deepseek_v3(degree, copies):
  """Uniform, 8 of 256. Source: hypergeometric distribution, X (1 - C(E - E/X, K) / C(E, K)) less
  the own device's share."""
  config = dataclasses.replace(
    small_config().model, n_routed_experts=256, num_experts_per_tok=8, n_group=1, topk_group=1
  )
  expert_NMK = exchange_layer.draw(degree, 12_800 // degree, config, 0.0)
  least, _ = exchanges.least_rows(expert_NMK, 256, degree)
  assert least.sum() / 12_800 == pytest.approx(copies, abs=0.02)
  pairs = exchanges.work("all_to_all", expert_NMK, 256, degree).sent_N.sum() / 12_800
  assert pairs == pytest.approx(8 * (degree - 1) / degree, abs=0.02)


def test_limited_to_four_groups_of_eight():
  """3.629 distinct groups on average, an eighth of them at home: 3.175 remote ones."""
  config = dataclasses.replace(
    small_config().model, n_routed_experts=256, num_experts_per_tok=8, n_group=8, topk_group=4
  )
  expert_NMK = exchange_layer.draw(8, 1_600, config, 0.0)
  least, logical = exchanges.least_rows(expert_NMK, 256, 8)
  assert logical.sum() / 12_800 == pytest.approx(3.629, abs=0.02)
  assert least.sum() / 12_800 == pytest.approx(3.175, abs=0.02)


def test_a_step_sums_its_exchanges():
  """Two layers and two microbatches: bytes, the fullest device, drops and the bound."""
  exchange = ExchangeConfig(receive_capacity=1.25)
  model = dataclasses.replace(small_config().model, dispatch="all_to_all", exchange=exchange)
  chip = dataclasses.replace(chips.CHIPS["v5p"], peak_flops=1e6, interconnect_bytes_per_sec=2 * 1e4)
  trace = trace_of(experts_of(), num_microbatches=5)
  (row,) = what_if.what_if(trace, model, N, [4], ["all_to_all"], chip)
  parts = what_if.by_device(trace, N)
  assert parts.shape == (2, 5, N, 1, K)
  # A device's rows are consecutive, and so are a microbatch's.
  np.testing.assert_array_equal(parts[1, 3, 2, 0], trace.expert_LMK[1, 2 * M + 3])
  sent, least, most, dropped, compute, link, bound = 0, 0, 0, 0, [], [], 0.0
  for expert_NMK in parts.reshape(-1, N, 1, K):
    rows, computed = by_loops(expert_NMK, 4)
    pairs, computed_now, dropped_now = with_room_for(expert_NMK, 4, 4)  # 1.25 * 3, rounded up
    sent, least = sent + pairs.sum(), least + rows["device"].sum()
    most, dropped = max(most, computed.max()), dropped + dropped_now.sum()
    compute.append(computed_now.max() * 6 * 40 * 18 / 1e6)
    link.append(pairs.max() * 2 * 40 * 4 / 1e4)
    bound += max(compute[-1], link[-1])
  assert row == {
    "back_end": "all_to_all",
    "expert_degree": 4,
    "copies": 0,
    "wire_bytes_per_token": sent * 160 / (N * M),
    "least_bytes_per_token": least * 160 / (N * M),
    "buffer_factor": most / K,
    "dropped_rows": dropped,
    "compute_secs": pytest.approx(sum(compute)),
    "link_secs": pytest.approx(sum(link)),
    "bound_secs": pytest.approx(bound),
  }


def test_copies_even_out_the_load_and_are_of_the_right_expert():
  model, chip = small_config().model, chips.CHIPS["v5p"]
  trace = trace_of(experts_of())
  rows = what_if.what_if(trace, model, N, [4], ["all_to_all", "ring"], chip, [0, 4])
  with_groups = what_if.what_if(trace, model, N, [4], ["hierarchical"], chip)
  assert with_groups == []  # of eight devices
  assert [(r["back_end"], r["copies"]) for r in rows] == [
    ("all_to_all", 0),
    ("ring", 0),
    ("all_to_all", 4),
  ]
  assert rows[2]["buffer_factor"] < rows[0]["buffer_factor"]
  expert = what_if.by_device(trace, N)
  owner = what_if.placed(trace, expert, model.n_routed_experts, 4, 4)
  placement = eplb.place(trace.counts_LE, E + 4, 1, 1, 4)
  for place in np.ndindex(expert.shape):
    slots = placement.phy2log_LR[place[0]].reshape(4, -1)[owner[place]]
    assert expert[place] in slots


def test_rows_in_fp8_carry_scales():
  model = dataclasses.replace(
    small_config().model,
    dispatch="all_to_all",
    hidden_size=7168,
    compute_dtype="bfloat16",
    exchange=ExchangeConfig(precision="fp8"),
  )
  assert exchanges.row_bytes(model) == 7392 and exchanges.sum_bytes(model) == 14336


def test_refusals():
  trace, model, chip = trace_of(experts_of()), small_config().model, chips.CHIPS["v5p"]
  ask = lambda *a: what_if.what_if(*a, chip)  # noqa: E731
  with pytest.raises(ValueError, match=r"devices \(8\) must be divisible by the degree \(3\)"):
    ask(trace, model, 8, [3], ["ring"])
  with pytest.raises(ValueError, match=r"experts \(12\) must be divisible .* degree \(8\)"):
    ask(trace, model, 8, [8], ["ring"])
  with pytest.raises(ValueError, match=r"rows of the trace \(40\) must be divisible .* \(16\)"):
    ask(trace, model, 16, [2], ["ring"])
  with pytest.raises(ValueError, match="of the config's 16 experts with 3 a token, it is of 12"):
    ask(trace, dataclasses.replace(model, n_routed_experts=16), 8, [2], ["ring"])
  with pytest.raises(ValueError, match="must have the interconnect of v4"):
    what_if.what_if(trace, model, 8, [2], ["ring"], chips.CHIPS["v4"])
