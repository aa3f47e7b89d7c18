"""Experts in FP8, on rows and from tokens to tokens: validation and choice of implementation.

Shapes: M tokens, D hidden, F inner, E experts, K experts a token, P rows in expert order.
"""

import jax
import jax.numpy as jnp

from pallas_kernels import platform
from pallas_kernels.permute import combine, expert_order, group_starts, num_rows, permute
from pallas_kernels.permute import gpu as permute_gpu
from pallas_kernels.permute.alignment import AlignedRows
from pallas_kernels.quantized_matmul import gpu, gpu_routed, tpu_grouped, tpu_routed
from pallas_kernels.quantized_matmul.api import (
  check_operand,
  chosen,
  quantized_grouped_matmul,
)
from pallas_kernels.quantized_matmul.e4m3 import TILE
from pallas_kernels.routing import Routed
from pallas_kernels.varying import vary_alike


def refusals(dtype, D: int, F: int) -> platform.Refusals:
  """Returns why compiled kernels do not take an expert layer; see `platform.Refusals`."""
  return {
    "mosaic_tpu": lambda: tpu_routed.refused(dtype, D, F),
    "mosaic_gpu": lambda: permute_gpu.refused(dtype, -(-D // TILE) * TILE),
  }


def row_alignment(P: int, E: int, implementation: str | None = None) -> int:
  """Returns what the starts of E groups of P rows in all should be multiples of.

  `quantized_grouped_swiglu` then need not move the rows again.
  """
  if chosen(implementation) == "mosaic_tpu":
    return tpu_grouped.step_rows(P, E)
  return 1


def quantized_grouped_swiglu(
  x_PD,
  weight_P,
  w_gate_EDF,
  w_up_EDF,
  w_down_EFD,
  group_sizes_E,
  implementation: str | None = None,
  power_of_two_scales: bool = False,
  alignment: int = 1,
  group_starts_E=None,
):
  """`grouped_matmul.grouped_swiglu` with its matmuls in FP8, the activation in float32.

  Args:
    x_PD: rows in expert order, any floating point.
    weight_P: float32 factor of each row's output.
    w_gate_EDF, w_up_EDF, w_down_EFD: the experts' weights, any floating point.
    group_sizes_E: int32, zeros allowed.
    implementation, power_of_two_scales: as in `quantized_grouped_matmul`.
    alignment: what divides every expert's first row; see `row_alignment`.
    group_starts_E: int32, each group's first row, ascending; None: the groups lie one after the
      other, each starting at a multiple of `alignment`. A device that holds only some of the
      groups gives the starts of its own.

  Returns:
    [P, D] in x's dtype; rows outside all groups are undefined. Differentiable in everything but
    the sizes and starts.

  Raises:
    ValueError: for shapes or dtypes that do not fit, or an unknown implementation.
  """
  experts = (w_gate_EDF, w_up_EDF, w_down_EFD)
  _check(x_PD, experts)
  P, (E, D, F) = x_PD.shape[0], w_gate_EDF.shape
  for name, array, size in (("weight_P", weight_P, P), ("group_sizes_E", group_sizes_E, E)):
    if array.shape != (size,):
      raise ValueError(f"{name} must have shape {(size,)}, got {array.shape}")
  implementation = chosen(implementation, refusals(x_PD.dtype, D, F))
  sizes_E = jnp.asarray(group_sizes_E)
  starts_E = group_starts(sizes_E, alignment) if group_starts_E is None else group_starts_E
  operands = map(jnp.asarray, (x_PD, weight_P, *experts))
  x_PD, weight_P, *experts = vary_alike(*operands)
  if implementation == "mosaic_tpu":
    plan = sizes_E, jnp.asarray(starts_E)
    return _mosaic_tpu_rows(x_PD, weight_P, experts, plan, alignment, power_of_two_scales)

  def multiply(x, w):
    if implementation == "mosaic_gpu":
      return gpu.multiply(power_of_two_scales, x, w, sizes_E, starts_E)
    return quantized_grouped_matmul(x, w, sizes_E, implementation, power_of_two_scales, starts_E)

  gate_PF, up_PF = (multiply(x_PD, w).astype(jnp.float32) for w in experts[:2])
  inner_PF = jax.nn.silu(gate_PF) * up_PF * weight_P[:, None]
  return multiply(inner_PF.astype(x_PD.dtype), experts[2])


def _mosaic_tpu_rows(x_PD, weight_P, experts, plan, alignment: int, power_of_two_scales: bool):
  sizes_E, starts_E = plan
  P, E = x_PD.shape[0], sizes_E.shape[0]
  m = tpu_grouped.step_rows(P, E)
  if alignment % TILE == 0 and alignment <= m:
    m = alignment
  aligned = AlignedRows(P, sizes_E, starts_E, alignment, m)
  steps = tpu_routed.Plan(sizes_E, aligned.starts_E, m, P, aligned.num_rows)
  rows_AD, weight_A = aligned.rows(x_PD), aligned.numbers(weight_P)
  y_AD = tpu_routed.grouped_swiglu(power_of_two_scales, rows_AD, weight_A, tuple(experts), steps)
  return aligned.back(y_AD)


def quantized_routed_swiglu(
  x_MD,
  routed: Routed,
  experts,
  implementation: str | None = None,
  power_of_two_scales: bool = False,
):
  """`grouped_matmul.routed_swiglu` with its matmuls in FP8, the activation in float32.

  The fused form for one device that holds all the experts.

  Args:
    x_MD: tokens, any floating point.
    routed: of `routing.route`: experts, gates, counts and ranks.
    experts: (w_gate_EDF, w_up_EDF, w_down_EFD), any floating point.
    implementation, power_of_two_scales: as in `quantized_grouped_matmul`.

  Returns:
    [M, D] in x's dtype. Differentiable in x, gates and weights.

  Raises:
    ValueError: for shapes or dtypes that do not fit, or an unknown implementation.
  """
  expert_MK, gate_MK, counts_E, rank_MK = routed
  _check(x_MD, experts)
  M, (_, D, F) = x_MD.shape[0], experts[0].shape
  if expert_MK.ndim != 2 or expert_MK.shape[0] != M:
    raise ValueError(f"expert_MK must have a row for each of {M} tokens, got {expert_MK.shape}")
  implementation = chosen(implementation, refusals(x_MD.dtype, D, F))
  if implementation in ("mosaic_tpu", "mosaic_gpu"):
    fused = _mosaic_tpu if implementation == "mosaic_tpu" else gpu_routed.routed_swiglu
    with jax.named_scope("experts"):
      return fused(power_of_two_scales, x_MD, routed, experts)
  with jax.named_scope("dispatch"):
    pair_P, row_MK = expert_order(expert_MK, rank_MK, counts_E)
    x_PD = permute(x_MD, pair_P, row_MK, "reference")
    weight_P = gate_MK.reshape(-1)[pair_P]
  with jax.named_scope("experts"):
    w_gate_EDF, w_up_EDF, w_down_EFD = experts
    y_PD = quantized_grouped_swiglu(
      x_PD,
      weight_P,
      w_gate_EDF,
      w_up_EDF,
      w_down_EFD,
      counts_E,
      implementation=implementation,
      power_of_two_scales=power_of_two_scales,
    )
  with jax.named_scope("combine"):
    return combine(y_PD, pair_P, row_MK, "reference")


def _check(x, experts) -> None:
  names = ("w_gate_EDF", "w_up_EDF", "w_down_EFD")
  check_operand("x", x, 2)
  for name, w in zip(names, experts):
    check_operand(name, w, 3)
  E, _, F = experts[0].shape
  D = x.shape[1]
  for name, w, shape in zip(names, experts, ((E, D, F), (E, D, F), (E, F, D))):
    if w.shape != shape:
      raise ValueError(f"{name} must have shape {shape}, got {w.shape}")


def _mosaic_tpu(power_of_two_scales: bool, x_MD, routed: Routed, experts):
  expert_MK, gate_MK, counts_E, rank_MK = routed
  P, E = expert_MK.size, counts_E.shape[0]
  m = tpu_grouped.step_rows(P, E)
  starts_E = group_starts(counts_E, m)
  plan = tpu_routed.Plan(counts_E, starts_E, m, P, num_rows(P, E, m))
  x_MD, gate_MK, *experts = vary_alike(x_MD, gate_MK, *experts)
  row_MK = starts_E[expert_MK] + rank_MK
  return tpu_routed.routed_swiglu(power_of_two_scales, x_MD, gate_MK, tuple(experts), row_MK, plan)
