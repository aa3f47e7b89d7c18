"""Log-probabilities of tokens, in NumPy from `model.logits` of one document at a time."""

import functools

import jax
import numpy as np
from flax import nnx

from dsmoe import model as model_lib

SEQUENCE_LENGTH = 16
_LONGEST = 40


@functools.cache
def _graphdef(config):
  """Of a model, which is traced to find it: once for all that a test asks."""
  return model_lib.shapes_of(config.model)[0]


def log_probabilities(run, ids):
  """Returns log p(ids[i] | ids[:i]) for i from 1."""
  params, bias = jax.device_get((run.params, run.router_bias))
  # Later tokens change nothing, so that one padded shape serves every length.
  tokens_1S = np.zeros((1, _LONGEST), np.int32)
  tokens_1S[0, : len(ids) - 1] = ids[:-1]
  logits_1SV = model_lib.logits(nnx.merge(_graphdef(run.config), params, bias), tokens_1S)
  logits_SV = np.asarray(logits_1SV, np.float64)[0, : len(ids) - 1]
  log_z_S = np.log(np.exp(logits_SV).sum(-1))
  return np.array([row[i] for row, i in zip(logits_SV, ids[1:])]) - log_z_S
