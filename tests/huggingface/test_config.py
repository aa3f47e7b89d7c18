"""config.json: defaults, both spellings of RoPE, and every setting there is no code for."""

import dataclasses

import pytest

from dsmoe.config import RopeScaling
from dsmoe.huggingface import loading

V3, V2 = {"model_type": "deepseek_v3"}, {"model_type": "deepseek_v2", "num_experts_per_tok": 6}
YARN = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 1024}


def test_missing_keys_take_the_defaults_of_the_classes():
  config = loading.config_from_hf(V3)
  assert (config.num_hidden_layers, config.hidden_size, config.n_routed_experts) == (61, 7168, 256)
  assert (config.n_group, config.topk_group, config.num_experts_per_tok) == (8, 4, 8)
  assert (config.scoring_func, config.topk_method) == ("sigmoid", "noaux_tc")
  assert (config.norm_topk_prob, config.routed_scaling_factor) == (True, 2.5)
  assert config.num_nextn_predict_layers == 1
  assert (config.rope_theta, config.rope_scaling.factor) == (10000.0, 1.0)
  assert config == loading.config_from_hf({"model_type": "kimi_k2"})
  config = loading.config_from_hf(V2)
  assert (config.num_hidden_layers, config.n_shared_experts, config.n_group) == (32, 2, 1)
  assert (config.scoring_func, config.topk_method) == ("softmax", "greedy")
  assert config.num_nextn_predict_layers == 0


@pytest.mark.parity
def test_defaults_are_those_of_transformers():
  transformers = pytest.importorskip("transformers", reason="needs the parity extra")
  for given, cls in ((V3, "DeepseekV3Config"), (V2, "DeepseekV2Config")):
    theirs = getattr(transformers, cls)(**{k: v for k, v in given.items() if k != "model_type"})
    assert loading.config_from_hf(given) == loading.config_from_hf(theirs.to_dict())
    ours = loading.config_to_hf(loading.config_from_hf(given))
    again = getattr(transformers, cls)(**{k: v for k, v in ours.items() if k != "model_type"})
    assert loading.config_from_hf(again.to_dict()) == loading.config_from_hf(given)


def test_v2_never_normalises_and_scores_by_softmax_whatever_it_says():
  said = {"norm_topk_prob": True, "scoring_func": "sigmoid", "rope_interleave": False}
  assert loading.config_from_hf(V2 | said) == loading.config_from_hf(V2)
  greedy = V2 | {"topk_method": "greedy", "n_group": 8, "topk_group": 3}
  assert loading.config_from_hf(greedy) == loading.config_from_hf(V2)
  limited = V2 | {"topk_method": "group_limited_greedy", "n_group": 8, "topk_group": 3}
  config = loading.config_from_hf(limited)
  assert (config.topk_method, config.n_group, config.topk_group) == ("group_limited_greedy", 8, 3)


def test_rope_in_both_spellings():
  full = {"beta_fast": 8, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 0.707}
  old = loading.config_from_hf(V3 | {"rope_theta": 50000, "rope_scaling": YARN | full})
  assert old.rope_scaling == RopeScaling(40.0, 1024, 8.0, 1.0, 1.0, 0.707)
  new = YARN | full | {"rope_type": "yarn", "rope_theta": 50000}
  assert loading.config_from_hf(V3 | {"rope_parameters": new}) == old
  assert old.rope_theta == 50000.0
  assert loading.config_from_hf(loading.config_to_hf(old)) == old
  short = loading.config_from_hf(V3 | {"rope_scaling": YARN | {"mscale": None}}).rope_scaling
  assert short == RopeScaling(40.0, 1024, 32.0, 1.0, 0.0, 0.0)
  plain = {"rope_type": "default", "rope_theta": 500.0}
  assert loading.config_from_hf(V3 | {"rope_parameters": plain}).rope_scaling.factor == 1.0


def test_head_dim_is_not_read():
  assert loading.config_from_hf(V3 | {"head_dim": 64}).qk_head_dim == 192


@pytest.mark.parametrize(
  ("given", "message"),
  [
    ({}, "model_type must be one of deepseek_v3, kimi_k2, deepseek_v2, got None"),
    ({"model_type": "llama"}, "got 'llama'"),
    ({"model_type": "deepseek_v32"}, "indexer"),
    (V3 | {"index_topk": 8}, r"indexer .*\['index_topk'\]"),
    (V3 | {"quantization_config": {"quant_method": "fp8"}}, "quantization_config must be absent"),
    (V3 | {"hidden_act": "gelu"}, "hidden_act must be 'silu', .* got 'gelu'"),
    (V3 | {"moe_layer_freq": 2}, "moe_layer_freq must be 1, .* got 2"),
    (V2 | {"mlp_bias": True}, "mlp_bias must be False, .* got True"),
    (V3 | {"attention_dropout": 0.1}, "attention_dropout must be 0.0, .* got 0.1"),
    (V3 | {"num_key_value_heads": 8}, r"num_key_value_heads \(8\) must be num_attention_heads"),
    (V3 | {"topk_method": "greedy"}, "topk_method of deepseek_v3 must be noaux_tc, got 'greedy'"),
    (V2 | {"topk_method": "noaux_tc"}, "must be greedy or group_limited_greedy, got 'noaux_tc'"),
    (V3 | {"scoring_func": "softmax"}, "scoring_func must be 'sigmoid', got 'softmax'"),
    (V3 | {"rope_scaling": {"type": "linear", "factor": 2}}, "yarn or default, got 'linear'"),
    (V3 | {"rope_scaling": YARN | {"truncate": False}}, "must not set truncate"),
    (V3 | {"rope_scaling": YARN | {"factor": "4"}}, "factor must be float, got '4'"),
    (V3 | {"rope_parameters": {"full_attention": YARN}}, "must not set full_attention"),
    (V3 | {"rope_scaling": ["yarn"]}, r"rope_scaling must be an object or null, got \['yarn'\]"),
    (V3 | {"rope_scaling": YARN | {"original_max_position_embeddings": 0}}, "at least 1, got 0"),
    (
      V3 | {"rope_scaling": YARN | {"original_max_position_embeddings": "9"}},
      "original_max_position_embeddings must be int, got '9'",
    ),
    (V3 | {"max_position_embeddings": "9"}, "max_position_embeddings must be int, got '9'"),
    (V3 | {"quantization_config": "fp8"}, "quantization_config must be an object .* got 'fp8'"),
    ({"model_type": ["deepseek_v3"]}, r"model_type must be one of .* got \['deepseek_v3'\]"),
    (V3 | {"n_group": None}, "n_group must be int, got None"),
    ({"model_type": "deepseek_v2"}, "num_experts_per_tok must be int, got None"),
    (V3 | {"hidden_size": "64"}, "hidden_size must be int, got '64'"),
    (V3 | {"q_lora_rank": 1.5}, "q_lora_rank must be int or NoneType, got 1.5"),
  ],
)
def test_settings_without_code_are_refused(given, message):
  with pytest.raises(ValueError, match=message):
    loading.config_from_hf(given)


def test_what_no_class_can_say_is_not_exported():
  mixed = dataclasses.replace(loading.config_from_hf(V3), scoring_func="softmax")
  with pytest.raises(ValueError, match=r"must be V3's .* got softmax, noaux_tc"):
    loading.config_to_hf(mixed)
