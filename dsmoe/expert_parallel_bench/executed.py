"""Runs the layer with each exchange on attached devices: checked against the oracle, then timed.

Words: `wire` counts rows that leave a device; `logical` counts for every back end alike the rows
that a deduplicated exchange delivers, one for each device that owns an expert of the token, a row
that stays on its device included. Both are one way, of x; the sums travel back in as many rows.

Shapes: N devices that the batch is split over, M tokens of each, E experts, K experts a token.
"""

import functools
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from typing import Any

import jax
import numpy as np
import rich.console
import rich.progress

from dsmoe.config import ModelConfig
from dsmoe.expert_parallel_bench import profile, single
from dsmoe.planning import chips, exchanges
from dsmoe.training import exchange_check, exchange_layer

STAMP = "no claim about accelerators"
_PROFILED_RUNS = 3


def measure(
  config: ModelConfig,
  mesh: jax.sharding.Mesh,
  back_ends: list[str],
  routings: Mapping[str, np.ndarray],
  rounds: int,
  check_tokens: int,
  singles: Sequence[futures.ProcessPoolExecutor] = (),
) -> list[dict[str, Any]]:
  """Measures every back end with every routing, forward and forward + backward.

  Args:
    config: of the model; its dispatch is replaced.
    mesh: over the attached devices.
    back_ends: names in `dispatch.BACK_ENDS`.
    routings: by name int32 [N, M, K].
    rounds: how often each program is timed, in turns, after two rounds that are not counted.
    check_tokens: tokens of each device, at most, that the oracle computes.
    singles: of `single.started`, one for each device; they are timed in the same rounds.

  Returns:
    A row for each routing, back end and direction. A back end that does not run or is wrong has
    one with `error` for each routing and is not timed; so does the layer on a device of its own, which
    is then not tried again.
  """
  rows, device = [], mesh.devices.flat[0]
  head: dict[str, Any] = {
    "device": f"{mesh.size} x {device.device_kind}",
    "mesh": {axis: size for axis, size in mesh.shape.items() if size > 1},
    "stamp": STAMP if device.platform == "cpu" else None,
  }
  configs = {name: exchange_layer.config_of(config, name) for name in back_ends}
  # For the comparison, receive buffers hold whatever comes: what is dropped would differ.
  checked = {
    name: exchange_layer.program(exchange_layer.with_room_for_all(own, mesh.shape["expert"]), mesh)
    for name, own in configs.items()
  }
  oracle = exchange_layer.program(exchange_layer.oracle_of(config), mesh)
  compiled: dict[tuple[str, str], jax.stages.Compiled] = {}
  for routing, expert_NMK in routings.items():
    args = exchange_layer.inputs(config, mesh, expert_NMK)
    few_NMK = expert_NMK[:, :check_tokens]
    few = exchange_layer.inputs(config, mesh, few_NMK)
    expected, programs = oracle(*few), {}
    if singles:
      print(
        f"{routing}: compiling and checking the layer on one device", file=sys.stderr, flush=True
      )
      if wrong := single.prepare(singles, config, expert_NMK, check_tokens):
        about = {"routing": routing, "back_end": "local on one device", "error": wrong}
        rows.append(head | about)
        singles = ()
    for name, own in configs.items():
      about = head | {
        "routing": routing,
        "back_end": name,
        "exchange": exchange_layer.options_of(own),
      }
      about["tokens_per_device"] = expert_NMK.shape[1]
      print(f"{routing}: compiling and checking {name}", file=sys.stderr, flush=True)
      try:
        wrong = exchange_check.difference(own, checked[name](*few), expected, few_NMK)
        if wrong:
          rows.append(about | {"error": f"wrong: {wrong}"})
          continue
        for direction in ("forward", "forward + backward"):
          inputs = args[:3] if direction == "forward" else args
          if (name, direction) not in compiled:
            fn = exchange_layer.program(own, mesh, gradients=direction != "forward")
            compiled[name, direction] = fn.lower(*inputs).compile()
          programs[name, direction] = (about, compiled[name, direction], inputs)
      except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        rows.append(about | {"error": reason})
    timers = {key: functools.partial(_secs, *program[1:]) for key, program in programs.items()}
    alone = single.timers(singles) if singles else {}
    secs = _in_turns(timers | alone, rounds)
    secs_alone = {key: secs[key] for key in alone}
    common = head | {"routing": routing, "tokens_per_device": expert_NMK.shape[1]}
    rows += single.rows(common, mesh.size, secs_alone)
    for (name, direction), (about, run, inputs) in programs.items():
      parts = profile.secs_of_parts(run, inputs, mesh.size, _PROFILED_RUNS)
      outcome = jax.device_get(run(*inputs)[1])
      found = figures(configs[name], mesh, expert_NMK, outcome, direction)
      found |= timings(secs[name, direction], expert_NMK, parts, found, device)
      found |= single.shares(direction, found["median_secs"], secs_alone)
      rows.append(about | {"direction": direction} | found)
  return rows


