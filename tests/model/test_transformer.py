import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsmoe import model as model_lib
from dsmoe.model import parameters
from dsmoe.parallel import mesh as mesh_lib
from dsmoe.platforms import cpu
from dsmoe.training import hyperparameters, train_step
from tests import oracles
from tests.helpers import (
  assert_close,
  equations,
  forward,
  mesh_of,
  random_batch,
  random_model,
  random_parts,
  small_config,
)

ORDER = ("tokens", "positions", "segments", "targets")
SHALLOW = {"model.num_hidden_layers": 3, "model.first_k_dense_replace": 1, "batch_size": 3}
WITHOUT_MTP = SHALLOW | {"model.num_nextn_predict_layers": 0}
DENSE = {
  "model.num_hidden_layers": 2,
  "model.first_k_dense_replace": 2,
  "model.n_routed_experts": 0,
  "model.num_nextn_predict_layers": 0,
}


def test_hidden_states_of_every_depth_match_loops_and_packing_is_separation():
  config = small_config(**SHALLOW)
  _, params, bias = random_parts(config, 1)
  rng = np.random.default_rng(2)
  S, cut = 14, 6
  row = lambda: rng.integers(0, 96, S).astype(np.int32)  # noqa: E731
  batch = {"tokens": np.stack([row(), row(), row()]), "targets": np.stack([row(), row(), row()])}
  batch["positions"] = np.stack([np.r_[0:cut, 0 : S - cut], np.arange(S), np.arange(S)])
  batch["segments"] = np.stack([np.r_[[1] * cut, [2] * (S - cut)], *np.ones((2, S))]).astype(int)
  # Row 0 holds two documents; rows 1 and 2 hold one of them each, and then something else.
  for name in ("tokens", "targets"):
    batch[name][1, :cut] = batch[name][0, :cut]
    batch[name][2, : S - cut] = batch[name][0, cut:]
  hidden, mtp_hidden = forward(config)(params, bias, jax.tree.map(np.int32, batch))
  hiddens = [hidden, *mtp_hidden]
  expected = [
    oracles.transformer(params, bias, *(batch[n][b] for n in ORDER), config.model) for b in (0, 1)
  ]
  assert len(hiddens) == 3
  for depth, actual in enumerate(hiddens):
    assert_close(actual[:2], np.stack([e[depth] for e in expected]))
    packed, first, second = np.asarray(actual)
    whole = cut - depth  # places whose next `depth` targets are the document's own
    assert_close(packed[:whole], first[:whole])
    assert_close(packed[cut : S - depth], second[: S - cut - depth])


def test_logits_match_loops_are_causal_and_keep_rows_apart():
  config = small_config(**WITHOUT_MTP)
  model = random_model(config, 3)
  _, params, bias = random_parts(config, 3)
  tokens = np.random.default_rng(4).integers(0, 96, (2, 7))
  logits = model_lib.logits(model, tokens)
  assert logits.shape == (2, 7, 96) and logits.dtype == jnp.float32
  args = (np.arange(7), None, None, config.model)
  hidden = [oracles.transformer(params, bias, row, *args)[0] for row in tokens]
  assert_close(logits, np.stack(hidden) @ params["head"])
  changed = tokens.copy()
  changed[0, 4] = (changed[0, 4] + 1) % 96
  after = model_lib.logits(model, changed)
  np.testing.assert_array_equal(after[0, :4], logits[0, :4])
  np.testing.assert_array_equal(after[1], logits[1])
  assert (np.abs(after[0, 4:] - logits[0, 4:]).max(axis=-1) > 1e-3).all()


def test_tied_embeddings_and_a_model_without_experts():
  config = small_config(**DENSE, **{"model.tie_word_embeddings": True})
  _, params, bias = random_parts(config, 5)
  assert set(params) == {"embed", "norm", "dense_layers"} and bias == {}
  tokens = np.random.default_rng(6).integers(0, 96, (2, 7))
  logits = model_lib.logits(random_model(config, 5), tokens)
  args = (np.arange(7), None, None, config.model)
  hidden = [oracles.transformer(params, bias, row, *args)[0] for row in tokens]
  assert_close(logits, np.stack(hidden) @ params["embed"].T)


def test_bfloat16_is_close_to_float32():
  """The biases decide the routing, which small differences in scores would change."""
  config = small_config(**WITHOUT_MTP | {"model.num_hidden_layers": 2})
  graphdef, params, bias = random_parts(config, 7)
  bias = jax.tree.map(lambda _: np.arange(12, dtype=np.float32)[None], bias)
  tokens = np.random.default_rng(8).integers(0, 96, (2, 7))
  outs = []
  for dtype in ("float32", "bfloat16"):
    model = nnx.merge(graphdef, params, bias)
    model.config = dataclasses.replace(config.model, compute_dtype=dtype)
    outs.append(model_lib.logits(model, tokens))
  difference = np.abs(outs[0] - outs[1]).max()
  assert difference > 0
  assert_close(outs[1], outs[0], "bfloat16")


