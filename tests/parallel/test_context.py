"""Rows split over the mesh axis `context`: the order, the gather, and what a layer exchanges."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dsmoe.compilers import hlo
from dsmoe.config import MeshConfig
from dsmoe.model import attention, rope
from dsmoe.parallel import context
from dsmoe.parallel import mesh as mesh_lib
from pallas_kernels import varying
from tests.helpers import assert_close, small_config
from tests.pallas_kernels.topologies import tpu_devices

ROWS, OWN = P("data"), P("data", "context")


def _mesh(data: int, context: int, devices=None):
  config = MeshConfig(stage=1, data=data, expert=1, context=context, model=1)
  return mesh_lib.make_mesh(config, (devices or jax.devices())[: data * context])


def _order(S: int, X: int) -> list[int]:
  """The places of a row's tokens, device after device."""
  chunk, places = S // (2 * X), []
  for device in range(X):
    for number in (device, 2 * X - 1 - device):
      places += range(number * chunk, (number + 1) * chunk)
  return places


@pytest.mark.parametrize("X", [2, 4])
def test_the_order_the_gather_and_its_gradient(X):
  B, S, mesh = 4, 24, _mesh(2, X)
  rng = np.random.default_rng(0)
  x_BSx, factor_XBSx = (rng.standard_normal((*n, B, S, 3)).astype(np.float32) for n in ((), (X,)))

  def both(x_BSx, factor_1BSx):
    own = context.own_tokens({"x": x_BSx, "number": x_BSx[..., 0]})
    starts_2 = context.own_starts(own["x"].shape[1])

    def loss(x):
      return jnp.sum(context.whole_rows(x) * factor_1BSx[0])

    whole, gradient = context.whole_rows(own["x"]), jax.grad(loss)(own["x"])
    return own, whole[None], gradient, starts_2

  out = ({"x": OWN, "number": OWN}, P("context", "data"), OWN, P("context"))
  specs = (ROWS, P("context", "data"))
  fn = jax.jit(mesh_lib.shard_map(both, mesh, specs, out))
  own, whole, gradient, starts = jax.device_get(fn(x_BSx, factor_XBSx))
  order = _order(S, X)
  assert sorted(order) == list(range(S))
  np.testing.assert_array_equal(own["x"], x_BSx[:, order])
  np.testing.assert_array_equal(own["number"], x_BSx[:, order, 0])
  np.testing.assert_array_equal(whole, np.broadcast_to(x_BSx, whole.shape))
  assert_close(gradient, factor_XBSx.sum(axis=0)[:, order])
  chunk = S // (2 * X)
  assert starts.tolist() == [order[i * chunk] for i in range(2 * X)]
  # Every device's queries see equally many keys.
  seen = [sum(place + 1 for place in order[i * S // X : (i + 1) * S // X]) for i in range(X)]
  assert len(set(seen)) == 1


def test_rows_that_do_not_divide_are_refused():
  fn = mesh_lib.shard_map(context.own_tokens, _mesh(2, 4), ROWS, OWN)
  with pytest.raises(ValueError, match=r"\(12\) must be divisible by twice the devices .* \(4\)"):
    jax.eval_shape(fn, jax.ShapeDtypeStruct((2, 12), jnp.int32))


def test_outside_a_mesh_rows_stay_whole():
  x = jnp.ones((2, 5, 3))
  assert context.own_tokens(x) is x and context.whole_rows(x) is x
  assert context.sum_over_rows(x) is x and context.vary(x) is x
  assert context.own_starts(5) is None and context.sum_gradients(x, x) is x


def _layer_gradient(mesh, B: int, S: int, **changes):
  """Returns an attention layer's config and the HLO of its gradient, the weights' not summed."""
  config = small_config(**{f"model.{name}": value for name, value in changes.items()}).model
  graphdef, params = nnx.split(nnx.eval_shape(lambda: attention.MLA(config, nnx.Rngs(params=0))))

  def gradient(params, x_BsD, positions_BS):
    cos_sin = rope.cos_sin(context.own_tokens(positions_BS), config)

    def loss(params, x_BsD):
      y_BsD, _ = nnx.merge(graphdef, params)(x_BsD, cos_sin, attention.within_rows(None))
      return jnp.sum(jnp.sin(y_BsD.astype(jnp.float32)))

    own = varying.varying_like(params, x_BsD)
    dparams, dx_BsD = jax.grad(loss, argnums=(0, 1))(own, x_BsD)
    return jax.tree.map(lambda g: g[None], dparams), dx_BsD

  def struct(shape, dtype, spec):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

  args = (
    jax.tree.map(lambda w: struct(w.shape, config.compute_dtype, P()), nnx.to_pure_dict(params)),
    struct((B, S, config.hidden_size), config.compute_dtype, OWN),
    struct((B, S), jnp.int32, ROWS),
  )
  fn = mesh_lib.shard_map(gradient, mesh, (P(), OWN, ROWS), (P(("data", "context")), OWN))
  return config, jax.jit(fn).lower(*args).compile().as_text()


def _collectives(text: str, X: int) -> list[tuple[str, int]]:
  """Returns every collective of a program and the elements of its result, in alphabetical order.

  A TPU's reduce-scatter is an all-reduce inside a computation of that name, before its slice.
  """
  names = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
  found = []
  for computation, instructions in hlo.parse(text)[0].items():
    for instruction in instructions:
      name = instruction.opcode.removesuffix("-start")
      if name in names:
        arrays = re.findall(r"\[([\d,]*)\]", instruction.shape)
        size = max(math.prod(int(n) for n in dims.split(",") if n) for dims in arrays)
        if name == "all-reduce" and "all-reduce-scatter" in computation:
          name, size = "reduce-scatter", size // X
        found.append((name, size))
  return sorted(found)


@pytest.mark.parametrize("X", [2, 4])
def test_a_layer_gathers_latents_and_scatters_their_gradient(X):
  """Each device receives (X - 1) / X of S (C + R) numbers a row, and nothing else crosses."""
  rows, S, C, R = 2, 48, 16, 8
  config, text = _layer_gradient(_mesh(2, X), 2 * rows, S)
  assert (config.kv_lora_rank, config.qk_rope_head_dim) == (C, R)
  latents = rows * S * (C + R)  # of which a device has 1 / X itself
  expected = [("all-gather", latents), ("reduce-scatter", latents // X)]
  assert _collectives(text, X) == expected


@pytest.mark.tpu
def test_a_layer_of_v5p_gathers_latents_and_sums_no_rows():
  B, S, X, C, R = 2, 4096, 4, 128, 64
  mesh = _mesh(1, X, tpu_devices("v5p:2x2x1"))
  changes = {"kv_lora_rank": C, "qk_rope_head_dim": R, "compute_dtype": "bfloat16"}
  _, text = _layer_gradient(mesh, B, S, **changes, **{"kernels.attention": "mosaic_tpu"})
  assert text.count("tpu_custom_call") == 2
  latents = B * S * (C + R)
  expected = [("all-gather", latents), ("reduce-scatter", latents // X)]
  assert _collectives(text, X) == expected
