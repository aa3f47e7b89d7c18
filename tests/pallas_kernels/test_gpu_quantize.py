"""Quantisation on H100 that transposes: codes against loops, by the interpreter, and compiled."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dsmoe.compilers import hlo
from dsmoe.compilers.gpu_resources import h100_resources
from pallas_kernels.quantized_matmul import gpu, gpu_quantize, quantized_matmul
from pallas_kernels.quantized_matmul import reference as quantized_reference
from tests.helpers import assert_close
from tests.pallas_kernels.fp8_loops import E4M3, draw, quantize
from tests.pallas_kernels.gpu_topology import compile_for_h100, interpreted

either_scale = pytest.mark.parametrize("power_of_two", [False, True], ids=["float32", "ue8m0"])
struct = jax.ShapeDtypeStruct

E, K, N = 2, 300, 200  # three tiles by two, the last ones partial
DTYPES = ["bfloat16", "float16", "float32"]


def _run(fn, *args):
  """fn(*args) by the interpreter, as NumPy arrays."""
  with interpreted():
    return jax.tree.map(np.asarray, jax.jit(fn)(*args))


def _rounded(dtype, *shape):
  """Numbers of many magnitudes in a dtype: as they are, and in float32."""
  rows = draw(1, *shape).clip(-60000, 60000).astype(np.dtype(dtype))
  return rows, rows.astype(np.float32)


def _assert_same_codes(actual, expected):
  assert actual.dtype == expected.dtype == E4M3
  bytes_of = lambda a: np.ascontiguousarray(a).view(np.uint8)  # noqa: E731
  np.testing.assert_array_equal(bytes_of(actual), bytes_of(expected))


@pytest.mark.hopper
@either_scale
@pytest.mark.parametrize("transposed", [False, True], ids=["as products", "as gradients"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_codes_lie_with_the_contraction_last(dtype, transposed, power_of_two):
  """Exactly those of the loops, filled up with zeros; every column has its block's scale."""
  w_EKN, numbers_EKN = _rounded(dtype, E, K, N)
  w = np.ascontiguousarray(w_EKN.swapaxes(1, 2)) if transposed else w_EKN
  codes, scale = _run(lambda w: gpu_quantize.quantize_weights(w, power_of_two, transposed), w)
  assert codes.shape == (E, 256, 384) and scale.shape == (E, 3, 256)
  for e in range(E):
    padded = np.pad(numbers_EKN[e], ((0, 384 - K), (0, 256 - N)))
    expected_codes, expected_scale = quantize(padded, 128, 128, power_of_two)
    _assert_same_codes(codes[e], expected_codes.T)
    np.testing.assert_array_equal(scale[e], np.repeat(expected_scale, 128, axis=1))


@pytest.mark.hopper
@either_scale
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_weights_are_quantised_both_ways_from_one_read(dtype, power_of_two):
  w, _ = _rounded(dtype, E, K, N)
  both = _run(lambda w: gpu_quantize.quantize_weights_both(w, power_of_two), w)
  for actual, transposed in zip(both, (False, True)):
    expected = _run(lambda w, t=transposed: gpu_quantize.quantize_weights(w, power_of_two, t), w)
    _assert_same_codes(actual.codes, expected.codes)
    np.testing.assert_array_equal(actual.scale, expected.scale)


@pytest.mark.hopper
@either_scale
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bad_weight_spoils_its_block_only(bad, power_of_two):
  w, numbers = _rounded("bfloat16", 1, 256, 128)
  w = w.copy()
  w[0, 130, 5] = bad
  codes, scale = _run(lambda w: gpu_quantize.quantize_weights(w, power_of_two), w)
  expected_codes, expected_scale = quantize(numbers[0, :128], 128, 128, power_of_two)
  _assert_same_codes(codes[0, :, :128], expected_codes.T)
  assert (scale[0, 0] == expected_scale).all() and np.isnan(scale[0, 1]).all()


