import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsmoe.model import layers
from pallas_kernels.quantized_matmul import quantized_matmul
from tests import oracles
from tests.helpers import assert_close, small_config


def test_rms_norm_matches_a_loop_in_value_and_gradient():
  rng = np.random.default_rng(0)
  B, S, D, eps = 2, 3, 7, 0.1  # an eps that matters
  x, dy = rng.standard_normal((2, B, S, D)).astype(np.float32)
  scale = rng.standard_normal(D).astype(np.float32)
  y, vjp = jax.vjp(lambda x, scale: layers.rms_norm(x, scale, eps), x, scale)
  dx, dscale = vjp(jnp.asarray(dy))
  expected = np.zeros((B, S, D))
  expected_dx, expected_dscale = np.zeros((B, S, D)), np.zeros(D)
  for b, s in np.ndindex(B, S):
    row, g = x[b, s].astype(np.float64), dy[b, s].astype(np.float64)
    expected[b, s] = oracles.rms_norm(row, scale, eps)
    r = 1 / np.sqrt((row**2).mean() + eps)
    expected_dscale += g * row * r
    expected_dx[b, s] = r * g * scale - r**3 * row * (g * scale * row).mean()
  assert_close(y, expected)
  assert_close((dx, dscale), (expected_dx, expected_dscale))


def test_rms_norm_computes_in_float32():
  """Squares of these overflow float16; the small differences drown in bfloat16."""
  x = jnp.asarray([[300.0, 400.0]], jnp.float16)
  y = layers.rms_norm(x, jnp.ones(2), 1e-6)
  assert y.dtype == jnp.float16
  np.testing.assert_allclose(np.asarray(y, np.float32), [[0.8485, 1.1314]], rtol=1e-3)
  scale = jnp.asarray([1.0 + 2.0**-10, 1.0])  # not a bfloat16 number
  y = layers.rms_norm(jnp.asarray([[1.0, 1.0]], jnp.float32), scale, 0.0)
  assert_close(y, np.array([[1.0 + 2.0**-10, 1.0]]))


def test_swiglu_matches_a_loop_in_value_and_gradient():
  rng = np.random.default_rng(1)
  D, F, B, S = 5, 7, 2, 3
  config = dataclasses.replace(small_config().model, hidden_size=D, initializer_range=0.5)
  module = layers.SwiGLU(config, F, nnx.Rngs(params=0))
  weights = [np.asarray(w[...]) for w in (module.w_gate, module.w_up, module.w_down)]
  assert [w.shape for w in weights] == [(D, F), (D, F), (F, D)]
  x, dy = rng.standard_normal((2, B, S, D)).astype(np.float32)

  graphdef, state = nnx.split(module)
  y, vjp = jax.vjp(lambda x, state: nnx.merge(graphdef, state)(x), jnp.asarray(x), state)
  dx, dstate = vjp(jnp.asarray(dy))
  expected = np.stack([[oracles.swiglu(x[b, s], *weights) for s in range(S)] for b in range(B)])
  assert_close(y, expected)
  expected_dx, sums = np.zeros((B, S, D)), [0.0, 0.0, 0.0]
  w64 = [w.astype(np.float64) for w in weights]
  for b, s in np.ndindex(B, S):
    dx_row, _, *dw = oracles.swiglu_gradients(x[b, s], 1.0, *w64, dy[b, s])
    expected_dx[b, s] = dx_row
    sums = [total + part for total, part in zip(sums, dw)]
  assert_close(dx, expected_dx)
  names = ("w_gate", "w_up", "w_down")
  assert_close([dstate[name][...] for name in names], sums)


def test_initial_weights_have_their_standard_deviation():
  w = np.asarray(layers.normal(nnx.Rngs(params=3), (200, 300), 0.02)[...])
  assert w.dtype == np.float32
  assert abs(w.std() / 0.02 - 1) < 0.02 and abs(w.mean()) < 5e-4
  assert np.asarray(layers.ones(3)[...]).tolist() == [1, 1, 1]
  assert np.asarray(layers.zeros(2)[...]).tolist() == [0, 0]


def test_project_is_the_contraction_in_value_and_gradient():
  keys = jax.random.split(jax.random.key(8), 3)
  x, w = jax.random.normal(keys[0], (2, 3, 5)), jax.random.normal(keys[1], (5, 4, 7))
  y, vjp = jax.vjp(functools.partial(layers.project, config=small_config().model), x, w)
  dy = jax.random.normal(keys[2], y.shape)
  dx, dw = vjp(dy)
  assert_close(y, np.einsum("bsd,dha->bsha", x, w))
  assert_close(dx, np.einsum("bsha,dha->bsd", dy, w))
  assert_close(dw, np.einsum("bsha,bsd->dha", dy, x))


@pytest.mark.parametrize("precision, power_of_two", [("fp8", False), ("fp8_ue8m0", True)])
def test_swiglu_in_fp8(precision, power_of_two):
  """Three quantised products, near the exact ones and not equal to them."""
  rng = np.random.default_rng(2)
  exact = dataclasses.replace(small_config().model, hidden_size=130, initializer_range=0.1)
  config = dataclasses.replace(exact, matmul_precision=precision)
  x = jnp.asarray(rng.standard_normal((2, 3, 130)), jnp.float32)
  module = layers.SwiGLU(config, 140, nnx.Rngs(params=0))
  matmul = functools.partial(
    quantized_matmul, implementation="xla", power_of_two_scales=power_of_two
  )
  gate, up = (matmul(x.reshape(6, -1), w[...]) for w in (module.w_gate, module.w_up))
  expected = matmul(jax.nn.silu(gate) * up, module.w_down[...]).reshape(x.shape)
  y, unquantised = module(x), layers.SwiGLU(exact, 140, nnx.Rngs(params=0))(x)
  assert_close(y, expected)
  error = np.abs(y - unquantised).max() / np.abs(unquantised).max()
  assert 1e-3 < error < 0.1
