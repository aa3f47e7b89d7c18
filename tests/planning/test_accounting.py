import importlib

import pytest

from dsmoe import config as config_lib
from dsmoe.planning import accounting
from tests.helpers import small_config


def _model(name, *args):
  module = importlib.import_module(f"experiments.{name}")
  return config_lib.from_config_dict(module.get_config(*args)).model


@pytest.mark.parametrize(
  "name, total, active_billions",
  [
    ("deepseek_v3", 671_026_419_200, 36.62),
    ("deepseek_v2", 235_741_434_880, 20.85),
    ("deepseek_v2_lite", 15_706_484_224, 2.451),
    ("moonlight_16b", 15_960_110_208, 2.579),
    ("kimi_k2", 1_026_408_232_448, 31.69),
  ],
)
def test_published_parameters(name, total, active_billions):
  """Totals are those of the released files, MTP apart."""
  counted = accounting.parameters(_model(name))
  assert counted["total"] == total == sum(counted["parts"].values())
  assert counted["active"] / 1e9 == pytest.approx(active_billions, abs=5e-3)


def test_moonlight_without_embedding_and_head():
  """arXiv:2502.16982 section 3: 15.29B parameters, 2.24B active."""
  counted = accounting.parameters(_model("moonlight_16b"))
  embedding, head = counted["parts"]["embedding"], counted["parts"]["head"]
  assert round((counted["total"] - embedding - head) / 1e9, 2) == 15.29
  assert round((counted["active"] - head) / 1e9, 2) == 2.24


def test_deepseek_v3_costs():
  config = _model("deepseek_v3")
  flops = accounting.flops_per_token(config, 4096)
  gigaflops = {name: value / 1e9 for name, value in flops.items()}
  assert gigaflops == pytest.approx(
    {"causal": 250.4, "non_causal": 281.2, "causal_mtp": 260.6}, abs=0.05
  )
  assert accounting.kv_cache_bytes_per_token(config) == 70_272


# helpers.small_config, by hand: D 40, H 3, Q 24, C 16, N 12, R 8, U 10, V 96.
ATTENTION = 40 * 24 + 24 * 3 * 20 + 40 * 24 + 16 * 3 * 22 + 3 * 10 * 40
ATTENTION_NORMS = 24 + 16
DENSE = 3 * 40 * 56
EXPERT = 3 * 40 * 18
ROUTER = 40 * 12
HEAD = 96 * 40
# Two dense layers, three of experts: 2 shared, 12 routed, of which a token meets 3.
OUTSIDE_EXPERTS = (
  HEAD + 40 + 5 * (ATTENTION + ATTENTION_NORMS + 80) + 2 * DENSE + 3 * (2 * EXPERT + ROUTER + 12)
)
MET = HEAD + 5 * ATTENTION + 2 * DENSE + 3 * (5 * EXPERT + ROUTER)
MTP_MET = 80 * 40 + ATTENTION + 5 * EXPERT + ROUTER
MTP_OUTSIDE = 80 * 40 + 3 * 40 + ATTENTION + ATTENTION_NORMS + 80 + 2 * EXPERT + ROUTER + 12


def test_parameters_counted_by_hand():
  counted = accounting.parameters(small_config().model)
  assert counted["total"] == OUTSIDE_EXPERTS + HEAD + 3 * 12 * EXPERT
  assert counted["active"] == MET
  assert counted["mtp_total"] == 2 * (MTP_OUTSIDE + 12 * EXPERT)
  assert counted["mtp_active"] == 2 * MTP_MET
  assert counted["parts"] == {
    "embedding": HEAD,
    "head": HEAD,
    "norms": 40 + 5 * 80,
    "attention": 5 * (ATTENTION + ATTENTION_NORMS),
    "dense_mlp": 2 * DENSE,
    "routed_experts": 3 * 12 * EXPERT,
    "shared_experts": 3 * 2 * EXPERT,
    "router": 3 * ROUTER,
    "router_bias": 3 * 12,
  }


def test_flops_counted_by_hand():
  """6 a weight and token; attention: 6 for each (query, key) and element of key and value."""
  S = 14
  flops = accounting.flops_per_token(small_config(**{"model.attention_bias": True}).model, S)
  layer_attention = 6 * 3 * (20 + 10) * S
  assert flops == pytest.approx(
    {
      "causal": 6 * MET + 5 * layer_attention / 2,
      "non_causal": 6 * MET + 5 * layer_attention,
      "causal_mtp": 6 * (MET + 2 * (MTP_MET + HEAD)) + 7 * layer_attention / 2,
    }
  )


def test_a_tied_head_is_active_once():
  tied = small_config(**{"model.tie_word_embeddings": True}).model
  counted = accounting.parameters(tied)
  assert counted["total"] == OUTSIDE_EXPERTS + 3 * 12 * EXPERT
  assert counted["active"] == MET
  untied = accounting.flops_per_token(small_config().model, 14)
  assert accounting.flops_per_token(tied, 14) == pytest.approx(untied)


def test_a_dense_model_has_no_idle_parameters():
  dense = small_config(**{"model.first_k_dense_replace": 5, "model.n_routed_experts": 0}).model
  counted = accounting.parameters(dense)
  assert counted["total"] == 2 * HEAD + 40 + 5 * (ATTENTION + ATTENTION_NORMS + 80 + DENSE)
  assert counted["active"] == HEAD + 5 * (ATTENTION + DENSE)
  assert counted["mtp_active"] == 2 * (80 * 40 + ATTENTION + DENSE)
  assert set(counted["parts"]) == {"embedding", "head", "norms", "attention", "dense_mlp"}


def test_cache_bytes():
  assert accounting.kv_cache_bytes_per_token(small_config().model) == 5 * (16 + 8) * 2
  assert accounting.kv_cache_bytes_per_token(small_config().model, 4) == 5 * (16 + 8) * 4
