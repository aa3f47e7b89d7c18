import jax
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.permute import combine, expert_order, permute, tpu
from tests.helpers import assert_close

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


@pytest.mark.parametrize("fn", [permute, combine])
def test_values_and_gradients_match_loops(fn):
  *_, (pairs, rows) = _order(1)
  rng = np.random.default_rng(2)
  tokens = rng.standard_normal((M, D)).astype(np.float32)
  laid = rng.standard_normal((M * K, D)).astype(np.float32)
  summed, copied = np.zeros((M, D)), np.zeros((M * K, D))
  for p, pair in enumerate(pairs.tolist()):
    copied[p] = tokens[pair // K]
    summed[pair // K] += laid[p]
  # Each is the other's transpose.
  x, dy, expected = (
    (tokens, laid, (copied, summed))
    if fn is permute
    else (
      laid,
      tokens,
      (summed, copied),
    )
  )

  @jax.jit
  def run(x, dy):
    y, vjp = jax.vjp(lambda x: fn(x, pairs, rows), x)
    return y, vjp(dy)[0]

  assert_close(run(x, dy), expected)


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
