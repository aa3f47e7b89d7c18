"""The rows that travel round the ring, and what hides them."""

import re

import jax
import numpy as np
import pytest

from dsmoe.compilers import hlo
from dsmoe.parallel import mesh as mesh_lib
from dsmoe.parallel import ring
from dsmoe.parallel.experts import ExpertWeights
from pallas_kernels.routing import Routed, ranks
from tests.helpers import equations
from tests.parallel.exchanges import tpu_gradients
from tests.parallel.test_all_gather import TOKENS, WEIGHTS, D, E, F, K, _inputs, _mesh
from tests.parallel.test_dispatch import _config


def _forward(mesh, config):
  def forward(x, experts, gates, weights):
    routed = Routed(experts, gates, *ranks(experts, E)[::-1])
    return ring.ring(x, routed, ExpertWeights(*weights), config)[0]

  spec = (TOKENS, TOKENS, TOKENS, (WEIGHTS, WEIGHTS, WEIGHTS))
  return mesh_lib.shard_map(forward, mesh, spec, TOKENS)


def test_every_token_passes_every_other_device_once():
  """Of X devices: X - 1 hops of a token, X of its sum, the first of which carries zeros."""
  X, M = 4, 5
  arguments = _inputs("even", M * X)[:4]
  compiled = jax.jit(_forward(_mesh(1, X), _config())).lower(*arguments).compile()
  computations, entry = hlo.parse(compiled.as_text())
  rows = 0
  for instruction, _, times in hlo.executed(computations, entry):
    if instruction.opcode.startswith("collective-permute"):
      sizes = re.findall(rf"f32\[(\d+),{D}\]", instruction.shape)
      rows += times * sum(map(int, sizes))
  assert rows == M * (2 * X - 1)


def test_the_backward_pass_keeps_no_other_device_s_tokens():
  """No pass round the ring leaves an array with a part for each step."""
  X, M, s = 8, 4, jax.ShapeDtypeStruct
  x, gates = s((M * X, D), np.float32), s((M * X, K), np.float32)
  weights = (s((E, D, F), np.float32), s((E, D, F), np.float32), s((E, F, D), np.float32))
  forward = _forward(_mesh(1, X), _config())
  gradients = jax.value_and_grad(lambda *a: forward(*a).sum(), (0, 2, 3))
  jaxpr = jax.make_jaxpr(gradients)(x, s((M * X, K), np.int32), gates, weights).jaxpr
  rounds = [
    e for e in equations(jaxpr) if e.primitive.name == "scan" and e.params["length"] == X - 2
  ]
  assert len(rounds) == 2
  # What a scan gives out beyond what it carries has a leading dimension of its steps.
  assert all(var.aval.shape[:1] != (X - 2,) for e in rounds for var in e.outvars)


@pytest.mark.tpu
def test_transfers_hide_behind_experts_on_a_tpu():
  """In every step both are on their way while the kernels of the experts run."""
  text = tpu_gradients("ring", data=1, expert=4, M=1024, D=1024, E=16, F=512, K=4)
  computations, entry = hlo.parse(text)
  rounds = 0
  for name, body in computations.items():
    at = {i.name: place for place, i in enumerate(body)}
    done = {i.operands[0]: at[i.name] for i in body if i.opcode == "collective-permute-done"}
    rows = [i for i in body if i.opcode == "collective-permute-start" and "bf16" in i.shape]
    # The two ways to compute a block: with little room, and with room for all there can be.
    experts = [at[i.name] for i in body if i.opcode == "conditional"]
    if name != entry and rows:
      rounds += 1
      assert len(rows) == 2  # one each way
      hidden = [sum(at[i.name] < e < done[i.name] for e in experts) for i in rows]
      assert len(experts) == 1 and hidden == [1, 1]
  assert rounds == 2  # forward and backward
