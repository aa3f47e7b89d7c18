"""Validation, choice of implementation and gradients of permute and combine.

Shapes: M tokens, D hidden, K experts a token, P rows.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import platform
from pallas_kernels.permute import gpu, reference, tpu
from pallas_kernels.varying import vary_alike

IMPLEMENTATIONS = ("reference", "mosaic_tpu", "mosaic_gpu")


def chosen(implementation: str | None, dtype, D: int) -> str:
  """Returns the implementation that None stands for here, or the one given."""
  refusals = {
    "mosaic_tpu": lambda: tpu.refused(dtype, D),
    "mosaic_gpu": lambda: gpu.refused(dtype, D),
  }
  return platform.choose(implementation, IMPLEMENTATIONS, "reference", refusals)


def _check(name: str, array, num_lines: int, pair_P, row_MK) -> None:
  if (
    array.ndim != 2 or array.shape[0] != num_lines or not jnp.issubdtype(array.dtype, jnp.floating)
  ):
    raise ValueError(
      f"{name} must be floating point with {num_lines} rows, got {array.dtype} {array.shape}"
    )
  for label, indices, rank in (("pair_P", pair_P, 1), ("row_MK", row_MK, 2)):
    if indices.ndim != rank or indices.dtype != jnp.int32:
      raise ValueError(
        f"{label} must be int32 of {rank} dimensions, got {indices.dtype} {indices.shape}"
      )


def permute(x_MD, pair_P, row_MK, implementation: str | None = None):
  """Copies each token's row to its K places: x_PD[row_MK[m, k]] = x_MD[m].

  Args:
    x_MD: tokens, floating point.
    pair_P, row_MK: of `expert_order`, int32.
    implementation: one of `IMPLEMENTATIONS`; None: the compiled kernel on the chips listed in
      `pallas_kernels.platform` if it takes the width and dtype, else `reference`.

  Returns:
    [P, D] in x's dtype; rows at which no pair lies are undefined. Differentiable in x.

  Raises:
    ValueError: for shapes or dtypes that do not fit together, an unknown implementation, or a
      named one that does not take the width or dtype.
  """
  _check("x_MD", x_MD, row_MK.shape[0], pair_P, row_MK)
  implementation = chosen(implementation, x_MD.dtype, x_MD.shape[1])
  with jax.named_scope("permute"):
    return _permute(implementation, *_operands(implementation, x_MD, pair_P, row_MK))


def combine(y_PD, pair_P, row_MK, implementation: str | None = None):
  """Sums each token's K rows in float32: y_MD[m] = sum over k of y_PD[row_MK[m, k]].

  Args:
    y_PD: rows, floating point.
    pair_P, row_MK, implementation: as in `permute`.

  Returns:
    [M, D] in y's dtype. Differentiable in y; the gradient to rows at which no pair lies is
    undefined.

  Raises:
    ValueError: as `permute`.
  """
  _check("y_PD", y_PD, pair_P.shape[0], pair_P, row_MK)
  implementation = chosen(implementation, y_PD.dtype, y_PD.shape[1])
  with jax.named_scope("combine"):
    return _combine(implementation, *_operands(implementation, y_PD, pair_P, row_MK))


def _operands(implementation: str, a, pair_P, row_MK):
  """Returns (number of rows, array, pair_P where it is used, row_MK)."""
  num_rows = pair_P.shape[0]
  a, row_MK, pair_P = vary_alike(*map(jnp.asarray, (a, row_MK, pair_P)))
  return num_rows, a, pair_P if implementation == "reference" else None, row_MK


def _to_rows(implementation, num_rows, x_MD, pair_P, row_MK):
  if implementation == "reference":
    return reference.permute(x_MD, pair_P, row_MK)
  module = tpu if implementation == "mosaic_tpu" else gpu
  return module.permute(x_MD, row_MK, num_rows)


def _to_tokens(implementation, y_PD, row_MK):
  module = {"reference": reference, "mosaic_tpu": tpu, "mosaic_gpu": gpu}[implementation]
  return module.combine(y_PD, row_MK)


# Each is the other's transpose. Left to autodiff, the gradient of a gather would be a scatter.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _permute(implementation, num_rows, x_MD, pair_P, row_MK):
  return _to_rows(implementation, num_rows, x_MD, pair_P, row_MK)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _combine(implementation, num_rows, y_PD, pair_P, row_MK):
  return _to_tokens(implementation, y_PD, row_MK)


_permute.defvjp(
  lambda implementation, num_rows, x_MD, pair_P, row_MK: (
    _to_rows(implementation, num_rows, x_MD, pair_P, row_MK),
    row_MK,
  ),
  lambda implementation, num_rows, row_MK, dx_PD: (
    _to_tokens(implementation, dx_PD, row_MK),
    None,
    None,
  ),
)
_combine.defvjp(
  lambda implementation, num_rows, y_PD, pair_P, row_MK: (
    _to_tokens(implementation, y_PD, row_MK),
    (pair_P, row_MK),
  ),
  lambda implementation, num_rows, saved, dy_MD: (
    _to_rows(implementation, num_rows, dy_MD, *saved),
    None,
    None,
  ),
)
