"""One suite for every implementation of the FP8 matmuls, against NumPy loops in float64."""

import collections
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from dsmoe.compilers import compile_only
from dsmoe.huggingface import fp8
from pallas_kernels import quantized_matmul as q
from pallas_kernels.quantized_matmul import tpu
from tests.helpers import assert_close, equations
from tests.pallas_kernels.fp8_loops import E4M3, draw, quantize, values
from tests.pallas_kernels.topologies import compile_for, tpu_devices

M, D, F = 150, 300, 200  # two, three and two tiles, the last ones partial
SHAPES = [
  (150, 300, 200),
  (2, 3, 5),  # less than a tile
  (128, 384, 256),  # whole tiles
]

# test_gpu.py has mosaic_gpu: its interpreter and dtypes are others.
every_implementation = pytest.mark.parametrize(
  "implementation", sorted(q.IMPLEMENTATIONS.keys() - {"mosaic_gpu"})
)
every_grouped = pytest.mark.parametrize(
  "implementation", sorted(q.GROUPED_IMPLEMENTATIONS.keys() - {"mosaic_gpu"})
)
either_scale = pytest.mark.parametrize("power_of_two", [False, True], ids=["float32", "ue8m0"])


@pytest.fixture(autouse=True)
def interpreted(request):
  """TPU kernels run on the CPU, unless they are compiled for a TPU."""
  if request.node.get_closest_marker("tpu"):
    yield
  else:
    with pltpu.force_tpu_interpret_mode():
      yield


@functools.cache
def _problem(shape, power_of_two):
  """Inputs (x, w, dy), the value and the gradients, by loops over blocks."""
  M, D, F = shape
  x, w, dy = draw(1, M, D), draw(2, D, F), draw(3, M, F)
  return (x, w, dy), _by_loops(x, w, dy, power_of_two)


def _by_loops(x, w, dy, power_of_two):
  numbers = functools.partial(values, power_of_two=power_of_two)
  w_numbers = numbers(w, 128, 128)
  y = numbers(x, 1, 128) @ w_numbers
  dx = numbers(dy, 1, 128) @ w_numbers.T
  return y, (dx, numbers(x, 128, 1).T @ numbers(dy, 128, 1))


def _run(implementation, power_of_two, x, w, dy):
  @jax.jit
  def run(x, w, dy):
    y, vjp = jax.vjp(lambda x, w: q.quantized_matmul(x, w, implementation, power_of_two), x, w)
    return y, vjp(dy)

  return run(x, w, dy)


@every_implementation
@either_scale
@pytest.mark.parametrize("kind", ["rows", "columns", "transposed columns", "blocks"])
def test_codes_and_scales_match_loops_exactly(implementation, power_of_two, kind):
  height, width = {"rows": (1, 128), "blocks": (128, 128)}.get(kind, (128, 1))
  fn = {"rows": q.quantize_rows, "blocks": q.quantize_blocks}.get(kind, q.quantize_columns)
  options = {"transposed": True} if kind == "transposed columns" else {}
  x = draw(0, M, D)
  actual = jax.jit(lambda x: fn(x, implementation, power_of_two, **options))(x)
  codes, scales = quantize(x, height, width, power_of_two)
  assert actual.codes.dtype == E4M3 and actual.scale.dtype == np.float32
  # Scales come with the tile first.
  np.testing.assert_array_equal(actual.scale, scales.T if kind == "rows" else scales)
  bytes_of = lambda a: np.ascontiguousarray(a).view(np.uint8)  # noqa: E731
  expected = codes.T if kind == "transposed columns" else codes
  np.testing.assert_array_equal(bytes_of(actual.codes), bytes_of(expected))


@every_implementation
def test_every_code_and_every_tie(implementation):
  """All 253 numbers of E4M3, and what lies halfway, just above and just below."""
  numbers = np.arange(256, dtype=np.uint8).view(E4M3).astype(np.float32)
  numbers = np.unique(numbers[np.isfinite(numbers)])
  assert len(numbers) == 253
  halves = (numbers[1:] + numbers[:-1]) / 2
  x = np.concatenate([numbers, halves, np.nextafter(halves, 500), np.nextafter(halves, -500)])
  x = np.stack([np.full_like(x, 448), x], 1)  # each beside a 448: scale 1
  codes, scale = jax.jit(lambda x: q.quantize_rows(x, implementation))(x)
  assert (np.asarray(scale) == 1).all()
  np.testing.assert_array_equal(np.asarray(codes).astype(np.float32), x.astype(E4M3) + 0.0)


