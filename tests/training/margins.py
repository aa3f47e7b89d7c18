"""How far a model's choices of experts are from being others, and how far rounding moves its scores."""

from unittest import mock

import jax
import numpy as np
from flax import nnx

from dsmoe import model as model_lib
from dsmoe.model import moe, parameters, routing
from dsmoe.parallel import mesh as mesh_lib
from dsmoe.training import kernel_check
from tests.helpers import mesh_of


def biased_scores(config):
  """Returns a function (params, router_bias, batch) -> float64 scores of every MoE layer on one device.

  They have the bias added and are [L, M, E], the layers of multi-token prediction last. The layers
  give them in the place where a run records its tokens' experts.
  """
  graphdef, params, bias = model_lib.shapes_of(config.model)

  def run(params, bias, batch):
    seen, route, stats = [], routing.route, moe.MoEStats

    def seeing(logits_ME, bias_E, config):
      seen.append(routing.scores(logits_ME, config.scoring_func) + bias_E[None])
      return route(logits_ME, bias_E, config)

    def recording(expert_BSK, **others):
      return stats(expert_BSK=seen.pop().reshape(*expert_BSK.shape[:2], -1), **others)

    segments = None if config.data.cross_document_attention else batch["segments"]
    rest = (batch["targets"], None, True)
    with mock.patch.multiple(routing, route=seeing), mock.patch.multiple(moe, MoEStats=recording):
      model = nnx.merge(graphdef, params, bias)
      scores_LBSE = model(batch["tokens"], batch["positions"], segments, *rest).stats.expert_BSK
    return scores_LBSE.reshape(scores_LBSE.shape[0], -1, scores_LBSE.shape[-1])

  mesh, tokens = mesh_of(1), jax.sharding.PartitionSpec(None, mesh_lib.BATCH_AXES)
  specs = (parameters.specs(params, mesh), parameters.specs(bias, mesh), mesh_lib.batch_spec())
  scores = jax.jit(mesh_lib.shard_map(run, mesh, specs, tokens))
  return lambda *args: np.asarray(scores(*args), np.float64)


def smallest(scores_LME, config) -> float:
  """Returns the smallest difference of scores that a choice hangs on."""
  rule = routing.rule(config.model)
  return min(kernel_check.margins(scores_ME, rule).min() for scores_ME in scores_LME)
