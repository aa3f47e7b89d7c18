"""The whole step: devices, microbatches and rematerialisation change nothing."""

import functools
from unittest import mock

import jax
import numpy as np
import optax
import pytest

from dsmoe.parallel import mesh as mesh_lib
from dsmoe.platforms import cpu
from dsmoe.training import hyperparameters, train_step
from tests.helpers import (
  abstract_step,
  assert_close,
  mesh_of,
  random_batch,
  random_parts,
  small_config,
)
from tests.training import margins

# Seeds whose routing has no near-ties, so that rounding cannot flip a choice: of the first step's
# batch, and of five further ones. `check_margins` computes how far from one they are.
MARGIN_SEED = 0
FURTHER_SEEDS = (17, 7, 4, 3, 14)
# Limit of what rounding within a step moves a score by: 16 times the spacing of numbers below one.
ROUNDING = 1e-6
TWO_BY_TWO_BY_TWO = dict(
  num_devices=8,
  expert=2,
  context=2,
  model=2,
  dispatch="all_to_all",
  num_microbatches=2,
  remat="full",
  scanned=True,
  model__num_nextn_predict_layers=2,
)
RING = dict(
  num_devices=8, expert=4, dispatch="ring", num_microbatches=2, remat="full", scanned=True
)
ALONG_DATA = dict(num_devices=8, num_microbatches=2, remat="full", scanned=True)
# What goes on for the five further steps; the others make one.
SIX_STEPS: tuple[dict, ...] = (
  {},
  dict(model__num_nextn_predict_layers=2),
  ALONG_DATA,
  TWO_BY_TWO_BY_TWO,
  RING,
)


@functools.cache
def first_step(**variant):
  """Returns (initial params, state after one step, its metrics) as NumPy arrays; see `steps`."""
  before, made = steps(**variant)
  return before, *made[0]


@functools.cache
def steps(**variant):
  """Returns (initial params, [(state, metrics) after each step]) as NumPy arrays."""
  config, mesh = _config(**variant)
  step = _compiled(**variant) if variant else step_of_one_device()
  state = train_step.init_state(config, mesh)
  before, made = jax.device_get(state.params), []
  seeds = (MARGIN_SEED, *FURTHER_SEEDS) if variant in SIX_STEPS else (MARGIN_SEED,)
  for seed in seeds:
    batch = mesh_lib.to_global(random_batch(config, seed), mesh)
    state, metrics = step(state, batch, hyperparameters.of(config))
    made.append((jax.device_get(state), jax.device_get(metrics)))
  return before, made


@functools.cache
def step_of_one_device():
  """Returns the compiled step of the variant without any fields; of others none is kept."""
  return _compiled()


def _compiled(**variant):
  config, mesh = _config(**variant)
  batch = mesh_lib.to_global(random_batch(config, MARGIN_SEED), mesh)
  with mock.patch.object(cpu, "MAX_WRITTEN_OUT_LAYERS", 0 if variant.get("scanned") else 4):
    lowered = train_step.make_train_step(config, mesh).lower(
      train_step.abstract_state(config, mesh), batch, hyperparameters.of(config)
    )
  return lowered.compile()


def _config(
  num_devices: int = 1,
  num_microbatches: int = 1,
  remat: str = "none",
  dispatch: str = "local",
  scanned: bool = False,
  expert: int = 1,
  precision: str = "compute_dtype",
  exchange: tuple[tuple[str, str | float], ...] = (),
  context: int = 1,
  model: int = 1,
  tied: bool = False,
  **overrides,
):
  """Returns the config and mesh of a variant.

  `scanned` takes the path of deep models, whose layers are scanned; `expert`, `context` and `model`
  are the numbers of devices along those axes; `exchange` has fields of `model.exchange`.
  `overrides` are further fields of the config, with __ for dots.
  """
  config = small_config(
    **{
      "num_microbatches": num_microbatches,
      "model.remat": remat,
      "model.dispatch": dispatch,
      "optim.warmup_steps": 0,
      "mesh.expert": expert,
      "mesh.model": model,
      "model.tie_word_embeddings": tied,
      # Of heads and inner sizes, what is split over `model` must divide.
      "model.num_attention_heads": 4,
      "model.moe_intermediate_size": 20,
      "model.matmul_precision": precision,
      **{f"model.exchange.{name}": value for name, value in exchange},
      "model.v_head_dim": 12,  # 24 with qk_nope_head_dim, which is split over `expert`
      "mesh.context": context,
      "data.sequence_length": 16,  # whose tokens are split over `context`
      # A written-out layer compiles for seconds; TWO_BY_TWO_BY_TWO predicts two more tokens.
      "model.num_hidden_layers": 3,
      "model.first_k_dense_replace": 1,
      "model.num_nextn_predict_layers": 1,
    }
    | {name.replace("__", "."): value for name, value in overrides.items()}
  )
  return config, mesh_lib.make_mesh(config.mesh, jax.devices()[:num_devices])


