"""Slices and hosts by their names, and the mesh that fits them."""

import pytest

from dsmoe.launching import plan, topology
from tests.helpers import small_config
from tests.pallas_kernels.topologies import tpu_devices


@pytest.mark.parametrize(
  "text, slices, size, devices, hosts, per_host, joined",
  [
    ("v5p:8x8x8", 1, "8x8x8", 512, 128, 4, 1),
    ("v5p:2x2x1", 1, "2x2x1", 4, 1, 4, 1),
    ("v6e:4x4x1", 3, "4x4", 48, 4, 4, 3),
    ("tpu7x:4x4x8", 2, "4x4x8", 512, 32, 8, 2),
    ("v5e:16x16", 1, "16x16", 256, 64, 4, 1),
    ("h100:3x8", 1, "3x8", 24, 3, 8, 3),
    ("h200:1x8", 1, "1x8", 8, 1, 8, 1),
    ("cpu:5x1", 1, "5x1", 5, 5, 1, 1),
  ],
)
def test_what_a_topology_has(text, slices, size, devices, hosts, per_host, joined):
  found = topology.parse(text, slices)
  assert found.size == size
  assert (found.num_devices, found.hosts) == (devices, hosts)
  assert (found.devices_per_host, found.joined) == (per_host, joined)


@pytest.mark.parametrize(
  "text, slices, message",
  [
    ("v9:2x2", 1, "must begin with one of v4, v5e, v5p, v6e, tpu7x, a100, .*, cpu, got 'v9:2x2'"),
    ("v5p", 1, "topology of v5p must be written v5p:4x4x4, got 'v5p'"),
    ("v6e:0x4", 1, "topology of v6e must be written v6e:4x4, got 'v6e:0x4'"),
    ("v5p:3x4x4", 1, "slice of v5p must be one of 2x2x1, .* ascending multiples .* got 3x4x4"),
    ("v5p:8x4x4", 1, "got 8x4x4"),
    ("v6e:2x2x2", 1, "slice of v6e must be one of 2x2, .*, 16x16, up to 256 chips, got 2x2x2"),
    ("tpu7x:32x32x32", 1, "up to 9216 chips, got 32x32x32"),
    ("h100:8", 1, "topology of h100 must be written h100:2x8, got 'h100:8'"),
    ("h100:2x2x2", 1, "must be written h100:2x8, got 'h100:2x2x2'"),
    ("cpu:2x2", 2, "only TPUs have slices; --num_slices must be 1 for cpu, got 2"),
  ],
)
def test_what_there_is_not_is_refused(text, slices, message):
  with pytest.raises(ValueError, match=message):
    topology.parse(text, slices)


@pytest.mark.tpu
@pytest.mark.parametrize("text", ["v5p:2x2x2", "v6e:4x4", "tpu7x:2x2x4"])
def test_the_compiler_has_the_same_devices_and_hosts(text):
  devices, found = tpu_devices(text), topology.parse(text)
  assert len(devices) == found.num_devices
  assert len({device.process_index for device in devices}) == found.hosts


def test_a_plan_counts_a_devices_part_of_the_state():
  config = small_config(**{"mesh.expert": 4, "model.dispatch": "all_gather"})
  where = topology.parse("v5p:2x2x2")
  found = plan.of(config, where)
  assert (found["devices"], found["hosts"]) == (8, 2)
  assert found["mesh"] == {"stage": 1, "data": 2, "expert": 4, "context": 1, "model": 1}
  one = plan.of(small_config(), topology.parse("cpu:1x1"))
  assert one["hbm_bytes"] is None and found["hbm_bytes"] == 95 * 2**30
  whole, part = one["state_bytes"], found["state_bytes"]
  assert whole / 8 <= part < whole / 8 * 1.3  # norms and the like are on every device
  line = plan.line(found, where, ["--config=experiments/some.py", "--config.seed=a b"])
  assert "8 devices on 2 hosts, mesh data 2, expert 4: parameters" in line
  assert line.endswith(
    "python scripts/bench_train.py --config=experiments/some.py '--config.seed=a b' "
    "--topology=v5p:2x2x2"
  )


def test_a_mesh_that_does_not_fit_is_refused():
  exchange = {"model.dispatch": "all_gather"}
  with pytest.raises(ValueError, match=r"number of devices \(16\); the nearest mesh that fits is"):
    plan.of(
      small_config(**{"mesh.data": 2, "mesh.expert": 4} | exchange), topology.parse("v6e:4x4")
    )
  config = small_config(**{"mesh.data": 4, "mesh.expert": 4} | exchange)
  with pytest.raises(ValueError, match=r"mesh.data \(4\) must be divisible by .* slices \(8\)"):
    plan.of(config, topology.parse("h100:8x2"))


def test_a_state_larger_than_a_device_is_refused():
  config = small_config(**{"model.vocab_size": 2**23, "model.hidden_size": 1024})
  with pytest.raises(ValueError, match=r"at most a v6e's memory \(32.0 GiB\): take more devices"):
    plan.of(config, topology.parse("v6e:2x2"))
