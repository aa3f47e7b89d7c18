"""Published checkpoints to a workdir and back: identity, precision, kills, memory, verify."""

import dataclasses
import itertools
import json
import os
import pathlib
import re
import shutil
import signal
import threading
import time

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import load_file

from dsmoe import checkpoint
from dsmoe import config as config_lib
from dsmoe import model as model_lib
from dsmoe.data import tokenizer as tokenizer_lib
from dsmoe.huggingface import convert, files, loading, staging, verify
from dsmoe.training import train_step
from experiments import base
from tests import runs
from tests.helpers import TOLERANCE, mesh_of, random_parts, small_config
from tests.huggingface import cases
from tests.huggingface.test_files import (
  EMBED,
  HEAD,
  ROUTER,
  SMALL,
  TENSORS,
  quantise_dequantise,
  random_tensors,
  write,
  write_shards,
)

DEFAULTS = config_lib.from_config_dict(base.get_config())
FP8_CASES = [f for f in cases.folders() if f.name.startswith("fp8_")]


def stored_bytes(folder):
  """Every tensor of a folder as (dtype, shape, bytes)."""
  stored = files.read_folder(pathlib.Path(folder))
  return {n: (s.dtype, s.shape, files.read_rows(s).tobytes()) for n, s in stored.items()}


def values(folder):
  """Every weight of a folder in float32, without copies."""
  opened = loading.open_pretrained(folder)
  return {name: opened.read(name).astype(np.float32) for name in opened.slots}


def bfloat16_tensors(hf_config=SMALL):
  """Published as DeepSeek does: bfloat16, the router's bias in float32, copies for MTP."""
  tensors = random_tensors(loading.config_from_hf(hf_config))
  tensors = {
    name: tensor if name.endswith("_bias") else tensor.astype(ml_dtypes.bfloat16)
    for name, tensor in tensors.items()
  }
  for layer in (3, 4):
    tensors[f"model.layers.{layer}.embed_tokens.weight"] = tensors[EMBED]
    tensors[f"model.layers.{layer}.shared_head.head.weight"] = tensors[HEAD]
  return tensors


@pytest.mark.parametrize(
  "changes",
  [
    {},
    {"q_lora_rank": None, "attention_bias": True, "num_nextn_predict_layers": 0},
    {"tie_word_embeddings": True, "n_shared_experts": 0},
    {"first_k_dense_replace": 5, "num_nextn_predict_layers": 0},
    {"model_type": "deepseek_v2", "topk_method": "greedy", "first_k_dense_replace": 0},
  ],
  ids=str,
)
@pytest.mark.parametrize("pieces", [False, True])
def test_export_then_import_is_the_identity(tmp_path, changes, pieces, monkeypatch):
  if pieces:  # pieces of a few rows, the last one shorter
    monkeypatch.setattr(loading.Slot, "block", lambda slot, _: min(3, slot.shape[slot.inputs]))
  hf_config = {**SMALL, **changes}
  tensors = random_tensors(loading.config_from_hf(hf_config))
  (tmp_path / "hf").mkdir()
  write(tmp_path / "hf", hf_config, tensors)
  account = convert.import_folder(tmp_path / "hf", tmp_path / "run", DEFAULTS)
  assert sorted(account.stored_as_is + account.transposed) == sorted(tensors)
  convert.export_workdir(tmp_path / "run", tmp_path / "out", "float32")
  out = load_file(tmp_path / "out" / loading.WEIGHTS)
  for name, tensor in tensors.items():
    assert out[name].dtype == tensor.dtype
    np.testing.assert_array_equal(out[name], tensor, err_msg=name)
  copies = {name for name in out if re.search(r"embed_tokens|shared_head\.head", name)} - {EMBED}
  assert set(out) - set(tensors) == copies
  assert len(copies) == 2 * loading.config_from_hf(hf_config).num_nextn_predict_layers

  convert.import_folder(tmp_path / "out", tmp_path / "again", DEFAULTS)
  first, second = (runs.checkpoint_arrays(tmp_path / name, 0) for name in ("run", "again"))
  runs.assert_bitwise_equal(first, second)
  assert len(first) > 10
  assert checkpoint.load_config(tmp_path / "run") == checkpoint.load_config(tmp_path / "again")


