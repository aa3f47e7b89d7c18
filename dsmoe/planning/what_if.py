"""What every exchange and expert degree would do with a recorded step; in NumPy, without devices.

Shapes: L layers, n microbatches, N devices, M tokens of each, K experts a token, E experts, X
devices along the axis `expert`, R slots for experts and their copies, C copies of an expert.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np

from dsmoe.config import ModelConfig
from dsmoe.parallel import eplb
from dsmoe.planning import exchanges
from dsmoe.planning.chips import Chip
from dsmoe.planning.exchanges import EXCHANGES, Rows
from dsmoe.reporting.routing_trace import Trace

# Back ends that place experts themselves, or bring every token to every device anyhow.
WITHOUT_COPIES = ("dense", "all_gather", "ring", "replicated")


def by_device(trace: Trace, num_devices: int) -> np.ndarray:
  """Returns the experts of each device's tokens in each exchange of a step, [L, n, N, M, K].

  Args:
    trace: with n microbatches.
    num_devices: over which the batch is split.

  Raises:
    ValueError: when the rows do not divide over devices and microbatches.
  """
  n, S = trace.num_microbatches, trace.sequence_length
  if trace.num_rows % (num_devices * n):
    raise ValueError(
      f"the rows of the trace ({trace.num_rows}) must be divisible by the devices ({num_devices}) "
      f"times its microbatches ({n})"
    )
  L, _, K = trace.expert_LMK.shape
  rows = trace.num_rows // (num_devices * n)
  return trace.expert_LMK.reshape(L, num_devices, n, rows * S, K).swapaxes(1, 2)


def what_if(
  trace: Trace,
  config: ModelConfig,
  num_devices: int,
  degrees: Iterable[int],
  back_ends: Iterable[str],
  chip: Chip,
  copies: Iterable[int] = (0,),
) -> list[dict[str, Any]]:
  """Computes what a step's forward pass would exchange with each back end and expert degree.

  Args:
    trace: the routing of a step.
    config: of the model: its sizes, and the exchange's receive_capacity and precision.
    num_devices: over which the batch is split.
    degrees: numbers of devices along `expert`; each must divide num_devices.
    back_ends: names in `exchanges.EXCHANGES`.
    chip: whose peaks bound the step.
    copies: for each number a placement with so many slots more than experts, 0 is the experts'
      own order. Copies are placed by `eplb` for the loads of this very trace; a token takes the
      copy on its own device, or else one by its number in the sequence of tokens.

  Returns:
    A row for each degree, placement and back end that can have them. Of all MoE layers and exchanges of the step:
    `wire_bytes_per_token`, one way, and `least_bytes_per_token`, as `least_rows` counts, both of
    all layers; `buffer_factor`, the most rows that come to a device in an exchange over the
    mean; `dropped_rows`, None where that is not computed, as for `hierarchical`;
    `compute_secs` and `link_secs`: the sum over exchanges of the time that the device with most
    rows needs at the chip's peak FLOP/s, and that the one which sends most needs at half of the
    interconnect's bytes per second; `bound_secs`: the larger of the two in each exchange, summed.

  Raises:
    ValueError: for a trace of another model, or numbers that do not divide.
  """
  E, K = config.n_routed_experts, config.num_experts_per_tok
  if (trace.num_experts, trace.expert_LMK.shape[2]) != (E, K):
    raise ValueError(
      f"the trace must be of the config's {E} experts with {K} a token, it is of "
      f"{trace.num_experts} with {trace.expert_LMK.shape[2]}"
    )
  if chip.interconnect_bytes_per_sec is None:
    raise ValueError(f"the table of chips must have the interconnect of {chip.name}")
  expert_LnNMK, rows = by_device(trace, num_devices), []
  for degree in degrees:
    if num_devices % degree:
      raise ValueError(f"the devices ({num_devices}) must be divisible by the degree ({degree})")
    for spare in copies:
      owner_LnNMK = placed(trace, expert_LnNMK, E, degree, spare)
      exchanged = [
        Rows(expert_NMK, owner_NMK, E, degree, config.exchange)
        for layer in zip(expert_LnNMK, owner_LnNMK)
        for expert_NMK, owner_NMK in zip(*layer)
      ]
      for name in back_ends:
        copies_unused = spare and name in WITHOUT_COPIES
        if not copies_unused and not exchanges.refused(name, degree, config.exchange):
          about = {"back_end": name, "expert_degree": degree, "copies": spare}
          rows.append(about | _totals(exchanged, name, config, chip, trace))
  return rows


def _totals(exchanged: list[Rows], name: str, config: ModelConfig, chip: Chip, trace: Trace):
  """Sums the exchanges of a step; see `what_if`."""
  works = [EXCHANGES[name](rows) for rows in exchanged]
  tokens, row = trace.num_rows * trace.sequence_length, exchanges.row_bytes(config)
  flops = 6 * config.hidden_size * config.moe_intermediate_size
  assert chip.interconnect_bytes_per_sec is not None
  way = (row + exchanges.sum_bytes(config)) / (chip.interconnect_bytes_per_sec / 2)
  compute = [flops * int(work.computed_N.max()) / chip.peak_flops for work in works]
  link = [int(work.sent_N.max()) * way for work in works]
  dropped = [work.dropped_N for work in works if work.dropped_N is not None]
  return {
    "wire_bytes_per_token": sum(int(work.sent_N.sum()) for work in works) * row / tokens,
    "least_bytes_per_token": sum(int(exchanges.least(r)[0].sum()) for r in exchanged)
    * row
    / tokens,
    "buffer_factor": max(work.buffer_factor for work in works),
    "dropped_rows": sum(int(n.sum()) for n in dropped) if dropped else None,
    "compute_secs": sum(compute),
    "link_secs": sum(link),
    "bound_secs": sum(map(max, compute, link)),
  }


def placed(trace: Trace, expert_LnNMK: np.ndarray, E: int, degree: int, spare: int) -> np.ndarray:
  """Returns the place along `expert` of the device that each row goes to; see `what_if`."""
  if not spare:
    return exchanges.owners(expert_LnNMK, E, degree)
  # One node: the global policy. All exchange groups share a placement.
  placement = eplb.place(trace.counts_LE, E + spare, 1, 1, degree)
  slots = (E + spare) // degree
  owner_LnNMK = np.empty(expert_LnNMK.shape, np.int64)
  N, M = expert_LnNMK.shape[2:4]
  own_N = np.arange(N)[:, None, None] % degree
  turn_NM = np.arange(N * M).reshape(N, M, 1)
  for layer, expert_nNMK in enumerate(expert_LnNMK):
    num_E, slot_EC = placement.counts_LE[layer], placement.log2phy_LEC[layer]
    for i, expert_NMK in enumerate(expert_nNMK):
      slot_NMK = slot_EC[expert_NMK, turn_NM % num_E[expert_NMK]]
      owner = slot_NMK // slots
      for c in range(slot_EC.shape[1]):
        at = slot_EC[expert_NMK, c]
        owner = np.where((at >= 0) & (at // slots == own_N), own_N, owner)
      owner_LnNMK[layer, i] = owner
  return owner_LnNMK
