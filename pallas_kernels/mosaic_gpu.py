"""How the kernels for NVIDIA GPUs (Mosaic GPU) are chosen and called."""

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.varying import varying_like

CAPABILITY = "9.0"  # of Hopper, whose instructions the kernels are made of: H100, H200


def default(refused: str | None, otherwise: str) -> str:
  """Returns what None stands for on this platform.

  Args:
    refused: why the kernel for GPUs does not take the operands, or None.
    otherwise: the implementation where no kernel is.
  """
  backend = jax.default_backend()
  if backend == "gpu" and refused is None and jax.devices()[0].compute_capability == CAPABILITY:
    return "mosaic_gpu"
  return "mosaic_tpu" if backend == "tpu" else otherwise


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
    kernel: a function of references: operands, outputs, scratch.
    operands: arrays, off chip.
    out_type: a `jax.ShapeDtypeStruct` or several.
    grid: the thread blocks, by name of axis, the last running fastest.
    scratch: memory on chip and barriers of a block.
    warpgroups: of a block; more than one call their axis "wg".
    reduction_bytes: room for sums across warps.
    cluster: thread blocks at each place of the grid that run together, by name of axis.

  Raises:
    ValueError: for an axis named like one of the device mesh, whose index it would be taken for.
  """
  names = {*grid, *(cluster or {}), "wg"}
  if taken := names.intersection(jax.sharding.get_abstract_mesh().axis_names):
    both = ", ".join(sorted(taken))
    raise ValueError(f"axes of {name}'s grid must be named unlike the device mesh's, got {both}")
  outs = plgpu.kernel(
    kernel,
    out_type=out_type,
    scratch_types=list(scratch),
    grid=tuple(grid.values()),
    grid_names=tuple(grid),
    cluster=tuple((cluster or {}).values()),
    cluster_names=tuple(cluster or {}),
    # Layouts of registers are chosen by the kernels; jax 0.12 would infer them.
    compiler_params=plgpu.CompilerParams(
      lowering_semantics=plgpu.LoweringSemantics.Lane, reduction_scratch_bytes=reduction_bytes
    ),
    kernel_name=name,
    num_threads=warpgroups if warpgroups > 1 else None,
    thread_name="wg" if warpgroups > 1 else None,
  )(*operands)
  return varying_like(outs, *operands)
