"""The readable truth of `grouped_swiglu`, no tiling: every expert sees every row, masked."""

import jax
import jax.numpy as jnp


def grouped_swiglu(x_PD, weight_P, w_gate_EDF, w_up_EDF, w_down_EFD, group_sizes_E):
  """See `api.grouped_swiglu`."""
  ends_E = jnp.cumsum(group_sizes_E)
  starts_E = ends_E - group_sizes_E
  row_P = jnp.arange(x_PD.shape[0])

  def one_expert(y_PD, expert):
    w_gate_DF, w_up_DF, w_down_FD, start, end = expert
    mine_P = (row_P >= start) & (row_P < end)
    inner_PF = jax.nn.silu(x_PD @ w_gate_DF) * (x_PD @ w_up_DF) * weight_P[:, None]
    return y_PD + jnp.where(mine_P[:, None], inner_PF.astype(x_PD.dtype) @ w_down_FD, 0), None

  experts = (w_gate_EDF, w_up_EDF, w_down_EFD, starts_E, ends_E)
  # A zero that varies over the same mesh axes as the product does.
  y_PD = 0 * (x_PD + (x_PD[:, :1] @ w_down_EFD[0, :1]))
  return jax.lax.scan(one_expert, y_PD, experts)[0]
