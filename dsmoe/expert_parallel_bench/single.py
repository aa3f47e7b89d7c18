"""The layer on one CPU device without an exchange, beside which a mesh of CPU devices is timed.

One process for each device of the mesh holds the whole layer, with all experts, and the tokens of
that device; it has one device, pinned to a core of its own. One of them is timed alone, and all at
the same time. A device of the mesh computes as many rows, in the mean over devices: so the time of
one process over the time of the mesh is the share of one device's rate that each device of the mesh
keeps. What it loses to one process that runs alone includes what the cores take from each other
(memory, clock); what it loses to all of them at once is what the exchange costs, and waiting for the
device with the most rows.

Shapes: N devices, M tokens of each, K experts a token.
"""

import contextlib
import functools
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any

import jax
import numpy as np

from dsmoe.config import MeshConfig, ModelConfig
from dsmoe.parallel import mesh as mesh_lib
from dsmoe.training import exchange_check, exchange_layer

ALONE, AT_ONCE = "alone", "at once"
_programs: dict[str, tuple[jax.stages.Compiled, tuple]] = {}  # of this process, by direction


def cores(num_devices: int) -> list[int]:
  """Returns a core for each device, to which this process is then restricted.

  Call it before anything runs: XLA starts as many threads as it finds cores.

  Args:
    num_devices: that the CPU shows as.

  Raises:
    ValueError: where there are none, or fewer cores than devices, or a process cannot be pinned.
  """
  if not num_devices:
    raise ValueError("--single_device needs --fake_devices: it compares devices of a CPU")
  if not hasattr(os, "sched_setaffinity"):
    raise ValueError("--single_device pins a process to a core, which only Linux can")
  available = sorted(os.sched_getaffinity(0))
  if len(available) < num_devices:
    raise ValueError(
      f"--single_device needs a core for each device of the mesh ({num_devices}), "
      f"got {len(available)}"
    )
  os.sched_setaffinity(0, available[:num_devices])
  return available[:num_devices]


@contextlib.contextmanager
def started(cores: list[int]) -> Iterator[list[futures.ProcessPoolExecutor]]:
  """Yields a process pinned to each core, as pools of one."""
  asynchronous = jax.config.read("jax_cpu_enable_async_dispatch")
  context = multiprocessing.get_context("spawn")
  with contextlib.ExitStack() as stack:
    yield [
      stack.enter_context(futures.ProcessPoolExecutor(1, context, _begin, (core, asynchronous)))
      for core in cores
    ]


def _begin(core: int, asynchronous: bool) -> None:
  os.sched_setaffinity(0, {core})
  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_num_cpu_devices", 1)
  jax.config.update("jax_cpu_enable_async_dispatch", asynchronous)


def prepare(pools, config: ModelConfig, expert_NMK: np.ndarray, check_tokens: int) -> str | None:
  """Compiles the layer in every process, each for its device's tokens, and checks it.

  Args:
    pools: of `started`, N of them.
    config: of the model; its dispatch is replaced by `local`.
    expert_NMK: int32, what the devices' tokens choose.
    check_tokens: tokens, at most, that the oracle computes.

  Returns:
    Why it cannot be timed: a result differs from the dense oracle's, or a process has ended. Else None.
  """
  waiting = [
    pool.submit(_prepare, config, expert_NMK[n : n + 1], check_tokens)
    for n, pool in enumerate(pools)
  ]
  try:
    wrong = [reason for each in waiting if (reason := each.result())]
  except futures.process.BrokenProcessPool as error:
    return str(error)
  return f"wrong: {wrong[0]}" if wrong else None


def _prepare(config: ModelConfig, expert_1MK: np.ndarray, check_tokens: int) -> str | None:
  mesh = mesh_lib.make_mesh(MeshConfig(stage=1, data=1, expert=1, context=1, model=1))
  own = exchange_layer.config_of(config, "local")
  few_1MK = expert_1MK[:, :check_tokens]
  few = exchange_layer.inputs(config, mesh, few_1MK)
  oracle = exchange_layer.program(exchange_layer.oracle_of(config), mesh)
  both = exchange_layer.program(own, mesh)
  if wrong := exchange_check.difference(own, both(*few), oracle(*few), few_1MK):
    return wrong
  args = exchange_layer.inputs(config, mesh, expert_1MK)
  forward = exchange_layer.program(own, mesh, gradients=False)
  for direction, fn, inputs in (
    ("forward", forward, args[:3]),
    ("forward + backward", both, args),
  ):
    _programs[direction] = (fn.lower(*inputs).compile(), inputs)
  return None


def _secs(direction: str) -> float:
  run, args = _programs[direction]
  start = time.perf_counter()
  jax.block_until_ready(run(*args))
  return time.perf_counter() - start


def timers(pools) -> dict[tuple[str, str], Callable[[], float]]:
  """Returns functions that run the layer once and return its seconds, by (direction, who runs).

  `who` is `ALONE`, the first process, or `AT_ONCE`, all of them, of which the slowest counts.
  """

  return {
    (direction, who): functools.partial(_slowest, some, direction)
    for direction in ("forward", "forward + backward")
    for who, some in ((ALONE, pools[:1]), (AT_ONCE, pools))
  }


def _slowest(pools, direction: str) -> float:
  return max(each.result() for each in [pool.submit(_secs, direction) for pool in pools])


def rows(
  about: dict[str, Any], num_devices: int, secs: dict[tuple[str, str], list[float]]
) -> list[dict[str, Any]]:
  """Returns a row of the benchmark for each of `timers`, given the seconds of its runs.

  Args:
    about: what all rows of the routing have in common, `tokens_per_device` among it.
    num_devices: N.
    secs: by the keys of `timers`.
  """
  found = []
  for (direction, who), each in secs.items():
    median, times = statistics.median(each), {ALONE: 1, AT_ONCE: num_devices}[who]
    found.append(
      about
      | {
        "mesh": {},
        "back_end": f"local on one device, {who}",
        "direction": direction,
        "median_secs": median,
        "spread": (max(each) - min(each)) / median,
        "tokens_per_sec": times * about["tokens_per_device"] / median,
      }
    )
  return found


def shares(
  direction: str, median: float, secs: dict[tuple[str, str], list[float]]
) -> dict[str, float]:
  """Returns the share of one device's rate that each device of a mesh keeps.

  Args:
    direction: of the run.
    median: seconds that the mesh takes.
    secs: by the keys of `timers`; empty where none was timed.

  Returns:
    `of_one_device`: beside a process that runs alone; `of_devices_at_once`: beside all at once.
  """
  names = {ALONE: "of_one_device", AT_ONCE: "of_devices_at_once"}
  return {
    names[who]: statistics.median(each) / median
    for (of, who), each in secs.items()
    if of == direction
  }
