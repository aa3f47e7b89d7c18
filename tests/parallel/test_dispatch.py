import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P

from dsmoe.config import KernelsConfig, MeshConfig
from dsmoe.parallel import dense, dispatch, local
from dsmoe.parallel import mesh as mesh_lib
from dsmoe.parallel.experts import ExpertWeights
from pallas_kernels.quantized_matmul import quantized_matmul
from pallas_kernels.routing import Routed, ranks
from tests import oracles
from tests.helpers import assert_close, equations, largest_intermediate, small_config

D, E, F, K = 6, 7, 5, 3


def _experts_of(kind, M, rng):
  """int32 [M, K], a token's experts all different."""
  if kind == "skewed":  # one expert has every token, most of the others few
    weights = np.array([0, 50, 1, 20, 1, 1, 1])
    rows = [rng.choice(E, K, replace=False, p=weights / weights.sum()) for _ in range(M)]
    return np.array([[1, *[e for e in row if e != 1][: K - 1]] for row in rows], np.int32)
  if kind == "empty":  # only three experts have any, neither the first nor the last
    return np.array([rng.permutation([1, 3, 4]) for _ in range(M)], np.int32)
  return np.array([rng.permutation(E)[:K] for _ in range(M)], np.int32)


def _inputs(kind):
  rng = np.random.default_rng(0)
  M = 900 if kind == "many" else 19
  experts = _experts_of(kind, M, rng)
  x, dy = rng.standard_normal((2, M, D)).astype(np.float32)
  gates = rng.uniform(0.1, 2, (M, K)).astype(np.float32)
  draw = lambda *shape: (0.7 * rng.standard_normal(shape)).astype(np.float32)  # noqa: E731
  return x, experts, gates, (draw(E, D, F), draw(E, D, F), draw(E, F, D)), dy


def _config(**fields):
  return dataclasses.replace(small_config().model, **fields)


def _routed(experts, gates):
  return Routed(experts, gates, *ranks(experts, E)[::-1])


def _by_loops(x, experts, gates, weights, dy):
  """Returns y and the gradients of x, gates and weights, one token and choice at a time."""
  y, dx, dgates = np.zeros(x.shape), np.zeros(x.shape), np.zeros(gates.shape)
  dweights = [np.zeros(w.shape) for w in weights]
  x, gates, dy = (a.astype(np.float64) for a in (x, gates, dy))
  for m, k in np.ndindex(gates.shape):
    own = [w[experts[m, k]].astype(np.float64) for w in weights]
    y[m] += gates[m, k] * oracles.swiglu(x[m], *own)
    dx_m, dgate, *parts = oracles.swiglu_gradients(x[m], gates[m, k], *own, dy[m])
    dx[m] += dx_m
    dgates[m, k] = dgate
    for total, part in zip(dweights, parts):
      total[experts[m, k]] += part
  return y, (dx, dgates, tuple(dweights))


@pytest.mark.parametrize("kind", ["even", "skewed", "empty", "many"])
@pytest.mark.parametrize(
  "back_end, grouped_matmul",
  [("dense", None), ("local", "blocked"), ("local", "mosaic_tpu"), ("local", "ragged_dot")],
)
def test_back_ends_match_loops_in_value_and_every_gradient(back_end, grouped_matmul, kind):
  if kind == "many" and grouped_matmul == "mosaic_tpu":
    pytest.skip(
      "interpreted copies of 2,700 rows take minutes; tests/pallas_kernels has several tiles"
    )
  config = _config(kernels=KernelsConfig(grouped_matmul=grouped_matmul))
  x, experts, gates, weights, dy = _inputs(kind)

  @jax.jit
  def run(x, experts, gates, weights, dy):
    fn = dispatch.BACK_ENDS[back_end]
    y, vjp = jax.vjp(
      lambda x, g, w: fn(x, _routed(experts, g), ExpertWeights(*w), config)[0], x, gates, weights
    )
    return y, vjp(dy)

  with pltpu.force_tpu_interpret_mode():
    actual = run(x, experts, gates, weights, dy)
  assert_close(actual, _by_loops(x, experts, gates, weights, dy))


