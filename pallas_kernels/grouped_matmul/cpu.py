"""Grouped SwiGLU for XLA:CPU: a loop over blocks of rows, as many as the sizes need.

Each step takes `BLOCKS` blocks of `ROWS` rows, each block with one expert's weights, and
does the whole SwiGLU on them as small batched matmuls, one a core, while they are in
cache. Groups need no padding: a block that runs past its group's end computes rows of the
next groups with the wrong expert, and those rows are written again, rightly, by the later
steps, since groups are visited in order. Only weight gradients mask them.
"""

import jax
import jax.numpy as jnp

ROWS = 128  # a block's rows: an L2-sized tile
BLOCKS = 4  # blocks a step: enough to keep the cores busy


def _like(x, shape, dtype, *others):
  """Zeros that vary over the mesh axes any of the operands varies over."""
  axes = frozenset().union(*(jax.typeof(a).manual_axis_type.varying for a in (x, *others)))
  return jax.lax.pcast(jnp.zeros(shape, dtype), tuple(axes), to="varying")


def _schedule(group_sizes_E):
  """Returns a function from block number to (expert, first row, valid rows), and their count."""
  blocks_E = (group_sizes_E + ROWS - 1) // ROWS
  last_E = jnp.cumsum(blocks_E)
  end_E = jnp.cumsum(group_sizes_E)
  total = end_E[-1]

  def block(number):
    expert = jnp.searchsorted(last_E, number, side="right").astype(jnp.int32)
    expert = jnp.minimum(expert, group_sizes_E.shape[0] - 1)
    start = end_E[expert] - group_sizes_E[expert]
    first = start + (number - (last_E[expert] - blocks_E[expert])) * ROWS
    real = number < last_E[-1]
    # Blocks after the last write behind the rows, where nothing is read.
    return expert, jnp.where(real, first, total), jnp.where(real, end_E[expert] - first, 0)

  return block, (last_E[-1] + BLOCKS - 1) // BLOCKS


def _rows(a, first_b):
  return jnp.stack([jax.lax.dynamic_slice_in_dim(a, f, ROWS) for f in first_b])


def _put(a, blocks, first_b):
  for i, first in enumerate(first_b):
    a = jax.lax.dynamic_update_slice_in_dim(a, blocks[i], first, 0)
  return a


def _add(a, updates, expert_b):
  for i, e in enumerate(expert_b):
    old = jax.lax.dynamic_index_in_dim(a, e, keepdims=False)
    a = jax.lax.dynamic_update_index_in_dim(a, old + updates[i], e, 0)
  return a


def _pad(a):
  return jnp.pad(a, [(0, ROWS)] + [(0, 0)] * (a.ndim - 1))


def _activation(hidden, weight):
  gate, up = jnp.split(hidden.astype(jnp.float32), 2, axis=-1)
  return jax.nn.silu(gate) * up * weight


def _forward(x_PD, weight_P, w_gate_EDF, w_up_EDF, w_down_EFD, group_sizes_E):
  P, D = x_PD.shape
  F = w_gate_EDF.shape[-1]
  w_in_EDI = jnp.concatenate([w_gate_EDF, w_up_EDF], axis=-1)  # I = 2F
  block, num_steps = _schedule(group_sizes_E)
  x_pad, weight_pad = _pad(x_PD), _pad(weight_P)

  def step(i, carry):
    y, hidden = carry
    spots = [block(i * BLOCKS + j) for j in range(BLOCKS)]
    expert_b, first_b = [s[0] for s in spots], [s[1] for s in spots]
    h = jnp.einsum("brd,bdi->bri", _rows(x_pad, first_b), w_in_EDI[jnp.stack(expert_b)])
    inner = _activation(h, _rows(weight_pad, first_b)[..., None]).astype(x_PD.dtype)
    out = jnp.einsum("brf,bfd->brd", inner, w_down_EFD[jnp.stack(expert_b)])
    return _put(y, out, first_b), _put(hidden, h, first_b)

  operands = (x_PD, weight_P, w_in_EDI, w_down_EFD, group_sizes_E)
  carry = (
    _like(*operands[:1], (P + ROWS, D), x_PD.dtype, *operands[1:]),
    _like(*operands[:1], (P + ROWS, 2 * F), x_PD.dtype, *operands[1:]),
  )
  y, hidden = jax.lax.fori_loop(0, num_steps, step, carry)
  return y[:P], hidden


