"""The mesh from its config, and what it refuses."""

import jax
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
  with pytest.raises(ValueError, match=r"mesh.context must be 1 \(that axis does not exist yet\)"):
    MeshConfig(**ONES | {"context": 2})


def test_named_wraps_every_spec():
  mesh = mesh_of(2)
  wrapped = mesh_lib.named(mesh, {"a": P("data"), "b": [P()]})
  assert wrapped == {"a": NamedSharding(mesh, P("data")), "b": [NamedSharding(mesh, P())]}
