"""The mixture of experts: shared experts for every token, routed ones for chosen tokens.

Source: DeepSeekMoE (arXiv:2401.06066), DeepSeek-V3 (arXiv:2412.19437) section 2.1.2.

Shapes: B batch, S sequence, M = B S tokens, D hidden, E routed experts, F an expert's
inner size, K experts a token.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from dsmoe.config import ModelConfig
from dsmoe.model import routing
from dsmoe.model.layers import SwiGLU, normal
from dsmoe.parallel import dispatch
from dsmoe.training import balance

FEW_TOKENS = 128


class RouterBias(nnx.Variable):
  """float32 [E], moved by `balance.py` and never by the gradient."""


class MoEStats(NamedTuple):
  """What one MoE layer saw on this device."""

  counts_E: jax.Array  # int32, tokens each expert received
  groups_per_token: jax.Array  # float32 mean
  balance_loss: jax.Array  # float32, summed over sequences


class Experts(nnx.Module):
  """The routed experts' weights, stacked."""

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
    E, D, F = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
    init = functools.partial(normal, rngs, stddev=config.initializer_range)
    self.w_gate = init((E, D, F))
    self.w_up = init((E, D, F))
    self.w_down = init((E, F, D))


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

  def infer(self, x_BSD, real_BS):
    """Returns [B, S, D] without statistics, reading only chosen experts when tokens are few.

    `real_BS` is bool: what comes out for other tokens has no meaning.
    """
    x_MD = x_BSD.reshape(-1, x_BSD.shape[-1])
    routed, _ = self.route(x_MD)
    experts = (self.experts.w_gate[...], self.experts.w_up[...], self.experts.w_down[...])
    if x_MD.shape[0] <= FEW_TOKENS and self.config.matmul_precision == "compute_dtype":
      y_MD = dispatch.few(x_MD, routed, experts, real_BS.reshape(-1))
    else:
      y_MD = dispatch.local(x_MD, routed, experts, self.config)
    y_BSD = y_MD.reshape(x_BSD.shape)
    return y_BSD + self.shared(x_BSD) if self.config.n_shared_experts else y_BSD

  def __call__(self, x_BSD, balancer: balance.Balancer = balance.NONE):
    """Returns [B, S, D] and the layer's `MoEStats`."""
    config = self.config
    B, S, D = x_BSD.shape
    x_MD = x_BSD.reshape(B * S, D)
    with jax.named_scope("routing"):
      routed, logits_ME = self.route(x_MD)
    experts = (self.experts.w_gate[...], self.experts.w_up[...], self.experts.w_down[...])
    back_end = dispatch.BACK_ENDS[config.dispatch]
    y_BSD = back_end(x_MD, routed, experts, config).reshape(B, S, D)
    if config.n_shared_experts:
      with jax.named_scope("shared_experts"):
        y_BSD = y_BSD + self.shared(x_BSD)
    scores_BSE = routing.scores(logits_ME, config.scoring_func).reshape(B, S, -1)
    stats = MoEStats(
      counts_E=routed.counts_E,
      groups_per_token=routing.groups_touched(routed.expert_MK, config),
      balance_loss=balancer.loss(scores_BSE, config.num_experts_per_tok),
    )
    return y_BSD, stats