@jax.custom_vjp
def grouped_swiglu(x_PD, weight_P, w_gate_EDF, w_up_EDF, w_down_EFD, group_sizes_E):
  """See `api.grouped_swiglu`."""
  return _forward(x_PD, weight_P, w_gate_EDF, w_up_EDF, w_down_EFD, group_sizes_E)[0]


def _fwd(x_PD, weight_P, w_gate_EDF, w_up_EDF, w_down_EFD, group_sizes_E):
  y, hidden = _forward(x_PD, weight_P, w_gate_EDF, w_up_EDF, w_down_EFD, group_sizes_E)
  return y, (x_PD, weight_P, w_gate_EDF, w_up_EDF, w_down_EFD, group_sizes_E, hidden)


def _bwd(residuals, dy_PD):
  x_PD, weight_P, w_gate_EDF, w_up_EDF, w_down_EFD, group_sizes_E, hidden = residuals
  P, D = x_PD.shape
  w_in_EDI = jnp.concatenate([w_gate_EDF, w_up_EDF], axis=-1)
  block, num_steps = _schedule(group_sizes_E)
  x_pad, weight_pad, dy_pad = _pad(x_PD), _pad(weight_P), _pad(dy_PD)
  f32 = jnp.float32

  def step(i, carry):
    dx, dweight, dw_in, dw_down = carry
    spots = [block(i * BLOCKS + j) for j in range(BLOCKS)]
    expert_b, first_b = [s[0] for s in spots], [s[1] for s in spots]
    experts = jnp.stack(expert_b)
    mine = jnp.arange(ROWS)[None, :] < jnp.stack([s[2] for s in spots])[:, None]
    dy = _rows(dy_pad, first_b)
    inner, vjp = jax.vjp(_activation, _rows(hidden, first_b), _rows(weight_pad, first_b)[..., None])
    dinner = jnp.einsum("brd,bfd->brf", dy, w_down_EFD[experts], preferred_element_type=f32)
    dh, dwt = vjp(dinner)
    masked = jnp.where(mine[..., None], inner, 0).astype(x_PD.dtype)
    add_down = jnp.einsum("brf,brd->bfd", masked, dy, preferred_element_type=f32)
    dx_rows = jnp.einsum("bri,bdi->brd", dh, w_in_EDI[experts])
    dh = jnp.where(mine[..., None], dh, 0)
    add_in = jnp.einsum("brd,bri->bdi", _rows(x_pad, first_b), dh, preferred_element_type=f32)
    return (
      _put(dx, dx_rows, first_b),
      _put(dweight, dwt[..., 0], first_b),
      _add(dw_in, add_in, expert_b),
      _add(dw_down, add_down, expert_b),
    )

  operands = (weight_P, w_in_EDI, w_down_EFD, group_sizes_E, dy_PD)
  carry = (
    _like(x_PD, (P + ROWS, D), x_PD.dtype, *operands),
    _like(x_PD, (P + ROWS,), f32, *operands),
    _like(x_PD, w_in_EDI.shape, f32, *operands),
    _like(x_PD, w_down_EFD.shape, f32, *operands),
  )
  dx, dweight, dw_in, dw_down = jax.lax.fori_loop(0, num_steps, step, carry)
  dw_gate, dw_up = jnp.split(dw_in.astype(w_gate_EDF.dtype), 2, axis=-1)
  return dx[:P], dweight[:P], dw_gate, dw_up, dw_down.astype(w_down_EFD.dtype), None


grouped_swiglu.defvjp(_fwd, _bwd)
