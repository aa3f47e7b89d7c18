"""Which experts the benchmark's tokens choose: drawn at random, or read from a recorded trace.

Shapes: N devices, M tokens a device, E experts, K experts a token, G groups of experts.
"""

import numpy as np

from dsmoe.config import ModelConfig
from dsmoe.planning import what_if
from dsmoe.reporting import routing_trace
from dsmoe.training import exchange_layer


def of_name(
  name: str, num_devices: int, tokens: int, config: ModelConfig, trace_layer: int = 0
) -> np.ndarray:
  """Returns the experts that a routing gives each device's tokens, int32 [N, M, K].

  Args:
    name: `balanced`: all experts are equally likely; `zipf:A`: the i-th of them, in an order drawn
      at random, has a likelihood proportional to i to the power -A; `trace:FILE`: as recorded, the
      first tokens of each device's part of the batch. Drawn tokens keep the config's limit of
      groups.
    num_devices: over which the batch is split, N.
    tokens: of each device, M.
    config: of the model: n_routed_experts, num_experts_per_tok, n_group, topk_group.
    trace_layer: the MoE layer of a trace whose routing it is.

  Raises:
    ValueError: for an unknown routing, or a trace of another model, with fewer tokens or layers.
  """
  kind, _, value = name.partition(":")
  if name == "balanced":
    return exchange_layer.draw(num_devices, tokens, config, 0.0)
  if kind == "zipf":
    try:
      return exchange_layer.draw(num_devices, tokens, config, float(value))
    except ValueError:
      raise ValueError(f"routing zipf:A must have a number for A, got {name!r}") from None
  if kind == "trace" and value:
    return _of_trace(value, num_devices, tokens, config, trace_layer)
  raise ValueError(f"routing must be balanced, zipf:A or trace:FILE, got {name!r}")


def _of_trace(path: str, num_devices: int, tokens: int, config: ModelConfig, layer: int):
  trace = routing_trace.read(path)
  L, _, K = trace.expert_LMK.shape
  if (trace.num_experts, K) != (config.n_routed_experts, config.num_experts_per_tok):
    raise ValueError(
      f"the trace must be of the config's {config.n_routed_experts} experts with "
      f"{config.num_experts_per_tok} a token, {path} is of {trace.num_experts} with {K}"
    )
  if not 0 <= layer < L:
    raise ValueError(f"the layer of the trace must be from 0 to {L - 1}, got {layer}")
  own_LNMK = what_if.by_device(trace, num_devices)[:, 0]
  if own_LNMK.shape[2] < tokens:
    raise ValueError(
      f"tokens ({tokens}) must be at most those of a device and microbatch in {path}: "
      f"{own_LNMK.shape[2]} on {num_devices} devices"
    )
  return own_LNMK[layer, :, :tokens].astype(np.int32)
