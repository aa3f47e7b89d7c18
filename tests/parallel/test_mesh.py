"""The mesh from its config, and what it refuses."""

import dataclasses
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from dsmoe.config import MeshConfig
from dsmoe.parallel import mesh as mesh_lib
from tests import runs
from tests.helpers import mesh_of

ONES = dict(stage=1, data=1, expert=1, context=1, model=1)


def test_make_mesh():
  mesh = mesh_lib.make_mesh(MeshConfig(**ONES | {"data": -1}))
  assert dict(mesh.shape) == ONES | {"data": 8} and mesh.axis_names == mesh_lib.AXES
  assert set(mesh.axis_types) == {AxisType.Auto}
  assert mesh_lib.num_batch_shards(mesh) == 8
  two = mesh_lib.make_mesh(MeshConfig(**ONES | {"data": -1}), jax.devices()[3:5])
  assert two.devices.reshape(-1).tolist() == jax.devices()[3:5]
  assert mesh_lib.single_device_mesh().size == 1


def test_a_mesh_that_does_not_fit_the_devices_is_refused():
  with pytest.raises(ValueError, match=r"'data': 3.* number of devices \(8\)"):
    mesh_lib.make_mesh(MeshConfig(**ONES | {"data": 3}))
  near = r"; the nearest mesh that fits is \{'stage': 1, 'data': 2, 'expert': 1, .*'model': 1\}$"
  with pytest.raises(ValueError, match=r"number of devices \(2\)" + near):
    mesh_lib.make_mesh(MeshConfig(**ONES | {"data": 4}), jax.devices()[:2])


def test_an_axis_that_does_not_exist_yet_is_refused():
  with pytest.raises(ValueError, match=r"mesh.stage must be 1 \(that axis does not exist yet\)"):
    MeshConfig(**ONES | {"stage": 2})


def _mesh_of_processes(process_of_device, **sizes):
  """Stands for a mesh over several processes: axes stage, data, expert, context, model."""
  sizes = ONES | sizes
  devices = [types.SimpleNamespace(process_index=p) for p in process_of_device]
  grid = np.array(devices).reshape(*(sizes[axis] for axis in mesh_lib.AXES))
  return types.SimpleNamespace(devices=grid, shape=sizes)


def test_processes_that_share_rows_read_the_same_part_of_a_batch():
  def parts(mesh):
    return [mesh_lib.part_of_rows(mesh, process) for process in range(4)]

  own = _mesh_of_processes([0, 0, 1, 1, 2, 2, 3, 3], data=2, expert=2, context=2)
  assert parts(own) == [(0, 4), (1, 4), (2, 4), (3, 4)]
  shared = _mesh_of_processes([0, 0, 1, 1, 2, 2, 3, 3], data=2, context=4)
  assert parts(shared) == [(0, 2), (0, 2), (1, 2), (1, 2)]
  mixed = _mesh_of_processes([0, 1, 0, 1, 2, 3, 2, 3], data=4, context=2)
  assert parts(mixed) == [(0, 2), (0, 2), (1, 2), (1, 2)]
  with pytest.raises(ValueError, match=r"same rows of a batch or none in common, got \[\(0, 1\)"):
    parts(_mesh_of_processes([0, 0, 0, 1], data=2, context=2))


PROCESS = """
import sys
import jax, jax.numpy as jnp, numpy as np
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
from jax.sharding import AxisType, Mesh, PartitionSpec
from dsmoe.parallel import collectives, context
from dsmoe.parallel import mesh as mesh_lib

x_BS = np.arange(4 * 24, dtype=np.int32).reshape(4, 24)
for data, along in ((2, 2), (1, 4)):
  devices = np.array(jax.devices()).reshape(1, data, 1, along, 1)
  mesh = Mesh(devices, mesh_lib.AXES, axis_types=(AxisType.Auto,) * 5)
  part, parts = mesh_lib.part_of_rows(mesh, jax.process_index())
  batch = mesh_lib.to_global({"x": np.split(x_BS, parts)[part]}, mesh)

  def squares(x_BS):
    return collectives.sum_over_batch(jnp.sum(jnp.square(context.own_tokens(x_BS))))

  fn = mesh_lib.shard_map(squares, mesh, mesh_lib.batch_spec(), PartitionSpec())
  print(parts, batch["x"].shape, int(jax.jit(fn)(batch["x"])))
"""