def _of_one_device(variant):
  """Returns the fields of a variant that make it another model, not another way to compute it."""
  return {k: v for k, v in variant.items() if "__" in k or k == "tied"}


@pytest.mark.parametrize(
  "variant",
  [
    # Layers that are scanned, a batch in parts, and the oracle of the exchanges, in one program.
    dict(num_microbatches=4, scanned=True, dispatch="dense"),
    pytest.param(ALONG_DATA, marks=pytest.mark.slow),
    pytest.param(RING, marks=pytest.mark.slow),
    pytest.param(
      dict(num_devices=8, expert=4, dispatch="replicated", remat="full", scanned=True),
      marks=pytest.mark.slow,
    ),
    pytest.param(
      dict(
        num_devices=8,
        expert=4,
        dispatch="hierarchical",
        num_microbatches=2,
        remat="full",
        scanned=True,
        exchange=(("devices_per_group", 2), ("receive_capacity", 4.0)),
      ),
      marks=pytest.mark.slow,
    ),
    pytest.param(
      dict(
        num_devices=4,
        context=4,
        remat="dots",
        data__cross_document_attention=True,
        model__num_hidden_layers=2,
        model__first_k_dense_replace=1,
      ),
      marks=pytest.mark.slow,
    ),
    pytest.param(TWO_BY_TWO_BY_TWO, marks=pytest.mark.slow),
    pytest.param(dict(num_devices=4, model=4, remat="dots", scanned=True), marks=pytest.mark.slow),
    pytest.param(dict(num_devices=4, model=2, tied=True, scanned=True), marks=pytest.mark.slow),
    pytest.param(
      dict(
        num_devices=8,
        expert=2,
        model=2,
        dispatch="all_gather",
        num_microbatches=2,
        remat="full",
        scanned=True,
      ),
      marks=pytest.mark.slow,
    ),
    pytest.param(
      dict(
        num_devices=8,
        expert=4,
        dispatch="all_to_all",
        num_microbatches=2,
        remat="full",
        scanned=True,
        exchange=(("receive_capacity", 0.5), ("dropless_fallback", "layer")),
      ),
      marks=pytest.mark.slow,
    ),
    pytest.param(
      dict(
        num_devices=4,
        expert=2,
        dispatch="all_to_all",
        scanned=True,
        exchange=(("receive_capacity", 0.5), ("dropless_fallback", "step"), ("moe_chunks", 2)),
      ),
      marks=pytest.mark.slow,
    ),
  ],
  ids=str,
)
def test_step_does_not_depend_on_how_it_is_computed(variant):
  """Nor do the five further steps that some variants make with the program they have compiled."""
  before, expected, expected_metrics = first_step(**_of_one_device(variant))
  before_other, actual, metrics = first_step(**variant)
  jax.tree.map(np.testing.assert_array_equal, before_other, before)
  # Integers and the bias they move: exactly equal.
  np.testing.assert_array_equal(metrics["load"].counts_LE, expected_metrics["load"].counts_LE)
  dispatched = metrics["load"].dispatch
  assert not dispatched.dropped_rows.any() and dispatched.fallbacks.dtype == np.int32
  # Buffers for half of the mean overflow in every layer and microbatch.
  overflows = dict(variant.get("exchange", ())).get("receive_capacity") == 0.5
  fallbacks = overflows * variant.get("num_microbatches", 1)
  assert set(dispatched.fallbacks.tolist()) == {fallbacks}
  jax.tree.map(np.testing.assert_array_equal, actual.router_bias, expected.router_bias)
  assert_close(metrics["load"].groups_per_token_L, expected_metrics["load"].groups_per_token_L)
  assert_close(metrics["losses"], expected_metrics["losses"])
  assert_close(metrics["grad_norms"], expected_metrics["grad_norms"])
  # Adam's first moment is (1 - beta1) times the clipped gradient: compares every gradient.
  mu = optax.tree_utils.tree_get(actual.opt_state, "mu")
  assert_close(mu, optax.tree_utils.tree_get(expected.opt_state, "mu"))
  if variant in SIX_STEPS:
    check_further_steps(variant)


