"""The whole training step, every kernel in it, by the TPUs' compilers."""

import re

import numpy as np
import pytest

from dsmoe.compilers import compile_only
from dsmoe.training import train_step
from tests.helpers import abstract_step, small_config
from tests.pallas_kernels.topologies import tpu_devices

pytestmark = pytest.mark.tpu

OWN = ["routing", "routing_gradient", "mla_forward", "mla_backward"]
LOCAL = ["permute", "combine", "grouped_matmul_rows", "grouped_matmul_weights"]
FP8 = ["quantized_matmul", "quantized_permute", "combine", "quantized_grouped_matmul_weights"]
FP8 += ["quantized_swiglu_in", "quantized_swiglu_out"]
FP8 += ["quantized_swiglu_in_gradient", "quantized_swiglu_out_gradient"]


@pytest.mark.parametrize(
  "topology, precision, kernels",
  [
    ("v5p:2x2x1", "compute_dtype", OWN + LOCAL),
    ("v6e:2x2x1", "fp8", OWN + FP8),
    ("tpu7x:2x2x1", "compute_dtype", OWN + LOCAL),
  ],
)
def test_a_step_over_a_mesh_of_tpus_compiles(topology, precision, kernels):
  devices = tpu_devices(topology)
  overrides = {"matmul_precision": precision, "compute_dtype": "bfloat16", "remat": "full"}
  overrides |= {"num_hidden_layers": 2, "first_k_dense_replace": 1}
  overrides |= {"num_nextn_predict_layers": int(precision == "compute_dtype")}  # FP8: long enough
  overrides |= {"hidden_size": 256, "moe_intermediate_size": 128, "intermediate_size": 384}
  overrides |= {"kv_lora_rank": 64, "q_lora_rank": 48, "num_attention_heads": 2}
  overrides |= {
    f"kernels.{name}": "mosaic_tpu"
    for name in ("routing", "grouped_matmul", "attention", "quantized_matmul")
  }
  model = {f"model.{name}": value for name, value in overrides.items()}
  config = small_config(**model, batch_size=len(devices), **{"data.sequence_length": 256})
  mesh, *args = abstract_step(config, devices)
  lowered = train_step.make_train_step(config, mesh).lower(*args)
  text = compile_only.compile_lowered(lowered).as_text()
  calls = re.findall(
    r"([a-z_\d]+?)(?:_\d+x\w+)?[.\d]* = [^\n]*? custom-call\([^\n]*tpu_custom_call", text
  )
  found = {re.sub(r"^(transpose_|jvp_)+|_+$", "", name) for name in calls}
  assert found >= set(kernels)
  # Weights are gathered and their gradients scattered; nothing as large as one is summed whole.
  summed = re.findall(r"= ([^=\n]*?) all-reduce(?:-start)?\(", text)
  sizes = [
    np.prod([int(n) for n in dims.split(",") if n])
    for s in summed
    for dims in re.findall(r"\[([\d,]*)\]", s)
  ]
  assert "reduce-scatter" in text
  assert max(sizes, default=0) < 256 * 128
