"""Validation, choice of implementation and gradients of the FP8 matmuls.

Shapes: M rows, D hidden, F inner, E experts, P rows in expert order, T = ceil(D / 128) tiles.
Source: DeepSeek-V3 (arXiv:2412.19437), section 3.3 and figures 6 and 7.
"""

import functools
from types import ModuleType

import jax
import jax.numpy as jnp

from pallas_kernels import platform
from pallas_kernels.permute import group_starts
from pallas_kernels.quantized_matmul import gpu, reference, tpu, tpu_grouped, xla
from pallas_kernels.quantized_matmul.e4m3 import Quantized, columns_of

# Each has quantize_rows, quantize_columns, quantize_blocks and product; gpu has matmul for the last.
IMPLEMENTATIONS: dict[str, ModuleType] = {
  "reference": reference,
  "xla": xla,
  "mosaic_tpu": tpu,
  "mosaic_gpu": gpu,
}
# Each has grouped_rows and grouped_weights.
GROUPED_IMPLEMENTATIONS: dict[str, ModuleType] = {
  "reference": reference,
  "xla": xla,
  "mosaic_tpu": tpu_grouped,
  "mosaic_gpu": gpu,
}


def chosen(implementation: str | None, refused: platform.Refusals | None = None) -> str:
  """Returns the implementation that None stands for here, or the one given."""
  return platform.choose(implementation, IMPLEMENTATIONS, "xla", refused)


def module_of(
  table: dict[str, ModuleType], implementation: str | None, refused: platform.Refusals | None = None
) -> ModuleType:
  """Returns the module of the implementation named, or of the platform's own."""
  return table[chosen(implementation, refused)]


def check_operand(name: str, array, rank: int) -> None:
  """Raises ValueError unless the array is floating point, of a rank, and not empty."""
  if array.ndim != rank or 0 in array.shape:
    raise ValueError(f"{name} must have {rank} dimensions, none of them 0, got {array.shape}")
  if not jnp.issubdtype(array.dtype, jnp.floating):
    raise ValueError(f"{name} must be floating point, got {array.dtype}")


def quantize_rows(
  x_MD, implementation: str | None = None, power_of_two_scales: bool = False
) -> Quantized:
  """Quantises activations by tiles of 1 x 128.

  Args:
    x_MD: any floating point; the last tile of a row may be partial.
    implementation: a key of `IMPLEMENTATIONS`; None picks by platform.
    power_of_two_scales: round scales up to powers of two (UE8M0).

  Returns:
    codes [M, D], scale [T, M]; x[m, d] is about codes[m, d] * scale[d // 128, m]. A tile with an
    infinity or NaN has scale NaN, one of zeros 1.

  Raises:
    ValueError: for an x that is no floating point matrix, or an unknown implementation.
  """
  check_operand("x_MD", x_MD, 2)
  return module_of(IMPLEMENTATIONS, implementation).quantize_rows(x_MD, power_of_two_scales)


def quantize_columns(
  x_MD,
  implementation: str | None = None,
  power_of_two_scales: bool = False,
  transposed: bool = False,
) -> Quantized:
  """Quantises activations by tiles of 128 x 1, as the gradient of weights needs them.

  Like `quantize_rows` of x^T, except for the codes' layout.

  Returns:
    codes [M, D], or [D, M] if `transposed`; scale [ceil(M / 128), D].
  """
  check_operand("x_MD", x_MD, 2)
  module = module_of(IMPLEMENTATIONS, implementation)
  return module.quantize_columns(x_MD, power_of_two_scales, transposed)


def quantize_blocks(
  w_DF, implementation: str | None = None, power_of_two_scales: bool = False
) -> Quantized:
  """Quantises weights by blocks of 128 x 128; arguments as in `quantize_rows`.

  Returns:
    codes [D, F], scale [ceil(D / 128), ceil(F / 128)].
  """
  check_operand("w_DF", w_DF, 2)
  return module_of(IMPLEMENTATIONS, implementation).quantize_blocks(w_DF, power_of_two_scales)


def quantized_matmul(
  x_MD, w_DF, implementation: str | None = None, power_of_two_scales: bool = False
):
  """Multiplies in FP8 by DeepSeek-V3's recipe.

  Both operands become E4M3: x by tiles of 1 x 128, w by blocks of 128 x 128. Each 128-wide
  partial product is scaled and added in float32. Gradients likewise: dx from tiles 1 x 128 of
  dy and the blocks of w, dw from tiles 128 x 1 of x and of dy. Quantisation itself has gradient
  one (straight through). Deviation: the paper keeps x's codes for dw and quantises those again;
  here x itself is.

  Args:
    x_MD, w_DF: any floating point.
    implementation: a key of `IMPLEMENTATIONS`; None picks by platform.
    power_of_two_scales: round scales up to powers of two (UE8M0).

  Returns:
    [M, F] in x's dtype. Differentiable; an infinity or NaN makes NaN of what it touches: a row
    of the result if it is in x, 128 columns if it is in w.

  Raises:
    ValueError: for shapes or dtypes that do not fit, or an unknown implementation.
  """
  check_operand("x_MD", x_MD, 2)
  check_operand("w_DF", w_DF, 2)
  if x_MD.shape[1] != w_DF.shape[0]:
    raise ValueError(
      f"x_MD and w_DF must agree on D, got {x_MD.shape[1]} in {x_MD.shape} and "
      f"{w_DF.shape[0]} in {w_DF.shape}"
    )
  module = module_of(IMPLEMENTATIONS, implementation)
  x_MD, w_DF = jnp.asarray(x_MD), jnp.asarray(w_DF)
  if module is gpu:
    return gpu.matmul(power_of_two_scales, x_MD, w_DF)
  return _matmul(module, power_of_two_scales, x_MD, w_DF)


