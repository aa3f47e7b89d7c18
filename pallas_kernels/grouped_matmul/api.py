"""Validation and choice of implementation for grouped matmuls.

Groups of rows lie one after the other, each from a multiple of `alignment`: 1 where rows are
dense. `mosaic_tpu` wants groups aligned to its tiles, which `row_alignment` tells; it moves rows
of groups that are not, at the cost of two more copies.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels import mosaic_gpu
from pallas_kernels.grouped_matmul import cpu, gpu, reference, tpu
from pallas_kernels.grouped_matmul.tpu_tiles import tile_rows
from pallas_kernels.permute import combine, expert_order, group_starts, num_rows, permute
from pallas_kernels.permute import gpu as permute_gpu
from pallas_kernels.routing import Routed
from pallas_kernels.varying import vary_alike


def _dense_sizes(sizes_E, starts_E, P: int):
  """Sizes with which the groups leave no gap: nobody's rows are the group's before, or the first's."""
  starts_E = starts_E.at[0].set(0)
  return jnp.diff(starts_E, append=jnp.full(1, P, starts_E.dtype)).astype(sizes_E.dtype)


def _only_own(a, sizes_E, starts_E):
  """Zeros the rows of no group: XLA's grouped matmul takes them for the group's before."""
  row_P = jnp.arange(a.shape[0])
  group_P = jnp.searchsorted(starts_E, row_P, side="right") - 1
  own_P = (group_P >= 0) & (row_P < (starts_E + sizes_E)[group_P])
  return jnp.where(own_P.reshape(-1, *[1] * (a.ndim - 1)), a, 0)


def ragged_dot(x_PK, w_EKN, sizes_E, starts_E):
  """XLA's own grouped matmul: good on TPU; on CPU and GPU every expert sees every row."""
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


def _choose(implementation: str | None, choices, on_cpu: str, refused: str | None) -> str:
  if implementation is None:
    on_cpu = on_cpu if jax.default_backend() == "cpu" else "ragged_dot"
    return mosaic_gpu.default(refused, on_cpu)
  if implementation not in choices:
    raise ValueError(f"implementation must be one of {', '.join(choices)}, got {implementation!r}")
  return implementation


def _check_tile(implementation: str, tile: int | None) -> None:
  choices = (None, *TILES.get(implementation, ()))
  if tile not in choices:
    raise ValueError(f"tile of {implementation} must be one of {choices}, got {tile}")


def chosen(implementation: str | None, refused: str | None = None) -> str:
  """Returns the implementation of the SwiGLU that None stands for here, or the one given.

  `refused` is what `gpu.refused` says of the layer.
  """
  return _choose(implementation, IMPLEMENTATIONS, "blocked", refused)


def row_alignment(P: int, E: int, implementation: str | None = None) -> int:
  """Returns what E groups of P rows in all should be aligned to, for the implementation's sake."""
  if chosen(implementation) == "mosaic_tpu":
    return tile_rows(P / E)
  return 1


class _Aligned:
  """Rows of groups moved to where whole tiles hold them, and back."""

  def __init__(self, P: int, sizes_E, starts_E, alignment: int, tile: int):
    E = sizes_E.shape[0]
    if alignment % tile == 0 and P % tile == 0:
      self.moved, self.starts_E = False, starts_E
      return
    self.moved, self.starts_E = True, group_starts(sizes_E, tile)
    row_P = jnp.arange(P, dtype=jnp.int32)
    group_P = jnp.clip(jnp.searchsorted(starts_E, row_P, side="right") - 1, 0, E - 1)
    within_P = row_P - starts_E[group_P]
    rows = num_rows(P, E, tile)
    own_P = (within_P >= 0) & (within_P < sizes_E[group_P])
    place_P = jnp.where(own_P, self.starts_E[group_P] + within_P, rows)
    self.own_P1, self.place_P1 = own_P[:, None], place_P[:, None]
    self.source = jnp.full(rows, P, jnp.int32).at[place_P].set(row_P, mode="drop")

  def rows(self, x_PN):
    if not self.moved:
      return x_PN
    return permute(jnp.where(self.own_P1, x_PN, 0), self.source, self.place_P1)

  def numbers(self, weight_P):
    return weight_P.at[self.source].get(mode="fill", fill_value=0) if self.moved else weight_P

  def back(self, y_PN):
    if not self.moved:
      return y_PN
    return jnp.where(self.own_P1, combine(y_PN, self.source, self.place_P1), 0)


