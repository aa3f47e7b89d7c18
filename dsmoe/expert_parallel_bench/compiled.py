"""Compiles the layer with each exchange for chips that are not attached, and reads what it costs.

Shapes: N devices that the batch is split over, M tokens of each, K experts a token.
"""

from typing import Any

import jax

from dsmoe.compilers import compile_only, jaxpr_flops, program_cost
from dsmoe.config import MeshConfig, ModelConfig
from dsmoe.parallel import mesh as mesh_lib
from dsmoe.training import exchange_layer


def rows(
  topology: str, mesh_config: MeshConfig, config: ModelConfig, back_end: str, tokens: int
) -> list[dict[str, Any]]:
  """Compiles a back end for a topology, forward and forward + backward; call it in a new process.

  Args:
    topology: "v5p:4x4x4" say, or "h100": two hosts of eight.
    mesh_config: its axes multiply to the topology's devices.
    config: of the model.
    back_end: name in `dispatch.BACK_ENDS`.
    tokens: of each device.

  Returns:
    A row for each direction, with the figures of `program_cost.figures`, or one with `error`.
  """
  jax.config.update("jax_platforms", "cpu")
  chip, found = compile_only.chip_of(topology), []
  about: dict[str, Any] = {
    "back_end": back_end,
    "stamp": f"compiled for {chip.name}, not run",
    "topology": topology,
    "mesh": {a: size for a in mesh_lib.AXES if (size := getattr(mesh_config, a)) > 1},
    "tokens_per_device": tokens,
  }
  try:
    num_devices = mesh_config.data * mesh_config.expert * mesh_config.context * mesh_config.model
    mesh = mesh_lib.make_mesh(mesh_config, program_cost.devices_of(topology, num_devices))
    own = exchange_layer.config_of(config, back_end)
    about["exchange"] = exchange_layer.options_of(own)
    args = exchange_layer.abstract_inputs(own, mesh, tokens)
    run = exchange_layer.forward(own, mesh)
    for direction, fn, inputs in (
      ("forward", run, args[:3]),
      ("forward + backward", exchange_layer.with_gradients(run), args),
    ):
      with compile_only.tracing_for(mesh):
        traced = jax.jit(fn).trace(*inputs)
        compiled = compile_only.compile_lowered(traced.lower())
      executed = jaxpr_flops.count(traced.jaxpr)
      times = 1 if direction == "forward" else 3
      useful = times * useful_flops(own, tokens)
      figures = program_cost.figures(compiled, mesh, chip, useful, executed)
      found.append(about | {"direction": direction} | figures)
  except Exception as error:
    return [about | {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}]
  return found


def useful_flops(config: ModelConfig, tokens: int) -> int:
  """Returns the FLOPs of a device's tokens in a forward pass: router, chosen and shared experts."""
  experts = config.num_experts_per_tok + config.n_shared_experts
  matrices = 3 * experts * config.moe_intermediate_size + config.n_routed_experts
  return 2 * tokens * config.hidden_size * matrices
