"""The exchange of one row for each chosen expert, against loops over tokens."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from dsmoe.compilers import compile_only
from dsmoe.config import ExchangeConfig, KernelsConfig, MeshConfig
from dsmoe.parallel import dispatch, ragged
from dsmoe.parallel import mesh as mesh_lib
from dsmoe.parallel.experts import ExpertWeights
from pallas_kernels.quantized_matmul import quantize_rows
from pallas_kernels.routing import Rule, route
from tests.helpers import assert_close
from tests.pallas_kernels.topologies import tpu_devices
from tests.parallel.exchanges import program
from tests.parallel.test_all_gather import TOKENS, WEIGHTS, D, E, F, K, _inputs, _sizes
from tests.parallel.test_dispatch import _by_loops, _config

KINDS = ("even", "zipf", "one_device", "empty")


def _of(receive_capacity=8.0, precision="compute_dtype", chunks=1, fallback="none", **fields):
  exchange = ExchangeConfig(receive_capacity, fallback, chunks, precision)
  return _config(dispatch="all_to_all", exchange=exchange, **fields)


def _kept(experts, X: int, capacity: float, chunks: int = 1):
  """Which rows find room, bool [tokens, K], on X devices along the axis: one row at a time."""
  M, O = len(experts) // X, E // X
  kept = np.zeros(experts.shape, bool)
  for owner in range(X):
    for chunk in range(chunks):
      room = int(np.ceil(capacity * M * K / chunks))
      for source in range(X):
        first = source * M + chunk * (M // chunks)
        for e in range(owner * O, (owner + 1) * O):
          for m in range(first, first + M // chunks):
            for k in np.flatnonzero(experts[m] == e):
              kept[m, k] = room > 0
              room -= 1
  return kept


def _sent(experts, kept, X: int) -> list[int]:
  """Rows that each device sends to others, counted one by one."""
  home = np.arange(len(experts))[:, None] // (len(experts) // X)
  remote = kept & (experts // (E // X) != home)
  return [int(remote[(home == x)[:, 0]].sum()) for x in range(X)]


def _by_loops_of(kept, x, experts, gates, weights, dy):
  """`_by_loops` without the dropped rows, whose gates get no gradient."""
  y, (dx, dgates, dweights) = _by_loops(x, experts, gates * kept, weights, dy)
  return y, (dx, dgates * kept, dweights)


def _check(run, kind: str, tokens: int, data: int, expert: int, capacity: float, chunks: int = 1):
  """Returns how many rows were dropped."""
  inputs = _inputs(kind, tokens * data * expert)
  actual, stats = run(*inputs)
  parts = np.split(inputs[1], data)
  kept = [_kept(part, expert, capacity, chunks) for part in parts]
  assert_close(actual, _by_loops_of(np.concatenate(kept), *inputs))
  sent = [_sent(part, k, expert) for part, k in zip(parts, kept)]
  np.testing.assert_array_equal(stats.sent_rows, np.concatenate(sent))
  dropped = [(~k).reshape(expert, -1).sum(axis=1) for k in kept]
  np.testing.assert_array_equal(stats.dropped_rows, np.concatenate(dropped))
  return stats.dropped_rows.sum()


@pytest.mark.parametrize("data, expert, tokens", [(1, 2, 5), (2, 4, 5), (1, 8, 1), (2, 1, 3)])
def test_matches_loops_in_value_and_every_gradient(data, expert, tokens):
  run = program(_of(), data, expert)
  for kind in KINDS:
    assert _check(run, kind, tokens, data, expert, 8.0) == 0


def test_rows_that_find_room_are_exact_and_the_others_are_counted_once():
  run = program(_of(0.75), 2, 4)
  dropped = [_check(run, kind, 5, 2, 4, 0.75) for kind in KINDS]
  assert all(dropped) and len(set(dropped)) > 1


@pytest.mark.slow
def test_chunks_of_tokens_have_buffers_of_their_own():
  assert _check(program(_of(chunks=3), 1, 4), "zipf", 6, 1, 4, 8.0, 3) == 0
  assert _check(program(_of(0.75, chunks=3), 1, 4), "zipf", 6, 1, 4, 0.75, 3) > 0


def test_under_scan_and_rematerialisation():
  x, experts, gates, weights, dy = inputs = _inputs("zipf", 24)
  actual, _ = program(_of(), 2, 4, twice=True)(*inputs)
  middle, _ = _by_loops(*inputs)
  y, (dmiddle, dgates, dweights) = _by_loops(middle, experts, gates, weights, dy)
  _, (dx, first_dgates, first_dweights) = _by_loops(x, experts, gates, weights, dmiddle)
  dweights = tuple(a + b for a, b in zip(dweights, first_dweights))
  assert_close(actual, (y, (dx, dgates + first_dgates, dweights)))


def test_layers_that_would_drop_rows_are_computed_by_an_exact_path():
  """One group of devices overflows, the other does not, and both take the same path."""
  run = program(_of(1.5, fallback="layer"), 2, 4)
  even, skewed = _inputs("even", 40), _inputs("one_device", 40)
  for second_half in (even, skewed):
    experts = np.concatenate([even[1][:20], second_half[1][20:]])
    inputs = (even[0], experts, *even[2:])
    assert _kept(experts[:20], 4, 1.5).all()
    assert _kept(experts[20:], 4, 1.5).all() == (second_half is even)
    actual, stats = run(*inputs)
    assert_close(actual, _by_loops(*inputs))
    assert not stats.dropped_rows.any()
    # Counted once, not by every device.
    assert stats.fallbacks.tolist() == [second_half is skewed] + [0] * 7
    every = np.ones((20, K), bool)
    sent = [_sent(part, every, 4) for part in np.split(experts, 2)]
    np.testing.assert_array_equal(stats.sent_rows, np.concatenate(sent))


def test_an_exact_path_under_scan_and_rematerialisation():
  inputs = _inputs("one_device", 24)
  actual, stats = program(_of(0.75, fallback="layer"), 2, 4, twice=True)(*inputs)
  expected, _ = program(_of(), 2, 4, twice=True)(*inputs)
  assert_close(actual, expected)
  assert not stats.dropped_rows.any() and stats.fallbacks.tolist() == [1] + [0] * 7


@pytest.mark.parametrize("precision", ["compute_dtype", "fp8_ue8m0"])
def test_rows_in_fp8_are_those_that_quantisation_leaves(precision):
  """What arrives is codes times scales; the gradient is that of the unrounded rows."""
  config = _of(0.75, precision="fp8", matmul_precision=precision)
  experts = _inputs("zipf", 24)[1]
  wide, rng = 130, np.random.default_rng(5)  # two tiles, the second of two numbers
  draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
  weights = tuple(0.1 * draw(*s) for s in ((E, wide, F), (E, wide, F), (E, F, wide)))
  x, dy, gates = draw(24, wide), draw(24, wide), 1 + rng.random((24, K), np.float32)
  actual, stats = program(config, 1, 4)(x, experts, gates, weights, dy)
  assert stats.dropped_rows.sum() == (~_kept(experts, 4, 0.75)).sum() > 0
  codes, scale = quantize_rows(x, "reference", precision == "fp8_ue8m0")
  rounded = np.asarray(codes, np.float32) * np.repeat(np.asarray(scale).T, 128, axis=1)[:, :wide]
  if precision == "compute_dtype":
    kept = _kept(experts, 4, 0.75)
    assert_close(actual, _by_loops_of(kept, rounded, experts, gates, weights, dy))
  else:
    plain = _of(0.75, matmul_precision=precision)
    assert_close(actual, program(plain, 1, 4)(rounded, experts, gates, weights, dy)[0])


def test_experts_in_fp8_equal_one_device():
  inputs = _inputs("zipf", 24)
  expected, _ = program(_config(dispatch="local", matmul_precision="fp8"), 1, 1)(*inputs)
  assert_close(program(_of(matmul_precision="fp8"), 1, 4)(*inputs)[0], expected)


@pytest.mark.parametrize("expert, remote", [(4, 6), (8, 7)])
def test_a_token_is_sent_once_for_each_remote_expert(expert, remote):
  """Top 8 of 256 experts, each chosen equally often by the tokens of every device."""
  E, M = 256, 32
  experts = np.tile(np.arange(M)[:, None] + M * np.arange(8), (expert, 1)).astype(np.int32)
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
  x, dy, gates = draw(M * expert, D), draw(M * expert, D), draw(M * expert, 8)
  weights = (draw(E, D, 2), draw(E, D, 2), draw(E, 2, D))
  _, stats = program(_of(1.0), 1, expert)(x, experts, gates, weights, dy)
  assert stats.sent_rows.tolist() == [remote * M] * expert
  assert not stats.dropped_rows.any()


def test_what_cannot_be_is_refused(monkeypatch):
  with pytest.raises(ValueError, match=r"moe_chunks \(4\) must divide the tokens .* \(6\)"):
    program(_of(chunks=4), 1, 2)(*_inputs("even", 12))
  monkeypatch.setattr(ragged.collectives, "devices_along", lambda _: 64)
  monkeypatch.setattr(ragged.platforms, "current", lambda: "gpu")
  with pytest.raises(ValueError, match=r"mesh.expert \(64\) must be at most 32 on GPU"):
    ragged.move(jnp.zeros((4, 3)), 4, *[jnp.zeros(64, jnp.int32)] * 4)


def _lowered_for_v5p(config, M: int, E: int, D: int, F: int, K: int):
  """Returns the layer's value and gradient, lowered for 2 x 2 chips, M tokens each."""
  mesh_config = MeshConfig(stage=1, data=2, expert=2, context=1, model=1)
  mesh = mesh_lib.make_mesh(mesh_config, tpu_devices("v5p:2x2x1"))
  rule = Rule(K, 2, 1, "top2", "sigmoid", True, 2.5)

  def one_device(x, logits, *weights):
    own = [jax.lax.all_gather(w, "data", axis=1, tiled=True) for w in weights]
    routed = route(logits, None, rule, "mosaic_tpu")
    y, stats = dispatch.BACK_ENDS["all_to_all"](x, routed, ExpertWeights(*own), config)
    return y, stats.dropped_rows[None]

  specs = (TOKENS, TOKENS, WEIGHTS, WEIGHTS, WEIGHTS)
  counts = PartitionSpec(("data", "expert"))
  split = mesh_lib.shard_map(one_device, mesh, specs, (TOKENS, counts))
  shapes = [(4 * M, D), (4 * M, E), (E, D, F), (E, D, F), (E, F, D)]
  dtypes = [jnp.bfloat16, jnp.float32, *[jnp.bfloat16] * 3]
  args = [
    jax.ShapeDtypeStruct(shape, dtype, sharding=jax.sharding.NamedSharding(mesh, spec))
    for shape, dtype, spec in zip(shapes, dtypes, specs)
  ]

  def gradients(*args):
    y, vjp, dropped = jax.vjp(split, *args, has_aux=True)
    return vjp(y), dropped

  return jax.jit(gradients).lower(*args)


