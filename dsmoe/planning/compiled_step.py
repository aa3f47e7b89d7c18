"""A run's whole training step, compiled for chips that are not attached."""

from typing import Any

import jax
import numpy as np

from dsmoe.compilers import compile_only, program_cost
from dsmoe.config import Config
from dsmoe.parallel import mesh as mesh_lib
from dsmoe.planning import accounting
from dsmoe.training import hyperparameters, train_step


def figures(config: Config, topology: str) -> dict[str, Any]:
  """Compiles the step for a topology; minutes for a large model.

  Args:
    config: of the run; its mesh has the topology's devices, its batch is the whole one.
    topology: "v5p:8x8x8" say, or "h100": two hosts of eight.

  Returns:
    `stamp`, which says that nothing ran, `mesh`, `tokens_per_device` of a step, and of each device:
    `buffer_bytes`, `memory_bytes`, arguments and temporary buffers together (results take the place
    of arguments), beside the chip's `hbm_bytes`; `axis_bytes` by mesh axis, loops counted as often
    as they run; `model_flops`, what the model needs with causal attention; `compute_secs` and
    `link_secs`, which they take at the chip's peaks; `bound_secs`, the longer of the two, links
    summed over axes, and `tokens_per_sec_bound` of all devices. The compiler's own count of FLOPs
    and memory traffic is left out: it counts the body of a loop once.

  Raises:
    ValueError: when the mesh does not fit the topology or the model.
  """
  chip = compile_only.chip_of(topology)
  devices = program_cost.devices_of(topology)
  mesh = train_step.make_mesh(config, devices)
  state = train_step.abstract_state(config, mesh)
  rows = jax.sharding.NamedSharding(mesh, mesh_lib.batch_spec())
  shape = (config.batch_size, config.data.sequence_length)
  batch = {
    name: jax.ShapeDtypeStruct(shape, dtype, sharding=rows)
    for name, dtype in dict.fromkeys(
      ("tokens", "targets", "positions", "segments"), np.int32
    ).items()
  } | {"weights": jax.ShapeDtypeStruct(shape, np.float32, sharding=rows)}
  hyper = hyperparameters.of(config)
  with compile_only.tracing_for(mesh):
    lowered = train_step.make_train_step(config, mesh).lower(state, batch, hyper)
  compiled = compile_only.compile_lowered(lowered)
  tokens = shape[0] * shape[1] // mesh.size
  flops = accounting.flops_per_token(config.model, shape[1])["causal_mtp"] * tokens
  found = program_cost.figures(compiled, mesh, chip, int(flops))
  compute_secs = flops / chip.peak_flops
  bound_secs = max(compute_secs, sum(found["link_secs"].values()))
  return {
    "stamp": f"compiled for {chip.name}, not run",
    "topology": topology,
    "mesh": dict(mesh.shape),
    "tokens_per_device": tokens,
    "buffer_bytes": found["buffer_bytes"],
    "memory_bytes": found["buffer_bytes"]["arguments"] + found["buffer_bytes"]["temporary"],
    "hbm_bytes": chip.hbm_bytes,
    "axis_bytes": found["axis_bytes"],
    "upper_limit": found["upper_limit"],
    "model_flops": flops,
    "compute_secs": compute_secs,
    "link_secs": found["link_secs"],
    "bound_secs": bound_secs,
    "tokens_per_sec_bound": tokens * mesh.size / bound_secs,
  }
