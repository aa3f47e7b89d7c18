"""The comparison with other code: what is run, shown and left out, and what llama.cpp is given."""

import importlib.util
import json
import subprocess
import sys
import types

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests import runs

GOLDEN = runs.ROOT / "tests/golden/cases/v3_negative_bias"
PEERS = runs.ROOT / "scripts/peers"
# Stands for every interpreter: fails where told to, otherwise prints figures.
INTERPRETER = """#!/bin/sh
case "$*" in
  *"{fails}"*) echo "wrong logits" >&2; exit 1 ;;
  *"{checks}"*) {python} "$@" --only_check_args || exit 3 ;;
esac
echo '{{'
echo '"runs": [{{"prefill_tokens_per_sec": {prefill}, "decode_tokens_per_sec": {decode},'
echo '"tokens_per_sec": {train}, "warm_up_secs": 1}}]}}'
"""


@pytest.fixture
def interpreter(tmp_path):
  """Makes an interpreter of which a run takes no time; `checks`: whose flags are really parsed."""

  def make(name, speeds, fails="NOTHING", checks="NOTHING"):
    path = tmp_path / name
    figures = dict(zip(("train", "decode", "prefill"), speeds, strict=True))
    path.write_text(
      INTERPRETER.format(python=sys.executable, fails=fails, checks=checks, **figures)
    )
    path.chmod(0o755)
    return path

  return make


def bench_peers(*args) -> tuple[str, dict]:
  """Returns what is printed for a reader, and the JSON."""
  code, out, err = runs.call("scripts/bench_peers.py", "--rounds=1", "--json=-", *args)
  assert code == 0, err
  return err, json.loads(out)


@pytest.mark.slow
def test_training_is_compared_in_turns(interpreter):
  ours = interpreter("ours", (300, 0, 0), checks="bench_train")
  peer = interpreter("peer", (200, 0, 0))
  shown, values = bench_peers(f"--ours_python={ours}", f"--peer_python={peer}")
  [case] = values["cases"]
  assert case["ratios"] == {"transformers": [1.5], "transformers-compiled": [1.5]}
  assert len(case["runs"]["ours"]) == 2 and list(values["absent"]) == ["maxtext"]
  assert "│ transformers-compiled │ 200 " in shown


@pytest.mark.slow
def test_decoding_has_three_cases_and_llama_cpp(interpreter):
  ours = interpreter("ours", (0, 300, 500), checks="--batches=8 --prompt_tokens=64")
  peer = interpreter("peer", (0, 200, 400))
  pythons = [f"--{name}_python={peer}" for name in ("peer", "llama")]
  shown, values = bench_peers("--work=decode", f"--ours_python={ours}", *pythons)
  assert values["absent"] == {}
  for case, ratio in zip(values["cases"], (1.5, 1.5, 1.25), strict=True):
    assert case["ratios"] == {"transformers-compiled": [ratio], "llama.cpp": [ratio]}
  for text in ("decode, batch 1,", "decode, batch 8,", "prefill of 8 x 512", "llama.cpp"):
    assert text in shown


@pytest.mark.parametrize(
  "fails, reason",
  [
    ("-c", "pip install llama-cpp-python gguf safetensors into a virtual environment"),
    ("gguf_write", "gguf_write ended with 1: wrong logits"),
    ("llama_cpp_decode", "llama.cpp ended with 1: wrong logits"),
  ],
)
def test_llama_cpp_may_be_absent(interpreter, fails, reason):
  ours = interpreter("ours", (0, 300, 500))
  llama = interpreter("llama", (0, 200, 400), fails)
  args = (f"--ours_python={ours}", f"--peer_python={ours}", f"--llama_python={llama}")
  shown, values = bench_peers("--work=decode", *args)
  assert list(values["absent"]) == ["llama.cpp"]
  assert values["absent"]["llama.cpp"].startswith(reason)
  assert f"llama.cpp is absent: {reason}" in shown
  for case in values["cases"]:
    assert case["ratios"] == {"transformers-compiled": [1], "llama.cpp": []}