def test_bfloat16_folder_comes_back_bit_for_bit(tmp_path):
  write_shards(tmp_path, SMALL, bfloat16_tensors())
  account = convert.import_folder(tmp_path, tmp_path / "run", DEFAULTS)
  assert account.not_kept["model.layers.4.shared_head.head.weight"] == f"copy of {HEAD}"
  assert len(account.not_kept) == 4
  convert.export_workdir(tmp_path / "run", tmp_path / "out", "bfloat16", max_shard_bytes=3000)
  assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3
  assert stored_bytes(tmp_path / "out") == stored_bytes(tmp_path)
  assert json.loads((tmp_path / "out/config.json").read_text())["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize(("ue8m0", "numbers"), [(False, None), (True, None), (False, 1)])
def test_fp8_export_is_quantise_dequantise(tmp_path, ue8m0, numbers, monkeypatch):
  if numbers:  # the smallest pieces: 128 rows, or what makes a multiple of it
    monkeypatch.setattr(convert, "_piece_numbers", lambda slots: numbers)
  hf_config = SMALL | {"hidden_size": 140, "intermediate_size": 300, "q_lora_rank": 130}
  tensors = random_tensors(loading.config_from_hf(hf_config))
  write(tmp_path, hf_config, tensors)
  convert.import_folder(tmp_path, tmp_path / "run", DEFAULTS)
  convert.export_workdir(tmp_path / "run", tmp_path / "out", "fp8", ue8m0)
  stored, found = files.read_folder(tmp_path / "out"), values(tmp_path / "out")
  quantised = set()
  for name, tensor in tensors.items():
    dtype = stored[name].dtype
    if dtype == "F8_E4M3":
      quantised.add(name)
      assert stored[name + "_scale_inv"].dtype == ("F8_E8M0" if ue8m0 else "F32")
      expected = quantise_dequantise(tensor, ue8m0)
    elif name.endswith("e_score_correction_bias"):
      assert dtype == "F32"
      expected = tensor
    else:
      assert dtype == "BF16"
      expected = tensor.astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(found[name], expected, err_msg=name)
  matrices = {n for n, t in tensors.items() if t.ndim == 2}
  kept = re.compile(r"(embed_tokens|lm_head|mlp\.gate|eh_proj)\.weight$")
  assert quantised == {name for name in matrices if not kept.search(name)}
  settings = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
  assert settings["weight_block_size"] == [128, 128]
  assert settings.get("scale_fmt") == ("ue8m0" if ue8m0 else None)


@pytest.mark.parametrize("folder", FP8_CASES, ids=cases.label)
def test_fp8_case_both_ways(folder, tmp_path):
  convert.import_folder(folder, tmp_path / "run", DEFAULTS)  # float32: nothing is lost
  run, case = checkpoint.load_run(tmp_path / "run"), cases.load(folder)
  _, params, router_bias = model_lib.split(case.model)
  assert jax.tree.all(jax.tree.map(np.array_equal, run.params, params))
  assert jax.tree.all(jax.tree.map(np.array_equal, run.router_bias, router_bias))
  convert.export_workdir(tmp_path / "run", tmp_path / "out", "fp8")
  theirs, ours = stored_bytes(folder), stored_bytes(tmp_path / "out")
  assert {n: t[:2] for n, t in theirs.items()} == {n: t[:2] for n, t in ours.items()}
  for name in theirs:
    if name.endswith("_scale_inv"):  # 448 * scale was rounded, which can cost the last bit
      a, b = (np.frombuffer(t[name][2], np.float32) for t in (theirs, ours))
      np.testing.assert_allclose(a, b, rtol=2**-23, err_msg=name)
    else:
      assert theirs[name] == ours[name], name


@pytest.mark.parametrize("folder", cases.supported("logits"), ids=cases.label)
def test_imported_case_has_its_logits(folder, tmp_path):
  convert.import_folder(folder, tmp_path / "run", DEFAULTS, "float32", dtype="float32")
  convert.export_workdir(tmp_path / "run", tmp_path / "out", "float32")
  model, io = loading.load_pretrained(tmp_path / "out"), cases.load(folder).io
  error = np.abs(np.asarray(model_lib.logits(model, io["input_ids"])) - io["logits"]).max()
  assert error <= TOLERANCE["model_float32"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_imported_workdir_is_that_of_a_run(tmp_path, dtype):
  hf_config = SMALL | {"hidden_size": 16, "q_lora_rank": 24, "kv_lora_rank": 8}  # for 8 devices
  (tmp_path / "hf").mkdir()
  write(tmp_path / "hf", hf_config, random_tensors(loading.config_from_hf(hf_config)))
  for name in (
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "tiktoken.model",
  ):
    (tmp_path / "hf" / name).write_text(f'{{"eos_token_id": 7, "of": "{name}"}}')
  convert.import_folder(tmp_path / "hf", tmp_path / "run", DEFAULTS, dtype=dtype)
  run = checkpoint.load_run(tmp_path / "run")
  assert run.step == 0
  assert run.tokenizer_path.read_text() == (tmp_path / "hf/tokenizer.json").read_text()
  assert run.config.model.compute_dtype == "bfloat16"
  assert run.config.optim == DEFAULTS.optim

  model = loading.load_pretrained(tmp_path / "hf")
  _, params, router_bias = model_lib.split(model)
  on_disk = runs.checkpoint_arrays(tmp_path / "run", 0)

  def check(path, ours, expected):
    name = path[-1].key
    tree = "router_bias" if name == "router_bias" else "params"
    exact = dtype == "float32" or name.endswith(("norm", "bias")) or name == "router"
    stored = on_disk[jax.tree_util.keystr((jax.tree_util.DictKey(tree), *path))]
    assert stored.dtype == ("float32" if exact else "bfloat16")
    np.testing.assert_array_equal(stored, np.asarray(expected).astype(stored.dtype))
    assert ours.dtype == np.float32
    np.testing.assert_array_equal(ours, stored.astype(np.float32))

  jax.tree.map_with_path(check, run.params, params)
  jax.tree.map_with_path(check, run.router_bias, router_bias)

  convert.export_workdir(tmp_path / "run", tmp_path / "out")
  for name in (
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "tiktoken.model",
  ):
    assert (tmp_path / "out" / name).read_text() == (tmp_path / "hf" / name).read_text()
  assert json.loads((tmp_path / "out/config.json").read_text())["eos_token_id"] == 7


def test_orbax_reads_it_by_its_own_means(tmp_path):
  write(tmp_path, SMALL, TENSORS)
  convert.import_folder(tmp_path, tmp_path / "run", DEFAULTS)
  with ocp.CheckpointManager(tmp_path / "run/checkpoints", item_names=("state",)) as manager:
    assert manager.all_steps() == [0]
    restored = manager.restore(0, args=ocp.args.Composite(state=ocp.args.StandardRestore()))
  np.testing.assert_array_equal(restored["state"]["params"]["embed"], TENSORS[EMBED])
  np.testing.assert_array_equal(
    restored["state"]["params"]["moe_layers"]["mlp"]["router"][0], TENSORS[ROUTER].T
  )


@pytest.mark.parametrize(
  ("shape", "inputs", "most_pieces"),
  [
    *(((300, 5), 0, 3), ((7, 300), 1, 3), ((6, 9, 20), 1, 1), ((6, 90, 20), 1, 3)),
    *(((3, 4, 300), 2, 3), ((3, 2, 5), 1, 1), ((11,), 0, 1)),
  ],
)
@pytest.mark.parametrize("limit", [1, 1000, 10**9])
def test_pieces_cover_a_tensor_once(shape, inputs, most_pieces, limit):
  slot = loading.Slot(("x",), (1,), shape, inputs)
  leaf = np.arange(2 * np.prod(shape)).reshape(2, *shape)
  whole, found, made = slot.to_hf(leaf[1]), np.zeros(slot.hf_shape, int), np.zeros_like(leaf)
  assert whole.shape == slot.hf_shape
  for rows, index in slot.pieces(limit):
    assert rows.start % 128 == 0 or not inputs
    np.testing.assert_array_equal(slot.to_hf(leaf[index]), whole[rows])
    found[rows] += 1
    made[index] = slot.to_ours(whole[rows])
  np.testing.assert_array_equal(found, 1)
  np.testing.assert_array_equal(made[1], leaf[1])
  if inputs == 1 and len(shape) == 2:
    np.testing.assert_array_equal(whole, leaf[1].T)
  if limit != 1000:
    assert len(list(slot.pieces(limit))) == (most_pieces if limit == 1 else 1)


def save_run(workdir, config, seed=0):
  """A run's checkpoint at step 3 with random weights, through orbax as training does it."""
  _, params, router_bias = random_parts(config, seed)
  abstract = train_step.abstract_state(config, mesh_of(1))
  fill = lambda tree: jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), tree)  # noqa: E731
  state = train_step.TrainState(
    **{
      **fill(abstract)._asdict(),
      "params": params,
      "router_bias": router_bias,
      "step": np.int32(3),
    }
  )
  state = jax.tree.map(jax.numpy.asarray, state)
  with checkpoint.Checkpointer(workdir, config.checkpoint) as checkpointer:
    checkpoint.record_config(workdir, config, 0)
    checkpointer.save(state, 0)
  return params, router_bias


