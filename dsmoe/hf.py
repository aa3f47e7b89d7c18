"""Hugging Face checkpoints of DeepSeek-V2 and -V3 models: config.json, safetensors, names.

`BLOCK`, `MTP` and `TOP` are the one table of names, and `Slot` turns a tensor either way.

Shapes: L layers of a stack, E routed experts; a part of a leaf keeps the model's own dims.
"""

import contextlib
import json
import math
import pathlib
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401  importing it teaches numpy the name bfloat16
import numpy as np
from absl import logging
from flax import nnx
from safetensors import SafetensorError, safe_open

from dsmoe import model as model_lib
from dsmoe.config import ModelConfig
from dsmoe.hf_config import config_from_hf, config_to_hf, fail

__all__ = ["config_from_hf", "config_to_hf", "layout", "load_pretrained"]

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = ("F32", "BF16", "F16")

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
# Frequencies, which config.json determines; old releases stored them.
IGNORED = re.compile(r"(^|\.)rotary_emb\.inv_freq$")


class Slot(NamedTuple):
  """Where one published tensor lives in our parameters."""

  path: tuple[str, ...]  # of the leaf
  at: tuple[int, ...]  # into its layer and expert dimensions
  shape: tuple[int, ...]  # of the part there
  inputs: int  # see BLOCK

  @property
  def hf_shape(self) -> tuple[int, ...]:
    if not self.inputs:
      return self.shape
    return math.prod(self.shape[self.inputs :]), math.prod(self.shape[: self.inputs])

  def to_ours(self, tensor):
    """Turns a published tensor into our part."""
    return (tensor.T if self.inputs else tensor).reshape(self.shape)

  def to_hf(self, part):
    """Turns our part into the published tensor."""
    return part.reshape(self.hf_shape[::-1]).T if self.inputs else part


def _flat(tree) -> dict[tuple[str, ...], Any]:
  return {tuple(key.key for key in path): x for path, x in jax.tree.leaves_with_path(tree)}


def layout(params: Any, router_bias: Any, config: ModelConfig) -> dict[str, Slot]:
  """Maps the name of every published tensor of this model to its place in ours.

  Args:
    params, router_bias: as `model.split` returns them; arrays or only their shapes.
  """
  leaves = {**_flat(params), **_flat(router_bias)}
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


def _copies(config: ModelConfig) -> dict[str, str]:
  """Returns tensors a file may repeat, and what each must equal."""
  embed = "model.embed_tokens.weight"
  head = embed if config.tie_word_embeddings else "lm_head.weight"
  copies = {"lm_head.weight": embed} if config.tie_word_embeddings else {}
  for k in range(config.num_nextn_predict_layers):
    layer = f"model.layers.{config.num_hidden_layers + k}"
    copies |= {f"{layer}.embed_tokens.weight": embed, f"{layer}.shared_head.head.weight": head}
  return copies


