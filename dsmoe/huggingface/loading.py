"""Loads Hugging Face checkpoints of DeepSeek-V2 and -V3 models into our model.

`BLOCK`, `MTP` and `TOP` are the only table of tensor names; `Slot` converts a tensor either way.

Shapes: L layers of a stack, E routed experts; a part of a leaf keeps the model's own dims.
"""

import pathlib
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx
from jax.sharding import NamedSharding

from dsmoe import model as model_lib
from dsmoe.config import ModelConfig
from dsmoe.huggingface import files, staging
from dsmoe.huggingface.config import config_at, config_from_hf, config_to_hf, fail, fp8_block
from dsmoe.huggingface.files import INDEX, WEIGHTS, TensorFiles
from dsmoe.huggingface.parts import Slot, read_part
from dsmoe.model import parameters

__all__ = ["INDEX", "WEIGHTS", "config_from_hf", "config_to_hf", "layout", "load_pretrained"]

# Published name, our path, and how many of our leading dimensions a Linear sums over: it is
# published as [outputs, inputs], we keep [*inputs, *outputs]. 0: stored as it is.
BLOCK = (
  ("input_layernorm.weight", "attention_norm", 0),
  ("self_attn.q_proj.weight", "attention/q_proj", 1),
  ("self_attn.q_a_proj.weight", "attention/q_a_proj", 1),
  ("self_attn.q_a_proj.bias", "attention/q_a_bias", 0),
  ("self_attn.q_a_layernorm.weight", "attention/q_a_norm", 0),
  ("self_attn.q_b_proj.weight", "attention/q_b_proj", 1),
  ("self_attn.kv_a_proj_with_mqa.weight", "attention/kv_a_proj", 1),
  ("self_attn.kv_a_proj_with_mqa.bias", "attention/kv_a_bias", 0),
  ("self_attn.kv_a_layernorm.weight", "attention/kv_a_norm", 0),
  ("self_attn.kv_b_proj.weight", "attention/kv_b_proj", 1),
  ("self_attn.o_proj.weight", "attention/o_proj", 2),
  ("self_attn.o_proj.bias", "attention/o_bias", 0),
  ("post_attention_layernorm.weight", "mlp_norm", 0),
  ("mlp.gate_proj.weight", "mlp/w_gate", 1),
  ("mlp.up_proj.weight", "mlp/w_up", 1),
  ("mlp.down_proj.weight", "mlp/w_down", 1),
  ("mlp.gate.weight", "mlp/router", 1),
  ("mlp.gate.e_score_correction_bias", "mlp/router_bias", 0),
  ("mlp.experts.{}.gate_proj.weight", "mlp/experts/w_gate", 1),
  ("mlp.experts.{}.up_proj.weight", "mlp/experts/w_up", 1),
  ("mlp.experts.{}.down_proj.weight", "mlp/experts/w_down", 1),
  ("mlp.shared_experts.gate_proj.weight", "mlp/shared/w_gate", 1),
  ("mlp.shared_experts.up_proj.weight", "mlp/shared/w_up", 1),
  ("mlp.shared_experts.down_proj.weight", "mlp/shared/w_down", 1),
)
MTP = (
  ("enorm.weight", "embed_norm", 0),
  ("hnorm.weight", "hidden_norm", 0),
  ("eh_proj.weight", "eh_proj", 1),
  ("shared_head.norm.weight", "norm", 0),
  *((name, f"block/{ours}", inputs) for name, ours, inputs in BLOCK),
)
TOP = (
  ("model.embed_tokens.weight", "embed", 0),
  ("model.norm.weight", "norm", 0),
  ("lm_head.weight", "head", 1),
)
# Rotary frequencies, which follow from config.json; old releases stored them.
IGNORED = re.compile(r"(^|\.)rotary_emb\.inv_freq$")
LAYER = re.compile(r"model\.layers\.(\d+)\.")


def flat(tree) -> dict[tuple[str, ...], Any]:
  """Returns a nested dict's leaves by path."""
  return {tuple(key.key for key in path): x for path, x in jax.tree.leaves_with_path(tree)}


