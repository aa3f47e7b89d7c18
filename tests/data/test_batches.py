"""Tests of dsmoe/data/batches.py, and with it of the rows of dsmoe/data/packing.py.

The oracles rebuild documents and rows from tokens with plain loops.
"""

import dataclasses
import itertools
import json

import numpy as np
import pytest

from dsmoe.data import batches, packing
from tests.data import cases
from tests.data.cases import (
  EOS,
  NAMES,
  VOCAB,
  assert_equal,
  data_config,
  row_by_loops,
  text_config,
  token_documents,
  words,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return cases.make_folder(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def prepared(folder, tmp_path_factory):
  return batches.prepare(text_config(folder), VOCAB, tmp_path_factory.mktemp("cache"))


def take(iterator, count):
  return list(itertools.islice(iterator, count))


def from_batch(prepared, config, batch_size, number, *processes):
  """Reads on from where `number` batches were consumed."""
  position = batches.first_position(config).advance(config, number * batch_size)
  return batches.train_iterator(prepared, config, batch_size, *(processes or (0, 1)), position)


def rows_of_source(prepared, config, source, count):
  rows = packing.TrainRows(prepared.train[source], prepared, config, source)
  return [rows[i] for i in range(count)]


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("fim_rate", [0.0, 0.5])
@pytest.mark.parametrize("S", [16, 7, 1000])  # 1000: several epochs in a row
def test_rows_are_the_stream_of_epochs(prepared, folder, cross, fim_rate, S):
  config = text_config(folder, cross_document_attention=cross, fim_rate=fim_rate, sequence_length=S)
  originals = token_documents(prepared.train[1])
  num_fim = round(fim_rate * len(originals))
  epoch_tokens = sum(map(len, originals)) + 3 * num_fim
  rows = rows_of_source(prepared, config, 1, -(-3 * epoch_tokens // S))
  stream = [int(t) for row in rows for t in row["tokens"]]
  assert len(stream) >= 3 * epoch_tokens

  # Each epoch is every document once, in another order; fill-in-the-middle undone.
  orders, split_points = [], set()
  for epoch in range(3):
    part = stream[epoch * epoch_tokens : (epoch + 1) * epoch_tokens]
    assert part[-1] == EOS
    documents: list[list[int]] = []
    for token in part:
      if not documents or documents[-1][-1] == EOS:
        documents.append([])
      documents[-1].append(token)
    restored = []
    for document in documents:
      if document[0] == 1:
        assert [t for t in document if t in (1, 2, 3)] == [1, 2, 3]
        b, c = document.index(2), document.index(3)
        split_points.add((b, c))
        document = document[1:b] + document[c + 1 : -1] + document[b + 1 : c] + [EOS]
      restored.append(document)
    assert sum(document[0] == 1 for document in documents) == num_fim
    assert sorted(restored) == sorted(originals)
    orders.append(tuple(originals.index(document) for document in restored))
  assert len(set(orders)) > 1
  assert len(split_points) > 2 if num_fim else not split_points

  # Every row is its part of the stream, with the masks of loops over it.
  number, numbers = 0, []
  for token in stream:
    numbers.append(number)
    number += token == EOS
  for r in range(3 * epoch_tokens // S - 1):
    window = slice(r * S, r * S + S + 1)
    assert_equal(rows[r], row_by_loops(stream[window], numbers[window], S, cross))


def test_fill_in_the_middle_differs_by_document_and_epoch(tmp_path):
  text = words(0, 50)
  rows = [json.dumps({"text": text})] * 6
  (tmp_path / "same.jsonl").write_text("\n".join(rows))
  config = data_config(
    train_globs=(f"{tmp_path}/same.jsonl",),
    validation_globs=(),
    fim_rate=1.0,
    sequence_length=64,
  )
  prepared = batches.prepare(config, VOCAB, tmp_path / "cache")
  stream = np.concatenate([row["tokens"] for row in rows_of_source(prepared, config, 0, 100)])
  ends = np.flatnonzero(stream == EOS)[:12]
  documents = np.split(stream, ends + 1)[:12]  # two epochs
  assert len({document.tobytes() for document in documents}) > 9


@pytest.mark.parametrize("fim_rate", [0.0, 0.4])
def test_any_number_of_processes_from_any_batch(prepared, folder, fim_rate):
  config = text_config(folder, fim_rate=fim_rate)
  made = take(batches.train_iterator(prepared, config, 8), 12)
  for batch in made:
    for name in NAMES:
      assert batch[name].shape == (8, 16)
      assert batch[name].dtype == (np.float32 if name == "weights" else np.int32)
  for count, start in itertools.product((1, 2, 4), (0, 5)):
    parts = [take(from_batch(prepared, config, 8, start, p, count), 7) for p in range(count)]
    for i in range(7):
      joined = {name: np.concatenate([part[i][name] for part in parts]) for name in NAMES}
      assert_equal(joined, made[start + i])


def test_far_away_batches_are_cheap_and_seeds_matter(prepared, folder):
  config = text_config(folder)
  far = take(from_batch(prepared, config, 4, 10**9), 2)
  assert_equal(far[1], next(from_batch(prepared, config, 4, 10**9 + 1)))
  a = next(batches.train_iterator(prepared, config, 4))
  b = next(batches.train_iterator(prepared, dataclasses.replace(config, seed=1), 4))
  assert (a["tokens"] != b["tokens"]).any()


@pytest.mark.parametrize("weights", [(3.0, 1.0), (0.2, 0.3)])
def test_mixture_keeps_its_proportions(prepared, folder, weights):
  config = text_config(folder, train_weights=weights)
  rows = [iter(rows_of_source(prepared, config, source, 90)) for source in (0, 1)]
  following, drawn = [next(r) for r in rows], [0, 0]
  for batch in take(batches.train_iterator(prepared, config, 10), 10):
    for i in range(10):
      (source,) = [s for s in (0, 1) if (batch["tokens"][i] == following[s]["tokens"]).all()]
      assert_equal({name: batch[name][i] for name in NAMES}, following[source])
      following[source] = next(rows[source])
      drawn[source] += 1
  assert abs(drawn[0] - 100 * weights[0] / sum(weights)) <= 1


def test_synthetic(tmp_path):
  config = data_config(
    train_globs=("synthetic",), validation_globs=("synthetic",), sequence_length=32
  )
  prepared = batches.prepare(config, 1000, tmp_path)
  assert prepared.tokenizer is None
  made = take(batches.train_iterator(prepared, config, 4), 3)
  assert_equal(made[2], next(from_batch(prepared, config, 4, 2)))
  rows = np.concatenate([batch["tokens"] for batch in made])
  assert len({row.tobytes() for row in rows}) == 12
  assert 0 <= rows.min() and 900 < rows.max() < 1000
  for batch in made:
    np.testing.assert_array_equal(batch["tokens"][:, 1:], batch["targets"][:, :-1])
    np.testing.assert_array_equal(batch["positions"], np.tile(np.arange(32), (4, 1)))
    assert (batch["segments"] == 1).all() and (batch["weights"] == 1).all()
  total = sum(batch["weights"].sum() for batch in batches.validation_batches(prepared, config, 5))
  assert total == prepared.validation_tokens == prepared.validation_bytes


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("S", [16, 5, 4000])
def test_validation_has_every_token_once(prepared, folder, cross, S):
  config = text_config(folder, cross_document_attention=cross, sequence_length=S)
  documents = token_documents(prepared.validation)
  made = list(batches.validation_batches(prepared, config, 4))
  assert all(batch["tokens"].shape == (4, S) for batch in made)
  rows = [{name: batch[name][i] for name in NAMES} for batch in made for i in range(4)]
  targets = [int(t) for row in rows for t, w in zip(row["targets"], row["weights"]) if w]
  assert targets == [token for document in documents for token in document]
  assert sum(row["weights"].sum() for row in rows) == prepared.validation_tokens

  stream, numbers = [EOS], [0]
  for number, document in enumerate(documents, start=1):
    stream += document
    numbers += [number] * len(document)
  for r, row in enumerate(rows):
    part = slice(r * S, r * S + S + 1)
    assert_equal(row, row_by_loops(stream[part], numbers[part], S, cross, 1.0))


def test_validation_of_several_processes(prepared, folder):
  config = text_config(folder)
  made = list(batches.validation_batches(prepared, config, 8))
  parts = [list(batches.validation_batches(prepared, config, 8, p, 4)) for p in range(4)]
  assert {len(part) for part in parts} == {len(made)}
  for i, batch in enumerate(made):
    assert_equal({n: np.concatenate([part[i][n] for part in parts]) for n in NAMES}, batch)


def test_no_validation(folder, tmp_path):
  prepared = batches.prepare(text_config(folder, validation_globs=()), VOCAB, tmp_path)
  assert prepared.validation_bytes == prepared.validation_tokens == 0
  assert (
    list(batches.validation_batches(prepared, text_config(folder, validation_globs=()), 4)) == []
  )


def test_iterator_errors(prepared, folder):
  config = text_config(folder)
  for read in (batches.train_iterator, lambda *args: next(batches.validation_batches(*args))):
    with pytest.raises(ValueError, match=r"batch_size \(8\) must be divisible by .*\(3\)"):
      read(prepared, config, 8, 0, 3)
    with pytest.raises(ValueError, match=r"process_index \(2\) .* process_count \(2\)"):
      read(prepared, config, 8, 2, 2)


def flat(tensors, name="tokens"):
  return np.concatenate([batch[name].reshape(-1) for batch in tensors])


@pytest.mark.parametrize("fim_rate", [0.0, 0.4])
def test_a_changed_batch_size_goes_on_at_the_next_row(prepared, folder, fim_rate):
  config = text_config(folder, fim_rate=fim_rate)
  expected = take(batches.train_iterator(prepared, config, 1), 8 * 3 + 4 * 5 + 16 * 2 + 2)
  position, found = batches.first_position(config), []
  for batch_size, count in ((8, 3), (4, 5), (16, 2), (2, 1)):
    found += take(batches.train_iterator(prepared, config, batch_size, 0, 1, position), count)
    position = position.advance(config, batch_size * count)
  assert position.sequences == len(expected) and position.tokens == 16 * len(expected)
  for name in NAMES:
    np.testing.assert_array_equal(flat(found, name), flat(expected, name))


def tokens_by_source(prepared, position, config, count):
  """Reads rows from a position on; returns each source's tokens, told apart by their text."""
  found = ([], [])
  rows = [packing.TrainRows(prepared.train[s], prepared, config, s) for s in (0, 1)]
  S = config.sequence_length
  streams = [np.concatenate([r[i]["tokens"] for i in range(400)]) for r in rows]
  places = position.tokens_of_sources(config.train_globs)
  for batch in take(batches.train_iterator(prepared, config, 1, 0, 1, position), count):
    row = batch["tokens"][0]
    (source,) = [s for s in (0, 1) if (streams[s][places[s] : places[s] + S] == row).all()]
    found[source].append(row)
    places[source] += S
  return found, places


@pytest.mark.parametrize(
  "change",
  [
    {"sequence_length": 24},
    {"sequence_length": 5},
    {"train_weights": (1.0, 2.0)},
    {"sequence_length": 7, "train_weights": (1.0, 1.0)},
  ],
)
def test_other_changes_go_on_at_the_next_token_of_every_source(prepared, folder, change):
  """`tokens_by_source` finds each row where the source's stream goes on, or fails."""
  config = text_config(folder)
  position = batches.first_position(config)
  for values in ({}, change, {}, change):
    now = dataclasses.replace(config, **values)
    found, places = tokens_by_source(prepared, position, now, 23)
    assert all(len(rows) > 4 for rows in found)
    before = position
    position = position.advance(now, 23)
    assert position.tokens_of_sources(now.train_globs) == places
    assert position.tokens - before.tokens == 23 * now.sequence_length
    assert position.sequences - before.sequences == 23


def test_sources_in_another_order_or_away_for_a_while_go_on(prepared, folder):
  """Every row is the next of its source's one stream: none is read twice, none left out."""
  config = text_config(folder)
  S, globs = config.sequence_length, config.train_globs
  streams = []
  for source in (0, 1):
    rows = packing.TrainRows(prepared.train[source], prepared, config, source)
    streams.append(np.concatenate([rows[i]["tokens"] for i in range(100)]))
  position, places = batches.first_position(config), [0, 0]
  for order in ((0, 1), (1, 0), (1,), (1, 0), (0, 1), (0,), (0, 1)):
    now = dataclasses.replace(
      config,
      train_globs=tuple(globs[i] for i in order),
      train_weights=tuple(config.train_weights[i] for i in order),
    )
    data = dataclasses.replace(prepared, train=tuple(prepared.train[i] for i in order))
    for batch in take(batches.train_iterator(data, now, 1, 0, 1, position), 9):
      row = batch["tokens"][0]
      [source] = [i for i in order if (streams[i][places[i] : places[i] + S] == row).all()]
      places[source] += S
    position = position.advance(now, 9)
    assert position.tokens_of_sources(globs) == places


def test_a_changed_length_of_synthetic_rows(tmp_path):
  config = data_config(train_globs=("synthetic",), validation_globs=(), sequence_length=32)
  prepared = batches.prepare(config, 1000, tmp_path)
  position = batches.first_position(config).advance(config, 6)
  shorter = dataclasses.replace(config, sequence_length=8)
  batch = next(batches.train_iterator(prepared, shorter, 2, 0, 1, position))
  rows = packing.SyntheticRows(1000, 8, (config.seed, 0))
  np.testing.assert_array_equal(batch["tokens"], [rows[6]["tokens"], rows[7]["tokens"]])


def test_a_source_smaller_than_its_share_of_a_batch_is_said(prepared, folder, caplog):
  config = text_config(folder)
  tokens = prepared.train_tokens
  assert tokens[0] > 3 * 16 and tokens[1] > 16
  with caplog.at_level("WARNING", logger="absl"):
    batches.train_iterator(prepared, config, 4)
    assert not caplog.messages
    batches.train_iterator(prepared, config, 1024)
  assert len(caplog.messages) == 2
  assert caplog.messages[0] == (
    f"every batch repeats text: {config.train_globs[0]!r} has {tokens[0]} tokens, and its share of "
    f"a batch is {768 * 16}"
  )