@pytest.mark.hopper
@either_scale
@pytest.mark.parametrize("dtype", DTYPES)
def test_groups_are_quantised_from_their_first_rows(dtype, power_of_two):
  """Full and partial tiles, one without rows; rows of no tile, NaN, are not seen."""
  P, D = 310, 200
  first, count = np.array([5, 133, 170, 0, 298]), np.array([128, 7, 128, 0, 12])
  x, numbers = _rounded(dtype, P, D)
  outside = np.ones(P, bool)
  for begin, size in zip(first, count):
    outside[begin : begin + size] = False
  x = np.where(outside[:, None], np.nan, x).astype(x.dtype)
  args = (x, first.astype(np.int32), count.astype(np.int32))
  codes, scale = _run(lambda *a: gpu_quantize.quantize_groups(*a, power_of_two), *args)
  columns, rows = _run(lambda *a: gpu_quantize.quantize_groups_both(*a, power_of_two), *args)
  assert codes.shape == (256, 5 * 128) and scale.shape == (5, 256)
  assert rows.codes.shape == (5 * 128, 256) and rows.scale.shape == (2, 5 * 128)
  for t, (begin, size) in enumerate(zip(first, count)):
    if size:
      own = np.pad(numbers[begin : begin + size], ((0, 128 - size), (0, 256 - D)))
      expected_codes, expected_scale = quantize(own, 128, 1, power_of_two)
      tile = slice(t * 128, (t + 1) * 128)
      for found in (codes, columns.codes):
        _assert_same_codes(found[:, tile], expected_codes.T)
      for found in (scale, columns.scale):
        np.testing.assert_array_equal(found[t], expected_scale[0])
      expected_codes, expected_scale = quantize(own[:size], 1, 128, power_of_two)
      tile = slice(t * 128, t * 128 + size)
      _assert_same_codes(rows.codes[tile], expected_codes)
      np.testing.assert_array_equal(rows.scale[:, tile], expected_scale.T)


@pytest.mark.hopper
@either_scale
@pytest.mark.parametrize("kind", ["columns", "transposed columns", "blocks"])
def test_codes_and_scales_match_loops_exactly(kind, power_of_two):
  x = draw(2, K, N)
  if kind == "blocks":
    actual = _run(lambda x: gpu.quantize_blocks(x, power_of_two), x)
    codes, scale = quantize(x, 128, 128, power_of_two)
  else:
    turned = kind == "transposed columns"
    actual = _run(lambda x: gpu.quantize_columns(x, power_of_two, turned), x)
    codes, scale = quantize(x, 128, 1, power_of_two)
    codes = codes.T if turned else codes
  _assert_same_codes(actual.codes, codes)
  np.testing.assert_array_equal(actual.scale, scale)


@pytest.mark.hopper
def test_every_code_and_every_tie():
  """All 253 numbers of E4M3, and what lies halfway, just above and just below."""
  numbers = np.unique(np.arange(256, dtype=np.uint8).view(E4M3).astype(np.float32))
  numbers = numbers[np.isfinite(numbers)]
  halves = (numbers[1:] + numbers[:-1]) / 2
  x = np.concatenate([numbers, halves, np.nextafter(halves, 500), np.nextafter(halves, -500)])
  x = np.pad(x, (0, 1024 - len(x)))
  x = np.concatenate([np.full((1, 1024), 448, np.float32), x[None]])  # each below a 448: scale 1
  for fn in (gpu.quantize_columns, gpu.quantize_blocks):
    codes, scale = _run(fn, x)
    assert (scale == 1).all()
    np.testing.assert_array_equal(codes.astype(np.float32), x.astype(E4M3) + 0.0)


@pytest.mark.hopper
def test_tiny_numbers_have_the_smallest_normal_scale():
  x = np.full((2, 130), 1e-37, np.float32)
  tiny = np.finfo(np.float32).tiny
  for fn in (gpu.quantize_columns, gpu.quantize_blocks):
    codes, scale = _run(fn, x)
    assert (scale == tiny).all()
    _assert_same_codes(codes, (x / tiny).astype(ml_dtypes.float8_e4m3fn))


