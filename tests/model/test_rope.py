import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest

from dsmoe.config import RopeScaling
from dsmoe.model import rope
from tests.helpers import assert_close, small_config
from tests.oracles import turn_adjacent_pairs, turn_halves

PLAIN = RopeScaling(
  factor=1.0,
  original_max_position_embeddings=4096,
  beta_fast=32.0,
  beta_slow=1.0,
  mscale=0.0,
  mscale_all_dim=0.0,
)
V3 = dataclasses.replace(PLAIN, factor=40.0, mscale=1.0, mscale_all_dim=1.0)


def _yarn(dim, theta, scaling):
  """YaRN section 3.2, pair by pair, with DeepSeek's rounding of the ramp's ends."""

  def pair_with(turns):  # whose wavelength fits `turns` times into the original context
    wavelength = scaling.original_max_position_embeddings / turns
    return dim / 2 * math.log(wavelength / (2 * math.pi)) / math.log(theta)

  low = max(math.floor(pair_with(scaling.beta_fast)), 0)
  high = min(math.ceil(pair_with(scaling.beta_slow)), dim - 1)
  out = []
  for i in range(dim // 2):
    frequency = 1 / theta ** (2 * i / dim)
    if i <= low:
      slowed = 0.0
    elif i >= high:
      slowed = 1.0
    else:
      slowed = (i - low) / (high - low)
    out.append(frequency * (1 - slowed) + frequency / scaling.factor * slowed)
  return np.array(out)


@pytest.mark.parametrize(
  "dim, theta, scaling",
  [
    (64, 1e4, PLAIN),
    (64, 1e4, V3),
    (64, 5e4, dataclasses.replace(V3, factor=32.0)),
    (16, 1e4, dataclasses.replace(V3, factor=4.0, original_max_position_embeddings=256)),
    (8, 300.0, dataclasses.replace(V3, original_max_position_embeddings=32, beta_fast=8.0)),
    (12, 10.0, dataclasses.replace(V3, beta_fast=150.0)),  # the upper end is clamped
  ],
)
def test_frequencies_match_a_loop(dim, theta, scaling):
  actual = rope.frequencies(dim, theta, scaling)
  assert actual.dtype == np.float32 and actual.shape == (dim // 2,)
  expected = (
    _yarn(dim, theta, scaling) if scaling.factor > 1 else theta ** (-np.arange(0, dim, 2) / dim)
  )
  assert_close(actual / expected, np.ones(dim // 2))  # ratios: the small ones count too


def test_deepseek_v3_ramp_is_between_pairs_10_and_23():
  slowing = rope.frequencies(64, 1e4, PLAIN) / rope.frequencies(64, 1e4, V3)
  assert_close(slowing[:11], np.ones(11))
  assert_close(slowing[23:], np.full(9, 40.0))
  assert (np.diff(slowing[10:24]) > 0).all()


def test_a_ramp_of_no_width_is_a_step():
  """An original context shorter than one turn puts both ends at pair 0."""
  scaling = dataclasses.replace(V3, original_max_position_embeddings=6)
  slowing = rope.frequencies(8, 1e4, PLAIN) / rope.frequencies(8, 1e4, scaling)
  assert_close(slowing, np.array([1.0, 40, 40, 40]))


def test_rotation_multiplies_complex_numbers():
  config = small_config().model
  rng = np.random.default_rng(0)
  B, S, H, R = 2, 5, 3, config.qk_rope_head_dim
  x = rng.standard_normal((B, S, H, R)).astype(np.float32)
  positions = rng.integers(0, 12, (B, S)).astype(np.int32)
  cos, sin = rope.cos_sin(jnp.asarray(positions), config)
  assert cos.shape == sin.shape == (B, S, R // 2) and cos.dtype == sin.dtype == jnp.float32
  turned = rope.rotate(jnp.asarray(x), cos[:, :, None], sin[:, :, None])
  expected = np.zeros(x.shape)
  for b, s, h in np.ndindex(B, S, H):
    angles = [positions[b, s] * 1e4 ** (-2 * i / R) for i in range(R // 2)]
    expected[b, s, h] = turn_halves(x[b, s, h], angles)
  assert_close(turned, expected)
  assert rope.rotate(jnp.asarray(x, jnp.bfloat16), cos[:, :, None], sin[:, :, None]).dtype == (
    jnp.bfloat16
  )


def test_deinterleaved_halves_score_as_adjacent_pairs():
  """q . k is the same whether adjacent pairs turn, or columns move and halves turn."""
  rng = np.random.default_rng(1)
  D, R, S = 5, 8, 6
  w_q, w_k = rng.standard_normal((2, D, R)).astype(np.float32)
  x = rng.standard_normal((S, D)).astype(np.float32)
  angles = np.outer(np.arange(S), [0.9, 0.5, 0.2, 0.1])
  cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
  q, k = (rope.rotate(x @ np.asarray(rope.deinterleave(w)), cos, sin) for w in (w_q, w_k))
  q_pairs = np.stack([turn_adjacent_pairs(row @ w_q, a) for row, a in zip(x, angles)])
  k_pairs = np.stack([turn_adjacent_pairs(row @ w_k, a) for row, a in zip(x, angles)])
  assert_close(q @ k.T, q_pairs @ k_pairs.T)


def test_deinterleave_moves_even_columns_first():
  moved = rope.deinterleave(np.arange(16).reshape(2, 8))
  assert moved.tolist() == [[0, 2, 4, 6, 1, 3, 5, 7], [8, 10, 12, 14, 9, 11, 13, 15]]


def _model_with(scaling):
  return dataclasses.replace(small_config().model, rope_scaling=scaling)


@pytest.mark.parametrize(
  "mscale, mscale_all_dim, expected",
  [
    (1.0, 1.0, 1.0),
    (0.707, 0.707, 1.0),
    (1.0, 0.5, (0.1 * math.log(40) + 1) / (0.05 * math.log(40) + 1)),
    (0.0, 0.0, 0.1 * math.log(40) + 1),
    (0.5, 0.0, 0.1 * math.log(40) + 1),  # one of the two alone counts as none
  ],
)
def test_cos_sin_are_scaled_by_the_ratio_of_mscales(mscale, mscale_all_dim, expected):
  scaling = dataclasses.replace(V3, mscale=mscale, mscale_all_dim=mscale_all_dim)
  cos, sin = rope.cos_sin(jnp.array([[0, 3]]), _model_with(scaling))
  assert_close(cos[0, 0], np.full(4, expected))
  assert_close(cos**2 + sin**2, np.full((1, 2, 4), expected**2))


def test_unscaled_rope_has_no_mscale():
  config = _model_with(dataclasses.replace(PLAIN, mscale=1.0, mscale_all_dim=0.5))
  cos, _ = rope.cos_sin(jnp.array([[0, 3]]), config)
  assert_close(cos[0, 0], np.ones(4))
  assert rope.softmax_scale(config) == pytest.approx(1 / math.sqrt(12 + 8))


@pytest.mark.parametrize("mscale_all_dim, squared", [(1.0, 1.0), (0.707, 0.707), (0.0, None)])
def test_softmax_scale_has_mscale_squared(mscale_all_dim, squared):
  config = _model_with(dataclasses.replace(V3, mscale_all_dim=mscale_all_dim))
  factor = 1.0 if squared is None else (0.1 * squared * math.log(40) + 1) ** 2
  assert rope.softmax_scale(config) == pytest.approx(factor / math.sqrt(20))


def test_deepseek_v3_softmax_scale():
  config = dataclasses.replace(_model_with(V3), qk_nope_head_dim=128, qk_rope_head_dim=64)
  assert rope.softmax_scale(config) == pytest.approx(0.1352337747, rel=1e-6)
