"""Tests of dsmoe/data/packing.py; whole streams of rows are tested in test_data.py."""

import collections
import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dsmoe.data import packing
from tests.data.cases import EOS, assert_equal, row_by_loops


@settings(max_examples=30)
@given(
  lengths=st.lists(st.integers(1, 9), max_size=8),
  spare=st.integers(0, 3),
  cross=st.booleans(),
  weight=st.sampled_from([0.0, 1.0]),
)
def test_pack(lengths, spare, cross, weight):
  documents = [i for i, length in enumerate(lengths) for _ in range(length)]
  stream = list(range(1, len(documents) + 1))
  S = max(len(stream) - 1 + spare, 2)
  pieces = [
    np.array([t for t, d in zip(stream, documents) if d == i], np.uint32)
    for i in range(len(lengths))
  ]
  row = packing.pack(pieces, S, cross, weight)
  assert_equal(row, row_by_loops(stream, documents, S, cross, weight))


def whole_fim(tokens, marks, entropy):
  def read(start, stop):
    return tokens[start:stop]

  return packing.fill_in_the_middle(read, len(tokens), marks, entropy, 0, len(tokens) + 3)


@settings(max_examples=30)
@given(
  text=st.lists(st.integers(10, 99), unique=True, max_size=20),
  entropy=st.tuples(st.integers(0, 2**40), st.integers(0, 3)),
)
def test_fill_in_the_middle(text, entropy):
  tokens = np.array([*text, EOS], np.uint32)
  out = whole_fim(tokens, (1, 2, 3), entropy)
  assert out.dtype == np.uint32 and out[0] == 1 and out[-1] == EOS
  assert sorted(out.tolist()) == sorted([*tokens.tolist(), 1, 2, 3])
  b, c = out.tolist().index(2), out.tolist().index(3)
  assert [*out[1:b], *out[c + 1 : -1], *out[b + 1 : c]] == text
  np.testing.assert_array_equal(out, whole_fim(tokens, (1, 2, 3), entropy))
  # Any part is that of the whole, and no more of the document is read for it.
  for start, stop in itertools.combinations(range(len(out) + 1), 2):
    part = packing.fill_in_the_middle(
      lambda a, b: tokens[a:b], len(tokens), (1, 2, 3), entropy, start, stop
    )
    np.testing.assert_array_equal(part, out[start:stop])


def test_fill_in_the_middle_splits_are_uniform():
  tokens = np.array([10, 11, EOS], np.uint32)
  count = collections.Counter(
    tuple(whole_fim(tokens, (1, 2, 3), (0, i)).tolist()) for i in range(900)
  )
  # Two independent cuts in {0, 1, 2}, sorted: unequal pairs come twice as often.
  assert len(count) == 6
  assert all(60 < n < 260 for n in count.values())