@pytest.mark.tpu
def test_compiles_for_a_tpu_with_its_kernels_and_sums_no_rows():
  M, D, E, F, K = 256, 512, 4, 256, 2
  kernels = KernelsConfig(grouped_matmul="mosaic_tpu")
  fields = dict(kernels=kernels, n_group=2, n_routed_experts=E, num_experts_per_tok=K)
  text = compile_only.compile_lowered(_lowered_for_v5p(_of(1.5, **fields), M, E, D, F, K)).as_text()
  for name in ("matmul_rows", "matmul_weights", "all-gather", "reduce-scatter"):
    assert name in text
  # There and back, and the same for the gradient: M K rows at one end, the buffer at the other.
  exchanged = re.findall(r"= (\S+) ragged-all-to-all(?:-start)?\(", text)
  rows = sorted(sizes[0] for shape in exchanged for sizes in _sizes(shape))
  buffer = M * K * 3 // 2
  assert len(rows) == 4 and rows[:2] == [M * K] * 2 and rows[2] == rows[3] >= buffer
  # Only counts may be summed over devices: nothing is as large as the gates of the tokens.
  shapes = re.findall(r"= (.*?) all-reduce(?:-start)?\(", text)
  assert all(math.prod(sizes) < M * K for shape in shapes for sizes in _sizes(shape))
