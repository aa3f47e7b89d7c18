"""The model as generation runs it: layers written out, over the latent cache.

Each weight is a buffer of its own: a scan over layers would copy all experts of one to slice
it, and decoding reads only those that a token chose.

Shapes: B rows, S new tokens of a row, D hidden, W numbers of a latent, V vocabulary, N pages,
T tokens of a page.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from dsmoe import model as model_lib
from dsmoe.config import ModelConfig
from dsmoe.inference import cache, cached_attention, sampling
from dsmoe.inference.cached_attention import Place
from dsmoe.model import rope
from dsmoe.model.layers import rms_norm


@dataclasses.dataclass(frozen=True, eq=False)
class Architecture:
  """What compiled functions depend on besides shapes; hashed by identity, which is quick."""

  config: ModelConfig
  graphdefs: tuple[Any, ...]  # of each layer's block
  mtp_graphdef: Any  # None: no drafts


@functools.cache
def architecture(config: ModelConfig, speculate: bool) -> Architecture:
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
  return Architecture(config, tuple(blocks), graphdef("mtp") if speculate else None)


class Weights(NamedTuple):
  """Parameters in compute dtype, cut into layers; made by `prepare`."""

  embed_VD: jax.Array
  layers: tuple[Any, ...]  # (parameters, router bias, absorbed) of each block
  norm_D: jax.Array
  head_DV: jax.Array
  mtp: Any  # the same of the first MTP module, or None


def prepare(config: ModelConfig, params, router_bias, speculate: bool = False):
  """Turns a model's parameters into what this module computes with.

  Args:
    config: the model's.
    params, router_bias: as `model.split` returns them, on one device.
    speculate: keep the first MTP module, to draft with.

  Returns:
    (Architecture, Weights).

  Raises:
    ValueError: when drafts are asked of a model without an MTP module.
  """
  arch = architecture(config, speculate)
  params, router_bias = _prepared(config, params, router_bias)

  def layers_of(name: str, num: int):
    if not num:
      return []
    # Taken out, so that a stack is given back when its layers are cut.
    stack = params.pop(name), router_bias.pop(name, {})
    layers = [jax.tree.map(lambda x, i=i: x[i], stack) for i in range(num)]
    blocks = [p["block"] if name == "mtp" else p for p, _ in layers]
    absorbed = [
      cached_attention.absorbed(config, block["attention"]["kv_b_proj"]) for block in blocks
    ]
    return [(*layer, extra) for layer, extra in zip(layers, absorbed)]

  layers = layers_of("dense_layers", config.first_k_dense_replace)
  layers += layers_of("moe_layers", config.num_moe_layers)
  embed_VD = params["embed"]
  head_DV = embed_VD.T if config.tie_word_embeddings else params["head"]
  mtp = layers_of("mtp", 1)[0] if speculate else None
  return arch, Weights(embed_VD, tuple(layers), params["norm"], head_DV, mtp)


@functools.partial(jax.jit, static_argnums=0)
def _prepared(config: ModelConfig, params, router_bias):
  """Casts to the compute dtype and puts rotated columns in half-split order."""
  params = model_lib.compute_cast(params, config)
  if config.rope_interleave:
    turned = ("q_proj", "q_b_proj", "kv_a_proj", "kv_a_bias")
    params = jax.tree.map_with_path(
      lambda path, x: rope.half_split_columns(x, config) if path[-1].key in turned else x, params
    )
  return params, router_bias


def _block(block, absorbed, attend, x_BSD, cos_sin, pages_NTW, place: Place):
  """One layer. Returns its output and its pages with the new tokens.

  They are written before they are read, so that the order is plain and no copy is made.
  """
  mla, eps, S = block.attention, block.config.rms_norm_eps, x_BSD.shape[1]
  h_BSD = rms_norm(x_BSD, block.attention_norm[...], eps)
  q_BSHA = mla.queries(h_BSD, *cos_sin)
  new_BSW = jnp.concatenate(mla.latents(h_BSD, *cos_sin), axis=-1)
  pages_NTW = cache.write(pages_NTW, new_BSW, *place)
  out_BSHU = attend(mla, absorbed, q_BSHA, new_BSW, pages_NTW, place).astype(x_BSD.dtype)
  x_BSD = x_BSD + mla.output(out_BSHU)
  h_BSD = rms_norm(x_BSD, block.mlp_norm[...], eps)
  y_BSD = block.mlp.infer(h_BSD, place.real_BS(S)) if block.use_moe else block.mlp(h_BSD)
  return x_BSD + y_BSD, pages_NTW


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
  config = arch.config
  cos_sin = rope.cos_sin(place.position_BS(tokens_BS.shape[1]), config)
  x_BSD = weights.embed_VD[tokens_BS]
  layers = []
  for graphdef, layer, pages_NTW in zip(arch.graphdefs, weights.layers, kept.layers):
    params, bias, absorbed = layer
    block = nnx.merge(graphdef, params, bias)
    x_BSD, pages_NTW = _block(block, absorbed, attend, x_BSD, cos_sin, pages_NTW, place)
    layers.append(pages_NTW)
  hidden_BSD = rms_norm(x_BSD, weights.norm_D, config.rms_norm_eps)
  return hidden_BSD, kept._replace(layers=tuple(layers))


def draft(arch: Architecture, weights: Weights, kept, hidden_BSD, next_BS, place: Place, attend):
  """Runs the first MTP module on the same tokens, each with the one that follows it.

  Args:
    hidden_BSD: from `forward`.
    next_BS: int32, the token after each.

  Returns:
    (int32 [B], the likeliest token after the last of `next_BS` that counts; the cache).
  """
  params, bias, absorbed = weights.mtp
  module = nnx.merge(arch.mtp_graphdef, params, bias)
  cos_sin = rope.cos_sin(place.position_BS(next_BS.shape[1]), arch.config)
  hidden_BSD, pages_NTW = module.around(
    lambda x_BSD: _block(module.block, absorbed, attend, x_BSD, cos_sin, kept.mtp, place),
    *(hidden_BSD, weights.embed_VD[next_BS]),
  )
  token_B = sampling.argmax(last_logits(weights, hidden_BSD, place))
  return token_B, kept._replace(mtp=pages_NTW)


def head(weights: Weights, hidden):
  """Returns float32 logits [..., V]."""
  return jnp.matmul(hidden, weights.head_DV, preferred_element_type=jnp.float32)


def last_logits(weights: Weights, hidden_BSD, place: Place):
  """Returns the logits [B, V] after each row's last real token."""
  last_B = jnp.maximum(place.count_B - 1, 0)
  return head(weights, jnp.take_along_axis(hidden_BSD, last_B[:, None, None], axis=1)[:, 0])