def _tile(P: int, E: int, alignment: int, tile: int | None = None) -> int:
  """Returns the tile asked for, or the aligned groups' own where that is one a kernel takes."""
  least = tile_rows(0)
  return tile or (alignment if alignment % least == 0 else tile_rows(P / E))


def _mosaic_matmul(x_PK, w_EKN, sizes_E, starts_E, alignment: int):
  P, E = x_PK.shape[0], sizes_E.shape[0]
  tile = _tile(P, E, alignment)
  x_PK, w_EKN = vary_alike(x_PK, w_EKN)
  aligned = _Aligned(P, sizes_E, starts_E, alignment, tile)
  y_PN = tpu.grouped_matmul(aligned.rows(x_PK), w_EKN, sizes_E, aligned.starts_E, tile)
  return aligned.back(y_PN)


def _mosaic_swiglu(x_PD, weight_P, *args, alignment: int, tile: int | None):
  *weights, sizes_E, starts_E = args
  P, E = weight_P.shape[0], sizes_E.shape[0]
  tile = _tile(P, E, alignment, tile)
  x_PD, weight_P, *weights = vary_alike(x_PD, weight_P, *weights)
  aligned = _Aligned(P, sizes_E, starts_E, alignment, tile)
  y_PD = tpu.grouped_swiglu(
    *(aligned.rows(x_PD), aligned.numbers(weight_P), tuple(weights)),
    *(sizes_E, aligned.starts_E, tile),
  )
  return aligned.back(y_PD)


