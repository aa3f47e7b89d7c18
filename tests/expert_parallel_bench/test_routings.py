"""What the benchmark's tokens choose."""

import dataclasses

import numpy as np
import pytest

from dsmoe.expert_parallel_bench import routings
from tests.helpers import small_config
from tests.reporting.test_routing_trace import write_parts


def model(**fields):
  return dataclasses.replace(small_config().model, **fields)


@pytest.mark.parametrize("name", ["balanced", "zipf:1.5"])
def test_drawn_experts_differ_and_keep_to_few_groups(name):
  config = model()  # 12 experts in 4 groups, 3 a token of 2 groups
  expert_NMK = routings.of_name(name, 4, 500, config)
  assert expert_NMK.shape == (4, 500, 3) and expert_NMK.dtype == np.int32
  for experts in expert_NMK.reshape(-1, 3).tolist():
    assert len(set(experts)) == 3 and len({e // 3 for e in experts}) <= 2
  load = np.sort(np.bincount(expert_NMK.ravel(), minlength=12))
  assert load.sum() == 6000 and load[0] > 0
  assert (load[-1] < 1.2 * load.mean()) == (name == "balanced")


def test_a_trace_gives_each_device_the_first_tokens_of_its_part(tmp_path):
  expert_LMK = write_parts(tmp_path, 1)  # 2 layers, 4 rows of 6 tokens
  config = model(n_routed_experts=300, n_group=1, topk_group=1)
  name = f"trace:{tmp_path}/step_5_process_0.npz"
  expert_NMK = routings.of_name(name, 2, 5, config, trace_layer=1)
  np.testing.assert_array_equal(expert_NMK, expert_LMK[1].reshape(2, 12, 3)[:, :5])
  for args, message in (
    ((2, 13, config), r"tokens \(13\) must be at most .* 12 on 2 devices"),
    ((3, 1, config), r"rows of the trace \(4\) must be divisible by the devices \(3\)"),
    ((2, 5, config, 2), "must be from 0 to 1, got 2"),
    ((2, 5, model()), "of the config's 12 experts with 3 a token, .* is of 300 with 3"),
  ):
    with pytest.raises(ValueError, match=message):
      routings.of_name(name, *args)


@pytest.mark.parametrize("name", ["even", "zipf", "zipf:x", "trace:"])
def test_unknown_routings_are_refused(name):
  with pytest.raises(ValueError, match=f"must .*got '{name}'"):
    routings.of_name(name, 2, 5, model())
