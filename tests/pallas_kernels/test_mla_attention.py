"""One suite for every implementation of MLA's attention; TPU kernels run interpreted."""

import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, PartitionSpec

from pallas_kernels.mla_attention import causal_attention, decode_attention, tpu, tpu_decode
from pallas_kernels.mla_attention.api import prefill_attention
from tests.helpers import assert_close, equations, largest_intermediate
from tests.pallas_kernels.topologies import compile_for, tpu_devices

CHIPS = ("v5p:2x2x1", "v6e:2x2x1", "tpu7x:2x2x1")
ON_CPU = ("reference", "xla", "mosaic_tpu")  # mosaic_gpu has no interpreter of its own here
every_implementation = pytest.mark.parametrize("implementation", ON_CPU)

B, S, H, A, U = 2, 11, 3, 6, 5
SEGMENTS = np.array(
  [[1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 0], [1, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3]], np.int32
)


def _inputs(seed, tokens=S):
  """Queries, keys, values and the gradient of the result."""
  rng = np.random.default_rng(seed)
  q, k = rng.standard_normal((2, B, tokens, H, A)).astype(np.float32)
  v, dy = rng.standard_normal((2, B, tokens, H, U)).astype(np.float32)
  return q, k, v, dy


def _loops(q, k, v, dy, segments, scale, places=None):
  """Value and gradients in float64, a query of a head of a row at a time.

  `places` are those of the queries in the row of keys; None: query s is token s.
  """
  q, k, v, dy = (np.asarray(a, np.float64) for a in (q, k, v, dy))
  y, dq, dk, dv = (np.zeros(a.shape) for a in (dy, q, k, v))
  for b, s, h in np.ndindex(q.shape[:3]):
    place = s if places is None else places[s]
    seen = np.arange(place + 1)
    if segments is not None:
      seen = seen[segments[b, : place + 1] == segments[b, place]]
    logits = scale * (k[b, seen, h] @ q[b, s, h])
    p = np.exp(logits - logits.max())
    p /= p.sum()
    y[b, s, h] = p @ v[b, seen, h]
    dv[b, seen, h] += p[:, None] * dy[b, s, h]
    dp = v[b, seen, h] @ dy[b, s, h]
    dlogits = scale * p * (dp - p @ dp)
    dq[b, s, h] = dlogits @ k[b, seen, h]
    dk[b, seen, h] += dlogits[:, None] * q[b, s, h]
  return y, (dq, dk, dv)


def _run(fn, q, k, v, dy):
  """Value and gradients, TPU kernels interpreted."""

  def both(q, k, v, dy):
    y, vjp = jax.vjp(fn, q, k, v)
    return y, vjp(dy)

  with pltpu.force_tpu_interpret_mode():
    return jax.block_until_ready(jax.jit(both)(q, k, v, dy))


@every_implementation
@pytest.mark.parametrize("segments", [None, SEGMENTS], ids=["whole_rows", "segments"])
def test_causal_matches_loops(implementation, segments):
  inputs = _inputs(0)
  actual = _run(
    lambda q, k, v: causal_attention(q, k, v, segments, 0.7, implementation, 4), *inputs
  )
  assert_close(actual, _loops(*inputs, segments, 0.7))


@pytest.mark.parametrize("chunk", [1, 2, 3, 64])
def test_causal_xla_in_other_chunks(chunk):
  inputs = _inputs(1)
  actual = _run(lambda q, k, v: causal_attention(q, k, v, SEGMENTS, 0.7, "xla", chunk), *inputs)
  assert_close(actual, _loops(*inputs, SEGMENTS, 0.7))


@pytest.mark.parametrize(
  "tokens, block, span, with_segments",
  [
    (300, 256, 256, False),
    (300, 128, 256, True),
    (500, 128, 16384, False),
    (500, 128, 16384, True),
  ],
  ids=["two_blocks", "three_blocks-segments", "pairs_in_one_span", "pairs_in_one_span-segments"],
)
def test_causal_tpu_over_several_blocks(monkeypatch, tokens, block, span, with_segments):
  """A padded tail, segments that begin within and between blocks; the forward takes pairs."""
  monkeypatch.setattr(tpu, "CHUNK_TOKENS", 128)
  monkeypatch.setattr(tpu, "SPAN_TOKENS", span)
  inputs = [a[:, :, :2] for a in _inputs(2, tokens)]
  cuts = np.array([[40, 256], [1, 290]])
  segments = (np.arange(tokens)[None, :, None] >= cuts[:, None, :]).sum(-1).astype(np.int32)
  segments = segments if with_segments else None
  actual = _run(lambda q, k, v: tpu.causal_attention(q, k, v, segments, 0.7, block), *inputs)
  assert_close(actual, _loops(*inputs, segments, 0.7))


