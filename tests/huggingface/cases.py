"""Checkpoints with known outputs, and ours beside them: loss, gradients, a walk over layers.

A case is a folder with config.json, weights, io.safetensors (what another implementation
computed from them) and meta.json (which one, with which seed and margins). Beside those in
tests/golden/cases, the folder named by DSMOE_PARITY_CASES may hold more.
"""

import dataclasses
import functools
import json
import os
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import load_file

from dsmoe import model as model_lib
from dsmoe.huggingface import loading
from dsmoe.model import attention, mtp, parameters, rope
from dsmoe.model.layers import rms_norm
from dsmoe.parallel import collectives
from dsmoe.parallel import mesh as mesh_lib
from dsmoe.training import losses

GOLDEN = pathlib.Path(__file__).parent.parent / "golden" / "cases"
UNSUPPORTED = ("v32_",)


def folders() -> list[pathlib.Path]:
  """Every case, the golden ones first."""
  given = os.environ.get("DSMOE_PARITY_CASES")
  roots = [GOLDEN] + ([pathlib.Path(given)] if given else [])
  return [path.parent for root in roots for path in sorted(root.glob("*/config.json"))]


def supported(*needed: str) -> list[Any]:
  """The folders whose io.safetensors holds tensors with all of these prefixes."""
  chosen = []
  for folder in folders():
    if not folder.name.startswith(UNSUPPORTED):
      with safe_open(folder / "io.safetensors", "numpy") as io:
        if all(any(key.startswith(prefix) for key in io.keys()) for prefix in needed):
          chosen.append(folder)
  return chosen


def label(folder: pathlib.Path) -> str:
  return folder.name if folder.parent == GOLDEN else f"given-{folder.name}"


@dataclasses.dataclass(frozen=True)
class Case:
  """A loaded case."""

  hf_config: dict[str, Any]
  model: model_lib.Transformer
  io: dict[str, np.ndarray]


@functools.cache
def load(folder: pathlib.Path) -> Case:
  hf_config = json.loads((folder / "config.json").read_text())
  return Case(hf_config, loading.load_pretrained(folder), load_file(folder / "io.safetensors"))


def published(tree: Any, model: model_lib.Transformer) -> dict[str, np.ndarray]:
  """Names and shapes a tree like the model's parameters as a checkpoint does."""
  _, params, router_bias = model_lib.split(model)
  leaves = {
    tuple(k.key for k in path): np.asarray(x) for path, x in jax.tree.leaves_with_path(tree)
  }
  slots = loading.layout(params, router_bias, model.config)
  return {
    name: slot.to_hf(leaves[slot.path][slot.at])
    for name, slot in slots.items()
    if slot.path in leaves
  }


def make_batch(tokens_BS, labels_BS=None, mask_BS=None) -> dict[str, np.ndarray]:
  """Makes a batch of rows; labels are shifted here, -100 counts for nothing.

  Rows are padded on the left where mask_BS is 0: pads are a segment of their own.
  """
  tokens_BS = np.asarray(tokens_BS, np.int32)
  labels_BS = tokens_BS if labels_BS is None else np.asarray(labels_BS, np.int32)
  real = np.where(labels_BS >= 0, labels_BS, tokens_BS)
  weights = np.concatenate([labels_BS[:, 1:] >= 0, np.zeros_like(labels_BS[:, :1])], axis=1)
  mask_BS = np.ones_like(tokens_BS) if mask_BS is None else mask_BS
  return {
    "tokens": tokens_BS,
    "targets": np.concatenate([real[:, 1:], real[:, -1:]], axis=1),
    "weights": weights.astype(np.float32),
    "positions": np.broadcast_to(np.arange(tokens_BS.shape[1], dtype=np.int32), tokens_BS.shape),
    "segments": mask_BS.astype(np.int32),
  }


