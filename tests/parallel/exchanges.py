"""Runs a back end on a mesh of CPU devices; one compiled program serves every routing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from dsmoe.compilers import compile_only
from dsmoe.config import ExchangeConfig, KernelsConfig, MeshConfig
from dsmoe.parallel import dispatch
from dsmoe.parallel import mesh as mesh_lib
from dsmoe.parallel.experts import ExpertWeights
from dsmoe.parallel.stats import DispatchStats
from pallas_kernels.routing import Routed, Rule, ranks, route
from tests.pallas_kernels.topologies import tpu_devices
from tests.parallel.test_all_gather import TOKENS, WEIGHTS, _mesh
from tests.parallel.test_dispatch import _config


@functools.cache
def program(config, data: int, expert: int, twice: bool = False):
  """Returns the jitted function of x, experts, gates, weights and dy.

  Args:
    config: a `ModelConfig`, whose `dispatch` names the back end.
    data, expert: devices along these axes.
    twice: two equal layers after each other, scanned, of which only the first's input is kept.

  The function returns (y, gradients of x, gates and weights), and the stats of each device.
  """

  def layer(x, experts, gates, weights):
    # Stored split over both axes, gathered over `data` only: an expert stays with its owner.
    own = [jax.lax.all_gather(w, "data", axis=1, tiled=True) for w in weights]
    routed = Routed(experts, gates, *ranks(experts, own[0].shape[0] * expert)[::-1])
    y, stats = dispatch.BACK_ENDS[config.dispatch](x, routed, ExpertWeights(*own), config)
    return y, jnp.stack(stats)[None]

  def one_device(x, *rest):
    if not twice:
      return layer(x, *rest)
    y, stats = jax.lax.scan(jax.checkpoint(lambda x, _: layer(x, *rest)), x, None, length=2)
    return y, stats[0]

  spec = (TOKENS, TOKENS, TOKENS, (WEIGHTS, WEIGHTS, WEIGHTS))
  devices = PartitionSpec(("data", "expert"))
  split = mesh_lib.shard_map(one_device, _mesh(data, expert), spec, (TOKENS, devices))

  @jax.jit
  def both(x, experts, gates, weights, dy):
    apply = lambda x, gates, weights: split(x, experts, gates, weights)  # noqa: E731
    y, vjp, stats = jax.vjp(apply, x, gates, weights, has_aux=True)
    return (y, vjp(dy)), stats

  def run(*inputs):
    result, stats = jax.block_until_ready(both(*inputs))
    return result, DispatchStats(*np.asarray(stats).T)

  return run


def tpu_gradients(back_end: str, data: int, expert: int, M: int, D: int, E: int, F: int, K: int):
  """Returns the HLO of value and gradients, in bfloat16 with our kernels, for four v5p chips.

  Args:
    back_end: by name; a group of `hierarchical` is one device.
    data, expert: devices along these axes.
    M, D, E, F, K: tokens a device, hidden size, experts, their inner size, experts a token.
  """
  axes = MeshConfig(stage=1, data=data, expert=expert, context=1, model=1)
  mesh = mesh_lib.make_mesh(axes, tpu_devices("v5p:2x2x1"))
  group = ExchangeConfig(devices_per_group=1) if back_end == "hierarchical" else ExchangeConfig()
  config = _config(
    dispatch=back_end,
    exchange=group,
    kernels=KernelsConfig(grouped_matmul="mosaic_tpu"),
    n_group=2,
    n_routed_experts=E,
    num_experts_per_tok=K,
  )
  rule = Rule(K, 2, 1, "top2", "sigmoid", True, 2.5)

  def one_device(x, logits, *weights):
    own = [jax.lax.all_gather(w, "data", axis=1, tiled=True) for w in weights]
    routed = route(logits, None, rule, "mosaic_tpu")
    return dispatch.BACK_ENDS[back_end](x, routed, ExpertWeights(*own), config)[0]

  specs = (TOKENS, TOKENS, WEIGHTS, WEIGHTS, WEIGHTS)
  split = mesh_lib.shard_map(one_device, mesh, specs, TOKENS)
  rows = data * expert * M
  shapes = [(rows, D), (rows, E), (E, D, F), (E, D, F), (E, F, D)]
  dtypes = [jnp.bfloat16, jnp.float32, *[jnp.bfloat16] * 3]
  args = [
    jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
    for shape, dtype, spec in zip(shapes, dtypes, specs)
  ]

  def gradients(*args):
    y, vjp = jax.vjp(split, *args)
    return y, vjp(y)

  return compile_only.compile_lowered(jax.jit(gradients).lower(*args)).as_text()
