"""Running scalar VLIW code, on a made-up kernel whose course is known."""

import importlib.metadata
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dsmoe.compilers import bundle_run, bundles, compile_only, scalar_operands
from tests.compilers.test_bundles import CODE, DYNAMIC

# Rows of sizes that are data: each prefetched size is copied in that many transfers of 64 bytes,
# the last of them stored back; a size of 0 is jumped over.
RAGGED = """
     0   :  { %s1_s0 = inlined_call_operand.hbm [shape: s32[4], index: 0, kind: input]  ;;  %s2_s1 = inlined_call_operand.hbm [shape: bf16[8,8], index: 1, kind: input] }
   0x1   :  { %s3_s2 = smov [#allocation4]  ;;  %s4_s3 = smov 0 }
   0x2   :  { %5 = dma.hbm_to_smem /*hbm=*/%s1_s0, /*size_in_granules=*/1, /*smem=*/%s3_s2, /*dst_syncflagno=*/[#allocation3] }
   0x3   : > { %s6_s4 = sld [smem:[#allocation4 + %s7_s3]]  ;;  %s7_s3 = sphi %s4_s3, %s8_s3 } /* Start region 1 */
   0x4   : > { %p9_p0 = scmp.le.s32.totalorder %s6_s4, 0  ;;  %s8_s3 = sadd.s32 1, %s7_s3 }
   0x5   : > { %10 = sbr.rel (%p9_p0) target = $region2  ;;  %s11_s5 = smov (!%p9_p0), 0 }
   0x6   :  {}
   0x7   :  {}
   0x8   :  {}
   0x9   :  {}
   0xa   : >> { %s12_s6 = sshll.u32 %s13_s5, 4  ;;  %s13_s5 = sphi %s11_s5, %s14_s5 } /* Start region 3 */
   0xb   : >> { %s14_s5 = sadd.s32 1, %s13_s5  ;;  %15 = dma.hbm_to_vmem /*hbm=*/%s2_s1, /*size_in_granules=*/2, /*vmem=*/%s12_s6, /*dst_syncflagno=*/[#allocation5] }
   0xc   : >> { %p16_p1 = scmp.ge.s32.totalorder %s14_s5, %s6_s4 }
   0xd   : >> { %17 = sbr.rel (!%p16_p1) target = $region3 }
   0xe   :  {}
   0xf   :  {}
  0x10   :  {}
  0x11   :  {}
  0x12   : > { %s18_s7 = scalar_select /*predicate=*/%p16_p1, /*on_true=*/%s6_s4, /*on_false=*/0 }
  0x13   : > { %19 = dma.vmem_to_hbm /*vmem=*/%s3_s2, /*size_in_granules=*/%s18_s7, /*hbm=*/%s2_s1, /*dst_syncflagno=*/[#allocation5] }
  0x14   : > { %p20_p2 = scmp.lt.s32.totalorder %s8_s3, 4 } /* Start/End empty region 2 */
  0x15   : > { %21 = sbr.rel (%p20_p2) target = $region1 }
  0x16   :  {}
  0x17   :  {}
  0x18   :  {}
  0x19   :  {}
  0x1a   :  { %22 = vsyncpa [#allocation5], 1 }
"""


def test_loops_of_constants():
  code = bundles.read_bundles(CODE)
  run = bundle_run.run(code)
  assert run.visits_N.tolist() == [1, 1, 6, 6, 6, *[96] * 7, *[6] * 9, 1]
  assert run.moved == {"hbm_to_vmem": 6 * 2048 * 32, "vmem_to_hbm": 512 * 32}


@pytest.mark.parametrize("steps", [1, 5])
def test_a_grid_that_is_data(steps):
  code = bundles.read_bundles(DYNAMIC)
  run = bundle_run.run(code, {1: np.array([steps])})
  assert run.visits_N[2] == steps and run.visits_N[5] == 16 * steps and run.visits_N[-1] == 1
  assert run.moved["hbm_to_vmem"] == steps * 2048 * 32
  with pytest.raises(ValueError, match="a branch must not depend on data"):
    bundle_run.run(code)


def test_prefetched_sizes():
  code = bundles.read_bundles(RAGGED)
  sizes = np.array([3, 0, 1, 5])
  run = bundle_run.run(code, {0: sizes})
  assert run.moved == {"hbm_to_smem": 32, "hbm_to_vmem": 9 * 64, "vmem_to_hbm": 9 * 32}
  visits = run.visits_N
  assert visits[3] == 4 and visits[9] == 4  # a branch's delay slots run in any case
  assert visits[0xA] == visits[0x11] == 9 and visits[0x12] == 3 and visits[0x14] == 4
  assert visits.sum() == 3 + 4 * 7 + 9 * 8 + 3 * 2 + 4 * 6 + 1


def test_a_dma_whose_direction_is_a_remark():
  """As those are whose strides lie in memory."""
  text = re.sub(r"dma\.hbm_to_vmem(.*) }", r"dma.general\1 /* hbm-to-vmem */ }", RAGGED)
  assert "dma.general" in text
  runs = [
    bundle_run.run(bundles.read_bundles(t), {0: np.array([3, 0, 1, 5])}) for t in (text, RAGGED)
  ]
  assert runs[0].moved == runs[1].moved