class Outcome(NamedTuple):
  """Of the main model and of each depth of multi-token prediction."""

  loss: jax.Array
  logits: jax.Array
  mtp_losses: list[jax.Array]
  mtp_logits: list[jax.Array]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _loss_and_grads(graphdef, config, params, router_bias, batch, mtp_weight):
  def run(params, router_bias, batch, mtp_weight):
    def loss_of(params):
      model = nnx.merge(graphdef, params, router_bias)
      out = model(batch["tokens"], batch["positions"], batch["segments"], batch["targets"])
      head_DV = model.gathered_head()

      def cross_entropy(hidden_BSD, depth):
        targets = mtp.shift(batch["targets"], depth).reshape(-1)
        weights = mtp.depth_weights(batch["weights"], None, depth).reshape(-1)
        hidden_MD = hidden_BSD.reshape(-1, hidden_BSD.shape[-1])
        loss, _ = losses.chunked_cross_entropy(hidden_MD, head_DV, targets, weights, 0.0, 32)
        return collectives.sum_over_batch(loss / jnp.sum(weights))

      hidden = [out.hidden_BSD, *([] if out.mtp_hidden is None else out.mtp_hidden)]
      loss, *mtp_losses = [cross_entropy(h, depth) for depth, h in enumerate(hidden)]
      logits, *mtp_logits = [h @ head_DV for h in hidden]
      total = loss
      if mtp_losses:
        total += mtp_weight * sum(mtp_losses[1:], mtp_losses[0]) / len(mtp_losses)
      return total, Outcome(loss, logits, mtp_losses, mtp_logits)

    return jax.grad(loss_of, has_aux=True)(params)

  mesh = mesh_lib.single_device_mesh()
  specs, bias_specs = parameters.specs(params, mesh), parameters.specs(router_bias, mesh)
  whole, rows = jax.sharding.PartitionSpec(), mesh_lib.batch_spec()
  fn = mesh_lib.shard_map(
    run,
    mesh,
    (specs, bias_specs, rows, whole),
    (specs, Outcome(whole, rows, whole, rows)),
  )
  return fn(params, router_bias, batch, mtp_weight)


def loss_and_grads(model, batch, mtp_weight: float = 0.0, params=None) -> tuple[Any, Outcome]:
  """Returns (gradients of loss + mtp_weight * mean MTP loss, Outcome), in float32."""
  graphdef, own, router_bias = model_lib.split(model)
  params = own if params is None else params
  # Placed as the gradients will be, so that updated parameters do not compile it anew.
  mesh = mesh_lib.single_device_mesh()
  specs = mesh_lib.named(mesh, parameters.specs(params, mesh))
  params, weight = jax.device_put(params, specs), jnp.float32(mtp_weight)
  return _loss_and_grads(graphdef, model.config, params, router_bias, batch, weight)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _walk(graphdef, config, params, router_bias, batch):
  model = nnx.merge(graphdef, params, router_bias)
  eps, seen = config.rms_norm_eps, {}
  cos_sin = rope.cos_sin(batch["positions"], config)
  attend = attention.within_rows(batch["segments"])
  x_BSD = seen["hidden.embed"] = model.embed[...][batch["tokens"]]
  for i in range(config.num_hidden_layers):
    dense = i < config.first_k_dense_replace
    stack, state = nnx.split(model.dense_layers if dense else model.moe_layers)
    place = i if dense else i - config.first_k_dense_replace
    block = nnx.merge(stack, jax.tree.map(lambda leaf, place=place: leaf[place], state))
    h_BSD = rms_norm(x_BSD, block.attention_norm[...], eps)
    seen[f"attn_out.layer{i}"] = block.attention(h_BSD, cos_sin, attend)[0]
    x_BSD = x_BSD + seen[f"attn_out.layer{i}"]
    h_BSD = rms_norm(x_BSD, block.mlp_norm[...], eps)
    if dense:
      seen[f"mlp_out.layer{i}"] = block.mlp(h_BSD)
    else:
      h_MD = h_BSD.reshape(-1, h_BSD.shape[-1])
      routed, name = block.mlp.route(h_MD)[0], f"router.layer{i}"
      order = jnp.argsort(routed.expert_MK, axis=-1)
      seen[f"{name}.logits"] = h_MD @ block.mlp.router[...]
      for what, a in (("indices", routed.expert_MK), ("weights", routed.gate_MK)):
        seen[f"{name}.topk_{what}_sorted"] = jnp.take_along_axis(a, order, axis=-1)
      seen[f"mlp_out.layer{i}"] = block.mlp(h_BSD)[0]
    x_BSD = seen[f"hidden.layer{i}"] = x_BSD + seen[f"mlp_out.layer{i}"]
  seen["hidden.final_norm"] = rms_norm(x_BSD, model.norm[...], eps)
  return seen


def walk(model, batch) -> dict[str, jax.Array]:
  """Returns what every layer of the main stack computes, under io.safetensors' names."""
  graphdef, params, router_bias = model_lib.split(model)
  return _walk(graphdef, model.config, params, router_bias, batch)