@functools.cache
def scores_of_one_device(**variant):
  """Returns the compiled `margins.biased_scores` of a variant's model."""
  config, _ = _config(**variant)
  return margins.biased_scores(config)


def scores_before(step, **variant):
  """Returns the scores, on one device, of a step's batch with the parameters before that step."""
  (params, made), config = steps(**variant), _config(**variant)[0]
  bias = jax.tree.map(np.zeros_like, made[0][0].router_bias)
  if step:
    params, bias = made[step - 1][0].params, made[step - 1][0].router_bias
  batch = random_batch(config, (MARGIN_SEED, *FURTHER_SEEDS)[step])
  return scores_of_one_device(**_of_one_device(variant))(params, bias, batch)


def check_margins(step, variant):
  """Asserts that rounding cannot flip a choice of the step: so its integers must be equal.

  A choice compares sums of two scores at most, so it stays while each score moves by less than a
  quarter of the smallest difference. What moves a score is the rounding of the step itself, and that
  of the steps before, by which parameters differ: that is computed, from the other parameters.
  """
  own = scores_before(step, **_of_one_device(variant))
  moved = np.abs(scores_before(step, **variant) - own).max()
  margin = margins.smallest(own, _config(**variant)[0])
  assert margin > 4 * (moved + ROUNDING), (step, margin, moved)


def check_further_steps(variant):
  """Compares them with those of one device; parameters differ by rounding from the second one on."""
  _, expected = steps(**_of_one_device(variant))
  _, actual = steps(**variant)
  assert len(actual) == len(expected) == 6
  for step in range(6):
    check_margins(step, variant)
  for (state, metrics), (state_of_one, metrics_of_one) in zip(actual[1:], expected[1:]):
    counts_LE = metrics_of_one["load"].counts_LE
    np.testing.assert_array_equal(metrics["load"].counts_LE, counts_LE)
    assert not metrics["load"].dispatch.dropped_rows.any()
    jax.tree.map(np.testing.assert_array_equal, state.router_bias, state_of_one.router_bias)
    assert_close(metrics["losses"], metrics_of_one["losses"], "model_float32")
    assert_close(metrics["grad_norm"], metrics_of_one["grad_norm"], "gradient_float32")
  (first, _), (last, metrics_of_last) = expected[0], expected[-1]
  assert int(last.step) == 6
  moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), first.params, last.params)
  assert max(jax.tree.leaves(moved)) > 2 * metrics_of_last["learning_rate"] > 0


def _padded(batch, rows):
  """Returns the batch twice, its last rows as zeros of weight 0, or as they are with that weight."""
  zeros = {name: a.copy() for name, a in batch.items()}
  for a in zeros.values():
    a[-rows:] = 0
  return zeros, batch | {"weights": zeros["weights"]}


