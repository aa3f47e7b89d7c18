import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsmoe.model import attention, rope
from tests import oracles
from tests.helpers import assert_close, small_config

B = 2


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
    cos_sin = rope.cos_sin(jnp.asarray(positions), config)
    return nnx.merge(graphdef, params)(x, cos_sin, attention.within_rows(segments))[0]

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
    return scaled(x, cos_sin, attention.within_rows(None))[0]

  assert_close(run(params, x)[0], oracles.mla(louder, x[0], [0] * 4, None, config))
