"""GPU kernels: values by the interpreter on CPU, and what the H100's compiler makes of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsmoe.compilers.gpu_resources import h100_resources
from pallas_kernels.grouped_matmul import gpu as grouped_matmul
from pallas_kernels.grouped_matmul import routed_swiglu
from pallas_kernels.mla_attention import gpu as attention
from pallas_kernels.permute import gpu as permute
from pallas_kernels.quantized_matmul import gpu as quantized
from pallas_kernels.quantized_matmul import reference as quantized_reference
from pallas_kernels.quantized_matmul.e4m3 import Quantized
from pallas_kernels.routing import gpu as routing
from pallas_kernels.routing import reference as routing_reference
from pallas_kernels.routing.reference import Routed, Rule
from tests.helpers import assert_close
from tests.pallas_kernels.gpu_topology import compile_for_h100, interpreted

# The interpreter of these kernels takes a minute for them all.
pytestmark = [pytest.mark.slow, pytest.mark.hopper]

b16 = jnp.bfloat16


def _run(fn, *args):
  """fn(*args) by the interpreter, as NumPy arrays."""
  with interpreted():
    return jax.tree.map(np.asarray, jax.jit(lambda *a: fn(*a))(*args))


# permute: M tokens, K choices, D numbers, P rows.


@pytest.mark.parametrize("dtype", [np.float32, b16], ids=["float32", "bfloat16"])
def test_permute_copies_each_token_to_its_rows(dtype):
  M, K, D, P = 5, 3, 256, 20
  rng = np.random.default_rng(0)
  x = rng.standard_normal((M, D)).astype(dtype)
  rows = rng.permutation(P)[: M * K].reshape(M, K).astype(np.int32)
  rows[1, 2], rows[4, 0] = -1, P  # no copies
  y = _run(lambda x, rows: permute.permute(x, rows, P), x, rows)
  assert y.shape == (P, D) and y.dtype == dtype
  for m in range(M):
    for k in range(K):
      if 0 <= rows[m, k] < P:
        np.testing.assert_array_equal(y[rows[m, k]], x[m])


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype, kind", [(np.float32, "op_float32"), (b16, "bfloat16")])
def test_combine_sums_each_tokens_rows(dtype, kind, weighted):
  M, K, D, P = 5, 3, 384, 20
  rng = np.random.default_rng(1)
  y = rng.standard_normal((P, D)).astype(dtype)
  rows = rng.integers(0, P, (M, K)).astype(np.int32)
  weights = rng.standard_normal((M, K)).astype(np.float32)
  args = (y, rows, weights) if weighted else (y, rows)
  expected = np.zeros((M, D))
  for m in range(M):
    for k in range(K):
      expected[m] += (weights[m, k] if weighted else 1) * y[rows[m, k]].astype(np.float64)
  actual = _run(permute.combine, *args)
  assert actual.dtype == dtype
  assert_close(actual, expected, kind)


def test_combine_in_parts_of_a_row():
  """Rows longer than a block has room for are summed a part at a time."""
  M, K, D = 2, 9, 1536  # three parts of 512
  y = np.random.default_rng(2).standard_normal((M * K, D)).astype(np.float32)
  rows = np.arange(M * K, dtype=np.int32).reshape(M, K)
  assert K * D * 4 > permute.BLOCK_BYTES
  assert_close(_run(permute.combine, y, rows), y.astype(np.float64).reshape(M, K, D).sum(1))


def test_rows_must_be_whole_lanes():
  with pytest.raises(ValueError, match="D must be a multiple of 128, at most 32768, got 200"):
    permute.permute(np.zeros((4, 200), np.float32), np.zeros((4, 2), np.int32), 8)


# grouped matmuls: groups of more than a tile, empty, short; rows after the last group.

SIZES = (130, 0, 7)
GAP = 5  # rows before the last group that belong to none


def _grouped_inputs(D, F, seed=0):
  """Integers, so that products are exact in bfloat16 and their sums in float32."""
  rng = np.random.default_rng(seed)
  E, P = len(SIZES), sum(SIZES) + GAP + 9
  draw = lambda *shape: rng.integers(-2, 3, shape).astype(b16)  # noqa: E731
  x, dy = draw(P, D), draw(P, F)
  starts = np.cumsum([0, *SIZES[:-1]]).astype(np.int32)
  starts[-1] += GAP
  own = [slice(start, start + size) for start, size in zip(starts, SIZES)]
  outside = np.ones(P, bool)
  for rows in own:
    outside[rows] = False
  x[outside], dy[outside] = np.nan, np.nan
  return x, dy, draw(E, D, F), draw(E, D, F), np.asarray(SIZES, np.int32), starts, own


def _by_groups(fn, own, shape):
  out = np.full(shape, np.nan)
  for e, rows in enumerate(own):
    out[rows] = fn(e, rows)
  return out


def _assert_own_rows(actual, expected, own, kind="op_float32"):
  rows = np.r_[tuple(own)]
  assert_close(actual[rows], expected[rows], kind)


def test_grouped_matmul():
  D, F = 192, 64
  x, _, w, _, sizes, starts, own = _grouped_inputs(D, F)
  y = _run(grouped_matmul.grouped_matmul, x, w, sizes, starts)
  x64, w64 = x.astype(np.float64), w.astype(np.float64)
  assert y.dtype == b16
  _assert_own_rows(y, _by_groups(lambda e, rows: x64[rows] @ w64[e], own, y.shape), own, "bfloat16")


def test_grouped_matmul_of_groups_without_gaps():
  D, F, sizes = 64, 128, (3, 0, 64)
  rng = np.random.default_rng(0)
  x, w = rng.standard_normal((67, D)).astype(b16), rng.standard_normal((3, D, F)).astype(b16)
  y = _run(grouped_matmul.grouped_matmul, x, w, np.asarray(sizes, np.int32))
  x64, w64 = x.astype(np.float64), w.astype(np.float64)
  assert_close(y, np.concatenate([x64[:3] @ w64[0], x64[3:] @ w64[2]]), "bfloat16")


def test_grouped_matmul_transposed():
  D, F = 64, 128
  _, dy, w, _, sizes, starts, own = _grouped_inputs(D, F)
  dx = _run(grouped_matmul.grouped_matmul_transposed, dy, w, sizes, starts)
  dy64, w64 = dy.astype(np.float64), w.astype(np.float64)
  expected = _by_groups(lambda e, rows: dy64[rows] @ w64[e].T, own, dx.shape)
  _assert_own_rows(dx, expected, own, "bfloat16")


def test_grouped_matmul_weights():
  """Zeros for an empty group; what lies in rows of no group, NaN, is not seen."""
  D, F = 128, 64
  x, dy, *_, sizes, starts, own = _grouped_inputs(D, F)
  dw = _run(grouped_matmul.grouped_matmul_weights, x, dy, sizes, starts)
  x64, dy64 = x.astype(np.float64), dy.astype(np.float64)
  assert dw.dtype == np.float32
  assert_close(dw, np.stack([x64[rows].T @ dy64[rows] for rows in own]))


def test_ragged_sizes():
  """Drawn sizes, zeros among them, of one total and less: one compilation for all."""
  E, P, D, F = 5, 150, 128, 64
  x, w, dy = (
    np.random.default_rng(7).integers(-2, 3, shape).astype(b16)
    for shape in ((P, D), (E, D, F), (P, F))
  )
  x64, w64, dy64 = (a.astype(np.float64) for a in (x, w, dy))
  with interpreted():
    run = jax.jit(
      lambda sizes: (
        grouped_matmul.grouped_matmul(x, w, sizes),
        grouped_matmul.grouped_matmul_weights(x, dy, sizes),
      )
    )
    for seed in range(6):
      rng = np.random.default_rng(seed)
      cuts = np.sort(rng.integers(0, P + 1, E))
      cuts[rng.integers(1, E)] = cuts[0]  # an empty group
      sizes = np.diff(np.sort(cuts), prepend=0).astype(np.int32)
      assert 0 in sizes
      own = np.repeat(np.arange(E), sizes)
      y, dw = run(sizes)
      assert_close(y[: own.size], np.einsum("pd,pdf->pf", x64[: own.size], w64[own]), "bfloat16")
      expected = [x64[: own.size][own == e].T @ dy64[: own.size][own == e] for e in range(E)]
      assert_close(dw, np.stack(expected))


def test_grouped_swiglu_in():
  D, F = 64, 128
  x, _, w_gate, w_up, sizes, starts, own = _grouped_inputs(D, F)
  gate, up = _run(grouped_matmul.grouped_swiglu_in, x, w_gate, w_up, sizes, starts)
  x64 = x.astype(np.float64)
  for actual, w64 in ((gate, w_gate.astype(np.float64)), (up, w_up.astype(np.float64))):
    products = [x64[rows] @ w_DF for rows, w_DF in zip(own, w64)]
    _assert_own_rows(
      actual, _by_groups(lambda e, _, y=products: y[e], own, actual.shape), own, "bfloat16"
    )


def test_grouped_swiglu_and_its_gradients():
  D, F = 256, 128
  x, _, _, _, sizes, starts, own = _grouped_inputs(D, F)
  rng = np.random.default_rng(3)
  outside = np.isnan(x[:, 0].astype(np.float32))
  P, E = len(x), len(SIZES)
  x = rng.standard_normal((P, D)).astype(b16)
  dy = rng.standard_normal((P, D)).astype(b16)
  weight = rng.standard_normal(P).astype(np.float32)
  x[outside], dy[outside], weight[outside] = np.nan, np.nan, np.nan
  w_gate, w_up = (rng.standard_normal((2, E, D, F)) / D**0.5).astype(b16)
  w_down = (rng.standard_normal((E, F, D)) / F**0.5).astype(b16)

  def fn(x, weight, w_gate, w_up, w_down, dy, sizes, starts):
    y, vjp = jax.vjp(
      lambda *a: grouped_matmul.grouped_swiglu(*a, sizes, starts), x, weight, w_gate, w_up, w_down
    )
    return y, *vjp(dy)

  y, dx, dweight, *dw = _run(fn, x, weight, w_gate, w_up, w_down, dy, sizes, starts)
  x, weight, w_gate, w_up, w_down, dy = (
    a.astype(np.float64) for a in (x, weight, w_gate, w_up, w_down, dy)
  )
  expected = [np.zeros(a.shape) for a in (x, x, weight, w_gate, w_up, w_down)]
  y_, dx_, dweight_, dw_gate_, dw_up_, dw_down_ = expected
  for e, rows in enumerate(own):
    gate, up, scale = x[rows] @ w_gate[e], x[rows] @ w_up[e], weight[rows, None]
    sigmoid = 1 / (1 + np.exp(-gate))
    act = gate * sigmoid * up
    y_[rows] = scale * act @ w_down[e]
    dact = dy[rows] @ w_down[e].T
    dweight_[rows] = (dact * act).sum(axis=1)
    dgate = scale * dact * up * sigmoid * (1 + gate * (1 - sigmoid))
    dup = scale * dact * gate * sigmoid
    dx_[rows] = dgate @ w_gate[e].T + dup @ w_up[e].T
    dw_gate_[e], dw_up_[e] = x[rows].T @ dgate, x[rows].T @ dup
    dw_down_[e] = (scale * act).T @ dy[rows]
  for actual, value in ((y, y_), (dx, dx_), (dweight, dweight_)):
    _assert_own_rows(actual, value, own, "bfloat16")
  assert_close(dw, [dw_gate_, dw_up_, dw_down_], "bfloat16")


def test_grouped_matmul_refuses():
  x, w = np.zeros((8, 96), b16), np.zeros((2, 96, 64), b16)
  sizes = np.array([3, 5], np.int32)
  with pytest.raises(ValueError, match="K must be a multiple of 64, got 96"):
    grouped_matmul.grouped_matmul(x, w, sizes)
  with pytest.raises(ValueError, match="one dtype, bfloat16 or float16, got float32, bfloat16"):
    grouped_matmul.grouped_matmul(x.astype(np.float32), w, sizes)
  with pytest.raises(ValueError, match="D must be a multiple of 128, got 192"):
    grouped_matmul.grouped_matmul_weights(np.zeros((8, 192), b16), np.zeros((8, 64), b16), sizes)


# routing: the oracle of tests/model/test_routing.py goes over tokens; its reference is as exact.

RULES = {
  "V3": Rule(3, 4, 2, "top2", "sigmoid", True, 2.5),
  "V2": Rule(2, 5, 3, "max", "softmax", False, 16.0),
  "V4": Rule(3, 1, 1, "top2", "sqrtsoftplus", True, 1.5),
}
EXPERTS = {"V3": 128, "V2": 40, "V4": 64}  # groups of whole registers, of lanes, and none
TOKENS = 37  # more than a block, no multiple of anything


def _scores64(logits, scoring_func):
  logits = logits.astype(np.float64)
  if scoring_func == "sigmoid":
    return 1 / (1 + np.exp(-logits))
  if scoring_func == "softmax":
    exp = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exp / exp.sum(axis=1, keepdims=True)
  return np.sqrt(np.log1p(np.exp(logits)))


def _best(values, how_many):
  return sorted(range(len(values)), key=lambda i: (-values[i], i))[:how_many]


def _choose(scores, bias, rule):
  """One token's experts in order of preference."""
  biased = [s + b for s, b in zip(scores, bias)]
  E, G = len(biased), rule.n_group
  groups = [list(range(g * E // G, (g + 1) * E // G)) for g in range(G)]
  best = 2 if rule.group_score == "top2" else 1
  ranks = [sum(sorted((biased[e] for e in group), reverse=True)[:best]) for group in groups]
  allowed = sorted(e for g in _best(ranks, rule.topk_group) for e in groups[g])
  return [allowed[i] for i in _best([biased[e] for e in allowed], rule.num_experts_per_tok)]


def _logits(E, seed):
  """Of few values, and a token whose experts all tie."""
  rng = np.random.default_rng(seed)
  logits = (np.round(rng.standard_normal((TOKENS, E)) * 4) / 4).astype(np.float32)
  logits[5] = 0.5
  return logits


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("name", RULES)
def test_routing(name, biased):
  rule, E = RULES[name], EXPERTS[name]
  logits = _logits(E, 0)
  # So far apart that float32 ranks them as float64 does, except exact ties.
  bias = np.random.default_rng(1).integers(-8, 9, E).astype(np.float32) / 2 if biased else None
  expert, gate, counts, rank = _run(
    lambda logits, bias: routing.route(logits, bias, rule), logits, bias
  )
  scores = _scores64(logits, rule.scoring_func)
  seen = np.zeros(E, np.int32)
  for m in range(TOKENS):
    chosen = _choose(scores[m], np.zeros(E) if bias is None else bias, rule)
    assert expert[m].tolist() == chosen
    gates = scores[m][chosen]
    if rule.norm_topk_prob:
      gates = gates / gates.sum()
    assert_close(gate[m], gates * rule.routed_scaling_factor)
    assert rank[m].tolist() == seen[chosen].tolist()
    seen[chosen] += 1
  assert counts.tolist() == seen.tolist()
  assert 0 in counts
  assert {a.dtype.name for a in (expert, counts, rank)} == {"int32"}


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("name", RULES)
def test_routing_gradient(name, normalised):
  rule, E = RULES[name]._replace(norm_topk_prob=normalised), EXPERTS[name]
  logits = _logits(E, 2)
  dgate = np.random.default_rng(3).standard_normal((TOKENS, rule.num_experts_per_tok))
  dgate = dgate.astype(np.float32)

  def gradient(fn):
    return lambda logits: jax.grad(lambda x: jnp.sum(fn(x, None, rule).gate_MK * dgate))(logits)

  expected = jax.jit(gradient(routing_reference.route))(logits)
  assert_close(_run(gradient(routing.route), logits), expected)


# attention: B rows, S tokens, H heads, A query and key dim, U value dim.


def _attention_inputs(B, S, H, A, U):
  rng = np.random.default_rng(4)
  shapes = [(B, S, H, A), (B, S, H, A), (B, S, H, U), (B, S, H, U)]
  segments = np.sort(rng.integers(0, 4, (B, S)), axis=1).astype(np.int32)
  return [rng.standard_normal(shape).astype(b16) for shape in shapes], segments


def _attention64(q, k, v, dout, segments, scale):
  """The output and the gradients to q, k and v, one row and head at a time."""
  q, k, v, dout = (a.astype(np.float64) for a in (q, k, v, dout))
  out, dq, dk, dv = (np.zeros(a.shape) for a in (v, q, k, v))
  S = q.shape[1]
  for b, h in np.ndindex(q.shape[0], q.shape[2]):
    seen = np.tril(np.ones((S, S), bool))
    if segments is not None:
      seen &= segments[b, :, None] == segments[b, None, :]
    logits = np.where(seen, scale * q[b, :, h] @ k[b, :, h].T, -np.inf)
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    out[b, :, h] = p @ v[b, :, h]
    dp = dout[b, :, h] @ v[b, :, h].T
    dlogits = p * (dp - (dp * p).sum(axis=1, keepdims=True))
    dq[b, :, h], dk[b, :, h] = scale * dlogits @ k[b, :, h], scale * dlogits.T @ q[b, :, h]
    dv[b, :, h] = p.T @ dout[b, :, h]
  return out, dq, dk, dv


@pytest.mark.skipif(
  jax.__version_info__ >= (0, 11) and jax.default_backend() == "cpu",
  reason="jax 0.12's interpreter knows no products of registers",
)
@pytest.mark.parametrize("packed", [False, True])
def test_attention_and_its_gradients(packed):
  """Two blocks of queries, the second hardly begun; segments that end inside one."""
  (q, k, v, dout), segments = _attention_inputs(B=2 - packed, S=140, H=1 + packed, A=128, U=64)
  if not packed:
    segments = None

  def fn(q, k, v, dout):
    out, vjp = jax.vjp(lambda *a: attention.causal_attention(*a, segments, 0.125), q, k, v)
    return out, *vjp(dout)

  actual = _run(fn, q, k, v, dout)
  assert {a.dtype for a in actual} == {np.dtype(b16)}
  assert_close(actual, _attention64(q, k, v, dout, segments, 0.125), "bfloat16")


def test_attention_refuses():
  (q, k, v, _), _ = _attention_inputs(1, 4, 2, 64, 96)
  with pytest.raises(ValueError, match="U must be a multiple of 64, at most 256, got 96"):
    attention.causal_attention(q, k, v, None, 1.0)
  q, k, v = (a[..., :64].astype(np.float32) for a in (q, k, v))
  with pytest.raises(ValueError, match="must be bfloat16 or float16, got float32"):
    attention.causal_attention(q, k, v, None, 1.0)


# FP8: codes and scales of three tiles, the last partial.


def _fp8_kind():
  return "op_float32" if jax.default_backend() == "cpu" else "fp8_on_hopper"


@pytest.mark.parametrize("N", [150, 270])
def test_quantized_product(N):
  """Of codes and scales, with a matrix of blocks of columns; one thread block along them, or two."""
  M, K, T = 137, 300, 3
  rng = np.random.default_rng(5)
  lhs, rhs = (rng.standard_normal(s).astype(jnp.float8_e4m3fn) for s in ((M, K), (K, N)))
  lhs_scale = rng.random((T, M)).astype(np.float32) + 0.5
  rhs_scale = (rng.random((T, -(-N // 128))).astype(np.float32) + 0.5).repeat(128, axis=1)[:, :N]
  expected = np.zeros((M, N))
  for t in range(T):
    tile = slice(t * 128, (t + 1) * 128)
    partial = lhs[:, tile].astype(np.float64) @ rhs[tile].astype(np.float64)
    expected += partial * lhs_scale[t][:, None] * rhs_scale[t][None]

  args = (lhs, lhs_scale, np.ascontiguousarray(rhs.T)[None], rhs_scale[None])
  assert_close(_run(_fp8_product(jnp.float32), *args), expected, _fp8_kind())


def _fp8_product(dtype):
  """Rows times a single matrix, of which the codes come with the contraction last."""

  def fn(x, x_scale, w, w_scale):
    groups = jnp.full(1, x.shape[0], jnp.int32), jnp.zeros(1, jnp.int32)
    return quantized.rows_times(Quantized(x, x_scale), Quantized(w, w_scale), *groups, dtype)

  return fn


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("name", ["grouped_rows", "grouped_weights"])
def test_quantized_groups(name, power_of_two):
  """Two tiles of rows, none, a few; a gap before the last group and rows after it."""
  D, F, sizes, starts = 200, 72, np.array([130, 0, 5], np.int32), np.array([0, 130, 137], np.int32)
  rng = np.random.default_rng(6)
  x, dy = (rng.standard_normal((150, n)).astype(np.float32) for n in (D, F))
  other = dy if name == "grouped_weights" else rng.standard_normal((3, D, F)).astype(np.float32)
  run = lambda module: getattr(module, name)  # noqa: E731
  args = (x, other, sizes, starts)
  actual = _run(lambda *a: run(quantized)(*a, power_of_two, jnp.float32), *args)
  assert_close(actual, run(quantized_reference)(*args, power_of_two, jnp.float32), _fp8_kind())


# What the H100's compiler makes of them.


# Bytes that jax 0.12's compiler spills where 0.10's spills none.
SPILLED = 0 if jax.__version_info__ < (0, 11) else 320


def _struct(*shape, dtype=b16):
  return jax.ShapeDtypeStruct(shape, dtype)


def _compiles(fn, *shapes, kernels: int | None = 1):
  """Compiles, with matrix products that overlap; returns (executable, kernels).

  None stands for any number of kernels: one that is known already prints nothing.
  """
  compiled, printed = compile_for_h100(fn, *shapes)
  found = h100_resources(printed)
  assert kernels is None or len(found) == kernels
  for resources in found.values():
    assert resources["spill_store_bytes"] <= SPILLED
    assert resources["serialized_wgmma"] == 0
  return compiled, found


# P rows, D hidden, F inner, E experts.
GROUPED = {"V3": (65536, 7168, 2048, 32), "small": (300, 256, 128, 3)}


@pytest.mark.gpu
@pytest.mark.parametrize("size", GROUPED)
def test_grouped_matmul_compiles(size):
  P, D, F, E = GROUPED[size]
  x, dy, w = _struct(P, D), _struct(P, F), _struct(E, D, F)
  weight, sizes = _struct(P, dtype=np.float32), _struct(E, dtype=np.int32)
  _compiles(grouped_matmul.grouped_matmul, x, w, sizes)
  _compiles(grouped_matmul.grouped_matmul_transposed, dy, w, sizes)
  _compiles(grouped_matmul.grouped_matmul_weights, x, dy, sizes)
  _compiles(grouped_matmul.grouped_swiglu_in, x, w, w, sizes)
  _compiles(grouped_matmul.grouped_swiglu_hidden, x, weight, w, w, sizes)


@pytest.mark.gpu
@pytest.mark.parametrize("size", GROUPED)
def test_grouped_swiglu_compiles(size):
  P, D, F, E = GROUPED[size]
  rows, w, w_down = _struct(P, D), _struct(E, D, F), _struct(E, F, D)
  weight, sizes = _struct(P, dtype=np.float32), _struct(E, dtype=np.int32)

  def gradients(x, weight, w_gate, w_up, w_down, sizes, starts, dy):
    fn = lambda *a: grouped_matmul.grouped_swiglu(*a, sizes, starts)  # noqa: E731
    return jax.vjp(fn, x, weight, w_gate, w_up, w_down)[1](dy)

  # Hidden, through the activation, into rows, and weights of two shapes.
  _compiles(gradients, rows, weight, w, w, w_down, sizes, sizes, rows, kernels=5)


@pytest.mark.gpu
def test_routed_swiglu_compiles():
  """Tokens to their experts and back, as a model calls it: V3's on one device of eight."""
  M, K, D, F, E = 8192, 8, 7168, 2048, 32
  rows, w, w_down = _struct(M, D), _struct(E, D, F), _struct(E, F, D)
  where, counts = _struct(M, K, dtype=np.int32), _struct(E, dtype=np.int32)

  def gradients(x, gate, w_gate, w_up, w_down, expert, rank, counts, dy):
    def fn(x, gate, *weights):
      routed = Routed(expert, gate, counts, rank)
      return routed_swiglu(x, routed, weights, "mosaic_gpu")

    return jax.vjp(fn, x, gate, w_gate, w_up, w_down)[1](dy)

  gate = _struct(M, K, dtype=np.float32)
  args = (rows, gate, w, w, w_down, where, where, counts, rows)
  compiled, _ = _compiles(gradients, *args, kernels=None)
  # No [rows, experts] and no dense experts: a gigabyte a row-sized array, a few of them at once.
  assert compiled.memory_analysis().temp_size_in_bytes < 8 * 2**30


@pytest.mark.gpu
@pytest.mark.parametrize("M, K, D, P", [(8184, 8, 7168, 65472), (40, 3, 256, 150)])
def test_permute_compiles(M, K, D, P):
  """At V3's widths, and a size no other test compiles: what is known prints nothing."""
  rows, weights = _struct(M, K, dtype=np.int32), _struct(M, K, dtype=np.float32)
  _, found = _compiles(lambda x, rows: permute.permute(x, rows, P), _struct(M, D), rows)
  assert found["permute"].get("blocks_per_sm", 15) >= 15  # which jax 0.12 does not print
  _, found = _compiles(permute.combine, _struct(P, D), rows, weights)
  assert found["combine"].get("blocks_per_sm", 6) >= 6


@pytest.mark.gpu
@pytest.mark.parametrize(
  "M, E, rule",
  [
    (8192, 256, Rule(8, 8, 4, "top2", "sigmoid", True, 2.5)),
    (8192, 160, Rule(6, 8, 3, "max", "softmax", False, 16.0)),
    (8192, 64, Rule(6, 1, 1, "max", "softmax", False, 1.0)),
    (37, 40, Rule(3, 5, 2, "top2", "sqrtsoftplus", True, 1.5)),
  ],
  ids=["V3", "V2", "V2-Lite", "small"],
)
def test_routing_compiles(M, E, rule):
  logits, bias = _struct(M, E, dtype=np.float32), _struct(E, dtype=np.float32)
  dgate = _struct(M, rule.num_experts_per_tok, dtype=np.float32)

  def both(logits, bias, dgate):
    routed, vjp = jax.vjp(lambda x: routing.route(x, bias, rule), logits)
    none = jax.tree.map(lambda a: np.zeros(a.shape, jax.dtypes.float0), routed)
    return routed, vjp(none._replace(gate_MK=dgate))

  compiled, _ = _compiles(both, logits, bias, dgate, kernels=2)
  # No [M, E] beside the logits and their gradient, but where tokens or experts were filled up.
  if M == 8192:
    assert compiled.memory_analysis().temp_size_in_bytes < M * E * 4 / 2


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("B, S, H, A, U", [(2, 4096, 16, 192, 128), (2, 136, 3, 128, 64)])
def test_attention_compiles(B, S, H, A, U, packed):
  q, v = _struct(B, S, H, A), _struct(B, S, H, U)
  segments = _struct(B, S, dtype=np.int32)

  def forward(q, k, v, segments):
    return attention.causal_attention(q, k, v, segments if packed else None, 0.1)

  def gradients(q, k, v, segments, dout):
    return jax.vjp(lambda *a: forward(*a, segments), q, k, v)[1](dout)

  _compiles(forward, q, q, v, segments)
  compiled, found = _compiles(gradients, q, q, v, segments, v, kernels=3)
  # `forward` is known and prints nothing.
  assert found.keys() == {f"attention_gradient_{name}" for name in ("queries", "keys", "values")}
  # Nothing is as large as [S, S].
  if S > 1000:
    assert compiled.memory_analysis().temp_size_in_bytes < S * S


@pytest.mark.gpu
@pytest.mark.parametrize("M, K, N", [(8192, 7168, 2048), (37, 300, 150)])
def test_quantized_product_compiles(M, K, N):
  T = -(-K // 128)
  codes, scales = jnp.float8_e4m3fn, np.float32
  lhs = _struct(M, K, dtype=codes), _struct(T, M, dtype=scales)
  rhs = _struct(1, N, K, dtype=codes), _struct(1, T, N, dtype=scales)
  _compiles(_fp8_product(b16), *lhs, *rhs)


@pytest.mark.gpu
@pytest.mark.parametrize("size", GROUPED)
def test_quantized_groups_compile(size):
  P, D, F, E = GROUPED[size]
  x, dy, w, groups = _struct(P, D), _struct(P, F), _struct(E, D, F), _struct(E, dtype=np.int32)
  rows = lambda *a: quantized.grouped_rows(*a, False, b16)  # noqa: E731
  _compiles(rows, x, w, groups, groups, kernels=2)
  weights = lambda *a: quantized.grouped_weights(*a, False, np.float32)  # noqa: E731
  _compiles(weights, x, dy, groups, groups, kernels=3)