def _step_jaxpr(**overrides):
  config = small_config(**overrides)
  state = train_step.abstract_state(config, mesh_of(1))
  step = train_step.make_train_step(config, mesh_of(1))
  traced = step.trace(state, random_batch(config, 0), hyperparameters.of(config))
  return list(equations(traced.jaxpr.jaxpr))


@pytest.mark.slow
def test_the_step_does_not_grow_with_depth():
  """Beyond the short stacks that are written out, which may be a few times as long."""
  few, more, many = (
    len(_step_jaxpr(**{"model.num_hidden_layers": layers})) for layers in (4, 8, 32)
  )
  assert 100 < more == many
  assert few < 3 * many


@pytest.mark.slow
def test_a_stack_written_out_equals_the_scanned_one(monkeypatch):
  """Loss, every gradient and every expert's count."""
  stacks = {"model.num_hidden_layers": 5, "model.first_k_dense_replace": 2}
  config = small_config(**stacks, **{"model.num_nextn_predict_layers": 0})
  graphdef, params, bias = random_parts(config, 11)
  run = train_step._loss_and_grads(config, graphdef)
  specs = [parameters.specs(x, mesh_of(1)) for x in (params, bias)]
  none = jax.sharding.PartitionSpec()
  outs, scans = [], []
  for most in (4, 0):
    monkeypatch.setattr(cpu, "MAX_WRITTEN_OUT_LAYERS", most)
    step = jax.jit(
      mesh_lib.shard_map(
        lambda *a: run(*a),  # a new function, or jit would take the first trace again
        mesh_of(1),
        in_specs=(*specs, none, mesh_lib.batch_spec(), none),
        out_specs=((none, none), specs[0], none),
      )
    )
    args = (params, bias, jnp.zeros((), jnp.int32), random_batch(config, 12))
    args += (hyperparameters.of(config),)
    scans.append(sum(e.primitive.name == "scan" for e in equations(step.trace(*args).jaxpr.jaxpr)))
    outs.append(step(*args))
  assert scans[0] > scans[1]  # each layer's own loops, not one stack's
  ((losses, load), grads, _), ((losses2, load2), grads2, _) = outs
  np.testing.assert_array_equal(load.counts_LE, load2.counts_LE)
  assert load.counts_LE.shape[0] == 3
  jax.tree.map(assert_close, (losses, grads), (losses2, grads2))


def test_remat_keeps_less_and_computes_more(monkeypatch):
  """By policy: elements the layers' scans leave for the backward pass, and its matmuls."""
  monkeypatch.setattr(cpu, "MAX_WRITTEN_OUT_LAYERS", 0)
  saved, matmuls = {}, {}
  for remat in ("none", "dots", "full"):
    steps = _step_jaxpr(**{"model.remat": remat, "model.num_nextn_predict_layers": 0})
    layers = [e for e in steps if e.primitive.name == "scan" and e.params["length"] in (2, 3)]
    saved[remat] = sum(math.prod(v.aval.shape) for e in layers for v in e.outvars)
    matmuls[remat] = sum(e.primitive.name == "dot_general" for e in steps)
  assert saved["none"] > saved["dots"] > saved["full"]
  assert matmuls["full"] > matmuls["dots"] >= matmuls["none"]


def test_layers_start_different_and_at_their_standard_deviation():
  config = dataclasses.replace(small_config(**DENSE).model, initializer_range=0.03)
  params = jax.jit(lambda: model_lib.split(model_lib.build(config, seed=1))[1])()
  assert {x.dtype.name for x in jax.tree.leaves(params)} == {"float32"}
  embed, w_up = params["embed"], params["dense_layers"]["mlp"]["w_up"]
  assert w_up.shape == (2, 40, 56) and embed.shape == (96, 40)
  for x in (embed, params["head"], w_up[0], w_up[1]):
    assert abs(float(jnp.std(x)) / 0.03 - 1) < 0.1
  assert np.abs(w_up[0] - w_up[1]).max() > 0.03
  np.testing.assert_array_equal(params["norm"], np.ones(40))


@pytest.mark.parametrize("precision", ["fp8", "fp8_ue8m0"])
def test_a_model_in_fp8_is_near_the_exact_one(precision):
  """A product errs by 4%, two layers' by 9%. Without experts, whose choice may flip."""
  dense = {"num_hidden_layers": 2, "first_k_dense_replace": 2, "num_nextn_predict_layers": 0}
  overrides = {f"model.{name}": value for name, value in dense.items()}
  tokens = np.random.default_rng(0).integers(0, 96, (2, 14)).astype(np.int32)

  def logits(**more):
    config = small_config(**overrides, **more)
    return np.asarray(model_lib.logits(model_lib.build(config.model, 0), tokens), np.float64)

  exact = logits()
  error = np.linalg.norm(logits(**{"model.matmul_precision": precision}) - exact)
  assert 0.01 < error / np.linalg.norm(exact) < 0.2
