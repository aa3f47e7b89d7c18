"""FP8 experts for TPU (Mosaic): of rows (`grouped_swiglu`), or of tokens (`routed_swiglu`).

Each group of rows starts at a multiple of a grid step's rows. A step holds whole contractions of m
rows of one expert and n of its columns. The activation, and the codes for the next product, are
computed in the same step. From tokens to tokens, each token is quantised once and copied to its
rows as words of four codes, which the next kernel unpacks on chip.

Shapes: M tokens, K choices a token (or a contraction, beside N columns), A rows of whole steps,
D hidden, F inner, E experts, S steps of m rows, T = K / 128 tiles.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.grouped_matmul import tpu_tiles as tiles
from pallas_kernels.permute import tpu as permute
from pallas_kernels.permute import weights_of_rows
from pallas_kernels.quantized_matmul import tpu, tpu_grouped, tpu_words
from pallas_kernels.quantized_matmul.e4m3 import CODE, TILE, Quantized, encode, f32

u32 = jnp.uint32
MOST_WIDTH = 2**14  # of F: whole contractions of a step fit VMEM
FINISH = tiles.Product(128, 2 * TILE)  # rows and columns that are finished at once


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["sizes_E", "starts_E"],
  meta_fields=["m", "P", "A"],
)
@dataclasses.dataclass(frozen=True)
class Plan:
  """Where groups of rows lie: in order, each starting at a multiple of m."""

  sizes_E: Any  # int32
  starts_E: Any  # int32
  m: int
  P: int  # rows of all groups, for the costs
  A: int  # rows of the layout, a multiple of m

  def steps(self):
    """Returns the expert of each step, how many of its rows are the expert's, and their number."""
    steps = tiles.schedule(self.sizes_E, self.starts_E, self.A, self.m)
    return steps.expert_T, steps.end_T - steps.tile_T * self.m, steps.num_steps


def refused(dtype, D: int, F: int) -> str | None:
  """Returns the rule that an expert layer breaks, gradients and permutation included, or None."""
  if rule := permute.refused(dtype, D):
    return rule
  if F > MOST_WIDTH:
    return f"F must be at most {MOST_WIDTH}, got {F}"
  return None


def _fit(N: int, m: int, column_bytes: int, block_bytes: int, fixed: int, multiple: int):
  """Returns (n, columns multiplied at once) with the least padding, then the fewest steps."""
  half = pl.cdiv(N, 2)  # two cores of a chip share the columns

  def at_once(n):
    sizes = [c for c in range(TILE, n + 1, TILE) if n % c == 0 and m * c <= tpu.STEP_SUMS]
    return max(sizes)

  def fits(n):
    partial = m * at_once(n) * 4
    return fixed + n * column_bytes + m * n * block_bytes + partial <= tiles.VMEM_BYTES

  widths = range(multiple, pl.cdiv(half, multiple) * multiple + 1, multiple)
  n = min(filter(fits, widths), key=lambda n: (pl.cdiv(half, n) * n, -n), default=None)
  if n is None:
    raise ValueError(
      f"{m} rows and {multiple} columns of {N} must fit VMEM ({tiles.VMEM_BYTES} bytes)"
    )
  return n, at_once(n)


def _multiply(lhs_refs, rhs_refs, sum_ref, at_once: int, power_of_two: bool) -> None:
  """Sets sum_ref [m, n] to the product of codes [m, K] and [K, n], so many columns at once."""
  (lhs_ref, lhs_scale_ref), (rhs_ref, rhs_scale_ref) = lhs_refs, rhs_refs
  whole, rest = divmod(rhs_scale_ref.shape[0], tpu.LOOP_TILES)
  native = tpu.multiplies_e4m3()
  sum_ref[...] = jnp.zeros_like(sum_ref)

  def columns(own):
    def add(first, count: int):
      scales = lhs_scale_ref[pl.ds(first, count)], rhs_scale_ref[pl.ds(first, count), own]
      refs = lhs_ref, rhs_ref.at[:, own], sum_ref.at[:, own]
      tpu.add_products(refs, scales, first, count, native, power_of_two)

    def loop(t):
      add(pl.multiple_of(t * tpu.LOOP_TILES, tpu.LOOP_TILES), tpu.LOOP_TILES)

    if whole:
      pl.loop(0, whole)(loop)
    if rest:
      add(whole * tpu.LOOP_TILES, rest)

  tiles.blocks(sum_ref.shape[1], at_once, columns)


