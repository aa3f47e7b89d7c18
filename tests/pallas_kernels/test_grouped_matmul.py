"""One suite for every implementation of the grouped SwiGLU."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from dsmoe.compilers import compile_only
from pallas_kernels.grouped_matmul import (
  IMPLEMENTATIONS,
  MATMULS,
  grouped_matmul,
  grouped_swiglu,
  routed_swiglu,
  tpu_rows,
  tpu_tiles,
)
from pallas_kernels.routing import Routed, Rule, ranks, route
from tests import oracles
from tests.helpers import assert_close
from tests.pallas_kernels.topologies import tpu_devices

E, D, F = 5, 12, 7
# test_gpu.py has mosaic_gpu: its interpreter and dtypes are others.
every_implementation = pytest.mark.parametrize(
  "implementation", sorted(IMPLEMENTATIONS.keys() - {"mosaic_gpu"})
)


@pytest.fixture(autouse=True)
def interpreted(request):
  if "tpu" in request.keywords:
    yield
    return
  with pltpu.force_tpu_interpret_mode():
    yield


@functools.cache
def _inputs(P):
  rng = np.random.default_rng(P)
  draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
  x, weight, dy = draw(P, D), draw(P), draw(P, D)
  return x, weight, draw(E, D, F) / 2, draw(E, D, F) / 2, draw(E, F, D) / 2, dy


@functools.cache
def _compiled(implementation):
  @jax.jit
  def run(x, weight, w_gate, w_up, w_down, dy, sizes):
    y, vjp = jax.vjp(
      lambda *a: grouped_swiglu(*a, sizes, implementation), x, weight, w_gate, w_up, w_down
    )
    return y, vjp(dy)

  return run


def _by_groups(x, weight, w_gate, w_up, w_down, dy, sizes):
  """Value and gradients, a group at a time in float64, the derivatives written out."""
  x, weight, w_gate, w_up, w_down, dy = (
    np.asarray(a, np.float64) for a in (x, weight, w_gate, w_up, w_down, dy)
  )
  y, dx, dweight = np.zeros(x.shape), np.zeros(x.shape), np.zeros(weight.shape)
  dw_gate, dw_up, dw_down = (np.zeros(w.shape) for w in (w_gate, w_up, w_down))
  start = 0
  for e, size in enumerate(sizes):
    mine = slice(start, start + size)
    start += size
    gate, up, scale = x[mine] @ w_gate[e], x[mine] @ w_up[e], weight[mine, None]
    sigmoid = 1 / (1 + np.exp(-gate))
    act = gate * sigmoid * up
    y[mine] = scale * (act @ w_down[e])
    dact = dy[mine] @ w_down[e].T
    dweight[mine] = (dact * act).sum(axis=1)
    dgate = scale * dact * up * sigmoid * (1 + gate * (1 - sigmoid))
    dup = scale * dact * gate * sigmoid
    dx[mine] = dgate @ w_gate[e].T + dup @ w_up[e].T
    dw_gate[e], dw_up[e] = x[mine].T @ dgate, x[mine].T @ dup
    dw_down[e] = (scale * act).T @ dy[mine]
  return y, (dx, dweight, dw_gate, dw_up, dw_down)


def _check(implementation, sizes):
  inputs = _inputs(sum(sizes))
  actual = _compiled(implementation)(*inputs, np.asarray(sizes, np.int32))
  assert_close(actual, _by_groups(*inputs, sizes))


@st.composite
def _ragged_sizes(draw):
  """E sizes, zeros among them, of one of two totals: each total is a compilation.

  1,100 rows are more than two blocks; test_sizes_over_several_blocks has more.
  """
  P = draw(st.sampled_from([41, 1100]))
  cuts = sorted(draw(st.lists(st.integers(0, P), min_size=E - 1, max_size=E - 1)))
  return tuple(int(n) for n in np.diff([0, *cuts, P]))


@pytest.mark.slow
@every_implementation
@settings(max_examples=10)
@given(sizes=_ragged_sizes())
def test_ragged_sizes(implementation, sizes):
  _check(implementation, sizes)


@every_implementation
@pytest.mark.parametrize(
  "sizes",
  [
    (0, 0, 2700, 0, 0),  # all rows in one group
    (2700, 0, 0, 0, 0),
    (0, 0, 0, 0, 2700),
    (1, 512, 513, 1024, 650),  # whole blocks and a row more
    (0, 1281, 0, 127, 1292),
    (540, 540, 540, 540, 540),
  ],
  ids=str,
)
def test_sizes_over_several_blocks(implementation, sizes):
  _check(implementation, sizes)


@every_implementation
def test_rows_taken_from_tokens(implementation):
  """With an order, rows are copies of tokens, and a token's gradient sums its copies'."""
  M, K, sizes = 900, 3, (1000, 0, 1, 1100, 599)
  x, weight, *weights, dy = _inputs(M * K)
  x = x[:M]
  pair = np.random.default_rng(0).permutation(M * K).astype(np.int32)
  row = np.argsort(pair).astype(np.int32).reshape(M, K)

  @jax.jit
  def run(sizes, order, *operands):
    y, vjp = jax.vjp(lambda *a: grouped_swiglu(*a, sizes, implementation, order), *operands)
    return y, vjp(dy)

  y, (dx, *rest) = _by_groups(x[pair // K], weight, *weights, dy, sizes)
  summed = np.zeros((M, D))
  for p in range(M * K):
    summed[pair[p] // K] += dx[p]
  actual = run(np.asarray(sizes, np.int32), (pair, row), x, weight, *weights)
  assert_close(actual, (y, (summed, *rest)))


@every_implementation
def test_bfloat16(implementation):
  sizes = (5, 0, 17, 2, 17)
  low = [jnp.asarray(a, jnp.bfloat16) for a in _inputs(41)]
  low[1] = _inputs(41)[1]  # the rows' weights stay float32
  y, gradients = _compiled(implementation)(*low, np.asarray(sizes, np.int32))
  assert y.dtype == jnp.bfloat16
  assert [g.dtype for g in gradients] == [a.dtype for a in low[:5]]
  assert_close((y, gradients), _by_groups(*low, sizes), "bfloat16")


@every_implementation
def test_rows_of_other_groups_do_not_leak(implementation):
  """Larger rows in one group change nothing in the others."""
  sizes = (10, 9, 0, 12, 10)
  inputs = list(_inputs(41))
  expected = _compiled(implementation)(*inputs, np.asarray(sizes, np.int32))
  others = np.r_[0:10, 19:41]
  inputs[0] = inputs[0].copy()
  inputs[0][10:19] *= 1e3
  y, gradients = _compiled(implementation)(*inputs, np.asarray(sizes, np.int32))
  assert_close(y[others], expected[0][others])
  assert_close(gradients[0][others], expected[1][0][others])
  for actual, before in zip(gradients[2:], expected[1][2:]):
    assert_close(np.delete(actual, 1, axis=0), np.delete(before, 1, axis=0))


@every_implementation
def test_numpy_operands_outside_jit(implementation):
  sizes = (5, 0, 17, 2, 17)
  expected, _ = _by_groups(*_inputs(41), sizes)
  *operands, _ = _inputs(41)
  order = (np.arange(41, dtype=np.int32), np.arange(41, dtype=np.int32)[:, None])
  sizes = np.asarray(sizes, np.int32)
  assert_close(grouped_swiglu(*operands, sizes, implementation, order), expected)


def test_default_implementation_is_one_of_them():
  sizes = (5, 0, 17, 2, 17)
  expected, _ = _by_groups(*_inputs(41), sizes)
  assert_close(grouped_swiglu(*_inputs(41)[:5], np.asarray(sizes, np.int32)), expected)


def _shapes(**changes):
  shapes = {
    "weight_P": (41,),
    "w_gate_EDF": (E, D, F),
    "w_up_EDF": (E, D, F),
    "w_down_EFD": (E, F, D),
  } | changes
  arrays = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
  return dict(x_PD=np.zeros((41, D), np.float32), group_sizes_E=np.zeros(E, np.int32)) | arrays


@pytest.mark.parametrize(
  "name, shape, expected",
  [
    ("weight_P", (41, 1), "(41,)"),
    ("weight_P", (42,), None),
    ("w_gate_EDF", (E, F, D), None),
    ("w_up_EDF", (E, D, F + 1), f"({E}, {D}, {F})"),
    ("w_down_EFD", (E, D, F), f"({E}, {F}, {D})"),
  ],
)
def test_shapes_that_do_not_fit_are_refused(name, shape, expected):
  with pytest.raises(ValueError) as error:
    grouped_swiglu(**_shapes(**{name: shape}))
  # None: as many rows as weights and E, F of the gate are taken as given; another is named.
  if expected is not None:
    assert str(error.value) == f"{name} must have shape {expected}, got {shape}"
  assert "must have shape" in str(error.value)


def test_sizes_must_be_integers_one_an_expert():
  with pytest.raises(ValueError, match="group_sizes_E must be integers, got float32"):
    grouped_swiglu(**_shapes() | {"group_sizes_E": np.zeros(E, np.float32)})
  with pytest.raises(ValueError, match=r"group_sizes_E must have shape \(5,\), got \(4,\)"):
    grouped_swiglu(**_shapes() | {"group_sizes_E": np.zeros(E - 1, np.int32)})


def test_weights_must_have_the_dtype_of_the_rows():
  low = {"w_up_EDF": np.zeros((E, D, F), jnp.bfloat16)}
  with pytest.raises(ValueError, match=r"w_up_EDF must have x's dtype \(float32\), got bfloat16"):
    grouped_swiglu(**_shapes() | low)


def test_unknown_implementation_is_refused():
  with pytest.raises(ValueError, match=r"implementation must be one of .*, got 'fastest'"):
    grouped_swiglu(**_shapes(), implementation="fastest")


@pytest.mark.parametrize(
  "implementation, tile", [("blocked", 64), ("mosaic_tpu", None), ("mosaic_tpu", 256)]
)
def test_routed_rows_in_bfloat16(implementation, tile):
  """On TPU, rows of whole pairs of 128 columns travel packed."""
  M, K, E, D, F = 37, 2, 3, 512, 24
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
  x, gates, dy = draw(M, D), draw(M, K), draw(M, D)
  weights = draw(E, D, F) / 8, draw(E, D, F) / 8, draw(E, F, D) / 4
  experts = np.array([rng.permutation([0, 2])[:K] for _ in range(M)], np.int32)
  rank, counts = ranks(experts, E)
  assert counts.tolist() == [M, 0, M]
  low = lambda a: jnp.asarray(a, jnp.bfloat16)  # noqa: E731

  @jax.jit
  def run(x, gates, weights, dy):
    routed = lambda g: Routed(experts, g, counts, rank)  # noqa: E731
    fn = lambda x, g, w: routed_swiglu(x, routed(g), w, implementation, tile)  # noqa: E731
    y, vjp = jax.vjp(fn, x, gates, weights)
    return y, vjp(dy)

  y, (dx, dgates, dweights) = run(low(x), gates, tuple(map(low, weights)), low(dy))
  expected_y, expected_dx, expected_dgates = np.zeros(x.shape), np.zeros(x.shape), np.zeros((M, K))
  expected_dw = [np.zeros(w.shape) for w in weights]
  for m, k in np.ndindex(M, K):
    own = [w[experts[m, k]].astype(np.float64) for w in weights]
    expected_y[m] += gates[m, k] * oracles.swiglu(x[m], *own)
    dx_m, expected_dgates[m, k], *parts = oracles.swiglu_gradients(x[m], gates[m, k], *own, dy[m])
    expected_dx[m] += dx_m
    for total, part in zip(expected_dw, parts):
      total[experts[m, k]] += part
  assert_close(
    (y, dx, dgates, *dweights), (expected_y, expected_dx, expected_dgates, *expected_dw), "bfloat16"
  )


@pytest.mark.slow
@pytest.mark.parametrize("vmem_mib, D", [(56, 200), (5, 256)], ids=["uneven", "cut"])
def test_columns_in_steps(monkeypatch, vmem_mib, D):
  """200 columns are no whole number of products; a small memory holds some of 768 at a time."""
  monkeypatch.setattr(tpu_tiles, "VMEM_BYTES", vmem_mib * 2**20)
  fits = []
  real_fit = tpu_rows._fit_rows

  def fit(N, tile, **costs):
    m, n = real_fit(N, tile, **costs)
    fits.append((m < tile, n < N))
    return m, n

  monkeypatch.setattr(tpu_rows, "_fit_rows", fit)
  sizes, P, F = np.array([0, 512, 0, 1024, 500], np.int32), 2048, 768
  rng = np.random.default_rng(3)
  draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
  inputs = draw(P, D), draw(P), draw(E, D, F) / 8, draw(E, D, F) / 8, draw(E, F, D) / 8, draw(P, D)
  inputs[0][2036:] = np.nan  # outside all groups
  inputs[5][2036:] = 0

  @jax.jit
  def run(*a):
    y, vjp = jax.vjp(lambda *a: grouped_swiglu(*a, sizes, "mosaic_tpu", alignment=512), *a[:5])
    dx, dweight, *dweights = vjp(a[5])
    return y[:2036], (dx[:2036], dweight[:2036], *dweights)

  actual = run(*inputs)
  assert_close(actual, _by_groups(*(a[:2036] if len(a) == P else a for a in inputs), sizes))
  assert {any(each) for each in zip(*fits)} == {vmem_mib == 5}


@pytest.mark.parametrize("implementation", sorted({*MATMULS} - {"mosaic_gpu"}))
def test_a_device_multiplies_the_rows_of_its_own_groups(implementation):
  """Groups 2..4 of 5, then rows outside all groups: their sizes and starts, and no others."""
  sizes = np.array([7, 0, 21, 0, 40], np.int32)
  starts, P, N = np.cumsum(sizes) - sizes, 90, 11
  x, dy = (a[:P] for a in (_inputs(2700)[0], np.random.default_rng(1).standard_normal((P, N))))
  w = np.random.default_rng(2).standard_normal((3, D, N)).astype(np.float32)
  dy = dy.astype(np.float32)
  row = np.arange(P)[:, None]
  mine = (row >= starts[2]) & (row < sizes.sum())

  @jax.jit
  def run(x, w, dy):
    fn = lambda x, w: grouped_matmul(x, w, sizes[2:], starts[2:], implementation)  # noqa: E731
    y, vjp = jax.vjp(fn, x, w)
    return jnp.where(mine, y, 0), vjp(jnp.where(mine, dy, 0))

  y, dx, dw = np.zeros((P, N)), np.zeros(x.shape), np.zeros(w.shape)
  for e in range(3):
    rows = slice(starts[e + 2], starts[e + 2] + sizes[e + 2])
    y[rows], dx[rows] = x[rows] @ w[e], dy[rows] @ w[e].T
    dw[e] = x[rows].T @ dy[rows]
  assert_close(run(x, w, dy), (y, (dx, dw)))


@pytest.mark.tpu
def test_a_layers_gradient_compiles_across_devices():
  """Routing and experts inside shard_map with its checks on; only the shared weights are summed."""
  M, K, D, F, E = 256, 2, 512, 256, 4
  mesh = jax.sharding.Mesh(np.array(tpu_devices("v5p:2x2x1")), ("data",))
  rule = Rule(K, 2, 1, "top2", "sigmoid", True, 2.5)

  def gradients(x, logits, *weights):
    def loss(x, logits, *weights):
      y = routed_swiglu(x, route(logits, None, rule, "mosaic_tpu"), weights, "mosaic_tpu")
      return jax.lax.psum(jnp.sum(y.astype(jnp.float32)), "data")

    return jax.grad(loss, range(5))(x, logits, *weights)

  P = jax.sharding.PartitionSpec
  specs = (P("data"), P("data"), P(), P(), P())
  shapes = [(4 * M, D), (4 * M, E), (E, D, F), (E, D, F), (E, F, D)]
  dtypes = [jnp.bfloat16, jnp.float32, *[jnp.bfloat16] * 3]
  args = [
    jax.ShapeDtypeStruct(shape, dtype, sharding=jax.sharding.NamedSharding(mesh, spec))
    for shape, dtype, spec in zip(shapes, dtypes, specs)
  ]
  sharded = jax.shard_map(gradients, mesh=mesh, in_specs=specs, out_specs=specs)
  text = compile_only.compile_lowered(jax.jit(sharded).lower(*args)).as_text()
  for name in ("routing_gradient", "permute", "combine", "matmul_rows", "matmul_weights"):
    assert name in text
  reduced = re.findall(r"= (.*?) all-reduce\(", text)
  assert reduced and not any(f"[{M},{D}]" in shape for shape in reduced)