IMPLEMENTATIONS: dict[str, Callable | None] = {
  "reference": reference.grouped_swiglu,
  "ragged_dot": ragged_swiglu,
  "blocked": None,  # these two take more
  "mosaic_tpu": None,
  "mosaic_gpu": gpu.grouped_swiglu,
}
# Rows that an implementation can take at once; it chooses among these itself unless told.
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
    group_starts_E: int32, each group's first row, ascending; None: one after the other, each
      from a multiple of `alignment`. A device that holds some groups of many gives theirs.
    implementation: one of `MATMULS`; None: as in `grouped_swiglu`, but `reference` on CPU.
    alignment: what divides every start.

  Returns:
    [P, N] in x's dtype; rows of no group hold anything. Differentiable in x and w.

  Raises:
    ValueError: for shapes or dtypes that do not fit together, or an unknown implementation.
  """
  E, _, N = w_EKN.shape
  expected = {
    "w_EKN": (w_EKN, (E, x_PK.shape[1], N)),
    "group_sizes_E": (group_sizes_E, (E,)),
  }
  _check_operands(expected, x_PK, group_sizes_E)
  refused = gpu.refused(x_PK.dtype, x_PK.shape[1], N)
  implementation = _choose(implementation, MATMULS, "reference", refused)
  if group_starts_E is None:
    group_starts_E = group_starts(group_sizes_E, alignment)
  operands = (x_PK, w_EKN, group_sizes_E, group_starts_E)
  x_PK, w_EKN, group_sizes_E, group_starts_E = map(jnp.asarray, operands)
  if implementation == "mosaic_tpu":
    return _mosaic_matmul(x_PK, w_EKN, group_sizes_E, group_starts_E, alignment)
  ways: dict[str, Callable] = {
    "reference": reference.grouped_matmul,
    "ragged_dot": ragged_dot,
    "mosaic_gpu": gpu.grouped_matmul_vjp,
  }
  return ways[implementation](x_PK, w_EKN, group_sizes_E, group_starts_E)


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
    x_PD: rows in expert order: the first group_sizes_E[0] belong to expert 0, and so on, each
      expert's from a multiple of `alignment`; with `order`, tokens x_MD.
    weight_P: float32 factor of each row's output.
    w_gate_EDF, w_up_EDF, w_down_EFD: the experts' weights, in x's dtype.
    group_sizes_E: int32, zeros allowed.
    implementation: a key of `IMPLEMENTATIONS`; None: `blocked` on CPU, `mosaic_tpu` on TPU,
      `mosaic_gpu` on Hopper if it takes the sizes and dtype, else `ragged_dot`.
    order: (pair_P, row_MK) of `permute.expert_order`, when the rows are still to be taken
      from tokens; an implementation may do that on the way and never store them.
    alignment: what divides every expert's first row.
    group_starts_E: as in `grouped_matmul`.
    tile: rows taken at once, of the implementation's `TILES`; None: by the sizes.

  Returns:
    [P, D] in x's dtype; rows of no expert hold anything. Differentiable in everything but the
    sizes.

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
  implementation = chosen(implementation, gpu.refused(x_PD.dtype, D, F))
  _check_tile(implementation, tile)
  # Loops index them by traced numbers, which NumPy's own arrays refuse.
  x_PD, order, weight_P, *weights, sizes_E = jax.tree.map(
    jnp.asarray, (x_PD, order, weight_P, w_gate_EDF, w_up_EDF, w_down_EFD, group_sizes_E)
  )
  if group_starts_E is None:
    group_starts_E = group_starts(sizes_E, alignment)
  starts_E = jnp.asarray(group_starts_E)
  if implementation == "blocked":
    return cpu.grouped_swiglu(x_PD, weight_P, *weights, sizes_E, starts_E, order, tile or cpu.ROWS)
  rows_PD = x_PD if order is None else permute(x_PD, *order)
  if implementation == "mosaic_tpu":
    operands = (rows_PD, weight_P, *weights, sizes_E, starts_E)
    return _mosaic_swiglu(*operands, alignment=alignment, tile=tile)
  way = IMPLEMENTATIONS[implementation]
  assert way is not None
  return way(rows_PD, weight_P, *weights, sizes_E, starts_E)


def _mosaic_gpu_routed(x_MD, routed: Routed, experts):
  expert_MK, gate_MK, counts_E, rank_MK = routed
  starts_E = group_starts(counts_E)
  row_MK = starts_E[expert_MK] + rank_MK
  weight_P = tpu.weights_of_rows(gate_MK, row_MK, row_MK.size)
  x_PD = permute_gpu.to_rows(x_MD, row_MK, row_MK.size)
  y_PD = gpu.grouped_swiglu(x_PD, weight_P, *experts, counts_E, starts_E)
  return permute_gpu.from_rows(y_PD, row_MK)


def routed_swiglu(
  x_MD, routed: Routed, experts, implementation: str | None = None, tile: int | None = None
):
  """Sends tokens to their experts, applies each one's SwiGLU, and sums what comes back.

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
  implementation = chosen(implementation, gpu.refused(x_MD.dtype, D, F))
  _check_tile(implementation, tile)
  if implementation == "mosaic_tpu":
    tile = tile or tile_rows(P / E)
    starts_E = group_starts(counts_E, tile)
    x_MD, gate_MK, *weights = vary_alike(x_MD, gate_MK, *experts)
    return tpu.routed_swiglu(
      *(x_MD, gate_MK, tuple(weights), starts_E[expert_MK] + rank_MK),
      *(counts_E, starts_E, num_rows(P, E, tile), tile),
    )
  if implementation == "mosaic_gpu":
    return _mosaic_gpu_routed(x_MD, routed, experts)
  with jax.named_scope("dispatch"):
    order = expert_order(expert_MK, rank_MK, counts_E)
    weight_P = gate_MK.reshape(-1)[order[0]]
  with jax.named_scope("experts"):
    y_PD = grouped_swiglu(
      *(x_MD, weight_P, w_gate_EDF, w_up_EDF, w_down_EFD, counts_E),
      *(implementation, order),
      tile=tile,
    )
  with jax.named_scope("combine"):
    return combine(y_PD, *order)
