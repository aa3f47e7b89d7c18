"""What is checked and said of a run before anything of it is rendered or started."""

import functools
import math
import shlex
from typing import Any

import jax

from dsmoe.compilers import compile_only
from dsmoe.config import Config
from dsmoe.launching.topology import Topology
from dsmoe.parallel import mesh as mesh_lib
from dsmoe.training import train_step


def of(config: Config, topology: Topology) -> dict[str, Any]:
  """Checks that a config's mesh fits a topology; nothing is compiled.

  Returns:
    `topology`, in words; `devices`; `hosts`, of all slices; `mesh`, the size of every axis;
    `state_bytes`, a device's part of the parameters and the optimizer's moments, and `hbm_bytes`, a
    device's memory, None where it is not known.

  Raises:
    ValueError: when the mesh does not fit the devices, the model, the batch or the slices, naming
      the nearest that does, or a device cannot hold its part of the state.
  """
  fit = functools.partial(train_step.check_fit, config)
  sizes = mesh_lib.sizes_that_fit(config.mesh, topology.num_devices, topology.joined, fit)
  mesh = jax.sharding.AbstractMesh(tuple(sizes.values()), tuple(sizes))
  part = train_step.device_bytes(train_step.abstract_state(config, mesh))
  room = topology.chip.hbm_bytes if topology.chip else None
  if room is not None and part > room:
    raise ValueError(
      f"parameters and optimizer moments take {part / 2**30:,.1f} GiB on each of "
      f"{topology.num_devices} devices, which must be at most a {topology.kind}'s memory "
      f"({room / 2**30:,.1f} GiB): take more devices along mesh.data or mesh.expert"
    )
  return {
    "topology": str(topology),
    "devices": topology.num_devices,
    "hosts": topology.hosts * topology.num_slices,
    "mesh": sizes,
    "state_bytes": part,
    "hbm_bytes": room,
  }


def line(plan: dict[str, Any], topology: Topology, arguments: list[str]) -> str:
  """Returns what `of` found as one sentence, with the command that tells the rest.

  Args:
    plan: from `of`.
    topology: likewise.
    arguments: that name the config and set its fields.
  """
  mesh = ", ".join(f"{axis} {size}" for axis, size in plan["mesh"].items() if size > 1)
  of_room = "" if plan["hbm_bytes"] is None else f" of {plan['hbm_bytes'] / 2**30:,.1f}"
  text = (
    f"{plan['topology']}, mesh {mesh or 'of one device'}: parameters and optimizer moments take "
    f"{plan['state_bytes'] / 2**30:,.2f}{of_room} GiB of a device"
  )
  compiled = f"{topology.kind}:{topology.size}" if topology.cloud else topology.kind
  can_compile = topology.kind in compile_only.COMPILED and topology.num_slices == 1
  if can_compile and (topology.cloud or math.prod(topology.shape) == 16):
    text += (
      ". For the rest of a step's memory: "
      f"python scripts/bench_train.py {shlex.join(arguments)} --topology={compiled}"
    )
  return text
