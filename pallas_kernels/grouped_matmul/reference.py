"""The reference for grouped matmuls, without tiling: every expert multiplies every row, masked."""

import jax
import jax.numpy as jnp


def _each_expert(one_expert, y_PN, experts, sizes_E, starts_E):
  """Sums `one_expert(matrices)` over the experts, each on its own rows."""
  row_P = jnp.arange(y_PN.shape[0])

  def add(y_PN, expert):
    matrices, size, start = expert
    mine_P = (row_P >= start) & (row_P < start + size)
    return y_PN + jnp.where(mine_P[:, None], one_expert(*matrices), 0), None

  return jax.lax.scan(add, y_PN, (experts, sizes_E, starts_E))[0]


def grouped_matmul(x_PK, w_EKN, sizes_E, starts_E):
  """See `api.grouped_matmul`."""
  # A zero that varies over the same mesh axes as the product does.
  y_PN = 0 * (x_PK[:, :1] @ w_EKN[0, :1])
  return _each_expert(lambda w_KN: x_PK @ w_KN, y_PN, (w_EKN,), sizes_E, starts_E)


def grouped_swiglu(x_PD, weight_P, w_gate_EDF, w_up_EDF, w_down_EFD, sizes_E, starts_E):
  """See `api.grouped_swiglu`."""

  @jax.checkpoint  # or backward keeps every expert's view of all rows
  def one_expert(w_gate_DF, w_up_DF, w_down_FD):
    inner_PF = jax.nn.silu(x_PD @ w_gate_DF) * (x_PD @ w_up_DF) * weight_P[:, None]
    return inner_PF.astype(x_PD.dtype) @ w_down_FD

  y_PD = 0 * (x_PD + (x_PD[:, :1] @ w_down_EFD[0, :1]))
  return _each_expert(one_expert, y_PD, (w_gate_EDF, w_up_EDF, w_down_EFD), sizes_E, starts_E)
