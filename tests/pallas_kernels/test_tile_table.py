"""Tiles by measurement: the table on disk, and that a traced layer takes what it says."""

import json

import jax
import numpy as np
import pytest

from dsmoe.kernel_bench import bench, cases
from dsmoe.parallel import local
from dsmoe.parallel.experts import ExpertWeights
from pallas_kernels.grouped_matmul import TILES, cpu, tile_table
from pallas_kernels.routing import Routed, ranks
from tests.helpers import assert_close, small_config

DEVICE = jax.devices()[0].device_kind


def _layer(config, M=300):
  """A layer's operands: experts that some tokens chose, one that none did."""
  c, rng = config.model, np.random.default_rng(0)
  K, E = c.num_experts_per_tok, c.n_routed_experts
  D, F = c.hidden_size, c.moe_intermediate_size
  experts_MK = np.array([rng.permutation(E - 1)[:K] for _ in range(M)], np.int32)
  rank_MK, counts_E = ranks(experts_MK, E)
  draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
  weights = draw(E, D, F) / 8, draw(E, D, F) / 8, draw(E, F, D) / 8
  return draw(M, D), Routed(experts_MK, draw(M, K), counts_E, rank_MK), ExpertWeights(*weights)


@pytest.mark.slow
def test_tuning_writes_what_the_config_then_reads(tmp_path, monkeypatch):
  path = str(tmp_path / "new" / "tiles.json")
  config = small_config(**{"model.kernels.tuned": path})
  operands = x, *_ = _layer(config)
  shape = cases.Shape(config.model, len(x), len(x), 1)
  ticks = iter(np.arange(10**6) ** 2)  # each round slower: the first of a round's tiles is fastest
  monkeypatch.setattr(bench.time, "perf_counter", lambda: float(next(ticks)))
  rows = bench.tune_tiles("small", shape, ["blocked"], 3, path)
  assert [row["direction"] for row in rows] == [f"tile of {n}" for n in TILES["blocked"]]
  assert [row["chosen"] for row in rows] == [True, False, False, False]
  c = config.model
  sizes = f"blocked float32 {c.hidden_size}x{c.moe_intermediate_size}, 64 rows an expert"
  assert json.loads((tmp_path / "new" / "tiles.json").read_text()) == {DEVICE: {sizes: 64}}

  taken = []
  real = cpu._schedule
  monkeypatch.setattr(cpu, "_schedule", lambda *a: (taken.append(a[-1]), real(*a))[1])
  plain = small_config().model
  assert_close(local.local(*operands, config.model), local.local(*operands, plain))
  assert taken == [64, cpu.ROWS]
  local.local(*_layer(config, 30), config.model)  # sizes that the table does not list
  assert taken[-1] == cpu.ROWS


def test_entries_of_other_devices_and_sizes_stay(tmp_path):
  file = tmp_path / "tiles.json"
  file.write_text(json.dumps({"TPU v5p": {"a": 256}, DEVICE: {"b": 128, "c": 64}}))
  tile_table.store(str(file), "b", 512)
  expected = {"TPU v5p": {"a": 256}, DEVICE: {"b": 512, "c": 64}}
  assert json.loads(file.read_text()) == expected
  assert list(tmp_path.iterdir()) == [file]


def test_implementations_without_tiles_read_no_table():
  assert tile_table.tile("missing.json", "reference", 64, 2, 8, 8, "float32") is None


@pytest.mark.parametrize(
  "text, message",
  [
    (None, "No such file"),
    ("{", "Expecting"),
    ('{"a": 3}', "items|values"),
    ('{"a": {"b": 0.5}}', "integers"),
  ],
)
def test_what_is_no_table_is_refused(tmp_path, text, message):
  file = tmp_path / "tiles.json"
  if text is not None:
    file.write_text(text)
  with pytest.raises(ValueError, match=f"kernels.tuned must .*({message})"):
    tile_table.tile(str(file), "blocked", 64, 2, 8, 8, "float32")


def test_tiles_are_among_those_of_the_implementation(tmp_path):
  config = small_config(**{"model.kernels.tuned": str(tmp_path / "tiles.json")})
  x, routed, weights = _layer(config)
  _, D, F, E, P = cases.Shape(config.model, len(x), len(x), 1).dims
  tile_table.store(
    config.model.kernels.tuned, tile_table.entry("blocked", P, E, D, F, "float32"), 100
  )
  with pytest.raises(ValueError, match=r"tile of blocked must be one of \(None, 64, .*got 100"):
    local.local(x, routed, weights, config.model)
  shape = cases.Shape(config.model, len(x), len(x), 1)
  with pytest.raises(
    ValueError, match="only mosaic_tpu, blocked have tiles to tune, got reference"
  ):
    bench.tune_tiles("small", shape, ["reference"], 3, "tiles.json")
