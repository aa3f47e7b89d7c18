"""Decoding on GPU: values by the interpreter on CPU, and what the H100's compiler makes of it."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsmoe.compilers.gpu_resources import h100_resources
from dsmoe.inference import cache, cached_attention
from pallas_kernels.mla_attention import decode_attention, gpu_decode
from tests.helpers import assert_close, small_config
from tests.pallas_kernels.gpu_topology import compile_for_h100, interpreted

# The interpreter of these kernels takes a minute for them all.
pytestmark = [pytest.mark.slow, pytest.mark.hopper]

b16 = jnp.bfloat16

B, S, H, W, C, P = 4, 2, 3, 192, 128, 9


def _inputs(heads=H, page_tokens=16, seed=0):
  """Queries, pages and a table of different pages for every row."""
  rng = np.random.default_rng(seed)
  N = B * P + 3
  pages = rng.standard_normal((N, page_tokens, W)).astype(b16)
  table = rng.permutation(N)[: B * P].reshape(B, P).astype(np.int32)
  return rng.standard_normal((B, S, heads, W)).astype(b16), pages, table


def _loops(q, pages, table, ends, scale):
  """In float64, a query of a head of a row at a time, a token at a time."""
  q, pages = q.astype(np.float64), pages.astype(np.float64)
  T = pages.shape[1]
  out = np.zeros((*q.shape[:3], C))
  for b, s, h in np.ndindex(q.shape[:3]):
    seen = [pages[table[b, t // T], t % T] for t in range(ends[b, s])]
    if seen:
      logits = np.array([scale * (q[b, s, h] @ token) for token in seen])
      weights = np.exp(logits - logits.max())
      out[b, s, h] = sum(w * token[:C] for w, token in zip(weights, seen)) / weights.sum()
  return out


def _decode(scale, parts):
  """Compiled once, for arguments of one shape."""
  fn = jax.jit(lambda *a: gpu_decode.decode_attention(*a, scale, C, parts))

  def run(*args):
    with interpreted():
      out = np.asarray(fn(*args))
    assert out.dtype == b16
    return out

  return run


@pytest.mark.parametrize("parts", [1, 3])
def test_ragged_rows(parts):
  """Rows of nothing, of part of a block, of whole ones; the two tokens of a row see not alike."""
  q, pages, table = _inputs()
  run = _decode(0.2, parts)
  for ends in (
    [[0, 0], [0, 1], [63, 64], [64, 65]],  # a block has 64 tokens
    [[1, 16], [128, 129], [144, 143], [0, 144]],
    np.random.default_rng(1).integers(0, P * 16 + 1, (B, S)),
  ):
    ends = np.array(ends, np.int32)
    assert_close(run(q, pages, table, ends), _loops(q, pages, table, ends, 0.2), "bfloat16")


def test_reads_nothing_of_others():
  """NaN in pages that no row owns and behind every end; a row with one of its own stays alone."""
  q, pages, table = _inputs()
  ends = np.array([[5, 6], [51, 50], [80, 80], [0, 0]], np.int32)
  dirty = np.full_like(pages, np.nan)
  for b, t in np.ndindex(B, P * 16):
    if t < ends[b].max():
      dirty[table[b, t // 16], t % 16] = pages[table[b, t // 16], t % 16]
  dirty[table[1, 0], 3] = np.nan
  out = _decode(0.2, 2)(q, dirty, table, ends)
  assert np.isnan(out[1].astype(np.float32)).all()
  others = [0, 2, 3]
  assert_close(out[others], _loops(q, pages, table, ends, 0.2)[others], "bfloat16")


def test_entries_behind_the_end_are_not_looked_at():
  q, pages, table = _inputs()
  ends = np.array([[16, 15], [1, 2], [64, 64], [0, 0]], np.int32)
  expected = _loops(q, pages, table, ends, 0.2)
  for b in range(B):
    table[b, -(-ends[b].max() // 16) :] = 10**6
  assert_close(_decode(0.2, 1)(q, pages, table, ends), expected, "bfloat16")


@pytest.mark.parametrize("page_tokens", [32, 64])
def test_two_tiles_of_queries_and_large_logits(page_tokens):
  """80 queries; logits beyond what exp can hold, rising and falling over blocks and parts."""
  q, pages, table = _inputs(40, page_tokens)
  q = np.abs(q)
  for b in range(B):
    rising = 30 * np.sin(np.arange(P * page_tokens) / 40 + b).reshape(P, page_tokens, 1)
    pages[table[b]] = (rising + pages[table[b]].astype(np.float32)).astype(b16)
  ends = np.array([[70, 71], [200, 199], [3, 2], [250, 130]], np.int32)
  out = _decode(1.0, 2)(q, pages, table, ends)
  assert_close(out, _loops(q, pages, table, ends, 1.0), "bfloat16")


def test_equal_logits_give_a_mean_by_the_api():
  """Ends are clipped to the table there, and the parts follow from the sizes."""
  q, pages, table = _inputs()
  ends = np.array([[P * 16 + 7, 33], [1, 2], [-1, 0], [144, 100]], np.int32)
  fn = lambda *a: decode_attention(*a, 1.0, C, "mosaic_gpu")  # noqa: E731
  with interpreted():
    out = np.asarray(jax.jit(fn)(np.zeros_like(q), pages, table, ends))
  for b, s in np.ndindex(B, S):
    own = pages[table[b]].reshape(-1, W)[: max(ends[b, s], 0), :C].astype(np.float64)
    mean = own.mean(axis=0) if len(own) else np.zeros(C)
    assert_close(out[b, s], np.broadcast_to(mean, (H, C)), "bfloat16")


def test_a_model_decodes_with_it():
  """Named in the config: a cache without padding, queries absorbed, values expanded."""
  names = {"kv_lora_rank": C, "qk_rope_head_dim": W - C, "compute_dtype": "bfloat16"}
  overrides = {f"model.{name}": value for name, value in names.items()}

  def run(implementation):
    kernels = {"model.kernels.decode_attention": implementation}
    config = small_config(**overrides, **kernels).model
    assert cache.width(config) == W
    N, U, heads = config.qk_nope_head_dim, config.v_head_dim, config.num_attention_heads
    rng = np.random.default_rng(2)
    draw = lambda *shape: rng.standard_normal(shape).astype(b16)  # noqa: E731
    weights = cached_attention.Absorbed(draw(heads, N, C), draw(heads, C, U))
    q, pages = draw(B, S, heads, N + W - C), draw(B * P, cache.PAGE_TOKENS, W)
    table = rng.permutation(B * P).reshape(B, P).astype(np.int32)
    place = cached_attention.Place(
      jnp.asarray(table), jnp.arange(B, dtype=jnp.int32) * 37, jnp.full(B, S)
    )
    new = draw(B, S, C), draw(B, S, W - C)
    mla = types.SimpleNamespace(config=config)

    @jax.jit
    def step(pages, q, c, k):
      return cached_attention.in_latent_space(weights, pages, place)(mla, q, c, k)[0]

    return np.asarray(step(pages, q, *new))

  with interpreted():
    out = run("mosaic_gpu")
  assert out.shape == (B, S, 3, 10) and out.dtype == b16
  assert_close(out, run("reference"), "bfloat16")


def test_parts_fill_the_chip_and_no_more():
  """132 multiprocessors hold 66 clusters of two; 64 blocks of 64 tokens are 4,096."""
  assert gpu_decode.num_parts(66, 2, 64) == gpu_decode.num_parts(132, 1, 64) == 1
  assert gpu_decode.num_parts(33, 2, 64) == 2 and gpu_decode.num_parts(22, 2, 64) == 3
  assert gpu_decode.num_parts(34, 2, 64) == 3  # two rounds of a third
  assert gpu_decode.num_parts(60, 2, 64) == 1  # two parts would be two rounds of half
  assert gpu_decode.num_parts(1, 1, 5) == 5 and gpu_decode.num_parts(1, 2, 1) == 1


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"W": 200}, "W must be a multiple of 64, at most 576, got 200"),
    ({"W": 640}, "W must be a multiple of 64, at most 576, got 640"),
    ({"C": 64}, "value_width must be a multiple of 128, at most 512, got 64"),
    ({"T": 8}, "a page must have 16, 32 or 64 tokens, got 8"),
    ({"parts": 0}, "parts must be at least 1, got 0"),
    ({"dtype": np.float32}, "q and pages must be bfloat16, got float32"),
  ],
  ids=str,
)
def test_refuses(changes, message):
  sizes = {"W": W, "C": C, "T": 16, "parts": 1, "dtype": b16} | changes
  q = np.zeros((B, S, H, sizes["W"]), sizes["dtype"])
  pages = np.zeros((P, sizes["T"], sizes["W"]), sizes["dtype"])
  table, ends = np.zeros((B, P), np.int32), np.zeros((B, S), np.int32)
  with pytest.raises(ValueError, match=message):
    gpu_decode.decode_attention(q, pages, table, ends, 1.0, sizes["C"], sizes["parts"])


@pytest.mark.gpu
@pytest.mark.parametrize(
  "rows, new_tokens, heads, width, value_width, page_tokens, pages",
  [
    (32, 1, 128, 576, 512, 16, 256),
    (7, 2, 128, 576, 512, 16, 256),
    (32, 1, 16, 576, 512, 16, 256),
    (B, S, H, W, C, 64, P),
  ],
  ids=["V3", "V3_two_tokens", "V2-Lite", "small"],
)
def test_compiles(rows, new_tokens, heads, width, value_width, page_tokens, pages):
  """Without spills, its products overlapping; a cluster copies for both of its thread blocks."""
  struct = jax.ShapeDtypeStruct
  args = (
    struct((rows, new_tokens, heads, width), b16),
    struct((rows * pages, page_tokens, width), b16),
    struct((rows, pages), jnp.int32),
    struct((rows, new_tokens), jnp.int32),
  )
  fn = lambda *a: decode_attention(*a, 0.1, value_width, "mosaic_gpu")  # noqa: E731
  compiled, printed = compile_for_h100(fn, *args)
  (found,) = h100_resources(printed).values()
  assert found["spill_store_bytes"] == found["spill_load_bytes"] == 0
  assert found["serialized_wgmma"] == 0
  assert found.get("shared_bytes", 0) <= 227 * 1024  # which jax 0.12 does not print
  assert found.get("blocks_per_sm", 1) == 1
  # Parts and queries, never a copy of the cache.
  assert compiled.memory_analysis().temp_size_in_bytes < 64 * 2**20
