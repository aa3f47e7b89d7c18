"""Tests of dsmoe/training/elastic.py: meshes for other numbers of devices, the batch kept."""

import dataclasses
import math

import pytest

from dsmoe.config import MeshConfig
from dsmoe.training import elastic, train_step
from tests.helpers import small_config


def config_of(data, expert, batch_size=24, num_microbatches=1, across_slices="data"):
  config = small_config(
    batch_size=batch_size,
    num_microbatches=num_microbatches,
    **{"model.dispatch": "all_gather", "model.hidden_size": 48},
  )
  mesh = MeshConfig(1, data, expert, 1, 1, across_slices)
  return dataclasses.replace(config, mesh=mesh)


@pytest.mark.parametrize(
  "mesh, num_devices, expected, num_microbatches",
  [
    ((2, 2), 4, (2, 2), 1),  # as it was asked for
    ((2, 2), 2, (1, 2), 2),  # the first axis gives way; as many rows at once as before
    ((2, 2), 3, (1, 3), 2),  # 24 rows over 3 devices: 8, at most 6 at once
    ((2, 2), 1, (1, 1), 4),
    ((4, 2), 6, (3, 2), 2),
    ((2, 2), 8, (4, 2), 1),  # there are more again
    ((-1, 2), 6, (3, 2), 1),
    ((-1, 2), 3, (1, 3), 1),
  ],
)
def test_the_nearest_mesh_and_no_more_rows_at_once(mesh, num_devices, expected, num_microbatches):
  config = config_of(*mesh)
  found = elastic.config_for(config, num_devices)
  if mesh[0] != -1 or found != config:
    assert (found.mesh.data, found.mesh.expert) == expected
  assert found.num_microbatches == num_microbatches
  kept = {"mesh": config.mesh, "num_microbatches": config.num_microbatches}
  assert dataclasses.replace(found, **kept) == config
  sizes = {"stage": 1, "data": expected[0], "expert": expected[1], "context": 1, "model": 1}
  assert math.prod(sizes.values()) == num_devices
  train_step.check_fit(found, sizes)


def test_a_mesh_that_fits_is_left_alone():
  for mesh, num_devices in (((2, 2), 4), ((-1, 2), 8)):
    config = config_of(*mesh, num_microbatches=3)
    assert elastic.config_for(config, num_devices) == config


@pytest.mark.parametrize(
  "mesh, across_slices, num_microbatches, lost",
  [
    ((4, 2), "data", 1, [(4, 1), (6, 1), (2, 2)]),  # devices and slices that were left in between
    ((2, 4), "expert", 3, [(4, 1), (4, 2), (2, 1)]),
    ((-1, 2), "data", 2, [(2, 1), (6, 3), (4, 2)]),
  ],
)
def test_a_run_whose_devices_are_back_is_that_of_its_config(
  mesh, across_slices, num_microbatches, lost
):
  """Each start is told the config that was asked for, whatever the starts before made of it."""
  config = config_of(*mesh, 144, num_microbatches, across_slices)
  most_rows = 144 // (num_microbatches * (8 if mesh[0] != -1 else 2))
  for num_devices, num_slices in lost:
    found = elastic.config_for(config, num_devices, num_slices)
    rows, rest = divmod(144, num_devices * found.num_microbatches)
    assert rest == 0 and rows <= most_rows
    assert found.mesh.data == -1 or getattr(found.mesh, across_slices) % num_slices == 0
    assert elastic.config_for(config, 8, 2) == config  # the devices are back


def test_slices_are_joined_along_their_axis():
  config = config_of(4, 2, across_slices="expert")
  found = elastic.config_for(config, 4, num_slices=2)
  assert (found.mesh.data, found.mesh.expert, found.num_microbatches) == (2, 2, 2)


def test_what_no_mesh_fits_is_refused_and_fewer_processes_are_found():
  config = config_of(2, 2, batch_size=8)
  with pytest.raises(ValueError, match=r"a batch of 8 rows .* over the 3 devices that are left"):
    elastic.config_for(config, 3)
  assert elastic.most_processes(config, 3, 1) == 2
  assert elastic.most_processes(config, 3, 4) == 2
  with pytest.raises(ValueError, match="from 1 to 3 can go on with 11 devices each"):
    elastic.most_processes(config, 3, 11)
