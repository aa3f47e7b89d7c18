import jax
import jax.numpy as jnp
import numpy as np

from dsmoe.training import balance, hyperparameters
from tests.helpers import assert_close, small_config

METHODS = ("bias", "sequence")
HYPER = hyperparameters.of(
  small_config(
    **{
      "balance.bias_update_speed": 0.001,
      "balance.bias_freeze_step": -1,
      "balance.sequence_loss_weight": 0.02,
    }
  )
)


_update = jax.jit(balance.update_router_bias)


def _signs(*rows):
  """Moves at speed 1 of a bias of 0: one layer a row."""
  counts = np.array(rows, np.int32)
  moved = _update(np.zeros(counts.shape, np.float32), counts, 1)
  assert moved.dtype == jnp.float32
  return moved.astype(int).tolist()


def test_bias_moves_by_the_sign_of_mean_minus_count():
  assert _signs(
    [5, 3, 1, 3, 3],  # the mean is 3
    [4, 3, 3, 3, 4],  # 3.4
    [4, 4, 4, 3, 3],  # 3.6
    [7, 7, 7, 7, 7],
    [0, 0, 0, 0, 0],
    [9, 0, 0, 0, 0],
  ) == [
    [-1, 0, 1, 0, 0],
    [-1, 1, 1, 1, -1],
    [-1, -1, -1, 1, 1],
    [0, 0, 0, 0, 0],
    [0, 0, 0, 0, 0],
    [-1, 1, 1, 1, 1],
  ]


def test_the_comparison_is_exact_where_float32_is_not():
  n = 2**24  # n + 1 is not a float32
  counts = [n + 1, n, n - 1], [n + 1, n, n], [20 * n + 1, 20 * n, 20 * n], [n, n, n]
  assert _signs(*counts) == [[-1, 0, 1], [-1, 1, 1], [-1, 1, 1], [0, 0, 0]]


def test_bias_moves_by_the_speed():
  bias, counts = np.array([[0.5, -0.25, 0.125]], np.float32), np.array([[2, 5, 2]], np.int32)
  assert _update(bias, counts, 0.03125).tolist() == [[0.53125, -0.28125, 0.15625]]


def test_random_counts_against_a_loop():
  counts = np.random.default_rng(0).integers(0, 9, (6, 7)).tolist()
  expected = [[(7 * c < sum(row)) - (7 * c > sum(row)) for c in row] for row in counts]
  assert _signs(*counts) == expected


def test_bias_freezes_from_its_step_on():
  update = jax.jit(balance.make(METHODS, HYPER._replace(bias_freeze_step=np.int32(7))).update)
  bias, counts = np.zeros((2, 3), np.float32), np.array([[1, 2, 3], [3, 3, 0]], np.int32)
  moved = (0.001 * np.array([[1, 0, -1], [-1, -1, 1]])).astype(np.float32)
  for step, expected in ((0, moved), (6, moved), (7, 0 * moved), (800, 0 * moved)):
    np.testing.assert_array_equal(update(bias, counts, step), expected)


def test_bias_never_freezes_at_minus_one():
  update = jax.jit(balance.make(METHODS, HYPER).update)
  moved = update(np.zeros(2, np.float32), np.array([0, 2]), 10**9)
  np.testing.assert_array_equal(moved, np.array([0.001, -0.001], np.float32))


def _sequence_loss_by_loops(scores_BSE, K, frequencies=None):
  """Equations 17-20, one sequence, expert and token at a time; also returns every f."""
  B, T, E = scores_BSE.shape
  total, found = 0.0, np.zeros((B, E))
  for b in range(B):
    for i in range(E):
      chosen, share = 0, 0.0
      for t in range(T):
        s = scores_BSE[b, t].astype(np.float64)
        above = sum(s[j] > s[i] or (s[j] == s[i] and j < i) for j in range(E))
        chosen += above < K
        share += s[i] / sum(s)
      found[b, i] = E / (K * T) * chosen
      f = found[b, i] if frequencies is None else frequencies[b, i]
      total += f * share / T
  return total, found


def test_sequence_loss_matches_equations_17_to_20_and_f_has_no_gradient():
  B, T, E, K = 2, 5, 7, 3
  scores = np.random.default_rng(1).uniform(0.05, 0.95, (B, T, E)).astype(np.float32)
  scores[0, 0, 2] = scores[0, 0, 5]  # a tie
  loss, gradient = jax.jit(jax.value_and_grad(balance.sequence_loss), static_argnums=1)(scores, K)
  expected, frequencies = _sequence_loss_by_loops(scores, K)
  assert_close(loss, expected)
  expected_gradient, h = np.zeros(scores.shape), 1e-5
  for index in np.ndindex(*scores.shape):
    sides = []
    for step in (h, -h):
      moved = scores.astype(np.float64)
      moved[index] += step
      sides.append(_sequence_loss_by_loops(moved, K, frequencies)[0])
    expected_gradient[index] = (sides[0] - sides[1]) / (2 * h)
  assert_close(gradient, expected_gradient)


def test_an_even_sequence_costs_one():
  E, K = 6, 2
  scores = np.full((1, E, E), 0.1, np.float32)
  for t in range(E):
    scores[0, t, [t, (t + 1) % E]] = 0.9
  loss = jax.jit(balance.sequence_loss, static_argnums=1)
  assert_close(loss(scores, K), 1.0)
  worst = np.broadcast_to(scores[:, :1], scores.shape)
  assert_close(loss(worst, K), E / K * 1.8 / 2.2)


def test_the_loss_has_its_weight_and_the_bias_none():
  scores = np.random.default_rng(2).uniform(0.1, 0.9, (2, 3, 5)).astype(np.float32)
  expected = _sequence_loss_by_loops(scores, 2)[0]
  both = balance.make(METHODS, HYPER)
  assert_close(jax.jit(both.loss, static_argnums=1)(scores, 2), 0.02 * expected)
  assert float(balance.make(("bias",), HYPER).loss(scores, 2)) == 0


def test_sequence_alone_leaves_the_bias():
  only = balance.make(("sequence",), HYPER)
  assert only.update(jnp.asarray([0.5, 0.25]), jnp.asarray([0, 9]), 3).tolist() == [0.5, 0.25]


def test_without_methods_nothing_happens():
  none = balance.make((), HYPER)
  assert none.update(jnp.asarray([0.5, 0.25]), jnp.asarray([0, 9]), 3).tolist() == [0.5, 0.25]
  loss = none.loss(jnp.full((2, 3, 5), 0.5), 2)
  assert loss.dtype == jnp.float32 and float(loss) == 0
