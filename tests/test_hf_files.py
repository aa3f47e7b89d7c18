"""Checkpoint folders: layouts and dtypes that are read, and what a broken one says."""

import json
import logging
import re
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dsmoe import hf
from dsmoe import model as model_lib
from tests import hf_cases

SMALL = {
  **{"model_type": "deepseek_v3", "vocab_size": 11, "hidden_size": 10, "num_hidden_layers": 3},
  **{"first_k_dense_replace": 1, "intermediate_size": 14, "num_attention_heads": 2},
  **{"q_lora_rank": 6, "kv_lora_rank": 5, "qk_nope_head_dim": 3, "qk_rope_head_dim": 4},
  **{"v_head_dim": 7, "n_routed_experts": 4, "n_shared_experts": 2, "num_experts_per_tok": 3},
  **{"moe_intermediate_size": 9, "n_group": 2, "topk_group": 2, "num_nextn_predict_layers": 2},
}
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
ROUTER = "model.layers.1.mlp.gate.weight"


def layout_of(config):
  shapes = jax.eval_shape(lambda: model_lib.build(config))
  return hf.layout(*model_lib.split(shapes)[1:], config)


def random_tensors(config, dtype=np.float32):
  """Every tensor of the model with random values, as a published file would hold it."""
  rng = np.random.default_rng(0)
  slots = layout_of(config).items()
  return {name: rng.normal(size=slot.hf_shape).astype(dtype) for name, slot in slots}


def write(folder, hf_config, tensors):
  (folder / "config.json").write_text(json.dumps(hf_config))
  save_file(tensors, folder / hf.WEIGHTS)


def write_shards(folder, hf_config, tensors, num=3):
  """Writes an index and `num` shards; returns the index's map of tensor to file."""
  (folder / "config.json").write_text(json.dumps(hf_config))
  weight_map = {}
  for i in range(num):
    file = f"model-{i + 1:05}-of-{num:05}.safetensors"
    part = dict(list(tensors.items())[i::num])
    save_file(part, folder / file)
    weight_map |= dict.fromkeys(part, file)
  (folder / hf.INDEX).write_text(json.dumps({"weight_map": weight_map}))
  return weight_map


def assert_holds(model, tensors):
  """Every tensor, and nothing else, came back out in float32."""
  _, params, router_bias = model_lib.split(model)
  found = hf_cases.published({**params}, model) | hf_cases.published(router_bias, model)
  assert set(found) == set(tensors)
  for name, expected in tensors.items():
    assert found[name].dtype == np.float32
    np.testing.assert_array_equal(found[name], expected.astype(np.float32), err_msg=name)


CONFIG = hf.config_from_hf(SMALL)
TENSORS = random_tensors(CONFIG)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_shards_of_every_dtype_read_back_exactly(tmp_path, dtype):
  tensors = {name: tensor.astype(dtype) for name, tensor in TENSORS.items()}
  write_shards(tmp_path, SMALL, tensors)
  assert_holds(hf.load_pretrained(tmp_path), tensors)


@pytest.mark.parametrize(
  "changes",
  [
    {"q_lora_rank": None, "attention_bias": True, "num_nextn_predict_layers": 0},
    {"tie_word_embeddings": True, "attention_bias": True, "n_shared_experts": 0},
    {"first_k_dense_replace": 0},
    {"first_k_dense_replace": 5, "num_nextn_predict_layers": 0},
    {"model_type": "deepseek_v2", "topk_method": "greedy"},
  ],
  ids=str,
)
def test_every_kind_of_model_reads_back_exactly(tmp_path, changes):
  hf_config = {**SMALL, **changes}
  tensors = random_tensors(hf.config_from_hf(hf_config))
  write(tmp_path, hf_config, tensors)
  assert_holds(hf.load_pretrained(tmp_path), tensors)


def test_fields_not_in_config_json_are_keywords(tmp_path):
  write(tmp_path, SMALL, TENSORS)
  config = hf.load_pretrained(tmp_path, compute_dtype="bfloat16", remat="full").config
  assert (config.compute_dtype, config.remat) == ("bfloat16", "full")


def test_frequencies_and_equal_copies_are_left_out(tmp_path):
  extra = {
    "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32),
    "model.layers.3.embed_tokens.weight": TENSORS[EMBED],
    "model.layers.4.shared_head.head.weight": TENSORS[HEAD],
  }
  write(tmp_path, SMALL, TENSORS | extra)
  assert_holds(hf.load_pretrained(tmp_path), TENSORS)


def test_tied_head_may_be_there_too(tmp_path):
  hf_config = SMALL | {"tie_word_embeddings": True}
  tensors = random_tensors(hf.config_from_hf(hf_config))
  assert HEAD not in tensors
  write(tmp_path, hf_config, tensors | {HEAD: tensors[EMBED].copy()})
  assert_holds(hf.load_pretrained(tmp_path), tensors)
  write(tmp_path, hf_config, tensors | {HEAD: tensors[EMBED] + 1})
  with pytest.raises(ValueError, match=rf"{HEAD} in .*{hf.WEIGHTS} must equal {EMBED}"):
    hf.load_pretrained(tmp_path)