@pytest.mark.slow
@pytest.mark.hopper
@either_scale
def test_projection_and_its_gradients(power_of_two):
  M, D, F = 37, 264, 144
  x, w, dy = draw(3, M, D), draw(4, D, F), draw(5, M, F)

  def run(implementation):
    def fn(x, w, dy):
      multiply = lambda x, w: quantized_matmul(x, w, implementation, power_of_two)  # noqa: E731
      y, vjp = jax.vjp(multiply, x, w)
      return y, vjp(dy)

    return fn

  expected = jax.jit(run("reference"))(x, w, dy)
  on_cpu = jax.default_backend() == "cpu"
  kind = "op_float32" if on_cpu else "fp8_on_hopper"
  assert_close(_run(run("mosaic_gpu"), x, w, dy), expected, kind)


@pytest.mark.slow
@pytest.mark.hopper
@either_scale
def test_rows_times_transposed_weights(power_of_two):
  sizes, starts = np.array([3, 0, 9], np.int32), np.array([1, 4, 6], np.int32)
  dy, w_EDF = draw(6, 18, 136), draw(7, 3, 200, 136)
  fn = lambda module: (  # noqa: E731
    lambda *a: module.grouped_rows(*a, power_of_two, jnp.float32, transposed=True)
  )
  args = (dy, w_EDF, sizes, starts)
  on_cpu = jax.default_backend() == "cpu"
  kind = "op_float32" if on_cpu else "fp8_on_hopper"
  assert_close(_run(fn(gpu), *args), fn(quantized_reference)(*args), kind)


@pytest.mark.slow
@pytest.mark.hopper
def test_rows_outside_all_groups_are_not_seen():
  """NaN there, in the product and where the interpreter leaves memory undefined, spoils nothing."""
  P, D, F = 34, 136, 72
  sizes, starts = np.array([3, 0, 9], np.int32), np.array([1, 4, 9], np.int32)
  x, w, dy = draw(8, P, D), draw(9, 3, D, F), draw(10, P, F)
  inside = np.zeros(P, bool)
  for start, size in zip(starts, sizes):
    inside[start : start + size] = True
  x[~inside], dy[~inside] = np.nan, np.nan

  def run(x, w, dy, *plan):
    y, vjp = jax.vjp(lambda x, w: gpu.multiply(False, x, w, *plan), x, w)
    return y, *vjp(dy)

  y, dx, dw = _run(run, x, w, dy, sizes, starts)
  plan = (sizes, starts, False, jnp.float32)
  x, dy = (np.where(inside[:, None], a, 0) for a in (x, dy))
  expected = (
    quantized_reference.grouped_rows(x, w, *plan)[inside],
    quantized_reference.grouped_rows(dy, w, *plan, transposed=True)[inside],
    quantized_reference.grouped_weights(x, dy, *plan),
  )
  on_cpu = jax.default_backend() == "cpu"
  assert_close((y[inside], dx[inside], dw), expected, "op_float32" if on_cpu else "fp8_on_hopper")
  if on_cpu:  # else this test would see nothing
    assert np.isnan(y[~inside]).all() and np.isnan(dx[~inside]).all()


