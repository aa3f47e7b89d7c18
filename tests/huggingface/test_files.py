"""Checkpoint folders: layouts and dtypes that are read, and what a broken one says."""

import json
import logging
import re
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from dsmoe import config as config_lib
from dsmoe import model as model_lib
from dsmoe.huggingface import files, fp8, loading, parts
from dsmoe.model import parameters
from dsmoe.parallel import mesh as mesh_lib
from tests import runs
from tests.huggingface import cases

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
  return loading.layout(*model_lib.split(shapes)[1:], config)


def random_tensors(config, dtype=np.float32):
  """Every tensor of the model with random values, as a published file would hold it."""
  rng = np.random.default_rng(0)
  slots = layout_of(config).items()
  return {name: rng.normal(size=slot.hf_shape).astype(dtype) for name, slot in slots}


def write(folder, hf_config, tensors):
  (folder / "config.json").write_text(json.dumps(hf_config))
  save_file(tensors, folder / loading.WEIGHTS)


def write_shards(folder, hf_config, tensors, num=3):
  """Writes an index and `num` shards; returns the index's map of tensor to file."""
  (folder / "config.json").write_text(json.dumps(hf_config))
  weight_map = {}
  for i in range(num):
    file = f"model-{i + 1:05}-of-{num:05}.safetensors"
    part = dict(list(tensors.items())[i::num])
    save_file(part, folder / file)
    weight_map |= dict.fromkeys(part, file)
  (folder / loading.INDEX).write_text(json.dumps({"weight_map": weight_map}))
  return weight_map


def assert_holds(model, tensors):
  """Every tensor, and nothing else, came back out in float32."""
  _, params, router_bias = model_lib.split(model)
  found = cases.published({**params}, model) | cases.published(router_bias, model)
  assert set(found) == set(tensors)
  for name, expected in tensors.items():
    assert found[name].dtype == np.float32
    np.testing.assert_array_equal(found[name], expected.astype(np.float32), err_msg=name)


CONFIG = loading.config_from_hf(SMALL)
TENSORS = random_tensors(CONFIG)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_shards_of_every_dtype_read_back_exactly(tmp_path, dtype):
  tensors = {name: tensor.astype(dtype) for name, tensor in TENSORS.items()}
  write_shards(tmp_path, SMALL, tensors)
  assert_holds(loading.load_pretrained(tmp_path), tensors)


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
  tensors = random_tensors(loading.config_from_hf(hf_config))
  write(tmp_path, hf_config, tensors)
  assert_holds(loading.load_pretrained(tmp_path), tensors)


def test_a_mesh_gets_the_parts_of_its_devices(tmp_path):
  """As training stores them, bitwise; a device's part reads its own experts' rows and no others."""
  hf_config = SMALL | dict(vocab_size=12, intermediate_size=16, kv_lora_rank=6, v_head_dim=8)
  hf_config |= dict(qk_nope_head_dim=4, moe_intermediate_size=18)
  write(tmp_path, hf_config, random_tensors(loading.config_from_hf(hf_config)))
  axes = config_lib.MeshConfig(stage=1, data=2, expert=2, context=1, model=2)
  mesh = mesh_lib.make_mesh(axes, jax.devices())
  model = loading.load_pretrained(tmp_path, mesh=mesh)
  expected = model_lib.split(loading.load_pretrained(tmp_path))[1:]
  for found, whole in zip(model_lib.split(model)[1:], expected, strict=True):
    shardings = mesh_lib.named(mesh, parameters.specs(whole, mesh))
    assert jax.tree.map(lambda x: x.sharding, found) == shardings
    jax.tree.map(np.testing.assert_array_equal, found, whole)

  opened, reads = loading.open_pretrained(tmp_path), []

  def read(name, *rows):
    reads.append((name, *rows))
    return opened.read(name, *rows)

  path = ("moe_layers", "mlp", "experts", "w_gate")
  own = {name: slot for name, slot in opened.slots.items() if slot.path == path}
  # Layers, half of the experts, half of the inputs, half of the outputs.
  index = (slice(None), slice(2, 4), slice(0, 5), slice(9, 18))
  part = parts.read_part(read, own, (2, 4, 10, 18), index)
  np.testing.assert_array_equal(part, loading.flat(expected[0])[path][index])
  names = [f"model.layers.{i}.mlp.experts.{e}.gate_proj.weight" for i in (1, 2) for e in (2, 3)]
  assert reads == [(name, 9, 18) for name in names]

  small = tmp_path / "small"
  small.mkdir()
  write(small, SMALL, TENSORS)
  with pytest.raises(ValueError, match=r"kv_a_proj: each of the mesh axes .* must divide"):
    loading.load_pretrained(small, mesh=mesh)