def test_trained_run_exports(tmp_path):
  config = small_config()
  expected = save_run(tmp_path / "run", config)
  assert convert.export_workdir(tmp_path / "run", tmp_path / "out", "float32") == 3
  model = loading.load_pretrained(tmp_path / "out")
  own = ("compute_dtype", "remat", "dispatch", "attention_chunk_tokens", "kernels")
  own += ("matmul_precision",)
  kept = {name: getattr(model.config, name) for name in own}
  assert dataclasses.replace(config.model, **kept) == dataclasses.replace(
    model.config, rope_scaling=config.model.rope_scaling
  )
  found = model_lib.split(model)[1:]
  assert jax.tree.all(jax.tree.map(np.array_equal, found, expected))
  with pytest.raises(ValueError, match=r"step must be one of the checkpoints in .* got 4"):
    convert.export_workdir(tmp_path / "run", tmp_path / "other", step=4)
  assert not (tmp_path / "other.partial").exists()


def test_own_tokenizer_gets_settings_transformers_wants(tmp_path):
  config = small_config(**{"model.vocab_size": 300})
  save_run(tmp_path / "run", config)
  (tmp_path / "run/data").mkdir()
  tokenizer_lib.train_tokenizer(["some text"], 300).save(str(tmp_path / "run/data/tokenizer.json"))
  convert.export_workdir(tmp_path / "run", tmp_path / "out")
  settings = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
  assert settings["eos_token"] == "<|endoftext|>"
  assert json.loads((tmp_path / "out/config.json").read_text())["eos_token_id"] == 0


