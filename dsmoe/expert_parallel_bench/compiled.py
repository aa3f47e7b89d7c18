"""Compiles the layer with each exchange for chips that are not attached, and reads what it costs.

Shapes: N devices that the batch is split over, M tokens of each, K experts a token.
"""

from typing import Any

import jax
import numpy as np

from dsmoe.compilers import collective_bytes, compile_only
from dsmoe.config import MeshConfig, ModelConfig
from dsmoe.parallel import mesh as mesh_lib
from dsmoe.planning.chips import Chip
from dsmoe.training import exchange_layer


def devices_of(topology: str, num_devices: int) -> list[jax.Device]:
  """Returns the compile-only devices of a topology.

  Raises:
    ValueError: when the mesh has another number of devices than the topology.
  """
  devices = (
    compile_only.h100_devices()[:num_devices]
    if compile_only.chip_of(topology).name == "h100"
    else compile_only.tpu_devices(topology)
  )
  if len(devices) != num_devices:
    raise ValueError(
      f"the mesh must have the devices of {topology} ({len(devices)}), got {num_devices}"
    )
  return devices


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
    A row for each direction, with the figures of `figures`, or one with `error`.
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
    mesh = mesh_lib.make_mesh(mesh_config, devices_of(topology, num_devices))
    own = exchange_layer.config_of(config, back_end)
    about["exchange"] = exchange_layer.options_of(own)
    args = exchange_layer.abstract_inputs(own, mesh, tokens)
    run = exchange_layer.forward(own, mesh)
    for direction, fn, inputs in (
      ("forward", run, args[:3]),
      ("forward + backward", exchange_layer.with_gradients(run), args),
    ):
      with jax.sharding.use_abstract_mesh(
        mesh.abstract_mesh
      ):  # where GPU kernels look for the chip
        compiled = compile_only.compile_lowered(jax.jit(fn).lower(*inputs))
      times = 1 if direction == "forward" else 3
      useful = times * useful_flops(own, tokens)
      found.append(about | {"direction": direction} | figures(compiled, mesh, chip, useful))
  except Exception as error:
    return [about | {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}]
  return found


def useful_flops(config: ModelConfig, tokens: int) -> int:
  """Returns the FLOPs of a device's tokens in a forward pass: router, chosen and shared experts."""
  experts = config.num_experts_per_tok + config.n_shared_experts
  matrices = 3 * experts * config.moe_intermediate_size + config.n_routed_experts
  return 2 * tokens * config.hidden_size * matrices


def figures(compiled: Any, mesh, chip: Chip, useful: int) -> dict[str, Any]:
  """Reads a compiled program's costs, all of one device.

  Returns:
    `axis_bytes`: by mesh axis what `collective_bytes.by_axis` counts; `upper_limit`: whether some
    of it are sizes of buffers; `buffer_bytes`: arguments, results and temporary buffers;
    `peak_bytes`: the compiler's peak; `flops`, `bytes`, `optimal_secs`: its cost analysis, None
    where it has none; `useful_flops`, `executed_over_useful`; `compute_secs`, `hbm_secs`, and
    `link_secs` by axis: at the chip's peaks, a link's being half of what is published for both
    directions together; `bound` and `bound_secs`: the largest of these, links summed over axes.
  """
  text = compiled.as_text()
  found = collective_bytes.collectives(text, dict(mesh.shape))
  axes = collective_bytes.by_axis(found)
  memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
  flops, moved = cost.get("flops"), cost.get("bytes accessed")
  link_secs = {
    axis: sent["sent_bytes"] / (peak / 2)
    for axis, sent in axes.items()
    if axis != "all" and (peak := link_peak(mesh, chip, axis.split("+")))
  }
  compute = flops and flops / chip.peak_flops
  hbm = moved and chip.hbm_bytes_per_sec and moved / chip.hbm_bytes_per_sec
  bounds = {"compute": compute, "HBM": hbm, "links": sum(link_secs.values())}
  known = {name: secs for name, secs in bounds.items() if secs}
  bound = max(known, key=known.__getitem__, default=None)
  return {
    "axis_bytes": axes,
    "upper_limit": any(c.upper_limit for c in found),
    "asynchronous": sum(c.times for c in found if c.asynchronous),
    "buffer_bytes": {
      "arguments": memory.argument_size_in_bytes,
      "results": memory.output_size_in_bytes,
      "temporary": memory.temp_size_in_bytes,
    },
    "peak_bytes": getattr(memory, "peak_memory_in_bytes", None),
    "flops": flops,
    "bytes": moved,
    "optimal_secs": cost.get("optimal_seconds"),
    "useful_flops": useful,
    "executed_over_useful": flops and flops / useful,
    "compute_secs": compute,
    "hbm_secs": hbm,
    "link_secs": link_secs,
    "bound": bound,
    "bound_secs": bound and known[bound],
  }


def link_peak(mesh, chip: Chip, axes: list[str]) -> float | None:
  """Returns the bytes per second of the links along mesh axes, both directions summed.

  GPUs of several hosts are joined by the network, TPUs of a slice by their interconnect.
  """
  hosts = np.vectorize(lambda device: device.process_index)(mesh.devices)
  along = tuple(mesh.axis_names.index(axis) for axis in axes)
  spans_hosts = bool((hosts.max(axis=along) != hosts.min(axis=along)).any())
  if spans_hosts and mesh_lib.platform_of(mesh) != "tpu":
    return chip.network_bytes_per_sec
  return chip.interconnect_bytes_per_sec