def test_without_transformers_llama_cpp_has_no_weights(interpreter):
  ours = interpreter("ours", (0, 300, 500))
  args = (f"--ours_python={ours}", f"--llama_python={ours}", "--peer_python=/nowhere")
  _, values = bench_peers("--work=decode", *args)
  assert set(values["absent"]) == {"transformers-compiled", "llama.cpp"}
  assert values["absent"]["llama.cpp"] == "transformers, which makes its weights, is absent."
  assert [len(case["runs"]["ours"]) for case in values["cases"]] == [1, 1, 1]


class Recorder:
  """Stands for gguf.GGUFWriter: keeps what is added."""

  def __init__(self, path, arch):
    self.values, self.tensors = {"arch": arch}, {}

  def __getattr__(self, name):
    key = name.removeprefix("add_")
    return lambda *value: self.values.__setitem__(key, value[0] if value else None)

  def add_tensor(self, name, array):
    self.tensors[name] = array


def load(name):
  """Returns a program of scripts/peers as a module."""
  spec = importlib.util.spec_from_file_location(name, PEERS / f"{name}.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.fixture
def gguf_write(monkeypatch):
  """The program that writes GGUF files, with a recorder in place of the package gguf."""
  enums = {"LlamaFileType": types.SimpleNamespace(ALL_F32=0)}
  enums["ExpertGatingFuncType"] = types.SimpleNamespace(SIGMOID="sigmoid")
  fake = types.SimpleNamespace(GGUFWriter=Recorder, **enums)
  monkeypatch.setitem(sys.modules, "gguf", fake)
  return load("gguf_write")


def golden_config(**changes):
  return json.loads((GOLDEN / "config.json").read_text()) | {"rope_parameters": None} | changes


def rms_norm(x, weight, eps):
  return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def swiglu(x, gate, up, down):
  inner = x @ gate.T
  return (inner / (1 + np.exp(-inner)) * (x @ up.T)) @ down.T


def rotate_neighbours(x_SHR, base):
  """Rotates dimensions (0, 1), (2, 3), ... of the token at each position."""
  S, _, R = x_SHR.shape
  angle_SR = np.arange(S)[:, None] * base ** (-np.arange(0, R, 2) / R)
  turned = (x_SHR[..., 0::2] + 1j * x_SHR[..., 1::2]) * np.exp(1j * angle_SR)[:, None, :]
  return np.stack([turned.real, turned.imag], axis=-1).reshape(x_SHR.shape)


def experts_of(x, m, t):
  """One token's routed experts: limited to groups, then the likeliest, gates without the bias."""
  score_E = 1 / (1 + np.exp(-(t["ffn_gate_inp.weight"] @ x)))
  biased_E = score_E + t["exp_probs_b.bias"]
  groups = biased_E.reshape(m["expert_group_count"], -1)
  best = np.argsort(-np.sort(groups, axis=1)[:, -2:].sum(axis=1))[: m["expert_group_used_count"]]
  for group in set(range(len(groups))) - set(best):
    groups[group] = -np.inf  # a view of biased_E
  chosen = np.argsort(-biased_E)[: m["expert_used_count"]]
  gate = score_E[chosen] * m["expert_weights_scale"]
  if m["expert_weights_norm"]:
    gate /= score_E[chosen].sum()
  weights = [t[f"ffn_{name}_exps.weight"] for name in ("gate", "up", "down")]
  return sum(g * swiglu(x, *(w[e] for w in weights)) for g, e in zip(gate, chosen))


def deepseek2_logits(m, tensors, tokens):
  """What llama.cpp computes from a GGUF file of its architecture deepseek2, in NumPy."""
  assert m["arch"] == "deepseek2" and m["expert_gating_func"] == "sigmoid"
  H, C, R = m["head_count"], m["kv_lora_rank"], m["rope_dimension_count"]
  N, S, eps = m["key_length_mla"] - R, len(tokens), m["layer_norm_rms_eps"]
  assert (m["head_count_kv"], m["key_length"], m["value_length"]) == (1, C + R, C)
  x_SD = tensors["token_embd.weight"][tokens].astype(np.float64)
  for n in range(m["block_count"]):
    prefix = f"blk.{n}."
    t = {k.removeprefix(prefix): w for k, w in tensors.items() if k.startswith(prefix)}
    y = rms_norm(x_SD, t["attn_norm.weight"], eps)
    q_SQ = rms_norm(y @ t["attn_q_a.weight"].T, t["attn_q_a_norm.weight"], eps)
    q_SHX = (q_SQ @ t["attn_q_b.weight"].T).reshape(S, H, N + R)
    kv_SX = y @ t["attn_kv_a_mqa.weight"].T
    latent_SC = rms_norm(kv_SX[:, :C], t["attn_kv_a_norm.weight"], eps)
    k_rope_SR = rotate_neighbours(kv_SX[:, None, C:], m["rope_freq_base"])[:, 0]
    q_latent_SHC = np.einsum("shn,hcn->shc", q_SHX[..., :N], t["attn_k_b.weight"])
    q_rope_SHR = rotate_neighbours(q_SHX[..., N:], m["rope_freq_base"])
    score_HST = np.einsum("shc,tc->hst", q_latent_SHC, latent_SC)
    score_HST += np.einsum("shr,tr->hst", q_rope_SHR, k_rope_SR)
    score_HST = np.where(np.tri(S, dtype=bool), score_HST / np.sqrt(N + R), -np.inf)
    p_HST = np.exp(score_HST - score_HST.max(axis=-1, keepdims=True))
    p_HST /= p_HST.sum(axis=-1, keepdims=True)
    out_SHU = np.einsum("hst,tc,huc->shu", p_HST, latent_SC, t["attn_v_b.weight"])
    x_SD = x_SD + out_SHU.reshape(S, H * m["value_length_mla"]) @ t["attn_output.weight"].T
    y = rms_norm(x_SD, t["ffn_norm.weight"], eps)
    kind = "" if n < m["leading_dense_block_count"] else "_shexp"
    x_SD = x_SD + swiglu(y, *(t[f"ffn_{part}{kind}.weight"] for part in ("gate", "up", "down")))
    if kind:
      x_SD = x_SD + np.stack([experts_of(row, m, t) for row in y])
  return rms_norm(x_SD, tensors["output_norm.weight"], eps) @ tensors["output.weight"].T


def test_gguf_computes_hugging_faces_logits(gguf_write):
  config = golden_config()
  weights = load_file(GOLDEN / "model.safetensors")
  writer = Recorder(None, "deepseek2")
  gguf_write.add_metadata(writer, config)
  tensors = gguf_write.tensors(config, weights)
  assert not weights
  golden = load_file(GOLDEN / "io.safetensors")
  for tokens, logits in zip(golden["input_ids"], golden["logits"], strict=True):
    found = deepseek2_logits(writer.values, tensors, tokens)
    np.testing.assert_allclose(found, logits, rtol=0, atol=2e-4)


@pytest.mark.parametrize(
  "changes, message",
  [
    (
      {"rope_parameters": {"rope_type": "yarn", "factor": 4}},
      "rope_type 'default' only, got 'yarn",
    ),
    ({"rope_interleave": False}, "rope_interleave True only, got False"),
    ({"scoring_func": "softmax"}, "scoring_func 'sigmoid' only, got 'softmax'"),
  ],
)
def test_gguf_refuses_what_it_does_not_describe(gguf_write, changes, message):
  with pytest.raises(ValueError, match=message):
    gguf_write.add_metadata(Recorder(None, "deepseek2"), golden_config(**changes))


def test_gguf_has_a_place_for_every_tensor(gguf_write, tmp_path, monkeypatch):
  (tmp_path / "config.json").write_text(json.dumps(golden_config()))
  weights = load_file(GOLDEN / "model.safetensors") | {"model.more.weight": np.ones(1, np.float32)}
  save_file(weights, tmp_path / "model.safetensors")
  args = ["gguf_write", f"--folder={tmp_path}", f"--out={tmp_path}/model.gguf"]
  monkeypatch.setattr(sys, "argv", args)
  with pytest.raises(ValueError, match=r"a place in the GGUF file, got \['model.more.weight'\]"):
    gguf_write.main()


class FakeDecoder:
  """Stands for llama.cpp's: returns the expected logits, of the right row and place, and `error`."""

  def __init__(self, rows, expected, error):
    self.shape, self.expected, self.error = (rows, 5), expected, error

  def reset(self):
    self.num_tokens = 0

  def next_logits(self, tokens_BS):
    self.num_tokens += tokens_BS.shape[1]
    rows = np.arange(len(tokens_BS)) % 2
    seen = self.expected["tokens"][rows, self.num_tokens - tokens_BS.shape[1] : self.num_tokens]
    np.testing.assert_array_equal(tokens_BS, seen)
    return self.expected["logits"][rows, self.num_tokens - 1] + self.error


@pytest.mark.parametrize("rows, error", [(1, 0), (3, 1e-4), (2, 3e-4), (2, np.nan)])
def test_other_logits_are_not_timed(monkeypatch, rows, error):
  monkeypatch.setitem(sys.modules, "llama_cpp", types.SimpleNamespace())
  decode = load("llama_cpp_decode")
  rng = np.random.default_rng(0)
  expected = {"tokens": rng.integers(0, 5, (2, 7)), "logits": rng.normal(size=(2, 7, 5))}
  decoder = FakeDecoder(rows, expected, error)
  if error in (0, 1e-4):
    assert decode.check(decoder, expected) == pytest.approx(error)
    assert decoder.num_tokens == 7
  else:
    with pytest.raises(RuntimeError, match=r"must be within 0.0002 of the expected ones, got"):
      decode.check(decoder, expected)


def test_llama_cpp_computes_hugging_faces_logits(tmp_path):
  for package in ("llama_cpp", "gguf"):
    pytest.importorskip(package, reason="needs llama.cpp: pip install llama-cpp-python gguf")
  (tmp_path / "config.json").write_text(json.dumps(golden_config()))
  (tmp_path / "model.safetensors").symlink_to(GOLDEN / "model.safetensors")
  golden = load_file(GOLDEN / "io.safetensors")
  expected = {"tokens": golden["input_ids"], "logits": golden["logits"]}
  save_file(expected, tmp_path / "expected.safetensors")
  model = tmp_path / "model.gguf"
  runs.run(PEERS / "gguf_write.py", f"--folder={tmp_path}", f"--out={model}")
  args = (f"--model={model}", f"--expected={tmp_path}/expected.safetensors", "--batch=3")
  out = runs.run(PEERS / "llama_cpp_decode.py", *args, "--prompt_tokens=5", "--new_tokens=4")
  assert json.loads(out)["largest_logit_difference"] < 2e-4


@pytest.mark.parity
def test_saved_model_computes_the_saved_logits(tmp_path):
  """The same weights, read back by Hugging Face's own loader."""
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  config = {k: v for k, v in golden_config().items() if k != "rope_parameters"}
  command = [sys.executable, "scripts/peers/transformers_save.py", f"--folder={tmp_path}"]
  command += [f"--config={json.dumps(config)}", "--batch=2", "--tokens=7"]
  subprocess.run(command, cwd=runs.ROOT, check=True)
  expected = load_file(tmp_path / "expected.safetensors")
  assert expected["logits"].shape == (2, 7, 256) and len(np.unique(expected["tokens"][:, 0])) == 2
  model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
  with torch.inference_mode():
    logits = model(torch.from_numpy(expected["tokens"]).long()).logits.numpy()
  np.testing.assert_allclose(logits, expected["logits"], rtol=0, atol=1e-5)
  weights = load_file(tmp_path / "model.safetensors")
  for name, value in weights.items():
    if name.endswith(("norm.weight", "correction_bias")):
      assert np.std(value) > 0.005, name
