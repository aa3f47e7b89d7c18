"""The path of decoding reads the experts that were chosen and no others."""

import jax
import numpy as np
import pytest

from dsmoe.parallel import chosen
from dsmoe.parallel.experts import ExpertWeights
from pallas_kernels.routing import Routed, ranks
from tests import oracles
from tests.helpers import assert_close


@pytest.mark.parametrize("M, every", [(1, False), (2, False), (7, False), (12, False), (12, True)])
def test_few_tokens_read_chosen_experts_only(M, every):
  """Experts that no real token chose are not numbers: any use of them would show."""
  rng = np.random.default_rng(M)
  E, K, D, F = 9, 2, 6, 5
  x = rng.standard_normal((M, D)).astype(np.float32)
  expert = np.stack([rng.permutation(7)[:K] for _ in range(M)]).astype(np.int32)
  gate = rng.random((M, K)).astype(np.float32)
  real = np.arange(M) != 1
  expert[~real] = [7, 8]
  if every:
    expert[2:].ravel()[:E] = rng.permutation(E)  # pairs of different ones, and one more
    expert[2 + E // 2, 1] = (expert[2 + E // 2, 0] + 1) % E
  w_gate, w_up = rng.standard_normal((2, E, D, F)).astype(np.float32)
  w_down = rng.standard_normal((E, F, D)).astype(np.float32)
  expected = [
    sum(gate[m, k] * oracles.swiglu(x[m], w_gate[e], w_up[e], w_down[e]) for k, e in enumerate(row))
    for m, row in enumerate(expert)
  ]
  idle = sorted(set(range(E)) - set(expert[real].ravel().tolist()))
  assert idle == [] if every else {7, 8} <= set(idle)
  for w in (w_gate, w_up, w_down):
    w[idle] = np.nan
  routed = Routed(expert, gate, *ranks(expert, E)[::-1])

  def found(w_gate, w_up, w_down, *where):
    run = jax.jit(lambda x, *w: chosen.chosen(x, routed, ExpertWeights(*w, *where), real))
    return run(x, w_gate, w_up, w_down)[real]

  weights = (w_gate, w_up, w_down)
  assert_close(found(*weights), np.stack(expected)[real])
  # The same experts as the second layer of three in one array; the others are not numbers.
  among = [np.concatenate([np.full_like(w, np.nan), w, np.full_like(w, np.nan)]) for w in weights]
  assert_close(found(*among, E, E), np.stack(expected)[real])