def test_gradients_of_a_recomputed_product_are_those_of_one_that_is_kept(monkeypatch):
  """What JAX makes of `optimize_remat`, which no kernel can tell: exact products stand in for them."""
  sizes, starts = np.array([3, 0, 9], np.int32), np.array([1, 4, 6], np.int32)
  own_EP = np.zeros((3, 18), np.float32)
  for own_P, start, size in zip(own_EP, starts, sizes):
    own_P[start : start + size] = 1

  def rows_times(x, w, *_):
    x_PK = x.codes.astype(jnp.float32) * jnp.repeat(x.scale, 128, axis=0)[: x.codes.shape[1]].T
    return jnp.einsum("ep,pk,enk->pn", own_EP, x_PK, w.codes)

  def gradients(_, w_dtype, x_PD, weights, plan, dys):
    dx_PD = jnp.einsum("ep,pf,edf->pd", own_EP, dys[0], weights[0].codes)
    return dx_PD, jnp.einsum("ep,pd,pf->edf", own_EP, x_PD, dys[0])

  one = lambda w, _: gpu.Quantized(w.swapaxes(1, 2), None)  # noqa: E731
  # Other numbers, which tell in the results that they are its.
  both = lambda w, _: [gpu.Quantized(2 * w.swapaxes(1, 2), None), gpu.Quantized(3 * w, None)]  # noqa: E731
  monkeypatch.setattr(gpu, "rows_times", rows_times)
  monkeypatch.setattr(gpu, "gradients", gradients)
  monkeypatch.setattr(gpu, "quantize_weights", one)
  monkeypatch.setattr(gpu, "quantize_weights_both", both)
  x, w, dy = draw(11, 18, 200), draw(12, 3, 200, 136), draw(13, 18, 136)

  def gradient(wrap):
    def layer(x, w):
      return jnp.tanh(gpu.multiply(False, jnp.sin(x), w, sizes, starts))

    @jax.jit
    def run(x, w):
      y, vjp = jax.vjp(wrap(layer), x, w)
      return y, vjp(dy)

    return run(x, w)

  y, kept = gradient(lambda layer: layer)
  y_recomputed, recomputed = gradient(jax.checkpoint)
  codes = gpu.quantize_rows(jnp.sin(x), False)
  u = rows_times(codes, one(w, False))
  # Kept, the pass that writes codes both ways ran; recomputed, first the one that writes them once.
  assert_close((y, y_recomputed), (jnp.tanh(2 * u), jnp.tanh(u)), "op_float32")
  assert_close(recomputed, kept, "op_float32")
  assert all(np.abs(a).max() > 0 for a in kept)


def _compiled_bytes(fn, *shapes):
  """Compiles for an H100, without spills; returns the bytes to and from HBM."""
  compiled, printed = compile_for_h100(fn, *shapes)
  for resources in h100_resources(printed).values():
    assert resources["spill_store_bytes"] == 0
    assert resources.get("blocks_per_sm", 2) >= 2  # which jax 0.12 does not print
  assert compiled.memory_analysis().temp_size_in_bytes < 1024
  computations, entry = hlo.parse(compiled.as_text())
  return sum(
    times * hlo.hbm_bytes(instruction, computation, computations)
    for instruction, computation, times in hlo.executed(computations, entry)
  )


@pytest.mark.gpu
@either_scale
@pytest.mark.parametrize("dtype", DTYPES)
def test_each_number_is_read_once_and_each_code_written_once(dtype, power_of_two):
  """At V3's widths; scales are an eightieth of the codes at most."""
  E, D, F, P, R = 3, 7168, 2048, 4096, 40
  dtype = jnp.dtype(dtype)

  def least(numbers):
    return numbers * (dtype.itemsize + 1)

  for transposed in (False, True):
    moved = _compiled_bytes(
      lambda w, t=transposed: gpu_quantize.quantize_weights(w, power_of_two, t),
      struct((E, D, F), dtype),
    )
    assert least(E * D * F) <= moved <= 1.02 * least(E * D * F)
  moved = _compiled_bytes(
    lambda w: gpu_quantize.quantize_weights_both(w, power_of_two), struct((E, D, F), dtype)
  )
  both = E * D * F * (dtype.itemsize + 2)
  assert both <= moved <= 1.03 * both
  tiles = struct((R,), jnp.int32)
  moved = _compiled_bytes(
    lambda *a: gpu_quantize.quantize_groups(*a, power_of_two), struct((P, D), dtype), tiles, tiles
  )
  most = P * D * dtype.itemsize + R * 128 * D
  assert most <= moved <= 1.02 * most
  moved = _compiled_bytes(
    lambda *a: gpu_quantize.quantize_groups_both(*a, power_of_two),
    *(struct((P, D), dtype), tiles, tiles),
  )
  most += R * 128 * D
  assert most <= moved <= 1.03 * most
