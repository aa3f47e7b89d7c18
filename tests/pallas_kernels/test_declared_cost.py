"""That what a kernel declares to cost is what its machine code does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dsmoe import config as config_lib
from dsmoe.compilers import bundles, compile_only
from dsmoe.kernel_bench import bench, cases
from experiments import deepseek_v3
from pallas_kernels import traffic
from tests.pallas_kernels.topologies import tpu_devices

every_chip = pytest.mark.parametrize("topology", ["v5p:2x2x1", "v6e:2x2x1", "tpu7x:2x2x1"])
pytestmark = pytest.mark.tpu

STEPS, ROWS, INNER, COLUMNS = 256, 384, 512, 256


def _product(a_ref, b_ref, out_ref, acc_ref):
  @pl.when(pl.program_id(0) == 0)
  def _():
    acc_ref[...] = jnp.zeros_like(acc_ref)

  acc_ref[...] += jnp.dot(a_ref[...], b_ref[...], preferred_element_type=jnp.float32)
  out_ref[...] = acc_ref[...].astype(out_ref.dtype)


def _specs():
  a = jax.ShapeDtypeStruct((ROWS, STEPS * INNER), jnp.bfloat16)
  b = jax.ShapeDtypeStruct((STEPS * INNER, COLUMNS), jnp.bfloat16)
  out = jax.ShapeDtypeStruct((ROWS, COLUMNS), jnp.bfloat16)
  a_spec = pl.BlockSpec((ROWS, INNER), lambda i: (0, i))
  b_spec = pl.BlockSpec((INNER, COLUMNS), lambda i: (i, 0))
  return (a, a_spec), (b, b_spec), (out, pl.BlockSpec((ROWS, COLUMNS), lambda i: (0, 0)))


def _cost():
  return pl.CostEstimate(
    flops=2 * ROWS * STEPS * INNER * COLUMNS,
    bytes_accessed=traffic.bytes_moved((STEPS,), _specs()),
    transcendentals=0,
  )


def _matmul(a, b):
  """A product whose two operands are both cut along the contraction, a block a step."""
  (_, a_spec), (_, b_spec), (out, out_spec) = _specs()
  return pl.pallas_call(
    _product,
    grid=(STEPS,),
    in_specs=[a_spec, b_spec],
    out_specs=out_spec,
    out_shape=out,
    scratch_shapes=[pltpu.VMEM((ROWS, COLUMNS), jnp.float32)],
    cost_estimate=_cost(),
    name="product",
  )(a, b)


def _code(topology):
  """Returns the figures of the product, its bundles and loops; in a fresh process."""
  operands = [array for array, _ in _specs()[:2]]
  with compile_only.dumped(topology, _matmul, *operands) as (text, folder):
    chip = compile_only.chip_of(topology)
    figures = compile_only.read_figures(text, folder, chip)
    (kernel,) = (k for n, k in compile_only.read_kernels(folder).items() if "product" in n)
  return figures, kernel.code, kernel.loops


@every_chip
def test_declared_cost_is_what_the_code_does(topology):
  """DMAs and matrix products of the VLIW code, times the grid, are the cost_estimate."""
  tpu_devices(topology)
  figures, code, loops = compile_only.in_fresh_process(_code, topology)
  cost, chip = _cost(), compile_only.chip_of(topology)
  grid = max(loops, key=lambda loop: loop.trips or 0)
  assert grid.trips in (STEPS + 1, STEPS + 2)  # and the pipeline's ends
  sizes = [(d, n * bundles.GRANULE_BYTES) for b in code for d, n in bundles.transfers(b)]
  a, b, out = (traffic.block_bytes(array, spec, (0, 0)) for array, spec in _specs())
  assert sorted(sizes) == sorted([("hbm_to_vmem", a), ("hbm_to_vmem", b), ("vmem_to_hbm", out)])
  assert STEPS * (a + b) + out == cost.bytes_accessed == figures["declared_bytes"]
  once = bundles.matmul_macs(code, np.ones(len(code), int), chip.mxu_size)
  assert 2 * STEPS * once == cost.flops == figures["declared_flops"]
  # The same by running the scalar code, which knows when the result is stored.
  assert figures["dma_bytes"] == cost.bytes_accessed == figures["bytes"]
  assert figures["mxu_flops"] == cost.flops
  assert 0 < figures["mxu_occupancy"] <= figures["steady_mxu_occupancy"] <= 1
  assert 0 < figures["schedule_cycles"] < 2 * STEPS * len(code)


@every_chip
@pytest.mark.parametrize("kernel", ["routing", "grouped_matmul"])
def test_our_kernels_cost_what_they_declare(kernel, topology):
  """At DeepSeek-V3's shape: products and bytes, XLA's copies into VMEM among them."""
  tpu_devices(topology)
  model = config_lib.from_config_dict(deepseek_v3.get_config()).model
  shape = cases.Shape(model, 8192, 4096, 8)
  row = bench.compile_row(topology, kernel, "mosaic_tpu", "v3", shape)
  assert "error" not in row, row
  assert row["bytes"] == pytest.approx(row["declared_bytes"], rel=0.1)
  # A product narrower than the matrix unit would make it do more than is declared.
  assert row["declared_flops"] == row["mxu_flops"]


def test_gate_and_up_together_read_less():
  """The fused SwiGLU moves at most 0.7 of what two matmuls in move, before their activation."""
  tpu_devices("v5p:2x2x1")
  model = config_lib.from_config_dict(deepseek_v3.get_config()).model
  shape = cases.Shape(model, 8192, 4096, 8)
  matmul, fused, unfused = (
    bench.compile_row("v5p:2x2x1", kernel, implementation, "v3", shape)
    for kernel, implementation in (
      ("grouped_matmul", "mosaic_tpu"),
      ("grouped_swiglu", "mosaic_tpu"),
      ("grouped_swiglu", "unfused"),
    )
  )
  pair = 2 * matmul["dma_bytes"]
  out = unfused["dma_bytes"] - pair  # the matmul after the activation, the same in both
  assert fused["dma_bytes"] - out <= 0.7 * pair