@pytest.mark.parametrize(
  "implementation, chunk", [("reference", 4), ("xla", 2), ("xla", 5), ("xla", 64)]
)
@pytest.mark.parametrize("with_segments", [False, True], ids=["whole_rows", "segments"])
def test_causal_of_runs_of_a_rows_tokens(implementation, chunk, with_segments):
  """Runs between and across blocks, first and last ones, out of order; one program for all."""
  tokens, run = 20, 5
  q, k, v, dy = _inputs(11, tokens)
  segments = np.repeat(np.array([[1, 2, 0], [1, 2, 3]], np.int32), (3, 9, 8), axis=1)
  segments = segments if with_segments else None

  def attend(starts, q, k, v):
    return causal_attention(q, k, v, segments, 0.7, implementation, chunk, starts)

  def both(starts, q, k, v, dy):
    y, vjp = jax.vjp(functools.partial(attend, starts), q, k, v)
    return y, vjp(dy)

  both = jax.jit(both)
  for starts in ([0, 15], [5, 10], [7, 3]):
    places = (np.array(starts)[:, None] + np.arange(run)).reshape(-1)
    asked = (q[:, places], k, v, dy[:, places])
    actual = both(np.array(starts, np.int32), *asked)
    assert_close(actual, _loops(*asked, segments, 0.7, places))


@pytest.mark.slow
@pytest.mark.parametrize(
  "span, with_segments", [(16384, False), (128, True)], ids=["whole_rows", "short_spans-segments"]
)
def test_causal_tpu_of_chunks(monkeypatch, span, with_segments):
  """Every device's two chunks of a row in one program; chunks of two blocks."""
  monkeypatch.setattr(tpu, "CHUNK_TOKENS", 128)
  monkeypatch.setattr(tpu, "SPAN_TOKENS", span)
  length, X = 256, 2
  q, k, v, dy = (a[:1, :, :2] for a in _inputs(13, 2 * X * length))
  segments = (np.arange(q.shape[1])[None] >= 300).astype(np.int32) if with_segments else None

  def both(starts, q, k, v, dy):
    fn = lambda q, k, v: tpu.causal_attention(q, k, v, segments, 0.7, 128, starts)  # noqa: E731
    y, vjp = jax.vjp(fn, q, k, v)
    return y, vjp(dy)

  both = jax.jit(both)
  for device in range(X):
    starts = np.array([device, 2 * X - 1 - device]) * length
    places = (starts[:, None] + np.arange(length)).reshape(-1)
    asked = (q[:, places], k, v, dy[:, places])
    with pltpu.force_tpu_interpret_mode():
      actual = jax.block_until_ready(both(starts.astype(np.int32), *asked))
    assert_close(actual, _loops(*asked, segments, 0.7, places))


def test_runs_meet_no_keys_behind_them():
  """What lies behind a run's last block is not read: it may be no number."""
  q, k, v, dy = _inputs(12, 12)
  starts, places = np.array([0, 2], np.int32), [0, 1, 2, 3]
  asked, seen = (q[:, :4], k[:, :4], v[:, :4], dy[:, :4]), np.s_[:, :4]
  expected = _loops(*asked, None, 0.7, places)
  k[:, 4:] = v[:, 4:] = np.nan
  fn = lambda q, k, v: causal_attention(q, k, v, None, 0.7, "xla", 2, starts)  # noqa: E731
  y, (dq, dk, dv) = _run(fn, q[seen], k, v, dy[seen])
  assert_close((y, (dq, dk[seen], dv[seen])), expected)
  assert not np.any(dk[:, 4:]) and not np.any(dv[:, 4:])


