"""Validation and choice of implementation for grouped matmuls.

Groups of rows lie one after the other, each starting at a multiple of `alignment`, which is 1 where
rows are dense. `mosaic_tpu` needs groups aligned to its tiles (`row_alignment` says to what) and
moves the rows of other groups, at the cost of two more copies.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels import platform
from pallas_kernels.grouped_matmul import cpu, gpu, reference, tpu
from pallas_kernels.grouped_matmul.tpu_tiles import tile_rows
from pallas_kernels.permute import (
  combine,
  expert_order,
  group_starts,
  in_a_group,
  num_rows,
  permute,
  weights_of_rows,
)
from pallas_kernels.permute.alignment import AlignedRows
from pallas_kernels.routing import Routed
from pallas_kernels.varying import vary_alike


def _dense_sizes(sizes_E, starts_E, P: int):
  """Returns sizes without gaps: rows outside all groups join the group before, or the first."""
  starts_E = starts_E.at[0].set(0)
  return jnp.diff(starts_E, append=jnp.full(1, P, starts_E.dtype)).astype(sizes_E.dtype)


def _only_own(a, sizes_E, starts_E):
  """Zeros the rows outside all groups, which `ragged_dot` counts to the group before them."""
  own_P = in_a_group(a.shape[0], sizes_E, starts_E)
  return jnp.where(own_P.reshape(-1, *[1] * (a.ndim - 1)), a, 0)


def ragged_dot(x_PK, w_EKN, sizes_E, starts_E):
  """XLA's own grouped matmul. On CPU and GPU it multiplies every row with every expert."""
  x_PK = _only_own(x_PK, sizes_E, starts_E)
  return jax.lax.ragged_dot(x_PK, w_EKN, _dense_sizes(sizes_E, starts_E, x_PK.shape[0]))


def ragged_swiglu(x_PD, weight_P, w_gate_EDF, w_up_EDF, w_down_EFD, sizes_E, starts_E):
  """The SwiGLU of three `jax.lax.ragged_dot`s."""
  x_PD = _only_own(x_PD, sizes_E, starts_E)
  weight_P = _only_own(weight_P, sizes_E, starts_E)
  sizes_E = _dense_sizes(sizes_E, starts_E, x_PD.shape[0])
  gate_PF = jax.lax.ragged_dot(x_PD, w_gate_EDF, sizes_E)
  up_PF = jax.lax.ragged_dot(x_PD, w_up_EDF, sizes_E)
  inner_PF = jax.nn.silu(gate_PF) * up_PF * weight_P[:, None]
  return jax.lax.ragged_dot(inner_PF.astype(x_PD.dtype), w_down_EFD, sizes_E)


def _check_operands(expected: dict[str, tuple], x, group_sizes_E) -> None:
  for name, (array, shape) in expected.items():
    if array.shape != shape:
      raise ValueError(f"{name} must have shape {shape}, got {array.shape}")
    if name.startswith("w_") and array.dtype != x.dtype:
      raise ValueError(f"{name} must have x's dtype ({x.dtype}), got {array.dtype}")
  if not jnp.issubdtype(group_sizes_E.dtype, jnp.integer):
    raise ValueError(f"group_sizes_E must be integers, got {group_sizes_E.dtype}")


def refusals(dtype, D: int, F: int, rows_per_group: float = 0) -> platform.Refusals:
  """Returns why compiled kernels do not take an expert layer; see `platform.Refusals`.

  Args:
    dtype: of rows and weights.
    D, F: hidden and inner size.
    rows_per_group: on average; it decides the TPU's tile.
  """
  return {
    "mosaic_tpu": lambda: tpu.refused(dtype, D, F, tile_rows(rows_per_group)),
    "mosaic_gpu": lambda: gpu.refused(dtype, D, F),
  }


def _without_kernels() -> str:
  return "blocked" if platform.backend() == "cpu" else "ragged_dot"


def _check_tile(implementation: str, tile: int | None) -> None:
  choices = (None, *TILES.get(implementation, ()))
  if tile not in choices:
    raise ValueError(f"tile of {implementation} must be one of {choices}, got {tile}")


def chosen(implementation: str | None, refused: platform.Refusals | None = None) -> str:
  """Returns the implementation of the SwiGLU that None stands for here, or the one given.

  `refused` is `refusals` of the layer.
  """
  return platform.choose(implementation, IMPLEMENTATIONS, _without_kernels(), refused)


def row_alignment(P: int, E: int, implementation: str | None = None) -> int:
  """Returns what the starts of E groups of P rows in all should be multiples of.

  Rows laid out so need not be moved again for the implementation's tiles.
  """
  if chosen(implementation) == "mosaic_tpu":
    return tile_rows(P / E)
  return 1


def _tile(P: int, E: int, alignment: int, tile: int | None = None) -> int:
  """Returns the tile asked for, or the groups' alignment if the kernel has such a tile."""
  least = tile_rows(0)
  return tile or (alignment if alignment % least == 0 else tile_rows(P / E))


