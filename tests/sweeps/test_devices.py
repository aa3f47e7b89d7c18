"""How a machine is split among the workers of a sweep."""

import os

import pytest

from dsmoe.sweeps import devices


def test_cores_are_split_evenly():
  number = len(os.sched_getaffinity(0))
  (alone,) = devices.slots(1, "cpu", number, "here 1", {})
  assert alone.cores == tuple(sorted(os.sched_getaffinity(0)))
  each = devices.slots(number, "cpu", number, "here 1", {})
  assert sorted(core for slot in each for core in slot.cores) == list(alone.cores)
  assert len({slot.name for slot in each}) == number and " " not in alone.name
  assert devices.found({"JAX_PLATFORMS": "cpu"}, print) == ("cpu", number)


def test_gpus_are_those_that_the_process_has():
  slots = devices.slots(2, "gpu", 4, "here", {"CUDA_VISIBLE_DEVICES": "3,5,6,7"})
  assert [slot.env["CUDA_VISIBLE_DEVICES"] for slot in slots] == ["3,5", "6,7"]
  assert slots[0].name == "worker_here_gpu_3+5"
  slots = devices.slots(2, "gpu", 2, "here", {})
  assert [slot.env["CUDA_VISIBLE_DEVICES"] for slot in slots] == ["0", "1"]


def test_tpu_chips():
  assert [slot.env for slot in devices.slots(1, "tpu", 4, "here", {})] == [{}]
  slots = devices.slots(4, "tpu", 4, "here", {})
  assert [slot.env["TPU_VISIBLE_CHIPS"] for slot in slots] == ["0", "1", "2", "3"]


@pytest.mark.parametrize(
  ("num_workers", "platform", "number", "message"),
  [
    (0, "cpu", 2, r"from 1 to the number of this machine's cores \(2\), got 0"),
    (9, "gpu", 8, r"from 1 to the number of this machine's devices \(8\), got 9"),
    (3, "gpu", 8, r"--workers \(3\) must divide the 8 devices"),
    (2, "tpu", 4, r"--workers \(2\) must be 1 or the number of this machine's TPU chips \(4\)"),
  ],
)
def test_what_does_not_fit_is_refused(num_workers, platform, number, message):
  with pytest.raises(ValueError, match=message):
    devices.slots(num_workers, platform, number, "here", {})
