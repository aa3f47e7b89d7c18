"""Grouped SwiGLU for XLA:CPU: a loop over blocks of rows, as many as the sizes need.

Each step takes `BLOCKS` blocks of rows, each with one expert's weights, and does the whole
SwiGLU on them as batched matmuls. Rows are gathered from the tokens on the way and never
stored in expert order. Groups need no padding: a block that runs past its group computes
rows of its neighbours with the wrong expert and does not write them.

Shapes: M tokens, P rows, D hidden, F inner, I = 2 F, E experts, b blocks of a step, r rows
of a block.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.permute import reference as permute
from pallas_kernels.varying import zeros_like_operands

ROWS = 256  # a block's rows, unless told
BLOCKS = 8  # blocks a step

f32 = jnp.float32


def _schedule(group_sizes_E, group_starts_E, num_rows: int, rows: int):
  """Cuts the groups into blocks.

  Returns:
    A function from a step's number to (expert_b, first_b, mine_br): each block's expert,
    first row, and which of its rows belong to it; the number of steps; and a block's rows.
  """
  R = min(rows, num_rows)
  blocks_E = (group_sizes_E + R - 1) // R
  last_E = jnp.cumsum(blocks_E)
  end_E = group_starts_E + group_sizes_E

  def step(i):
    number_b = i * BLOCKS + jnp.arange(BLOCKS)
    expert_b = jnp.searchsorted(last_E, number_b, side="right").astype(jnp.int32)
    expert_b = jnp.minimum(expert_b, group_sizes_E.shape[0] - 1)
    within_b = number_b - (last_E[expert_b] - blocks_E[expert_b])
    wanted_b = group_starts_E[expert_b] + within_b * R
    first_b = jnp.clip(wanted_b, 0, num_rows - R)  # a block does not run past the rows
    row_br = first_b[:, None] + jnp.arange(R)[None, :]
    mine_br = (row_br >= wanted_b[:, None]) & (row_br < end_E[expert_b][:, None])
    return expert_b, first_b, mine_br & (number_b < last_E[-1])[:, None]

  return step, (last_E[-1] + BLOCKS - 1) // BLOCKS, R


def _take(a, first_b, R: int):
  """Returns the blocks' rows, [b, r, ...]."""
  return jnp.stack([jax.lax.dynamic_slice_in_dim(a, f, R) for f in first_b])


def _put(a, blocks, first_b, mine_br):
  """Writes the rows that belong to the blocks."""
  for block, first, mine_r in zip(blocks, first_b, mine_br):
    old = jax.lax.dynamic_slice_in_dim(a, first, block.shape[0])
    mine = mine_r.reshape(-1, *[1] * (a.ndim - 1))
    a = jax.lax.dynamic_update_slice_in_dim(a, jnp.where(mine, block, old), first, 0)
  return a


def _add(a, updates, expert_b):
  for update, e in zip(updates, expert_b):
    old = jax.lax.dynamic_index_in_dim(a, e, keepdims=False)
    a = jax.lax.dynamic_update_index_in_dim(a, old + update, e, 0)
  return a


def _transposed(a):
  """Swaps the last two dimensions now: matmuls of plain row-major operands are the fast ones."""
  return jax.lax.optimization_barrier(a.swapaxes(-1, -2))


def _activation(hidden, weight):
  gate, up = jnp.split(hidden.astype(f32), 2, axis=-1)
  return jax.nn.silu(gate) * up * weight[..., None]


