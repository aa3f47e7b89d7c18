"""The mesh from its config, and what it refuses."""

import socket
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
  with pytest.raises(ValueError, match=r"number of devices \(2\)"):
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
  with socket.socket() as free:
    free.bind(("localhost", 0))
    address = f"localhost:{free.getsockname()[1]}"
  processes = [
    subprocess.Popen(
      [sys.executable, "-c", PROCESS, address, str(i)], stdout=subprocess.PIPE, text=True
    )
    for i in range(2)
  ]
  total = sum(i * i for i in range(4 * 24))
  for process in processes:
    out, _ = process.communicate(timeout=120)
    lines = [line for line in out.splitlines() if "Gloo" not in line]  # of the two processes' link
    assert lines == [f"2 (4, 24) {total}", f"1 (4, 24) {total}"]


def test_named_wraps_every_spec():
  mesh = mesh_of(2)
  wrapped = mesh_lib.named(mesh, {"a": P("data"), "b": [P()]})
  assert wrapped == {"a": NamedSharding(mesh, P("data")), "b": [NamedSharding(mesh, P())]}