def layout(params: Any, router_bias: Any, config: ModelConfig) -> dict[str, Slot]:
  """Maps the name of every published tensor of this model to its place in ours.

  Args:
    params, router_bias: as `model.split` returns them; arrays or only their shapes.
  """
  leaves = {**flat(params), **flat(router_bias)}
  slots = {name: Slot((o,), (), leaves[o,].shape, n) for name, o, n in TOP if (o,) in leaves}
  num_dense, num_layers = config.first_k_dense_replace, config.num_hidden_layers
  for stack, first, rows in (
    ("dense_layers", 0, BLOCK),
    ("moe_layers", num_dense, BLOCK),
    ("mtp", num_layers, MTP),
  ):
    for name, ours, inputs in rows:
      path = (stack, *ours.split("/"))
      shape = leaves[path].shape if path in leaves else (0,)
      depth = 2 if "{}" in name else 1
      for index in np.ndindex(*shape[:depth]):
        hf_name = f"model.layers.{first + index[0]}." + name.format(*index[1:])
        slots[hf_name] = Slot(path, index, shape[depth:], inputs)
  assert {slot.path for slot in slots.values()} == set(leaves)
  return slots


def copies_of(config: ModelConfig) -> dict[str, str]:
  """Returns the tensors that a file may repeat, each with the tensor it must equal."""
  embed = "model.embed_tokens.weight"
  head = embed if config.tie_word_embeddings else "lm_head.weight"
  copies = {"lm_head.weight": embed} if config.tie_word_embeddings else {}
  for k in range(config.num_nextn_predict_layers):
    layer = f"model.layers.{config.num_hidden_layers + k}"
    copies |= {f"{layer}.embed_tokens.weight": embed, f"{layer}.shared_head.head.weight": head}
  return copies


class Account(NamedTuple):
  """How every tensor of a published checkpoint was used."""

  stored_as_is: list[str]
  transposed: list[str]
  dequantised: list[str]
  not_kept: dict[str, str]  # why, by name: the model has no parameter of its own for it


class Opened(NamedTuple):
  """A published checkpoint: the place of every tensor is known, none is read yet."""

  config: ModelConfig
  weights: TensorFiles
  slots: dict[str, Slot]
  account: Account

  def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
    """Reads rows of a tensor in the published layout; FP8 rows are scaled, in float32."""
    return self.weights.read(name, start, stop)


def open_pretrained(folder: str | pathlib.Path, **fields: Any) -> Opened:
  """Reads config.json and the list of tensors; see `load_pretrained`."""
  path = (folder := pathlib.Path(folder)) / "config.json"
  if not path.exists():
    fail(f"{folder} must hold config.json, it has none")
  hf = files.read_json(path)
  config = config_at(path, hf, **fields)
  weights = TensorFiles(folder, fp8_block(hf))
  numbers = [LAYER.match(name) for name in weights.stored]
  last = max((int(number[1]) for number in numbers if number), default=-1)
  if (
    config.num_nextn_predict_layers
    and last < config.num_hidden_layers
    and "num_nextn_predict_layers" not in fields
  ):
    logging.warning("%s counts MTP layers, but no file has any: loaded without", path)
    config = config_at(path, hf, num_nextn_predict_layers=0, **fields)
  slots = layout(*model_lib.shapes_of(config)[1:], config)
  return Opened(config, weights, slots, _account(folder, config, weights, slots))


def _account(folder, config: ModelConfig, weights: TensorFiles, slots: dict[str, Slot]) -> Account:
  """Assigns every tensor its place; raises what `load_pretrained` documents."""
  copies, account = copies_of(config), Account([], [], [], {})
  left_out = _uncounted_mtp(config, weights)
  for name in weights.scales:
    account.not_kept[name] = f"scale of {name.removesuffix(files.SCALE)}, which it has multiplied"
  for name, stored in sorted(weights.stored.items()):
    if name in slots:
      (account.transposed if slots[name].inputs else account.stored_as_is).append(name)
      if stored.dtype == "F8_E4M3":
        account.dequantised.append(name)
    elif name in copies:
      account.not_kept[name] = f"copy of {copies[name]}"
    elif IGNORED.search(name):
      account.not_kept[name] = "follows from config.json"
    elif (layer := LAYER.match(name)) and int(layer[1]) in left_out:
      account.not_kept[name] = "MTP, left out"
    else:
      fail(f"{weights.where(name)} has no place in the model config.json describes")
  missing = [name for name in slots if name not in weights.stored]
  if missing:
    holders = ", ".join(sorted({stored.file.name for stored in weights.stored.values()}))
    fail(
      f"{folder} must hold every tensor of the model config.json describes: {missing[0]} and "
      f"{len(missing) - 1} others are not in {holders}"
    )
  for name in weights.stored:
    if name in slots or name in copies:
      weights.check(name, slots[copies.get(name, name)].hf_shape)
  return account


