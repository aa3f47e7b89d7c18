"""FP8 experts, on rows and from tokens to tokens: against loops, and by the chips' compilers."""

import functools
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from dsmoe.compilers.gpu_resources import h100_resources
from pallas_kernels.permute import combine, expert_order, permute, weights_of_rows
from pallas_kernels.quantized_matmul import (
  gpu_routed,
  quantized_grouped_swiglu,
  quantized_routed_swiglu,
  row_alignment,
  tpu_words,
)
from pallas_kernels.routing import Routed, ranks
from tests.helpers import assert_close, equations
from tests.pallas_kernels.fp8_loops import draw, expert, quantize
from tests.pallas_kernels.gpu_topology import compile_for_h100, interpreted
from tests.pallas_kernels.topologies import compile_for

either_scale = pytest.mark.parametrize("power_of_two", [False, True], ids=["float32", "ue8m0"])
struct = jax.ShapeDtypeStruct


@either_scale
@pytest.mark.parametrize("M, D, dtype", [(37, 1024, "bfloat16"), (3, 16896, "float32")])
def test_tokens_travel_as_codes_and_scales(M, D, dtype, power_of_two):
  """Exactly those of the loops, in their places; 132 tiles have two pieces of scales."""
  K, W = 3, D // 4 + -(-D // 128 // 128) * 128
  x = draw(1, M, D)
  places = np.random.default_rng(2).permutation(2 * M * K)[: M * K].reshape(M, K)
  scatter = jax.jit(lambda x, row: tpu_words.scatter(x, row, 2 * M * K, power_of_two))
  with pltpu.force_tpu_interpret_mode():
    words = np.asarray(scatter(jnp.asarray(x, dtype), places.astype(np.int32)))
  assert words.shape == (2 * M * K, W) and words.dtype == np.uint32
  codes, scales = quantize(x, 1, 128, power_of_two)
  for m, k in np.ndindex(M, K):
    row = words[places[m, k]]
    byte = row[: D // 4].reshape(-1, 1, 128) >> np.array([0, 8, 16, 24], np.uint32)[:, None]
    np.testing.assert_array_equal(byte.astype(np.uint8).reshape(-1), codes[m].view(np.uint8))
    np.testing.assert_array_equal(row[D // 4 :][: D // 128].view(np.float32), scales[m])


@pytest.mark.hopper
@either_scale
@pytest.mark.parametrize("D, dtype", [(384, "bfloat16"), (8448, "float32")])
def test_tokens_are_quantised_on_the_way(D, dtype, power_of_two):
  """On H100, exactly as the loops do; 66 tiles take two turns. Bad tiles spoil themselves only."""
  M, K, P = 5, 3, 24
  x = draw(1, M, D)
  x[1, 128:256] = 0
  good = x.copy()
  x[2, 5], x[3, 130], x[3, 300] = np.inf, np.nan, -np.inf
  bad = {(2, 0), (3, 1), (3, 2)}
  places = np.random.default_rng(2).permutation(P)[: M * K].reshape(M, K).astype(np.int32)
  places[1, 2], places[4, 0] = -1, P  # no copies
  fn = jax.jit(lambda x, row: gpu_routed.permute_quantized(x, row, P, power_of_two))
  with interpreted():
    codes, scales = map(np.asarray, fn(jnp.asarray(x, dtype), places))
  assert codes.shape == (P, D) and scales.shape == (-(-D // 128 // 64) * 64, P)
  expected_codes, expected_scales = quantize(good, 1, 128, power_of_two)
  assert (expected_scales[1, 1], codes.dtype) == (1, expected_codes.dtype)
  for m, k in np.ndindex(M, K):
    if not 0 <= places[m, k] < P:
      continue
    for t in range(D // 128):
      own = slice(t * 128, (t + 1) * 128)
      if (m, t) in bad:
        assert np.isnan(scales[t, places[m, k]])
      else:
        assert scales[t, places[m, k]] == expected_scales[m, t]
        actual, expected = (
          c.view(np.uint8) for c in (codes[places[m, k], own], expected_codes[m, own])
        )
        np.testing.assert_array_equal(actual, expected)


M, K, E, D, F = 132, 2, 5, 400, 300  # sides padded to 512 and 384, columns in blocks of 256


def _experts():
  """Expert 1 has every token, two steps of rows; 0 and 3 have none."""
  other = np.random.default_rng(3).choice([2, 4], M)
  experts = np.stack([np.ones(M), other], axis=1).astype(np.int32)
  experts[::3] = experts[::3, ::-1]
  return experts


def _inputs(dtype, tokens=M, D=D, F=F):
  rng = np.random.default_rng(4)
  normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)  # noqa: E731
  weights = [normal(*s) * s[1] ** -0.5 for s in ((E, D, F), (E, D, F), (E, F, D))]
  gates = rng.uniform(0.1, 2, (M, K)).astype(np.float32)
  x, dy = normal(M, D)[:tokens], normal(M, D)[:tokens]
  return x, gates[:tokens], tuple(w.astype(dtype) for w in weights), dy


@functools.cache
def _by_loops(dtype, power_of_two, *sizes):
  """Value and gradients of `_inputs`, an expert at a time, in float64 but for rounding."""
  inputs = jax.tree.map(lambda a: np.asarray(a, np.float64), _inputs(dtype, *sizes))
  x, gates, weights, dy = inputs
  experts = _experts()[: len(x)]
  y, dx, dgates = np.zeros(x.shape), np.zeros(x.shape), np.zeros(gates.shape)
  dweights = [np.zeros(w.shape) for w in weights]
  for e in sorted(set(experts.reshape(-1).tolist())):
    m, k = np.nonzero(experts == e)
    own = [w[e] for w in weights]
    found = expert(x[m], gates[m, k], own, dy[m], dtype, power_of_two)
    y[m] += found[0]
    dx[m] += found[1]
    dgates[m, k] = found[2]
    for total, dw in zip(dweights, found[3]):
      total[e] = dw
  return y, (dx, dgates, tuple(dweights))


class Groups(NamedTuple):
  """Gaps between groups, rows before the first and after the last."""

  sizes: tuple[int, ...]
  starts: tuple[int, ...]
  rows: int


MANY_ROWS = Groups((0, 150, 3, 0, 129), (4, 6, 160, 163, 170), 310)
FEW_ROWS = Groups((0, 5, 3, 0, 2), (1, 2, 9, 12, 13), 18)


def _rows(dtype, groups):
  """Rows of groups, NaN in rows outside all groups, and what is multiplied with them."""
  rng = np.random.default_rng(8)
  x, dy = (rng.standard_normal((groups.rows, D)) for _ in range(2))
  weight = rng.uniform(0.1, 2, groups.rows)
  outside = np.ones(groups.rows, bool)
  for start, size in zip(groups.starts, groups.sizes):
    outside[start : start + size] = False
  for a in (x, dy, weight):
    a[outside] = np.nan
  operands = (jnp.asarray(x, dtype), weight.astype(np.float32), *_inputs(dtype)[2])
  return operands, jnp.asarray(dy, dtype), ~outside


@functools.cache
def _rows_by_loops(dtype, power_of_two, groups):
  """`_by_loops` on rows; zeros outside all groups."""
  operands, dy, _ = _rows(dtype, groups)
  x, weight, *weights, dy = (np.asarray(a, np.float64) for a in (*operands, dy))
  y, dx, dweight = np.zeros(x.shape), np.zeros(x.shape), np.zeros(weight.shape)
  dweights = [np.zeros(w.shape) for w in weights]
  for e, (start, size) in enumerate(zip(groups.starts, groups.sizes)):
    if size:
      rows, own = slice(start, start + size), [w[e] for w in weights]
      found = expert(x[rows], weight[rows], own, dy[rows], dtype, power_of_two)
      y[rows], dx[rows], dweight[rows] = found[:3]
      for total, dw in zip(dweights, found[3]):
        total[e] = dw
  return y, (dx, dweight, *dweights)


def _rows_value_and_gradients(implementation, power_of_two, operands, dy, **groups):
  fn = functools.partial(
    quantized_grouped_swiglu,
    implementation=implementation,
    power_of_two_scales=power_of_two,
    **groups,
  )
  y, vjp = jax.vjp(fn, *operands)
  return y, vjp(dy)


@pytest.mark.parametrize(
  "implementation, power_of_two, dtype, groups",
  [
    ("xla", False, "bfloat16", MANY_ROWS),
    pytest.param("mosaic_tpu", False, "bfloat16", MANY_ROWS, marks=pytest.mark.slow),
    pytest.param("mosaic_tpu", True, "float32", MANY_ROWS, marks=pytest.mark.slow),
    pytest.param("mosaic_gpu", False, "bfloat16", FEW_ROWS, marks=pytest.mark.slow),
  ],
)
def test_experts_on_rows_match_loops(implementation, power_of_two, dtype, groups):
  """Groups that start anywhere: those of a device that holds some of all experts."""
  operands, dy, inside = _rows(dtype, groups)

  @jax.jit
  def run(operands, dy, group_sizes_E, group_starts_E):
    plan = {"group_sizes_E": group_sizes_E, "group_starts_E": group_starts_E}
    return _rows_value_and_gradients(implementation, power_of_two, operands, dy, **plan)

  plan = (np.array(a, np.int32) for a in (groups.sizes, groups.starts))
  with interpreted() if implementation == "mosaic_gpu" else pltpu.force_tpu_interpret_mode():
    y, (dx, dweight, *dweights) = jax.tree.map(np.array, run(operands, dy, *plan))
  assert y.dtype == dx.dtype == dtype
  y[~inside], dx[~inside], dweight[~inside] = 0, 0, 0
  # In float32 a last digit may decide between two codes, which is a whole step.
  expected = _rows_by_loops(dtype, power_of_two, groups)
  assert_close((y, (dx, dweight, *dweights)), expected, "bfloat16")


@pytest.mark.parametrize(
  "implementation", ["xla", pytest.param("mosaic_tpu", marks=pytest.mark.slow)]
)
def test_experts_on_rows_equal_those_from_tokens_to_tokens(implementation):
  """In float32, to the last digits: permute, experts on aligned rows, combine; the fused form.

  And the TPU's fused form equals the plain one: the codes are the same.
  """
  x, gates, weights, dy = _inputs("float32")
  experts, alignment = _experts(), row_alignment(M * K, E, implementation)
  assert alignment == {"xla": 1, "mosaic_tpu": 128}[implementation]
  rank, counts = ranks(experts, E)
  order = expert_order(experts, rank, counts, alignment)

  def fn(x, gates, weights):
    weight_P = weights_of_rows(gates, order[1], order[0].size)
    rows_PD = permute(x, *order, "reference")
    y_PD = quantized_grouped_swiglu(
      rows_PD, weight_P, *weights, counts, implementation, alignment=alignment
    )
    return combine(y_PD, *order, "reference")

  def value_and_gradients(x, gates, weights, dy):
    y, vjp = jax.vjp(fn, x, gates, weights)
    return y, vjp(dy)

  def fused(implementation):
    run = functools.partial(_value_and_gradients, **_way(implementation))
    return jax.jit(run)(x, gates, weights, dy, experts)

  with pltpu.force_tpu_interpret_mode():
    on_rows = jax.jit(value_and_gradients)(x, gates, weights, dy)
    whole = fused(implementation)
  assert_close(on_rows, whole)
  if implementation == "mosaic_tpu":
    assert_close(whole, fused("xla"))
    assert all(not np.asarray(dw)[[0, 3]].any() for dw in whole[1][2])  # of experts without tokens


def _value_and_gradients(x, gates, weights, dy, experts, implementation, power_of_two=False):
  routed = lambda g: Routed(experts, g, *ranks(experts, weights[0].shape[0])[::-1])  # noqa: E731
  y, vjp = jax.vjp(
    lambda x, g, w: quantized_routed_swiglu(x, routed(g), w, implementation, power_of_two),
    *(x, gates, weights),
  )
  return y, vjp(dy)


@pytest.mark.parametrize(
  "implementation, power_of_two",
  [("xla", False), ("xla", True), pytest.param("mosaic_tpu", True, marks=pytest.mark.slow)],
)
def test_value_and_gradients_match_loops(implementation, power_of_two):
  """The TPU's way with scales of any size is compared with the plain one, to the last digits."""
  run = jax.jit(functools.partial(_value_and_gradients, **_way(implementation, power_of_two)))
  with pltpu.force_tpu_interpret_mode():
    actual = run(*_inputs("bfloat16"), _experts())
  assert_close(actual, _by_loops("bfloat16", power_of_two), "bfloat16")


def _way(implementation, power_of_two=False):
  return {"implementation": implementation, "power_of_two": power_of_two}


@pytest.mark.slow
@pytest.mark.hopper
def test_the_h100s_way_matches_loops():
  """Rows are no multiple of eight. Both kinds of scale are tested where tokens are quantised.

  Three and two tiles, the last ones partial; larger sides are interpreted for minutes.
  """
  (tokens, *sides), power_of_two = (9, 272, 144), True
  run = jax.jit(functools.partial(_value_and_gradients, **_way("mosaic_gpu", power_of_two)))
  with interpreted():
    actual = run(*_inputs("bfloat16", tokens, *sides), _experts()[:tokens])
    actual = jax.tree.map(np.asarray, actual)
  assert_close(actual, _by_loops("bfloat16", power_of_two, tokens, *sides), "bfloat16")


@pytest.mark.parametrize(
  "shapes, message",
  [
    (((4, 6), (3, 5, 8), (3, 5, 8), (3, 8, 5)), r"w_gate_EDF must have shape \(3, 6, 8\), got"),
    (((4, 5), (3, 5, 8), (2, 5, 8), (3, 8, 5)), r"w_up_EDF must have shape \(3, 5, 8\), got"),
    (((4, 5), (3, 5, 8), (3, 5, 8), (3, 5, 8)), r"w_down_EFD must have shape \(3, 8, 5\), got"),
    (((3, 5), (3, 5, 8), (3, 5, 8), (3, 8, 5)), r"a row for each of 3 tokens, got \(4, 2\)"),
    (((4, 5), (5, 8), (3, 5, 8), (3, 8, 5)), "w_gate_EDF must have 3 dimensions"),
  ],
)
def test_shapes_that_do_not_fit_are_refused(shapes, message):
  x, *weights = (np.zeros(shape, np.float32) for shape in shapes)
  experts = np.zeros((4, 2), np.int32)
  with pytest.raises(ValueError, match=message):
    quantized_routed_swiglu(x, Routed(experts, experts, np.zeros(3, int), experts), weights)


def test_tokens_are_read_once_and_codes_written_once():
  """By the kernel's own count at V3's shape: 0.59 of what the bfloat16 rows take."""
  M, K, D, P = 8192, 8, 7168, 65536
  tokens, rows = struct((M, D), jnp.bfloat16), struct((M, K), jnp.int32)
  jaxpr = jax.make_jaxpr(lambda x, r: tpu_words.scatter(x, r, P, False))(tokens, rows)
  (call,) = (e for e in equations(jaxpr.jaxpr) if e.primitive.name == "pallas_call")
  least = 2 * M * D + P * (D + 4 * 128) + 4 * M * K  # 56 scales in a piece of 128
  assert least <= call.params["cost_estimate"].bytes_accessed <= 1.001 * least
  assert least < 0.6 * 2 * D * (M + P)


@pytest.mark.tpu
@pytest.mark.parametrize("topology", ["v5p:2x2x1", "v6e:2x2x1", "tpu7x:2x2x1"])
def test_compiles_at_the_widths_of_v3(topology):
  """Forward and backward; nothing as large as the rows in bfloat16 is gathered by XLA."""
  M, K, D, F, E = 1024, 4, 7168, 2048, 8
  shapes = [(M, D), (M, K), [(E, D, F), (E, D, F), (E, F, D)], (M, D)]
  dtypes = [jnp.bfloat16, jnp.float32, jnp.bfloat16, jnp.bfloat16]
  args = [
    [struct(own, d) for own in s] if isinstance(s, list) else struct(s, d)
    for s, d in zip(shapes, dtypes)
  ]
  fn = functools.partial(_value_and_gradients, **_way("mosaic_tpu"))
  text = compile_for(topology, fn, *args, struct((M, K), jnp.int32)).as_text()
  for name in ("quantized_permute", "quantized_swiglu_in", "quantized_swiglu_out", "combine"):
    assert name in text
  gathered = re.findall(r"= \w+\[([\d,]+)\]\S* gather\(", text)
  assert all(np.prod([int(n) for n in dims.split(",")]) < M * K * F for dims in gathered)


@pytest.mark.tpu
@pytest.mark.parametrize("topology", ["v5p:2x2x1", "v6e:2x2x1", "tpu7x:2x2x1"])
def test_experts_on_rows_compile_at_the_widths_of_v3(topology):
  """Forward and backward, of rows that lie aligned: XLA moves none of them."""
  E, D, F = 2, 7168, 2048
  P = 4 * E * 256
  experts = [struct(shape, jnp.bfloat16) for shape in ((E, D, F), (E, D, F), (E, F, D))]
  rows, groups = struct((P, D), jnp.bfloat16), struct((E,), jnp.int32)
  operands = (rows, struct((P,), jnp.float32), *experts)
  assert row_alignment(P, E, "mosaic_tpu") == 256

  def fn(operands, dy, sizes, starts):
    plan = {"group_sizes_E": sizes, "group_starts_E": starts, "alignment": 256}
    return _rows_value_and_gradients("mosaic_tpu", False, operands, dy, **plan)

  text = compile_for(topology, fn, operands, rows, groups, groups).as_text()
  for name in ("quantized_swiglu_in", "quantized_swiglu_out", "quantized_swiglu_in_gradient"):
    assert name in text
  gathered = re.findall(r"= \w+\[([\d,]+)\]\S* gather\(", text)
  assert not any(dims.startswith(f"{P},") for dims in gathered)


@pytest.mark.gpu
@pytest.mark.parametrize("M, K, D, P", [(8192, 8, 7168, 65536), (40, 3, 256, 152)])
@either_scale
def test_permute_compiles_for_h100(M, K, D, P, power_of_two):
  fn = lambda x, row: gpu_routed.permute_quantized(x, row, P, power_of_two)  # noqa: E731
  compiled, printed = compile_for_h100(fn, struct((M, D), jnp.bfloat16), struct((M, K), jnp.int32))
  found = h100_resources(printed)["permute_quantized"]
  assert found["spill_store_bytes"] == 0
  assert compiled.memory_analysis().temp_size_in_bytes < 1024  # codes and scales are stored once


@pytest.mark.gpu
def test_compiles_for_h100_at_the_widths_of_v3():
  """Forward and gradients."""
  M, K, D, F, E = 8192, 8, 7168, 2048, 8
  weights = [struct(s, jnp.bfloat16) for s in ((E, D, F), (E, D, F), (E, F, D))]
  args = struct((M, D), jnp.bfloat16), struct((M, K), jnp.float32), weights
  rows = struct((M, K), jnp.int32), struct((E,), jnp.int32), struct((M, K), jnp.int32)

  def forward(x, gates, weights, experts, counts, rank):
    routed = Routed(experts, gates, counts, rank)
    return quantized_routed_swiglu(x, routed, weights, "mosaic_gpu")

  def gradients(x, gates, weights, experts, counts, rank, dy):
    fn = lambda *a: forward(*a, experts, counts, rank)  # noqa: E731
    return jax.vjp(fn, x, gates, weights)[1](dy)

  compile_for_h100(forward, *args, *rows)
  compile_for_h100(gradients, *args, *rows, args[0])
