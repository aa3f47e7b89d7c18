"""Gathered weights, and their gradients, on meshes of several devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from dsmoe.config import MeshConfig
from dsmoe.model import parameters
from dsmoe.parallel import collectives
from dsmoe.parallel import mesh as mesh_lib
from tests.helpers import assert_close, equations


def _mesh(data: int, expert: int, model: int):
  config = MeshConfig(stage=1, data=data, expert=expert, context=1, model=model)
  return mesh_lib.make_mesh(config, jax.devices()[: data * expert * model])


@pytest.mark.parametrize("sizes", [(4, 1, 1), (2, 2, 1), (2, 2, 2)], ids=str)
def test_gather_gives_whole_weights_and_its_gradient_reduce_scatters(sizes):
  mesh, (shards, owners, parts) = _mesh(*sizes), sizes
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
  params = {
    "attention": {"o_proj": draw(6, 10, 8)},
    "norm": draw(5),
    "mlp": {"experts": {"w_gate": draw(6, 4, 14)}, "w_up": draw(8, 12), "router": draw(8, 6)},
  }
  specs, shapes = parameters.specs(params, mesh), parameters.shapes(params)
  # Each device multiplies what it gathered by numbers of its own.
  rows = shards * owners
  factors = {
    "attention": {"o_proj": draw(rows, 6, 10, 8)},
    "norm": draw(rows, 5),
    "mlp": {
      "experts": {"w_gate": draw(shards, 6, 4, 14)},
      "w_up": draw(rows, 8, 12),
      "router": draw(rows, 8, 6),
    },
  }
  batch, model = ("data", "expert"), "model" if parts > 1 else None
  factor_specs = {
    "attention": {"o_proj": P(batch, model)},
    "norm": P(batch),
    # An expert has one owner along `expert`; the router's scores are everybody's.
    "mlp": {
      "experts": {"w_gate": P("data", "expert", None, model)},
      "w_up": P(batch, None, model),
      "router": P(batch),
    },
  }

  def loss(params, factors):
    def total(params):
      whole = parameters.gathered(params, shapes)
      assert whole["attention"]["o_proj"].shape == (6 // parts, 10, 8)
      assert whole["mlp"]["experts"]["w_gate"].shape == (6 // owners, 4, 14 // parts)
      assert whole["mlp"]["w_up"].shape == (8, 12 // parts)
      assert whole["mlp"]["router"].shape == (8, 6)
      sums = jax.tree.map(lambda a, f: jnp.sum(a * f[0]), whole, factors)
      alike = sums["norm"], sums["mlp"].pop("router")
      sums = collectives.sum_over_model((sums["attention"], sums["mlp"])), alike
      return sum(jax.tree.leaves(sums)), sums

    (_, sums), gradients = jax.value_and_grad(total, has_aux=True)(params)
    return collectives.sum_over_batch(sums), gradients

  run = mesh_lib.shard_map(loss, mesh, (specs, factor_specs), (P(), specs))
  sums, gradients = jax.jit(run)(params, factors)
  summed = jax.tree.map(lambda f: f.astype(np.float64).sum(axis=0), factors)
  assert_close(gradients, summed)
  expected = jax.tree.map(lambda a, s: (a * s).sum(), params, summed)
  alike = expected["norm"], expected["mlp"].pop("router")
  assert_close(sums, ((expected["attention"], expected["mlp"]), alike))
  # What is as large as a weight is scattered; only scalars and vectors are summed whole.
  found = list(equations(jax.make_jaxpr(run)(params, factors).jaxpr))
  names = [e.primitive.name for e in found]
  assert "reduce_scatter" in names and "all_gather" in names
  sums = [e for e in found if e.primitive.name.startswith("psum")]
  assert sums and all(v.aval.size <= 5 for e in sums for v in e.outvars)
