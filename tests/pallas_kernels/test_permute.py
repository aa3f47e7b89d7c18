"""One suite for every implementation of permute and combine, and the TPU's copies by themselves."""

import jax
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.permute import (
  IMPLEMENTATIONS,
  combine,
  expert_order,
  group_starts,
  in_a_group,
  permute,
  tpu,
  weights_of_rows,
)
from pallas_kernels.permute.alignment import AlignedRows
from tests.helpers import assert_close
from tests.pallas_kernels.gpu_topology import interpreted

M, K, E, D = 13, 3, 7, 5


def _order(seed, alignment=1):
  """Experts [M, K], all of a token's different, some without tokens; sizes; and the order."""
  rng = np.random.default_rng(seed)
  experts = np.array([rng.permutation([1, 2, 4, 5])[:K] for _ in range(M)], np.int32)
  ranks = np.array([[(experts[:m] == e).sum() for e in row] for m, row in enumerate(experts)])
  sizes = np.bincount(experts.reshape(-1), minlength=E)
  order = jax.jit(expert_order, static_argnums=3)
  return experts, sizes, order(experts, ranks.astype(np.int32), sizes.astype(np.int32), alignment)


@pytest.mark.parametrize("alignment", [1, 8])
def test_expert_order_keeps_tokens_in_order_and_has_its_inverse(alignment):
  experts, sizes, (pairs, rows) = _order(0, alignment)
  assert 0 in sizes
  expected = []
  for e in range(E):
    expected += [m * K + k for m in range(M) for k in range(K) if experts[m, k] == e]
    expected += [M * K] * (-len(expected) % alignment)
  expected += [M * K] * (len(pairs) - len(expected))
  assert pairs.tolist() == expected
  assert rows.reshape(-1).tolist() == [expected.index(pair) for pair in range(M * K)]
  assert pairs.dtype == rows.dtype == "int32"


every_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


def _interpreting(implementation):
  return interpreted() if implementation == "mosaic_gpu" else pltpu.force_tpu_interpret_mode()