@pytest.mark.parametrize(
  "back_end, M", [("local", 1), ("local", 19), ("local", 200), ("dense", 19)]
)
def test_devices_with_the_same_tokens_sum_their_own_experts(back_end, M):
  """A token, few and many; each device's experts lie between those of other layers."""
  rng, E, devices = np.random.default_rng(M), 8, 4
  x = rng.standard_normal((M, D)).astype(np.float32)
  experts = np.stack([rng.permutation(E)[:K] for _ in range(M)]).astype(np.int32)
  gates = rng.uniform(0.1, 2, (M, K)).astype(np.float32)
  shapes = ((E, D, F), (E, D, F), (E, F, D))
  weights = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
  config = _config(dispatch=back_end, n_routed_experts=E)
  real = np.arange(M) != 3

  def one_device(x, experts, gates, *own):
    others = [jnp.full_like(w, np.nan) for w in own]
    layers = [jnp.concatenate(parts) for parts in zip(others, own, others)]
    routed = Routed(experts, gates, *ranks(experts, E)[::-1])
    of_layer = ExpertWeights(*layers, first=E // devices, num=E // devices)
    return dispatch.routed_experts(x, routed, of_layer, config, real, inference=True)[0]

  mesh = mesh_lib.make_mesh(
    MeshConfig(stage=1, data=1, expert=devices, context=1, model=1), jax.devices()[:devices]
  )
  specs = (P(), P(), P(), *[P("expert")] * 3)
  y = jax.jit(mesh_lib.shard_map(one_device, mesh, specs, P()))(x, experts, gates, *weights)
  expected = _by_loops(x, experts, gates, weights, np.zeros_like(x))[0]
  assert_close(y[real], expected[real])


def test_local_makes_nothing_of_tokens_times_experts():
  """Only the oracle may: an array [M, E, D] or [M, E, F] grows with the number of experts."""
  M, D, E, F, K = 600, 24, 32, 10, 2
  s = jax.ShapeDtypeStruct
  x, gates = s((M, D), np.float32), s((M, K), np.float32)
  weights = (s((E, D, F), np.float32), s((E, D, F), np.float32), s((E, F, D), np.float32))
  experts = np.zeros((M, K), np.int32)

  def size(fn):
    routed = lambda g: Routed(experts, g, *ranks(experts, E)[::-1])  # noqa: E731
    total = lambda x, g, w: fn(x, routed(g), ExpertWeights(*w), _config())[0].sum()  # noqa: E731
    return largest_intermediate(jax.value_and_grad(total, (0, 1, 2)), x, gates, weights)

  assert size(local.local) < M * E * F
  assert size(dense.dense) >= M * E * D


@pytest.mark.parametrize("precision, power_of_two", [("fp8", False), ("fp8_ue8m0", True)])
def test_experts_in_fp8_match_a_loop_over_experts(precision, power_of_two):
  x, experts, gates, weights, dy = _inputs("empty")
  kernels = KernelsConfig(quantized_matmul="xla")
  config = _config(matmul_precision=precision, kernels=kernels)
  matmul = functools.partial(
    quantized_matmul, implementation="xla", power_of_two_scales=power_of_two
  )

  def expected(x, gates, weights):
    y = jnp.zeros_like(x)
    for e in sorted(set(experts.reshape(-1).tolist())):
      m, k = np.nonzero(experts == e)
      gate, up = (matmul(x[m], w[e]) for w in weights[:2])
      inner = jax.nn.silu(gate) * up * gates[m, k][:, None]
      y = y.at[m].add(matmul(inner, weights[2][e]))
    return y

  def value_and_gradients(fn):
    y, vjp = jax.vjp(fn, *jax.tree.map(jnp.asarray, (x, gates, weights)))
    return y, vjp(dy)

  actual = value_and_gradients(
    jax.jit(lambda x, g, w: local.local(x, _routed(experts, g), ExpertWeights(*w), config)[0])
  )
  assert_close(actual, value_and_gradients(jax.jit(expected)))


def test_experts_in_fp8_are_those_of_the_kernel_that_the_config_names():
  """Whose values tests/pallas_kernels/test_quantized_routed.py compares."""
  x, experts, gates, weights, _ = _inputs("empty")

  def kernels(implementation):
    named = KernelsConfig(quantized_matmul=implementation)
    config = _config(matmul_precision="fp8", kernels=named)
    fn = lambda x, g, w: local.local(x, _routed(experts, g), ExpertWeights(*w), config)[0]  # noqa: E731
    found = equations(jax.make_jaxpr(fn)(x, gates, weights).jaxpr)
    return {e.params["name"] for e in found if e.primitive.name == "pallas_call"}

  assert kernels("xla") == set()
  assert kernels("mosaic_tpu") >= {"quantized_permute", "quantized_swiglu_in", "combine"}