def _quantise(value_ref, codes_ref, scale_ref, power_of_two: bool) -> None:
  """Makes codes [m, n] and scales [n / 128, m] of float32 [m, n]."""
  m, n = value_ref.shape

  def rows(own):
    tile_of = lambda t: value_ref[own, t * TILE : (t + 1) * TILE]  # noqa: E731
    scale_mt = tpu.scales_of_tiles(tile_of, FINISH.rows, n // TILE, power_of_two)
    scale_ref[:, own] = scale_mt.T[: n // TILE]
    inverse_mt = 1 / scale_mt
    for t in range(n // TILE):
      codes_ref[own, t * TILE : (t + 1) * TILE] = encode(tile_of(t), inverse_mt[:, t : t + 1])

  tiles.blocks(m, FINISH.rows, rows)


def over_rows(
  name: str,
  body: Callable,
  plan: Plan,
  rows,
  matrices,
  outs,
  power_of_two: bool,
  extras=(),
  weight_A=None,
  sums: bool = False,
):
  """Multiplies each step's rows by its expert's matrices, in FP8, and runs `body` on products.

  Args:
    body: (each product, extras, weight_m1) -> the outputs' values, float32, and with `sums` a
      number a row and column to be summed over columns.
    rows: words uint32 [A, W], or codes [A, K] with scales [T, A]; one for each matrix, or one.
    matrices: codes [E, K, N], scales [E, T, N].
    outs: the dtype of each output [A, N]; uint32 stands for words of two bfloat16, E4M3 for codes
      with scales [N / 128, A]. Rows outside all groups are undefined.
    extras: arrays [A, N].
    weight_A: float32 or None.
    sums: whether an output [N / n, 1, A] float32 follows.
  """
  (E, K, N), T, m = matrices[0].codes.shape, matrices[0].scale.shape[1], plan.m
  in_words = [not isinstance(x, Quantized) for x in rows]
  A, (expert_S, _, steps) = plan.A, plan.steps()
  num_sums = max(len(matrices), outs.count(CODE))
  out_bytes = sum(np.dtype(d).itemsize // (2 if d == u32 else 1) for d in outs)
  row_bytes = sum(2 * 4 * x.shape[1] + K if w else 2 * K for x, w in zip(rows, in_words))
  n, at_once = _fit(
    N,
    m,
    column_bytes=2 * len(matrices) * (K + 4 * T),
    block_bytes=4 * num_sums + 2 * (out_bytes + sum(a.dtype.itemsize for a in extras)),
    fixed=m * (row_bytes + 2 * 4 * T * len(rows)),
    multiple=FINISH.columns if u32 in outs else TILE,
  )

  def kernel(_, *refs):
    left = iter(refs)
    take = lambda count: [next(left) for _ in range(count)]  # noqa: E731
    row_refs = [take(1 if words else 2) for words in in_words]
    matrix_refs = [take(2) for _ in matrices]
    extra_refs, weight_refs = take(len(extras)), take(weight_A is not None)
    out_refs = [take(2 if d == CODE else 1) for d in outs]
    dot_refs, sum_refs = take(sums), take(num_sums)
    for i, words in enumerate(in_words):
      if words:
        codes_ref, scale_ref = take(2)
        tpu_words.unpack_into(codes_ref, scale_ref, row_refs[i][0])
        row_refs[i] = [codes_ref, scale_ref]

    for i, sum_ref in enumerate(sum_refs[: len(matrices)]):
      lhs_refs = row_refs[min(i, len(rows) - 1)]
      _multiply(lhs_refs, matrix_refs[i], sum_ref, at_once, power_of_two)

    def finish(own_rows, own_columns):
      values = [ref[own_rows, own_columns] for ref in (*sum_refs[: len(matrices)], *extra_refs)]
      values += [tiles.column_of(ref[:, own_rows]) for ref in weight_refs]
      results, quantised = body(*values), iter(sum_refs)
      for dtype, refs, value in zip(outs, out_refs, results):
        if dtype == CODE:  # once all of a row is there
          next(quantised)[own_rows, own_columns] = value
        elif dtype == u32:
          first = jax.lax.div(own_columns.start, 2)
          words = permute.pack_halves(value[:, :TILE], value[:, TILE:])
          refs[0][own_rows, pl.ds(pl.multiple_of(first, TILE), TILE)] = words
        else:
          refs[0][own_rows, own_columns] = value.astype(dtype)
      if sums:
        value = tpu.inside(results[-1], 1, pl.program_id(0) * n + own_columns.start, N)
        dot_refs[0][:, own_rows] += tiles.row(jnp.sum(value, axis=1, keepdims=True))

    if sums:
      dot_refs[0][...] = jnp.zeros_like(dot_refs[0])
    tiles.each_block(m, n, finish, FINISH._replace(columns=min(n, FINISH.columns)))
    coded = (refs for refs in out_refs if len(refs) == 2)
    for (codes_ref, scale_ref), value_ref in zip(coded, sum_refs):
      _quantise(value_ref, codes_ref, scale_ref, power_of_two)

  whole_row = lambda x: pl.BlockSpec((m, x.shape[1]), lambda j, i, e: (i, 0))  # noqa: E731
  block = lambda columns: pl.BlockSpec((m, columns), lambda j, i, e: (i, j))  # noqa: E731
  operands: list[Any] = []
  in_specs: list[pl.BlockSpec] = []
  scratch = [pltpu.VMEM((m, n), f32)] * num_sums
  for x, words in zip(rows, in_words):
    operands += [x] if words else x
    if words:
      in_specs.append(whole_row(x))
      scratch += [pltpu.VMEM((m, K), CODE), pltpu.VMEM((pl.cdiv(T, TILE) * TILE, m), f32)]
    else:
      in_specs += [whole_row(x.codes), pl.BlockSpec((T, m), lambda j, i, e: (0, i))]
  for w in matrices:
    operands += w
    in_specs += [pl.BlockSpec((None, k, n), lambda j, i, e: (e[i], 0, j)) for k in (K, T)]
  operands += extras
  in_specs += [block(n)] * len(extras)
  if weight_A is not None:
    operands.append(weight_A[None])
    in_specs.append(pl.BlockSpec((1, m), lambda j, i, e: (0, i)))
  blocks = pl.cdiv(N, n)
  outputs, out_specs, varying = [], [], (expert_S, *operands)
  for dtype in outs:
    share = 2 if dtype == u32 else 1
    outputs.append(tpu.out((A, N // share), dtype, *varying))
    out_specs.append(block(n // share))
    if dtype == CODE:
      outputs.append(tpu.out((blocks, n // TILE, A), f32, *varying))
      out_specs.append(pl.BlockSpec((None, n // TILE, m), lambda j, i, e: (j, 0, i)))
  if sums:
    outputs.append(tpu.out((blocks, 1, A), f32, *varying))
    out_specs.append(pl.BlockSpec((None, 1, m), lambda j, i, e: (j, 0, i)))
  experts = tpu_grouped.assumed_experts(plan.P, E, m)
  results = iter(
    tpu.call(
      kernel,
      name,
      (blocks, steps),
      operands,
      outputs,
      in_specs,
      out_specs,
      flops=2 * len(experts) * m * blocks * n * T * TILE * len(matrices),
      scratch=scratch,
      parallel=1,
      scalars=[expert_S],
      assumed=((blocks, len(experts)), [experts]),
      vmem_bytes=tiles.VMEM_BYTES + 2**22,
    )
  )
  found = []
  for dtype in outs:
    found.append(next(results))
    if dtype == CODE:
      scale_TA = next(results).reshape(-1, A)[: N // TILE]
      found[-1] = Quantized(found[-1], scale_TA)
  return [*found, *results]


def _matrices(w_EKN, power_of_two: bool, turned: bool = False) -> Quantized:
  """Quantises experts' weights: codes [E, K, N], each column's scales [E, T, N]; or [E, N, K]."""
  codes, scale = tpu.quantize_down(w_EKN, power_of_two, blocks=True, transposed=turned)
  if turned:  # repeat a block's scale for each of its columns
    scale = jnp.repeat(scale[:, :, ::TILE].swapaxes(1, 2), TILE, axis=2)
  return Quantized(codes, scale)


def _whole(experts):
  """Pads experts' weights with zeros: D to a multiple of 512, F to one of 128."""
  pad_D, pad_F = (0, -experts[0].shape[1] % tpu_words.COLUMNS), (0, -experts[0].shape[2] % TILE)
  sides = [(pad_D, pad_F), (pad_D, pad_F), (pad_F, pad_D)]
  return [jnp.pad(w, ((0, 0), *side)) for w, side in zip(experts, sides)]


def _wide(x_MD):
  return jnp.pad(x_MD, ((0, 0), (0, -x_MD.shape[1] % tpu_words.COLUMNS)))


def _activation(dtype):
  """Returns the body of the first product, which rounds as other implementations do."""

  def body(gate, up, weight_m1):
    gate, up = _rounded(gate, dtype), _rounded(up, dtype)
    return [_rounded(jax.nn.silu(gate) * up * weight_m1, dtype), gate, up]

  return body


def _rounded(a, dtype):
  return a.astype(dtype).astype(f32)


def _swiglu(power_of_two, x, weight_A, experts, plan, dtype, out, keep: bool):
  """Multiplies quantised rows with their experts' three matrices.

  Args:
    x: the rows, as `over_rows` takes them.
    weight_A: float32 factor of each row.
    experts: the weights, as they are.
    plan: where the groups lie.
    dtype: that intermediate values are rounded to.
    out: the dtype of the result; uint32 stands for words.
    keep: whether gate and up [A, F] are returned too.

  Returns:
    The rows' outputs and a list of what is kept.
  """
  w_gate, w_up, w_down = (_matrices(w, power_of_two) for w in _whole(experts))
  outs = [CODE, *[dtype] * 2 * keep]
  inner, *kept = over_rows(
    "quantized_swiglu_in",
    _activation(dtype),
    plan,
    [x],
    [w_gate, w_up],
    outs,
    power_of_two,
    weight_A=weight_A,
  )
  body = lambda y: [_rounded(y, dtype)]  # noqa: E731
  (y,) = over_rows("quantized_swiglu_out", body, plan, [inner], [w_down], [out], power_of_two)
  return y, kept


def _swiglu_gradients(power_of_two, plain, dy, weight_A, experts, plan, kept, dtype, out):
  """Returns the gradients of rows (in `out`), of weight_A, and of the three matrices.

  Args:
    plain: the rows and their outputs' gradient, as `tpu.quantize_down` takes them.
    dy: that gradient quantised, as `over_rows` takes it.
    kept: gate and up of `_swiglu`.
    The rest is as in `_swiglu`.
  """
  gate_AF, up_AF = kept

  def through_activation(dinner, gate, up, weight_m1):
    dinner, gate, up = _rounded(dinner, dtype), gate.astype(f32), up.astype(f32)
    sigmoid = jax.nn.sigmoid(gate)
    silu = gate * sigmoid
    dact = dinner * weight_m1
    dgate = _rounded(dact * up * (sigmoid + silu * (1 - sigmoid)), dtype)
    dup = _rounded(dact * silu, dtype)
    return [dgate, dup, dgate, dup, silu * up * weight_m1, dinner * silu * up]

  w_gate, w_up, w_down = (_matrices(w, power_of_two, turned=True) for w in _whole(experts))
  dgate, dup, *columns, dweight_n1A = over_rows(
    "quantized_swiglu_out_gradient",
    through_activation,
    plan,
    [dy],
    [w_down],
    [CODE, CODE, *[dtype] * 3],
    power_of_two,
    extras=[gate_AF, up_AF],
    weight_A=weight_A,
    sums=True,
  )
  (dx,) = over_rows(
    "quantized_swiglu_in_gradient",
    lambda a, b: [_rounded(_rounded(a, dtype) + _rounded(b, dtype), dtype)],
    plan,
    [dgate, dup],
    [w_gate, w_up],
    [out],
    power_of_two,
  )
  dgate_AF, dup_AF, inner_AF = columns
  first_T = jnp.arange(0, plan.A, TILE, dtype=jnp.int32)
  rows_T = plan.steps()[1][first_T // plan.m] - first_T % plan.m

  def down(a, transposed=False):
    codes, scale = tpu.quantize_down(a[None], power_of_two, False, transposed, rows_T)
    return Quantized(codes[0], scale[0])

  def product(x, dy, w):
    dw = tpu_grouped.weights_of_steps(
      x, dy, plan.sizes_E, plan.starts_E, plan.m, plan.P, power_of_two, w.dtype
    )
    return dw[:, : w.shape[1], : w.shape[2]]

  x, dy = down(plain[0], transposed=True), down(plain[1])
  dw_gate, dw_up = (product(x, down(a), w) for a, w in zip((dgate_AF, dup_AF), experts))
  dw_down = product(down(inner_AF, transposed=True), dy, experts[2])
  return dx, jnp.sum(dweight_n1A[:, 0], axis=0), (dw_gate, dw_up, dw_down)


# Experts as a function of rows that lie in whole steps.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def grouped_swiglu(power_of_two, x_AD, weight_A, experts, plan):
  """See `experts.quantized_grouped_swiglu`; groups start at multiples of the plan's m."""
  return _grouped(power_of_two, x_AD, weight_A, experts, plan, keep=False)[0]


def _grouped(power_of_two, x_AD, weight_A, experts, plan, keep: bool):
  dtype, D = x_AD.dtype, x_AD.shape[1]
  x = tpu.quantize_rows(_wide(x_AD), power_of_two)
  y, kept = _swiglu(power_of_two, x, weight_A, experts, plan, dtype, dtype, keep)
  return y[:, :D], kept


def _grouped_fwd(power_of_two, x_AD, weight_A, experts, plan):
  y_AD, kept = _grouped(power_of_two, x_AD, weight_A, experts, plan, keep=True)
  return y_AD, (x_AD, weight_A, experts, plan, kept)


def _grouped_bwd(power_of_two, saved, dy_AD):
  x_AD, weight_A, experts, plan, kept = saved
  dtype, D = x_AD.dtype, x_AD.shape[1]
  plain = _wide(x_AD), _wide(dy_AD)
  dy = tpu.quantize_rows(plain[1], power_of_two)
  dx, dweight_A, dexperts = _swiglu_gradients(
    power_of_two, plain, dy, weight_A, experts, plan, kept, dtype, dtype
  )
  return dx[:, :D], dweight_A, dexperts, None


grouped_swiglu.defvjp(_grouped_fwd, _grouped_bwd)


# From tokens to tokens: permute, the experts, combine.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def routed_swiglu(power_of_two, x_MD, gate_MK, experts, row_MK, plan):
  """See `experts.quantized_routed_swiglu`."""
  return _routed(power_of_two, x_MD, gate_MK, experts, row_MK, plan, keep=False)[0]


def _routed(power_of_two, x_MD, gate_MK, experts, row_MK, plan, keep: bool):
  """Returns the output, and with `keep` gate and up [A, F]."""
  dtype, x_MD, D = x_MD.dtype, _wide(x_MD), x_MD.shape[1]
  x = tpu_words.scatter(x_MD, row_MK, plan.A, power_of_two)
  weight_A = weights_of_rows(gate_MK, row_MK, plan.A)
  words = permute.row_words(dtype, x_MD.shape[1]).dtype
  y, kept = _swiglu(power_of_two, x, weight_A, experts, plan, dtype, words, keep)
  return permute.gather_sum(y, row_MK, dtype)[:, :D], kept


def _routed_fwd(power_of_two, x_MD, gate_MK, experts, row_MK, plan):
  saved = (x_MD, gate_MK, experts, row_MK, plan)
  y_MD, kept = _routed(power_of_two, *saved, keep=True)
  return y_MD, (*saved, kept)


def _routed_bwd(power_of_two, saved, dy_MD):
  x_MD, gate_MK, experts, row_MK, plan, kept = saved
  dtype, D = x_MD.dtype, x_MD.shape[1]
  x_MD, dy_MD = _wide(x_MD), _wide(dy_MD)
  plain = [permute.scatter(a, row_MK, plan.A) for a in (x_MD, dy_MD)]
  dy = tpu_words.scatter(dy_MD, row_MK, plan.A, power_of_two)
  weight_A = weights_of_rows(gate_MK, row_MK, plan.A)
  words = permute.row_words(dtype, x_MD.shape[1]).dtype
  dx, dweight_A, dexperts = _swiglu_gradients(
    power_of_two, plain, dy, weight_A, experts, plan, kept, dtype, words
  )
  dx_MD = permute.gather_sum(dx, row_MK, dtype)[:, :D]
  return dx_MD, dweight_A[row_MK], dexperts, None, None


routed_swiglu.defvjp(_routed_fwd, _routed_bwd)
