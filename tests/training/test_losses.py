import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from dsmoe.config import MeshConfig
from dsmoe.parallel import collectives
from dsmoe.parallel import mesh as mesh_lib
from dsmoe.parallel.sharding import stored_spec
from dsmoe.training import losses
from tests.helpers import assert_close, largest_intermediate

M, D, V = 13, 6, 29


def _inputs(seed):
  rng = np.random.default_rng(seed)
  x = rng.standard_normal((M, D)).astype(np.float32)
  head = rng.standard_normal((D, V)).astype(np.float32)
  targets = rng.integers(0, V, M).astype(np.int32)
  weights = rng.uniform(0.2, 2, M).astype(np.float32)
  weights[[1, 5, 12]] = 0
  return x, head, targets, weights


def _by_loops(x, head, targets, weights, z_weight):
  """Returns cross-entropy, z-loss, and the gradients of their weighted total."""
  cross_entropy, z_loss = 0.0, 0.0
  x, head = np.asarray(x, np.float64), np.asarray(head, np.float64)
  dx, dhead = np.zeros(x.shape), np.zeros(head.shape)
  for m in range(len(x)):
    logits = [float(x[m] @ head[:, v]) for v in range(head.shape[1])]
    log_z = max(logits) + np.log(sum(np.exp(l - max(logits)) for l in logits))
    cross_entropy += weights[m] * (log_z - logits[targets[m]])
    z_loss += weights[m] * log_z**2
    for v in range(head.shape[1]):
      d = np.exp(logits[v] - log_z) * (1 + 2 * z_weight * log_z) - (v == targets[m])
      dx[m] += weights[m] * d * head[:, v]
      dhead[:, v] += weights[m] * d * x[m]
  return cross_entropy, z_loss, (dx, dhead)


@pytest.mark.parametrize("chunk, z_weight", [(4, 0.0), (4, 0.3), (1, 0.3), (13, 0.3), (64, 0.3)])
def test_matches_loops_in_value_and_gradient(chunk, z_weight):
  x, head, targets, weights = _inputs(0)

  def tripled(x, head):
    loss, parts = losses.chunked_cross_entropy(x, head, targets, weights, z_weight, chunk)
    return 3 * loss, parts

  @jax.jit
  def run(x, head):
    return tripled(x, head), jax.value_and_grad(tripled, argnums=(0, 1), has_aux=True)(x, head)

  undifferentiated, (differentiated, gradients) = run(x, head)
  cross_entropy, z_loss, expected = _by_loops(x, head, targets, weights, z_weight)
  values = (3 * (cross_entropy + z_weight * z_loss), (cross_entropy, z_loss))
  assert_close(undifferentiated, values)
  assert_close(differentiated, values)
  assert_close(gradients, jax.tree.map(lambda g: 3 * g, expected))
  assert not np.asarray(gradients[0])[[1, 5, 12]].any()


def test_parts_and_weights_have_no_gradient():
  x, head, targets, weights = _inputs(1)

  @jax.jit
  def run(x, head, weights):
    loss = lambda *a: losses.chunked_cross_entropy(a[0], a[1], targets, a[2], 0.3, 4)  # noqa: E731
    of_parts = jax.grad(lambda *a: sum(loss(*a)[1]), (0, 1, 2))(x, head, weights)
    return of_parts, jax.grad(lambda w: loss(x, head, w)[0])(weights)

  for gradient in jax.tree.leaves(run(x, head, weights)):
    assert not np.asarray(gradient).any()


def test_bfloat16_with_a_small_upstream_factor():
  """The factor is a mean's 1 / tokens: applied in bfloat16 too early it would cost digits."""
  x, head, targets, weights = _inputs(2)
  x, head = jnp.asarray(x, jnp.bfloat16), jnp.asarray(head, jnp.bfloat16)

  @jax.jit
  def run(x, head):
    def mean(x, head):
      return losses.chunked_cross_entropy(x, head, targets, weights, 0.1, 4)[0] / 1e6

    return jax.value_and_grad(mean, argnums=(0, 1))(x, head)

  loss, gradients = run(x, head)
  cross_entropy, z_loss, expected = _by_loops(x, head, targets, weights, 0.1)
  assert loss.dtype == jnp.float32 and {g.dtype.name for g in gradients} == {"bfloat16"}
  assert_close(loss * 1e6, cross_entropy + 0.1 * z_loss)
  assert_close([np.asarray(g, np.float64) * 1e6 for g in gradients], expected, "bfloat16")


def test_large_logits_do_not_overflow():
  x, head, targets, weights = _inputs(3)
  run = jax.jit(lambda x: losses.chunked_cross_entropy(x, head, targets, weights, 0.0, 4)[0])
  expected = _by_loops(100 * x, head, targets, weights, 0.0)[0]
  assert_close(run(100 * x), expected)


def test_logits_are_never_whole():
  M, D, V, chunk = 96, 6, 50, 8
  s = jax.ShapeDtypeStruct
  x, head = s((M, D), np.float32), s((D, V), np.float32)
  targets, weights = np.zeros(M, np.int32), np.ones(M, np.float32)

  def chunked(x, head):
    return losses.chunked_cross_entropy(x, head, targets, weights, 0.1, chunk)[0]

  for fn in (chunked, jax.grad(chunked, argnums=(0, 1))):
    assert chunk * V <= largest_intermediate(fn, x, head) < M * V // 4


def test_a_vocabulary_split_over_devices():
  """Values and gradients by loops; targets and largest logits lie on every device."""
  dims, V = ("embed", "vocab"), 28
  mesh = mesh_lib.make_mesh(MeshConfig(stage=1, data=2, expert=1, context=1, model=4))
  x, head, targets, weights = _inputs(4)
  x, head, targets, weights = x[:12], head[:, :V], (5 * targets[:12]) % V, weights[:12]
  batch, spec = mesh_lib.batch_spec(), stored_spec(dims, (D, V), mesh.shape)

  def run(x, head, targets, weights):
    def tripled(x, head):
      head_DV = collectives.gather_weight(head, dims, (D, V))
      assert head_DV.shape == (D, V // 4)
      loss, parts = losses.chunked_cross_entropy(x, head_DV, targets, weights, 0.3, 4)
      return 3 * loss, collectives.sum_over_batch((3 * loss, parts))

    gradients, values = jax.grad(tripled, argnums=(0, 1), has_aux=True)(x, head)
    return values, gradients

  out = (P(), (batch, spec))
  actual = jax.jit(mesh_lib.shard_map(run, mesh, (batch, spec, batch, batch), out))(
    x, head, targets, weights
  )
  cross_entropy, z_loss, gradients = _by_loops(x, head, targets, weights, 0.3)
  total = 3 * (cross_entropy + 0.3 * z_loss)
  expected = (total, (cross_entropy, z_loss)), jax.tree.map(lambda g: 3 * g, gradients)
  assert_close(actual, expected)
