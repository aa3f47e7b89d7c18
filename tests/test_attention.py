import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from flax import nnx
from helpers import assert_close, largest_intermediate, small_config

from dsmoe import attention, rope

B, S, H, A, U = 2, 11, 3, 6, 5
SEGMENTS = np.array(
  [[1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 0], [1, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3]], np.int32
)


def _inputs(seed):
  rng = np.random.default_rng(seed)
  q, k = rng.standard_normal((2, B, S, H, A)).astype(np.float32)
  return q, k, rng.standard_normal((B, S, H, U)).astype(np.float32)


def _dense(q, k, v, segments, scale):
  """All S x S logits at once, masked with a large negative number."""
  S = q.shape[1]
  seen = np.tril(np.ones((S, S), bool))[None]
  if segments is not None:
    seen = seen & (segments[:, :, None] == segments[:, None, :])
  logits = jnp.einsum("bqha,bkha->bhqk", q, k) * scale
  logits = jnp.where(seen[:, None], logits, -1e9)
  return jnp.einsum("bhqk,bkhu->bqhu", jax.nn.softmax(logits, axis=-1), v)


@pytest.mark.parametrize(
  "chunk, segments",
  [(4, None), (1, SEGMENTS), (4, SEGMENTS), (64, SEGMENTS)],  # 4 does not divide 11
  ids=["4", "1_segments", "4_segments", "64_segments"],
)
def test_causal_attention_matches_loops_and_a_dense_gradient(chunk, segments):
  inputs, scale = _inputs(0), 0.7
  dy = np.random.default_rng(1).standard_normal((B, S, H, U)).astype(np.float32)

  @jax.jit
  def run(inputs, dy):
    y, vjp = jax.vjp(lambda *a: attention.causal_attention(*a, segments, scale, chunk), *inputs)
    _, vjp_dense = jax.vjp(lambda *a: _dense(*a, segments, scale), *inputs)
    return y, vjp(dy), vjp_dense(dy)

  y, gradients, expected_gradients = run(inputs, dy)
  rows = range(B)
  seg = [None] * B if segments is None else segments
  q, k, v = (a.astype(np.float64) for a in inputs)
  expected = np.stack([oracles.attention(q[b], k[b], v[b], seg[b], scale) for b in rows])
  assert_close(y, expected)
  assert_close(gradients, expected_gradients)


def test_huge_logits_behind_the_mask_do_no_harm():
  """exp of what a query may not see overflows; neither value nor gradient may notice."""
  q, k, v = _inputs(6)
  first = (SEGMENTS == 1)[..., None, None]
  loud = np.where(first, k, np.float32(1e4) * k)

  @jax.jit
  def run(k):
    def total(q, k, v):
      y = attention.causal_attention(q, k, v, SEGMENTS, 1.0, 4)
      return jnp.sum(jnp.where(first, y, 0)), y

    return jax.grad(total, argnums=(0, 1, 2), has_aux=True)(q, k, v)

  gradients, y = run(loud)
  expected_gradients, expected = run(k)
  assert_close(np.where(first, y, 0), np.where(first, expected, 0))
  assert_close(gradients, expected_gradients)


def test_no_array_of_all_queries_by_all_keys():
  """Forward and backward, at eight chunks: memory must stay linear in S."""
  S, chunk = 128, 16
  x = jax.ShapeDtypeStruct((1, S, 2, 3), jnp.float32)

  def gradient(fn):
    return jax.grad(lambda q, k, v: jnp.sum(fn(q, k, v)), argnums=(0, 1, 2))

  chunked = gradient(lambda q, k, v: attention.causal_attention(q, k, v, None, 1.0, chunk))
  assert largest_intermediate(chunked, x, x, x) <= 2 * chunk * S
  assert largest_intermediate(gradient(lambda *a: _dense(*a, None, 1.0)), x, x, x) >= 2 * S * S