PROCESS = """
import sys
import jax
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
from dsmoe import model as model_lib
from dsmoe.config import MeshConfig
from dsmoe.huggingface import files, loading
from dsmoe.inference import batcher
from dsmoe.parallel import mesh as mesh_lib

read, names = files.TensorFiles.read, set()
files.TensorFiles.read = lambda self, name, *rows: names.add(name) or read(self, name, *rows)
mesh = mesh_lib.make_mesh(MeshConfig(stage=1, data=1, expert=4, context=1, model=1))
model = loading.load_pretrained(sys.argv[3], mesh=mesh)
print(sorted({name.split(".")[5] for name in names if ".experts." in name}))
try:
  batcher.Batcher(model.config, *model_lib.split(model)[1:], mesh=mesh)
except ValueError as error:
  print(error)
"""


@pytest.mark.slow
def test_each_of_two_processes_reads_the_experts_of_its_devices(tmp_path):
  hf_config = SMALL | dict(vocab_size=12, hidden_size=12, q_lora_rank=8, kv_lora_rank=8)
  write(tmp_path, hf_config, random_tensors(loading.config_from_hf(hf_config)))
  address = f"localhost:{runs.free_port()}"
  processes = [runs.start("-c", PROCESS, address, i, tmp_path) for i in range(2)]
  refusal = "tokens are generated must have devices of one process only, got 2 processes"
  for process, experts in zip(processes, (["0", "1"], ["2", "3"])):
    code, out, err = runs.finish(process)
    assert code == 0, err
    lines = [line for line in out.splitlines() if "Gloo" not in line]  # of the two processes' link
    assert lines == [str(experts), f"a mesh on which {refusal}"]


def test_fields_not_in_config_json_are_keywords(tmp_path):
  write(tmp_path, SMALL, TENSORS)
  config = loading.load_pretrained(tmp_path, compute_dtype="bfloat16", remat="full").config
  assert (config.compute_dtype, config.remat) == ("bfloat16", "full")


def test_frequencies_and_equal_copies_are_left_out(tmp_path):
  extra = {
    "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32),
    "model.layers.3.embed_tokens.weight": TENSORS[EMBED],
    "model.layers.4.shared_head.head.weight": TENSORS[HEAD],
  }
  write(tmp_path, SMALL, TENSORS | extra)
  assert_holds(loading.load_pretrained(tmp_path), TENSORS)
  account = loading.open_pretrained(tmp_path).account
  reasons = ("follows from config.json", f"copy of {EMBED}", f"copy of {HEAD}")
  assert account.not_kept == dict(zip(extra, reasons))
  vectors = {name for name, tensor in TENSORS.items() if tensor.ndim == 1}
  assert set(account.stored_as_is) == vectors | {EMBED}
  assert set(account.transposed) == set(TENSORS) - vectors - {EMBED}
  assert account.dequantised == []


def test_tied_head_may_be_there_too(tmp_path):
  hf_config = SMALL | {"tie_word_embeddings": True}
  tensors = random_tensors(loading.config_from_hf(hf_config))
  assert HEAD not in tensors
  write(tmp_path, hf_config, tensors | {HEAD: tensors[EMBED].copy()})
  assert_holds(loading.load_pretrained(tmp_path), tensors)
  write(tmp_path, hf_config, tensors | {HEAD: tensors[EMBED] + 1})
  with pytest.raises(ValueError, match=rf"{HEAD} in .*{loading.WEIGHTS} must equal {EMBED}"):
    loading.load_pretrained(tmp_path)


def test_mtp_layers_left_out_by_transformers_are_counted_out(tmp_path, caplog):
  main = {
    name: t
    for name, t in TENSORS.items()
    if not name.startswith(("model.layers.3", "model.layers.4"))
  }
  write(tmp_path, SMALL, main)
  with caplog.at_level(logging.WARNING):
    model = loading.load_pretrained(tmp_path)
  assert "MTP" in caplog.text
  assert model.config.num_nextn_predict_layers == 0
  assert_holds(model, main)
  with pytest.raises(ValueError, match=r"model\.layers\.3\.enorm\.weight and \d+ others are not"):
    loading.load_pretrained(tmp_path, num_nextn_predict_layers=2)