def _in_turns(
  timers: Mapping[tuple[str, str], Callable[[], float]], rounds: int
) -> dict[tuple[str, str], list[float]]:
  """Times each once a round, so that a busy machine slows all of them; returns seconds."""
  secs: dict[tuple[str, str], list[float]] = {key: [] for key in timers}
  to = rich.console.Console(stderr=True)
  for number in rich.progress.track(range(rounds + 2), "timing", console=to, transient=True):
    for key, timer in timers.items():
      took = timer()
      if number >= 2:
        secs[key].append(took)
  return secs


def _secs(run: jax.stages.Compiled, args: tuple) -> float:
  start = time.perf_counter()
  jax.block_until_ready(run(*args))
  return time.perf_counter() - start


def figures(config: ModelConfig, mesh, expert_NMK, outcome, direction: str) -> dict[str, Any]:
  """Returns what a run sent and dropped, and the least that its routing needs.

  Returns:
    `wire_bytes_per_token`, `logical_bytes_per_token`, `least_bytes_per_token` (a row for every
    other device that owns an expert of the token): of x, one way, a pass. `dropped_rows`: of all
    devices. `exchanged_bytes`: of a forward pass, that the device which sends most sends, rows of
    x and as many sums; `logical_bytes`: the same count of logical rows. None with a backward pass.
  """
  T, row = expert_NMK.shape[0] * expert_NMK.shape[1], exchanges.row_bytes(config)
  E, degree = config.n_routed_experts, mesh.shape["expert"]
  least, logical = exchanges.least_rows(expert_NMK, E, degree)
  # How often rows travel in the backward pass depends on what is rematerialised.
  both_ways = row + exchanges.sum_bytes(config) if direction == "forward" else None
  return {
    "wire_bytes_per_token": int(outcome.sent_N.sum()) * row / T,
    "least_bytes_per_token": int(least.sum()) * row / T,
    "logical_bytes_per_token": int(logical.sum()) * row / T,
    "dropped_rows": int(outcome.dropped_N.sum()),
    "exchanged_bytes": both_ways and int(outcome.sent_N.max()) * both_ways,
    "logical_bytes": both_ways and int(logical.max()) * both_ways,
  }


def timings(secs: list[float], expert_NMK, parts: dict, found: dict, device) -> dict[str, Any]:
  """Returns medians and rates; bandwidths are of one direction of one device's links."""
  median = statistics.median(secs)
  exchange = parts.get("exchange") or None
  chip = chips.of_device(device)
  peak = chip and chip.interconnect_bytes_per_sec and chip.interconnect_bytes_per_sec / 2
  wire, logical = (
    found[name] / exchange if exchange and found[name] else None
    for name in ("exchanged_bytes", "logical_bytes")
  )
  return {
    "median_secs": median,
    "spread": (max(secs) - min(secs)) / median,
    "tokens_per_sec": expert_NMK.shape[0] * expert_NMK.shape[1] / median,
    "parts_secs": parts,
    "wire_bytes_per_sec": wire,
    "logical_bytes_per_sec": logical,
    "link_peak_bytes_per_sec": peak,
    "of_link_peak": wire / peak if wire and peak else None,
    "chip": chip and chip.name,
  }
