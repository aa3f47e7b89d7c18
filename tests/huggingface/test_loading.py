"""Published checkpoints: what is computed from them, and what a broken one says."""

import jax
import numpy as np
import optax
import pytest

from dsmoe import model as model_lib
from dsmoe.huggingface import loading
from tests.helpers import TOLERANCE, assert_close
from tests.huggingface import cases


def each_case(*needed: str):
  """Parametrises over the cases that publish tensors with these prefixes."""
  return pytest.mark.parametrize("folder", cases.supported(*needed), ids=cases.label)


def assert_logits(actual, expected):
  """Absolute, as published for the cases."""
  error = np.abs(np.asarray(actual) - expected).max()
  assert error <= TOLERANCE["model_float32"], f"absolute error {error:.2e} on logits"


def batch_of(io):
  return cases.make_batch(io["input_ids"], io.get("labels"))


def test_golden_cases_are_there():
  names = {folder.name for folder in cases.folders() if folder.parent == cases.GOLDEN}
  assert {"v2_group_limited", "v3_mtp", "v3_negative_bias"} <= names


@each_case()
def test_config_and_shapes_are_read(folder):
  case = cases.load(folder)
  config = case.model.config
  for name, value in case.hf_config.items():
    if hasattr(config, name) and name not in ("rope_scaling", "rope_interleave"):
      assert getattr(config, name) == value, name
  rope = case.hf_config.get("rope_scaling") or case.hf_config.get("rope_parameters")
  for name, value in (rope or {"factor": 1.0}).items():
    assert getattr(config.rope_scaling, name, value) == value, name
  assert loading.config_from_hf(loading.config_to_hf(config)) == config
  shapes = model_lib.split(jax.eval_shape(lambda: model_lib.build(config)))[1:]
  for ours, fresh in zip(model_lib.split(case.model)[1:], shapes):
    assert jax.tree.map(lambda x: (x.shape, x.dtype), ours) == jax.tree.map(
      lambda x: (x.shape, x.dtype), fresh
    )


@each_case("dequant.")
def test_fp8_weights_are_scaled(folder):
  """Bit for bit, whole and by rows that begin within a block."""
  opened, compared = loading.open_pretrained(folder), 0
  for name, expected in cases.load(folder).io.items():
    if name.startswith("dequant."):
      name = name.removeprefix("dequant.")
      np.testing.assert_array_equal(opened.read(name), expected)
      np.testing.assert_array_equal(opened.read(name, 37, 131), expected[37:131])
      compared += 1
  assert compared


@each_case("logits")
def test_logits(folder):
  case = cases.load(folder)
  assert_logits(model_lib.logits(case.model, case.io["input_ids"]), case.io["logits"])


@each_case("hidden.")
def test_every_layer(folder):
  case = cases.load(folder)
  seen = cases.walk(case.model, batch_of(case.io))
  compared = [name for name in case.io if name in seen]
  for name in compared:
    if name.endswith("indices_sorted"):
      np.testing.assert_array_equal(seen[name], case.io[name], err_msg=name)
    else:
      try:
        assert_close(seen[name], case.io[name], "model_float32")
      except AssertionError as error:
        raise AssertionError(f"{name}: {error}") from error
  assert any(name.endswith("indices_sorted") for name in compared)


@each_case("loss", "grad.")
def test_loss_and_gradients(folder):
  case = cases.load(folder)
  grads, outcome = cases.loss_and_grads(case.model, batch_of(case.io))
  assert_close(outcome.loss, case.io["loss"][0], "model_float32")
  assert_logits(outcome.logits, case.io["logits"])
  ours = cases.published(grads, case.model)
  for name, expected in case.io.items():
    if name.startswith("grad."):
      try:
        assert_close(ours[name.removeprefix("grad.")], expected, "gradient_float32")
      except AssertionError as error:
        raise AssertionError(f"{name}: {error}") from error
  assert_close(optax.tree.norm(grads), case.io["grad_global_norm"][0], "gradient_float32")


@each_case("padded.")
def test_left_padding(folder):
  case = cases.load(folder)
  mask = case.io["padded.attention_mask"]
  batch = cases.make_batch(case.io["padded.input_ids"], None, mask)
  _, outcome = cases.loss_and_grads(case.model, batch)
  real = mask.astype(bool)
  assert 0 < real.sum() < real.size
  assert_logits(np.asarray(outcome.logits)[real], case.io["padded.logits"][real])


@each_case("train.adamw_losses")
def test_five_steps_of_adamw(folder):
  case = cases.load(folder)
  batch, found = batch_of(case.io), []
  optimizer = optax.adamw(1e-3, 0.9, 0.95, 1e-8, weight_decay=0.1)
  params = model_lib.split(case.model)[1]
  state = optimizer.init(params)

  @jax.jit
  def update(grads, state, params):
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  for _ in case.io["train.adamw_losses"]:
    grads, outcome = cases.loss_and_grads(case.model, batch, params=params)
    params, state = update(grads, state, params)
    found.append(float(outcome.loss))
  assert_close(np.array(found), case.io["train.adamw_losses"], "model_float32")
  assert found[-1] < found[0]


@each_case("mtp.")
def test_multi_token_prediction(folder):
  case = cases.load(folder)
  _, outcome = cases.loss_and_grads(case.model, batch_of(case.io))
  (logits,), (loss,) = outcome.mtp_logits, outcome.mtp_losses
  expected = case.io["mtp.logits"]
  assert_logits(logits[:, : expected.shape[1]], expected)
  assert_close(loss, case.io["mtp.loss"][0], "model_float32")


unsupported = [f for f in cases.folders() if f.name.startswith(cases.UNSUPPORTED)]


@pytest.mark.parametrize("folder", unsupported, ids=cases.label)
def test_unsupported_cases_say_so(folder):
  with pytest.raises(ValueError, match=r"config\.json: .*indexer.* not supported"):
    loading.load_pretrained(folder)