def _by_loops(x, y, pairs):
  """The rows that are copies of tokens, zeros where none lies; and each token's sum of rows."""
  copied, summed = np.zeros(y.shape), np.zeros(x.shape)
  for p, pair in enumerate(pairs.tolist()):
    if pair < M * K:
      copied[p] = x[pair // K]
      summed[pair // K] += y[p].astype(np.float64)
  return copied, summed


@every_implementation
@pytest.mark.parametrize(
  "width, alignment, dtype", [(128, 1, "float32"), (256, 8, "bfloat16"), (384, 8, "bfloat16")]
)
def test_values_and_gradients_match_loops(implementation, width, alignment, dtype):
  """Each is the other's transpose. In bfloat16 of width 384 the TPU's rows are not packed."""
  *_, (pairs, rows) = _order(1, alignment)
  rng = np.random.default_rng(2)
  tokens, laid = (rng.standard_normal((n, width)).astype(dtype) for n in (M, len(pairs)))
  copied, summed = _by_loops(tokens.astype(np.float64), laid, pairs)

  @jax.jit
  def run(tokens, laid):
    x_PD, to_rows = jax.vjp(lambda x: permute(x, pairs, rows, implementation), tokens)
    y_MD, to_tokens = jax.vjp(lambda y: combine(y, pairs, rows, implementation), laid)
    return x_PD, to_rows(laid)[0], y_MD, to_tokens(tokens)[0]

  with _interpreting(implementation):
    x_PD, dx_MD, y_MD, dy_PD = jax.tree.map(np.asarray, run(tokens, laid))
  assert {a.dtype.name for a in (x_PD, dx_MD, y_MD, dy_PD)} == {dtype}
  own = np.asarray(pairs) < M * K  # the other rows are undefined
  assert own.all() == (alignment == 1)
  for actual in (x_PD, dy_PD):
    np.testing.assert_array_equal(actual[own].astype(np.float64), copied[own])
  assert_close((dx_MD, y_MD), (summed, summed), "op_float32" if dtype == "float32" else "bfloat16")


def test_a_shared_array_gets_the_sum_of_all_devices_gradients():
  """Inside shard_map, where each device has its own order and all the same tokens."""
  orders = [_order(seed)[2] for seed in (3, 4)]
  pairs, rows = (np.concatenate([np.asarray(order[i]) for order in orders]) for i in (0, 1))
  rng = np.random.default_rng(5)
  x, dx = rng.standard_normal((M, D)), rng.standard_normal((2 * M * K, D))
  mesh = jax.make_mesh((2,), ("data",), (jax.sharding.AxisType.Auto,))
  P = jax.sharding.PartitionSpec

  def gradient(x, pairs, rows, dx):
    return jax.vjp(lambda x: permute(x, pairs, rows, "reference"), x)[1](dx)[0]

  specs = (P(), P("data"), P("data"), P("data"))
  sharded = jax.jit(jax.shard_map(gradient, mesh=mesh, in_specs=specs, out_specs=P()))
  actual = sharded(*(np.asarray(a, np.float32) for a in (x,)), pairs, rows, dx.astype(np.float32))
  halves = [_by_loops(x, half, order[0])[1] for half, order in zip(np.split(dx, 2), orders)]
  assert_close(actual, sum(halves))


def test_weights_of_rows_and_rows_of_groups():
  _, sizes, (pairs, rows) = _order(1, 8)
  gates = np.random.default_rng(6).uniform(1, 2, (M, K)).astype(np.float32)
  weights = weights_of_rows(gates, rows, len(pairs))
  expected = [gates.reshape(-1)[p] if p < M * K else 0 for p in pairs.tolist()]
  np.testing.assert_array_equal(weights, np.asarray(expected, np.float32))
  starts = group_starts(sizes, 8)
  inside = in_a_group(len(pairs), sizes, starts)
  assert inside.tolist() == [p < M * K for p in pairs.tolist()]
  assert in_a_group(6, np.array([2, 0, 1]), np.array([1, 3, 4])).tolist() == [0, 1, 1, 0, 1, 0]


def test_rows_of_groups_are_moved_to_whole_tiles_and_back():
  sizes, starts, P = np.array([3, 0, 9], np.int32), np.array([1, 4, 5], np.int32), 16
  aligned = AlignedRows(P, sizes, starts, 1, 8)
  assert aligned.starts_E.tolist() == [0, 8, 8] and aligned.num_rows == 32
  x = np.arange(1.0, 2 * P + 1, dtype=np.float32).reshape(P, 2)
  x[[0, 4, 14, 15]] = np.nan  # outside all groups

  def there(x):
    return aligned.rows(x)

  moved, back = jax.vjp(there, x)
  np.testing.assert_array_equal(moved[:3], x[1:4])
  np.testing.assert_array_equal(moved[8:17], x[5:14])
  assert aligned.numbers(x[:, 0])[:3].tolist() == x[1:4, 0].tolist()
  assert not np.asarray(aligned.numbers(x[:, 0]))[3:8].any()
  own = np.nan_to_num(x)
  np.testing.assert_array_equal(aligned.back(moved), own)
  np.testing.assert_array_equal(back(moved)[0], own)
  unmoved = AlignedRows(16, sizes, np.array([0, 8, 8], np.int32), 8, 8)
  assert unmoved.rows(x) is x and unmoved.back(x) is x and unmoved.num_rows == 16


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"x_MD": np.zeros((M + 1, D), np.float32)}, r"x_MD must be floating point with 13 rows, got"),
    ({"x_MD": np.zeros((M, D), np.int32)}, "x_MD must be floating point with 13 rows, got int32"),
    ({"row_MK": np.zeros(M, np.int32)}, r"row_MK must be int32 of 2 dimensions, got int32 \(13,\)"),
    ({"pair_P": np.zeros(9)}, r"pair_P must be int32 of 1 dimensions, got float64 \(9,\)"),
    ({"implementation": "fastest"}, "implementation must be one of reference, .* got 'fastest'"),
    ({"implementation": "mosaic_gpu"}, "D must be a multiple of 128, at most 32768, got 5"),
  ],
)
def test_what_does_not_fit_is_refused(changes, message):
  arguments = {
    "x_MD": np.zeros((M, D), np.float32),
    "pair_P": np.zeros(M * K, np.int32),
    "row_MK": np.zeros((M, K), np.int32),
  }
  with pytest.raises(ValueError, match=message):
    permute(**arguments | changes)