def test_config_that_contradicts_the_arrays(tmp_path):
  config = small_config(**runs.TWO_LAYERS)
  save_run(tmp_path, config)
  path = tmp_path / "config.json"
  path.write_text(path.read_text().replace('"vocab_size": 96', '"vocab_size": 95'))
  with pytest.raises(
    ValueError, match=r"array params\.embed in .*state must have the shape config"
  ):
    convert.export_workdir(tmp_path, tmp_path / "out")
  path.write_text(path.read_text().replace('"vocab_size": 95', '"vocab_size": 96'))
  path.write_text(path.read_text().replace('"q_lora_rank": 24', '"q_lora_rank": null'))
  with pytest.raises(ValueError, match=r"must hold the array params\.\S+\.q_proj: "):
    convert.export_workdir(tmp_path, tmp_path / "out")


def test_bad_input_leaves_nothing_behind(tmp_path):
  write(tmp_path, SMALL, {name: t for name, t in TENSORS.items() if name != ROUTER})
  with pytest.raises(ValueError, match=f"{ROUTER} and 0 others are not in"):
    convert.import_folder(tmp_path, tmp_path / "run", DEFAULTS)
  write(tmp_path, SMALL, TENSORS | {"model.layers.3.shared_head.head.weight": TENSORS[HEAD] + 1})
  with pytest.raises(
    ValueError, match=r"shared_head\.head\.weight in .* must equal lm_head\.weight"
  ):
    convert.import_folder(tmp_path, tmp_path / "run", DEFAULTS)
  assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", loading.WEIGHTS]


def test_nothing_is_overwritten(tmp_path):
  write(tmp_path, SMALL, TENSORS)
  (tmp_path / "run").mkdir()
  with pytest.raises(ValueError, match=r"the destination must not exist, .*run does"):
    convert.import_folder(tmp_path, tmp_path / "run", DEFAULTS)
  assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"format": "int8"}, "format must be one of float32, bfloat16, fp8, got 'int8'"),
    ({"max_shard_bytes": 0}, "max_shard_bytes must be at least 1, got 0"),
    ({"step": 1}, "a run's workdir must hold config.json"),
    ({"format": "bfloat16", "ue8m0": True}, "ue8m0 is a kind of scale of the format fp8"),
  ],
)
def test_export_options(tmp_path, options, message):
  with pytest.raises(ValueError, match=message):
    convert.export_workdir(tmp_path, tmp_path / "out", **options)
  with pytest.raises(ValueError, match="from disk to disk, got gs://bucket/run"):
    convert.export_workdir("gs://bucket/run", tmp_path / "out")


def test_staging(tmp_path):
  target = tmp_path / "made"
  with staging.Staging(target, {"job": 1}, 10) as stage:
    assert not target.exists()
    with pytest.raises(ValueError, match=r"made\.partial is being written by another process"):
      staging.Staging(target, {"job": 1}, 10)
  with pytest.raises(ValueError, match=r"made\.partial was begun from another source"):
    staging.Staging(target, {"job": 2}, 10)
  with pytest.raises(ValueError, match=r"must have 1000000000\.0 GB free, it has "):
    staging.Staging(tmp_path / "other", {"job": 1}, 10**18)
  assert not list(tmp_path.glob("other*"))
  with staging.Staging(target, {"job": 1}, 10) as stage:
    (stage.folder / "file").write_text("x")
    stage.finish()
  assert [p.name for p in tmp_path.iterdir()] == ["made"]
  assert (target / "file").read_text() == "x"


