"""FLOPs of traced programs, against counts by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import PartitionSpec

from dsmoe.compilers import jaxpr_flops
from tests.helpers import mesh_of

M, K, N = 6, 10, 14
X, W = jax.ShapeDtypeStruct((M, K), "float32"), jax.ShapeDtypeStruct((K, N), "float32")
SQUARE = jax.ShapeDtypeStruct((K, K), "float32")
ONCE, TURN = 2 * M * K * N, 2 * M * K * K


def counted(fn, *args):
  return jaxpr_flops.count(jax.jit(fn).trace(*args).jaxpr)


def loop(x, w):
  return jax.lax.scan(lambda x, _: (jnp.sin(x @ w), None), x, None, length=5)[0]


def branches(x, w):
  return jax.lax.cond(x[0, 0] > 0, lambda: x @ w, lambda: (x @ w) @ w)


def as_often_as_the_data_say(x, w):
  return jax.lax.while_loop(lambda x: x[0, 0] > 0, lambda x: x @ w, x)


def split(x, w):
  rows = PartitionSpec("data")
  mesh = mesh_of(2)
  return jax.shard_map(jnp.dot, mesh=mesh, in_specs=(rows, PartitionSpec()), out_specs=rows)(x, w)


def kernel(x, w, cost=None):
  def body(x_ref, w_ref, y_ref):
    y_ref[...] = x_ref[...] @ w_ref[...]

  shape = jax.ShapeDtypeStruct((M, N), x.dtype)
  return pl.pallas_call(body, out_shape=shape, cost_estimate=cost)(x, w)


def mosaic_gpu_kernel(x, w):
  def body(x_ref, y_ref):
    y_ref[...] = x_ref[...]

  return plgpu.kernel(body, out_type=jax.ShapeDtypeStruct(x.shape, x.dtype))(x) @ w


def declared(x, w):
  return kernel(x, w, pl.CostEstimate(flops=77, bytes_accessed=0, transcendentals=0)) + x @ w


@pytest.mark.parametrize(
  "fn, w, expected",
  [
    (jnp.dot, W, ONCE),
    (loop, SQUARE, 5 * TURN),
    (branches, SQUARE, 2 * TURN),
    (split, W, ONCE // 2),
    (declared, W, 77 + ONCE),
    (kernel, W, None),
    (mosaic_gpu_kernel, W, None),
    (as_often_as_the_data_say, SQUARE, None),
    # Value, the value again and two gradients a round.
    (
      jax.value_and_grad(lambda x, w: jnp.sum(jax.checkpoint(loop)(x, w)), (0, 1)),
      SQUARE,
      20 * TURN,
    ),
  ],
)
def test_products_are_counted_as_often_as_they_run(fn, w, expected):
  assert counted(fn, X, w) == expected


def test_a_row_of_a_grouped_product_counts_once():
  w = jax.ShapeDtypeStruct((3, K, N), "float32")
  sizes = jax.ShapeDtypeStruct((3,), "int32")
  assert counted(jax.lax.ragged_dot, X, w, sizes) == ONCE

  def gradients(x, w, sizes):
    return jax.value_and_grad(lambda *p: jnp.sum(jax.lax.ragged_dot(*p, sizes) ** 2), (0, 1))(x, w)

  assert counted(gradients, X, w, sizes) == 3 * ONCE


def test_a_loop_without_products_is_known():
  fn = lambda x, w: jax.lax.while_loop(lambda x: x[0, 0] > 0, jnp.sin, x) @ w  # noqa: E731
  assert counted(fn, X, W) == ONCE
