"""Hugging Face's own code beside ours, on weights drawn anew each run.

DSMOE_PARITY_SEED repeats a run; every failure names its seed.
"""

import dataclasses
import json
import os
import random

import numpy as np
import pytest

from dsmoe import config as config_lib
from dsmoe import model as model_lib
from dsmoe.huggingface import convert, files, loading
from experiments import base
from tests.helpers import TOLERANCE, assert_close
from tests.huggingface import cases

torch = pytest.importorskip("torch", reason="needs the parity extra: torch and transformers")
transformers = pytest.importorskip("transformers", reason="needs the parity extra: transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")

pytestmark = pytest.mark.parity

torch.set_num_threads(1)  # tiny arrays: threads only wait for each other
MARGIN = 2e-4  # between the last expert or group chosen and the first left out
MTP_WEIGHT = 0.3

V3 = {
  **{"vocab_size": 58, "hidden_size": 36, "num_hidden_layers": 3, "first_k_dense_replace": 1},
  **{"intermediate_size": 50, "num_attention_heads": 3, "num_key_value_heads": 3},
  **{"q_lora_rank": 22, "kv_lora_rank": 14, "qk_nope_head_dim": 10, "qk_rope_head_dim": 8},
  **{"v_head_dim": 12, "n_routed_experts": 16, "n_shared_experts": 2, "num_experts_per_tok": 5},
  **{"moe_intermediate_size": 18, "n_group": 4, "topk_group": 2, "max_position_embeddings": 512},
  **{"initializer_range": 0.2, "num_nextn_predict_layers": 0},
}
ONE_GROUP = {"n_group": 1, "topk_group": 1}
YARN = {
  **{"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "beta_fast": 8, "beta_slow": 1},
  **{"original_max_position_embeddings": 128, "mscale": 1.0, "mscale_all_dim": 1.0},
}
KIMI_YARN = YARN | {"factor": 32.0, "beta_fast": 1.0, "rope_theta": 50000.0}
V2 = {name: value for name, value in V3.items() if name != "num_nextn_predict_layers"}
LIMITED = {"topk_method": "group_limited_greedy", "routed_scaling_factor": 4.0}

# Class, fields of its config, mean of the router's bias.
CONFIGS = {
  "v3": ("V3", {}, 0.0),
  "v3_negative_bias": ("V3", {}, -2.0),
  "v3_yarn": ("V3", {"rope_parameters": YARN}, 0.0),
  "v3_yarn_mscale_unequal": ("V3", {"rope_parameters": YARN | {"mscale_all_dim": 0.5}}, 0.0),
  "v3_no_q_lora": ("V3", {"q_lora_rank": None}, 0.0),
  "v3_tied": ("V3", {"tie_word_embeddings": True}, 0.0),
  "v3_norm_topk_false": ("V3", {"norm_topk_prob": False}, 0.0),
  "v3_attention_bias": ("V3", {"attention_bias": True}, 0.0),
  "v3_rope_not_interleaved": ("V3", {"rope_interleave": False}, 0.0),
  "v3_large_eps": ("V3", {"rms_norm_eps": 1e-2}, 0.0),
  "kimi": ("V3", ONE_GROUP | {"rope_parameters": KIMI_YARN, "n_shared_experts": 1}, 0.0),
  "moonlight": ("V3", ONE_GROUP | {"q_lora_rank": None, "rms_norm_eps": 1e-5}, 0.0),
  "v2_lite": (
    "V2",
    ONE_GROUP | {"topk_method": "greedy", "q_lora_rank": None, "rope_parameters": YARN},
    0.0,
  ),
  "v2_group_limited": ("V2", LIMITED, 0.0),
}


def first_seed() -> int:
  return int(os.environ.get("DSMOE_PARITY_SEED", random.SystemRandom().randrange(10**6)))


def build(kind: str, fields: dict, seed: int):
  """A model of transformers with random weights; norms and biases are random too."""
  torch.manual_seed(seed)
  base = V3 if kind == "V3" else V2
  config = getattr(transformers, f"Deepseek{kind}Config")(**(base | fields))
  model = getattr(transformers, f"Deepseek{kind}ForCausalLM")(config).train()
  model.set_attn_implementation("eager")
  model.set_experts_implementation("eager")
  return model


@torch.no_grad()
def randomise(module, bias_mean: float, std: float | None = None):
  """Draws what initialises to a constant; with `std`, everything else too."""
  for name, parameter in module.named_parameters():
    if name.endswith(("norm.weight", "layernorm.weight")):
      parameter.copy_(1 + 0.2 * torch.randn_like(parameter))
    elif name.endswith(".bias"):
      parameter.copy_(0.2 * torch.randn_like(parameter))
    elif std is not None:
      parameter.copy_(std * torch.randn_like(parameter))
  for name, buffer in module.named_buffers():
    if name.endswith("e_score_correction_bias"):
      buffer.copy_(bias_mean + 0.3 * torch.randn_like(buffer))


@dataclasses.dataclass
class Watch:
  """Records each router's choice, and the least margin by which a choice was made."""

  indices: list = dataclasses.field(default_factory=list)
  margin: float = float("inf")

  def __call__(self, router, inputs, output):
    logits, _, indices = output
    self.indices.append(np.sort(indices.numpy(), axis=-1))
    scores = logits.detach().double()
    is_v3 = hasattr(router, "e_score_correction_bias")
    scores = scores.sigmoid() + router.e_score_correction_bias if is_v3 else scores.softmax(-1)
    groups = router.num_group or 1
    if groups > 1:
      grouped = scores.reshape(len(scores), groups, -1)
      rank = grouped.topk(2)[0].sum(-1) if is_v3 else grouped.max(-1).values
      kept = rank.topk(router.topk_group + 1)[0]
      self.margin = min(self.margin, float((kept[:, -2] - kept[:, -1]).min()))
      keep = rank >= kept[:, -2:-1]
      scores = grouped.masked_fill(~keep[..., None], -float("inf")).reshape(scores.shape)
    top = scores.topk(router.top_k + 1)[0]
    self.margin = min(self.margin, float((top[:, -2] - top[:, -1]).min()))

  def on(self, *modules):
    for module in modules:
      for part in module.modules():
        if type(part).__name__.endswith("TopkRouter"):
          part.register_forward_hook(self)
    return self


def split_experts(name: str, tensor):
  """Yields a fused tensor of transformers as published ones; others as they are."""
  if not name.endswith((".experts.gate_up_proj", ".experts.down_proj")):
    yield name, tensor
    return
  parts = ("gate_proj", "up_proj") if name.endswith("gate_up_proj") else ("down_proj",)
  for e, fused in enumerate(tensor):
    for part, piece in zip(parts, fused.chunk(len(parts))):
      yield f"{name.rpartition('.')[0]}.{e}.{part}.weight", piece.clone()


def mtp_name(name: str, num_layers: int) -> str:
  """Turns MtpModel's name of a tensor into the published one."""
  _, k, rest = name.split(".", 2)
  rest = rest.replace("mtp_block.", "").replace("post_norm.", "shared_head.norm.")
  return f"model.layers.{num_layers + int(k)}.{rest}"


def assert_gradients(grads, model, expected: dict):
  """Every parameter's gradient, under published names."""
  ours = cases.published(grads, model)
  assert set(ours) == set(expected)
  for name, gradient in expected.items():
    try:
      assert_close(ours[name], gradient, "gradient_float32")
    except AssertionError as error:
      raise AssertionError(f"gradient of {name}: {error}") from error


def assert_logits(actual, expected):
  error = np.abs(np.asarray(actual) - expected.detach().numpy()).max()
  assert error <= TOLERANCE["model_float32"], f"absolute error {error:.2e} on logits"


def random_tokens(shape):
  """Random ids, and labels that leave some of them out."""
  tokens = torch.randint(0, V3["vocab_size"], shape)
  return tokens, torch.where(torch.rand(shape) < 0.8, tokens, -100)


@pytest.mark.parametrize("name", CONFIGS)
def test_causal_lm(name, tmp_path):
  kind, fields, bias_mean = CONFIGS[name]
  seed = first_seed()
  for attempt in range(50):
    theirs = build(kind, fields, seed + attempt)
    randomise(theirs, bias_mean)
    watch = Watch().on(theirs)
    tokens, labels = random_tokens((2, 21))
    output = theirs(tokens, labels=labels)
    if watch.margin >= MARGIN:
      break
  assert watch.margin >= MARGIN, f"50 seeds from {seed}: routing too close to a tie"
  output.loss.backward()
  theirs.save_pretrained(tmp_path)

  where = f"{name}, DSMOE_PARITY_SEED={seed + attempt}"
  try:
    ours = loading.load_pretrained(tmp_path)
    batch = cases.make_batch(tokens.numpy(), labels.numpy())
    seen = cases.walk(ours, batch)
    layers = range(ours.config.first_k_dense_replace, ours.config.num_hidden_layers)
    assert len(watch.indices) == len(layers)
    for layer, indices in zip(layers, watch.indices):
      np.testing.assert_array_equal(seen[f"router.layer{layer}.topk_indices_sorted"], indices)
    grads, outcome = cases.loss_and_grads(ours, batch)
    assert_logits(outcome.logits, output.logits)
    assert_close(outcome.loss, output.loss.item(), "model_float32")
    expected = {
      published: gradient.numpy()
      for parameter, value in theirs.named_parameters()
      for published, gradient in split_experts(parameter, value.grad)
    }
    assert_gradients(grads, ours, expected)
  except AssertionError as error:
    raise AssertionError(f"{where}: {error}") from error


@pytest.mark.parametrize("rope", [{}, {"rope_parameters": YARN}], ids=["plain", "yarn"])
def test_multi_token_prediction_of_depth_two(rope, tmp_path):
  """Against transformers' MtpModel; its own loss cannot run, so ours is written out."""
  from transformers.modeling_layers import MtpModel

  depth, seed = 2, first_seed()
  for attempt in range(50):
    theirs = build("V3", rope | {"num_nextn_predict_layers": depth}, seed + attempt)
    heads = MtpModel(theirs, depth).train()
    randomise(theirs, 0.0)
    randomise(heads, 0.0, std=0.2)  # MtpModel leaves its experts uninitialised
    # The embedding and head are the main model's own, in both.
    watch = Watch().on(theirs, heads.layers)
    tokens, _ = random_tokens((2, 17))
    output = theirs(tokens, labels=tokens)
    hidden = theirs.model(tokens).last_hidden_state
    logits, losses = [], []
    for k in range(depth):
      ids = tokens[:, k + 1 :]
      positions = torch.arange(ids.shape[1])[None]
      hidden = heads.forward_layer(k, hidden[:, : ids.shape[1]], positions, None, input_ids=ids)
      logits.append(theirs.lm_head(hidden))
      # Position i of depth k has seen token i + k + 1 and predicts the one after.
      losses.append(
        torch.nn.functional.cross_entropy(
          logits[k][:, :-1].flatten(0, 1), tokens[:, k + 2 :].flatten()
        )
      )
    if watch.margin >= MARGIN:
      break
  assert watch.margin >= MARGIN, f"50 seeds from {seed}: routing too close to a tie"
  (output.loss + MTP_WEIGHT * sum(losses) / depth).backward()

  def published(module, values):
    num_layers = theirs.config.num_hidden_layers
    rename = (lambda name: name) if module is theirs else (lambda name: mtp_name(name, num_layers))
    return {
      rename(split): part.numpy()
      for name, value in values
      if module is theirs or name.startswith("layers.")
      for split, part in split_experts(name, value.detach())
    }

  def grads_of(module):
    return ((name, value.grad) for name, value in module.named_parameters())

  theirs.save_pretrained(tmp_path)
  main = safetensors_torch.load_file(tmp_path / loading.WEIGHTS)
  extra = published(heads, heads.state_dict().items())
  extra = {name: torch.from_numpy(value) for name, value in extra.items()}
  safetensors_torch.save_file(main | extra, tmp_path / loading.WEIGHTS)
  try:
    ours = loading.load_pretrained(tmp_path)
    assert ours.config.num_nextn_predict_layers == depth
    batch = cases.make_batch(tokens.numpy())
    grads, outcome = cases.loss_and_grads(ours, batch, MTP_WEIGHT)
    assert_close(outcome.loss, output.loss.item(), "model_float32")
    for k in range(depth):
      assert_logits(outcome.mtp_logits[k][:, : logits[k].shape[1]], logits[k])
      assert_close(outcome.mtp_losses[k], losses[k].item(), "model_float32")
    expected = published(theirs, grads_of(theirs)) | published(heads, grads_of(heads))
    assert_gradients(grads, ours, expected)
  except AssertionError as error:
    raise AssertionError(f"DSMOE_PARITY_SEED={seed + attempt}: {error}") from error


DEFAULTS = config_lib.from_config_dict(base.get_config())


def load_exported(folder):
  """Reads a folder with transformers; nothing may be missing or left over."""
  kind = files.read_json(folder / "config.json")["architectures"][0]
  model, info = getattr(transformers, kind).from_pretrained(
    folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
  )
  model.set_experts_implementation("eager")
  assert not any(info.values()), info
  return model.eval()


@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_loads_what_we_export(name, tmp_path):
  kind, fields, bias_mean = CONFIGS[name]
  theirs = build(kind, fields, first_seed())
  randomise(theirs, bias_mean)
  theirs.save_pretrained(tmp_path / "hf")
  convert.import_folder(tmp_path / "hf", tmp_path / "run", DEFAULTS)
  convert.export_workdir(tmp_path / "run", tmp_path / "out", "float32", max_shard_bytes=100_000)
  again = load_exported(tmp_path / "out")
  expected = theirs.state_dict()
  assert set(expected) == set(again.state_dict())
  for parameter, value in again.state_dict().items():
    assert torch.equal(value, expected[parameter]), parameter
  tokens, _ = random_tokens((2, 21))
  with torch.no_grad():
    assert torch.equal(theirs.eval()(tokens).logits, again(tokens).logits)


def scaled_by_torch(folder) -> dict:
  """Reads an FP8 folder with torch: codes times the scale of their block of 128 x 128."""
  tensors = {}
  for file in sorted(folder.glob("*.safetensors")):
    tensors |= safetensors_torch.load_file(file)
  scales = {name: t for name, t in tensors.items() if name.endswith("_scale_inv")}
  result = {name: t.float() for name, t in tensors.items() if name not in scales}
  for name, scale in scales.items():
    weight = name.removesuffix("_scale_inv")
    assert tensors[weight].dtype == torch.float8_e4m3fn
    rows, columns = result[weight].shape
    spread = scale.float().repeat_interleave(128, 0).repeat_interleave(128, 1)
    result[weight] *= spread[:rows, :columns]
  return result


@pytest.mark.parametrize("ue8m0", [False, True])
@pytest.mark.parametrize("kind", ["V3", "V2"])
def test_torch_reads_fp8_that_we_export(kind, ue8m0, tmp_path):
  """Weights bit for bit; logits beside transformers on what torch makes of them.

  transformers' own FP8 reading needs accelerate and whole blocks: here edges are ragged.
  """
  fields = {"hidden_size": 141, "intermediate_size": 260, "initializer_range": 0.1}
  fields |= LIMITED if kind == "V2" else {}
  seed = first_seed()
  for attempt in range(50):
    theirs = build(kind, fields, seed + attempt)
    randomise(theirs, 0.0)
    source, run, out, plain = (tmp_path / f"{x}{attempt}" for x in ("hf", "run", "out", "plain"))
    theirs.save_pretrained(source)
    convert.import_folder(source, run, DEFAULTS)
    convert.export_workdir(run, out, "fp8", ue8m0, max_shard_bytes=100_000)
    scaled = scaled_by_torch(out)
    plain.mkdir()
    safetensors_torch.save_file(scaled, plain / loading.WEIGHTS, {"format": "pt"})
    config = files.read_json(out / "config.json")
    del config["quantization_config"]
    (plain / "config.json").write_text(json.dumps(config))
    again = load_exported(plain)
    watch = Watch().on(again)
    tokens, _ = random_tokens((2, 21))
    with torch.no_grad():
      logits = again(tokens).logits
    if watch.margin >= MARGIN:
      break
  assert watch.margin >= MARGIN, f"50 seeds from {seed}: routing too close to a tie"
  opened = loading.open_pretrained(out)
  assert set(scaled) == set(opened.slots)
  for name, tensor in scaled.items():
    ours = opened.read(name).astype(np.float32)
    np.testing.assert_array_equal(ours, tensor.numpy(), err_msg=f"{name}, seed {seed + attempt}")
  assert_logits(model_lib.logits(loading.load_pretrained(out), tokens.numpy()), logits)