def test_what_cannot_be_told_is_refused():
  code = bundles.read_bundles(RAGGED.replace("scmp.le.s32", "sfoo.s32"))
  with pytest.raises(
    bundle_run.UnknownInstructionError,
    match=rf"^scalar instruction sfoo\S+ is not known to \S+bundle_run.py, which reads the code of "
    rf"libtpu {bundle_run.LIBTPU}: %p9_p0 = sfoo.s32.totalorder %s6_s4 0$",
  ):
    bundle_run.run(code, {0: np.array([3, 0, 1, 5])})
  code = bundles.read_bundles(RAGGED.replace("dma.hbm_to_vmem", "dma.general"))
  with pytest.raises(bundle_run.UnknownInstructionError, match="a DMA without its direction"):
    bundle_run.run(code, {0: np.array([3, 0, 1, 5])})
  code = bundles.read_bundles(CODE.replace("%s4_s5 = sadd.s32 1, %s3_s5", "%s4_s5 = smov 0"))
  with pytest.raises(ValueError, match="must end, but did not in 5000"):
    bundle_run.run(code, most=5000)


@pytest.mark.parametrize(
  "instruction, expected",
  [
    ("sadd.s32 4294967295, 3", 2),
    ("ssub.s32 3, 5", -2),
    ("smul.u32 7, 6", 42),
    ("sshrl.u32 4294967288, 1", 2147483644),
    ("sshra.s32 4294967288, 1", -4),
    ("sand.u32 12, 10", 8),
    ("smin.u32 4294967295, 9", 9),
    ("scmp.lt.s32.totalorder 4294967295, 0", True),
    ("scmp.lt.u32.totalorder 4294967295, 0", False),
    ("smov (%p1_p1), 4", 4),
    ("smov (!%p1_p1, %s9_s9), 4", 5),
    ("por %p1_p1, %p404_p4", True),  # true whatever the unknown is
    ("pnand %p1_p1, %p404_p4", None),
    ("pneg %p1_p1", False),
  ],
)
def test_instructions(instruction, expected):
  machine = bundle_run._Machine(0, {}, [])
  for text in (
    "%s9_s9 = smov 5",
    "%p1_p1 = scmp.eq.s32.totalorder 1, 1",
    f"%s2_s2 = {instruction}",
  ):
    machine.execute(bundle_run._decode(text))
  assert machine.values["%s2_s2"] == expected


def test_a_branch_to_nowhere_is_an_error_only_if_taken():
  for core in (0, 1):
    text = CODE.replace(
      "0x1   :  { %s2_s5 = smov 0",
      "0x1   :  { %p90_p0 = scmp.ne.s32.totalorder %s1_s9, 0  ;;  %s2_s5 = smov 0",
    ).replace("{ %v1_v0 = vld [vmem:[%s9]]", "{ %91 = sbr.rel (%p90_p0) target = $region404")
    code = bundles.read_bundles(text)
    if core == 0:
      assert bundle_run.run(code, core=0).visits_N[2] == 6
    else:
      with pytest.raises(ValueError, match="a branch must not depend on data"):
        bundle_run.run(code, core=1)


# Blocks of x that the grid's steps read; a block that follows itself is not copied again.
BLOCKS = np.array([3, 0, 7, 7, 1, 2, 2, 5], np.int32)
BLOCK = (256, 1024)
BLOCK_BYTES = 256 * 1024 * 4


def gather_blocks(blocks, x_RD):
  def copy(blocks_ref, x_ref, out_ref):
    out_ref[...] = x_ref[...]

  return pl.pallas_call(
    copy,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=(len(BLOCKS),),
      in_specs=[pl.BlockSpec(BLOCK, lambda i, blocks: (blocks[i], 0))],
      out_specs=pl.BlockSpec(BLOCK, lambda i, blocks: (i, 0)),
    ),
    out_shape=jax.ShapeDtypeStruct((len(BLOCKS) * BLOCK[0], BLOCK[1]), x_RD.dtype),
    name="gather_blocks",
  )(blocks, x_RD)


def run_compiled(topology):
  """Returns what the compiled kernel moves in each direction; in a fresh process."""
  # 256 MiB: XLA keeps what fits in VMEM, and then the kernel reads nothing from HBM.
  args = BLOCKS, jax.ShapeDtypeStruct((256 * BLOCK[0], BLOCK[1]), jnp.float32)
  [scalars] = scalar_operands.of_kernels(gather_blocks, *args)["gather_blocks"]
  with compile_only.dumped(topology, gather_blocks, *args) as (_, folder):
    [kernel] = (k for name, k in compile_only.read_kernels(folder).items() if "gather" in name)
  return bundle_run.run(kernel.code, scalars).moved


@pytest.mark.tpu
@pytest.mark.parametrize("topology", ["v5p:2x2x1", "v6e:2x2x1", "tpu7x:2x2x1"])
def test_the_installed_libtpu_is_understood(topology):
  """A kernel whose transfers are known by hand, compiled by the libtpu that is installed."""
  if missing := compile_only.missing_compiler(topology):
    pytest.skip(missing)
  try:
    moved = compile_only.in_fresh_process(run_compiled, topology)
  except (ValueError, NotImplementedError) as error:
    installed = importlib.metadata.version("libtpu")
    pytest.fail(f"the code of libtpu {installed} cannot be run: {error}", pytrace=False)
  assert moved["hbm_to_vmem"] == 6 * BLOCK_BYTES
  assert moved["vmem_to_hbm"] == 8 * BLOCK_BYTES