@pytest.mark.parametrize("config", [{"num_nextn_predict_layers": 0}, {}], ids=["config", "told"])
def test_mtp_layers_that_nobody_counts_are_left_out(tmp_path, caplog, config):
  """transformers ignores them too; copies of embedding and head go with them."""
  copies = {"model.layers.3.embed_tokens.weight": TENSORS[EMBED] + 1}
  write(tmp_path, SMALL | config, TENSORS | copies)
  with caplog.at_level(logging.WARNING):
    opened = loading.open_pretrained(tmp_path, num_nextn_predict_layers=0)
    model = loading.load_pretrained(tmp_path, **({} if config else {"num_nextn_predict_layers": 0}))
  assert "those of the files are left out: layers [3, 4]" in caplog.text
  main = {n: t for n, t in TENSORS.items() if not re.match(r"model\.layers\.[34]\.", n)}
  assert_holds(model, main)
  left_out = {name for name, why in opened.account.not_kept.items() if why == "MTP, left out"}
  assert left_out == (set(TENSORS) | set(copies)) - set(main)


def test_layers_without_a_projection_are_no_mtp_layers(tmp_path):
  """So that a config.json with too few layers is still refused."""
  write(tmp_path, SMALL | {"num_nextn_predict_layers": 0, "num_hidden_layers": 2}, TENSORS)
  with pytest.raises(ValueError, match=r"model\.layers\.2\.\S+ in .* has no place"):
    loading.load_pretrained(tmp_path)


def without(name):
  return {other: tensor for other, tensor in TENSORS.items() if other != name}


@pytest.mark.parametrize(
  ("hf_config", "tensors", "message"),
  [
    (SMALL, TENSORS | {"model.layers.1.mlp.gate.bias": np.ones(4, np.float32)}, "mlp.gate.bias in {} has no place"),
    (SMALL, without(ROUTER), f"{ROUTER} and 0 others are not in model.safetensors"),
    (SMALL, without("model.layers.4.hnorm.weight"), "model.layers.4.hnorm.weight and 0 others are not"),
    (SMALL, TENSORS | {ROUTER: TENSORS[ROUTER].T.copy()}, f"{ROUTER} in {{}} must have the shape config.json gives it, [4, 10], got [10, 4]"),
    (SMALL, TENSORS | {ROUTER: np.ones((4, 10), np.int8)}, f"{ROUTER} in {{}} must be one of F32, BF16, F16, F8_E4M3, got I8"),
    (SMALL, TENSORS | {"model.layers.3.shared_head.head.weight": TENSORS[HEAD] + 1}, "model.layers.3.shared_head.head.weight in {} must equal lm_head.weight"),
    (SMALL, TENSORS | {"model.layers.4.embed_tokens.weight": TENSORS[EMBED] + 1}, "model.layers.4.embed_tokens.weight in {} must equal model.embed_tokens.weight"),
    (SMALL | {"n_routed_experts": 2, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}, TENSORS, "experts.2.down_proj.weight in {} has no place"),
    (SMALL | {"num_nextn_predict_layers": 1}, TENSORS, "tensor model.layers.4."),
    (SMALL | {"num_hidden_layers": 6}, TENSORS, "tensor model.layers.3.eh_proj.weight in {} has no place"),
    (SMALL | {"q_lora_rank": None}, TENSORS, "model.layers.0.self_attn.q_a_layernorm.weight in {} has no place"),
    (SMALL | {"v_head_dim": 8}, TENSORS, "self_attn.kv_b_proj.weight in {} must have the shape"),
    (SMALL | {"tie_word_embeddings": True}, TENSORS, "lm_head.weight in {} must equal"),
    (SMALL | {"attention_bias": True}, TENSORS, "model.layers.0.self_attn.q_a_proj.bias and"),
  ],
  ids=lambda value: re.sub(r"\W+", "-", value)[:60] if isinstance(value, str) else "",
)  # fmt: skip
def test_tensors_that_do_not_fit_are_named(tmp_path, hf_config, tensors, message):
  write(tmp_path, hf_config, tensors)
  with pytest.raises(ValueError) as error:
    loading.load_pretrained(tmp_path)
  assert message.format(tmp_path / loading.WEIGHTS) in str(error.value)


