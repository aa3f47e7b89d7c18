import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from dsmoe.config import MeshConfig
from dsmoe.parallel import mesh as mesh_lib
from dsmoe.training import hyperparameters, optim
from tests.helpers import assert_close, small_config

PEAK, FINAL, WARMUP, DECAY, STEPS = 0.02, 0.004, 5, 8, 30
OPTIM = dict(
  name="adamw",
  learning_rate=PEAK,
  schedule="wsd",
  warmup_steps=WARMUP,
  decay_steps=DECAY,
  final_learning_rate=FINAL,
  beta1=0.9,
  beta2=0.95,
  epsilon=1e-3,  # large enough to be seen
  weight_decay=0.1,
  clip_norm=0.0,
  moment_dtype="float32",
)


def _config(**fields):
  """Returns (OptimConfig, Hyperparameters)."""
  optim_fields = {f"optim.{name}": value for name, value in (OPTIM | fields).items()}
  config = small_config(num_steps=STEPS, **optim_fields)
  return config.optim, hyperparameters.of(config)


def _wsd(step):
  if step < WARMUP:
    return PEAK * step / WARMUP
  if step < STEPS - DECAY:
    return PEAK
  return PEAK + (FINAL - PEAK) * min((step - (STEPS - DECAY)) / DECAY, 1)


def _cosine(step):
  if step < WARMUP:
    return PEAK * step / WARMUP
  done = min((step - WARMUP) / (STEPS - WARMUP), 1)
  return FINAL + (PEAK - FINAL) * (1 + math.cos(math.pi * done)) / 2


def _schedule(name, **fields):
  """Returns the learning rates of all steps, and of some after them."""
  _, hyper = _config(schedule=name, **fields)
  return np.asarray(jax.vmap(optim.schedule(name, hyper))(np.arange(STEPS + 4)))


@pytest.mark.parametrize("name, expected", [("wsd", _wsd), ("cosine", _cosine)])
def test_schedules_match_their_closed_forms(name, expected):
  actual = _schedule(name)
  assert_close(actual, np.array([expected(s) for s in range(STEPS + 4)]))
  assert actual[0] == 0 and actual[-1] == np.float32(FINAL)


def _optax_cosine(warmup, decay, peak, final):
  return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, STEPS, final)


def _optax_wsd(warmup, decay, peak, final):
  parts = [
    optax.linear_schedule(0.0, peak, warmup),
    optax.constant_schedule(peak),
    optax.linear_schedule(peak, final, decay),
  ]
  return optax.join_schedules(parts, [warmup, STEPS - decay])


@pytest.mark.parametrize("name, of_optax", [("wsd", _optax_wsd), ("cosine", _optax_cosine)])
def test_schedules_are_those_of_optax(name, of_optax):
  """Without warm-up or decay too, with a peak of zero, and up to a higher end."""
  for warmup, decay, peak, final in (
    (3, 9, 0.03, 0.001),
    (0, 7, 0.01, 0.002),
    (6, 0, 0.02, 0.005),
    (0, 0, 0.01, 0.002),
    (1, 29, 0.01, 0.04),
    (2, 5, 0.0, 0.0),
  ):
    fields = dict(warmup_steps=warmup, decay_steps=decay)
    fields |= dict(learning_rate=peak, final_learning_rate=final)
    expected = of_optax(warmup, decay, peak, final)
    expected = np.array([expected(step) for step in range(STEPS + 4)])
    assert_close(_schedule(name, **fields), expected)


@pytest.mark.parametrize("name", ["wsd", "cosine"])
def test_no_warmup_starts_at_the_peak(name):
  assert_close(_schedule(name, warmup_steps=0)[0], PEAK)


def _step(p, g, mu, nu, t, lr, decay):
  """One step of AdamW, t from 1. Source: arXiv:1711.05101, algorithm 2."""
  mu = 0.9 * mu + 0.1 * g
  nu = 0.95 * nu + 0.05 * g * g
  update = (mu / (1 - 0.9**t)) / (np.sqrt(nu / (1 - 0.95**t)) + 1e-3) + decay * p
  return p - lr * update, mu, nu


def _gradients(rng):
  return {
    "attention_norm": rng.standard_normal(3),
    "attention": {"o_bias": rng.standard_normal(4)},
    "mlp": {"w_up": rng.standard_normal((3, 4))},
  }


