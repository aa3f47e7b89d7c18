"""The model's mixture of experts, alone, on a mesh: each exchange is checked and measured with it.

Its parameters are stored as in training, so that weights are gathered and gradients scattered over
`data`; it is rematerialised as `model.remat` says. The routing is that of the inputs: the router's
columns are orthonormal, and tokens lie in their space so that the experts asked for are chosen.

Shapes: N devices that the tokens are split over, M tokens of each, D hidden, E experts, K experts a
token, G groups of experts. A device's tokens are one sequence, so the layer's input is [N, M, D].
Devices along the axis `expert` are neighbours among the N.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from dsmoe import platforms
from dsmoe.config import ExchangeConfig, ModelConfig
from dsmoe.config.schema import EXCHANGE_FIELDS
from dsmoe.model import parameters
from dsmoe.model.moe import MoE, RouterBias
from dsmoe.model.transformer import REMAT
from dsmoe.parallel import context
from dsmoe.parallel import mesh as mesh_lib

AXES = ("data", "context", "expert")  # whose devices have tokens of their own
# The router's logits: far apart, no sigmoid is saturated, and no two gates of a token are alike.
_CHOSEN, _OTHERS = (1.0, 3.0), -2.0


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
  """Returns the config, with receive buffers that hold whatever comes from `degree` devices.

  They stay as they are where none are limited, or where the exchange itself drops nothing.
  """
  exact = config.exchange.dropless_fallback == "layer"
  if exact or "receive_capacity" not in EXCHANGE_FIELDS[config.dispatch]:
    return config
  exchange = dataclasses.replace(config.exchange, receive_capacity=float(degree))
  return dataclasses.replace(config, exchange=exchange)


def oracle_of(config: ModelConfig) -> ModelConfig:
  """Returns the config of the same layer without an exchange of rows: the dense oracle's."""
  return config_of(dataclasses.replace(config, matmul_precision="compute_dtype"), "dense")


def split_spec(mesh) -> PartitionSpec:
  """Returns the spec of arrays [N, ...]: over `context` only where it has several devices."""
  return PartitionSpec(tuple(a for a in AXES if a != context.AXIS or mesh.shape[a] > 1))


def num_devices(mesh) -> int:
  """Returns N."""
  return math.prod(mesh.shape[axis] for axis in AXES)


def draw(
  num_devices: int, tokens: int, config: ModelConfig, exponent: float, seed: int = 0
) -> np.ndarray:
  """Draws each token's experts, int32 [N, M, K], without repetition, within the limit of groups.

  The largest of log-likelihoods plus Gumbel noise are what drawing without putting back gives: so a
  token's groups are drawn by the likelihood of all their experts, then its experts among theirs.

  Args:
    num_devices: N.
    tokens: M.
    config: of the model: n_routed_experts, num_experts_per_tok, n_group, topk_group.
    exponent: A of Zipf's law: the i-th expert, in an order drawn at random, has a likelihood
      proportional to i to the power -A; 0: all are equally likely.
    seed: of all that is random.
  """
  E, G, K = config.n_routed_experts, config.n_group, config.num_experts_per_tok
  rng = np.random.default_rng(seed)
  log_share_E = rng.permutation(-exponent * np.log(np.arange(1, E + 1)))
  log_share_G = np.log(np.exp(log_share_E).reshape(G, E // G).sum(axis=1))
  expert_NMK = np.empty((num_devices, tokens, K), np.int32)
  for expert_MK in expert_NMK:
    score_MGO = (log_share_E + rng.gumbel(size=(tokens, E))).reshape(tokens, G, E // G)
    order_MG = np.argsort(-(log_share_G + rng.gumbel(size=(tokens, G))), axis=1)
    np.put_along_axis(score_MGO, order_MG[:, config.topk_group :, None], -np.inf, axis=1)
    expert_MK[:] = np.argsort(-score_MGO.reshape(tokens, E), axis=1)[:, :K]
  return expert_NMK


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
  return parameters.specs(params, mesh), parameters.specs(bias, mesh), split_spec(mesh)


def forward(config: ModelConfig, mesh):
  """Returns a function (params, bias, x_NMD) -> (y_NMD, Outcome) of global arrays."""
  graphdef, whole, _ = parts(config)

  def layer(params, bias, x_BSD):
    gathered = parameters.gathered(context.vary(params), parameters.shapes(whole))["mlp"]
    y_BSD, stats = nnx.merge(graphdef, gathered, bias["mlp"])(x_BSD)
    dispatched = stats.dispatch
    outcome = Outcome(stats.counts_E, dispatched.dropped_rows, dispatched.sent_rows)
    return y_BSD, jax.tree.map(lambda a: a[None], outcome)

  split = split_spec(mesh)
  return mesh_lib.shard_map(REMAT[config.remat](layer), mesh, specs(config, mesh), (split, split))


def with_gradients(run):
  """Returns a function (params, bias, x, dy) -> (y, Outcome, gradients of params and x)."""

  def both(params, bias, x_NMD, dy_NMD):
    y_NMD, vjp, outcome = jax.vjp(lambda p, x: run(p, bias, x), params, x_NMD, has_aux=True)
    return y_NMD, outcome, vjp(dy_NMD)

  return both


def program(config: ModelConfig, mesh, gradients: bool = True) -> Any:
  """Returns the layer as a jitted function, with or without its gradients."""
  run = forward(config, mesh)
  options = platforms.compiler_options(mesh_lib.platform_of(mesh))
  return jax.jit(with_gradients(run) if gradients else run, compiler_options=options)


def abstract_inputs(config: ModelConfig, mesh, tokens: int):
  """Returns (params, bias, x, dy) as ShapeDtypeStructs with shardings."""
  _, params, bias = parts(config)
  shape = (num_devices(mesh), tokens, config.hidden_size)
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

  def drawn(expert_NMK, router_DE):
    key, gate_key = jax.random.split(jax.random.key(seed))
    number_E = jnp.arange(E, dtype=jnp.int32)[None, None]
    chosen_NME = functools.reduce(
      jnp.logical_or, (expert_NMK[:, :, k, None] == number_E for k in range(expert_NMK.shape[2]))
    )
    logits_NME = jax.random.uniform(
      gate_key, chosen_NME.shape, minval=_CHOSEN[0], maxval=_CHOSEN[1]
    )
    logits_NME = jnp.where(chosen_NME, logits_NME, _OTHERS)

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

  return jax.jit(drawn, out_shardings=shardings)(expert_NMK, router_DE.astype(np.float32))