def _mosaic_matmul(x_PK, w_EKN, sizes_E, starts_E, alignment: int):
  P, E = x_PK.shape[0], sizes_E.shape[0]
  tile = _tile(P, E, alignment)
  x_PK, w_EKN = vary_alike(x_PK, w_EKN)
  aligned = AlignedRows(P, sizes_E, starts_E, alignment, tile)
  y_PN = tpu.grouped_matmul(aligned.rows(x_PK), w_EKN, sizes_E, aligned.starts_E, tile)
  return aligned.back(y_PN)


def _mosaic_swiglu(x_PD, weight_P, weights, sizes_E, starts_E, alignment: int, tile: int | None):
  P, E = weight_P.shape[0], sizes_E.shape[0]
  tile = _tile(P, E, alignment, tile)
  x_PD, weight_P, *weights = vary_alike(x_PD, weight_P, *weights)
  aligned = AlignedRows(P, sizes_E, starts_E, alignment, tile)
  rows_AD, weight_A = aligned.rows(x_PD), aligned.numbers(weight_P)
  y_AD = tpu.grouped_swiglu(rows_AD, weight_A, tuple(weights), sizes_E, aligned.starts_E, tile)
  return aligned.back(y_AD)


IMPLEMENTATIONS: dict[str, Callable | None] = {
  "reference": reference.grouped_swiglu,
  "ragged_dot": ragged_swiglu,
  "blocked": None,  # these two have arguments of their own
  "mosaic_tpu": None,
  "mosaic_gpu": gpu.grouped_swiglu,
}
# How many rows an implementation may take at once. It chooses among them unless it is told.
TILES: dict[str, tuple[int, ...]] = {"mosaic_tpu": (128, 256, 512), "blocked": (64, 128, 256, 512)}
MATMULS = ("reference", "ragged_dot", "mosaic_tpu", "mosaic_gpu")


def grouped_matmul(
  x_PK,
  w_EKN,
  group_sizes_E,
  group_starts_E=None,
  implementation: str | None = None,
  alignment: int = 1,
):
  """Multiplies each row with its group's matrix.

  Args:
    x_PK: rows in group order.
    w_EKN: a matrix a group, in x's dtype.
    group_sizes_E: int32, zeros allowed.
    group_starts_E: int32, each group's first row, ascending; None: the groups lie one after the
      other, each starting at a multiple of `alignment`. A device that holds only some of the
      groups gives the starts of its own.
    implementation: one of `MATMULS`; None: as in `grouped_swiglu`, but `reference` on CPU.
    alignment: what divides every start.

  Returns:
    [P, N] in x's dtype; rows outside all groups are undefined. Differentiable in x and w.

  Raises:
    ValueError: for shapes or dtypes that do not fit together, or an unknown implementation.
  """
  E, _, N = w_EKN.shape
  expected = {
    "w_EKN": (w_EKN, (E, x_PK.shape[1], N)),
    "group_sizes_E": (group_sizes_E, (E,)),
  }
  _check_operands(expected, x_PK, group_sizes_E)
  refused = refusals(x_PK.dtype, x_PK.shape[1], N, x_PK.shape[0] / E)
  otherwise = "reference" if platform.backend() == "cpu" else "ragged_dot"
  implementation = platform.choose(implementation, MATMULS, otherwise, refused)
  if group_starts_E is None:
    group_starts_E = group_starts(group_sizes_E, alignment)
  operands = (x_PK, w_EKN, group_sizes_E, group_starts_E)
  x_PK, w_EKN, group_sizes_E, group_starts_E = map(jnp.asarray, operands)
  if implementation == "mosaic_tpu":
    return _mosaic_matmul(x_PK, w_EKN, group_sizes_E, group_starts_E, alignment)
  functions: dict[str, Callable] = {
    "reference": reference.grouped_matmul,
    "ragged_dot": ragged_dot,
    "mosaic_gpu": gpu.grouped_matmul_vjp,
  }
  return functions[implementation](x_PK, w_EKN, group_sizes_E, group_starts_E)