def test_a_row_over_two_processes():
  address = f"localhost:{runs.free_port()}"
  processes = [
    subprocess.Popen(
      [sys.executable, "-c", PROCESS, address, str(i)], stdout=subprocess.PIPE, text=True
    )
    for i in range(2)
  ]
  total = sum(i * i for i in range(4 * 24))
  for process in processes:
    out, _ = process.communicate(timeout=runs.LIMIT_SECS)
    lines = [line for line in out.splitlines() if "Gloo" not in line]  # of the two processes' link
    assert lines == [f"2 (4, 24) {total}", f"1 (4, 24) {total}"]


def test_named_wraps_every_spec():
  mesh = mesh_of(2)
  wrapped = mesh_lib.named(mesh, {"a": P("data"), "b": [P()]})
  assert wrapped == {"a": NamedSharding(mesh, P("data")), "b": [NamedSharding(mesh, P())]}


def test_nearest_changes_few_axes_by_small_factors():
  everything = lambda _: True  # noqa: E731
  asked = ONES | {"data": 64, "expert": 8}
  assert mesh_lib.nearest(asked, 512, everything) == asked
  assert mesh_lib.nearest(asked, 256, everything) == asked | {"data": 32}
  few = lambda sizes: 160 % sizes["expert"] == 0  # noqa: E731
  near = mesh_lib.nearest(ONES | {"data": 2, "expert": 64}, 128, few)
  assert near == ONES | {"data": 4, "expert": 32}
  assert mesh_lib.nearest(ONES, 8, lambda sizes: sizes["model"] == 3) == {}
  assert sorted(mesh_lib.factorizations(4, 2)) == [(1, 4), (2, 2), (4, 1)]
  assert len(list(mesh_lib.factorizations(12, 3))) == 18


def test_what_the_check_refuses_is_said_with_the_nearest_mesh_that_fits():
  def check(sizes):
    if sizes["model"] > 2:
      raise ValueError(f"heads (6) must be divisible by mesh.model ({sizes['model']})")

  config = MeshConfig(**ONES | {"data": 2, "model": 4})
  with pytest.raises(ValueError) as error:
    mesh_lib.make_mesh(config, check=check)
  near = ONES | {"data": 4, "model": 2}
  assert str(error.value) == (
    f"heads (6) must be divisible by mesh.model (4); the nearest mesh that fits is {near}"
  )

  def nothing(sizes):
    raise ValueError("it is too wide")

  with pytest.raises(ValueError, match=r"^it is too wide; no mesh of 8 devices fits$"):
    mesh_lib.make_mesh(MeshConfig(**ONES | {"data": 8}), check=nothing)


@dataclasses.dataclass(frozen=True)
class Device:
  """What a mesh looks at of a device."""

  id: int
  process_index: int
  platform: str = "cpu"
  device_kind: str = "fake"


@dataclasses.dataclass(frozen=True)
class SlicedDevice:
  """One that tells its slice."""

  id: int
  slice_index: int
  process_index: int = 0
  platform: str = "cpu"
  device_kind: str = "fake"


def test_slices_are_joined_by_the_outer_part_of_one_axis():
  # The devices of three slices of eight come mixed.
  devices = [SlicedDevice(i, slice_index=i % 3) for i in range(24)]
  shape = (1, 6, 2, 1, 2)
  data = mesh_lib.device_grid(shape, devices, across=1)
  assert data.shape == shape and len({d.id for d in data.flat}) == 24
  for i in range(6):
    assert {d.slice_index for d in data[:, i].flat} == {i // 2}
  expert = mesh_lib.device_grid((1, 2, 6, 1, 2), devices, across=2)
  for i in range(6):
    assert {d.slice_index for d in expert[:, :, i].flat} == {i // 2}
  with pytest.raises(ValueError, match=r"equally many devices, got \[8, 8, 7\]"):
    mesh_lib.device_grid((1, 23, 1, 1, 1), devices[:23], across=1)
  with pytest.raises(ValueError) as error:
    mesh_lib.make_mesh(MeshConfig(**ONES | {"data": 4, "expert": 6}), devices)
  near = ONES | {"data": 3, "expert": 8}
  assert str(error.value) == (
    "mesh.data (4) must be divisible by the number of slices (3) that it joins; "
    f"the nearest mesh that fits is {near}"
  )


def test_devices_that_do_not_tell_their_slice_are_joined_by_process():
  devices = [Device(i, process_index=i // 4) for i in range(8)]
  assert [[d.id for d in group] for group in mesh_lib.slices(devices)] == [
    [0, 1, 2, 3],
    [4, 5, 6, 7],
  ]
  # A TPU's hosts are joined by its torus.
  torus = [dataclasses.replace(device, platform="tpu") for device in devices]
  assert mesh_lib.slices(torus) == [torus]
  # With one device a process nothing says which of them are near each other.
  assert len(mesh_lib.slices([Device(i, process_index=i) for i in range(8)])) == 1