def test_attention_in_bfloat16():
  q, k, v = _inputs(2)
  low = [jnp.asarray(a, jnp.bfloat16) for a in (q, k, v)]
  y = jax.jit(attention.causal_attention, static_argnums=(3, 4, 5))(*low, None, 0.5, 4)
  assert y.dtype == jnp.bfloat16
  q, k, v = (np.asarray(a, np.float64) for a in low)
  expected = [oracles.attention(q[b], k[b], v[b], None, 0.5) for b in range(B)]
  assert_close(y, np.stack(expected), "bfloat16")


@functools.cache
def _mla(**changes):
  """Returns (config, module, its parameters with random norms and biases)."""
  config = dataclasses.replace(small_config().model, **changes)
  graphdef, state = nnx.split(nnx.eval_shape(lambda: attention.MLA(config, nnx.Rngs(params=0))))
  rng = np.random.default_rng(3)
  shapes = nnx.to_pure_dict(state)
  params = {
    name: (name.endswith("norm") + 0.3 * rng.standard_normal(x.shape)).astype(np.float32)
    for name, x in sorted(shapes.items())
  }
  return config, graphdef, params


@pytest.mark.parametrize(
  "changes",
  [
    dict(),
    dict(q_lora_rank=None),
    dict(attention_bias=True),
    dict(attention_bias=True, q_lora_rank=None, rope_interleave=False),
  ],
  ids=str,
)
def test_mla_matches_loops(changes):
  config, graphdef, params = _mla(**changes)
  rng = np.random.default_rng(4)
  S = 9
  x = rng.standard_normal((B, S, config.hidden_size)).astype(np.float32)
  segments = np.array([[1, 1, 1, 1, 2, 2, 2, 2, 2], [1, 1, 2, 2, 2, 2, 2, 2, 3]], np.int32)
  positions = np.array([[0, 1, 2, 3, 0, 1, 2, 3, 4], [0, 1, 0, 1, 2, 3, 4, 5, 0]], np.int32)

  @jax.jit
  def run(params, x):
    cos, sin = rope.cos_sin(jnp.asarray(positions), config)
    return nnx.merge(graphdef, params)(x, cos, sin, segments)

  expected = [oracles.mla(params, x[b], positions[b], segments[b], config) for b in range(B)]
  assert_close(run(params, x), np.stack(expected))


def test_mla_parameters():
  D, H, N, R, U, Q, C = 40, 3, 12, 8, 10, 24, 16
  shapes = {name: w.shape for name, w in _mla(attention_bias=True)[2].items()}
  assert shapes == {
    "q_a_proj": (D, Q),
    "q_a_norm": (Q,),
    "q_a_bias": (Q,),
    "q_b_proj": (Q, H, N + R),
    "kv_a_proj": (D, C + R),
    "kv_a_norm": (C,),
    "kv_a_bias": (C + R,),
    "kv_b_proj": (C, H, N + U),
    "o_proj": (H, U, D),
    "o_bias": (D,),
  }
  without = set(_mla(q_lora_rank=None)[2])
  assert without == {"q_proj", "kv_a_proj", "kv_a_norm", "kv_b_proj", "o_proj"}


def test_yarn_reaches_the_logits():
  """The softmax scale has mscale squared."""
  config, graphdef, params = _mla()
  scaling = dataclasses.replace(config.rope_scaling, factor=40.0, mscale=1.0, mscale_all_dim=1.0)
  x = np.random.default_rng(5).standard_normal((1, 4, config.hidden_size)).astype(np.float32)
  louder = {**params, "q_b_proj": params["q_b_proj"] * np.float32((0.1 * np.log(40) + 1) ** 2)}

  @jax.jit
  def run(params, x):
    # Positions 0 turn nothing, so that only the scale differs.
    cos_sin = rope.cos_sin(jnp.zeros((1, 4), jnp.int32), config)
    scaled = nnx.merge(graphdef, params)
    scaled.config = dataclasses.replace(config, rope_scaling=scaling)
    return scaled(x, *cos_sin, None)

  assert_close(run(params, x)[0], oracles.mla(louder, x[0], [0] * 4, None, config))
