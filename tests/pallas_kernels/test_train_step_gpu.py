"""The whole training step, every kernel in it, by the H100's compiler."""

import jax
import pytest

from dsmoe.compilers import compile_only
from dsmoe.training import train_step
from tests.helpers import abstract_step, small_config
from tests.pallas_kernels.gpu_topology import h100_devices

pytestmark = pytest.mark.gpu

OWN = ["routing", "routing_gradient", "attention", "attention_gradient_keys"]
OWN += ["attention_gradient_values", "attention_gradient_queries", "permute", "combine"]
LOCAL = ["grouped_matmul_rows", "grouped_matmul_weights"]
FP8 = ["permute_quantized", "quantized_rows", "quantized_weights"]
FP8 += ["quantize_weights", "quantize_weights_both", "quantize_groups", "quantize_groups_both"]


@pytest.mark.parametrize("precision, kernels", [("compute_dtype", LOCAL), ("fp8", FP8)])
def test_a_step_over_a_mesh_of_h100s_compiles(precision, kernels):
  devices = h100_devices()[:2]
  overrides = {"matmul_precision": precision, "compute_dtype": "bfloat16", "remat": "full"}
  overrides |= {"num_hidden_layers": 2, "first_k_dense_replace": 1, "num_nextn_predict_layers": 1}
  overrides |= {"hidden_size": 256, "moe_intermediate_size": 128, "intermediate_size": 384}
  overrides |= {"kv_lora_rank": 64, "q_lora_rank": 48, "num_attention_heads": 2}
  overrides |= {"qk_nope_head_dim": 96, "qk_rope_head_dim": 32, "v_head_dim": 64}
  overrides |= {
    f"kernels.{name}": "mosaic_gpu"
    for name in ("routing", "grouped_matmul", "attention", "quantized_matmul")
  }
  model = {f"model.{name}": value for name, value in overrides.items()}
  config = small_config(**model, batch_size=len(devices), **{"data.sequence_length": 256})
  mesh, *args = abstract_step(config, devices)
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    lowered = train_step.make_train_step(config, mesh).lower(*args)
  text = compile_only.compile_lowered(lowered).as_text()
  missing = [name for name in OWN + kernels if f"{name}_mosaic_gpu" not in text]
  assert not missing, missing
