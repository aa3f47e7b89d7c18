"""Gathering the tokens of the expert axis; test_exchanges.py compares its results with loops."""

import re

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from dsmoe.config import KernelsConfig, MeshConfig
from dsmoe.parallel import dispatch
from dsmoe.parallel import mesh as mesh_lib
from dsmoe.parallel.experts import ExpertWeights
from pallas_kernels.routing import Routed, ranks
from tests.helpers import assert_close
from tests.parallel.test_dispatch import _by_loops, _config

D, E, F, K = 6, 8, 10, 3
TOKENS = PartitionSpec(("data", "expert"))
WEIGHTS = PartitionSpec("expert", "data")


def _mesh(data: int, expert: int):
  config = MeshConfig(stage=1, data=data, expert=expert, context=1, model=1)
  return mesh_lib.make_mesh(config, jax.devices()[: data * expert])


def _experts_of(kind: str, num_tokens: int, rng):
  """int32 [tokens, K], a token's experts all different."""
  if kind == "one_device":  # the last four experts have all tokens
    return np.array([4 + rng.permutation(4)[:K] for _ in range(num_tokens)], np.int32)
  if kind == "zipf":
    share = 1 / np.arange(1, E + 1) ** 1.2
    rows = [rng.choice(E, K, replace=False, p=share / share.sum()) for _ in range(num_tokens)]
    return np.array(rows, np.int32)
  if kind == "empty":
    return np.array([rng.permutation([1, 3, 6])[:K] for _ in range(num_tokens)], np.int32)
  return np.array([rng.permutation(E)[:K] for _ in range(num_tokens)], np.int32)


def _inputs(kind: str, num_tokens: int):
  rng = np.random.default_rng(3)
  x, dy = rng.standard_normal((2, num_tokens, D)).astype(np.float32)
  gates = rng.uniform(0.1, 2, (num_tokens, K)).astype(np.float32)
  draw = lambda *shape: (0.7 * rng.standard_normal(shape)).astype(np.float32)  # noqa: E731
  weights = (draw(E, D, F), draw(E, D, F), draw(E, F, D))
  return x, _experts_of(kind, num_tokens, rng), gates, weights, dy


def _run(back_end: str, mesh, config, x, experts, gates, weights, dy):
  """Returns y and the gradients of x, gates and weights, computed on a mesh."""

  def one_device(x, experts, gates, weights):
    # Stored split over both axes, gathered over `data` only: an expert stays with its owner.
    own = [jax.lax.all_gather(w, "data", axis=1, tiled=True) for w in weights]
    routed = Routed(experts, gates, *ranks(experts, E)[::-1])
    return dispatch.BACK_ENDS[back_end](x, routed, ExpertWeights(*own), config)[0]

  spec = (TOKENS, TOKENS, TOKENS, (WEIGHTS, WEIGHTS, WEIGHTS))
  split = mesh_lib.shard_map(one_device, mesh, spec, TOKENS)

  @jax.jit
  def both(x, experts, gates, weights, dy):
    y, vjp = jax.vjp(lambda x, g, w: split(x, experts, g, w), x, gates, weights)
    return y, vjp(dy)

  return jax.block_until_ready(both(x, experts, gates, weights, dy))


@pytest.mark.parametrize("implementation", ["reference", "ragged_dot", "blocked"])
def test_every_grouped_matmul(implementation):
  config = _config(kernels=KernelsConfig(grouped_matmul=implementation))
  inputs = _inputs("zipf", 12)
  assert_close(_run("all_gather", _mesh(1, 2), config, *inputs), _by_loops(*inputs))


def test_every_token_goes_to_every_other_device_once():
  """Among four devices: three remote copies of a row, and as many partial sums on the way back."""
  mesh, M = _mesh(1, 4), 5
  arguments = _inputs("even", M * 4)[:4]

  def forward(x, experts, gates, weights):
    routed = Routed(experts, gates, *ranks(experts, E)[::-1])
    return dispatch.BACK_ENDS["all_gather"](x, routed, ExpertWeights(*weights), _config())[0]

  spec = (TOKENS, TOKENS, TOKENS, (WEIGHTS, WEIGHTS, WEIGHTS))
  text = jax.jit(mesh_lib.shard_map(forward, mesh, spec, TOKENS)).lower(*arguments).compile()
  rows = {"all-gather": 0, "reduce-scatter": 0}
  for line in text.as_text().splitlines():
    found = re.search(r"= f32\[(\d+),(\d+)\]\S* (all-gather|reduce-scatter)\(", line)
    if found and int(found[2]) == D:
      rows[found[3]] += int(found[1])
  assert rows == {"all-gather": 4 * M, "reduce-scatter": M}  # of 4 M rows, 3 M come from others


def _sizes(shape: str) -> list[list[int]]:
  """Returns the dimensions of the arrays in an HLO shape."""
  return [[int(n) for n in dims.split(",") if n] for dims in re.findall(r"\[([\d,]*)\]", shape)]