class _Files:
  """The tensors of a checkpoint folder, in one file or in the shards an index names."""

  def __init__(self, folder: pathlib.Path, stack: contextlib.ExitStack):
    self._handles: dict[str, Any] = {}
    self.file_of: dict[str, str] = {}
    index = folder / INDEX
    if (folder / WEIGHTS).exists():
      shards: dict[str, Any] = {WEIGHTS: None}
    elif index.exists():
      shards = {}
      for name, file in json.loads(index.read_text())["weight_map"].items():
        shards.setdefault(file, set()).add(name)
    else:
      fail(f"{folder} must hold {WEIGHTS} or {INDEX}, it has neither")
    for file, listed in shards.items():
      if not (folder / file).exists():
        fail(f"shard {folder / file} must exist: {INDEX} says it holds {min(listed)}")
      try:
        handle = stack.enter_context(safe_open(folder / file, "numpy"))
      except SafetensorError as error:
        raise ValueError(f"{folder / file} must be a whole safetensors file: {error}") from error
      names = set(handle.keys())
      if listed is not None and names != listed:
        fail(
          f"{folder / file} must hold the tensors {INDEX} lists for it: it lacks "
          f"{sorted(listed - names)[:3]}, and {sorted(names - listed)[:3]} are not listed"
        )
      self._handles[file] = handle
      self.file_of |= dict.fromkeys(names, file)

  def read(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Returns a tensor as float32, having checked its dtype and shape."""
    file = self.file_of[name]
    part = self._handles[file].get_slice(name)
    if part.get_dtype() not in DTYPES:
      fail(f"tensor {name} in {file} must be one of {', '.join(DTYPES)}, got {part.get_dtype()}")
    if tuple(part.get_shape()) != shape:
      fail(
        f"tensor {name} in {file} must have the shape config.json gives it, {list(shape)}, got "
        f"{part.get_shape()}"
      )
    return self._handles[file].get_tensor(name).astype(np.float32)


def load_pretrained(
  folder: str | pathlib.Path, compute_dtype: str = "float32", **fields: Any
) -> model_lib.Transformer:
  """Reads a published checkpoint: config.json, and safetensors in one file or shards.

  Parameters are float32, whatever is stored. Copies of the embedding and head, as MTP layers
  have them, must equal the originals. transformers leaves MTP layers out when it saves, and
  config.json still counts them: where not one of their tensors exists, the model has no MTP
  and a warning says so, unless `fields` asks for num_nextn_predict_layers.

  Args:
    folder: of model_type deepseek_v3, kimi_k2 or deepseek_v2; float32, bfloat16 or float16.
    compute_dtype: of the model's matrix products.
    **fields: fields of `ModelConfig` to set; see `config_from_hf`.

  Raises:
    ValueError: for an unsupported config, and, naming the tensor and its file, for one that
      is unknown, missing, of the wrong shape or dtype, or in a broken or missing file.
  """
  folder = pathlib.Path(folder)
  path = folder / "config.json"
  if not path.exists():
    fail(f"{folder} must hold config.json, it has none")
  hf = json.loads(path.read_text())
  config = config_from_hf(hf, compute_dtype=compute_dtype, **fields)
  with contextlib.ExitStack() as stack:
    files = _Files(folder, stack)
    numbers = [re.match(r"model\.layers\.(\d+)\.", name) for name in files.file_of]
    last = max((int(number[1]) for number in numbers if number), default=-1)
    if (
      config.num_nextn_predict_layers
      and last < config.num_hidden_layers
      and "num_nextn_predict_layers" not in fields
    ):
      logging.warning("%s counts MTP layers, but no file has any: loaded without", path)
      config = config_from_hf(hf, compute_dtype=compute_dtype, num_nextn_predict_layers=0, **fields)
    return _fill(config, files, folder)


def _fill(config: ModelConfig, files: _Files, folder: pathlib.Path) -> model_lib.Transformer:
  shapes = jax.eval_shape(lambda: model_lib.build(config))
  graphdef, params, router_bias = model_lib.split(shapes)
  slots, copies = layout(params, router_bias, config), _copies(config)
  for name, file in sorted(files.file_of.items()):
    if name not in slots and name not in copies and not IGNORED.search(name):
      fail(f"tensor {name} in {folder / file} has no place in the model config.json describes")
  missing = [name for name in slots if name not in files.file_of]
  if missing:
    holders = ", ".join(sorted(set(files.file_of.values())))
    fail(
      f"{folder} must hold every tensor of the model config.json describes: {missing[0]} and "
      f"{len(missing) - 1} others are not in {holders}"
    )
  leaves = {**_flat(params), **_flat(router_bias)}
  filled = {path: np.empty(leaf.shape, np.float32) for path, leaf in leaves.items()}
  for name, slot in slots.items():
    filled[slot.path][slot.at] = slot.to_ours(files.read(name, slot.hf_shape))
  for name, original in copies.items():
    if name in files.file_of:
      shape = slots[original].hf_shape
      if not np.array_equal(files.read(name, shape), files.read(original, shape)):
        fail(
          f"tensor {name} in {folder / files.file_of[name]} must equal {original} in "
          f"{files.file_of[original]}, which takes its place; they differ"
        )
  trees = (
    jax.tree.map_with_path(lambda path, _: jnp.asarray(filled[tuple(k.key for k in path)]), tree)
    for tree in (params, router_bias)
  )
  return nnx.merge(graphdef, *trees)
