"""Bytes of collectives by mesh axis: every form that XLA prints, and a program that it made."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from dsmoe.compilers import collective_bytes
from dsmoe.config import MeshConfig
from dsmoe.parallel import mesh as mesh_lib

# Eight devices: device 4 d + e is at place d along `data` and e along `expert`.
MESH = {"data": 2, "expert": 4}
ROWS = 6 * 128 * 2  # bytes of bf16[6,128], whose tiles are padded to 8 rows
MODULE = """HloModule made_up, is_scheduled=true

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %c = f32[] add(%a, %b)
}

%all-reduce-scatter.1 (p: bf16[24,128]) -> bf16[6,128] {
  %p = bf16[24,128]{1,0:T(8,128)(2,1)} parameter(0)
  %inside = bf16[24,128]{1,0:T(8,128)(2,1)} all-reduce(%p), channel_id=4, replica_groups=[2,4]<=[8], use_global_device_ids=true, to_apply=%sum
  ROOT %part = bf16[6,128]{1,0:T(8,128)(2,1)} dynamic-slice(%inside), dynamic_slice_sizes={6,128}
}

%wrapped (q: bf16[6,128]) -> bf16[6,128] {
  %q = bf16[6,128]{1,0} parameter(0)
  ROOT %turned = bf16[6,128]{1,0} all-to-all(%q), channel_id=5, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
}

%body (carry: (s32[], bf16[6,128])) -> (s32[], bf16[6,128]) {
  %carry = (s32[]{:T(128)}, bf16[6,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%carry), index=0
  %x = bf16[6,128]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%carry), index=1
  %ag-start = (bf16[6,128]{1,0:T(8,128)(2,1)S(1)}, bf16[24,128]{1,0:T(8,128)(2,1)}) all-gather-start(%x), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}, use_global_device_ids=true, metadata={op_name="jit(f)/exchange/all_gather"}
  %ag-done = bf16[24,128]{1,0:T(8,128)(2,1)} all-gather-done(%ag-start)
  %rs = bf16[6,128]{1,0:T(8,128)(2,1)} fusion(%ag-done), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %out = (s32[]{:T(128)}, bf16[6,128]{1,0:T(8,128)(2,1)}) tuple(%i, %rs)
}