def _token_of_row(order, num_rows: int):
  if order is None:
    return jnp.arange(num_rows, dtype=jnp.int32)
  pair_P, row_MK = order
  M, K = row_MK.shape
  return jnp.minimum(pair_P // K, M - 1)  # where no pair lies, any token


@functools.partial(jax.custom_vjp, nondiff_argnums=(8,))
def grouped_swiglu(
  x_MD, weight_P, w_gate_EDF, w_up_EDF, w_down_EFD, sizes_E, starts_E, order, rows: int
):
  """See `api.grouped_swiglu`."""
  return _fwd(x_MD, weight_P, w_gate_EDF, w_up_EDF, w_down_EFD, sizes_E, starts_E, order, rows)[0]


def _fwd(x_MD, weight_P, w_gate_EDF, w_up_EDF, w_down_EFD, sizes_E, starts_E, order, rows):
  P, D = weight_P.shape[0], x_MD.shape[1]
  w_in_EDI = jnp.concatenate([w_gate_EDF, w_up_EDF], axis=-1)
  token_P = _token_of_row(order, P)
  step, num_steps, R = _schedule(sizes_E, starts_E, P, rows)

  def body(i, carry):
    y_PD, hidden_PI = carry
    expert_b, first_b, mine_br = step(i)
    x_brD = x_MD[_take(token_P, first_b, R)]
    hidden_brI = jnp.matmul(x_brD, w_in_EDI[expert_b])
    inner_brF = _activation(hidden_brI, _take(weight_P, first_b, R)).astype(x_MD.dtype)
    y_brD = jnp.matmul(inner_brF, w_down_EFD[expert_b])
    return _put(y_PD, y_brD, first_b, mine_br), _put(hidden_PI, hidden_brI, first_b, mine_br)

  operands = (x_MD, weight_P, w_in_EDI, w_down_EFD, sizes_E)
  carry = (
    zeros_like_operands((P, D), x_MD.dtype, *operands),
    zeros_like_operands((P, w_in_EDI.shape[-1]), x_MD.dtype, *operands),
  )
  y_PD, hidden_PI = jax.lax.fori_loop(0, num_steps, body, carry)
  saved = (x_MD, weight_P, w_gate_EDF, w_up_EDF, w_down_EFD, sizes_E, starts_E, order, hidden_PI)
  return y_PD, saved


def _bwd(rows, saved, dy_PD):
  x_MD, weight_P, w_gate_EDF, w_up_EDF, w_down_EFD, sizes_E, starts_E, order, hidden_PI = saved
  P, D = dy_PD.shape
  dtype = x_MD.dtype
  w_in_EDI = jnp.concatenate([w_gate_EDF, w_up_EDF], axis=-1)
  w_in_EID, w_down_EDF = _transposed(w_in_EDI), _transposed(w_down_EFD)
  token_P = _token_of_row(order, P)
  step, num_steps, R = _schedule(sizes_E, starts_E, P, rows)

  def body(i, carry):
    dx_PD, dweight_P, dw_in_EDI, dw_down_EFD = carry
    expert_b, first_b, mine_br = step(i)
    dy_brD = _take(dy_PD, first_b, R)
    inner_brF, vjp = jax.vjp(_activation, _take(hidden_PI, first_b, R), _take(weight_P, first_b, R))
    dinner_brF = jnp.matmul(dy_brD, w_down_EDF[expert_b], preferred_element_type=f32)
    dhidden_brI, dweight_br = vjp(dinner_brF)
    dx_brD = jnp.matmul(dhidden_brI, w_in_EID[expert_b])
    # A neighbour's rows count for nothing in this expert's weights.
    inner_bFr = _transposed(jnp.where(mine_br[..., None], inner_brF, 0).astype(dtype))
    dw_down = jnp.matmul(inner_bFr, dy_brD, preferred_element_type=f32)
    x_bDr = _transposed(x_MD[_take(token_P, first_b, R)])
    own_brI = jnp.where(mine_br[..., None], dhidden_brI, 0)
    dw_in = jnp.matmul(x_bDr, own_brI, preferred_element_type=f32)
    return (
      _put(dx_PD, dx_brD, first_b, mine_br),
      _put(dweight_P, dweight_br, first_b, mine_br),
      _add(dw_in_EDI, dw_in, expert_b),
      _add(dw_down_EFD, dw_down, expert_b),
    )

  operands = (x_MD, weight_P, w_in_EDI, w_down_EFD, sizes_E, dy_PD)
  carry = (
    zeros_like_operands((P, D), dtype, *operands),
    zeros_like_operands((P,), f32, *operands),
    zeros_like_operands(w_in_EDI.shape, f32, *operands),
    zeros_like_operands(w_down_EFD.shape, f32, *operands),
  )
  dx_PD, dweight_P, dw_in_EDI, dw_down_EFD = jax.lax.fori_loop(0, num_steps, body, carry)
  dw_gate, dw_up = jnp.split(dw_in_EDI.astype(dtype), 2, axis=-1)
  dx_MD = dx_PD if order is None else permute.combine(dx_PD, order[1])
  return dx_MD, dweight_P, dw_gate, dw_up, dw_down_EFD.astype(dtype), None, None, None


grouped_swiglu.defvjp(_fwd, _bwd)
