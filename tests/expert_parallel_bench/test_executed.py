"""The benchmark on a CPU mesh: what it counts, and that it times nothing that is wrong."""

import dataclasses

import jax
import numpy as np
import pytest

from dsmoe.config import ExchangeConfig, MeshConfig
from dsmoe.expert_parallel_bench import executed, profile, routings
from dsmoe.parallel import dispatch
from dsmoe.parallel import mesh as mesh_lib
from dsmoe.planning import exchanges
from dsmoe.training import exchange_layer
from tests.helpers import small_config

TOKENS = 16
MODEL = dataclasses.replace(
  small_config().model,
  dispatch="hierarchical",
  exchange=ExchangeConfig(devices_per_group=2),
)
# Every back end that exchanges rows.
EXCHANGES = [name for name in dispatch.BACK_ENDS if name in exchanges.EXCHANGES]


def mesh_of(data: int, expert: int):
  config = MeshConfig(stage=1, data=data, expert=expert, context=1, model=1)
  return mesh_lib.make_mesh(config, jax.devices()[: data * expert])


def drawn(mesh, name: str = "zipf:1.2"):
  devices = exchange_layer.num_devices(mesh)
  return routings.of_name(name, devices, TOKENS, small_config().model)


def executed_and_expected(config, mesh, expert_NMK):
  params, bias, x, _ = exchange_layer.inputs(config, mesh, expert_NMK)
  _, outcome = jax.jit(exchange_layer.forward(config, mesh))(params, bias, x)
  counts_NE = [np.bincount(e.ravel(), minlength=12) for e in expert_NMK]
  np.testing.assert_array_equal(outcome.counts_NE, counts_NE)
  sizes = (config.n_routed_experts, mesh.shape["expert"])
  return outcome, exchanges.work(config.dispatch, expert_NMK, *sizes, config.exchange)


@pytest.mark.parametrize("name", EXCHANGES)
def test_what_if_equals_what_is_executed(name):
  mesh = mesh_of(2, 4)
  config = exchange_layer.with_room_for_all(exchange_layer.config_of(MODEL, name), 4)
  outcome, expected = executed_and_expected(config, mesh, drawn(mesh))
  np.testing.assert_array_equal(outcome.sent_N, expected.sent_N)
  assert not np.any(outcome.dropped_N) and np.sum(outcome.sent_N) > 0
  if name == "replicated":
    assert set(expected.computed_N) == {TOKENS * config.num_experts_per_tok}


@pytest.mark.parametrize("options", [dict(), dict(moe_chunks=4), dict(dropless_fallback="layer")])
def test_what_if_drops_what_is_dropped(options):
  mesh = mesh_of(2, 4)
  exchange = ExchangeConfig(receive_capacity=1.2, **options)
  config = dataclasses.replace(MODEL, dispatch="all_to_all", exchange=exchange)
  outcome, expected = executed_and_expected(config, mesh, drawn(mesh))
  assert bool(np.any(expected.dropped_N)) == ("dropless_fallback" not in options)
  np.testing.assert_array_equal(outcome.dropped_N, expected.dropped_N)
  np.testing.assert_array_equal(outcome.sent_N, expected.sent_N)


@pytest.mark.slow
def test_rows_of_figures_and_a_wrong_back_end(monkeypatch):
  right = dispatch.BACK_ENDS["all_gather"]

  def wrong(x_MD, routed, experts, config):
    y_MD, stats = right(x_MD, routed, experts, config)
    return 1.001 * y_MD, stats

  monkeypatch.setitem(dispatch.BACK_ENDS, "local", wrong)
  mesh = mesh_of(1, 2)
  config = dataclasses.replace(small_config().model, remat="full")
  expert_NMK = drawn(mesh)
  rows = executed.measure(config, mesh, ["all_gather", "local"], {"zipf": expert_NMK}, 2, 8)
  (error,) = (row for row in rows if "error" in row)
  assert (
    error["back_end"] == "local" and "the output differs from the oracle's by" in error["error"]
  )
  ok = [row for row in rows if "error" not in row]
  assert [row["direction"] for row in ok] == ["forward", "forward + backward"]
  row_bytes = config.hidden_size * 4
  least = sum(any(e // 6 != n for e in token) for n in range(2) for token in expert_NMK[n].tolist())
  for row in ok:
    assert row["stamp"] == "no claim about accelerators"
    assert row["mesh"] == {"expert": 2} and row["tokens_per_device"] == TOKENS
    assert row["median_secs"] > 0 and row["tokens_per_sec"] > 0 and row["spread"] >= 0
    assert row["wire_bytes_per_token"] == row_bytes  # to the one other device
    assert row["least_bytes_per_token"] == least * row_bytes / (2 * TOKENS)
    assert row["dropped_rows"] == 0 and row["of_link_peak"] is None
    for part in ("route", "exchange", "experts", "shared"):
      assert row["parts_secs"][part] > 0, part
  forward, both = ok
  assert forward["exchanged_bytes"] == TOKENS * row_bytes * 2
  assert forward["wire_bytes_per_sec"] > 0 and both["wire_bytes_per_sec"] is None


def test_parts_of_operations():
  names = {
    "jit(f)/shard_map/checkpoint/routing/dot_general": "route",
    "jit(f)/transpose(jvp(exchange))/ppermute": "exchange",
    "jit(f)/dispatch/permute/gather": "permute",
    "jit(f)/experts/combine/add": "combine",
    "jit(f)/shared_experts/dot": "shared",
    "jit(f)/my_exchange/add": "other",
  }
  assert {name: profile.part_of(name) for name in names} == names


def test_more_experts_than_hidden_dimensions_are_refused():
  config = dataclasses.replace(small_config().model, hidden_size=8)
  with pytest.raises(ValueError, match=r"hidden_size \(8\) must be at least n_routed_experts"):
    exchange_layer.inputs(config, mesh_of(1, 2), drawn(mesh_of(1, 2)))
