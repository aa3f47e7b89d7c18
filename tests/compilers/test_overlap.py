"""What runs between the start and the end of a collective, by hand, and on a TPU's compiler."""

import dataclasses
import os

import jax
import pytest

from dsmoe import config as config_lib
from dsmoe.compilers import compile_only, overlap, program_cost
from dsmoe.config import MeshConfig
from dsmoe.parallel import mesh as mesh_lib
from dsmoe.platforms import xla_flags
from dsmoe.profiling import scopes
from dsmoe.training import exchange_layer
from experiments import deepseek_v2_lite

HLO = """HloModule scheduled, is_scheduled=true

%product (p: f32[8,8]) -> f32[8,8] {
  %p = f32[8,8]{1,0} parameter(0)
  ROOT %dot.1 = f32[8,8]{1,0} dot(f32[8,8]{1,0} %p, f32[8,8]{1,0} %p), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%copied (q: f32[8,8]) -> f32[8,8] {
  %q = f32[8,8]{1,0} parameter(0)
  ROOT %copy.1 = f32[8,8]{1,0} copy(f32[8,8]{1,0} %q)
}

ENTRY %main (x: f32[8,8], y: f32[8,8]) -> f32[8,8] {
  %x = f32[8,8]{1,0} parameter(0)
  %y = f32[8,8]{1,0} parameter(1)
  %all-gather-start.1 = (f32[8,8]{1,0}, f32[16,8]{1,0}) all-gather-start(f32[8,8]{1,0} %x), replica_groups={{0,1}}, dimensions={0}, metadata={op_name="jit(f)/weights"}
  %fusion.1 = f32[8,8]{1,0} fusion(f32[8,8]{1,0} %y), kind=kOutput, calls=%product, metadata={op_name="jit(f)/experts/dot"}
  %custom.1 = f32[8,8]{1,0} custom-call(f32[8,8]{1,0} %y), custom_call_target="tpu_custom_call", metadata={op_name="jit(f)/routing"}
  %all-gather-done.1 = f32[16,8]{1,0} all-gather-done((f32[8,8]{1,0}, f32[16,8]{1,0}) %all-gather-start.1)
  %collective-permute-start.1 = (f32[8,8]{1,0}, f32[8,8]{1,0}) collective-permute-start(f32[8,8]{1,0} %fusion.1), source_target_pairs={{0,1},{1,0}}
  %fusion.2 = f32[8,8]{1,0} fusion(f32[8,8]{1,0} %y), kind=kLoop, calls=%copied
  %collective-permute-done.1 = f32[8,8]{1,0} collective-permute-done((f32[8,8]{1,0}, f32[8,8]{1,0}) %collective-permute-start.1)
  ROOT %all-reduce.1 = f32[8,8]{1,0} all-reduce(f32[8,8]{1,0} %collective-permute-done.1), replica_groups={{0,1}}, to_apply=%copied
}
"""


def test_products_and_kernels_between_start_and_done_hide_a_collective():
  gather, permute, reduce = overlap.schedule(HLO)
  assert (gather.kind, gather.is_split, gather.scope) == ("all-gather", True, "jit(f)/weights")
  assert gather.between == ("jit(f)/experts/dot", "jit(f)/routing") and not gather.is_exposed
  # A copy takes as long as the bytes it moves: it hides nothing.
  assert (permute.kind, permute.is_split, permute.between) == ("collective-permute", True, ())
  assert (reduce.kind, reduce.is_split, reduce.is_exposed) == ("all-reduce", False, True)


def exchanges_of(purposes: list[str], chunks: int) -> list[tuple[bool, list[str]]]:
  """Compiles an MoE layer's forward pass over four v5p chips; call it in a new process.

  Returns:
    Of each exchange of rows whether it is split, and the parts of the model that run meanwhile.
  """
  os.environ["LIBTPU_INIT_ARGS"] = xla_flags.text(xla_flags.chosen("v5p", purposes))
  sizes = {"hidden_size": 512, "moe_intermediate_size": 256, "n_routed_experts": 16}
  config = config_lib.from_config_dict(deepseek_v2_lite.get_config()).model
  exchange = dataclasses.replace(config.exchange, moe_chunks=chunks)
  config = dataclasses.replace(config, **sizes, dispatch="all_to_all", exchange=exchange)
  config = exchange_layer.config_of(config, "all_to_all")
  axes = MeshConfig(stage=1, data=1, expert=4, context=1, model=1)
  mesh = mesh_lib.make_mesh(axes, program_cost.devices_of("v5p:2x2x1", 4))
  run = exchange_layer.forward(config, mesh)
  args = exchange_layer.abstract_inputs(config, mesh, 1024)[:3]
  text = compile_only.compile_lowered(jax.jit(run).lower(*args)).as_text()
  return [
    (one.is_split, [scopes.part_of(scope) for scope in one.between])
    for one in overlap.schedule(text)
    if one.kind == "ragged-all-to-all"
  ]


@pytest.mark.tpu
def test_one_part_of_the_tokens_is_exchanged_while_another_is_multiplied():
  """On v5p with the flags of `exchange`: without them all wait, and one part has nothing to hide behind."""
  if missing := compile_only.missing_compiler("v5p:2x2x1"):
    pytest.skip(missing)
  purposes = ["overlap", "exchange"]
  waiting = compile_only.in_fresh_process(exchanges_of, [], 2)
  assert len(waiting) == 4 and not any(is_split for is_split, _ in waiting)
  single = compile_only.in_fresh_process(exchanges_of, purposes, 1)
  assert len(single) == 2
  assert not any("experts" in parts for _, parts in single)
  halves = compile_only.in_fresh_process(exchanges_of, purposes, 2)
  assert len(halves) == 4
  assert any("experts" in parts for _, parts in halves)