def make_all(stage, made=None):
  made = [] if made is None else made
  staging.run(stage, {"a": 1, "b": 1}, made.append, lambda: None, "make")
  return made


def test_deleted_folder_takes_its_journal_along(tmp_path, monkeypatch):
  monkeypatch.setattr(staging, "SYNC_SECS", 0)
  with staging.Staging(tmp_path / "made", {}, 10) as stage:
    assert make_all(stage) == ["a", "b"]
  with staging.Staging(tmp_path / "made", {}, 10) as stage:
    assert make_all(stage) == []
  shutil.rmtree(tmp_path / "made.partial")
  with staging.Staging(tmp_path / "made", {}, 10) as stage:
    assert make_all(stage) == ["a", "b"]
    stage.finish()
  shutil.rmtree(tmp_path / "made")
  with staging.Staging(tmp_path / "made", {}, 10) as stage:
    assert make_all(stage) == ["a", "b"]


def test_journal_cut_short_and_folder_of_others(tmp_path, monkeypatch):
  monkeypatch.setattr(staging, "SYNC_SECS", 0)
  with staging.Staging(tmp_path / "made", {}, 10) as stage:
    make_all(stage)
  journal = tmp_path / "made.partial" / staging.JOURNAL
  journal.write_bytes(journal.read_bytes()[:-2] + "ü".encode()[:1])  # a kill while it is written
  with staging.Staging(tmp_path / "made", {}, 10) as stage:
    assert make_all(stage) == ["b"]
  assert journal.read_text().splitlines()[1:] == ["a", "b"]
  (tmp_path / "other.partial").mkdir()
  (tmp_path / "other.partial/mine").write_text("x")
  with pytest.raises(ValueError, match=r"other\.partial must hold the journal .* delete it"):
    staging.Staging(tmp_path / "other", {}, 10)
  assert [path.name for path in (tmp_path / "other.partial").iterdir()] == ["mine"]


@pytest.mark.parametrize("finishes", [True, False])
def test_lock_on_what_is_gone(tmp_path, finishes, monkeypatch):
  """Another process finishes, or someone deletes the folder, between open and lock."""
  first = staging.Staging(tmp_path / "made", {}, 10)
  flock = staging.fcntl.flock

  def late(*args):
    first.finish() if finishes else shutil.rmtree(first.folder)
    first.__exit__()
    flock(*args)

  monkeypatch.setattr(staging.fcntl, "flock", late)
  message = "the destination must not exist" if finishes else r"made\.partial must stay"
  with pytest.raises(ValueError, match=message):
    staging.Staging(tmp_path / "made", {}, 10)


def test_groups_are_made_one_after_another(tmp_path):
  """Else the chunks of several leaves are in memory at once."""
  running, together = set(), set()
  pairs = {group: threading.Barrier(2, timeout=60) for group in "ac"}

  def make(item):
    running.add(item)
    if item[0] in pairs:
      pairs[item[0]].wait()
    time.sleep(0.01)
    together.update(itertools.permutations([*running], 2))
    running.remove(item)

  with staging.Staging(tmp_path / "made", {}, 10) as stage:
    sizes = dict.fromkeys(["a1", "a2", "b1", "c1", "c2"], 1)
    staging.run(stage, sizes, make, lambda: None, "make", lambda item: item[0])
  assert together and {a[0] == b[0] for a, b in together} == {True}