def _transposed(blocks: Quantized) -> Quantized:
  return Quantized(blocks.codes.T, blocks.scale.T)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _matmul(module, power_of_two, x_MD, w_DF):
  x = module.quantize_rows(x_MD, power_of_two)
  w = module.quantize_blocks(w_DF, power_of_two)
  return module.product(x, columns_of(w), x_MD.dtype, power_of_two)


def _matmul_bwd(module, power_of_two, saved, dy_MF):
  x_MD, w_DF = saved
  dy = module.quantize_rows(dy_MF, power_of_two)
  w = module.quantize_blocks(w_DF, power_of_two)
  dx_MD = module.product(dy, columns_of(_transposed(w)), x_MD.dtype, power_of_two)
  x = module.quantize_columns(x_MD, power_of_two, transposed=True)
  dy = module.quantize_columns(dy_MF, power_of_two)
  return dx_MD, module.product(x, dy, w_DF.dtype, power_of_two)


_matmul.defvjp(lambda *args: (_matmul(*args), args[2:]), _matmul_bwd)


def quantized_grouped_matmul(
  x_PD,
  w_EDF,
  group_sizes_E,
  implementation: str | None = None,
  power_of_two_scales: bool = False,
  group_starts_E=None,
):
  """Multiplies each row by its expert's matrix in FP8: `quantized_matmul` of every group.

  For the weights' gradient, tiles of 128 rows start at each group's first row.

  Args:
    x_PD: rows in expert order, any floating point.
    w_EDF: any floating point; quantised by blocks of 128 x 128 of each expert.
    group_sizes_E: integers, zeros allowed, summing to at most P.
    implementation: a key of `GROUPED_IMPLEMENTATIONS`; None picks by platform.
    power_of_two_scales: round scales up to powers of two (UE8M0).
    group_starts_E: int32, each group's first row, ascending; None: the groups lie one after the
      other. A device that holds only some of the groups gives the starts of its own.

  Returns:
    [P, F] in x's dtype, zeros in rows outside all groups. Differentiable in x and w.

  Raises:
    ValueError: for shapes or dtypes that do not fit, or an unknown implementation.
  """
  check_operand("x_PD", x_PD, 2)
  check_operand("w_EDF", w_EDF, 3)
  E, D, _ = w_EDF.shape
  if x_PD.shape[1] != D:
    raise ValueError(
      f"x_PD and w_EDF must agree on D, got {x_PD.shape[1]} in {x_PD.shape} and {D} in "
      f"{w_EDF.shape}"
    )
  if group_sizes_E.shape != (E,) or not jnp.issubdtype(group_sizes_E.dtype, jnp.integer):
    raise ValueError(
      f"group_sizes_E must be integers of shape {(E,)}, got {group_sizes_E.dtype} of shape "
      f"{group_sizes_E.shape}"
    )
  module = module_of(GROUPED_IMPLEMENTATIONS, implementation)
  x_PD, w_EDF, sizes_E = map(jnp.asarray, (x_PD, w_EDF, group_sizes_E))
  starts_E = group_starts(sizes_E) if group_starts_E is None else jnp.asarray(group_starts_E)
  return _grouped_matmul(module, power_of_two_scales, x_PD, w_EDF, sizes_E, starts_E)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _grouped_matmul(module, power_of_two, x_PD, w_EDF, sizes_E, starts_E):
  return module.grouped_rows(x_PD, w_EDF, sizes_E, starts_E, power_of_two, x_PD.dtype)


def _grouped_matmul_bwd(module, power_of_two, saved, dy_PF):
  x_PD, w_EDF, *plan = saved
  # The blocks of w^T are those of w, transposed.
  dx_PD = module.grouped_rows(dy_PF, w_EDF, *plan, power_of_two, x_PD.dtype, transposed=True)
  dw_EDF = module.grouped_weights(x_PD, dy_PF, *plan, power_of_two, w_EDF.dtype)
  return dx_PD, dw_EDF, None, None


_grouped_matmul.defvjp(lambda *args: (_grouped_matmul(*args), args[2:]), _grouped_matmul_bwd)