@pytest.mark.slow
def test_evaluation_does_not_depend_on_the_mesh_and_drops_nothing():
  few = {"mesh.expert": 4, "model.exchange.receive_capacity": 0.1}
  hierarchical = {"model.dispatch": "hierarchical", "model.exchange.devices_per_group": 2}
  """Nor on what padding holds: the last rows are some, of which the second batch has others."""
  sums = []
  for devices, overrides in (
    (1, {}),
    (8, {"mesh.context": 4}),
    (4, {**few, "model.dispatch": "all_to_all"}),
    (4, few | hierarchical),
  ):
    config = small_config(**{"data.sequence_length": 16}, **overrides)
    mesh = mesh_lib.make_mesh(config.mesh, jax.devices()[:devices])
    _, params, bias = random_parts(config, 1)
    state = train_step.TrainState(None, params, None, bias)
    evaluate = train_step.make_eval_step(config, mesh)
    sums += [evaluate(state, batch) for batch in _padded(random_batch(config, 2), rows=5)]
  (expected_nats, expected_weight), *others = sums
  for nats, weight in others:
    assert float(weight) == float(expected_weight) > 100
    assert_close(nats, expected_nats)


@pytest.mark.slow
def test_dropped_rows_are_counted_over_devices_and_microbatches():
  """Without a fallback; the sum is that of the layers, each of which sees every choice."""
  _, _, metrics = first_step(
    num_devices=4,
    expert=4,
    dispatch="all_to_all",
    num_microbatches=4,
    scanned=True,
    exchange=(("receive_capacity", 0.5),),
  )
  stats, rows = metrics["load"].dispatch, 16 * 16 * 3
  assert stats.dropped_rows.dtype == np.int32 and stats.dropped_rows.shape == (3,)
  # 16 buffers a microbatch of half the mean: at most half of all rows stay.
  assert (stats.dropped_rows >= rows // 2 - 16 * 4).all() and (stats.dropped_rows < rows).all()
  assert (stats.sent_rows > 0).all() and (stats.sent_rows + stats.dropped_rows <= rows).all()


@pytest.mark.slow
def test_the_model_is_traced_once_whatever_the_microbatches(monkeypatch):
  traced = []
  loss = train_step._loss
  monkeypatch.setattr(train_step, "_loss", lambda *args: (traced.append(1), loss(*args))[1])
  for num_microbatches in (1, 4):
    config, mesh = small_config(num_microbatches=num_microbatches), mesh_of(2)
    state = train_step.abstract_state(config, mesh)
    batch, hyper = random_batch(config, 0), hyperparameters.of(config)
    train_step.make_train_step(config, mesh).trace(state, batch, hyper)
    assert len(traced) == 1
    traced.clear()


def test_bias_moved_against_the_load():
  _, state, metrics = first_step()
  counts = metrics["load"].counts_LE
  bias = np.concatenate(jax.tree.leaves(state.router_bias))
  assert counts.sum(axis=1).tolist() == [16 * 16 * 3] * 3  # every choice counted, 2 + 1 MTP layers
  expected = 0.001 * np.sign(counts.mean(axis=1, keepdims=True) - counts)
  np.testing.assert_array_equal(bias, expected.astype(np.float32))
  assert (bias != 0).any()


def test_batch_that_does_not_divide_is_refused():
  config = small_config(**{"batch_size": 12})
  with pytest.raises(ValueError, match=r"batch_size \(12\) must be divisible"):
    train_step.make_train_step(config, mesh_of(8))


def test_hidden_size_that_does_not_divide_is_refused():
  config = small_config(**{"model.hidden_size": 44})
  with pytest.raises(ValueError, match=r"parameter \S+: .*'data': 8\} must divide .*'embed': 44"):
    train_step.init_state(config, mesh_of(8))


@pytest.mark.slow
def test_a_state_larger_than_the_memory_is_refused_with_its_size(monkeypatch):
  config, mesh = small_config(), mesh_of(2)
  state = train_step.abstract_state(config, mesh)
  created = train_step.init_state(config, mesh)
  part = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(created))
  monkeypatch.setattr(cpu, "machine_memory", lambda: part * jax.local_device_count())
  train_step.check_memory(state, mesh)
  monkeypatch.setattr(cpu, "machine_memory", lambda: part * jax.local_device_count() - 1)
  with pytest.raises(ValueError, match=r"GiB on each of 2 devices, which must be at most a device"):
    train_step.check_memory(state, mesh)