def test_mtp_layers_left_out_by_transformers_are_counted_out(tmp_path, caplog):
  main = {
    name: t
    for name, t in TENSORS.items()
    if not name.startswith(("model.layers.3", "model.layers.4"))
  }
  write(tmp_path, SMALL, main)
  with caplog.at_level(logging.WARNING):
    model = hf.load_pretrained(tmp_path)
  assert "MTP" in caplog.text
  assert model.config.num_nextn_predict_layers == 0
  assert_holds(model, main)
  with pytest.raises(ValueError, match=r"model\.layers\.3\.enorm\.weight and \d+ others are not"):
    hf.load_pretrained(tmp_path, num_nextn_predict_layers=2)


def without(name):
  return {other: tensor for other, tensor in TENSORS.items() if other != name}


@pytest.mark.parametrize(
  ("hf_config", "tensors", "message"),
  [
    (SMALL, TENSORS | {"model.layers.1.mlp.gate.bias": np.ones(4, np.float32)}, "mlp.gate.bias in {} has no place"),
    (SMALL, without(ROUTER), f"{ROUTER} and 0 others are not in model.safetensors"),
    (SMALL, without("model.layers.4.hnorm.weight"), "model.layers.4.hnorm.weight and 0 others are not"),
    (SMALL, TENSORS | {ROUTER: TENSORS[ROUTER].T.copy()}, f"{ROUTER} in model.safetensors must have the shape config.json gives it, [4, 10], got [10, 4]"),
    (SMALL, TENSORS | {ROUTER: np.ones((4, 10), np.int8)}, f"{ROUTER} in model.safetensors must be one of F32, BF16, F16, got I8"),
    (SMALL, TENSORS | {"model.layers.3.shared_head.head.weight": TENSORS[HEAD] + 1}, "model.layers.3.shared_head.head.weight in {} must equal lm_head.weight"),
    (SMALL, TENSORS | {"model.layers.4.embed_tokens.weight": TENSORS[EMBED] + 1}, "model.layers.4.embed_tokens.weight in {} must equal model.embed_tokens.weight"),
    (SMALL | {"n_routed_experts": 2, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}, TENSORS, "experts.2.down_proj.weight in {} has no place"),
    (SMALL | {"num_nextn_predict_layers": 1}, TENSORS, "tensor model.layers.4."),
    (SMALL | {"num_hidden_layers": 6}, TENSORS, "tensor model.layers.3.eh_proj.weight in {} has no place"),
    (SMALL | {"q_lora_rank": None}, TENSORS, "model.layers.0.self_attn.q_a_layernorm.weight in {} has no place"),
    (SMALL | {"v_head_dim": 8}, TENSORS, "self_attn.kv_b_proj.weight in model.safetensors must have the shape"),
    (SMALL | {"tie_word_embeddings": True}, TENSORS, "lm_head.weight in {} must equal"),
    (SMALL | {"attention_bias": True}, TENSORS, "model.layers.0.self_attn.q_a_proj.bias and"),
  ],
  ids=lambda value: re.sub(r"\W+", "-", value)[:60] if isinstance(value, str) else "",
)  # fmt: skip
def test_tensors_that_do_not_fit_are_named(tmp_path, hf_config, tensors, message):
  write(tmp_path, hf_config, tensors)
  with pytest.raises(ValueError) as error:
    hf.load_pretrained(tmp_path)
  assert message.format(tmp_path / hf.WEIGHTS) in str(error.value)


@pytest.mark.parametrize("keep", [0, 5, 2000, -1])
def test_truncated_file(tmp_path, keep):
  write(tmp_path, SMALL, TENSORS)
  content = (tmp_path / hf.WEIGHTS).read_bytes()
  (tmp_path / hf.WEIGHTS).write_bytes(content[:keep])
  with pytest.raises(ValueError, match=rf"{hf.WEIGHTS} must be a whole safetensors file: "):
    hf.load_pretrained(tmp_path)


def test_missing_shard_is_named_with_a_tensor_it_held(tmp_path):
  weight_map = write_shards(tmp_path, SMALL, TENSORS)
  file = weight_map[ROUTER]
  (tmp_path / file).unlink()
  with pytest.raises(
    ValueError, match=rf"{file} must exist: .*index\.json says it holds \S+$"
  ) as e:
    hf.load_pretrained(tmp_path)
  assert weight_map[str(e.value).split()[-1]] == file


@pytest.mark.parametrize("moved", [True, False])
def test_shard_without_the_tensor_its_index_lists(tmp_path, moved):
  weight_map = write_shards(tmp_path, SMALL, TENSORS)
  file = weight_map[ROUTER]
  tensors = load_file(tmp_path / file)
  router = tensors.pop(ROUTER)
  save_file(tensors | ({"other.weight": router} if moved else {}), tmp_path / file)
  with pytest.raises(ValueError, match=rf"{file} must hold .* it lacks \['{ROUTER}'\]"):
    hf.load_pretrained(tmp_path)


def test_folder_without_config_or_weights(tmp_path):
  with pytest.raises(ValueError, match=r"must hold config\.json"):
    hf.load_pretrained(tmp_path)
  write(tmp_path, SMALL, TENSORS)
  shutil.move(tmp_path / hf.WEIGHTS, tmp_path / "pytorch_model.bin")
  with pytest.raises(ValueError, match=rf"must hold {hf.WEIGHTS} or {hf.INDEX}, it has neither"):
    hf.load_pretrained(tmp_path)
