"""Tokens to experts in FP8 and back: validation, choice of implementation, the plain way.

Shapes: M tokens, D hidden, F inner, E experts, K experts a token, P = M K rows.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.permute import combine, expert_order, group_starts, permute
from pallas_kernels.quantized_matmul import gpu, gpu_routed, tpu_grouped, tpu_routed
from pallas_kernels.quantized_matmul.api import (
  GROUPED_IMPLEMENTATIONS,
  check_operand,
  module_of,
  quantized_grouped_matmul,
)
from pallas_kernels.routing import Routed
from pallas_kernels.varying import vary_alike


def quantized_routed_swiglu(
  x_MD,
  routed: Routed,
  experts,
  implementation: str | None = None,
  power_of_two_scales: bool = False,
):
  """`grouped_matmul.routed_swiglu` with its matmuls in FP8, the activation in float32.

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
  _check(x_MD, expert_MK, experts)
  module = module_of(GROUPED_IMPLEMENTATIONS, implementation)
  if module is tpu_grouped:
    return _mosaic_tpu(x_MD, routed, experts, power_of_two_scales)
  if module is gpu:
    return gpu_routed.routed_swiglu(power_of_two_scales, x_MD, routed, experts)
  multiply = lambda x, w: quantized_grouped_matmul(  # noqa: E731
    x, w, counts_E, implementation, power_of_two_scales
  )
  with jax.named_scope("dispatch"):
    order = expert_order(expert_MK, rank_MK, counts_E)
    x_PD, weight_P = permute(x_MD, *order), gate_MK.reshape(-1)[order[0]]
  with jax.named_scope("experts"):
    gate_PF, up_PF = (multiply(x_PD, w).astype(jnp.float32) for w in experts[:2])
    inner_PF = jax.nn.silu(gate_PF) * up_PF * weight_P[:, None]
    y_PD = multiply(inner_PF.astype(x_MD.dtype), experts[2])
  with jax.named_scope("combine"):
    return combine(y_PD, *order)


def _check(x_MD, expert_MK, experts) -> None:
  names = ("w_gate_EDF", "w_up_EDF", "w_down_EFD")
  check_operand("x_MD", x_MD, 2)
  for name, w in zip(names, experts):
    check_operand(name, w, 3)
  E, _, F = experts[0].shape
  M, D = x_MD.shape
  for name, w, shape in zip(names, experts, ((E, D, F), (E, D, F), (E, F, D))):
    if w.shape != shape:
      raise ValueError(f"{name} must have shape {shape}, got {w.shape}")
  if expert_MK.ndim != 2 or expert_MK.shape[0] != M:
    raise ValueError(f"expert_MK must have a row for each of {M} tokens, got {expert_MK.shape}")


def _mosaic_tpu(x_MD, routed: Routed, experts, power_of_two_scales: bool):
  expert_MK, gate_MK, counts_E, rank_MK = routed
  m = tpu_grouped.step_rows(expert_MK.size, counts_E.shape[0])
  starts_E = group_starts(counts_E, m)
  plan = tpu_routed.Plan(counts_E, starts_E, m, expert_MK.size)
  x_MD, gate_MK, *experts = vary_alike(x_MD, gate_MK, *experts)
  return tpu_routed.routed_swiglu(
    *(power_of_two_scales, x_MD, gate_MK, tuple(experts), starts_E[expert_MK] + rank_MK, plan)
  )
