"""Types inside `shard_map`: what varies over which mesh axes."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from pallas_kernels.varying import vary_alike, varying_axes, varying_like, zeros_like_operands


def _axes(*arrays):
  return [set(jax.typeof(a).manual_axis_type.varying) for a in arrays]


def _inside(fn, specs, *args):
  """Runs fn inside shard_map over two axes; what it returns stays on its device."""
  mesh = jax.make_mesh((2, 4), ("data", "expert"), (jax.sharding.AxisType.Auto,) * 2)
  out = P(("data", "expert"))
  sharded = jax.shard_map(fn, mesh=mesh, in_specs=specs, out_specs=out, check_vma=True)
  return jax.jit(sharded)(*args)


def test_operands_come_to_vary_over_the_axes_of_any():
  seen = {}

  def fn(x, y, w):
    tree = {"y": y, "w": w}
    seen["axes"] = varying_axes(x, tree)
    x_alike, tree_alike = vary_alike(x, tree)
    seen["before"], seen["after"] = _axes(x, y, w), _axes(x_alike, *tree_alike.values())
    return x_alike + tree_alike["y"][:1] + tree_alike["w"]

  specs = (P("data"), P("expert"), P())
  _inside(fn, specs, jnp.ones(2), jnp.ones(4), jnp.ones(1))
  assert seen["axes"] == {"data", "expert"}
  assert seen["before"] == [{"data"}, {"expert"}, set()]
  assert seen["after"] == [{"data", "expert"}] * 3


def test_results_and_zeros_vary_like_operands():
  seen = {}

  def fn(x, y, w):
    struct = jax.ShapeDtypeStruct((3,), jnp.bfloat16)
    structs = varying_like([struct, {"one": struct}], x, w)
    seen["structs"] = [
      (s.shape, s.dtype, set(s.manual_axis_type.varying)) for s in jax.tree.leaves(structs)
    ]
    zeros = zeros_like_operands((2, 3), jnp.int32, y, {"w": w})
    both = varying_like(w, x, y)
    seen["arrays"] = _axes(zeros, both, varying_like(x, w))
    seen["zeros"] = zeros.shape, zeros.dtype
    return both + zeros[0, :1]

  specs = (P("data"), P("expert"), P())
  out = _inside(fn, specs, jnp.ones(2), jnp.ones(4), jnp.full(1, 5.0))
  assert seen["structs"] == [((3,), jnp.bfloat16, {"data"})] * 2
  # An array keeps what it varies over already.
  assert seen["arrays"] == [{"expert"}, {"data", "expert"}, {"data"}]
  assert seen["zeros"] == ((2, 3), jnp.int32)
  np.testing.assert_array_equal(out, np.full(8, 5.0))


def test_the_gradient_of_a_shared_operand_is_summed_over_devices():
  def fn(x, w):
    def loss(w):
      x_alike, w_alike = vary_alike(x, w)
      return jax.lax.psum(jnp.sum(x_alike * w_alike), ("data", "expert"))

    return varying_like(jax.grad(loss)(w), x)

  x = jnp.arange(8.0)
  gradients = _inside(fn, (P(("data", "expert")), P()), x, jnp.ones(1))
  np.testing.assert_array_equal(gradients, np.full(8, 28.0))


def test_outside_shard_map_nothing_changes():
  x, struct = jnp.ones(3), jax.ShapeDtypeStruct((2,), jnp.float32)
  assert varying_axes(x) == frozenset()
  assert vary_alike(x)[0] is x
  assert varying_like(x, x) is x
  assert varying_like(struct, x).shape == (2,)
  assert not zeros_like_operands((2,), jnp.float32, x).any()
