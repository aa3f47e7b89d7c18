"""Pages: what is written is read back; nobody gets a page that another row still needs."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsmoe import config as config_lib
from dsmoe.inference import cache
from dsmoe.inference.cache import PAGE_TOKENS
from dsmoe.planning import accounting
from experiments import deepseek_v3
from tests.helpers import small_config

N, W = 23, 5


def _table(rng, lengths, width):
  """Distinct pages for each row, as many as its length needs, scattered."""
  pages = iter(rng.permutation(N).tolist())
  table = np.zeros((len(lengths), width), np.int32)
  for row, length in enumerate(lengths):
    needed = -(-length // PAGE_TOKENS)
    table[row, :needed] = [next(pages) for _ in range(needed)]
  return table


@pytest.mark.parametrize(
  "S, firsts, counts", [(2, (15, 0, 33), (2, 0, 1)), (32, (16, 0, 32), (32, 5, 17))]
)
def test_written_latents_are_read_at_their_places(S, firsts, counts):
  rng = np.random.default_rng(S)
  firsts, counts = np.array(firsts), np.array(counts)
  table = _table(rng, firsts + counts, width=cache.BLOCK_PAGES)
  pages = rng.standard_normal((N, PAGE_TOKENS, W)).astype(np.float32)
  new = rng.standard_normal((3, S, W)).astype(np.float32)
  written = cache.write(jnp.asarray(pages), new, table, firsts, counts)
  expected = {}  # page, place in it -> latent
  for row in range(3):
    for s in range(counts[row]):
      position = firsts[row] + s
      expected[table[row, position // PAGE_TOKENS], position % PAGE_TOKENS] = new[row, s]
  for (page, place), latent in expected.items():
    np.testing.assert_array_equal(written[page, place], latent)
  untouched = np.ones((N, PAGE_TOKENS), bool)
  if S % PAGE_TOKENS:  # single tokens: the rest of their page stays
    untouched[tuple(np.array(list(expected)).T)] = False
  else:
    untouched[[page for page, _ in expected]] = False
  np.testing.assert_array_equal(np.asarray(written)[untouched], pages[untouched])
  block = np.asarray(cache.read(written, jnp.asarray(table), 0))
  assert block.shape == (3, cache.BLOCK_PAGES * PAGE_TOKENS, W)
  for row in range(3):
    for s in range(counts[row]):
      np.testing.assert_array_equal(block[row, firsts[row] + s], new[row, s])


def test_what_is_not_a_number_stays_out():
  new = jnp.asarray([[[1.0, jnp.nan], [jnp.inf, -2.0]]])
  written = cache.write(
    jnp.ones((2, PAGE_TOKENS, 2)), new, jnp.asarray([[1]]), jnp.asarray([3]), jnp.asarray([2])
  )
  assert written[1, 3:5].tolist() == [[1, 0], [0, -2]]


def test_bytes_of_a_token():
  v3 = config_lib.from_config_dict(deepseek_v3.get_config()).model
  assert cache.page_bytes(v3) == 70_272 * PAGE_TOKENS
  config = small_config().model
  each = accounting.kv_cache_bytes_per_token(config, 4)
  assert cache.page_bytes(config) == each * PAGE_TOKENS
  assert cache.page_bytes(config, speculate=True) == each * 6 // 5 * PAGE_TOKENS


def test_a_common_beginning_is_shared_and_outlives_its_rows():
  table = cache.PageTable(10)
  first = list(range(40))
  keys = cache.page_keys(first)
  pages, known = table.take(keys, 50)
  assert known == 0 and len(pages) == 4 and table.num_used == 4
  table.publish(keys, pages)
  same, known = table.take(keys, 50)
  assert known == 32 and same[:2] == pages[:2] and same[2:] != pages[2:]
  other, known = table.take(cache.page_keys(first[:20] + [99] * 20), 41)
  assert known == 16 and other[0] == pages[0] and other[1] != pages[1]
  for row in (pages, same, other):
    table.give_back(row)
  assert table.num_used == 0
  # A prompt that is known whole leaves its last token to be computed.
  again, known = table.take(cache.page_keys(first[:32]), 33)
  assert known == 16 and again[0] == pages[0]
  # A page's drafting latents depend on the token after it, so that must be the same too.
  for after, expected in ((first[16], 16), (99, 0)):
    row, known = table.take(cache.page_keys([*first[:16], after]), 17)
    assert known == expected
    table.give_back(row)


def test_the_page_unused_for_longest_goes_first_and_ends_before_its_beginning():
  table = cache.PageTable(4)
  keys = cache.page_keys(list(range(33)))
  assert len(keys) == 2
  pages, _ = table.take(keys, 33)
  table.publish(keys, pages)
  table.give_back(pages)
  table.take([], 17)  # two pages: the free ones
  assert table.known_pages(keys) == pages[:2]
  table.take([], 1)  # one of the known ones has to go
  assert table.known_pages(keys) == pages[:1]
  assert table.take([], 17) is None and table.known_pages(keys) == pages[:1]


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 90), st.integers(0, 30)), max_size=40))
def test_no_row_loses_a_page_whatever_comes_and_goes(actions):
  """Rows of few distinct beginnings: pages in use belong to rows of equal content there."""
  table, rows = cache.PageTable(12), []
  for kind, length, extra in actions:
    if kind == 3 and rows:
      table.give_back(rows.pop(length % len(rows))[1])
      continue
    prompt = [kind] * (length // 2) + list(range(length - length // 2))
    keys = cache.page_keys(prompt)
    taken = table.take(keys, length + extra)
    if taken is None:
      used = {page for _, pages in rows for page in pages}
      assert 12 - len(used) < -(-(length + extra) // PAGE_TOKENS)
      continue
    pages, known = taken
    assert len(pages) == len(set(pages)) == -(-(length + extra) // PAGE_TOKENS)
    assert known % PAGE_TOKENS == 0 and known < length
    for other, others in rows:
      for i, page in enumerate(pages):
        if page in others:
          end = (i + 1) * PAGE_TOKENS
          assert others[i] == page and end <= known and other[: end + 1] == prompt[: end + 1]
    table.publish(keys, pages)
    rows.append((prompt, pages))
    assert table.num_used == len({page for _, pages in rows for page in pages})
  for _, pages in rows:
    table.give_back(pages)
  assert table.num_used == 0
  assert table.take([], 12 * PAGE_TOKENS) is not None  # every page is to be had again