@pytest.mark.parametrize(
  "starts, implementation, message",
  [
    ([0, 5, 9], None, r"S \(11\) must be divisible by the number of starts_Y \(3\)"),
    ([], None, r"S \(11\) must be divisible by the number of starts_Y \(0\)"),
    ([2], "mosaic_gpu", "implementation must be one of reference, xla, mosaic_tpu where the quer"),
    ([2], "mosaic_tpu", "a run must be a multiple of 128 tokens, got 11"),
  ],
)
def test_runs_that_do_not_fit_are_refused(starts, implementation, message):
  q, k, v, _ = _inputs(0)
  starts = np.array(starts, np.int32)
  with pytest.raises(ValueError, match=message):
    causal_attention(q, k, v, None, 1.0, implementation, starts_Y=starts)
  with pytest.raises(ValueError, match=r"S \(11\) must not exceed T \(9\)"):
    causal_attention(q, k[:, :9], v[:, :9], None, 1.0, starts_Y=np.zeros(1, np.int32))
  with pytest.raises(ValueError, match="starts_Y must be int32, got float32"):
    causal_attention(q, k, v, None, 1.0, starts_Y=np.zeros(1, np.float32))


@every_implementation
def test_causal_with_equal_logits_is_a_mean(implementation):
  q, k, v, dy = _inputs(3)
  q = np.zeros_like(q)
  y, _ = _run(lambda q, k, v: causal_attention(q, k, v, None, 0.7, implementation, 4), q, k, v, dy)
  assert_close(y, np.cumsum(v, axis=1) / np.arange(1, S + 1)[None, :, None, None])


@every_implementation
def test_huge_logits_behind_the_mask_do_no_harm(implementation):
  """exp of what a query may not see overflows; neither value nor gradient may notice."""
  q, k, v, dy = _inputs(6)
  first = (SEGMENTS == 1)[..., None, None]
  dy = np.where(first, dy, 0)
  fn = lambda q, k, v: causal_attention(q, k, v, SEGMENTS, 1.0, implementation, 4)  # noqa: E731
  y, gradients = _run(fn, q, np.where(first, k, np.float32(1e4) * k), v, dy)
  expected, expected_gradients = _run(fn, q, k, v, dy)
  assert_close(np.where(first, y, 0), np.where(first, expected, 0))
  assert_close(gradients, expected_gradients)


@every_implementation
def test_causal_in_bfloat16(implementation):
  low = [jnp.asarray(a, jnp.bfloat16) for a in _inputs(7)]
  y, gradients = _run(
    lambda q, k, v: causal_attention(q, k, v, SEGMENTS, 0.5, implementation, 4), *low
  )
  assert {a.dtype for a in (y, *gradients)} == {jnp.dtype(jnp.bfloat16)}
  assert_close((y, gradients), _loops(*low, SEGMENTS, 0.5), "bfloat16")


def _mesh(devices, shape, names):
  return Mesh(np.array(devices).reshape(shape), names)


@every_implementation
def test_causal_inside_a_checked_shard_map(implementation):
  """Rows over one axis, the keys alike on all: their gradient is summed over it, once."""
  q, _, v, dy = (np.concatenate([a, -a]) for a in _inputs(8))
  k = _inputs(9)[1][:1]
  rows = PartitionSpec("data")

  def local(q, k, v):
    keys = jnp.broadcast_to(k, q.shape)
    return causal_attention(q, keys, v, None, 0.7, implementation, 4)

  mesh = _mesh(jax.devices()[:8], (4, 2), ("data", "model"))
  split = jax.shard_map(
    local, mesh=mesh, in_specs=(rows, PartitionSpec(), rows), out_specs=rows, check_vma=True
  )
  y, (dq, dk, dv) = _run(split, q, k, v, dy)
  every = np.broadcast_to(k, q.shape)
  expected, (edq, edk, edv) = _loops(q, every, v, dy, None, 0.7)
  assert_close((y, dq, dk, dv), (expected, edq, edk.sum(axis=0, keepdims=True), edv))


def _gradient(fn):
  return jax.grad(lambda q, k, v: jnp.sum(fn(q, k, v).astype(jnp.float32)), argnums=(0, 1, 2))


def _has_square(compiled, tokens: int) -> bool:
  """Whether an array of a compiled program has two dimensions of all tokens, or as many numbers."""
  shapes = re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", compiled.as_text())
  shapes = [[int(n) for n in shape.split(",")] for shape in shapes]
  assert any(tokens in shape for shape in shapes)
  return any(
    sum(n >= tokens for n in shape) >= 2 or math.prod(shape) >= tokens * tokens for shape in shapes
  )


