"""Tests of dsmoe/data/position.py; rows read from a position are tested in test_batches.py."""

import collections
import dataclasses
import json

import grain
import pytest

from dsmoe.data import position as position_lib
from tests.data.cases import data_config
from tests.helpers import small_config


@pytest.mark.parametrize(
  "weights", [(1.0,), (3.0, 1.0), (0.2, 0.3, 0.5), (1.0, 7.3, 0.01), (1,) * 9]
)
def test_the_order_of_a_mixture_is_grains(weights):
  """Runs from before this order was written here go on with the same rows."""
  sources = [grain.MapDataset.source([(i, n) for n in range(3000)]) for i in range(len(weights))]
  mixture = grain.MapDataset.mix(sources, weights)
  seen = collections.Counter()
  for n in range(1500):
    source, index = mixture[n]
    before = position_lib.rows_of_sources(n, weights)
    assert before == [seen[i] for i in range(len(weights))]
    assert index == before[source]
    seen[source] += 1


def config_of(globs, weights, S=16):
  return data_config(train_globs=globs, train_weights=weights, sequence_length=S)


def test_counts():
  config = config_of(("a", "b"), (3.0, 1.0))
  position = position_lib.first_position(config).advance(config, 8).advance(config, 4)
  assert position == position_lib.first_position(config).advance(config, 12)
  assert position == position_lib.Position(12, 192, (("a", 144), ("b", 48)))
  longer = dataclasses.replace(config, sequence_length=100)
  assert position.advance(longer, 4) == position_lib.Position(16, 592, (("a", 444), ("b", 148)))


@pytest.mark.parametrize(
  "globs, tokens",
  [
    (("a", "b", "a"), [10, 20, 30]),
    (("b", "a"), [20, 10]),
    (("a",), [10]),
    (("a", "b", "a", "new"), [10, 20, 30, 0]),
    (("a", "renamed", "a"), [10, 20, 30]),
    (("new", "a", "b"), [0, 10, 20]),
  ],
)
def test_sources_are_found_by_name(globs, tokens):
  position = position_lib.Position(9, 60, (("a", 10), ("b", 20), ("a", 30)))
  assert position.tokens_of_sources(globs) == tokens


def test_a_source_that_was_away_keeps_its_number_and_its_place():
  both, alone = config_of(("a", "b"), (1.0, 1.0)), config_of(("a",), (1.0,))
  position = position_lib.first_position(both).advance(both, 8).advance(alone, 3)
  position = position_lib.position_from_dict(json.loads(json.dumps(position.to_dict())), None)
  assert position.order == (0,)
  for globs, numbers, tokens in (
    (("a", "b"), [0, 1], [112, 64]),
    (("b", "a"), [1, 0], [64, 112]),
    (("a", "new"), [0, 2], [112, 0]),
    (("renamed", "b"), [0, 1], [112, 64]),
    (("a", "a"), [0, 2], [112, 0]),
  ):
    assert position.numbers_of_sources(globs) == numbers
    assert position.tokens_of_sources(globs) == tokens
  three = config_of(("new", "b", "a"), (1.0, 1.0, 1.0))
  position = position.advance(three, 3)
  assert [name for name, _ in position.sources] == ["a", "b", "new"]
  assert position.order == (2, 1, 0)


def test_json_and_back():
  config = config_of(("a", "b"), (3.0, 1.0))
  position = position_lib.first_position(config).advance(config, 13)
  saved = json.loads(json.dumps(position.to_dict()))
  assert position_lib.position_from_dict(saved, None) == position


def test_batches_of_older_versions():
  config = small_config(batch_size=8)
  S = config.data.sequence_length
  position = position_lib.position_from_dict({"next_batch": 5}, lambda: config)
  assert (position.sequences, position.tokens) == (40, 40 * S)
  assert position == position_lib.first_position(config.data).advance(config.data, 40)


@pytest.mark.parametrize(
  "saved",
  [
    {},
    {"next_batch": -1},
    {"next_batch": "5"},
    {"sequences": 1, "tokens": 2},
    {"sequences": 1, "tokens": 2.0, "sources": []},
    {"sequences": 1, "tokens": 2, "sources": [["a"]]},
    {"sequences": 1, "tokens": 2, "sources": [["a", True]]},
    {"sequences": None, "tokens": 2, "sources": []},
    {"sequences": 1, "tokens": 2, "sources": [["a", 2]], "order": [1]},
    {"sequences": 1, "tokens": 2, "sources": [["a", 2], ["b", 0]], "order": [1, 1]},
    {"sequences": 1, "tokens": 2, "sources": [["a", 2]], "order": ["0"]},
    {"sequences": 1, "tokens": 2, "sources": [["a", 2]], "order": None},
  ],
)
def test_a_damaged_position_is_refused(saved):
  with pytest.raises(ValueError, match="data position of a checkpoint must have its counts"):
    position_lib.position_from_dict(saved, small_config)
