import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsmoe.config import MeshConfig
from dsmoe.model import moe, parameters
from dsmoe.parallel import mesh as mesh_lib
from dsmoe.training import balance, hyperparameters
from tests import oracles
from tests.helpers import assert_close, small_config

B, S = 2, 7


def _moe(**changes):
  config = dataclasses.replace(small_config().model, **changes)
  graphdef, shapes = nnx.split(nnx.eval_shape(lambda: moe.MoE(config, nnx.Rngs(params=0))))
  rng = np.random.default_rng(0)
  draw = lambda x: (0.3 * rng.standard_normal(x.shape)).astype(np.float32)  # noqa: E731
  return config, graphdef, jax.tree.map(draw, nnx.to_pure_dict(shapes))


def _run(graphdef, state, x):
  config = small_config(**{"balance.sequence_loss_weight": 1.0})
  balancer = balance.make(config.balance.methods, hyperparameters.of(config))
  run = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x, moe.MoEOptions(balancer.loss)))
  return run(state, x)


@pytest.mark.parametrize(
  "changes",
  [
    dict(),
    dict(n_shared_experts=0, scoring_func="softmax", topk_method="group_limited_greedy"),
  ],
  ids=str,
)
def test_moe_matches_loops(changes):
  config, graphdef, state = _moe(**changes)
  assert ("shared" in state) == bool(config.n_shared_experts)
  assert ("router_bias" in state) == (config.topk_method == "noaux_tc")
  x = np.random.default_rng(1).standard_normal((B, S, config.hidden_size)).astype(np.float32)
  y, stats = _run(graphdef, state, x)
  assert stats.dispatch == (0, 0, 0)
  flat = x.reshape(B * S, -1)
  expected, experts = oracles.moe(state, state.get("router_bias"), flat, config)
  assert_close(y, expected.reshape(x.shape))
  E, per_group = config.n_routed_experts, config.n_routed_experts // config.n_group
  assert stats.counts_E.tolist() == [int((experts == e).sum()) for e in range(E)]
  touched = [len({int(e) // per_group for e in row}) for row in experts]
  assert_close(stats.groups_per_token, np.mean(touched))


def test_parameters_of_two_shared_experts_are_one_wide_one():
  _, _, state = _moe()
  D, E, F = 40, 12, 18
  shapes = jax.tree.map(lambda x: x.shape, state, is_leaf=lambda x: isinstance(x, np.ndarray))
  expert = {"w_gate": (E, D, F), "w_up": (E, D, F), "w_down": (E, F, D)}
  shared = {"w_gate": (D, 2 * F), "w_up": (D, 2 * F), "w_down": (2 * F, D)}
  assert shapes == {"router": (D, E), "router_bias": (E,), "experts": expert, "shared": shared}


def test_the_balance_loss_sees_no_bias():
  """Equations 17-20 count the choices of unbiased scores; the real choices are biased."""
  config, graphdef, state = _moe()
  x = np.random.default_rng(2).standard_normal((B, S, config.hidden_size)).astype(np.float32)
  state["router_bias"] = np.zeros(12, np.float32)
  _, plain = _run(graphdef, state, x)
  state["router_bias"] = np.arange(12, dtype=np.float32)
  _, biased = _run(graphdef, state, x)
  assert biased.counts_E.tolist() == [0] * 9 + [B * S] * 3 != plain.counts_E.tolist()
  assert_close(biased.balance_loss, plain.balance_loss)
  assert float(plain.balance_loss) > 0


def test_gradient_reaches_the_router_and_not_its_bias():
  config, graphdef, state = _moe()
  x = np.random.default_rng(3).standard_normal((B, S, config.hidden_size)).astype(np.float32)
  gradient = jax.jit(jax.grad(lambda s: jnp.sum(jnp.square(nnx.merge(graphdef, s)(x)[0]))))(state)
  assert np.abs(gradient["router"]).max() > 0
  np.testing.assert_array_equal(gradient["router_bias"], np.zeros(12))


@pytest.mark.parametrize("inner", [pytest.param(256, marks=pytest.mark.slow), 160])
def test_fp8_with_inner_sizes_split_over_devices(inner):
  """Codes are alike where each device's part is whole tiles of 128, else within FP8's rounding."""
  config, graphdef, state = _moe(matmul_precision="fp8", moe_intermediate_size=inner)
  rng = np.random.default_rng(2)
  x, dy = rng.standard_normal((2, B, S, config.hidden_size)).astype(np.float32)
  whole_tiles = inner % 256 == 0

  def outputs(num_devices):
    sizes = MeshConfig(stage=1, data=1, expert=1, context=1, model=num_devices)
    mesh = mesh_lib.make_mesh(sizes, jax.devices()[:num_devices])
    specs, rows = parameters.specs({"mlp": state}, mesh)["mlp"], mesh_lib.batch_spec()

    def run(state, x, dy):
      def total(state, x):
        y, stats = nnx.merge(graphdef, state)(x)
        return jnp.sum(y * dy), (y, stats.counts_E)

      if not whole_tiles:  # gradients, which compile for seconds, are not compared
        _, (y, counts_E) = total(state, x)
        return counts_E[None], y, ()
      gradients, (y, counts_E) = jax.grad(total, (0, 1), has_aux=True)(state, x)
      return counts_E[None], y, gradients

    out = (rows, rows, (specs, rows) if whole_tiles else ())
    return jax.device_get(
      jax.jit(mesh_lib.shard_map(run, mesh, (specs, rows, rows), out))(state, x, dy)
    )

  (counts, *expected), (counts_split, *actual) = outputs(1), outputs(2)
  np.testing.assert_array_equal(counts_split, counts)
  if whole_tiles:
    assert_close(actual, expected)
  else:
    error = np.linalg.norm(actual[0] - expected[0]) / np.linalg.norm(expected[0])
    assert 1e-4 < error < 0.1