def test_no_array_of_all_queries_by_all_keys():
  """Forward and backward, at eight chunks: memory must stay linear in S."""
  tokens, chunk = 128, 16
  x = jax.ShapeDtypeStruct((1, tokens, 2, 3), jnp.float32)
  chunked = _gradient(lambda *a: causal_attention(*a, None, 1.0, "xla", chunk))
  dense = _gradient(lambda *a: causal_attention(*a, None, 1.0, "reference"))
  assert largest_intermediate(chunked, x, x, x) <= 2 * chunk * tokens
  assert largest_intermediate(dense, x, x, x) >= 2 * tokens * tokens
  assert not _has_square(jax.jit(chunked).lower(x, x, x).compile(), tokens)
  assert _has_square(jax.jit(dense).lower(x, x, x).compile(), tokens)


def _temporaries_and_size(fn, *shapes) -> tuple[int, int]:
  """Returns a compiled program's bytes of temporaries and its number of instructions."""
  compiled = jax.jit(fn).lower(*shapes).compile()
  # Not all lines: a program from the cache also lists the calls it was traced under.
  return compiled.memory_analysis().temp_size_in_bytes, compiled.as_text().count(" = ")


@pytest.mark.parametrize("what", ["forward", "gradient", "prefill"])
def test_memory_grows_with_the_row_and_the_program_does_not(what):
  """XLA's form, in the default chunks: twice the tokens take at most 2.1 times the temporaries."""
  heads, page_tokens, chunk = 8, 64, 128

  def attend(q, k, v):
    return causal_attention(q, k, v, None, 0.3, "xla", chunk)

  def prefill(q, k, v):
    B, S = q.shape[:2]
    pages = jnp.zeros((2 * S // page_tokens, page_tokens, 24))
    table = jnp.arange(B * S // page_tokens, dtype=jnp.int32).reshape(B, -1)

    def expand(latents_BTW):
      k_BTHA = jnp.broadcast_to(latents_BTW[:, :, None, :20], (B, latents_BTW.shape[1], heads, 20))
      return k_BTHA, k_BTHA[..., :16]

    first_B = jnp.full(B, 5, jnp.int32)
    return prefill_attention(q, k, v, expand, pages, table, first_B, 0.3, "xla", chunk)

  fn = {"forward": attend, "gradient": _gradient(attend), "prefill": prefill}[what]
  figures = []
  for tokens in (2048, 4096, 8192, 16384):
    x, v = (jax.ShapeDtypeStruct((1, tokens, heads, n), jnp.float32) for n in (20, 16))
    figures.append(_temporaries_and_size(fn, x, x, v))
  for (less, short), (more, long) in itertools.pairwise(figures):
    assert more <= 2.1 * less, figures
    assert long <= 1.05 * short, figures


@pytest.mark.tpu
@pytest.mark.parametrize("chip", CHIPS)
def test_causal_compiles_at_v3_widths_and_has_no_square(chip):
  tokens = 4096
  q = jax.ShapeDtypeStruct((1, tokens, 2, 192), jnp.bfloat16)
  v = jax.ShapeDtypeStruct((1, tokens, 2, 128), jnp.bfloat16)
  segments = jax.ShapeDtypeStruct((1, tokens), jnp.int32)

  def gradient(q, k, v, segments):
    return _gradient(lambda *a: causal_attention(*a, segments, 0.1, "mosaic_tpu"))(q, k, v)

  compiled = compile_for(chip, gradient, q, q, v, segments)
  assert compiled.as_text().count("tpu_custom_call") == 2  # forward and backward
  assert not _has_square(compiled, tokens)


@pytest.mark.tpu
def test_causal_compiles_inside_a_checked_shard_map():
  """On four chips; nothing is summed over them."""
  mesh = _mesh(tpu_devices(CHIPS[0]), (2, 2), ("data", "expert"))
  rows = PartitionSpec(("data", "expert"))
  sharding = jax.sharding.NamedSharding(mesh, rows)
  args = [
    jax.ShapeDtypeStruct((4, 512, 2, width), jnp.bfloat16, sharding=sharding)
    for width in (192, 192, 128)
  ]
  split = jax.shard_map(
    lambda *a: causal_attention(*a, None, 0.1, "mosaic_tpu"),
    mesh=mesh,
    in_specs=rows,
    out_specs=rows,
    check_vma=True,
  )
  text = jax.jit(_gradient(split)).lower(*args).compile().as_text()
  assert text.count("tpu_custom_call") == 2 and "all-reduce" not in text


@pytest.mark.tpu
@pytest.mark.parametrize("chip", CHIPS)
def test_chunks_of_a_row_compile_at_v3_widths(chip):
  """Two chunks of 1,024 tokens of a row of 8,192, wherever they start; no square array."""
  q, k, v = (
    jax.ShapeDtypeStruct((1, *dims), jnp.bfloat16)
    for dims in ((2048, 2, 192), (8192, 2, 192), (8192, 2, 128))
  )
  segments, starts = (jax.ShapeDtypeStruct(n, jnp.int32) for n in ((1, 8192), (2,)))

  def gradient(q, k, v, segments, starts):
    fn = lambda *a: causal_attention(*a, segments, 0.1, "mosaic_tpu", starts_Y=starts)  # noqa: E731
    return _gradient(fn)(q, k, v)

  text = compile_for(chip, gradient, q, k, v, segments, starts).as_text()
  assert text.count("tpu_custom_call") == 2  # forward and backward
  assert not re.search(r"\[(\d+,)*(2048|8192),(2048|8192)[,\]]", text)


def _costs(fn, *args):
  """The declared costs of the kernels of fn(*args), by name."""
  calls = [
    e for e in equations(jax.make_jaxpr(fn)(*args).jaxpr) if e.primitive.name == "pallas_call"
  ]
  return {e.params["name"]: e.params["cost_estimate"] for e in calls}


def _fetches(blocks) -> int:
  """Copies of a pipelined operand: one whenever its block changes."""
  return 1 + sum(block != before for block, before in zip(blocks[1:], blocks))


@pytest.mark.parametrize("blocks, side", [(3, 256), (4, 512)])
def test_causal_costs_are_counted(monkeypatch, blocks, side):
  """Blocks above the diagonal cost nothing, those on it what their chunks do."""
  n, number = 256, 4
  tokens = blocks * n
  monkeypatch.setattr(tpu, "CHUNK_TOKENS", 128)
  q = jax.ShapeDtypeStruct((B, tokens, H, A), jnp.float32)
  v = jax.ShapeDtypeStruct((B, tokens, H, U), jnp.float32)
  costs = _costs(_gradient(lambda *a: tpu.causal_attention(*a, None, 0.1, n)), q, q, v)

  def logits(pairs, side):
    on_diagonal = 128 * sum(range(128, side + 1, 128))
    return sum(on_diagonal if i == j else side * side for i, j in pairs)

  pairs = [(i, j) for i in range(tokens // side) for j in range(i + 1)]
  forward, exponentials = costs["mla_forward"], logits(pairs, side)
  assert forward.flops == B * H * 2 * exponentials * (A + U)
  assert forward.transcendentals == B * H * exponentials
  once = tokens * (A + U + 1)  # queries, results, normalisers
  keys_and_values = _fetches([j for _, j in pairs]) * side * (A + U)
  assert forward.bytes_accessed == B * H * number * (once + keys_and_values + 2 * len(pairs))

  backward, pairs = costs["mla_backward"], [(i, j) for j in range(blocks) for i in range(j, blocks)]
  assert backward.flops == B * H * 2 * logits(pairs, n) * (3 * A + 2 * U)
  once = tokens * (A + U + A + A + U)  # keys, values, the three gradients
  queries = _fetches([i for i, _ in pairs]) * n * (A + U + 2)  # and what there is one of for each
  assert backward.bytes_accessed == B * H * number * (once + queries + 3 * len(pairs))


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"k": (B, S, H, A + 1)}, r"k_BTHA must have shape \(2, 11, 3, 6\), got \(2, 11, 3, 7\)"),
    ({"v": (B, S + 1, H, U)}, r"v_BTHU must have shape \(2, 11, 3, 5\), got \(2, 12, 3, 5\)"),
    ({"q": (B, H, A)}, r"q_BSHA must have 4 dimensions, none of them 0, got \(2, 3, 6\)"),
    ({"segments": (B, S + 1)}, r"segments_BT must have shape \(2, 11\), got \(2, 12\)"),
    ({"chunk_tokens": 0}, "chunk_tokens must be at least 1, got 0"),
    ({"implementation": "fastest"}, "implementation must be one of reference, .*, got 'fastest'"),
  ],
  ids=str,
)
def test_causal_refuses_what_does_not_fit(changes, message):
  shapes = {"q": (B, S, H, A), "k": (B, S, H, A), "v": (B, S, H, U)} | changes
  q, k, v = (np.zeros(shapes[name], np.float32) for name in "qkv")
  segments = np.zeros(shapes.get("segments", (B, S)), np.int32)
  options = {name: changes[name] for name in changes if name in ("chunk_tokens", "implementation")}
  with pytest.raises(ValueError, match=message):
    causal_attention(q, k, v, segments, 1.0, **options)


def test_causal_refuses_other_dtypes():
  q, k, v, _ = _inputs(0)
  with pytest.raises(ValueError, match="q_BSHA must be bfloat16 or float32, got float16"):
    causal_attention(q.astype(np.float16), k, v, None, 1.0)
  with pytest.raises(ValueError, match="k_BTHA must be float32, got bfloat16"):
    causal_attention(q, jnp.asarray(k, jnp.bfloat16), v, None, 1.0)
  with pytest.raises(ValueError, match="segments_BT must be int32, got float32"):
    causal_attention(q, k, v, SEGMENTS.astype(np.float32), 1.0)


# Decoding: rows of up to P pages of T tokens, kernels in blocks of two pages.

ROWS, N, T, P, W, C = 6, 47, 8, 7, 14, 10


@functools.cache
def _cache(new_tokens, rows=ROWS):
  """Queries, pages and a table of different pages for every row."""
  rng = np.random.default_rng(rows)
  pages = rng.standard_normal((N, T, W)).astype(np.float32)
  table = rng.permutation(N)[: rows * P].reshape(rows, P).astype(np.int32)
  return rng.standard_normal((rows, new_tokens, H, W)).astype(np.float32), pages, table


@functools.cache
def _decode(implementation):
  def run(q, pages, table, ends):
    if implementation == "mosaic_tpu":
      return tpu_decode.decode_attention(q, pages, table, ends, 0.6, C, 2 * T)
    return decode_attention(q, pages, table, ends, 0.6, C, implementation)

  jitted = jax.jit(run)

  def interpreted(*args):
    with pltpu.force_tpu_interpret_mode():
      return jax.block_until_ready(jitted(*args))

  return interpreted


def _decode_loops(q, pages, table, ends):
  """In float64, a query of a head of a row at a time, a token at a time."""
  q, pages = np.asarray(q, np.float64), np.asarray(pages, np.float64)
  out = np.zeros((*q.shape[:3], C))
  for b, s, h in np.ndindex(q.shape[:3]):
    seen = [pages[table[b, t // T], t % T] for t in range(ends[b, s])]
    if seen:
      weights = np.exp([0.6 * (q[b, s, h] @ token) for token in seen])
      out[b, s, h] = sum(w * token[:C] for w, token in zip(weights, seen)) / weights.sum()
  return out


def _check_decode(implementation, ends):
  args = (*_cache(ends.shape[1], ends.shape[0]), ends)
  assert_close(_decode(implementation)(*args), _decode_loops(*args))


@every_implementation
@settings(max_examples=10)
@given(lengths=st.lists(st.integers(0, P * T), min_size=ROWS, max_size=ROWS))
def test_decode_ragged(implementation, lengths):
  _check_decode(implementation, np.array(lengths, np.int32)[:, None])


@every_implementation
@pytest.mark.parametrize(
  "lengths",
  [
    (0, 1, T, 2 * T, 4 * T, P * T),  # nothing, one token, a page, a block, two, all
    (T - 1, T + 1, 2 * T - 1, 2 * T + 1, 4 * T + 1, P * T - 1),
    (0, 0, 5, 0, 0, 3 * T),  # rows without tokens before, between and behind
    (5, 0, 0, 3 * T, 0, 0),
    (0, 0, 0, 0, 0, 0),
  ],
  ids=str,
)
def test_decode_at_edges(implementation, lengths):
  _check_decode(implementation, np.array(lengths, np.int32)[:, None])


@every_implementation
def test_decode_few_new_tokens(implementation):
  """Each sees one more than the last, over ends of pages and blocks; some see nothing."""
  last = np.array([0, 1, T, 2 * T + 1, 4 * T + 1, P * T], np.int32)
  ends = last[:, None] - np.array([[2, 1, 0]], np.int32)
  _check_decode(implementation, np.maximum(ends, 0))


@every_implementation
def test_decode_of_an_odd_number_of_rows(implementation):
  _check_decode(implementation, np.array([[0], [19], [P * T], [2 * T], [1]], np.int32))


@every_implementation
def test_decode_clips_ends_to_the_table(implementation):
  q, pages, table = _cache(1)
  ends = np.array([[-3], [P * T + 1], [4 * P * T], [5], [P * T], [0]], np.int32)
  with pltpu.force_tpu_interpret_mode():
    out = decode_attention(q, pages, table, ends, 0.6, C, implementation)
  assert_close(out, _decode_loops(q, pages, table, np.clip(ends, 0, P * T)))


@every_implementation
def test_decode_with_equal_logits_is_a_mean(implementation):
  q, pages, table = _cache(1)
  ends = np.full((ROWS, 1), 3 * T + 2, np.int32)
  out = _decode(implementation)(np.zeros_like(q), pages, table, ends)
  own = pages[table].reshape(ROWS, P * T, W)[:, : 3 * T + 2, :C].mean(axis=1)
  assert_close(out, np.broadcast_to(own[:, None, None], out.shape))


@every_implementation
def test_decode_reads_nothing_of_others(implementation):
  """NaN in every page that no row owns, behind every end, and in a row of its own."""
  q, pages, table = _cache(1)
  lengths = np.array([[5], [3 * T + 3], [2 * T], [0], [T + 1], [6 * T + 7]], np.int32)
  args = (q, pages, table, lengths)
  expected = _decode_loops(*args)
  dirty = np.full_like(pages, np.nan)
  for b in range(ROWS):
    for t in range(lengths[b, 0]):
      dirty[table[b, t // T], t % T] = pages[table[b, t // T], t % T]
  dirty[table[1, 0]] = np.nan
  out = np.asarray(_decode(implementation)(q, dirty, table, lengths))
  assert np.isnan(out[1]).all()
  others = [0, 2, 3, 4, 5]
  assert_close(out[others], expected[others])


@every_implementation
def test_decode_with_large_logits(implementation):
  """Far beyond what exp can hold, rising and falling over the blocks."""
  q, pages, table = _cache(1)
  ends = np.full((ROWS, 1), P * T, np.int32)
  q = np.abs(q)
  pages = pages.copy()
  for b in range(ROWS):
    rising = 40 * np.sin(np.arange(P * T) + b).astype(np.float32).reshape(P, T, 1)
    pages[table[b]] = rising + pages[table[b]]
  out = np.asarray(_decode(implementation)(q, pages, table, ends))
  top = 0.6 * np.einsum("bshw,btw->bsht", q, pages[table].reshape(ROWS, -1, W), dtype=np.float64)
  p = np.exp(top - top.max(axis=-1, keepdims=True))
  p /= p.sum(axis=-1, keepdims=True)
  expected = np.einsum("bsht,btc->bshc", p, pages[table].reshape(ROWS, -1, W)[..., :C])
  assert top.max() > 100
  assert_close(out, expected, "model_float32")


@every_implementation
def test_decode_in_bfloat16(implementation):
  q, pages, table = _cache(3)
  ends = np.array([[1, 2, 3], [0, 0, 0], [15, 16, 17], [8, 9, 10], [54, 55, 56], [31, 32, 33]])
  low = (jnp.asarray(q, jnp.bfloat16), jnp.asarray(pages, jnp.bfloat16), table)
  out = _decode(implementation)(*low, ends.astype(np.int32))
  assert out.dtype == jnp.bfloat16
  assert_close(out, _decode_loops(*low, ends), "bfloat16")


@every_implementation
def test_decode_inside_a_checked_shard_map(implementation):
  q, pages, table = _cache(1)
  ends = np.array([[3], [17], [0], [T], [40], [P * T]], np.int32)
  rows, whole = PartitionSpec("data"), PartitionSpec()
  split = jax.shard_map(
    lambda *a: decode_attention(*a, 0.6, C, implementation),
    mesh=_mesh(jax.devices()[:6], (3, 2), ("data", "model")),
    in_specs=(rows, whole, rows, rows),
    out_specs=rows,
    check_vma=True,
  )
  with pltpu.force_tpu_interpret_mode():
    out = jax.block_until_ready(jax.jit(split)(q, pages, table, ends))
  assert_close(out, _decode_loops(q, pages, table, ends))


def test_decode_costs_are_counted():
  """The cache once, whatever the heads."""
  args = [
    jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (*_cache(3), np.zeros((ROWS, 3), np.int32))
  ]
  cost = _costs(lambda *a: decode_attention(*a, 0.6, C, "mosaic_tpu"), *args)["mla_decode"]
  cached, queries = ROWS * P * T, ROWS * 3 * H
  blocks = 2 * (ROWS // 2 + 3)  # of each part, and three empty ones behind
  scalars = ROWS * P + ROWS * 3 + 2 * blocks + ROWS
  assert cost.bytes_accessed == 4 * (cached * W + queries * (W + C) + scalars)
  assert cost.flops == 2 * 3 * H * cached * (W + C)
  assert cost.transcendentals == 3 * H * cached


@pytest.mark.tpu
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("new_tokens", [1, 2])
def test_decode_compiles_at_v3_shapes(chip, new_tokens):
  """32 rows of 4,096 tokens; rows of 640 numbers in the cache are read as they lie."""
  rows, heads, width, pages = 32, 128, 640, 256
  compiled = compile_for(
    chip,
    lambda *a: decode_attention(*a, 0.1, 512, "mosaic_tpu"),
    jax.ShapeDtypeStruct((rows, new_tokens, heads, width), jnp.bfloat16),
    jax.ShapeDtypeStruct((rows * pages, 16, width), jnp.bfloat16),
    jax.ShapeDtypeStruct((rows, pages), jnp.int32),
    jax.ShapeDtypeStruct((rows, new_tokens), jnp.int32),
  )
  cache_bytes = rows * pages * 16 * width * 2
  assert compiled.as_text().count("tpu_custom_call") == 1
  assert compiled.memory_analysis().temp_size_in_bytes < cache_bytes / 8
  assert cache_bytes <= compiled.cost_analysis()["bytes accessed"] < 2 * cache_bytes


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"pages": (N, T, W + 1)}, r"pages_NTW must have shape \(47, 8, 14\), got \(47, 8, 15\)"),
    ({"table": (ROWS + 1, P)}, r"table_BP must have shape \(6, 7\), got \(7, 7\)"),
    ({"table": (ROWS, 0)}, r"table_BP must have 2 dimensions, none of them 0, got \(6, 0\)"),
    ({"ends": (ROWS,)}, r"end_BS must have shape \(6, 1\), got \(6,\)"),
    ({"value_width": W + 1}, r"value_width must be from 1 to W \(14\), got 15"),
    ({"value_width": 0}, r"value_width must be from 1 to W \(14\), got 0"),
    ({"implementation": "fastest"}, "implementation must be one of reference, .*, got 'fastest'"),
    ({"pages": (N, 12, W)}, "mosaic_tpu takes pages of a multiple of 8 tokens, got 12"),
    ({"table": (ROWS, 30_000)}, "at most 131072 entries, got 6 x 30000; implementation 'xla'"),
  ],
  ids=str,
)
def test_decode_refuses_what_does_not_fit(changes, message):
  shapes = {"pages": (N, T, W), "table": (ROWS, P), "ends": (ROWS, 1)} | changes
  with pytest.raises(ValueError, match=message):
    decode_attention(
      np.zeros((ROWS, 1, H, W), np.float32),
      np.zeros(shapes["pages"], np.float32),
      np.zeros(shapes["table"], np.int32),
      np.zeros(shapes["ends"], np.int32),
      0.6,
      changes.get("value_width", C),
      changes.get("implementation", "mosaic_tpu"),
    )


def test_default_implementations():
  q, k, v, dy = _inputs(0)
  expected, _ = _loops(q, k, v, dy, SEGMENTS, 0.7)
  assert_close(causal_attention(q, k, v, SEGMENTS, 0.7), expected)
  args = (*_cache(1), np.full((ROWS, 1), 11, np.int32))
  assert_close(decode_attention(*args, 0.6, C), _decode_loops(*args))
