"""The transformer: embedding, dense blocks, MoE blocks, norm, head, MTP. Wiring only.

Layers of one kind are stacked, and scanned when many, so compile time does not grow with
depth. Each layer's weights are gathered from their shards just before use.

Shapes: B batch, S sequence, D hidden, V vocabulary (v: this device's part), L layers, E routed
experts.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from dsmoe import platforms
from dsmoe.config import ModelConfig
from dsmoe.model import attention, mtp, parameters, rope
from dsmoe.model.block import Block
from dsmoe.model.layers import normal, ones, rms_norm
from dsmoe.model.moe import MoEOptions, MoEStats, RouterBias
from dsmoe.parallel import collectives, context
from dsmoe.parallel import mesh as mesh_lib

REMAT: dict[str, Callable[[Callable], Callable]] = {
  "none": lambda fn: fn,
  "dots": functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.dots_saveable),
  "full": jax.checkpoint,
}


class ModelOutput(NamedTuple):
  """What a forward pass leaves for the losses, of this device's tokens: see `context.py`."""

  hidden_BSD: jax.Array  # after the final norm
  mtp_hidden: jax.Array | None  # [depth, B, S, D] of each MTP depth, after its norm
  stats: MoEStats | None  # of every MoE layer, the MTP ones last: leading dimension L


def _stack(make, num: int, rngs: nnx.Rngs):
  """Builds `num` modules with their parameters stacked along a leading dimension."""
  return nnx.split_rngs(splits=num)(nnx.vmap(make, in_axes=0, out_axes=0))(rngs)


def _apply_stack(layer, x_BSD, layers):
  """Runs `layer(x, weights) -> (x, stats)` over stacked weights; stats gain a leading dimension."""
  num_layers = jax.tree.leaves(layers)[0].shape[0]
  with jax.named_scope("layers"):
    if not platforms.writes_out(num_layers):
      return jax.lax.scan(layer, x_BSD, layers)
    stats = []
    for i in range(num_layers):
      x_BSD, layer_stats = layer(x_BSD, jax.tree.map(lambda w, i=i: w[i], layers))
      stats.append(layer_stats)
    return x_BSD, jax.tree.map(lambda *s: jnp.stack(s), *stats)


def _gathered(graphdef, state, config: ModelConfig) -> Any:
  return nnx.merge(graphdef, parameters.gathered(state, whole_shapes(config)))


def embedded(embed_vD, tokens_BS):
  """Returns each token's row [B, S, D] of an embedding whose rows are split over `model`."""
  with jax.named_scope("embed"):
    if collectives.devices_along("model") == 1:
      return embed_vD[tokens_BS]
    row_BS = tokens_BS - collectives.first_of_model(embed_vD.shape[0])
    own_BS = (row_BS >= 0) & (row_BS < embed_vD.shape[0])
    x_BSD = jnp.where(own_BS[..., None], embed_vD[jnp.where(own_BS, row_BS, 0)], 0)
    return collectives.sum_over_model(x_BSD)