@pytest.mark.parametrize("clip_norm", [0.0, 1.0, 50.0])
@pytest.mark.parametrize("moment_dtype", ["float32", "bfloat16"])
def test_adamw_matches_numpy(clip_norm, moment_dtype):
  config, hyper = _config(clip_norm=clip_norm, moment_dtype=moment_dtype)
  rng = np.random.default_rng(0)
  expected = _gradients(rng)  # as parameters
  params = jax.tree.map(lambda p: p.astype(np.float32), expected)
  state = optim.make(config, hyper).init(params)
  first = optax.tree_utils.tree_get(state, "mu")
  assert {m.dtype.name for m in jax.tree.leaves(first)} == {moment_dtype}
  assert {n.dtype.name for n in jax.tree.leaves(optax.tree_utils.tree_get(state, "nu"))} == {
    "float32"
  }

  @jax.jit
  def step(params, state, gradients, norm, hyper):
    updates, state = optim.make(config, hyper).update(gradients, state, params, norm=norm)
    return optax.apply_updates(params, updates), state

  paths = [("attention_norm",), ("attention", "o_bias"), ("mlp", "w_up")]
  get = lambda tree, path: tree[path[0]] if len(path) == 1 else tree[path[0]][path[1]]  # noqa: E731
  values = {path: get(expected, path) for path in paths}
  moments = {path: (0.0, 0.0) for path in paths}
  for t in range(1, 8):  # over the end of the warm-up
    gradients = _gradients(rng)
    norm = math.sqrt(sum((get(gradients, path) ** 2).sum() for path in paths))
    rounded = jax.tree.map(lambda g: g.astype(np.float32), gradients)
    params, state = step(params, state, rounded, norm, hyper)
    factor = min(1.0, clip_norm / norm) if clip_norm else 1.0
    assert (factor < 1) == (clip_norm == 1.0)
    for path in paths:
      decay = 0.1 if path[-1] == "w_up" else 0.0
      g = get(gradients, path) * factor
      p, mu, nu = _step(values[path], g, *moments[path], t, _wsd(t - 1), decay)
      if moment_dtype == "bfloat16":
        mu = np.asarray(jnp.asarray(mu, jnp.bfloat16), np.float64)
      values[path], moments[path] = p, (mu, nu)
  kind = "op_float32" if moment_dtype == "float32" else "bfloat16"
  for path in paths:
    assert_close(get(params, path), values[path], kind)


@pytest.mark.parametrize(
  "data, expert, context, model", [(1, 1, 1, 1), (8, 1, 1, 1), (2, 2, 1, 2), (1, 2, 2, 2)]
)
def test_norms_count_each_number_once_on_any_mesh(data, expert, context, model):
  """Split over several axes, over one or none, a stack's by layer; one small sum over the mesh."""
  mesh = mesh_lib.make_mesh(
    MeshConfig(stage=1, data=data, expert=expert, context=context, model=model),
    jax.devices()[: data * expert * context * model],
  )
  specs = {
    "moe_layers": {
      "w": PartitionSpec(None, ("expert", "data"), "model"),
      "norm": PartitionSpec(),
    },
    "embed": PartitionSpec("model", ("data", "context")),
    "norm": PartitionSpec(),
  }
  shapes = {"moe_layers": {"w": (3, 8, 10), "norm": (3, 7)}, "embed": (6, 16), "norm": (5,)}
  rng = np.random.default_rng(1)
  is_shape = lambda s: isinstance(s, tuple)  # noqa: E731
  gradients = jax.tree.map(
    lambda s: rng.standard_normal(s).astype(np.float32), shapes, is_leaf=is_shape
  )
  placed = jax.device_put(gradients, mesh_lib.named(mesh, specs))
  run = jax.jit(mesh_lib.shard_map(optim.norms, mesh, (specs,), PartitionSpec()))
  compiled = run.lower(placed).compile()
  total, parts = compiled(placed)
  square = lambda a, *axes: (a.astype(np.float64) ** 2).sum(axes or None)  # noqa: E731
  stack = gradients["moe_layers"]
  expected = {
    "embed": np.sqrt(square(gradients["embed"])),
    "moe_layers": np.sqrt(square(stack["w"], 1, 2) + square(stack["norm"], 1)),
    "norm": np.sqrt(square(gradients["norm"])),
  }
  assert_close(parts, expected)
  assert_close(total, math.sqrt(sum(square(a) for a in jax.tree.leaves(gradients))))
  sums = re.findall(r"= (\S+) all-reduce(?:-start)?\(", compiled.as_text())
  assert sums == ["f32[5]{0}"]
  others = ("all-gather", "reduce-scatter", "all-to-all", "collective-permute")
  assert not [name for name in others if name in compiled.as_text()]
