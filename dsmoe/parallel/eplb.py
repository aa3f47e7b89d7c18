"""DeepSeek's expert-parallel load balancer: which experts get copies, and on which device each lies.

A placement is made on the host from loads that were counted earlier, for serving with more slots
than experts. Hot experts get the spare slots, and the slots are packed into devices of equally
many. The hierarchical policy first packs whole groups of experts into nodes, and copies an expert
only within its node, so that a token limited to few groups reaches few nodes. The global policy
knows no nodes; it applies where the groups do not divide over them.

Source: DeepSeek-V3 (arXiv:2412.19437) section 3.4 and github.com/deepseek-ai/EPLB.

Shapes: L layers, E experts, R slots (replicas), C the largest number of copies of an expert.
"""

import heapq
from typing import NamedTuple

import numpy as np


class Placement(NamedTuple):
  """Where each layer's experts lie; a device owns R / num_devices neighbouring slots."""

  phy2log_LR: np.ndarray  # int64, the expert in each slot
  log2phy_LEC: np.ndarray  # int64, the slots of each expert, -1 where it has fewer than C copies
  counts_LE: np.ndarray  # int64, copies of each expert, at least 1


def place(load_LE, num_replicas: int, num_groups: int, num_nodes: int, num_devices: int):
  """Places the experts of every layer so that devices have alike loads.

  Args:
    load_LE: what each expert has to do, rows say; not negative.
    num_replicas: slots in all, R.
    num_groups: groups of neighbouring experts, as routing has them.
    num_nodes: nodes, each with equally many devices. The policy is hierarchical if they divide
      the groups, else global.
    num_devices: devices of all nodes.

  Returns:
    A `Placement`.

  Raises:
    ValueError: for numbers that do not divide as they must, or loads below 0.
  """
  load_LE = np.asarray(load_LE, np.float64)
  if num_groups % num_nodes:
    num_groups = num_nodes = 1
  _check(load_LE, num_replicas, num_groups, num_nodes, num_devices)
  layers = [_layer(load_E, num_replicas, num_groups, num_nodes, num_devices) for load_E in load_LE]
  phy2log_LR, rank_LR = (np.stack(a) for a in zip(*layers))
  L, E = load_LE.shape
  log2phy_LEC = np.full((L, E, rank_LR.max() + 1), -1)
  for log2phy_EC, phy2log_R, rank_R in zip(log2phy_LEC, phy2log_LR, rank_LR):
    log2phy_EC[phy2log_R, rank_R] = np.arange(num_replicas)
  return Placement(phy2log_LR, log2phy_LEC, np.sum(log2phy_LEC >= 0, axis=2))


def _check(load_LE, num_replicas: int, num_groups: int, num_nodes: int, num_devices: int) -> None:
  if load_LE.ndim != 2 or load_LE.size == 0 or not (load_LE >= 0).all():
    raise ValueError(
      f"load_LE must be a matrix [layers, experts] without negative numbers, got {load_LE}"
    )
  E = load_LE.shape[1]
  for name, number, by, divisor in (
    ("experts", E, "groups", num_groups),
    ("devices", num_devices, "nodes", num_nodes),
    ("num_replicas", num_replicas, "devices", num_devices),
  ):
    if number % divisor:
      raise ValueError(f"{name} ({number}) must be divisible by the number of {by} ({divisor})")
  if num_replicas < E:
    raise ValueError(f"num_replicas ({num_replicas}) must be at least the number of experts ({E})")


def _layer(load_E, num_replicas: int, num_groups: int, num_nodes: int, num_devices: int):
  """Returns the expert in each slot, and which of that expert's copies it is, both [R]."""
  group_size = len(load_E) // num_groups
  node_of_group, place_of_group = _packed(load_E.reshape(num_groups, -1).sum(axis=1), num_nodes)
  slots, devices = num_replicas // num_nodes, num_devices // num_nodes
  experts, copies = [], []
  for node in range(num_nodes):
    groups = np.flatnonzero(node_of_group == node)
    groups = groups[np.argsort(place_of_group[groups])]
    own = (groups[:, None] * group_size + np.arange(group_size)).reshape(-1)
    local_S, copy_S, counts = _copied(load_E[own], slots)
    device_S, place_S = _packed((load_E[own] / counts)[local_S], devices)
    order = np.argsort(device_S * (slots // devices) + place_S)
    experts.append(own[local_S][order])
    copies.append(copy_S[order])
  return np.concatenate(experts), np.concatenate(copies)


def _packed(load_N, num_packs: int):
  """Packs things into packs of equally many, the heaviest first, each into the lightest with room.

  Returns:
    The pack of each thing and its place there, in the order of packing.
  """
  N, size = len(load_N), len(load_N) // num_packs
  if size == 1:
    return np.arange(N), np.zeros(N, int)
  pack_N, place_N = np.zeros(N, int), np.zeros(N, int)
  room = [(0.0, pack, 0) for pack in range(num_packs)]  # (load, pack, things in it) of those open
  for i in np.argsort(-load_N, kind="stable"):
    load, pack, things = heapq.heappop(room)
    pack_N[i], place_N[i] = pack, things
    if things + 1 < size:
      heapq.heappush(room, (load + load_N[i], pack, things + 1))
  return pack_N, place_N


def _copied(load_E, num_slots: int):
  """Gives every expert a slot, and each further slot to the one with the most load a copy.

  Returns:
    The expert and the number of its copy in each slot, and the copies of each expert.
  """
  E = len(load_E)
  expert_S, copy_S = np.arange(num_slots), np.zeros(num_slots, int)
  counts_E = np.ones(E, int)
  for slot in range(E, num_slots):
    hottest = np.argmax(load_E / counts_E)
    expert_S[slot], copy_S[slot] = hottest, counts_E[hottest]
    counts_E[hottest] += 1
  return expert_S, copy_S, counts_E
