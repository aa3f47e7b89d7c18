"""Gathered weights, and their gradients, on meshes of several devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from dsmoe.model import parameters
from dsmoe.parallel import collectives
from dsmoe.parallel import mesh as mesh_lib
from tests.helpers import assert_close, equations, mesh_of


def _two_by_two():
  """Devices 2 along `data` and 2 along `expert`, which no config may ask for yet."""
  devices = np.array(jax.devices()[:4]).reshape(1, 2, 2, 1, 1)
  return Mesh(devices, mesh_lib.AXES, axis_types=(AxisType.Auto,) * 5)


@pytest.mark.parametrize("make_mesh", [lambda: mesh_of(4), _two_by_two], ids=["4", "2x2"])
def test_gather_gives_whole_weights_and_its_gradient_reduce_scatters(make_mesh):
  mesh = make_mesh()
  owners = mesh.shape["expert"]
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
  params = {
    "attention": {"o_proj": draw(3, 10, 8)},
    "norm": draw(5),
    "mlp": {"experts": {"w_gate": draw(6, 4, 7)}, "router": draw(8, 6)},
  }
  specs = parameters.specs(params)
  # Each device multiplies what it gathered by numbers of its own.
  factors = {
    "attention": {"o_proj": draw(4, 3, 10, 8)},
    "norm": draw(4, 5),
    "mlp": {
      "experts": {"w_gate": draw(mesh.shape["data"], 6, 4, 7)},
      "router": draw(4, 8, 6),
    },
  }
  batch = mesh_lib.batch_spec()
  factor_specs = {
    "attention": {"o_proj": batch},
    "norm": batch,
    # An expert has one owner along `expert`; the router's scores are everybody's.
    "mlp": {"experts": {"w_gate": P("data", "expert")}, "router": batch},
  }

  def loss(params, factors):
    def total(params):
      whole = parameters.gathered(params)
      assert whole["attention"]["o_proj"].shape == (3, 10, 8)
      assert whole["mlp"]["experts"]["w_gate"].shape == (6 // owners, 4, 7)
      assert whole["mlp"]["router"].shape == (8, 6)
      parts = jax.tree.map(lambda a, f: jnp.sum(a * f[0]), whole, factors)
      return sum(jax.tree.leaves(parts)), parts

    (_, parts), gradients = jax.value_and_grad(total, has_aux=True)(params)
    return collectives.sum_over_batch(parts), gradients

  run = mesh_lib.shard_map(loss, mesh, (specs, factor_specs), (P(), specs))
  parts, gradients = jax.jit(run)(params, factors)
  summed = jax.tree.map(lambda f: f.astype(np.float64).sum(axis=0), factors)
  assert_close(gradients, summed)
  expected = jax.tree.map(lambda a, s: (a * s).sum(), params, summed)
  assert_close(parts, expected)
  # What is as large as a weight is scattered; only scalars and vectors are summed whole.
  found = list(equations(jax.make_jaxpr(run)(params, factors).jaxpr))
  names = [e.primitive.name for e in found]
  assert "reduce_scatter" in names and "all_gather" in names
  sums = [e for e in found if e.primitive.name.startswith("psum")]
  assert sums and all(v.aval.size <= 5 for e in sums for v in e.outvars)
