"""How the kernels for NVIDIA GPUs (Mosaic GPU) are called."""

import inspect

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.varying import varying_like


def call(
  kernel,
  name: str,
  operands,
  out_type,
  grid: dict[str, int],
  scratch=(),
  warpgroups: int = 1,
  reduction_bytes: int = 2048,
  cluster: dict[str, int] | None = None,
):
  """Runs a kernel on operands.

  Args:
    kernel: a function of references to the operands, the outputs and the scratch.
    operands: arrays, in HBM.
    out_type: a `jax.ShapeDtypeStruct` or several.
    grid: how many thread blocks there are along each named axis; the last axis runs fastest.
    scratch: shared memory and barriers of a thread block.
    warpgroups: how many a thread block has; if more than one, their axis is named "wg".
    reduction_bytes: shared memory for sums across warps.
    cluster: how many thread blocks run together at each place of the grid, by axis.

  Raises:
    ValueError: where an axis has the name of an axis of the device mesh: inside the kernel its
      index would be taken for the device's.
  """
  names = {*grid, *(cluster or {}), "wg"}
  if taken := names.intersection(jax.sharding.get_abstract_mesh().axis_names):
    both = ", ".join(sorted(taken))
    raise ValueError(
      f"axes of the grid of {name} must not have names of the device mesh's axes, got {both}"
    )
  outs = plgpu.kernel(
    kernel,
    out_type=out_type,
    scratch_types=list(scratch),
    grid=tuple(grid.values()),
    grid_names=tuple(grid),
    cluster=tuple((cluster or {}).values()),
    cluster_names=tuple(cluster or {}),
    # The kernels choose the layouts of registers; jax 0.12 would infer them.
    compiler_params=plgpu.CompilerParams(
      lowering_semantics=plgpu.LoweringSemantics.Lane, reduction_scratch_bytes=reduction_bytes
    ),
    kernel_name=name,
    num_threads=warpgroups if warpgroups > 1 else None,
    thread_name="wg" if warpgroups > 1 else None,
  )(*operands)
  return varying_like(outs, *operands)


def load(ref, layout):
  """Loads from memory straight into a layout, which may be slow."""
  at = [()] if "idx" in inspect.signature(plgpu.load).parameters else []  # until jax 0.11
  return plgpu.load(ref, *at, layout=layout, optimized=False)
