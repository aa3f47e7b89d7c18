"""The layer that the benchmark runs: the model's own mixture of experts, alone, on a mesh.

Its parameters are stored as in training, so that weights are gathered and gradients scattered over
`data`; it is rematerialised as `model.remat` says. The routing is that of the inputs: the router's
columns are orthonormal, and tokens lie in their space so that the experts asked for are chosen.

Shapes: N devices that the batch is split over, M tokens of each, D hidden, E experts, K experts a
token. A device's tokens are one sequence, so the layer's input is [N, M, D].
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from dsmoe.config import ExchangeConfig, ModelConfig
from dsmoe.config.schema import EXCHANGE_FIELDS
from dsmoe.model import parameters
from dsmoe.model.moe import MoE, RouterBias
from dsmoe.model.transformer import REMAT
from dsmoe.parallel import mesh as mesh_lib

_CHOSEN, _OTHERS = 2.0, -2.0  # the router's logits; far apart, and no sigmoid is saturated


class Outcome(NamedTuple):
  """What a run of the layer returns beside its output, of each device: int32."""

  counts_NE: jax.Array  # tokens of the device's own that chose each expert
  dropped_N: jax.Array  # see `DispatchStats`
  sent_N: jax.Array


def config_of(model: ModelConfig, back_end: str) -> ModelConfig:
  """Returns the config with another dispatch, and of the exchange's options those it reads."""
  read = {name: getattr(model.exchange, name) for name in EXCHANGE_FIELDS[back_end]}
  return dataclasses.replace(model, dispatch=back_end, exchange=ExchangeConfig(**read))


def options_of(config: ModelConfig) -> dict[str, Any]:
  """Returns the exchange's options that the config's dispatch reads."""
  return {name: getattr(config.exchange, name) for name in EXCHANGE_FIELDS[config.dispatch]}


def with_room_for_all(config: ModelConfig, degree: int) -> ModelConfig:
  """Returns the config with receive buffers that hold whatever comes from `degree` devices."""
  if "receive_capacity" not in EXCHANGE_FIELDS[config.dispatch]:
    return config
  exchange = dataclasses.replace(config.exchange, receive_capacity=float(degree))
  return dataclasses.replace(config, exchange=exchange)


def parts(config: ModelConfig):
  """Returns (graphdef, parameters in compute dtype, router bias), as shapes only."""
  module = jax.eval_shape(lambda: MoE(config, nnx.Rngs(params=0)))
  split: Any = nnx.split(module, nnx.Param, RouterBias)
  graphdef, params, bias = split[0], {"mlp": nnx.to_pure_dict(split[1])}, split[2]
  cast = jax.eval_shape(lambda p: parameters.compute_cast(p, config), params)
  return graphdef, cast, {"mlp": nnx.to_pure_dict(bias)}


def specs(config: ModelConfig, mesh) -> tuple[Any, Any, PartitionSpec]:
  """Returns how parameters, router bias and input are split over the mesh."""
  _, params, bias = parts(config)
  return parameters.specs(params, mesh), parameters.specs(bias, mesh), mesh_lib.batch_spec()


def forward(config: ModelConfig, mesh):
  """Returns a function (params, bias, x_NMD) -> (y_NMD, Outcome) of global arrays."""
  graphdef, whole, _ = parts(config)

  def layer(params, bias, x_BSD):
    gathered = parameters.gathered(params, parameters.shapes(whole))["mlp"]
    y_BSD, stats = nnx.merge(graphdef, gathered, bias["mlp"])(x_BSD)
    dispatched = stats.dispatch
    outcome = Outcome(stats.counts_E, dispatched.dropped_rows, dispatched.sent_rows)
    return y_BSD, jax.tree.map(lambda a: a[None], outcome)

  batch = PartitionSpec(mesh_lib.BATCH_AXES)
  return mesh_lib.shard_map(
    REMAT[config.remat](layer), mesh, specs(config, mesh), (mesh_lib.batch_spec(), batch)
  )


def with_gradients(run):
  """Returns a function (params, bias, x, dy) -> (y, Outcome, gradients of params and x)."""

  def both(params, bias, x_NMD, dy_NMD):
    y_NMD, vjp, outcome = jax.vjp(lambda p, x: run(p, bias, x), params, x_NMD, has_aux=True)
    return y_NMD, outcome, vjp(dy_NMD)

  return both


def abstract_inputs(config: ModelConfig, mesh, tokens: int):
  """Returns (params, bias, x, dy) as ShapeDtypeStructs with shardings."""
  _, params, bias = parts(config)
  shape = (mesh_lib.num_batch_shards(mesh), tokens, config.hidden_size)
  x = jax.ShapeDtypeStruct(shape, config.compute_dtype)
  put = lambda a, spec: jax.ShapeDtypeStruct(  # noqa: E731
    a.shape, a.dtype, sharding=NamedSharding(mesh, spec)
  )
  params_spec, bias_spec, x_spec = specs(config, mesh)
  placed = [
    jax.tree.map(put, tree, spec) for tree, spec in ((params, params_spec), (bias, bias_spec))
  ]
  return *placed, put(x, x_spec), put(x, x_spec)


def inputs(config: ModelConfig, mesh, expert_NMK: np.ndarray, seed: int = 0):
  """Draws (params, bias, x, dy) on the mesh, such that tokens choose the experts given.

  Args:
    config: of the model.
    mesh: over which they are split.
    expert_NMK: int32, what the devices' tokens choose.
    seed: of all that is random.

  Raises:
    ValueError: when there are more experts than hidden dimensions.
  """
  D, E = config.hidden_size, config.n_routed_experts
  if D < E:
    raise ValueError(f"hidden_size ({D}) must be at least n_routed_experts ({E})")
  abstract = abstract_inputs(config, mesh, expert_NMK.shape[1])
  shardings = jax.tree.map(lambda a: a.sharding, abstract)
  router_DE = np.linalg.qr(np.random.default_rng(seed).standard_normal((D, E)))[0]

  def draw(expert_NMK, router_DE):
    key = jax.random.key(seed)
    number_E = jnp.arange(E, dtype=jnp.int32)[None, None]
    chosen_NME = functools.reduce(
      jnp.logical_or, (expert_NMK[:, :, k, None] == number_E for k in range(expert_NMK.shape[2]))
    )
    logits_NME = jnp.where(chosen_NME, _CHOSEN, _OTHERS)

    leaves, tree = jax.tree.flatten(abstract[0])
    keys = jax.random.split(key, len(leaves) + 1)
    params = jax.tree.unflatten(
      tree,
      [
        (a.shape[-2] ** -0.5 * jax.random.normal(k, a.shape)).astype(a.dtype)
        for k, a in zip(keys, leaves)
      ],
    )
    params["mlp"]["router"] = router_DE
    bias = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), abstract[1])
    x, dy = jax.random.normal(keys[-1], (2, *abstract[2].shape))
    matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    x = x + matmul(logits_NME - matmul(x, router_DE), router_DE.T)
    return params, bias, x.astype(config.compute_dtype), dy.astype(config.compute_dtype)

  return jax.jit(draw, out_shardings=shardings)(expert_NMK, router_DE.astype(np.float32))
