"""What a mixture of experts computes with the TPU's grouped matmuls, with gradients.

`grouped_matmul` and `grouped_swiglu` take rows in expert order. `routed_swiglu` takes tokens, and
copies each row once to its expert's rows and once back.

Shapes: M tokens, K choices a token (or a contraction, beside N columns), P rows, D hidden, F
inner, E experts, n column blocks.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.grouped_matmul import tpu_groups, tpu_rows
from pallas_kernels.grouped_matmul.tpu_groups import over_groups
from pallas_kernels.grouped_matmul.tpu_rows import over_rows
from pallas_kernels.grouped_matmul.tpu_tiles import row
from pallas_kernels.permute import tpu as permute
from pallas_kernels.permute import weights_of_rows

f32 = jnp.float32


def refused(dtype, D: int, F: int, tile: int) -> str | None:
  """Returns the rule that an expert layer breaks, gradients and permutation included, or None.

  Args:
    dtype: of rows and weights.
    D, F: hidden and inner size.
    tile: rows of a tile.
  """
  if rule := permute.refused(dtype, D):
    return rule
  dtype = jnp.dtype(dtype)
  words = permute.row_words(dtype, D)
  struct = jax.ShapeDtypeStruct
  x, inner = struct((tile, *words.shape), words.dtype), struct((tile, F), dtype)
  w_in, w_down = struct((1, D, F), dtype), struct((1, F, D), dtype)
  try:
    tpu_rows.fit(tile, [x], [w_in, w_in], [], [dtype] * 3)
    tpu_rows.fit(tile, [inner], [w_down], [], [words.dtype])
    tpu_rows.fit(tile, [x], [w_down], [inner, inner], [dtype] * 3, transposed=True)
    tpu_rows.fit(tile, [inner, inner], [w_in, w_in], [], [words.dtype], transposed=True)
    tpu_groups.fit(x, [inner, inner], tile, dtype)
    tpu_groups.fit(inner, [x], tile, dtype)
  except ValueError as error:
    return str(error)
  return None


# The three products of a grouped matmul.


def rows_times_matrices(x, w_EKN, plan, tile: int, dtype, transposed: bool = False):
  """Returns [P, N] in `dtype` (uint32: words): each row times its expert's matrix."""
  body = lambda y: [y]  # noqa: E731
  return over_rows(body, plan, tile, [x], [w_EKN], outs=[dtype], transposed=transposed)[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def grouped_matmul(x_PK, w_EKN, group_sizes_E, group_starts_E, tile: int):
  """See `api.grouped_matmul`; starts are multiples of `tile`, and so is P."""
  return rows_times_matrices(x_PK, w_EKN, (group_sizes_E, group_starts_E), tile, x_PK.dtype)


def _matmul_fwd(x_PK, w_EKN, group_sizes_E, group_starts_E, tile):
  saved = (x_PK, w_EKN, group_sizes_E, group_starts_E)
  return grouped_matmul(*saved, tile), saved


def _matmul_bwd(tile, saved, dy_PN):
  x_PK, w_EKN, *plan = saved
  dx_PK = rows_times_matrices(dy_PN, w_EKN, plan, tile, x_PK.dtype, transposed=True)
  dw_EKN = over_groups(x_PK, [dy_PN], plan, tile, w_EKN.dtype)[0]
  return dx_PK, dw_EKN, None, None


grouped_matmul.defvjp(_matmul_fwd, _matmul_bwd)


# The fused SwiGLU, on plain rows or on rows packed into words.


def _swiglu(x, weight_P, weights, plan, tile, out_dtype, keep: bool):
  """Returns the rows' outputs in `out_dtype`, and with `keep` gate and up [P, F]."""
  w_gate_EDF, w_up_EDF, w_down_EFD = weights
  dtype = w_gate_EDF.dtype

  def body(gate, up, weight_m1):
    return [jax.nn.silu(gate) * up * weight_m1, gate, up]

  matrices, outs = [w_gate_EDF, w_up_EDF], [dtype] * (3 if keep else 1)
  inner_PF, *kept = over_rows(body, plan, tile, [x], matrices, weight=weight_P, outs=outs)
  return rows_times_matrices(inner_PF, w_down_EFD, plan, tile, out_dtype), kept


def _swiglu_gradients(x, dy, weight_P, weights, kept, plan, tile, out_dtype):
  """Returns the gradients of rows (in `out_dtype`), weight_P and the three weights."""
  w_gate_EDF, w_up_EDF, w_down_EFD = weights
  dtype = w_gate_EDF.dtype

  def through_activation(dinner, gate, up, weight_m1):
    gate, up = gate.astype(f32), up.astype(f32)
    sigmoid = jax.nn.sigmoid(gate)
    act = gate * sigmoid * up
    dact = dinner * weight_m1
    dgate = dact * up * sigmoid * (1 + gate * (1 - sigmoid))
    dweight_m1 = jnp.sum(dinner * act, axis=1, keepdims=True)
    return [dgate, dact * gate * sigmoid, act * weight_m1, row(dweight_m1)]

  dgate_PF, dup_PF, inner_PF, dweight_n1P = over_rows(
    through_activation,
    plan,
    tile,
    [dy],
    [w_down_EFD],
    kept,
    weight=weight_P,
    outs=[dtype] * 3,
    transposed=True,
    sums=True,
  )
  add = lambda a, b: [a + b]  # noqa: E731
  matrices, dhidden = [w_gate_EDF, w_up_EDF], [dgate_PF, dup_PF]
  dx = over_rows(add, plan, tile, dhidden, matrices, outs=[out_dtype], transposed=True)[0]
  dw_gate, dw_up = over_groups(x, dhidden, plan, tile, dtype)
  (dw_down,) = over_groups(inner_PF, [dy], plan, tile, dtype)
  return dx, jnp.sum(dweight_n1P[:, 0], axis=0), dw_gate, dw_up, dw_down


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def grouped_swiglu(x_PD, weight_P, weights, group_sizes_E, group_starts_E, tile: int):
  """See `api.grouped_swiglu`; starts are multiples of `tile`, and so is P."""
  plan = (group_sizes_E, group_starts_E)
  return _swiglu(x_PD, weight_P, weights, plan, tile, x_PD.dtype, keep=False)[0]


def _grouped_fwd(x_PD, weight_P, weights, group_sizes_E, group_starts_E, tile):
  plan = (group_sizes_E, group_starts_E)
  y_PD, kept = _swiglu(x_PD, weight_P, weights, plan, tile, x_PD.dtype, keep=True)
  return y_PD, (x_PD, weight_P, weights, plan, kept)


def _grouped_bwd(tile, saved, dy_PD):
  x_PD, weight_P, weights, plan, kept = saved
  dx_PD, dweight_P, *dweights = _swiglu_gradients(
    x_PD, dy_PD, weight_P, weights, kept, plan, tile, x_PD.dtype
  )
  return dx_PD, dweight_P, tuple(dweights), None, None


grouped_swiglu.defvjp(_grouped_fwd, _grouped_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def routed_swiglu(x_MD, gate_MK, weights, row_MK, group_sizes_E, group_starts_E, P: int, tile: int):
  """See `api.routed_swiglu`; starts are multiples of `tile`, and so is P."""
  return _routed(x_MD, gate_MK, weights, row_MK, (group_sizes_E, group_starts_E), P, tile, False)[0]


def _routed(x_MD, gate_MK, weights, row_MK, plan, P, tile, keep):
  words = permute.row_words(x_MD.dtype, x_MD.shape[1]).dtype
  with jax.named_scope("permute"):
    x = permute.scatter(x_MD, row_MK, P)
    weight_P = weights_of_rows(gate_MK, row_MK, P)
  y, kept = _swiglu(x, weight_P, weights, plan, tile, words, keep)
  with jax.named_scope("combine"):
    return permute.gather_sum(y, row_MK, x_MD.dtype), kept


def _routed_fwd(x_MD, gate_MK, weights, row_MK, group_sizes_E, group_starts_E, P, tile):
  plan = (group_sizes_E, group_starts_E)
  y_MD, kept = _routed(x_MD, gate_MK, weights, row_MK, plan, P, tile, True)
  return y_MD, (x_MD, gate_MK, weights, row_MK, plan, kept)


def _routed_bwd(P, tile, saved, dy_MD):
  x_MD, gate_MK, weights, row_MK, plan, kept = saved
  # Tokens are moved once more rather than kept as rows: K times as large.
  with jax.named_scope("permute"):
    x, dy = (permute.scatter(a, row_MK, P) for a in (x_MD, dy_MD))
    weight_P = weights_of_rows(gate_MK, row_MK, P)
  dx, dweight_P, *dweights = _swiglu_gradients(x, dy, weight_P, weights, kept, plan, tile, x.dtype)
  with jax.named_scope("combine"):
    dx_MD = permute.gather_sum(dx, row_MK, x_MD.dtype)
  return dx_MD, dweight_P[row_MK], tuple(dweights), None, None, None


routed_swiglu.defvjp(_routed_fwd, _routed_bwd)