def grouped_swiglu(
  x_PD,
  weight_P,
  w_gate_EDF,
  w_up_EDF,
  w_down_EFD,
  group_sizes_E,
  implementation: str | None = None,
  order=None,
  alignment: int = 1,
  group_starts_E=None,
  tile: int | None = None,
):
  """Applies each expert's SwiGLU to its own rows, weighted: w * down(silu(gate x) * up x).

  Args:
    x_PD: rows in expert order: the first group_sizes_E[0] belong to expert 0, and so on, the rows
      of each expert starting at a multiple of `alignment`; with `order`, tokens x_MD.
    weight_P: float32 factor of each row's output.
    w_gate_EDF, w_up_EDF, w_down_EFD: the experts' weights, in x's dtype.
    group_sizes_E: int32, zeros allowed.
    implementation: a key of `IMPLEMENTATIONS`; None: the compiled kernel on the chips listed in
      `pallas_kernels.platform` if it takes the sizes and dtype, else `blocked` on CPU and
      `ragged_dot` elsewhere.
    order: (pair_P, row_MK) of `permute.expert_order`, if x has tokens whose rows are still to be
      copied into expert order; an implementation may do so as it reads them, without storing the
      rows.
    alignment: what divides every expert's first row.
    group_starts_E: as in `grouped_matmul`.
    tile: how many rows are taken at once, one of the implementation's `TILES`; None: chosen by the
      sizes.

  Returns:
    [P, D] in x's dtype; rows outside all groups are undefined. Differentiable in everything but
    the sizes.

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
  _check_operands(expected, x_PD, group_sizes_E)
  implementation = chosen(implementation, refusals(x_PD.dtype, D, F, P / E))
  _check_tile(implementation, tile)
  # The loops index these by traced numbers, which NumPy arrays do not allow.
  x_PD, order, weight_P, *weights, sizes_E = jax.tree.map(
    jnp.asarray, (x_PD, order, weight_P, w_gate_EDF, w_up_EDF, w_down_EFD, group_sizes_E)
  )
  if group_starts_E is None:
    group_starts_E = group_starts(sizes_E, alignment)
  starts_E = jnp.asarray(group_starts_E)
  if implementation == "blocked":
    return cpu.grouped_swiglu(x_PD, weight_P, *weights, sizes_E, starts_E, order, tile or cpu.ROWS)
  rows_PD = x_PD if order is None else permute(x_PD, order[0], order[1], "reference")
  if implementation == "mosaic_tpu":
    return _mosaic_swiglu(rows_PD, weight_P, weights, sizes_E, starts_E, alignment, tile)
  function = IMPLEMENTATIONS[implementation]
  assert function is not None
  return function(rows_PD, weight_P, *weights, sizes_E, starts_E)


def _mosaic_gpu_routed(x_MD, routed: Routed, experts):
  with jax.named_scope("dispatch"):
    pair_P, row_MK = expert_order(routed.expert_MK, routed.rank_MK, routed.counts_E)
    weight_P = weights_of_rows(routed.gate_MK, row_MK, row_MK.size)
    starts_E = group_starts(routed.counts_E)
  x_PD = permute(x_MD, pair_P, row_MK, "mosaic_gpu")
  with jax.named_scope("experts"):
    y_PD = gpu.grouped_swiglu(x_PD, weight_P, *experts, routed.counts_E, starts_E)
  return combine(y_PD, pair_P, row_MK, "mosaic_gpu")


def routed_swiglu(
  x_MD, routed: Routed, experts, implementation: str | None = None, tile: int | None = None
):
  """Copies tokens to their experts' rows, applies each expert's SwiGLU, and sums each token's rows.

  The fused form for one device that holds all the experts.

  Args:
    x_MD: tokens.
    routed: of `routing.route`: experts, gates, counts and ranks.
    experts: (w_gate_EDF, w_up_EDF, w_down_EFD) in x's dtype.
    implementation, tile: as in `grouped_swiglu`.

  Returns:
    [M, D] in x's dtype. Differentiable in x, gates and weights.
  """
  expert_MK, gate_MK, counts_E, rank_MK = routed
  w_gate_EDF, w_up_EDF, w_down_EFD = experts
  P, (E, D, F) = expert_MK.size, w_gate_EDF.shape
  implementation = chosen(implementation, refusals(x_MD.dtype, D, F, P / E))
  _check_tile(implementation, tile)
  if implementation == "mosaic_tpu":
    tile = tile or tile_rows(P / E)
    x_MD, gate_MK, *weights = vary_alike(x_MD, gate_MK, *experts)
    with jax.named_scope("dispatch"):
      starts_E = group_starts(counts_E, tile)
      row_MK = starts_E[expert_MK] + rank_MK
    rows, weights = num_rows(P, E, tile), tuple(weights)
    with jax.named_scope("experts"):
      return tpu.routed_swiglu(x_MD, gate_MK, weights, row_MK, counts_E, starts_E, rows, tile)
  if implementation == "mosaic_gpu":
    return _mosaic_gpu_routed(x_MD, routed, experts)
  with jax.named_scope("dispatch"):
    pair_P, row_MK = expert_order(expert_MK, rank_MK, counts_E)
    weight_P = gate_MK.reshape(-1)[pair_P]
  with jax.named_scope("experts"):
    y_PD = grouped_swiglu(
      x_MD,
      weight_P,
      w_gate_EDF,
      w_up_EDF,
      w_down_EFD,
      counts_E,
      implementation=implementation,
      order=(pair_P, row_MK),
      tile=tile,
    )
  with jax.named_scope("combine"):
    return combine(y_PD, pair_P, row_MK, "reference")