@every_implementation
@pytest.mark.parametrize("exponent", [-100, -7, 0, 60])
def test_ue8m0_takes_448_to_448_and_no_more(implementation, exponent):
  """The scale of 448 * 2**k is 2**k, of the next number 2**(k + 1), of the one before 2**k."""
  edge = np.float32(448 * 2.0**exponent)
  x = np.array([[edge], [np.nextafter(edge, np.inf)], [np.nextafter(edge, 0)], [-edge / 2]])
  scale = jax.jit(lambda x: q.quantize_rows(x, implementation, True).scale)(x.astype(np.float32))
  expected = np.ldexp(np.float32(1), exponent + np.array([[0, 1, 0, -1]]))
  np.testing.assert_array_equal(scale, expected)


@pytest.mark.parametrize(
  "implementation, shape, power_of_two",
  [("xla", shape, power_of_two) for shape in SHAPES for power_of_two in (False, True)]
  # Interpreting is slow: either scale of partial tiles, one of it for each other shape.
  + [("mosaic_tpu", SHAPES[0], False)]
  + [("mosaic_tpu", shape, shape != SHAPES[1]) for shape in SHAPES],
)
def test_value_and_gradients_match_loops(implementation, shape, power_of_two):
  inputs, expected = _problem(shape, power_of_two)
  assert_close(_run(implementation, power_of_two, *inputs), expected)


@pytest.mark.slow
@either_scale
@pytest.mark.parametrize("native", [False, True], ids=["bfloat16", "e4m3"])
def test_many_small_steps_match_loops(monkeypatch, power_of_two, native):
  """Several blocks each way and ten tiles in two steps; for either kind of chip."""
  monkeypatch.setattr(tpu, "multiplies_e4m3", lambda: native)
  monkeypatch.setattr(tpu, "STEP_SUMS", 128 * 128)
  monkeypatch.setattr(tpu, "QUANTIZE_ROWS", 128)
  monkeypatch.setattr(tpu, "VMEM_BYTES", 10**6)
  assert tpu.step_of(150, 200, 10, 4) == (128, 128, 8)
  inputs, expected = _problem((150, 1160, 200), power_of_two)
  assert_close(_run("mosaic_tpu", power_of_two, *inputs), expected)


@pytest.mark.slow
@settings(max_examples=4)  # each is a compilation
@given(shape=st.tuples(*[st.integers(2, 290)] * 3), power_of_two=st.booleans())
def test_any_shape(shape, power_of_two):
  inputs, expected = _problem(shape, power_of_two)
  assert_close(_run("mosaic_tpu", power_of_two, *inputs), expected)


