import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.special import logsumexp

from dsmoe.model import mtp
from dsmoe.training import hyperparameters, train_step
from tests import oracles
from tests.helpers import assert_close, forward, mesh_of, random_batch, random_parts, small_config

WEIGHTS = np.array([[1, 0.5, 0, 2, 1.5], [0.25, 1, 3, 1, 0.75]], np.float32)
SEGMENTS = np.array([[1, 1, 1, 2, 2], [1, 2, 2, 2, 0]], np.int32)


def _later_weight(b, s, depth, segments):
  """Of predicting, from place s, the target `depth` places after the next token."""
  if s + depth >= WEIGHTS.shape[1]:
    return 0.0
  if segments is not None and segments[b, s + depth] != segments[b, s]:
    return 0.0
  return WEIGHTS[b, s + depth]


@pytest.mark.parametrize("by", [0, 1, 2, 3])
def test_shift_matches_a_loop(by):
  x = np.random.default_rng(0).integers(0, 99, (2, 5))
  expected = [[row[min(s + by, 4)] for s in range(5)] for row in x.tolist()]
  assert mtp.shift(jnp.asarray(x), by).tolist() == expected


@pytest.mark.parametrize("segments", [None, SEGMENTS], ids=["one_document", "segments"])
@pytest.mark.parametrize("depth", [1, 2, 4])
def test_depth_weights_match_a_loop(depth, segments):
  actual = mtp.depth_weights(jnp.asarray(WEIGHTS), segments, depth)
  expected = [[_later_weight(b, s, depth, segments) for s in range(5)] for b in range(2)]
  assert actual.dtype == jnp.float32 and actual.tolist() == expected


class _Doubling(nnx.Module):
  def __call__(self, x, stats, attended):
    return 2 * x, stats, attended


def test_module_joins_embedding_first():
  config = dataclasses.replace(small_config().model, hidden_size=3, rms_norm_eps=0.1)
  module = mtp.MTPModule(config, _Doubling(), nnx.Rngs(params=0))
  rng = np.random.default_rng(1)
  hidden, embedded = rng.standard_normal((2, 2, 4, 3)).astype(np.float32)
  norms = rng.standard_normal((3, 3)).astype(np.float32)
  projection = rng.standard_normal((6, 3)).astype(np.float32)
  for name, value in zip(("embed_norm", "hidden_norm", "norm"), norms):
    getattr(module, name)[...] = jnp.asarray(value)
  module.eh_proj[...] = jnp.asarray(projection)
  out, stats, attended = module(jnp.asarray(hidden), jnp.asarray(embedded), "stats", "cache")
  assert (stats, attended) == ("stats", "cache")
  for b, s in np.ndindex(2, 4):
    first = oracles.rms_norm(embedded[b, s], norms[0], 0.1)
    second = oracles.rms_norm(hidden[b, s], norms[1], 0.1)
    joined = np.concatenate([first, second]) @ projection
    assert_close(out[b, s], oracles.rms_norm(2 * joined, norms[2], 0.1))


def test_losses_of_a_dense_model_with_two_depths_by_logsumexp():
  """train_step's losses, from the model's hidden states, one target at a time."""
  config = small_config(
    **{
      "batch_size": 2,
      "model.num_hidden_layers": 2,
      "model.n_routed_experts": 0,
      "loss.z_loss_weight": 0.01,
      "loss.mtp_switch_step": 5,
      "loss.mtp_loss_weight": 0.3,
      "loss.mtp_final_loss_weight": 0.1,
    }
  )
  batch = random_batch(config, 0)
  _, params, bias = random_parts(config, 1)
  hiddens = [(h := forward(config)(params, bias, batch))[0], *h[1]]
  head, B, S = params["head"].astype(np.float64), *batch["tokens"].shape
  means = []
  for depth, hidden in enumerate(hiddens):
    nats = z = total = 0.0
    for b, s in np.ndindex(B, S - depth):
      apart = batch["segments"][b, s] != batch["segments"][b, s + depth]
      weight = 0 if apart else batch["weights"][b, s + depth]
      logits = np.asarray(hidden[b, s], np.float64) @ head
      log_z = logsumexp(logits)
      nats += weight * (log_z - logits[batch["targets"][b, s + depth]])
      z += weight * log_z**2
      total += weight
    means.append((nats / total, 0.01 * z / total))
  (main, main_z), *later = means
  mtp_nats, mtp_z = np.mean(later, axis=0)

  step_fn = train_step.make_train_step(config, mesh_of(1))
  zeros = jax.tree.map(
    lambda x: np.zeros(x.shape, x.dtype), train_step.abstract_state(config, mesh_of(1))
  )
  for step, weight in ((4, 0.3), (5, 0.1)):
    state = zeros._replace(params=params, step=np.int32(step))
    _, metrics = step_fn(state, batch, hyperparameters.of(config))
    each = metrics["losses"]
    assert_close((each.cross_entropy, each.z_loss, each.mtp_loss), (main, main_z, mtp_nats))
    assert_close(each.total, main + main_z + weight * (mtp_nats + mtp_z))
    assert metrics["load"] is None and float(each.balance_loss) == 0 and metrics["finite"]
