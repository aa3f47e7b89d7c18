import jax
import numpy as np
import pytest
from helpers import assert_close

from pallas_kernels.permute import combine, expert_order, permute

M, K, E, D = 13, 3, 7, 5


def _order(seed):
  """Experts [M, K], all of a token's different, some without tokens; and their order."""
  rng = np.random.default_rng(seed)
  experts = np.array([rng.permutation([1, 2, 4, 5])[:K] for _ in range(M)], np.int32)
  return experts, jax.jit(expert_order, static_argnums=1)(experts, E)


def test_expert_order_is_stable_and_has_its_inverse():
  experts, (pairs, rows, sizes) = _order(0)
  flat = experts.reshape(-1).tolist()
  expected = sorted(range(M * K), key=lambda pair: (flat[pair], pair))
  assert pairs.tolist() == expected
  assert rows.reshape(-1).tolist() == [expected.index(pair) for pair in range(M * K)]
  assert sizes.tolist() == [flat.count(e) for e in range(E)] and 0 in sizes.tolist()
  assert {a.dtype.name for a in (pairs, rows, sizes)} == {"int32"}


@pytest.mark.parametrize("fn", [permute, combine])
def test_values_and_gradients_match_loops(fn):
  _, (pairs, rows, _) = _order(1)
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
