"""The mixture of experts: shared experts for every token, routed ones for chosen tokens.

Source: DeepSeekMoE (arXiv:2401.06066), DeepSeek-V3 (arXiv:2412.19437) section 2.1.2.

Shapes: B batch, S sequence, M = B S tokens, D hidden, E routed experts, F an expert's
inner size, K experts a token.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from dsmoe.config import ModelConfig
from dsmoe.model import routing
from dsmoe.model.layers import SwiGLU, normal
from dsmoe.parallel import collectives, dispatch
from dsmoe.parallel.experts import ExpertWeights
from dsmoe.parallel.stats import DispatchStats


class RouterBias(nnx.Variable):
  """float32 [E], moved by `balance.py` and never by the gradient."""


class MoEStats(NamedTuple):
  """What one MoE layer saw on this device."""

  counts_E: jax.Array  # int32, tokens each expert received
  groups_per_token: jax.Array  # float32 mean
  balance_loss: jax.Array  # float32, summed over sequences
  dispatch: DispatchStats
  expert_BSK: jax.Array | None = None  # int32, each token's experts, where they are recorded


class MoEOptions(NamedTuple):
  """How a mixture of experts is run, besides its config."""

  # (float32 scores [B, S, E], experts a token) -> float32 scalar; None: no loss
  balance_loss: Callable | None = None
  # bool [B, S], tokens that count; the results of others are undefined. None: all of them
  real_BS: Any = None
  # No gradient is taken: paths without one may be chosen.
  inference: bool = False
  # Index of this layer in its stack, where `Experts` holds the weights of the whole stack,
  # [L, E, ...]; None where it holds those of one layer.
  layer: int | None = None
  # The stats carry each token's experts.
  record_routing: bool = False


TRAINING = MoEOptions()


class Experts(nnx.Module):
  """The routed experts' weights, stacked."""

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
    E, D, F = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
    init = functools.partial(normal, rngs, stddev=config.initializer_range)
    self.w_gate = init((E, D, F))
    self.w_up = init((E, D, F))
    self.w_down = init((E, F, D))

  def weights(self, layer: int | None) -> ExpertWeights:
    """Returns the layer's weights; see `MoEOptions.layer`."""
    w_gate, w_up, w_down = self.w_gate[...], self.w_up[...], self.w_down[...]
    if layer is None:
      return ExpertWeights(w_gate, w_up, w_down)
    E = w_gate.shape[1]
    w_gate, w_up, w_down = (w.reshape(-1, *w.shape[2:]) for w in (w_gate, w_up, w_down))
    return ExpertWeights(w_gate, w_up, w_down, first=layer * E, num=E)


class MoE(nnx.Module):
  """Router, routed experts, shared experts."""

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
    self.config = config
    D, E = config.hidden_size, config.n_routed_experts
    self.router = normal(rngs, (D, E), config.initializer_range)
    if config.uses_router_bias:
      self.router_bias = RouterBias(jnp.zeros((E,), jnp.float32))
    self.experts = Experts(config, rngs)
    if config.n_shared_experts:
      inner = config.n_shared_experts * config.moe_intermediate_size
      self.shared = SwiGLU(config, inner, rngs)

  def route(self, x_MD) -> tuple[routing.Routing, jax.Array]:
    """Returns where each token goes, and the router's logits [M, E]."""
    logits_ME = routing.router_logits(x_MD, self.router[...])
    bias_E = self.router_bias[...] if self.config.uses_router_bias else None
    return routing.route(logits_ME, bias_E, self.config), logits_ME

  def __call__(self, x_BSD, options: MoEOptions = TRAINING):
    """Returns [B, S, D] and the layer's `MoEStats`."""
    config = self.config
    B, S, D = x_BSD.shape
    x_MD = x_BSD.reshape(B * S, D)
    with jax.named_scope("routing"):
      routed, logits_ME = self.route(x_MD)
    x_MD, gate_MK = collectives.enter_model_axis((x_MD, routed.gate_MK))
    y_MD, dispatched = dispatch.routed_experts(
      x_MD,
      routed._replace(gate_MK=gate_MK),
      self.experts.weights(options.layer),
      config,
      None if options.real_BS is None else options.real_BS.reshape(-1),
      options.inference,
    )
    y_BSD = y_MD.reshape(B, S, D)
    if config.n_shared_experts:
      with jax.named_scope("shared_experts"):
        y_BSD = y_BSD + self.shared(x_MD.reshape(B, S, D))
    y_BSD = collectives.sum_over_model(y_BSD)
    balance_loss = jnp.zeros((), jnp.float32)
    if options.balance_loss is not None:
      with jax.named_scope("balance"):
        scores_BSE = routing.scores(logits_ME, config.scoring_func).reshape(B, S, -1)
        balance_loss = options.balance_loss(scores_BSE, config.num_experts_per_tok)
    with jax.named_scope("routing"):
      groups_per_token = routing.groups_touched(routed.expert_MK, config)
    stats = MoEStats(
      counts_E=routed.counts_E,
      groups_per_token=groups_per_token,
      balance_loss=balance_loss,
      dispatch=dispatched,
      expert_BSK=routed.expert_MK.reshape(B, S, -1) if options.record_routing else None,
    )
    return y_BSD, stats