@pytest.mark.parametrize("keep", [0, 5, 2000, -1])
def test_truncated_file(tmp_path, keep):
  write(tmp_path, SMALL, TENSORS)
  content = (tmp_path / loading.WEIGHTS).read_bytes()
  (tmp_path / loading.WEIGHTS).write_bytes(content[:keep])
  with pytest.raises(ValueError, match=rf"{loading.WEIGHTS} must be a whole safetensors file: "):
    loading.load_pretrained(tmp_path)


def test_missing_shard_is_named_with_a_tensor_it_held(tmp_path):
  weight_map = write_shards(tmp_path, SMALL, TENSORS)
  file = weight_map[ROUTER]
  (tmp_path / file).unlink()
  with pytest.raises(
    ValueError, match=rf"{file} must exist: .*index\.json says it holds \S+$"
  ) as e:
    loading.load_pretrained(tmp_path)
  assert weight_map[str(e.value).split()[-1]] == file


@pytest.mark.parametrize("moved", [True, False])
def test_shard_without_the_tensor_its_index_lists(tmp_path, moved):
  weight_map = write_shards(tmp_path, SMALL, TENSORS)
  file = weight_map[ROUTER]
  tensors = load_file(tmp_path / file)
  router = tensors.pop(ROUTER)
  save_file(tensors | ({"other.weight": router} if moved else {}), tmp_path / file)
  with pytest.raises(ValueError, match=rf"{file} must hold .* it lacks \['{ROUTER}'\]"):
    loading.load_pretrained(tmp_path)


def test_folder_without_config_or_weights(tmp_path):
  with pytest.raises(ValueError, match=r"must hold config\.json"):
    loading.load_pretrained(tmp_path)
  write(tmp_path, SMALL, TENSORS)
  shutil.move(tmp_path / loading.WEIGHTS, tmp_path / "pytorch_model.bin")
  with pytest.raises(
    ValueError, match=rf"must hold {loading.WEIGHTS} or {loading.INDEX}, it has neither"
  ):
    loading.load_pretrained(tmp_path)


