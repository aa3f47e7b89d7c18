"""Counting in HLO, on a made-up module whose answers are known, and on one XLA made."""

import jax
import jax.numpy as jnp
import pytest

from dsmoe.compilers import hlo

# A loop of 5 steps, each adding one [8, 128] slice of five to an array kept on the chip.
MODULE = """HloModule made_up, is_scheduled=true

%slice_add (p0: f32[5,8,128], p1: f32[8,128], p2: s32[]) -> f32[8,128] {
  %p0 = f32[5,8,128]{2,1,0:T(8,128)} parameter(0)
  %p1 = f32[8,128]{1,0:T(8,128)} parameter(1)
  %p2 = s32[]{:T(128)} parameter(2)
  %zero = s32[]{:T(128)} constant(0)
  %one = f32[1,8,128]{2,1,0:T(8,128)} dynamic-slice(%p0, %p2, %zero, %zero), dynamic_slice_sizes={1,8,128}
  %flat = f32[8,128]{1,0:T(8,128)} bitcast(%one)
  ROOT %sum = f32[8,128]{1,0:T(8,128)S(1)} add(%flat, %p1)
}

%put (q0: bf16[16,128], q1: bf16[2,128], q2: s32[]) -> bf16[16,128] {
  %q0 = bf16[16,128]{1,0:T(8,128)(2,1)} parameter(0)
  %q1 = bf16[2,128]{1,0:T(2,128)(2,1)} parameter(1)
  %q2 = s32[]{:T(128)} parameter(2)
  ROOT %updated = bf16[16,128]{1,0:T(8,128)(2,1)} dynamic-update-slice(%q0, %q1, %q2, %q2)
}

%body (carry: (s32[], f32[5,8,128], f32[8,128])) -> (s32[], f32[5,8,128], f32[8,128]) {
  %carry = (s32[]{:T(128)}, f32[5,8,128]{2,1,0:T(8,128)}, f32[8,128]{1,0:T(8,128)S(1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%carry), index=0
  %xs = f32[5,8,128]{2,1,0:T(8,128)} get-tuple-element(%carry), index=1
  %acc = f32[8,128]{1,0:T(8,128)S(1)} get-tuple-element(%carry), index=2
  %step = f32[8,128]{1,0:T(8,128)S(1)} fusion(%xs, %acc, /*index=2*/%i), kind=kLoop, calls=%slice_add, backend_config={"window_config":{"estimated_cycles":"70"}}
  %next = s32[]{:T(128)S(1)} add(%i, %i)
  ROOT %out = (s32[]{:T(128)}, f32[5,8,128]{2,1,0:T(8,128)}, f32[8,128]{1,0:T(8,128)S(1)}) tuple(%next, %xs, %step)
}

%condition (c: (s32[], f32[5,8,128], f32[8,128])) -> pred[] {
  %c = (s32[]{:T(128)}, f32[5,8,128]{2,1,0:T(8,128)}, f32[8,128]{1,0:T(8,128)S(1)}) parameter(0)
  %now = s32[]{:T(128)} get-tuple-element(%c), index=0
  %limit = s32[]{:T(128)} constant(5)
  ROOT %less = pred[]{:T(512)S(1)} compare(%now, %limit), direction=LT
}

ENTRY %main (a: f32[5,8,128], b: s32[3,5], d: bf16[16,128], e: bf16[2,128]) -> f32[8,128] {
  %a = f32[5,8,128]{2,1,0:T(8,128)} parameter(0)
  %b = s32[3,5]{0,1:T(8,128)} parameter(1)
  %d = bf16[16,128]{1,0:T(8,128)(2,1)} parameter(2)
  %e = bf16[2,128]{1,0:T(2,128)(2,1)} parameter(3)
  %copy-start = (f32[5,8,128]{2,1,0:T(8,128)S(1)}, f32[5,8,128]{2,1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%a)
  %copy-done = f32[5,8,128]{2,1,0:T(8,128)S(1)} copy-done(%copy-start)
  %turned = s32[3,5]{1,0:T(4,128)} copy(%b)
  %k = s32[]{:T(128)} constant(0)
  %written = bf16[16,128]{1,0:T(8,128)(2,1)} fusion(%d, %e, %k), kind=kLoop, calls=%put
  %start = (s32[]{:T(128)}, f32[5,8,128]{2,1,0:T(8,128)}, f32[8,128]{1,0:T(8,128)S(1)}) tuple(%k, %a, %a)
  %loop = (s32[]{:T(128)}, f32[5,8,128]{2,1,0:T(8,128)}, f32[8,128]{1,0:T(8,128)S(1)}) while(%start), condition=%condition, body=%body
  ROOT %result = f32[8,128]{1,0:T(8,128)S(1)} get-tuple-element(%loop), index=2
}
"""