def _uncounted_mtp(config: ModelConfig, weights: TensorFiles) -> set[int]:
  """Returns the MTP layers of the files if the model has none, and warns of them.

  A layer behind the last one is an MTP layer if it has a projection of embedding and hidden state;
  any other is a mistake of config.json.
  """
  if config.num_nextn_predict_layers:
    return set()
  projections = (re.fullmatch(LAYER.pattern + r"eh_proj\.weight", name) for name in weights.stored)
  numbers = {int(found[1]) for found in projections if found}
  numbers = {number for number in numbers if number >= config.num_hidden_layers}
  if numbers:
    logging.warning(
      "the model has no MTP layers, those of the files are left out: layers %s", sorted(numbers)
    )
  return numbers


def check_copies(
  opened: Opened, block_rows: int = 1 << 12, part: int = 0, num_parts: int = 1
) -> None:
  """Compares repeated tensors with their originals, block by block.

  Args:
    opened: the checkpoint.
    block_rows: rows of a block.
    part, num_parts: which of the blocks this process compares, if several share them.

  Raises:
    ValueError: naming both tensors and their files, if they differ.
  """
  weights = opened.weights
  copies = {n: o for n, o in copies_of(opened.config).items() if n in weights.stored}
  staging.announce("comparing copies", sum(weights.stored[n].num_bytes for n in copies))
  for name, original in copies.items():
    rows = weights.stored[name].shape[0]
    for start in range(part * block_rows, rows, num_parts * block_rows):
      stop = min(start + block_rows, rows)
      a, b = (opened.read(n, start, stop) for n in (name, original))
      if not np.array_equal(a, b, equal_nan=True):
        fail(
          f"{weights.where(name)} must equal {original} in {weights.stored[original].file.name}, "
          "which takes its place; they differ"
        )


def load_pretrained(
  folder: str | pathlib.Path,
  compute_dtype: str = "float32",
  mesh: jax.sharding.Mesh | None = None,
  **fields: Any,
) -> model_lib.Transformer:
  """Loads a published checkpoint: config.json, and safetensors in one file or shards.

  Parameters become float32, whatever their stored dtype; FP8 weights are scaled. Copies of the
  embedding and head, as MTP layers have them, must equal the originals. transformers saves no MTP
  layers though config.json counts them: if not a single tensor of theirs exists, the model is
  loaded without MTP and a warning says so, unless `fields` sets num_nextn_predict_layers. MTP layers
  that config.json does not count at all, or `fields` sets to 0, are left out with a warning.

  Args:
    folder: of model_type deepseek_v3, kimi_k2 or deepseek_v2; tensors are float32, bfloat16,
      float16, or float8_e4m3fn with `weight_scale_inv`.
    compute_dtype: dtype of the model's matrix products.
    mesh: over which the parameters are split as training stores them: each process reads what its
      own devices hold, a device's part at a time, but for inputs, see `parts`. None: one device.
    **fields: fields of `ModelConfig` to set; see `config_from_hf`.

  Raises:
    ValueError: for an unsupported config; before a tensor is read, for a mesh that does not fit the
      model; and, naming the tensor and its file, for a tensor that
      is unknown, missing, of the wrong shape or dtype, or in a broken or missing file.
  """
  opened = open_pretrained(folder, compute_dtype=compute_dtype, **fields)
  graphdef, params, router_bias = model_lib.shapes_of(opened.config)
  if mesh is None:
    check_copies(opened)
  else:
    parameters.check_fit(model_lib.whole_shapes(opened.config), mesh)
    check_copies(opened, part=jax.process_index(), num_parts=jax.process_count())
  slots: dict[tuple[str, ...], dict[str, Slot]] = {}
  for name, slot in opened.slots.items():
    slots.setdefault(slot.path, {})[name] = slot

  def loaded(path, leaf) -> jax.Array:
    own = slots[tuple(key.key for key in path)]
    parts: dict[tuple, np.ndarray] = {}

    def part(index: Any) -> np.ndarray:  # devices that hold the same share it
      spans = tuple(s.indices(size) for s, size in zip(index, leaf.shape))
      if spans not in parts:
        parts[spans] = read_part(opened.read, own, leaf.shape, index)
      return parts[spans]

    if mesh is None:
      return jnp.asarray(part((slice(None),) * len(leaf.shape)))
    sharding = NamedSharding(mesh, parameters.spec(path, leaf.shape, mesh))
    return jax.make_array_from_callback(leaf.shape, sharding, part)

  trees = (jax.tree.map_with_path(loaded, tree) for tree in (params, router_bias))
  return nnx.merge(graphdef, *trees)
