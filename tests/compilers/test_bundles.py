"""Reading VLIW code, on a made-up dump whose answers are known."""

import numpy as np
import pytest

from dsmoe.compilers import bundles

# Four steps of a grid (and two more for the pipeline's ends), in each an inner loop of 16.
CODE = """= control target key start
LB: loop body
= control target key end

     0   :  { %s1_s9 = sld [smem:[#allocation0]] /* core id */  ;;  %s70_s7 = inlined_call_operand.<no memory space> [shape: s32[1], index: 1, kind: input] }
   0x1   :  { %s2_s5 = smov 0  ;;  %s6_s6 = inlined_call_operand.hbm [shape: bf16[8,8], index: 0, kind: input] } /* Start region 5 */
   0x2 LB: > { %v1_v0 = vld [vmem:[%s9]]  ;;  %s19_s4 = smov 0  ;;  %s3_s5 = sphi %s2_s5, %s4_s5 } /* Start region 99 */
   0x3   : > { %4 = shalt.err (!%p1) /* BoundsCheck 0 [deref of %s1] for %319 = dma.hbm_to_vmem [thread:$0], /*hbm=*/%s1, /*size_in_granules=*/2048, /*vmem=*/%s2 /*
base_bounds: (112, 1)
element_size_in_bytes: 4096 */ }
   0x4   : > { %319 = dma.hbm_to_vmem [thread:$0]  /*hbm=*/%s6_s6, /*size_in_granules=*/2048, /*vmem=*/%s7, /*dst_syncflagno=*/%s8 /*
strides: (16, 1)
second_minor_factor: 1 */ }
   0x5 LB: >> { %10 = vmatmul.bf16.gmra.mxu0 %v1  ;;  %11 = vmatmul.bf16.gmra.mxu1 %v2  ;;  %s20_s4 = sadd.s32 1, %s21_s4  ;;  %s21_s4 = sphi %s19_s4, %s20_s4 } /* Start region 98 :: Start region 41 */
   0x6   : >> { %p154_p7 = scmp.ge.s32.totalorder %s20_s4, 16 /* loop exit test */  ;;  %12 = vmatmul.f32.gmra.mxu0 %v1 }
   0x7   : > { %156 = sbr.rel (!%p154_p7) target = $region98 }
   0x8   :  {}
   0x9   :  {}
   0xa   :  {}
   0xb   : >> { %13 = vst [vmem:[%s1]] %v3 } /* End region 98 */
   0xc   : > { %p9_p2 = scmp.lt.s32.totalorder %s3_s5, 1  ;;  %s4_s5 = sadd.s32 1, %s3_s5 }
   0xd   : > { %p10_p3 = pneg %p9_p2 }
   0xe   : > { %314 = dma.vmem_to_hbm [thread:$0]  (!%p10_p3), /*vmem=*/%s67, /*size_in_granules=*/512, /*hbm=*/%s6_s6, /*dst_syncflagno=*/%s8 }
   0xf PF: > { %p23_p3 = scmp.ge.s32.totalorder %s4_s5, 6 /* loop exit test */ } /* Start/End empty region 28 */
  0x10   : > { %25 = sbr.rel (!%p23_p3) target = $region99 }
  0x11   :  {}
  0x12   :  {}
  0x13   :  {}
  0x14   :  {} /* End region 99 */
  0x15   :  { %26 = vsyncpa [#allocation5], 1 }
"""
DYNAMIC = CODE.replace("%s4_s5, 6 /* loop exit test */", "%s4_s5, %s70_s7")
TABLE = """== CAPACTIY:
MXU, XLU, VALU, VPOP, EUP, VLOAD, VLOAD:FILL, VSTORE, VSTORE:SPILL, SALU
    4     3     4     2     1     3     3     1     1     2
== UTILIZATION:
""" + "".join(
  f"{mxu} 0 0 0 0 0 {fill} 0 {spill} 1\n"
  for mxu, fill, spill in [(0, 0, 0)] * 5
  + [(2, 0, 1), (3, 1, 0), (4, 2, 1), (4, 0, 0), (4, 0, 0), (4, 0, 0), (4, 0, 0)]
  + [(1, 0, 0)] * 10
)


def test_bundles_and_loops():
  code = bundles.read_bundles(CODE)
  assert len(code) == 0x16
  assert "vsyncpa" in code[0x15] and "size_in_granules" in code[3]
  grid, inner = bundles.loops(code)
  assert grid == (0x2, 0x14, 6) and inner == (0x5, 0xB, 16)
  times = bundles.runs(code, [grid, inner])
  assert times.tolist() == [1, 1, 6, 6, 6, *[96] * 7, *[6] * 9, 1]


def test_transfers_and_products():
  code = bundles.read_bundles(CODE)
  times = bundles.runs(code, bundles.loops(code))
  # A bounds check that mentions a transfer starts none.
  assert bundles.transfers(code[3]) == [] and bundles.transfers(code[4]) == [("hbm_to_vmem", 2048)]
  moved = bundles.dma_bytes(code, times)
  assert moved == {"hbm_to_vmem": 6 * 2048 * 32, "vmem_to_hbm": 6 * 512 * 32}
  # Two products of 16 rows of bfloat16 and one of 8 of float32, each by a matrix of 128 x 128.
  assert bundles.matmul_macs(code, times, 128) == 96 * (16 + 16 + 8) * 128**2
  assert bundles.matmul_macs(code, times, 256) == 96 * (16 + 16 + 8) * 256**2


def test_a_size_in_a_register_is_not_known():
  bundle = CODE.replace("/*size_in_granules=*/512", "/*size_in_granules=*/%s22_s17")
  with pytest.raises(ValueError, match="size"):
    code = bundles.read_bundles(bundle)
    bundles.dma_bytes(code, np.ones(len(code), int))


def test_loops_of_unknown_size_count_once():
  code = bundles.read_bundles(DYNAMIC)
  found = bundles.loops(code)
  assert [loop.trips for loop in found] == [None, 16]
  assert bundles.runs(code, found).sum() == 3 + 12 + 16 * 7


def test_utilization():
  use = bundles.read_utilization(TABLE)
  assert use.used_NS.shape == (0x16, 10)
  assert use.share("MXU") == pytest.approx((2 + 3 + 5 * 4 + 10) / (22 * 4))
  assert use.used("VSTORE:SPILL") == 2 and use.used("VLOAD:FILL") == 3


def test_steady_state_is_the_loop_with_most_matrix_work():
  use = bundles.read_utilization(TABLE)
  code = bundles.read_bundles(CODE)
  found = bundles.loops(code)
  loop, share = bundles.steady_state(code, found, use)
  assert loop == (5, 0xB, 16) and share == pytest.approx((2 + 3 + 5 * 4) / 28)
  # All of it around the inner loop: 12 bundles of the grid's own.
  around = use._replace(used_NS=use.used_NS.copy())
  around.used_NS[5:0xC, 0], around.used_NS[2:5, 0] = 0, 4
  loop, share = bundles.steady_state(code, found, around)
  assert loop == (2, 0x14, 6) and share == pytest.approx((3 * 4 + 9) / 48)
  idle = use._replace(used_NS=np.zeros_like(use.used_NS))
  assert bundles.steady_state(code, found, idle) is None
