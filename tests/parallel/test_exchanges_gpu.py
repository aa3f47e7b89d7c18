"""The exchanges and the whole step by the H100's compiler: which collectives they become."""

import dataclasses
import math
import re

import jax
import pytest

from dsmoe.compilers import collective_bytes, compile_only, hlo
from dsmoe.config import MeshConfig
from dsmoe.model import parameters
from dsmoe.parallel import mesh as mesh_lib
from dsmoe.training import exchange_layer, train_step
from tests.helpers import abstract_step, small_config
from tests.pallas_kernels.gpu_topology import h100_devices

pytestmark = pytest.mark.gpu

M, D, F, E, K = 256, 512, 384, 8, 2
WEIGHTS = {"all-gather", "reduce-scatter"}  # weights and their gradients, rows of `all_gather` too
# What else each exchange is written as.
ROWS: dict[str, set[str]] = {
  "all_gather": set(),
  "all_to_all": {"ragged-all-to-all", "all-to-all"},
  "ring": {"collective-permute"},
  "replicated": {"ragged-all-to-all", "all-to-all"},
  "hierarchical": {"ragged-all-to-all"},
}
SIZES = {
  "hidden_size": D,
  "moe_intermediate_size": F,
  "n_routed_experts": E,
  "num_experts_per_tok": K,
  "compute_dtype": "bfloat16",
  "remat": "full",
}


def _compiled(mesh, fn, *args):
  """Returns the kinds of the collectives, and the elements of each array that is all-reduced."""
  with compile_only.tracing_for(mesh):
    lowered = fn.lower(*args)
  text = compile_only.compile_lowered(lowered).as_text()
  assert "grouped_matmul_rows_mosaic_gpu" in text  # the chip's own kernels
  kinds = {each.kind for each in collective_bytes.collectives(text, dict(mesh.shape))}
  computations, _ = hlo.parse(text)
  summed = [
    math.prod(int(n) for n in dims.split(",") if n)
    for instructions in computations.values()
    for each in instructions
    if each.opcode.removesuffix("-start") == "all-reduce"
    for dims in re.findall(r"\[([\d,]*)\]", each.shape)
  ]
  return kinds, summed


@pytest.mark.parametrize("back_end", ROWS)
def test_exchanges_become_the_collectives_they_are_written_as(back_end):
  """Value and gradient over 2 x 2 H100s: no row and no weight is all-reduced."""
  model = dataclasses.replace(small_config().model, **SIZES)
  if back_end == "hierarchical":
    exchange = dataclasses.replace(model.exchange, devices_per_group=1)
    model = dataclasses.replace(model, dispatch=back_end, exchange=exchange)
  config = exchange_layer.config_of(model, back_end)
  axes = MeshConfig(stage=1, data=2, expert=2, context=1, model=1)
  mesh = mesh_lib.make_mesh(axes, h100_devices()[:4])
  layer = exchange_layer.with_gradients(exchange_layer.forward(config, mesh))
  kinds, summed = _compiled(mesh, jax.jit(layer), *exchange_layer.abstract_inputs(config, mesh, M))
  assert kinds - {"all-reduce"} == WEIGHTS | ROWS[back_end]
  assert max(summed, default=0) <= M * K  # counts, ranks and gates


def test_a_step_sums_neither_weights_nor_rows():
  model = SIZES | {"num_hidden_layers": 2, "first_k_dense_replace": 1, "intermediate_size": 640}
  model |= {"num_nextn_predict_layers": 0, "kv_lora_rank": 64, "q_lora_rank": 48}
  model |= {"num_attention_heads": 2, "qk_nope_head_dim": 96, "qk_rope_head_dim": 32}
  model |= {"v_head_dim": 64, "dispatch": "all_to_all"}
  fields = {f"model.{name}": value for name, value in model.items()}
  fields |= {"mesh.expert": 2, "data.sequence_length": M, "batch_size": 4}
  config = small_config(**fields)
  mesh, *args = abstract_step(config, h100_devices()[:4])
  kinds, summed = _compiled(mesh, train_step.make_train_step(config, mesh), *args)
  assert WEIGHTS | ROWS["all_to_all"] <= kinds <= WEIGHTS | ROWS["all_to_all"] | {"all-reduce"}
  # The gradients of norms in one, with a loss; others are losses, counts and squares of gradients.
  params = jax.tree.leaves_with_path(args[0].params)
  norms = sum(leaf.size for path, leaf in params if not parameters.is_matrix(path))
  matrices = [leaf.size for path, leaf in params if parameters.is_matrix(path)]
  assert 0 < max(summed) <= norms + 1 < min(matrices)
