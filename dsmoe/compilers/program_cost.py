"""What a program that was compiled for a mesh of chips costs: buffers, FLOPs, bytes, and its bound."""

from typing import Any

import jax
import numpy as np

from dsmoe.compilers import collective_bytes, compile_only
from dsmoe.parallel import mesh as mesh_lib
from dsmoe.planning.chips import Chip


def devices_of(topology: str, num_devices: int | None = None) -> list[jax.Device]:
  """Returns the compile-only devices of a topology.

  Args:
    topology: "v5p:4x4x4" say, or "h100": two hosts of eight, of which the first devices are taken.
    num_devices: how many there must be; None takes all.

  Raises:
    ValueError: when the mesh has another number of devices than the topology.
  """
  devices = (
    compile_only.h100_devices()[:num_devices]
    if compile_only.chip_of(topology).name == "h100"
    else compile_only.tpu_devices(topology)
  )
  if num_devices is not None and len(devices) != num_devices:
    raise ValueError(
      f"the mesh must have the devices of {topology} ({len(devices)}), got {num_devices}"
    )
  return devices


def figures(
  compiled: Any, mesh, chip: Chip, useful: int, executed: int | None = None
) -> dict[str, Any]:
  """Reads a compiled program's costs, all of one device.

  Args:
    compiled: the program.
    mesh, chip: what it was compiled for.
    useful: FLOPs that the model needs.
    executed: FLOPs that the program computes at most, as `jaxpr_flops.count` says: with every row of a
      kernel's buffers, filled or not; None where not counted.

  Returns:
    `axis_bytes`: by mesh axis what `collective_bytes.by_axis` counts; `upper_limit`: whether some
    of it are sizes of buffers; `buffer_bytes`: arguments, results and temporary buffers, for which
    TPU's compiler sets more aside than is in use at once where the chip has room; `peak_bytes`: what
    is in use at once, by the compiler; `compiler_flops`, `bytes`, `optimal_secs`: its cost analysis,
    which takes the body of a loop once, None where it has none; `flops`, `useful_flops`: as given;
    `executed_over_useful`; `compute_secs` of the useful FLOPs, `hbm_secs` of `bytes`, and `link_secs` by
    axis: at the chip's peaks, a link's being half of what is published for both directions together;
    `bound` and `bound_secs`: the largest of these, links summed over axes.
  """
  text = compiled.as_text()
  found = collective_bytes.collectives(text, dict(mesh.shape))
  axes = collective_bytes.by_axis(found)
  memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
  moved = cost.get("bytes accessed")
  optimal = cost.get("optimal_seconds")  # below 0 where the compiler does not know a part of it
  link_secs = {
    axis: sent["sent_bytes"] / (peak / 2)
    for axis, sent in axes.items()
    if axis != "all" and (peak := link_peak(mesh, chip, axis.split("+")))
  }
  compute = useful / chip.peak_flops
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
    "flops": executed,
    "compiler_flops": cost.get("flops"),
    "bytes": moved,
    "optimal_secs": optimal if optimal and optimal > 0 else None,
    "useful_flops": useful,
    "executed_over_useful": executed and executed / useful,
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
