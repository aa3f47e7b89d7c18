"""The model as generation runs it: its blocks one by one, over the latent cache.

A layer's weights are buffers of their own, but for its experts, which stay in their stack: decoding
reads single experts out of it, where a scan over layers would copy all of a layer's first.

Shapes: B rows, S new tokens of a row, D hidden, W numbers of a latent, V vocabulary, N pages,
T tokens of a page.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from dsmoe import model as model_lib
from dsmoe.config import ModelConfig
from dsmoe.inference import cached_attention, on_mesh, sampling
from dsmoe.inference.cached_attention import Place
from dsmoe.model import parameters, rope, transformer
from dsmoe.model.layers import rms_norm
from dsmoe.model.moe import MoEOptions
from dsmoe.parallel import collectives
from dsmoe.parallel import mesh as mesh_lib


@dataclasses.dataclass(frozen=True, eq=False)
class Architecture:
  """What compiled functions depend on besides shapes; hashed by identity, which is quick."""

  config: ModelConfig
  graphdefs: tuple[Any, ...]  # of each layer's block
  mtp_graphdef: Any  # None: no drafts
  mesh: Mesh | None = None  # None: one device


@functools.cache
def architecture(config: ModelConfig, speculate: bool, mesh: Mesh | None = None) -> Architecture:
  """Returns the one Architecture of these settings.

  Raises:
    ValueError: when drafts are asked of a model without an MTP module.
  """
  if speculate and not config.num_nextn_predict_layers:
    raise ValueError(
      "speculation needs an MTP module: num_nextn_predict_layers must be at least 1, got 0"
    )
  # Rotated columns are put in half-split order by `prepare`, once.
  config = dataclasses.replace(config, rope_interleave=False)
  shapes = jax.eval_shape(lambda: model_lib.build(config))

  def graphdef(name: str):
    return nnx.split(getattr(shapes, name), nnx.Param, model_lib.RouterBias)[0]

  blocks = [graphdef("dense_layers")] if config.first_k_dense_replace else []
  blocks *= config.first_k_dense_replace
  if config.num_moe_layers:
    blocks += [graphdef("moe_layers")] * config.num_moe_layers
  return Architecture(config, tuple(blocks), graphdef("mtp") if speculate else None, mesh)


class Weights(NamedTuple):
  """Parameters in compute dtype, cut into layers; made by `prepare`."""

  embed_VD: jax.Array
  layers: tuple[Any, ...]  # (parameters, router bias, absorbed) of each block
  norm_D: jax.Array
  head_DV: jax.Array
  mtp: Any  # the same of the first MTP module, or None


def prepare(
  config: ModelConfig, params, router_bias, speculate: bool = False, mesh: Mesh | None = None
):
  """Turns a model's parameters into what this module computes with.

  Args:
    config: the model's.
    params, router_bias: as `model.split` returns them, on one device or split over a mesh.
    speculate: keep the first MTP module, to draft with.
    mesh: over which the result is split, see `on_mesh`; None: it stays where they are, on one
      device.

  Returns:
    (Architecture, Weights).

  Raises:
    ValueError: when drafts are asked of a model without an MTP module.
  """
  arch = architecture(config, speculate, mesh)
  prepared = _prepared(config, {k: v for k, v in params.items() if k != "mtp" or speculate}, mesh)
  if mesh is not None:
    router_bias = on_mesh.placed(router_bias, mesh)

  def layers_of(name: str, num: int):
    layers = []
    for i in range(num):
      layer, bias = (
        jax.tree.map_with_path(lambda path, x, i=i: x if _is_shared(path) else x[i], tree)
        for tree in (prepared[name], router_bias.get(name, {}))
      )
      block = layer["block"] if name == "mtp" else layer
      absorbed = cached_attention.absorb(config, block["attention"]["kv_b_proj"])
      layers.append((layer, bias, absorbed))
    return layers

  layers = layers_of("dense_layers", config.first_k_dense_replace)
  layers += layers_of("moe_layers", config.num_moe_layers)
  embed_VD = prepared["embed"]
  head_DV = embed_VD.T if config.tie_word_embeddings else prepared["head"]
  mtp = layers_of("mtp", 1)[0] if speculate else None
  weights = Weights(embed_VD, tuple(layers), prepared["norm"], head_DV, mtp)
  if mesh is not None:  # they lie there already, but for what the compiler chose otherwise
    weights = jax.device_put(weights, mesh_lib.named(mesh, on_mesh.weight_specs(weights, mesh)))
  return arch, weights


def _is_shared(path) -> bool:
  """Returns whether a stack's array serves every layer whole: the experts' matrices.

  They are nearly all of a model. Decoding reads single experts out of the stack, so no second copy
  of it is made where training computes in the same dtype.
  """
  return "experts" in parameters.of(path).dims


def _prepared(config: ModelConfig, params, mesh: Mesh | None):
  """Casts to the compute dtype, moves to the mesh and puts rotated columns in half-split order.

  What none of these changes is returned as it is, not copied: a jitted function would copy it.
  """
  turned = ("q_proj", "q_b_proj", "kv_a_proj", "kv_a_bias") if config.rope_interleave else ()

  def prepared(path, x):
    if not parameters.of(path).float32 and x.dtype != config.compute_dtype:
      x = x.astype(config.compute_dtype)
    if mesh is not None:
      x = jax.device_put(x, NamedSharding(mesh, parameters.computed_spec(path, x.shape, mesh)))
    return _half_split(config, x) if path[-1].key in turned else x

  return jax.tree.map_with_path(prepared, params)


_half_split = jax.jit(lambda config, x: rope.half_split_columns(x, config), static_argnums=0)


def forward(arch: Architecture, weights: Weights, kept, tokens_BS, place: Place, attend):
  """Runs the main model on new tokens.

  Args:
    kept: the `cache.LatentCache`.
    tokens_BS: int32.
    place: where they go.
    attend: from `latent_attention`.

  Returns:
    (hidden [B, S, D] after the final norm, the cache with the new tokens).
  """
  config, S = arch.config, tokens_BS.shape[1]
  cos_sin = rope.cos_sin(place.position_BS(S), config)
  x_BSD = transformer.embedded(weights.embed_VD, tokens_BS)
  layers = []
  for i, (graphdef, layer) in enumerate(zip(arch.graphdefs, weights.layers)):
    params, bias, absorbed = layer
    block = nnx.merge(graphdef, params, bias)
    options = _moe_options(place, S, i - config.first_k_dense_replace)
    x_BSD, _, pages_NTW = block(x_BSD, cos_sin, attend(absorbed, kept.layers[i], place), options)
    layers.append(pages_NTW)
  hidden_BSD = rms_norm(x_BSD, weights.norm_D, config.rms_norm_eps)
  return hidden_BSD, kept._replace(layers=tuple(layers))


def _moe_options(place: Place, S: int, layer: int) -> MoEOptions:
  return MoEOptions(real_BS=place.real_BS(S), inference=True, layer=layer)


def draft(arch: Architecture, weights: Weights, kept, hidden_BSD, next_BS, place: Place, attend):
  """Runs the first MTP module on the same tokens, each with the one that follows it.

  Args:
    hidden_BSD: from `forward`.
    next_BS: int32, the token after each.

  Returns:
    (int32 [B], the likeliest token after the last of `next_BS` that counts; the cache).
  """
  params, bias, absorbed = weights.mtp
  module, S = nnx.merge(arch.mtp_graphdef, params, bias), next_BS.shape[1]
  cos_sin = rope.cos_sin(place.position_BS(S), arch.config)
  hidden_BSD, _, pages_NTW = module(
    hidden_BSD,
    transformer.embedded(weights.embed_VD, next_BS),
    cos_sin,
    attend(absorbed, kept.mtp, place),
    _moe_options(place, S, 0),
  )
  token_B = sampling.argmax(last_logits(weights, hidden_BSD, place))
  return token_B, kept._replace(mtp=pages_NTW)


def head(weights: Weights, hidden):
  """Returns float32 logits [..., V], of the whole vocabulary."""
  hidden = collectives.enter_model_axis(hidden)
  logits = jnp.matmul(hidden, weights.head_DV, preferred_element_type=jnp.float32)
  return collectives.joined_over_model(logits)


def last_logits(weights: Weights, hidden_BSD, place: Place):
  """Returns the logits [B, V] after each row's last real token."""
  last_B = jnp.maximum(place.count_B - 1, 0)
  return head(weights, jnp.take_along_axis(hidden_BSD, last_B[:, None, None], axis=1)[:, 0])
