import numpy as np
import pytest

from dsmoe.parallel import eplb

# The example of github.com/deepseek-ai/EPLB's README: its loads, and what it prints for 16
# replicas, 4 groups, 2 nodes and 8 devices.
LOADS = [
  [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
  [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
]
PHY2LOG = [
  [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
  [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
]


def _loads(L: int, E: int, seed: int):
  rng = np.random.default_rng(seed)
  return rng.integers(1, 2000, (L, E)) // rng.integers(1, 40, (L, E))


def _device_loads(load_LE, placement, num_devices: int):
  """The load of each device [L, devices] when an expert's copies share its load."""
  share_LE = load_LE / placement.counts_LE
  share_LR = np.take_along_axis(share_LE, placement.phy2log_LR, axis=1)
  return share_LR.reshape(len(load_LE), num_devices, -1).sum(axis=2)


def test_equals_the_published_example():
  placement = eplb.place(LOADS, 16, 4, 2, 8)
  np.testing.assert_array_equal(placement.phy2log_LR, PHY2LOG)
  copies = [[row.count(e) for e in range(12)] for row in PHY2LOG]
  np.testing.assert_array_equal(placement.counts_LE, copies)


@pytest.mark.parametrize(
  "E, replicas, groups, nodes, devices",
  [(12, 16, 4, 2, 8), (12, 24, 6, 2, 4), (16, 20, 4, 4, 4), (18, 30, 3, 2, 6), (10, 10, 5, 1, 2)],
)
def test_every_expert_has_a_slot_and_packs_are_equal(E, replicas, groups, nodes, devices):
  load_LE = _loads(3, E, replicas)
  load_LE[2, : E // 2] = 0
  phy2log_LR, log2phy_LEC, counts_LE = eplb.place(load_LE, replicas, groups, nodes, devices)
  assert phy2log_LR.shape == (3, replicas)
  assert counts_LE.min() >= 1 and (counts_LE.sum(axis=1) == replicas).all()
  assert log2phy_LEC.shape == (3, E, counts_LE.max())
  for layer, e in np.ndindex(3, E):
    slots = log2phy_LEC[layer, e]
    assert (slots[counts_LE[layer, e] :] == -1).all()
    found = np.flatnonzero(phy2log_LR[layer] == e)
    np.testing.assert_array_equal(np.sort(slots[: counts_LE[layer, e]]), found)
  if groups % nodes == 0:  # a group's copies all lie in one node, and nodes have equally many
    group_LR = phy2log_LR // (E // groups)
    for group_R in group_LR.reshape(3, nodes, -1).reshape(-1, replicas // nodes):
      assert len(set(group_R)) == groups // nodes


@pytest.mark.parametrize("groups, nodes", [(8, 4), (1, 1), (3, 2)])
def test_devices_are_balanced_better_than_with_one_copy_each(groups, nodes):
  E, devices = 48, 8
  load_LE = _loads(6, E, 0)
  plain = load_LE.reshape(6, devices, -1).sum(axis=2)
  placement = eplb.place(load_LE, 64, groups, nodes, devices)
  loads = _device_loads(load_LE, placement, devices)
  np.testing.assert_allclose(loads.sum(axis=1), load_LE.sum(axis=1))
  assert (loads.max(axis=1) < plain.max(axis=1)).all()
  share_LE = load_LE / placement.counts_LE
  assert (share_LE.max(axis=1) <= load_LE.max(axis=1)).all()


def test_the_hottest_experts_have_the_copies():
  """A greedy choice: no expert's share is above what another's was before its last copy."""
  load_LE = _loads(4, 20, 1)
  counts_LE = eplb.place(load_LE, 32, 1, 1, 4).counts_LE
  for load_E, counts_E in zip(load_LE, counts_LE):
    copied = counts_E > 1
    before_last = load_E[copied] / (counts_E[copied] - 1)
    assert (load_E / counts_E).max() <= before_last.min()


@pytest.mark.parametrize(
  "arguments, message",
  [
    ((12, 16, 5, 1, 8), r"experts \(12\) must be divisible by the number of groups \(5\)"),
    ((12, 16, 4, 2, 9), r"devices \(9\) must be divisible by the number of nodes \(2\)"),
    ((12, 18, 4, 2, 4), r"num_replicas \(18\) must be divisible by the number of devices \(4\)"),
    ((12, 8, 4, 2, 4), r"num_replicas \(8\) must be at least the number of experts \(12\)"),
  ],
)
def test_numbers_that_do_not_divide_are_refused(arguments, message):
  E, *rest = arguments
  with pytest.raises(ValueError, match=message):
    eplb.place(_loads(2, E, 0), *rest)


def test_negative_loads_are_refused():
  with pytest.raises(ValueError, match="without negative numbers"):
    eplb.place([[1, -1]], 2, 1, 1, 2)
