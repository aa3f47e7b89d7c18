"""Computes what a model costs: parameters, FLOPs per token by convention, cache bytes.

Parameters are counted from the shapes of the real model, never from a second formula.
FLOPs count multiplications and additions of forward and backward (3 x forward), without
recomputation: 6 for each weight that a token is multiplied with, plus attention. Three conventions
differ in how they count attention and multi-token prediction; published figures use all three, so
name the one you quote.
"""

import math
from typing import Any

import jax

from dsmoe import model as model_lib
from dsmoe.config import ModelConfig
from dsmoe.planning import chips


def _size(tree: Any) -> int:
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def _block_parts(block: dict, bias: dict) -> dict[str, int]:
  """Counts the parameters of a stack of blocks by part."""
  mlp = block["mlp"]
  parts = {"attention": _size(block["attention"])}
  parts["norms"] = _size(block["attention_norm"]) + _size(block["mlp_norm"])
  if "experts" in mlp:
    parts["routed_experts"] = _size(mlp["experts"])
    parts["shared_experts"] = _size(mlp.get("shared", {}))
    parts["router"] = _size(mlp["router"])
    parts["router_bias"] = _size(bias)
  else:
    parts["dense_mlp"] = _size(mlp)
  return parts


def parameters(config: ModelConfig) -> dict[str, Any]:
  """Counts parameters of the main model, router bias included, and separately those of MTP.

  Returns:
    `total`: all of the main model; `active`: elements of the matrices that one token is multiplied
    with, which include the head but not embedding, norms and biases; `parts`: those of the main
    model by part; `mtp_total`, `mtp_active`: the same for the MTP modules without the shared
    embedding and head.
  """
  _, params, bias = model_lib.shapes_of(config)
  parts: dict[str, int] = {"embedding": _size(params["embed"])}
  parts["head"] = _size(params.get("head", {}))
  parts["norms"] = _size(params["norm"])
  for name in ("dense_layers", "moe_layers"):
    if name in params:
      for part, size in _block_parts(params[name], bias.get(name, {})).items():
        parts[part] = parts.get(part, 0) + size
  total = sum(parts.values())
  mtp = params.get("mtp", {})
  return dict(
    total=total,
    active=round(_met_by_main(config, params)),
    parts=parts,
    mtp_total=_size(mtp) + _size(bias.get("mtp", {})),
    mtp_active=round(_met(config, mtp)),
  )


def _met(config: ModelConfig, tree: dict) -> float:
  """Counts the matrix elements that one token is multiplied with, under even load."""
  size = 0.0
  for path, leaf in jax.tree.leaves_with_path(tree):
    names = [key.key for key in path]
    if names[-1].endswith(("norm", "_bias")) or names[-1] == "embed":
      continue
    size += math.prod(leaf.shape) * (1 - _idle_fraction(config) if "experts" in names else 1)
  return size


def _met_by_main(config: ModelConfig, params: dict) -> float:
  """Counts those of the main model; a tied embedding counts as its head."""
  body = {name: part for name, part in params.items() if name not in ("mtp", "head")}
  return _met(config, body) + config.vocab_size * config.hidden_size


def _idle_fraction(config: ModelConfig) -> float:
  if not config.num_moe_layers:
    return 0.0
  return 1 - config.num_experts_per_tok / config.n_routed_experts


def flops_per_token(config: ModelConfig, sequence_length: int) -> dict[str, float]:
  """Returns training FLOPs a token: `causal`, `non_causal`, `causal_mtp`.

  Norms, biases and softmax are left out. Source of the conventions: arXiv:2505.09343
  Table 2 (causal), MaxText (non-causal), Megatron (causal with MTP).
  """
  _, params, _ = model_lib.shapes_of(config)
  head = config.vocab_size * config.hidden_size
  main = _met_by_main(config, params)
  heads_dim = config.num_attention_heads * (config.qk_head_dim + config.v_head_dim)
  attention = 6.0 * heads_dim * sequence_length  # of a layer, without a causal mask
  layers, depth = config.num_hidden_layers, config.num_nextn_predict_layers
  mtp = 6 * (_met(config, params.get("mtp", {})) + depth * head) + depth * attention / 2
  causal = 6 * main + layers * attention / 2
  return {
    "causal": causal,
    "non_causal": 6 * main + layers * attention,
    "causal_mtp": causal + mtp,
  }


def kv_cache_bytes_per_token(config: ModelConfig, bytes_per_number: int = 2) -> int:
  """Returns the latent cache's bytes: kv_lora_rank + qk_rope_head_dim numbers in each layer."""
  numbers = config.kv_lora_rank + config.qk_rope_head_dim
  return config.num_hidden_layers * numbers * bytes_per_number


def peak_flops(device: Any) -> float | None:
  """Returns a device's dense bfloat16 peak in FLOP/s, or None if it is not in `chips`."""
  chip = chips.of_device(device)
  return chip.peak_flops if chip else None