@pytest.mark.parametrize(
  ("header", "message"),
  [
    (b"{not json", "its header is broken"),
    (b'{"a": {"dtype": "F32", "shape": [2]}}', "its header is broken"),
    (b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0]}}', "its header is broken"),
    (b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8, 8]}}', "its header is broken"),
    (b'{"a": {"dtype": "Q3", "shape": [2], "data_offsets": [0, 8]}}', "tensor a in .* must be one of F32, BF16, F16, F8_E4M3, got Q3"),
    (b'{"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}', "tensor a, F32 .3., needs 12 bytes from 0 on, its header says 0 to 8"),
    (b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}', "tensor a, F32 .1., needs 4 bytes from 0 on"),
    (b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}', "its tensors end at byte"),
    (b'{"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}}', "tensor a ends at byte"),
  ],
)  # fmt: skip
def test_broken_header(tmp_path, header, message):
  write(tmp_path, SMALL, {})
  (tmp_path / loading.WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
  with pytest.raises(ValueError, match=message) as error:
    loading.load_pretrained(tmp_path)
  assert loading.WEIGHTS in str(error.value)


@pytest.mark.parametrize("file", ["config.json", loading.INDEX])
def test_broken_json_is_named(tmp_path, file):
  write_shards(tmp_path, SMALL, TENSORS)
  (tmp_path / file).write_text("{,")
  with pytest.raises(ValueError, match=rf"{file} must be a JSON file: "):
    loading.load_pretrained(tmp_path)


@pytest.mark.parametrize(
  ("weight_map", "message"),
  [
    ({}, r"must have a weight_map .* got \{\}"),
    ({"a": 3}, "weight_map must name a file for a, got 3"),
  ],
)
def test_broken_index(tmp_path, weight_map, message):
  write_shards(tmp_path, SMALL, TENSORS)
  (tmp_path / loading.INDEX).write_text(json.dumps({"weight_map": weight_map}))
  with pytest.raises(ValueError, match=rf"{loading.INDEX}:? {message}"):
    loading.load_pretrained(tmp_path)


def test_broken_rule_of_a_config_names_it(tmp_path):
  write(tmp_path, SMALL | {"n_group": 3}, TENSORS)
  with pytest.raises(ValueError, match=rf"^{tmp_path}/config\.json: n_routed_experts"):
    loading.load_pretrained(tmp_path)
  write(tmp_path, SMALL | {"hidden_act": "gelu"}, TENSORS)
  with pytest.raises(ValueError, match=rf"^{tmp_path}/config\.json: hidden_act"):
    loading.load_pretrained(tmp_path)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_copies_with_nan_are_copies(tmp_path, dtype):
  tensors = {name: tensor.astype(dtype) for name, tensor in TENSORS.items()}
  tensors[HEAD][1, 2] = np.nan
  copy = {"model.layers.3.shared_head.head.weight": tensors[HEAD].copy()}
  write(tmp_path, SMALL, tensors | copy)
  assert_holds(loading.load_pretrained(tmp_path), tensors)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_quantise_refuses_what_is_not_finite(value):
  weight = np.ones((130, 130), np.float32)
  weight[129, 129] = value
  with pytest.raises(ValueError, match="w must be finite to become FP8"):
    fp8.quantise(weight, name="w")


@pytest.mark.parametrize("max_shard_bytes", [1, 600, 10**9])
def test_shards_are_those_of_the_safetensors_library(tmp_path, max_shard_bytes):
  rng = np.random.default_rng(1)
  tensors = {
    "a": rng.normal(size=(7, 3)).astype(np.float32),
    "b": rng.normal(size=(5, 9)).astype(ml_dtypes.float8_e4m3fn),  # 45 bytes: next is not aligned
    "c": rng.normal(size=(11,)).astype(ml_dtypes.bfloat16),
    "d": rng.normal(size=(30, 4)).astype(np.float32),
  }
  dtypes = {"a": "F32", "b": "F8_E4M3", "c": "BF16", "d": "F32"}
  plan = {name: (dtypes[name], tensor.shape) for name, tensor in tensors.items()}
  places = files.create_shards(tmp_path, plan, max_shard_bytes)
  for name, tensor in tensors.items():
    cut = len(tensor) // 2
    files.write_rows(places[name], cut, tensor[cut:])
    files.write_rows(places[name], 0, tensor[:cut])
    assert places[name].start % tensor.dtype.itemsize == 0
  files.create_shards(tmp_path, plan, max_shard_bytes)  # again: keeps what is there
  assert files.read_folder(tmp_path) == places
  paths = sorted(tmp_path.glob("*.safetensors"))
  assert len(paths) == {1: 4, 600: 2, 10**9: 1}[max_shard_bytes]
  for file in paths:
    with safe_open(file, "numpy") as handle:  # NumPy knows no FP8: sizes only
      held = {name: handle.get_slice(name) for name in handle.keys()}
      for name, part in held.items():
        assert (part.get_dtype(), part.get_shape()) == (dtypes[name], list(tensors[name].shape))
        assert places[name].file == file
  for name, tensor in tensors.items():
    assert files.read_rows(places[name]).tobytes() == tensor.tobytes()
    assert files.read_rows(places[name], 2, 4).tobytes() == tensor[2:4].tobytes()


EVERY_DTYPE = {dtype: kind.itemsize for dtype, kind in files.DTYPES.items()} | files.OTHER_BYTES


def random_bytes(num_bytes):
  return np.random.default_rng(1).integers(0, 256, num_bytes, np.uint8).tobytes()


@pytest.mark.parametrize("dtype", EVERY_DTYPE)
def test_reads_what_the_safetensors_library_writes(tmp_path, dtype):
  names = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu"}
  names |= {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
  names |= {f"I{n}": f"int{n}" for n in (8, 16, 32, 64)}
  names |= {f"U{n}": f"uint{n}" for n in (8, 16, 32, 64)} | {"BOOL": "bool"}
  kind = np.dtype(getattr(ml_dtypes, names[dtype], names[dtype]))
  assert kind.itemsize == EVERY_DTYPE[dtype]
  tensor = np.frombuffer(random_bytes(6 * kind.itemsize), np.uint8).view(kind).reshape(3, 2)
  path = tmp_path / "model.safetensors"
  save_file({"a": np.ones(3, np.float32), "b": tensor}, path)
  found = files.read_header(path)["b"]
  assert (found.dtype, found.shape) == (dtype, (3, 2))
  assert path.read_bytes()[found.start :][: tensor.nbytes] == tensor.tobytes()
  if dtype in files.DTYPES:
    assert files.read_rows(found).dtype == kind
    assert files.read_rows(found, 1, 3).tobytes() == tensor[1:].tobytes()


@pytest.mark.parametrize("dtype", files.DTYPES)
def test_the_safetensors_library_reads_what_is_written_by_rows(tmp_path, dtype):
  kind = files.DTYPES[dtype]
  tensor = np.frombuffer(random_bytes(6 * kind.itemsize), np.uint8).view(kind).reshape(3, 2)
  place = files.create_shards(tmp_path, {"b": (dtype, (3, 2))}, 100)["b"]
  files.write_rows(place, 1, tensor[1:])
  files.write_rows(place, 0, tensor[:1])
  [(name, found)] = safetensors.deserialize(place.file.read_bytes())
  assert name == "b" and (found["dtype"], found["shape"]) == (dtype, [3, 2])
  assert bytes(found["data"]) == tensor.tobytes()


RESIDENT = r"""
import pathlib, re, sys
from dsmoe.huggingface import files
peak = lambda: int(re.search(r"VmHWM:\s+(\d+) kB", open("/proc/self/status").read())[1]) // 1024
stored = files.read_header(pathlib.Path(sys.argv[1]))["w"]
before = peak()
for start in range(0, stored.shape[0], 1024):
  files.read_rows(stored, start, start + 1024)
print(peak() - before)
"""


def test_reading_rows_does_not_hold_the_file(tmp_path):
  # 256 MiB, read in pieces of 4 MiB.
  place = files.create_shards(tmp_path, {"w": ("F32", (1 << 16, 1024))}, 1 << 40)["w"]
  assert place.num_bytes == 256 << 20
  assert int(runs.run_fresh("-c", RESIDENT, place.file)) < 32


def quantise_dequantise(weight, ue8m0=False):
  """Block by block, number by number: what an FP8 file makes of a weight."""
  result = np.zeros_like(weight)
  for i in range(0, weight.shape[0], 128):
    for j in range(0, weight.shape[1], 128):
      block = weight[i : i + 128, j : j + 128]
      largest = np.float32(np.abs(block).max())
      scale = largest / np.float32(448) if largest else np.float32(1)
      if ue8m0 and largest:
        scale = np.float32(1.0)
        while scale < largest / np.float32(448):
          scale *= np.float32(2)
        while scale / np.float32(2) >= largest / np.float32(448):
          scale /= np.float32(2)
      codes = (block / scale).astype(ml_dtypes.float8_e4m3fn)
      result[i : i + 128, j : j + 128] = codes.astype(np.float32) * scale
  return result


@pytest.mark.parametrize("ue8m0", [False, True])
@pytest.mark.parametrize("shape", [(3, 5), (128, 256), (300, 200), (129, 127)])
def test_quantise(shape, ue8m0):
  rng = np.random.default_rng(2)
  weight = rng.normal(size=shape).astype(np.float32) * np.exp(rng.normal(size=shape[1]) * 3)
  weight = weight.astype(np.float32)
  weight[:128, :128] *= rng.random() > 2  # a block of zeros
  weight[-1, -1] = 448 * 2.0**-5  # a scale that is a power of two already
  codes, scale = fp8.quantise(weight, ue8m0)
  assert codes.dtype == ml_dtypes.float8_e4m3fn and scale.dtype == np.float32
  assert scale.shape == (-(-shape[0] // 128), -(-shape[1] // 128))
  if ue8m0:
    np.testing.assert_array_equal(np.log2(scale) % 1, 0)
    np.testing.assert_array_equal(scale, scale.astype(ml_dtypes.float8_e8m0fnu).astype(np.float32))
  found = fp8.dequantise(codes, scale)
  np.testing.assert_array_equal(found, quantise_dequantise(weight, ue8m0))
  assert np.abs(found - weight).max() <= np.abs(weight).max() / 16
  again, _ = fp8.quantise(found, ue8m0)
  np.testing.assert_array_equal(again.view(np.uint8), codes.view(np.uint8))


FP8_CONFIG = SMALL | {
  "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [4, 6]}
}
Q_A = "model.layers.1.self_attn.q_a_proj.weight"  # [6, 10]: 2 x 2 blocks
UP = "model.layers.2.mlp.experts.3.up_proj.weight"


def fp8_tensors(scale_dtype=np.float32):
  """TENSORS with two weights in FP8, and their values."""
  rng, values, tensors = np.random.default_rng(3), dict(TENSORS), dict(TENSORS)
  for name in (Q_A, UP):
    codes = TENSORS[name].astype(ml_dtypes.float8_e4m3fn)
    O, I = codes.shape
    scale = (2.0 ** rng.integers(-3, 4, (-(-O // 4), -(-I // 6)))).astype(scale_dtype)
    if scale_dtype == np.float32:
      scale = scale * rng.random(scale.shape, np.float32)
    tensors |= {name: codes, name + "_scale_inv": scale}
    values[name] = np.array(
      [
        [np.float32(codes[o, i]) * np.float32(scale[o // 4, i // 6]) for i in range(I)]
        for o in range(O)
      ]
    )
  return tensors, values


def write_any(folder, hf_config, tensors):
  """Writes shards of any dtype, which safetensors' own NumPy functions do not."""
  (folder / "config.json").write_text(json.dumps(hf_config))
  names = {np.dtype(dtype): name for name, dtype in files.DTYPES.items()}
  plan = {n: (names[t.dtype], t.shape) for n, t in tensors.items()}
  for name, place in files.create_shards(folder, plan, 4000).items():
    files.write_rows(place, 0, tensors[name])


@pytest.mark.parametrize("scale_dtype", [np.float32, ml_dtypes.float8_e8m0fnu])
def test_fp8_blocks_of_any_size_read_back_exactly(tmp_path, scale_dtype):
  tensors, values = fp8_tensors(scale_dtype)
  write_any(tmp_path, FP8_CONFIG, tensors)
  assert_holds(loading.load_pretrained(tmp_path), values)
  opened = loading.open_pretrained(tmp_path)
  np.testing.assert_array_equal(opened.read(Q_A, 3, 6), values[Q_A][3:6])
  assert opened.account.dequantised == sorted([Q_A, UP])
  assert opened.account.not_kept == {
    n + "_scale_inv": f"scale of {n}, which it has multiplied" for n in (Q_A, UP)
  }


SCALE = f"{Q_A}_scale_inv"


@pytest.mark.parametrize(
  ("hf_config", "changes", "message"),
  [
    (SMALL, {}, rf"config\.json must have a quantization_config if and only if .* none, but tensor {Q_A} in .*safetensors is F8_E4M3"),
    (FP8_CONFIG, {Q_A: TENSORS[Q_A], UP: TENSORS[UP], SCALE: None, UP + "_scale_inv": None}, r"it has one, but tensor \S+ in .*safetensors is F32"),
    (FP8_CONFIG, {SCALE: None}, rf"tensor {Q_A} in .*safetensors is FP8 and needs a scale, {SCALE} is in no file"),
    (FP8_CONFIG, {Q_A: TENSORS[Q_A]}, rf"tensor {SCALE} in .*safetensors must belong to an FP8 weight, {Q_A} is F32"),
    (FP8_CONFIG, {"x.weight_scale_inv": np.ones((1, 1), np.float32)}, r"tensor x.weight_scale_inv in .* x\.weight is in no file"),
    (FP8_CONFIG, {SCALE: np.ones((1, 2), np.float32)}, rf"tensor {SCALE} in .* must have one number a block of \(4, 6\), \[2, 2\] for .*, got \[1, 2\]"),
    (FP8_CONFIG, {SCALE: np.ones((2, 2), np.float16)}, rf"tensor {SCALE} in .* must be one of F32, F8_E8M0, got F16"),
    (SMALL | {"quantization_config": {"quant_method": "compressed-tensors"}}, {}, r"config\.json: quantization_config must be absent or FP8"),
    (SMALL | {"quantization_config": {"quant_method": "fp8", "weight_block_size": 128}}, {}, r"config\.json: quantization_config must be absent or FP8"),
  ],
  ids=lambda value: re.sub(r"\W+", "-", value)[:60] if isinstance(value, str) else "",
)  # fmt: skip
def test_fp8_that_contradicts_itself(tmp_path, hf_config, changes, message):
  tensors = {n: t for n, t in (fp8_tensors()[0] | changes).items() if t is not None}
  write_any(tmp_path, hf_config, tensors)
  with pytest.raises(ValueError, match=message):
    loading.load_pretrained(tmp_path)
