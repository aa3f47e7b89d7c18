"""Validation and choice of implementation for the grouped SwiGLU."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.grouped_matmul import cpu, reference
from pallas_kernels.permute import permute


def ragged_dot(x_PD, weight_P, w_gate_EDF, w_up_EDF, w_down_EFD, group_sizes_E):
  """XLA's own grouped matmul: good where XLA has one (TPU, GPU), very slow on CPU."""
  gate_PF = jax.lax.ragged_dot(x_PD, w_gate_EDF, group_sizes_E)
  up_PF = jax.lax.ragged_dot(x_PD, w_up_EDF, group_sizes_E)
  inner_PF = jax.nn.silu(gate_PF) * up_PF * weight_P[:, None]
  return jax.lax.ragged_dot(inner_PF.astype(x_PD.dtype), w_down_EFD, group_sizes_E)


IMPLEMENTATIONS: dict[str, Callable] = {
  "reference": reference.grouped_swiglu,
  "ragged_dot": ragged_dot,
  "blocked": cpu.grouped_swiglu,
}


def grouped_swiglu(
  x_PD,
  weight_P,
  w_gate_EDF,
  w_up_EDF,
  w_down_EFD,
  group_sizes_E,
  implementation: str | None = None,
  order=None,
):
  """Applies each expert's SwiGLU to its own rows, weighted: w * down(silu(gate x) * up x).

  Args:
    x_PD: rows in expert order: the first group_sizes_E[0] belong to expert 0, and so on;
      with `order`, tokens x_MD.
    weight_P: float32 factor of each row's output.
    w_gate_EDF, w_up_EDF, w_down_EFD: the experts' weights, in x's dtype.
    group_sizes_E: int32, zeros allowed; must sum to P.
    implementation: a key of `IMPLEMENTATIONS`; None: `blocked` on CPU, else `ragged_dot`.
    order: (pair_P, row_MK) of `permute.expert_order`, when the rows are still to be taken
      from tokens; an implementation may do that on the way and never store them.

  Returns:
    [P, D] in x's dtype. Differentiable in everything but the sizes.

  Raises:
    ValueError: for shapes or dtypes that do not fit together, or an unknown implementation.
  """
  P, D = weight_P.size, x_PD.shape[1]
  E, _, F = w_gate_EDF.shape
  expected = {
    "weight_P": (weight_P, (P,)),
    "x": (x_PD, (P if order is None else order[1].shape[0], D)),
    "w_gate_EDF": (w_gate_EDF, (E, D, F)),
    "w_up_EDF": (w_up_EDF, (E, D, F)),
    "w_down_EFD": (w_down_EFD, (E, F, D)),
    "group_sizes_E": (group_sizes_E, (E,)),
  }
  for name, (array, shape) in expected.items():
    if array.shape != shape:
      raise ValueError(f"{name} must have shape {shape}, got {array.shape}")
    if name.startswith("w_") and array.dtype != x_PD.dtype:
      raise ValueError(f"{name} must have x's dtype ({x_PD.dtype}), got {array.dtype}")
  if not jnp.issubdtype(group_sizes_E.dtype, jnp.integer):
    raise ValueError(f"group_sizes_E must be integers, got {group_sizes_E.dtype}")
  if implementation is None:
    implementation = "blocked" if jax.default_backend() == "cpu" else "ragged_dot"
  if implementation not in IMPLEMENTATIONS:
    raise ValueError(
      f"implementation must be one of {', '.join(IMPLEMENTATIONS)}, got {implementation!r}"
    )
  # Loops index them by traced numbers, which NumPy's own arrays refuse.
  x_PD, order, *weights = jax.tree.map(
    jnp.asarray, (x_PD, order, weight_P, w_gate_EDF, w_up_EDF, w_down_EFD, group_sizes_E)
  )
  if implementation == "blocked":
    return cpu.grouped_swiglu(x_PD, *weights, order)
  rows_PD = x_PD if order is None else permute(x_PD, *order)
  return IMPLEMENTATIONS[implementation](rows_PD, *weights)