class Transformer(nnx.Module):
  """The model. Runs inside `mesh.shard_map`; see `logits` for a plain call."""

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
    self.config = config
    D, V = config.hidden_size, config.vocab_size
    num_dense, num_moe = config.first_k_dense_replace, config.num_moe_layers
    self.embed = normal(rngs, (V, D), config.initializer_range)  # [V, D]
    if num_dense:
      self.dense_layers = _stack(lambda r: Block(config, False, r), num_dense, rngs)
    if num_moe:
      self.moe_layers = _stack(lambda r: Block(config, True, r), num_moe, rngs)
    self.norm = ones(D)
    if not config.tie_word_embeddings:
      self.head = normal(rngs, (D, V), config.initializer_range)  # [D, V]
    if config.num_nextn_predict_layers:
      self.mtp = _stack(
        lambda r: mtp.MTPModule(config, Block(config, num_moe > 0, r), r),
        config.num_nextn_predict_layers,
        rngs,
      )

  def gathered_embed(self):
    """Returns the embedding, [V, D]; of this device's part of V if that is split over `model`."""
    shapes = whole_shapes(self.config)
    return parameters.gathered({"embed": self.embed[...]}, shapes)["embed"]

  def gathered_head(self):
    """Returns the output projection, [D, V]; of this device's part of V like the embedding."""
    if self.config.tie_word_embeddings:
      return self.gathered_embed().T
    return parameters.gathered({"head": self.head[...]}, whole_shapes(self.config))["head"]

  def __call__(
    self,
    tokens_BS,
    positions_BS,
    segments_BS=None,
    targets_BS=None,
    balance_loss: Callable | None = None,
    record_routing: bool = False,
  ) -> ModelOutput:
    """Runs every layer on this device's part of the batch.

    Rows come whole; where they are split over the mesh axis `context`, this device's tokens of
    them are taken here.

    Args:
      tokens_BS: int32.
      positions_BS: int32, for RoPE.
      segments_BS: int32 document numbers; None when a row is one document.
      targets_BS: int32 next tokens, for multi-token prediction; None leaves it out.
      balance_loss: a loss on each layer's scores that the stats carry; see `MoEOptions`.
      record_routing: whether the stats carry each token's experts.
    """
    config = self.config
    depths = config.num_nextn_predict_layers if targets_BS is not None else 0
    with jax.named_scope("embed"):
      ahead = context.own_tokens([mtp.shift(targets_BS, k) for k in range(depths)])
      tokens_BS, positions_BS = context.own_tokens((tokens_BS, positions_BS))
    embed_vD = self.gathered_embed()
    with jax.named_scope("attention"):
      cos_sin = platforms.computed_once(lambda x: rope.cos_sin(x, config), positions_BS)
    options = MoEOptions(balance_loss, record_routing=record_routing)
    block_args = (cos_sin, attention.within_rows(segments_BS), options)
    x_BSD = embedded(embed_vD, tokens_BS)
    stats: list[MoEStats] = []
    for name in ("dense_layers", "moe_layers"):
      if hasattr(self, name):
        graphdef, layers = nnx.split(getattr(self, name))

        def layer(x_BSD, state, graphdef=graphdef):
          x_BSD, layer_stats, _ = _gathered(graphdef, state, config)(x_BSD, *block_args)
          return x_BSD, layer_stats

        x_BSD, layer_stats = _apply_stack(REMAT[config.remat](layer), x_BSD, layers)
        stats += [layer_stats] if layer_stats is not None else []
    hidden_BSD = rms_norm(x_BSD, self.norm[...], config.rms_norm_eps)

    mtp_hidden = None
    if depths:
      graphdef, layers = nnx.split(self.mtp)

      def module(hidden_BSD, depth):
        state, tokens_BS = depth
        hidden_BSD, layer_stats, _ = _gathered(graphdef, state, config)(
          hidden_BSD, embedded(embed_vD, tokens_BS), *block_args
        )
        return hidden_BSD, (hidden_BSD, layer_stats)

      with jax.named_scope("mtp"):
        _, (mtp_hidden, layer_stats) = jax.lax.scan(
          REMAT[config.remat](module), hidden_BSD, (layers, jnp.stack(ahead))
        )
      stats += [layer_stats] if layer_stats is not None else []
    joined = jax.tree.map(lambda *a: jnp.concatenate(a), *stats) if stats else None
    return ModelOutput(hidden_BSD, mtp_hidden, joined)


def build(config: ModelConfig, seed: int | jax.Array = 0) -> Transformer:
  """Creates the model with fresh float32 weights; under `jax.eval_shape`, only its shapes.

  Args:
    config: of the model.
    seed: from 0 to 2**32 - 1; an array is uint32, and equal seeds give equal weights.
  """
  return Transformer(config, nnx.Rngs(params=jax.random.key(seed)))


@functools.cache
def _without_arrays(config: ModelConfig) -> Transformer:
  return jax.eval_shape(lambda: build(config))


def shapes_of(config: ModelConfig) -> tuple[Any, Any, Any]:
  """Returns `split` of the model with ShapeDtypeStructs for arrays; it is traced once a config."""
  return split(_without_arrays(config))


@functools.cache
def whole_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
  """Returns `parameters.shapes` of the model, which no device knows from its own part."""
  _, params, router_bias = shapes_of(config)
  return parameters.shapes(params) | parameters.shapes(router_bias)


def split(model: Transformer):
  """Returns (graphdef, params, router_bias): what it is, what the gradient moves, what not.

  The last two are nested dicts of arrays; `nnx.merge` of the three is the model again.
  """
  parts: Any = nnx.split(model, nnx.Param, RouterBias)
  return parts[0], nnx.to_pure_dict(parts[1]), nnx.to_pure_dict(parts[2])


@functools.partial(jax.jit, static_argnums=(0, 1))
def _logits(graphdef, config, params, bias, tokens_BS):
  def forward(params, bias, tokens_BS):
    model = nnx.merge(graphdef, parameters.compute_cast(params, config), bias)
    positions_BS = jnp.broadcast_to(jnp.arange(tokens_BS.shape[1]), tokens_BS.shape)
    hidden_BSD = model(tokens_BS, positions_BS).hidden_BSD
    return jnp.matmul(hidden_BSD, model.gathered_head(), preferred_element_type=jnp.float32)

  batch = mesh_lib.batch_spec()
  mesh = mesh_lib.single_device_mesh()
  specs = (parameters.specs(params, mesh), parameters.specs(bias, mesh), batch)
  return mesh_lib.shard_map(forward, mesh, specs, batch)(params, bias, tokens_BS)


def logits(model: Transformer, tokens_BS) -> jax.Array:
  """Returns the float32 logits [B, S, V] of every position, on one device.

  Args:
    model: from `build` or `hf.load_pretrained`.
    tokens_BS: int32, each row one document starting at position 0.
  """
  graphdef, params, bias = split(model)
  return _logits(graphdef, model.config, params, bias, jnp.asarray(tokens_BS, jnp.int32))