%condition (c: (s32[], bf16[6,128])) -> pred[] {
  %c = (s32[]{:T(128)}, bf16[6,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %now = s32[]{:T(128)} get-tuple-element(%c), index=0
  %limit = s32[]{:T(128)} constant(5)
  ROOT %less = pred[]{:T(512)} compare(%now, %limit), direction=LT
}

ENTRY %main (b: bf16[6,128], n: s32[4], o: bf16[9,128]) -> bf16[6,128] {
  %b = bf16[6,128]{1,0:T(8,128)(2,1)} parameter(0)
  %n = s32[4]{0:T(128)} parameter(1)
  %o = bf16[9,128]{1,0:T(8,128)(2,1)} parameter(2)
  %zero = s32[]{:T(128)} constant(0)
  %first = (s32[]{:T(128)}, bf16[6,128]{1,0:T(8,128)(2,1)}) tuple(%zero, %b)
  %loop = (s32[]{:T(128)}, bf16[6,128]{1,0:T(8,128)(2,1)}) while(%first), condition=%condition, body=%body
  %over_data = bf16[12,128]{1,0} all-gather(%b), channel_id=2, replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}
  %whole = f32[]{:T(128)} all-reduce(%zero), channel_id=3, replica_groups={}, to_apply=%sum
  %alone = bf16[6,128]{1,0} all-gather(%b), channel_id=9, replica_groups=[8,1]<=[8], dimensions={0}
  %async = ((bf16[6,128]{1,0}), bf16[6,128]{1,0}, s32[]) async-start(%b), calls=%wrapped
  %done = bf16[6,128]{1,0} async-done(%async)
  %ragged = bf16[9,128]{1,0} ragged-all-to-all(%b, %o, %n, %n, %n, /*index=5*/%n), channel_id=6, replica_groups=mesh['data'=2,'expert'=4] {'expert'}
  %tuple = (f32[3,5]{1,0}, f32[3,5]{1,0}) all-to-all(%b, %b), channel_id=7, replica_groups={{0,1},{2,3},{4,5},{6,7}}
  ROOT %next = bf16[6,128]{1,0} collective-permute(%b), channel_id=8, source_target_pairs={{0,0},{1,5},{5,1}}, metadata={op_name="jit(f)/ring"}
}
"""


def test_every_form_of_every_collective():
  found = {c.name: c for c in collective_bytes.collectives(MODULE, MESH)}
  once = {
    name: (c.kind, c.axes, c.times, int(c.sent_N[1]), int(c.received_N[1]), c.asynchronous)
    for name, c in found.items()
  }
  assert once == {
    "ag-start": ("all-gather", ("expert",), 5, 5 * 3 * ROWS, 5 * 3 * ROWS, True),
    "inside": ("reduce-scatter", ("expert",), 5, 5 * 3 * ROWS, 5 * 3 * ROWS, False),
    "over_data": ("all-gather", ("data",), 1, ROWS, ROWS, False),
    "whole": ("all-reduce", ("data", "expert"), 1, 7, 7, False),  # 2 * 7 / 8 of 4 bytes
    "turned": ("all-to-all", ("expert",), 1, 3 * ROWS // 4, 3 * ROWS // 4, True),
    "ragged": ("ragged-all-to-all", ("expert",), 1, ROWS, 9 * 128 * 2, False),
    "tuple": ("all-to-all", ("expert",), 1, ROWS, ROWS, False),
    "next": ("collective-permute", ("data",), 1, ROWS, ROWS, False),
  }
  assert found["next"].sent_N.tolist() == [0, ROWS, 0, 0, 0, ROWS, 0, 0]
  assert found["ragged"].upper_limit and not found["tuple"].upper_limit
  assert found["ag-start"].scope == "jit(f)/exchange/all_gather"
  assert found["inside"].scope == ""
  total = collective_bytes.by_axis(found.values())
  expert = 5 * 6 * ROWS + 3 * ROWS // 4 + ROWS + ROWS
  assert total["expert"]["sent_bytes"] == expert and total["expert"]["collectives"] == 13
  assert total["data"] == {
    "sent_bytes": 2 * ROWS,
    "received_bytes": 2 * ROWS,
    "collectives": 2,
  }
  assert total["all"]["sent_bytes"] == expert + 2 * ROWS + 7
  assert total["data+expert"]["sent_bytes"] == 7


def test_an_unknown_form_is_refused():
  text = MODULE.replace("replica_groups=[4,2]<=[2,4]T(1,0)", "replica_groups=new")
  with pytest.raises(ValueError, match="a form that XLA prints, got 'new'"):
    collective_bytes.collectives(text, MESH)


def test_a_program_that_xla_compiled():
  """A scan of three steps over 2 x 4 devices: what each collective moves is known beforehand."""
  config = MeshConfig(stage=1, data=2, expert=4, context=1, model=1)
  mesh = mesh_lib.make_mesh(config, jax.devices()[:8])
  rows, D = 8, 6

  def step(x, _):
    wide = jax.lax.all_gather(x, "expert", tiled=True)
    x = jax.lax.psum_scatter(jnp.sin(wide), "expert", tiled=True)
    x = jnp.cos(jax.lax.all_to_all(x, "expert", 0, 0, tiled=True))
    return jax.lax.ppermute(x, "data", [(0, 1), (1, 0)]), None

  def run(x):
    x, _ = jax.lax.scan(step, x, None, length=3)
    return x + jax.lax.psum(x[:1], ("data", "expert"))

  tokens = PartitionSpec(("data", "expert"))
  fn = jax.jit(mesh_lib.shard_map(run, mesh, (tokens,), tokens))
  text = fn.lower(jnp.zeros((8 * rows, D))).compile().as_text()
  total = collective_bytes.by_axis(collective_bytes.collectives(text, mesh.shape))
  b = rows * D * 4
  assert total["expert"]["sent_bytes"] == 3 * (3 * b + 3 * b + 3 * b // 4)
  assert total["data"]["received_bytes"] == 3 * b
  assert total["data+expert"]["sent_bytes"] == np.ceil(2 * 7 * D * 4 / 8)