@every_implementation
def test_bfloat16(implementation):
  """Results come in the dtype of x, gradients in that of what they belong to."""
  x, w, dy = (jnp.asarray(a) for a in _problem((M, D, F), False)[0])
  x, dy = x.astype(jnp.bfloat16), dy.astype(jnp.bfloat16)
  y, (dx, dw) = _run(implementation, False, x, w, dy)
  assert (y.dtype, dx.dtype, dw.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
  expected = _by_loops(*(np.asarray(a, np.float32) for a in (x, w, dy)), False)
  assert_close((y, dx), (expected[0], expected[1][0]), "bfloat16")
  assert_close(dw, expected[1][1])


@every_implementation
@either_scale
@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_nan_and_infinity_reach_what_they_touch_and_nothing_else(implementation, power_of_two, bad):
  (x, w, _), (y, _) = _problem((M, D, F), power_of_two)
  bad_x, bad_w = x.copy(), w.copy()
  bad_x[7, 200] = bad
  bad_w[11, 140] = bad
  run = jax.jit(lambda x, w: q.quantized_matmul(x, w, implementation, power_of_two))
  actual = np.asarray(run(bad_x, w))
  assert np.isnan(actual[7]).all()
  assert_close(np.delete(actual, 7, axis=0), np.delete(y, 7, axis=0))
  actual = np.asarray(run(x, bad_w))
  assert np.isnan(actual[:, 128:]).all()
  assert_close(actual[:, :128], y[:, :128])


@every_implementation
def test_numbers_too_small_for_a_normal_scale(implementation):
  """A tile below 448 * 2**-126 keeps the smallest normal scale, and no NaN arises."""
  x = np.full((2, 130), 1e-37, np.float32)
  codes, scale = jax.jit(lambda x: q.quantize_rows(x, implementation))(x)
  assert (np.asarray(scale) == np.finfo(np.float32).tiny).all()
  expected = (x / np.finfo(np.float32).tiny).astype(E4M3)
  np.testing.assert_array_equal(np.asarray(codes).view(np.uint8), expected.view(np.uint8))


@either_scale
def test_blocks_are_those_of_checkpoints(power_of_two):
  """Weights that were published in FP8 keep their codes."""
  codes, scale = fp8.quantise(draw(5, F, D), power_of_two)
  weight = fp8.dequantise(codes, scale)
  actual = jax.jit(lambda w: q.quantize_blocks(w, "xla", power_of_two))(weight)
  np.testing.assert_array_equal(np.asarray(actual.codes).astype(np.float32), codes + 0.0)
  assert_close(actual.scale, scale)


def test_fine_scales_beat_one_scale_a_tensor_on_outliers():
  """Error against the matmul that is not quantised: bounded, and far below per-tensor FP8's."""
  rng = np.random.default_rng(6)
  x, w = rng.standard_normal((64, 1024)), rng.standard_normal((1024, 96))
  x[5, 17] = 3e5  # pushes what shares its scale under the smallest E4M3 number
  x, w = x.astype(np.float32), w.astype(np.float32)
  exact = x.astype(np.float64) @ w.astype(np.float64)
  fine = np.asarray(jax.jit(lambda x, w: q.quantized_matmul(x, w, "xla"))(x, w), np.float64)
  coarse = values(x, *x.shape, False) @ values(w, *w.shape, False)
  error = lambda y: np.linalg.norm(np.delete(y - exact, 5, axis=0))  # noqa: E731
  size = np.linalg.norm(np.delete(exact, 5, axis=0))
  # Half a step of 3 mantissa bits is at most 2**-4 of a number, uniformly distributed errors of
  # both operands together are below 2**-4 * sqrt(2 / 3) of the result.
  assert error(fine) < size * 2**-4 * math.sqrt(2 / 3)
  assert error(coarse) > 10 * error(fine)


def _over_two_devices(local, *args):
  """Runs local over rows in two halves, w whole, its gradient summed; replication is checked."""
  mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
  rows, whole = jax.P("data"), jax.P()

  def run(x, w, dy, *rest):
    y, vjp = jax.vjp(lambda x, w: local(x, jax.lax.pcast(w, ("data",), to="varying"), *rest), x, w)
    return y, *vjp(dy)

  in_specs = (rows, whole, rows, rows)[: len(args)]
  out_specs = (rows, rows, whole)
  return jax.jit(jax.shard_map(run, mesh=mesh, in_specs=in_specs, out_specs=out_specs))(*args)


def _both_halves(y_dx_dw):
  (y0, (dx0, dw0)), (y1, (dx1, dw1)) = y_dx_dw
  return np.concatenate([y0, y1]), np.concatenate([dx0, dx1]), dw0 + dw1


@every_implementation
def test_inside_shard_map(implementation):
  x, w, dy = draw(7, 300, 140), draw(8, 140, 130), draw(9, 300, 130)
  matmul = lambda x, w: q.quantized_matmul(x, w, implementation)  # noqa: E731
  halves = [_by_loops(x[s], w, dy[s], False) for s in (slice(0, 150), slice(150, 300))]
  assert_close(_over_two_devices(matmul, x, w, dy), _both_halves(halves))


# Experts.

E = 4


def _grouped_by_loops(x, w, dy, sizes, power_of_two):
  """Each group is a matmul of its own; rows behind the last count for nothing."""
  y, dx, dw = np.zeros(dy.shape), np.zeros(x.shape), np.zeros(w.shape)
  start = 0
  for e, size in enumerate(sizes):
    own = slice(start, start + size)
    start += size
    if size:
      y[own], (dx[own], dw[e]) = _by_loops(x[own], w[e], dy[own], power_of_two)
  return y, (dx, dw)


@functools.cache
def _grouped(implementation, power_of_two):
  @jax.jit
  def run(x, w, dy, sizes):
    y, vjp = jax.vjp(
      lambda x, w: q.quantized_grouped_matmul(x, w, sizes, implementation, power_of_two), x, w
    )
    return y, vjp(dy)

  return run


@every_grouped
@either_scale
@pytest.mark.parametrize(
  "sizes",
  [
    (130, 1, 128, 41),
    (0, 300, 0, 0),  # all rows in one group
    (0, 0, 0, 300),
    (129, 0, 0, 100),  # rows behind the last group
    (0, 0, 0, 0),
    (256, 0, 44, 0),
  ],
  ids=str,
)
def test_groups_match_loops(implementation, power_of_two, sizes):
  P, D, F = 300, 150, 140
  x, w, dy = draw(10, P, D), draw(11, E, D, F), draw(12, P, F)
  actual = _grouped(implementation, power_of_two)(x, w, dy, np.asarray(sizes, np.int32))
  assert_close(actual, _grouped_by_loops(x, w, dy, sizes, power_of_two))


@st.composite
def _ragged_sizes(draw):
  cuts = sorted(draw(st.lists(st.integers(0, 300), min_size=E, max_size=E)))
  return tuple(int(n) for n in np.diff([0, *cuts]))


@settings(max_examples=10)
@given(sizes=_ragged_sizes())
def test_ragged_groups(sizes):
  test_groups_match_loops("xla", False, sizes)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_groups_inside_shard_map(implementation):
  """Each device has sizes of its own.

  The interpreter of TPU kernels refuses scalars that vary over a mesh; those are compiled below.
  """
  x, w, dy = draw(7, 300, 140), draw(8, E, 140, 130), draw(9, 300, 130)
  sizes = np.array([[20, 0, 130, 0], [0, 100, 30, 20]], np.int32)

  def matmul(x, w, sizes):
    return q.quantized_grouped_matmul(x, w, sizes[0], implementation)

  halves = [
    _grouped_by_loops(x[s], w, dy[s], own, False)
    for s, own in zip((slice(0, 150), slice(150, 300)), sizes)
  ]
  assert_close(_over_two_devices(matmul, x, w, dy, sizes), _both_halves(halves))


@every_grouped
def test_a_nan_stays_in_its_group(implementation):
  x, w, dy = draw(10, 300, 150), draw(11, E, 150, 140), draw(12, 300, 140)
  x[140] = np.nan
  y, (_, dw) = _grouped(implementation, False)(x, w, dy, np.asarray((130, 30, 0, 60), np.int32))
  assert np.isnan(y[140]).all() and np.isfinite(np.delete(y, 140, axis=0)).all()
  assert np.isnan(dw[1]).all() and np.isfinite(np.delete(dw, 1, axis=0)).all()


# What is refused.


def test_default_implementation_is_one_of_them():
  inputs, expected = _problem((2, 3, 5), False)
  assert_close(_run(None, False, *inputs), expected)
  x, w, _ = inputs
  assert_close(q.quantized_grouped_matmul(x, w[None], np.array([2], np.int32)), expected[0])


@pytest.mark.parametrize(
  "x, w, message",
  [
    ((4, 3), (5, 2), r"x_MD and w_DF must agree on D, got 3 in \(4, 3\) and 5 in \(5, 2\)"),
    ((2, 4, 3), (3, 2), r"x_MD must have 2 dimensions, none of them 0, got \(2, 4, 3\)"),
    ((4, 3), (3,), r"w_DF must have 2 dimensions, none of them 0, got \(3,\)"),
    ((0, 3), (3, 2), r"x_MD must have 2 dimensions, none of them 0, got \(0, 3\)"),
  ],
)
def test_shapes_that_do_not_fit_are_refused(x, w, message):
  with pytest.raises(ValueError, match=message):
    q.quantized_matmul(np.zeros(x, np.float32), np.zeros(w, np.float32))


def test_integers_are_refused():
  x = np.zeros((2, 3), np.int32)
  with pytest.raises(ValueError, match="x_MD must be floating point, got int32"):
    q.quantized_matmul(x, x.T.astype(np.float32))
  with pytest.raises(ValueError, match="w_DF must be floating point, got int32"):
    q.quantize_blocks(x)


def test_unknown_implementations_are_refused():
  x = np.zeros((2, 2), np.float32)
  with pytest.raises(ValueError, match=r"implementation must be one of .*, got 'fastest'"):
    q.quantized_matmul(x, x, "fastest")
  with pytest.raises(ValueError, match=r"implementation must be one of .*, got 'megablox'"):
    q.quantized_grouped_matmul(x, x[None], np.array([2]), "megablox")


def test_groups_that_do_not_fit_are_refused():
  x, w = np.zeros((5, 3), np.float32), np.zeros((2, 3, 4), np.float32)
  with pytest.raises(ValueError, match=r"x_PD and w_EDF must agree on D, got 3 .* and 4 in"):
    q.quantized_grouped_matmul(x, w.swapaxes(1, 2), np.array([2, 3]))
  with pytest.raises(ValueError, match=r"integers of shape \(2,\), got int64 of shape \(3,\)"):
    q.quantized_grouped_matmul(x, w, np.array([2, 3, 0]))
  with pytest.raises(ValueError, match=r"integers of shape \(2,\), got float64 of shape \(2,\)"):
    q.quantized_grouped_matmul(x, w, np.array([2.0, 3.0]))


# What the kernels cost, and what the TPU compilers make of them.

V3 = (8192, 7168, 2048)  # tokens a device, hidden, an expert's inner size
CHIPS = pytest.mark.parametrize("topology", ["v5p:2x2x1", "v6e:2x2x1", "tpu7x:2x2x1"])
struct = jax.ShapeDtypeStruct


def _value_and_gradients(x, w, dy, power_of_two=False):
  y, vjp = jax.vjp(lambda x, w: q.quantized_matmul(x, w, "mosaic_tpu", power_of_two), x, w)
  return y, vjp(dy)


def _ue8m0(x, w, dy):
  return _value_and_gradients(x, w, dy, power_of_two=True)


def _v3_operands():
  M, D, F = V3
  return [struct(shape, jnp.bfloat16) for shape in [(M, D), (D, F), (M, F)]]


def _kernels(fn, *args):
  """The Pallas calls of fn(*args), by name."""
  result = collections.defaultdict(list)
  for equation in equations(jax.make_jaxpr(fn)(*args).jaxpr):
    if equation.primitive.name == "pallas_call":
      result[equation.params["name"]].append(equation)
  return result


def test_declared_cost_is_that_of_the_blocks():
  """Bytes and FLOPs at V3's shape, counted by hand from what each kernel must read and write."""
  (M, D, F), calls = V3, _kernels(_value_and_gradients, *_v3_operands())
  cost = lambda call: (  # noqa: E731
    call.params["cost_estimate"].bytes_accessed,
    call.params["cost_estimate"].flops,
  )
  quantised = lambda a, b, scales: (a * b * (2 + 1) + scales * 4, 2 * a * b)  # noqa: E731
  assert [cost(c) for c in calls["quantize_rows"]] == [
    quantised(M, D, M * D // 128),
    quantised(M, F, M * F // 128),
  ]
  assert [cost(c) for c in calls["quantize_columns"]] == [
    quantised(M, D, D * M // 128),
    quantised(M, F, F * M // 128),
  ]
  assert [cost(c) for c in calls["quantize_blocks"]] == 2 * [quantised(D, F, D * F // 128)]

  def multiplied(m, k, n, lhs_times):
    """The right operand once, the left once a block of columns."""
    codes = m * k * lhs_times + k * n
    return codes + (m * lhs_times + n) * k // 128 * 4 + m * n * 2, 2 * m * k * n

  assert [cost(c) for c in calls["quantized_matmul"]] == [
    multiplied(M, D, F, 1),
    multiplied(M, F, D, 7),
    multiplied(D, M, F, 2),
  ]


def _products(topology, fn, *args):
  """The dtypes that the matmul kernels multiply on a chip."""
  mesh = jax.sharding.Mesh(np.array(tpu_devices(topology)[:1]), ("device",))
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    (kernel,) = _kernels(fn, *args)["quantized_matmul"][:1]
  return {
    v.aval.dtype.name
    for equation in equations(kernel.params["jaxpr"])
    if equation.primitive.name == "dot_general"
    for v in equation.invars
  }


@pytest.mark.tpu
@CHIPS
def test_e4m3_is_multiplied_where_the_chip_can(topology):
  can = topology.startswith("tpu7x")
  expected = {"float8_e4m3fn" if can else "bfloat16"}
  assert _products(topology, _value_and_gradients, *_v3_operands()) == expected
  assert _products(topology, _ue8m0, *_v3_operands()) == {"bfloat16"}


@pytest.mark.tpu
@CHIPS
@either_scale
def test_compiles_at_the_shapes_of_v3(topology, power_of_two):
  """Forward and backward: nine kernels, and nothing but codes and scales between them."""
  fn = _ue8m0 if power_of_two else _value_and_gradients
  compiled = compile_for(topology, fn, *_v3_operands())
  text = compiled.as_text()
  assert len(re.findall(r'custom_call_target="tpu_custom_call"', text)) in (
    8,
    9,
  )  # w: once or twice
  M, D, F = V3
  codes = 2 * M * D + 2 * M * F + 2 * D * F
  assert compiled.memory_analysis().temp_size_in_bytes < 1.1 * codes


def _grouped_value_and_gradients(x, w, dy, sizes):
  y, vjp = jax.vjp(lambda x, w: q.quantized_grouped_matmul(x, w, sizes, "mosaic_tpu"), x, w)
  return y, vjp(dy)


@pytest.mark.tpu
@CHIPS
def test_experts_compile_at_the_shapes_of_v3(topology):
  P, D, F, E = 8192, 7168, 2048, 8
  shapes = [(P, D), (E, D, F), (P, F)]
  args = [struct(shape, jnp.bfloat16) for shape in shapes] + [struct((E,), jnp.int32)]
  compile_for(topology, _grouped_value_and_gradients, *args)


@pytest.mark.tpu
@CHIPS
def test_compiles_at_ragged_shapes_across_devices(topology):
  """Under shard_map with replication checked, partial tiles everywhere; experts too."""
  mesh = jax.sharding.Mesh(np.array(tpu_devices(topology)[:4]), ("data",))
  rows, whole = jax.P("data"), jax.P()

  def local(x, w, dy, w_EDF, sizes):
    w, w_EDF = jax.lax.pcast((w, w_EDF), ("data",), to="varying")
    y, (dx, dw) = _value_and_gradients(x, w, dy)
    grouped = _grouped_value_and_gradients(x, w_EDF, dy, sizes[0])
    return y + grouped[0], dx + grouped[1][0], jax.lax.psum((dw, grouped[1][1]), "data")

  fn = jax.shard_map(
    local, mesh=mesh, in_specs=(rows, whole, rows, whole, rows), out_specs=(rows, rows, whole)
  )
  shapes = {
    (4 * 150, 260): rows,
    (260, 140): whole,
    (4 * 150, 140): rows,
    (3, 260, 140): whole,
  }
  place = functools.partial(jax.sharding.NamedSharding, mesh)
  args = [struct(shape, jnp.bfloat16, sharding=place(spec)) for shape, spec in shapes.items()]
  sizes = struct((4, 3), jnp.int32, sharding=place(rows))
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    lowered = jax.jit(fn).lower(*args, sizes)
  assert 'custom_call_target="tpu_custom_call"' in lowered.compile().as_text()


def _product_only(lhs_codes, lhs_scale, rhs_codes, rhs_scale, power_of_two=False):
  lhs, rhs = q.Quantized(lhs_codes, lhs_scale), q.Quantized(rhs_codes, rhs_scale)
  return tpu.product(lhs, rhs, jnp.bfloat16, power_of_two)


@pytest.mark.tpu
@pytest.mark.parametrize(
  "topology, power_of_two, least",
  [
    ("v5p:2x2x1", False, 0.95),
    ("v5p:2x2x1", True, 0.9),
    ("v6e:2x2x1", True, 0.8),
    ("tpu7x:2x2x1", True, 0.75),
  ],
)
def test_matrix_units_are_busy(topology, power_of_two, least):
  """In the loop over tiles; a promotion every 128 halves a 256 deep unit, so not asked there."""
  tpu_devices(topology)
  M, D, F = V3
  args = [
    struct((M, D), E4M3),
    struct((D // 128, M), jnp.float32),
    struct((D, F), E4M3),
    struct((D // 128, F), jnp.float32),
  ]
  fn = functools.partial(_product_only, power_of_two=power_of_two)
  figures = compile_only.in_fresh_process(compile_only.tpu_figures, topology, fn, *args)
  assert figures["steady_mxu_occupancy"] >= least
