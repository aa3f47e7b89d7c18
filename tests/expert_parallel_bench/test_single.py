"""A mesh of CPU devices is timed beside the whole layer on a device of its own."""

import dataclasses
import os

import jax
import pytest

from dsmoe.config import MeshConfig
from dsmoe.expert_parallel_bench import executed, routings, single
from dsmoe.parallel import mesh as mesh_lib
from tests.helpers import small_config

DIRECTIONS = ("forward", "forward + backward")


def test_shares_are_those_of_a_devices_rate():
  secs = {("forward", "alone"): [3.0, 4.0, 9.0], ("forward", "at once"): [5.0]}
  secs |= {("forward + backward", "alone"): [1.0], ("forward + backward", "at once"): [1.0]}
  assert single.shares("forward", 5.0, secs) == {"of_one_device": 0.8, "of_devices_at_once": 1.0}
  assert single.shares("forward", 5.0, {}) == {}
  rows = single.rows({"tokens_per_device": 20, "mesh": {"expert": 2}}, 2, secs)
  assert [row["tokens_per_sec"] for row in rows] == [5, 8, 20, 40]
  assert rows[0]["back_end"] == "local on one device, alone" and rows[0]["mesh"] == {}


@pytest.mark.slow
@pytest.mark.skipif(
  not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2, reason="needs two cores"
)
def test_processes_are_pinned_and_timed_in_the_same_rounds():
  cores = sorted(os.sched_getaffinity(0))[:2]
  axes = MeshConfig(stage=1, data=1, expert=2, context=1, model=1)
  mesh = mesh_lib.make_mesh(axes, jax.devices()[:2])
  config = dataclasses.replace(small_config().model, num_nextn_predict_layers=0)
  drawn = {"balanced": routings.of_name("balanced", 2, 16, config)}
  with single.started(cores) as singles:
    pinned = [each.submit(os.sched_getaffinity, 0).result() for each in singles]
    assert pinned == [{core} for core in cores]
    assert [each.submit(jax.device_count).result() for each in singles] == [1, 1]
    rows = executed.measure(config, mesh, ["all_gather"], drawn, 3, 8, singles)
  *singly, forward, both = rows
  assert [row["back_end"] for row in singly] == [
    f"local on one device, {who}" for _ in DIRECTIONS for who in ("alone", "at once")
  ]
  by_key = {(row["direction"], row["back_end"]): row["median_secs"] for row in singly}
  for direction, row in zip(DIRECTIONS, (forward, both)):
    assert (row["direction"], row["back_end"]) == (direction, "all_gather")
    for name, who in (("of_one_device", "alone"), ("of_devices_at_once", "at once")):
      alone = by_key[direction, f"local on one device, {who}"]
      assert row[name] == pytest.approx(alone / row["median_secs"])