def test_rows_as_many_as_the_order_has():
  with pytest.raises(ValueError, match="y_PD must be floating point with 39 rows, got float32"):
    combine(np.zeros((M, D), np.float32), np.zeros(39, np.int32), np.zeros((M, K), np.int32))


def test_combine_sums_in_float32():
  """1 + 256 - 256 in bfloat16, in this order, would be 0."""
  x = np.array([[1.0], [256.0], [-256.0]], "bfloat16")
  pairs, rows = np.array([0, 1, 2], np.int32), np.array([[0, 1, 2]], np.int32)
  out = jax.jit(combine)(x, pairs, rows)
  assert out.dtype == "bfloat16" and float(out[0, 0]) == 1


@pytest.mark.parametrize(
  "M, K, dtype, D",
  [
    *[(M, 3, *row) for M in (16, 45) for row in (("float32", 24), ("bfloat16", 512))],
    *[(45, 3, "bfloat16", 40), (45, 3, "float16", 256)],
    (18, 20, "bfloat16", 512),
  ],
)
def test_rows_travel_on_tpu_as_they_are(M, K, dtype, D):
  """Blocks of tokens over several steps, the last one partial; 16-bit rows packed or not."""
  rng = np.random.default_rng(3)
  x = rng.standard_normal((M, D)).astype(dtype)
  rows = 2 * M * K  # with gaps
  row = rng.permutation(rows)[: M * K].reshape(M, K).astype(np.int32)
  gates = rng.standard_normal((M, K)).astype(np.float32)

  @jax.jit
  def run(x, row, gates):
    words = tpu.scatter(x, row, rows)
    plain = tpu.unpack(words, dtype) if words.dtype == "uint32" else words
    return plain, *(tpu.gather_sum(words, row, dtype, g) for g in (None, gates))

  with pltpu.force_tpu_interpret_mode():
    plain, summed, weighted = run(x, row, gates)
  plain, x = np.asarray(plain, np.float64), x.astype(np.float64)
  for m, k in np.ndindex(M, K):
    np.testing.assert_array_equal(plain[row[m, k]], x[m])
  kind = "op_float32" if dtype == "float32" else "bfloat16"
  assert_close(summed, K * x, kind)
  assert_close(weighted, gates.sum(axis=1, keepdims=True) * x, kind)
  assert summed.dtype == weighted.dtype == dtype


def test_each_row_is_read_once_and_written_once_on_tpu():
  """By the kernels' own count, which grids and index maps give: V3's tokens on one device."""
  M, K, D, P = 8192, 8, 7168, 65536
  s = jax.ShapeDtypeStruct
  tokens, rows, words = s((M, D), "bfloat16"), s((M, K), np.int32), s((P, D // 2), np.uint32)
  least = 2 * D * (M + P) + 4 * M * K
  scatter = jax.make_jaxpr(lambda x, r: tpu.scatter(x, r, P))(tokens, rows)
  gather = jax.make_jaxpr(lambda y, r: tpu.gather_sum(y, r, "bfloat16"))(words, rows)
  for jaxpr in (scatter, gather):
    (call,) = [e for e in jaxpr.eqns if e.primitive.name == "pallas_call"]
    assert least <= call.params["cost_estimate"].bytes_accessed <= 1.001 * least