def test_a_mesh_that_does_not_fit_is_refused_with_the_nearest_that_does():
  """`model` takes what the batch leaves of 8 devices; with 3 heads it cannot."""
  fields = {"batch_size": 12, "model.num_attention_heads": 4, "model.hidden_size": 48}
  with pytest.raises(ValueError) as error:
    train_step.make_mesh(small_config(**fields))
  near = dict(stage=1, data=4, expert=1, context=1, model=2)
  assert str(error.value) == (
    "batch_size (12) must be divisible by devices along the batch (8) times num_microbatches (1); "
    f"the nearest mesh that fits is {near}"
  )
  fields["model.num_attention_heads"] = 3
  with pytest.raises(ValueError, match=r"no mesh of 8 devices fits$"):
    train_step.make_mesh(small_config(**fields))
  config = small_config(**{"mesh.data": 2}, batch_size=4)
  mesh = train_step.make_mesh(config, jax.devices()[:2])
  assert dict(mesh.shape) == dict(stage=1, data=2, expert=1, context=1, model=1)


@pytest.mark.slow
def test_state_is_created_sharded():
  config = small_config()
  state = train_step.init_state(config, mesh_of(8))
  w_gate = state.params["moe_layers"]["mlp"]["experts"]["w_gate"]
  assert w_gate.sharding.spec == jax.sharding.PartitionSpec(None, "expert", "data", None)
  assert w_gate.addressable_shards[0].data.shape == (3, 12, 5, 18)
  mu = optax.tree_utils.tree_get(state.opt_state, "mu")
  assert mu["moe_layers"]["mlp"]["experts"]["w_gate"].sharding == w_gate.sharding


@pytest.mark.slow
@pytest.mark.parametrize("expert, model", [(1, 1), (2, 2)])
def test_compiled_step_gathers_and_scatters_weights(expert, model):
  """No all-reduce is as large as a weight, but those of activations over `model`."""
  fields = {"mesh.expert": expert, "mesh.model": model, "model.num_attention_heads": 4}
  fields["model.dispatch"] = "all_gather" if expert > 1 else "local"
  config = small_config(**fields, **{"model.moe_intermediate_size": 20, "model.v_head_dim": 12})
  mesh, *args = abstract_step(config, jax.devices())
  step = train_step.make_train_step(config, mesh)
  text = step.lower(*args).compile().as_text()
  assert "all-gather" in text and "reduce-scatter" in text
  smallest_matrix = 16 * 24  # in elements, of the matrices gathered here
  rows = config.batch_size // mesh_lib.num_batch_shards(mesh)
  tokens = [(rows, 14), (rows * 14,)]
  pairs = ("replica_groups=[4,2]<=[8]", "replica_groups={{0,1},{2,3},{4,5},{6,7}}")
  of_activations = 0
  for line in text.splitlines():
    if " all-reduce(" in line or " all-reduce-start(" in line:
      result = line.split(" all-reduce")[0].split("=", 1)[1]
      for shape in result.replace("(", " ").split():
        if "[" in shape:
          dims = [int(d) for d in shape.split("[")[1].split("]")[0].split(",") if d]
          if np.prod(dims, initial=1) >= smallest_matrix:
            assert model > 1 and any(pair in line for pair in pairs), line
            assert tuple(dims[:2]) in tokens or tuple(dims[:1]) in tokens, line
            of_activations += 1
  # Each block sums its attention's and its feed-forward part's outputs, and their gradients.
  assert of_activations >= (4 * 7 if model > 1 else 0)


def test_a_training_batch_with_padding_is_refused():
  """Its tokens would be counted in the load; a target of weight 0 is no padding."""
  batch = random_batch(small_config(), 0)
  assert (batch["weights"] == 0).any()
  train_step.check_no_padding(batch)
  batch["segments"][3, -2:] = 0
  with pytest.raises(ValueError, match=r"no padding \(segment 0\), got 2 such tokens"):
    train_step.check_no_padding(batch)


@pytest.mark.slow
def test_non_finite_loss_keeps_the_old_state():
  config, mesh = _config()
  state = train_step.init_state(config, mesh)
  params = state.params
  params["norm"] = params["norm"] * np.inf
  old = jax.device_get(state)
  batch = mesh_lib.to_global(random_batch(config, 0), mesh)
  state, metrics = step_of_one_device()(state, batch, hyperparameters.of(config))
  assert not metrics["finite"]
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), old)