def test_export_goes_on_only_with_the_same_state(tmp_path, monkeypatch):
  write(tmp_path, SMALL, TENSORS)
  workdir, out = tmp_path / "run", tmp_path / "out"
  convert.import_folder(tmp_path, workdir, DEFAULTS)
  with monkeypatch.context() as patch:
    patch.setattr(loading.Slot, "to_hf", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
      convert.export_workdir(workdir, out, "float32")
  shutil.rmtree(workdir)
  tensors = TENSORS | {EMBED: TENSORS[EMBED] + 1}
  write(tmp_path, SMALL, tensors)
  convert.import_folder(tmp_path, workdir, DEFAULTS)
  with pytest.raises(ValueError, match=r"out\.partial was begun from another source"):
    convert.export_workdir(workdir, out, "float32")
  shutil.rmtree(tmp_path / "out.partial")
  convert.export_workdir(workdir, out, "float32")
  np.testing.assert_array_equal(load_file(out / loading.WEIGHTS)[EMBED], tensors[EMBED])


def test_missing_chunk_is_not_zeros(tmp_path):
  write(tmp_path, SMALL, TENSORS)
  convert.import_folder(tmp_path, tmp_path / "run", DEFAULTS)
  state = tmp_path / "run/checkpoints/0/state"
  [chunk] = [path for path in (state / "params.embed").iterdir() if path.name[0] != "."]
  chunk.unlink()
  with pytest.raises(ValueError, match=r"params\.embed"):
    convert.export_workdir(tmp_path / "run", tmp_path / "out")
  with pytest.raises(ValueError, match=r"params\.embed"):
    list(_compare(tmp_path, tmp_path / "run"))
  (state / "_METADATA").unlink()
  with pytest.raises(ValueError, match=r"state/_METADATA must be orbax's metadata"):
    verify.open_source(tmp_path / "run")


def test_fp8_export_of_nan_names_the_tensor(tmp_path):
  name = "model.layers.1.self_attn.o_proj.weight"
  broken = TENSORS[name].copy()
  broken[1, 2] = np.nan
  write(tmp_path, SMALL, TENSORS | {name: broken})
  convert.import_folder(tmp_path, tmp_path / "run", DEFAULTS)
  with pytest.raises(ValueError, match=rf"{name} must be finite to become FP8"):
    convert.export_workdir(tmp_path / "run", tmp_path / "out", "fp8")


@pytest.mark.parametrize(
  ("file", "content", "message"),
  [
    ("tokenizer.json", "{", r"readable tokenizer\.json, got .*tokenizer\.json"),
    ("generation_config.json", "[]", r"generation_config\.json must hold a JSON object"),
  ],
)
def test_bad_text_files_are_found_before_the_work(tmp_path, file, content, message):
  config = small_config(**runs.TWO_LAYERS)
  save_run(tmp_path / "run", config)
  (tmp_path / "run/data").mkdir()
  (tmp_path / "run/data" / file).write_text(content)
  with pytest.raises(ValueError, match=message):
    convert.export_workdir(tmp_path / "run", tmp_path / "out")
  assert not list(tmp_path.glob("out*"))
  if file == "generation_config.json":
    write(tmp_path, SMALL, TENSORS)
    (tmp_path / file).write_text(content)
    with pytest.raises(ValueError, match=message):
      convert.import_folder(tmp_path, tmp_path / "imported", DEFAULTS)
    assert not list(tmp_path.glob("imported*"))


def test_unknown_end_of_text_is_left_out(tmp_path):
  config = small_config(**{"model.vocab_size": 300})
  save_run(tmp_path / "run", config)
  (tmp_path / "run/data").mkdir()
  text = tokenizer_lib.train_tokenizer(["some text"], 300).to_str()
  (tmp_path / "run/data/tokenizer.json").write_text(text.replace("<|endoftext|>", "<|fin|>"))
  convert.export_workdir(tmp_path / "run", tmp_path / "out")
  assert "eos_token_id" not in json.loads((tmp_path / "out/config.json").read_text())
  assert "eos_token" not in json.loads((tmp_path / "out/tokenizer_config.json").read_text())


# Converts as the script does, but slowly, and notes every tensor at once; the 31st is never done.
SLOW = """
import itertools, sys, time
from dsmoe import config as config_lib
from dsmoe.huggingface import convert, loading, staging
from experiments import base
staging.SYNC_SECS = 0
number = itertools.count(1)

def slowly(method):
  def convert_one(*args):
    time.sleep(0.02 if next(number) <= 30 else 600)
    return method(*args)
  return convert_one

loading.Slot.to_ours, loading.Slot.to_hf = slowly(loading.Slot.to_ours), slowly(loading.Slot.to_hf)
what, source, target = sys.argv[1:]
if what == "import":
  convert.import_folder(source, target, config_lib.from_config_dict(base.get_config()))
else:
  convert.export_workdir(source, target, "fp8", max_shard_bytes=3000)
"""


@pytest.mark.slow
@pytest.mark.parametrize("what", ["import", "export"])
def test_killed_conversion_goes_on(tmp_path, what, monkeypatch):
  (tmp_path / "hf").mkdir()
  write_shards(tmp_path / "hf", SMALL, bfloat16_tensors())
  convert.import_folder(tmp_path / "hf", tmp_path / "run", DEFAULTS)
  source, target = tmp_path / ("hf" if what == "import" else "run"), tmp_path / "target"
  journal = tmp_path / "target.partial" / staging.JOURNAL

  def lines():
    return journal.read_text().count("\n") if journal.exists() else 0

  process = runs.start("-c", SLOW, what, source, target)
  assert runs.wait_for(lambda: lines() > 12, process), runs.finish(process)
  os.kill(process.pid, signal.SIGKILL)
  assert runs.finish(process)[0] == -signal.SIGKILL
  assert not target.exists()
  done = set(journal.read_text().split("\n")[1:-1])
  assert len(done) > 10

  made = []
  for name in ("to_ours", "to_hf"):
    method = getattr(loading.Slot, name)
    monkeypatch.setattr(
      loading.Slot, name, lambda slot, x, method=method: (made.append(slot), method(slot, x))[1]
    )
  if what == "import":
    convert.import_folder(source, target, DEFAULTS)
    runs.assert_bitwise_equal(
      runs.checkpoint_arrays(target, 0), runs.checkpoint_arrays(tmp_path / "run", 0)
    )
    assert len(made) == len(TENSORS) - len(done)
  else:
    convert.export_workdir(source, target, "fp8", max_shard_bytes=3000)
    assert len(made) == len(TENSORS) + 4 - len(done)  # 4 copies
    convert.export_workdir(source, tmp_path / "whole", "fp8", max_shard_bytes=3000)
    for path in (tmp_path / "whole").iterdir():
      assert (target / path.name).read_bytes() == path.read_bytes()
  assert not list(tmp_path.glob("*.partial*"))


PEAK = r"""
import re, sys
from dsmoe import config as config_lib
from dsmoe.huggingface import convert
from experiments import base
# Not resource.getrusage, whose peak is inherited from the process that started this one.
peak = lambda: int(re.search(r"VmHWM:\s+(\d+) kB", open("/proc/self/status").read())[1]) // 1024
before, (what, source, target) = peak(), sys.argv[1:]
if what == "import":
  defaults = config_lib.from_config_dict(base.get_config())
  convert.import_folder(source, target, defaults, dtype="float32")
else:
  convert.export_workdir(source, target, what, max_shard_bytes=30_000_000)
print(peak() - before)
"""


@pytest.mark.slow
def test_memory_stays_far_below_the_checkpoint(tmp_path):
  """200 MB of float32 pass through; a stacked leaf alone has 67 MB, the largest tensor 16 MB."""
  hf_config = SMALL | {"hidden_size": 256, "vocab_size": 1 << 15, "intermediate_size": 512}
  hf_config |= {"moe_intermediate_size": 512, "n_routed_experts": 64, "num_nextn_predict_layers": 0}
  hf_config |= {"num_hidden_layers": 3, "first_k_dense_replace": 1}
  (tmp_path / "hf").mkdir()
  (tmp_path / "hf/config.json").write_text(json.dumps(hf_config))
  config = loading.config_from_hf(hf_config)
  slots = loading.layout(*model_lib.shapes_of(config)[1:], config)
  plan = {name: ("BF16", slot.hf_shape) for name, slot in slots.items()}
  for place in files.create_shards(tmp_path / "hf", plan, 20_000_000).values():
    files.write_rows(place, 0, np.full(place.shape, 0.5, ml_dtypes.bfloat16))
  assert max(s.num_bytes for s in files.read_folder(tmp_path / "hf").values()) == 1 << 24
  workdir = tmp_path / "run"
  grown = [int(runs.run_fresh("-c", PEAK, "import", tmp_path / "hf", workdir).split()[-1])]
  state = workdir / "checkpoints/0/state"
  assert sum(path.stat().st_size for path in state.rglob("*")) > 200e6
  for format in ("float32", "fp8"):
    grown.append(int(runs.run_fresh("-c", PEAK, format, workdir, tmp_path / format).split()[-1]))
  assert max(grown) < 130, grown


def changed(folder, tmp_path, name, by):
  """A copy of a golden case with one tensor changed."""
  tensors = load_file(folder / loading.WEIGHTS)
  tensors[name] = tensors[name] * np.float32(by)
  tmp_path.mkdir()
  write(tmp_path, json.loads((folder / "config.json").read_text()), tensors)
  return tmp_path


@pytest.mark.slow
def test_verify_finds_the_layer_that_differs(tmp_path):
  folder = cases.GOLDEN / "v3_mtp"
  convert.import_folder(folder, tmp_path / "run", DEFAULTS, "float32")
  rows = list(_compare(folder, tmp_path / "run"))
  assert {row.difference for row in rows} == {row.alone for row in rows} == {0.0}
  names = [row.name for row in rows]
  layers = [f"layer {i}" for i in range(cases.load(folder).model.config.num_hidden_layers)]
  assert names == [
    *("embedding", *layers, "final norm", "logits", "MTP layer 0", "MTP logits 0"),
  ]

  other = changed(folder, tmp_path / "other", "model.layers.1.self_attn.o_proj.weight", 1.01)
  rows = {row.name: row for row in _compare(folder, other)}
  assert verify.worst(list(rows.values())).name == "layer 1"
  assert rows["layer 0"].difference == 0 < rows["layer 1"].difference
  assert rows["logits"].alone == 0 < rows["logits"].difference
  code, out, err = runs.call(
    "scripts/convert_hf.py", "verify", f"--first={folder}", f"--second={other}"
  )
  assert code == 1 and "Traceback" not in err
  assert re.search(r"layer 1 .* worst", out)
  assert "logits must not differ by more than --tolerance=0.0002" in err
  broken = changed(folder, tmp_path / "nan", "model.norm.weight", np.nan)
  assert verify.exceeds(list(_compare(folder, broken)), 1e9)


def _compare(first, second):
  first, second = verify.open_source(first), verify.open_source(second)
  tokens = np.random.default_rng(0).integers(0, first.config.vocab_size, (2, 11), np.int32)
  return verify.compare(first, second, tokens)


def test_verify_agrees_with_the_model(tmp_path):
  """Its walk is the model's: the logits it compares are those of `model.logits`."""
  folder = cases.GOLDEN / "v2_group_limited"
  tokens = cases.load(folder).io["input_ids"].astype(np.int32)
  source = verify.open_source(folder)
  silent = source._replace(read=lambda name: source.read(name) * (name != HEAD))
  rows = {row.name: row for row in verify.compare(source, silent, tokens)}
  expected = np.abs(np.asarray(model_lib.logits(cases.load(folder).model, tokens))).max()
  assert rows["logits"].difference == rows["logits"].magnitude == pytest.approx(expected, rel=1e-5)
  assert rows["final norm"].difference == 0


def test_verify_needs_one_model(tmp_path):
  (tmp_path / "a").mkdir()
  (tmp_path / "b").mkdir()
  write(tmp_path / "a", SMALL, TENSORS)
  write(tmp_path / "b", SMALL | {"rms_norm_eps": 1e-3}, TENSORS)
  with pytest.raises(ValueError, match=r"of one model: rms_norm_eps is 1e-06 in the first, 0\.001"):
    list(_compare(tmp_path / "a", tmp_path / "b"))


def test_import_without_mtp_layers(tmp_path):
  """Because config.json counts none, or because one does not want them."""
  write(tmp_path, SMALL, TENSORS)
  convert.import_folder(tmp_path, tmp_path / "told", DEFAULTS, no_mtp=True)
  write(tmp_path, SMALL | {"num_nextn_predict_layers": 0}, TENSORS)
  convert.import_folder(tmp_path, tmp_path / "counted", DEFAULTS)
  told, counted = (runs.checkpoint_arrays(tmp_path / name, 0) for name in ("told", "counted"))
  runs.assert_bitwise_equal(told, counted)
  assert not any("mtp" in name for name in told)
  assert checkpoint.load_config(tmp_path / "told").model.num_nextn_predict_layers == 0


@pytest.mark.slow
def test_script_converts_both_ways(tmp_path):
  (tmp_path / "hf").mkdir()
  write_shards(tmp_path / "hf", SMALL, bfloat16_tensors())
  script = "scripts/convert_hf.py"
  args = (f"--folder={tmp_path / 'hf'}", f"--workdir={tmp_path / 'run'}")
  out = runs.run(script, "import", *args)
  assert re.search(r"import: .* of .* GB, .* GB/s, 0 s left", out)
  assert re.search(r"not kept\s+4\b", out) and "not kept, copy: 4" in out
  other = (args[0], f"--workdir={tmp_path / 'main'}", "--no_mtp")
  code, out, err = runs.call(script, "import", *other)
  assert code == 0 and "not kept, MTP: " in out
  assert [line for line in err.splitlines() if "are left out: layers [3, 4]" in line]
  code, _, err = runs.call(script, "import", *args)
  assert code == 2 and err.startswith("error: the destination must not exist, ")
  args = (f"--folder={tmp_path / 'out'}", f"--workdir={tmp_path / 'run'}")
  out = runs.run(script, "export", *args, "--max_shard_bytes=5000")
  assert "step 0 of" in out
  assert stored_bytes(tmp_path / "out") == stored_bytes(tmp_path / "hf")
  for wrong, message in (
    (("nope",), "one of import, export, verify must be given"),
    (("import",), "--folder must be given, and not empty"),
    (("export", "--dtype=float32"), "--dtype must not be given with export, which reads --"),
    (("verify", f"--first={tmp_path}", "--second=/"), f"{tmp_path} must hold config"),
    (("verify", "--first=a", "--second=b", "--tolerance=inf"), "at least 0 and finite, got inf"),
    (("export", "--no_mtp"), "--no_mtp must not be given with export"),
  ):
    code, out, err = runs.call(script, *wrong)
    assert (code, out) == (2, "")
    [line] = [line for line in err.splitlines() if line.startswith("error: ")]
    assert message in line and "Traceback" not in err
