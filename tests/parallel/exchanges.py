"""Runs a back end on a mesh of CPU devices; one compiled program serves every routing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from dsmoe.parallel import dispatch
from dsmoe.parallel import mesh as mesh_lib
from dsmoe.parallel.experts import ExpertWeights
from dsmoe.parallel.stats import DispatchStats
from pallas_kernels.routing import Routed, ranks
from tests.parallel.test_all_gather import TOKENS, WEIGHTS, _mesh


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