def _moved(text):
  computations, entry = hlo.parse(text)
  moved, times = {}, {}
  for instruction, computation, runs in hlo.executed(computations, entry):
    moved[instruction.name] = hlo.hbm_bytes(instruction, computation, computations)
    times[instruction.name] = runs
  return moved, times


def test_bytes_of_each_instruction():
  moved, times = _moved(MODULE)
  scalar = 4  # a number is not padded
  assert {name: size for name, size in moved.items() if size} == {
    "copy-start": 5 * 8 * 128 * 4,  # only the side in HBM
    "turned": 8 * 128 * 4 + 4 * 128 * 4,  # [3, 5], either side padded to its own tiles
    "written": 2 * 128 * 2 * 2 + scalar,  # the update, read and written; not the array
    "step": 8 * 128 * 4 + scalar,  # one slice of five; the sum stays on the chip
    "next": 2 * scalar,
  }
  assert times["step"] == times["next"] == 5
  assert times["copy-start"] == times["written"] == times["loop"] == 1


@pytest.mark.parametrize(
  "shape, expected",
  [
    ("f32[3,5]", 60),
    ("bf16[3,200]{1,0:T(8,128)(2,1)}", 8 * 256 * 2),
    ("bf16[3,200]{0,1:T(8,128)(2,1)}", 200 * 128 * 2),
    ("pred[100]{0:T(512)(128)(4,1)}", 512),
    ("f8e4m3fn[32,128]{1,0:T(8,128)(4,1)}", 32 * 128),
    ("(s32[4]{0:T(128)}, f32[4]{0:T(128)S(1)}, token[])", 512),
    ("f32[2,3,8,128]{3,2,1,0:T(8,128)}", 2 * 3 * 8 * 128 * 4),
    ("s32[]", 4),
  ],
)
def test_array_bytes(shape, expected):
  assert hlo.array_bytes(shape) == expected


def test_nested_loops_multiply():
  outer = MODULE.replace("ENTRY %main", "%inside")
  with pytest.raises(ValueError, match="ENTRY"):
    hlo.parse(outer)
  entry = """
ENTRY %top (t: (s32[], f32[5,8,128], f32[8,128])) -> (s32[], f32[5,8,128], f32[8,128]) {
  %t = (s32[], f32[5,8,128], f32[8,128]) parameter(0)
  ROOT %twice = (s32[], f32[5,8,128], f32[8,128]) while(%t), condition=%condition, body=%around
}
"""
  around = """
%around (u: (s32[], f32[5,8,128], f32[8,128])) -> (s32[], f32[5,8,128], f32[8,128]) {
  %u = (s32[], f32[5,8,128], f32[8,128]) parameter(0)
  ROOT %again = (s32[], f32[5,8,128], f32[8,128]) while(%u), condition=%condition, body=%body
}
"""
  _, times = _moved(outer + around + entry)
  assert times["step"] == 25 and times["again"] == 5 and times["twice"] == 1


def test_what_xla_writes_is_read():
  """A compiled scan of matmuls on CPU: every instruction is read, the loop's bound found."""

  def run(x, ws):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, ws)[0]

  x, ws = jnp.zeros((6, 16)), jnp.zeros((7, 16, 16))
  text = jax.jit(run).lower(x, ws).compile().as_text()
  computations, entry = hlo.parse(text)
  times = [runs for _, _, runs in hlo.executed(computations, entry)]
  assert max(times) == 7
