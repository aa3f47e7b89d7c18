"""Shared by several tests: tolerances, comparison, small configs, random batches and models."""

import math

import jax
import numpy as np
from flax import nnx

from dsmoe import config as config_lib
from dsmoe import model as model_lib
from dsmoe.model import parameters
from dsmoe.parallel import mesh as mesh_lib
from dsmoe.training import hyperparameters, train_step
from experiments import base

# All tolerances, by kind of comparison, relative to the largest magnitude that is expected. None is
# raised to make a test pass.
TOLERANCE = {
  "op_float32": 1e-5,  # one operation against another implementation
  "model_float32": 2e-4,  # logits of whole models against another implementation
  "gradient_float32": 1e-3,  # gradients of whole models against another implementation
  "bfloat16": 2e-2,
  # Hopper's tensor cores keep about 14 bits of a sum of FP8 products (DeepSeek-V3, 3.3.2).
  "fp8_on_hopper": 2**-10,
}


def assert_close(actual, expected, kind: str = "op_float32") -> None:
  """Asserts that two trees of arrays are close, leaf by leaf.

  The error of a leaf is its largest difference divided by its largest expected magnitude.

  Args:
    actual, expected: trees of arrays with equally many leaves, of equal shapes.
    kind: the row of `TOLERANCE` that applies.
  """
  actual, expected = jax.tree.leaves(actual), jax.tree.leaves(expected)
  assert len(actual) == len(expected)
  for a, b in zip(actual, expected):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape
    assert np.isfinite(a).all()
    scale = max(np.abs(b).max(initial=0.0), 1e-6)
    error = np.abs(a - b).max(initial=0.0) / scale
    assert error <= TOLERANCE[kind], f"relative error {error:.2e}, shape {a.shape}"


def small_config(**overrides) -> config_lib.Config:
  """Returns the config of a small float32 model, every size distinct and every count at least 2.

  Args:
    **overrides: fields to change, by dotted name: small_config(**{"model.remat": "full"}).
  """
  c = base.get_config()
  c.batch_size, c.num_steps = 16, 20
  m = c.model
  m.vocab_size, m.hidden_size, m.intermediate_size = 96, 40, 56
  m.num_hidden_layers, m.first_k_dense_replace = 5, 2
  m.num_attention_heads, m.q_lora_rank, m.kv_lora_rank = 3, 24, 16
  m.qk_nope_head_dim, m.qk_rope_head_dim, m.v_head_dim = 12, 8, 10
  m.n_routed_experts, m.num_experts_per_tok, m.moe_intermediate_size = 12, 3, 18
  m.n_shared_experts, m.n_group, m.topk_group = 2, 4, 2
  m.num_nextn_predict_layers = 2
  m.compute_dtype, m.attention_chunk_tokens = "float32", 8
  m.initializer_range = 0.1
  c.loss.cross_entropy_chunk_tokens = 32
  c.loss.z_loss_weight = 1e-3
  c.balance.sequence_loss_weight = 0.01
  c.data.sequence_length = 14
  c.data.train_globs = c.data.validation_globs = ("synthetic",)
  c.optim.warmup_steps = 2
  for name, value in overrides.items():
    node, *rest = name.split(".")[::-1]
    group = c
    for part in rest[::-1]:
      group = group[part]
    group[node] = value
  return config_lib.from_config_dict(c)


def random_batch(config: config_lib.Config, seed: int) -> dict[str, np.ndarray]:
  """Returns a batch of random tokens: two documents in each row, some targets of weight 0."""
  rng = np.random.default_rng(seed)
  B, S = config.batch_size, config.data.sequence_length
  tokens = rng.integers(0, config.model.vocab_size, (B, S + 1)).astype(np.int32)
  cut = rng.integers(2, S - 1, (B, 1))
  place = np.arange(S)[None, :]
  return {
    "tokens": tokens[:, :-1],
    "targets": tokens[:, 1:],
    "positions": np.where(place < cut, place, place - cut).astype(np.int32),
    "segments": np.where(place < cut, 1, 2).astype(np.int32),
    "weights": (rng.random((B, S)) < 0.8).astype(np.float32),
  }


def mesh_of(num_devices: int):
  """Returns a mesh of the first `num_devices` devices, all along the axis `data`."""
  config = config_lib.MeshConfig(stage=1, data=num_devices, expert=1, context=1, model=1)
  return mesh_lib.make_mesh(config, jax.devices()[:num_devices])


def random_parts(config: config_lib.Config, seed: int):
  """Returns (graphdef, params, router_bias) of a model with random weights, norms and biases.

  NumPy draws the numbers, so nothing is compiled.
  """
  graphdef, params, bias = model_lib.split(
    jax.eval_shape(lambda: model_lib.build(config.model, config.seed))
  )
  rng = np.random.default_rng(seed)

  def draw(path, x):
    centre = 1.0 if path[-1].key.endswith("norm") else 0.0
    return (centre + 0.15 * rng.standard_normal(x.shape)).astype(x.dtype)

  params = jax.tree.map_with_path(draw, params)
  return graphdef, params, jax.tree.map_with_path(draw, bias)


def random_model(config: config_lib.Config, seed: int) -> model_lib.Transformer:
  """Returns the model that `random_parts` describes."""
  return nnx.merge(*random_parts(config, seed))


def forward(config: config_lib.Config):
  """Returns a jitted function: (params, router_bias, batch) -> (hidden, [MTP hiddens])."""
  graphdef, params, bias = random_parts(config, 0)

  def run(params, bias, batch):
    model = nnx.merge(graphdef, params, bias)
    segments = None if config.data.cross_document_attention else batch["segments"]
    out = model(batch["tokens"], batch["positions"], segments, batch["targets"])
    return out.hidden_BSD, [] if out.mtp_hidden is None else list(out.mtp_hidden)

  rows, mesh = mesh_lib.batch_spec(), mesh_of(1)
  specs = (parameters.specs(params, mesh), parameters.specs(bias, mesh), rows)
  return jax.jit(mesh_lib.shard_map(run, mesh, specs, rows))


def equations(jaxpr):
  """Yields every equation of a jaxpr and of the jaxprs inside it."""
  for equation in jaxpr.eqns:
    yield equation
    for value in jax.tree.leaves(
      list(equation.params.values()), is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr")
    ):
      inner = getattr(value, "jaxpr", value)
      if hasattr(inner, "eqns"):
        yield from equations(inner)


def largest_intermediate(fn, *args) -> int:
  """Returns how many elements the largest array has that an operation of fn(*args) produces."""
  jaxpr = jax.make_jaxpr(fn)(*args).jaxpr
  return max(math.prod(v.aval.shape) for e in equations(jaxpr) for v in e.outvars)


def abstract_step(config: config_lib.Config, devices):
  """Returns (mesh, state, batch, hyperparameters): a step's arguments on these devices, as shapes."""
  mesh = mesh_lib.make_mesh(config.mesh, devices)
  spec = jax.sharding.NamedSharding(mesh, mesh_lib.batch_spec())
  batch = jax.tree.map(
    lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=spec), random_batch(config, 0)
  )
  return mesh, train_step.abstract_state(config, mesh), batch, hyperparameters.of(config)
