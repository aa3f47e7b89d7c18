"""A step for chips that are not there: its buffers are those of the state, its bytes are counted."""

import math

import jax
import numpy as np
import pytest

from dsmoe.compilers import compile_only
from dsmoe.planning import compiled_step
from dsmoe.training import train_step
from tests import runs
from tests.helpers import small_config


@pytest.mark.tpu
def test_memory_holds_a_devices_part_of_the_state():
  pytest.importorskip("libtpu", reason="needs libtpu, the compiler of TPUs: pip install .[tpu]")
  fields = {**runs.TWO_LAYERS, "mesh.expert": 2, "model.dispatch": "all_gather"}
  config = small_config(**fields, **{"model.v_head_dim": 12, "data.sequence_length": 16})
  found = compiled_step.figures(config, "v5p:2x2x1")
  assert found["stamp"] == "compiled for v5p, not run" and found["tokens_per_device"] == 64
  mesh = train_step.make_mesh(config, compile_only.tpu_devices("v5p:2x2x1"))
  state = jax.tree.leaves(train_step.abstract_state(config, mesh))
  least = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in state)
  batch = 5 * 4 * 64  # five fields of 4 bytes
  arguments = found["buffer_bytes"]["arguments"]
  assert least + batch <= arguments < 16 * (least + batch)  # a TPU pads small arrays to its tiles
  assert found["memory_bytes"] > arguments and found["hbm_bytes"] == 95 * 2**30
  assert found["compute_secs"] == pytest.approx(found["model_flops"] / 459e12)
  assert {"data", "expert"} <= set(found["axis_bytes"]) and found["link_secs"]["expert"] > 0
  np.testing.assert_allclose(
    found["tokens_per_sec_bound"],
    4 * 64 / max(found["compute_secs"], sum(found["link_secs"].values())),
  )


@pytest.mark.parametrize(
  "args, message",
  [
    (
      ("--topology=v9:2x2",),
      "topology must be of a chip among v5p, v6e, tpu7x, h100, got 'v9:2x2'",
    ),
    (
      ("--topology=v5p:2x2x1", "--config.mesh.expert=7"),
      "mesh.expert (7) above 1 needs an exchange",
    ),
  ],
)
def test_what_cannot_be_compiled_is_refused_in_one_sentence(args, message):
  code, out, err = runs.call("scripts/bench_train.py", "--config=experiments/tiny.py", *args)
  assert (code, out) == (2, "") and "Traceback" not in err
  assert message in err.splitlines()[-1]
