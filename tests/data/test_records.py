"""Tests of dsmoe/data/records.py."""

import dataclasses
import hashlib
import itertools
import json
import random
import re
import signal
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer

from dsmoe.data import batches, encoding, shards
from dsmoe.data import folder as folder_lib
from dsmoe.data import tokenizer as tokenizer_lib
from tests import runs
from tests.data import cases
from tests.data.cases import EOS, VOCAB, data_config, text_config, texts_of, token_documents, words


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return cases.make_folder(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def prepared(folder, tmp_path_factory):
  return batches.prepare(text_config(folder), VOCAB, tmp_path_factory.mktemp("cache"))


def test_records_hold_the_text(folder, prepared):
  for source, name in enumerate("ab"):
    texts = texts_of(folder, name)
    documents = token_documents(prepared.train[source])
    assert all(document[-1] == EOS and EOS not in document[:-1] for document in documents)
    assert [prepared.tokenizer.decode(d[:-1]) for d in documents] == texts
    assert prepared.train_bytes[source] == sum(len(text.encode()) for text in texts)
    assert prepared.train_tokens[source] == sum(map(len, documents))
  held_out = texts_of(folder, "v")
  assert [
    prepared.tokenizer.decode(d[:-1]) for d in token_documents(prepared.validation)
  ] == held_out
  assert prepared.validation_bytes == len("".join(held_out).encode())
  assert prepared.validation_tokens == sum(map(len, token_documents(prepared.validation)))


def test_manifest(folder, prepared):
  manifest = json.loads(prepared.manifest.read_text())
  said = manifest.pop("manifest_sha256")
  assert said == hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
  hashes = manifest["inputs"]["sources"]["train-1"]["sha256"]
  assert hashes == {
    path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("b/*.txt")
  }


@pytest.mark.parametrize(
  "name, text, message",
  [
    ("a.jsonl", '{"text": "x"}\n{"text', r"must be JSON; a.jsonl:2"),
    (
      "a.jsonl",
      '{"text": "x"}\n{"body": "y"}',
      r"'text' must be a string; at a.jsonl:2 it is None",
    ),
    ("a.jsonl", '{"text": "x"}\n["y"]', r"'text' must be a string; at a.jsonl:2 it is \['y'\]"),
    ("a.txt", "", r"must have text; .*a.txt' \(train-0\) has none$"),
    ("a.txt", " \n\u3000\t" * 9, r"a.txt' \(train-0\) has none but white space"),
    ("a.jsonl", '{"text": ""}\n{"text": " "}', r"\(train-0\) has none but white space"),
    ("a.jsonl", '{"text": "  "}\n' * 2000 + "[", r"must be JSON; a.jsonl:2001"),
  ],
)
def test_errors_in_sources(tmp_path, name, text, message):
  (tmp_path / name).write_text(text)
  config = data_config(train_globs=(f"{tmp_path}/{name}",), validation_globs=())
  with pytest.raises(ValueError, match=message):
    batches.prepare(config, VOCAB, tmp_path / "cache")
  # Nothing was made, so what was wrong can be put right.
  (tmp_path / name).write_text('{"text": "all is well"}')
  assert batches.prepare(config, VOCAB, tmp_path / "cache").train_bytes[0] > 0


def test_errors_in_the_config(folder, tmp_path):
  with pytest.raises(ValueError, match=r"data.train_globs must match a file; '.*absent"):
    batches.prepare(data_config(train_globs=(f"{folder}/absent*",)), VOCAB, tmp_path)
  with pytest.raises(ValueError, match=r"data.validation_globs must match a file; '.*absent"):
    batches.prepare(text_config(folder, validation_globs=(f"{folder}/absent",)), VOCAB, tmp_path)
  with pytest.raises(ValueError, match=r"must be a local directory, got gs://bucket"):
    batches.prepare(text_config(folder), VOCAB, "gs://bucket/cache")
  with pytest.raises(ValueError, match="'synthetic' must stand alone"):
    batches.prepare(data_config(validation_globs=("synthetic", "stdlib")), VOCAB, tmp_path)
  pq.write_table(pa.table({"body": ["x"]}), tmp_path / "x.parquet")
  with pytest.raises(ValueError, match=r"'text' is not one of x\.parquet's columns body"):
    batches.prepare(data_config(train_globs=(f"{tmp_path}/x.parquet",)), VOCAB, tmp_path / "cache")


class Killed(Exception):
  pass


def contents(directory):
  """Everything but the times of hashing."""
  return {p.name: p.read_bytes() for p in directory.iterdir() if p.name != "hashes.json"}


def test_interrupted_and_uninterrupted_runs_leave_the_same_bytes(folder, tmp_path, monkeypatch):
  monkeypatch.setattr(shards, "SHARD_BYTES", 300)
  monkeypatch.setattr(encoding, "_BATCH_CHARS", 100)
  config = text_config(folder)
  batches.prepare(config, VOCAB, tmp_path / "whole")
  whole = contents(tmp_path / "whole")
  assert sum(name.endswith(".arrayrecord") for name in whole) > 6

  encode = tokenizer_lib.encode_documents
  calls = itertools.count(1)
  for limit in (2, 9, 14):  # in the first file, and twice further on

    def encode_until_killed(*args, limit=limit):
      if next(calls) == limit:
        raise Killed
      return encode(*args)

    monkeypatch.setattr(tokenizer_lib, "encode_documents", encode_until_killed)
    with pytest.raises(Killed):
      batches.prepare(config, VOCAB, tmp_path / "killed")
    left = contents(tmp_path / "killed")
    assert "manifest.json" not in left
    assert left.items() <= whole.items()  # whole files only
  (tmp_path / "killed" / "train-0-00003.arrayrecord.x.tmp").write_bytes(b"of a process killed hard")
  monkeypatch.setattr(tokenizer_lib, "encode_documents", encode)
  batches.prepare(config, VOCAB, tmp_path / "killed")
  assert contents(tmp_path / "killed") == whole


def test_reuse(folder, tmp_path, monkeypatch):
  first = batches.prepare(text_config(folder), VOCAB, tmp_path)
  before = contents(tmp_path)
  monkeypatch.setattr(tokenizer_lib, "encode_documents", None)  # neither is needed again
  monkeypatch.setattr(tokenizer_lib, "train_tokenizer", None)
  # What does not touch the tokens may change.
  config = text_config(folder, seed=5, sequence_length=8, fim_rate=0.5, train_weights=(1.0, 1.0))
  second = batches.prepare(config, VOCAB, tmp_path)
  assert contents(tmp_path) == before
  for field in dataclasses.fields(first):
    if field.name != "tokenizer":
      assert getattr(first, field.name) == getattr(second, field.name)


def test_anything_else_than_before_is_an_error(tmp_path):
  (tmp_path / "in").mkdir()
  for name in ("a.txt", "b.txt"):
    (tmp_path / "in" / name).write_text(words(name, 30))
  config = data_config(train_globs=(f"{tmp_path}/in/*",), validation_globs=(f"{tmp_path}/in/b*",))
  batches.prepare(config, VOCAB, tmp_path / "cache")
  before = contents(tmp_path / "cache")

  def refused(match, config=config, vocab_size=VOCAB):
    with pytest.raises(ValueError, match=match):
      batches.prepare(config, vocab_size, tmp_path / "cache")
    assert contents(tmp_path / "cache") == before

  refused(r"not overwritten.*\n.*trained_to_vocab_size: 300 -> 299", vocab_size=299)
  refused(r"text_field: text -> body", dataclasses.replace(config, text_field="body"))
  text = (tmp_path / "in" / "a.txt").read_text()
  (tmp_path / "in" / "a.txt").write_text(text[:-1] + "?")  # same length, same second
  refused(r"train-0.sha256.a.txt: \w{64} -> \w{64}")
  (tmp_path / "in" / "a.txt").write_text(text)
  (tmp_path / "in" / "c.txt").write_text("new")
  refused(r"train-0.sha256.c.txt: \(absent\) -> \w{64}")
  (tmp_path / "in" / "c.txt").unlink()
  tokenizer_lib.train_tokenizer(["else"], VOCAB).save(str(tmp_path / "other.json"))
  refused(r"tokenizer", dataclasses.replace(config, tokenizer=str(tmp_path / "other.json")))
  batches.prepare(config, VOCAB, tmp_path / "cache")
  shard = tmp_path / "cache" / "train-0-00000.arrayrecord"
  shard.write_bytes(shard.read_bytes()[:-1])
  before = contents(tmp_path / "cache")
  refused(
    r"train-0-00000.arrayrecord must have \d+ bytes.*delete train-0-00000.arrayrecord and man"
  )


def test_paths_in_the_home_folder(folder, prepared, tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(prepared.manifest.parent))
  config = text_config(folder, tokenizer="~/tokenizer.json")
  prepared.manifest.parent.joinpath("more").mkdir()
  again = batches.prepare(config, VOCAB, "~/more/cache")
  assert again.manifest == prepared.manifest.parent / "more" / "cache" / "manifest.json"
  assert again.train_tokens == prepared.train_tokens


def test_a_given_tokenizer(folder, prepared, tmp_path):
  path = str(prepared.manifest.parent / "tokenizer.json")
  again = batches.prepare(text_config(folder, tokenizer=path), VOCAB + 100, tmp_path)
  assert token_documents(again.train[0]) == token_documents(prepared.train[0])
  size = prepared.tokenizer.get_vocab_size()
  with pytest.raises(ValueError, match=rf"vocabulary \({size} ids\).*vocab_size \({size - 1}\)"):
    batches.prepare(text_config(folder, tokenizer=path), size - 1, tmp_path / "small")
  with pytest.raises(ValueError, match=r"tokenizer.json, got absent.json"):
    batches.prepare(text_config(folder, tokenizer="absent.json"), VOCAB, tmp_path / "none")


def make_sources(folder):
  """Writes a training and a validation file of JSON lines; returns a config of them."""
  for name, count in (("a", 40), ("v", 3)):
    rows = [json.dumps({"text": words(f"{name}{i}", 20)}) for i in range(count)]
    (folder / f"{name}.jsonl").write_text("\n".join(rows))
  return data_config(
    train_globs=(f"{folder}/a.jsonl",), validation_globs=(f"{folder}/v.jsonl",), sequence_length=16
  )


def test_what_a_failed_preparation_left_is_made_again(tmp_path, monkeypatch, caplog):
  monkeypatch.setattr(shards, "SHARD_BYTES", 300)
  config = make_sources(tmp_path)
  good = (tmp_path / "a.jsonl").read_text()
  batches.prepare(config, VOCAB, tmp_path / "whole")
  (tmp_path / "a.jsonl").write_text(good.replace(words("a5", 20)[:9], "other") + '\n{"text": 3}')
  tokenizer = str(tmp_path / "whole" / "tokenizer.json")
  given = dataclasses.replace(config, tokenizer=tokenizer)
  with pytest.raises(ValueError, match=r"must be a string; at a.jsonl:41 it is 3"):
    batches.prepare(given, VOCAB, tmp_path / "cache")
  left = contents(tmp_path / "cache")
  assert "train-0-00001.arrayrecord" in left  # of text that is about to change
  (tmp_path / "a.jsonl").write_text(good)
  batches.prepare(config, VOCAB, tmp_path / "cache")
  assert "unfinished preparation from other sources" in caplog.text
  assert contents(tmp_path / "cache") == contents(tmp_path / "whole")


def test_validation_is_read_before_anything_is_made(tmp_path):
  config = make_sources(tmp_path)
  with (tmp_path / "v.jsonl").open("a") as file:
    file.write('\n{"text": 3}')
  with pytest.raises(ValueError, match=r"must be a string; at v.jsonl:4 it is 3"):
    batches.prepare(config, VOCAB, tmp_path / "cache")
  assert set(contents(tmp_path / "cache")) == set()


def test_every_training_file_is_opened_before_anything_is_made(tmp_path):
  config = make_sources(tmp_path)
  (tmp_path / "b.csv").write_text("id,text")
  config = dataclasses.replace(config, train_globs=(f"{tmp_path}/[ab].*",))
  with pytest.raises(ValueError, match=r"b.csv is a .csv file"):
    batches.prepare(config, VOCAB, tmp_path / "cache")
  assert set(contents(tmp_path / "cache")) == set()


def test_another_process_at_work_is_left_alone(tmp_path):
  config = make_sources(tmp_path)
  batches.prepare(config, VOCAB, tmp_path / "cache")
  (tmp_path / "cache" / "manifest.json").unlink()
  (tmp_path / "cache" / "x.arrayrecord.1.tmp").write_bytes(b"being written")
  before = contents(tmp_path / "cache")
  lock = folder_lib.Lock(tmp_path / "cache")
  assert lock.is_exclusive
  lock.share()
  with pytest.raises(ValueError, match="not overwritten"):
    batches.prepare(config, VOCAB - 1, tmp_path / "cache")
  assert contents(tmp_path / "cache") == before
  batches.prepare(config, VOCAB, tmp_path / "cache")  # the same data may be made by both
  lock.close()
  (tmp_path / "cache" / "manifest.json").unlink()
  batches.prepare(config, VOCAB - 1, tmp_path / "cache")
  assert "x.arrayrecord.1.tmp" not in contents(tmp_path / "cache")


def test_a_folder_of_something_else_is_not_touched(tmp_path):
  config = make_sources(tmp_path)
  (tmp_path / "cache").mkdir()
  (tmp_path / "cache" / "tokenizer.json").write_text("someone's")
  with pytest.raises(ValueError, match=r"cache holds tokenizer.json and no inputs.json"):
    batches.prepare(config, VOCAB, tmp_path / "cache")
  assert contents(tmp_path / "cache") == {"tokenizer.json": b"someone's"}


DAMAGES = {
  "cut": lambda data: data[: len(data) // 2],
  "empty": lambda data: b"",
  "zeros": lambda data: bytes(len(data)),
  "garbage": lambda data: b"\xff\x00garbage" * 9,
  "other JSON": lambda data: b"[1, 2]",
  "flipped digit": lambda data: re.sub(rb"\d", lambda m: b"%d" % ((int(m[0]) + 1) % 10), data),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["hashes.json", "inputs.json"])
@pytest.mark.parametrize("is_finished", [True, False])
def test_damaged_files_that_are_made_again(tmp_path, damage, name, is_finished, caplog):
  config, cache = make_sources(tmp_path), tmp_path / "cache"
  batches.prepare(config, VOCAB, cache)
  whole = contents(cache)
  if not is_finished:
    (cache / "manifest.json").unlink()
  (cache / name).write_bytes(DAMAGES[damage]((cache / name).read_bytes()))
  caplog.clear()
  batches.prepare(config, VOCAB, cache)
  if is_finished and name == "inputs.json":  # the manifest has the inputs too
    (cache / name).write_bytes(whole[name])
  else:
    assert "made again" in caplog.text
  assert contents(cache) == whole


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(
  "name",
  ["manifest.json", "tokenizer.json", "train-0-00000.lengths.npy", "train-0-00000.arrayrecord"],
)
def test_damaged_files_are_named_with_what_to_do(tmp_path, damage, name):
  config, cache = make_sources(tmp_path), tmp_path / "cache"
  batches.prepare(config, VOCAB, cache)
  whole = contents(cache)
  (cache / name).write_bytes(DAMAGES[damage](whole[name]))
  if name.endswith("lengths.npy") and damage == "flipped digit":
    return  # the header may then say the same in other words
  with pytest.raises(ValueError, match=re.escape(name)) as caught:
    prepared = batches.prepare(config, VOCAB, cache)
    shards.Documents(prepared.train[0]).read(0, 0, 1)  # records are checked when they are read
  advice = str(caught.value).rpartition("; ")[2]
  if name == "tokenizer.json":
    assert advice.startswith("restore it, or delete ")
    for path in cache.iterdir():
      path.unlink()
  elif name == "manifest.json":
    assert advice == "delete it, and the next start makes it again"
    (cache / name).unlink()
  else:
    shard = "train-0-00000.arrayrecord"
    assert advice == f"delete {shard} and manifest.json, and the next start makes both again"
    (cache / shard).unlink()
    (cache / "manifest.json").unlink()
  batches.prepare(config, VOCAB, cache)
  assert contents(cache) == whole


@pytest.mark.parametrize("is_validation", [False, True])
def test_a_flipped_bit_is_noticed_when_it_is_read(tmp_path, is_validation):
  config = make_sources(tmp_path)
  prepared = batches.prepare(config, VOCAB, tmp_path / "cache")
  path = (prepared.validation if is_validation else prepared.train[0])[0]
  data, expected, noticed = path.read_bytes(), token_documents([path]), 0
  end = sum(len(document) * 4 for document in expected)
  for place in range(100, end, end // 23):
    path.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
    batches.prepare(config, VOCAB, tmp_path / "cache")
    try:
      documents = shards.Documents([path])
      found = [documents.read(i, 0, 10**9).tolist() for i in range(len(documents.lengths))]
      assert found == expected  # between records
    except ValueError as error:
      assert re.search(
        rf"{path.name} is damaged: .*delete {path.name} and manifest.json", str(error)
      )
      noticed += 1
  assert noticed > 15


def test_every_flipped_bit_of_lengths_is_named_or_harmless(tmp_path):
  path = tmp_path / "x.arrayrecord"
  lengths = np.array([3, 1, 2], np.int64)
  np.save(shards.lengths_path(path), lengths)
  whole = shards.lengths_path(path).read_bytes()
  for bit in range(8 * (len(whole) - lengths.nbytes)):
    damaged = bytearray(whole)
    damaged[bit // 8] ^= 1 << bit % 8
    shards.lengths_path(path).write_bytes(damaged)
    try:
      found = shards.load_lengths(path)
    except ValueError as error:
      assert "x.lengths.npy must hold lengths of documents, got" in str(error)
    else:  # the manifest says how many there are
      assert len(found) != 3 or found.tolist() == lengths.tolist() or found.sum() != 6


def test_lengths_that_do_not_fit_the_records(tmp_path):
  config = make_sources(tmp_path)
  prepared = batches.prepare(config, VOCAB, tmp_path / "cache")
  (path,) = prepared.train[0]
  lengths = np.load(shards.lengths_path(path))
  wrong = lengths.copy()
  wrong[3], wrong[4] = wrong[3] + 1, wrong[4] - 1  # the sum stays
  np.save(shards.lengths_path(path), wrong)
  prepared = batches.prepare(config, VOCAB, tmp_path / "cache")
  documents = shards.Documents([path])
  with pytest.raises(
    ValueError, match=r"train-0-00000.arrayrecord has \d+ tokens, but the lengths"
  ):
    documents.read(3, 0, 1)
  wrong[3] += 1
  np.save(shards.lengths_path(path), wrong)
  with pytest.raises(ValueError, match=r"lengths.npy must have 40 documents of \d+ tokens, as in"):
    batches.prepare(config, VOCAB, tmp_path / "cache")
  np.save(shards.lengths_path(path), lengths[:-1])
  with pytest.raises(
    ValueError, match=r"beside .*train-0-00000.arrayrecord and .* must be those of their 40"
  ):
    shards.Documents([path])


@pytest.mark.parametrize("record_tokens", [1, 3, 16])
def test_long_documents_are_several_records(tmp_path, monkeypatch, record_tokens):
  config = make_sources(tmp_path)
  plain = batches.prepare(config, VOCAB, tmp_path / "plain")
  expected = token_documents(plain.train[0])
  monkeypatch.setattr(shards, "RECORD_TOKENS", record_tokens)
  small = batches.prepare(config, VOCAB, tmp_path / "small")
  assert max(map(len, token_documents(small.train[0]))) <= record_tokens
  for paths in (small.train[0], plain.train[0]):  # the latter as older versions wrote all
    documents = shards.Documents(paths)
    assert documents.lengths.tolist() == [len(document) for document in expected]
    for i, document in enumerate(expected):
      for start, stop in ((0, 10**9), (0, 1), (2, 17), (len(document) - 1, len(document)), (5, 5)):
        assert documents.read(i, start, stop).tolist() == document[start:stop]


def test_the_data_of_older_versions_is_used(tmp_path):
  """Their inputs have no version of reading, their lengths are int32."""
  config = make_sources(tmp_path)
  prepared = batches.prepare(config, VOCAB, tmp_path / "cache")
  for path in (*prepared.train[0], *prepared.validation):
    np.save(shards.lengths_path(path), shards.load_lengths(path).astype(np.int32))
  manifest = json.loads(prepared.manifest.read_text())
  del manifest["inputs"]["reading"], manifest["manifest_sha256"]
  text = json.dumps(manifest, sort_keys=True)
  manifest["manifest_sha256"] = hashlib.sha256(text.encode()).hexdigest()
  prepared.manifest.write_text(json.dumps(manifest))
  (tmp_path / "cache" / "inputs.json").write_text(json.dumps(manifest["inputs"]))
  again = batches.prepare(config, VOCAB, tmp_path / "cache")
  assert again.train_tokens == prepared.train_tokens
  with pytest.raises(ValueError, match="not overwritten"):
    batches.prepare(config, VOCAB - 1, tmp_path / "cache")


def test_rows_and_bytes_passed_over_are_said(tmp_path, caplog):
  config = make_sources(tmp_path)
  with (tmp_path / "a.jsonl").open("ab") as file:
    file.write(b'\n{"text": "\xff"}\n{"text": null}\n{}')
  config = dataclasses.replace(config, skip_null_rows=True)
  batches.prepare(config, VOCAB, tmp_path / "cache")
  said = caplog.messages
  assert "a.jsonl: places that are not UTF-8, read as U+FFFD: 1" in said
  assert "a.jsonl: rows without 'text', passed over: 2" in said
  with pytest.raises(ValueError, match="skip_null_rows: True -> "):
    batches.prepare(dataclasses.replace(config, skip_null_rows=False), VOCAB, tmp_path / "cache")


def foreign(folder, *names, **files):
  """Writes a byte-level tokenizer.json whose last ids are the special tokens `names`."""
  text = tokenizer_lib.train_tokenizer(["alpha beta gamma"], VOCAB - 10).to_str()
  tokenizer = Tokenizer.from_str(text.replace("<|endoftext|>", "<|unused|>"))
  tokenizer.add_special_tokens(list(names))
  folder.mkdir()
  tokenizer.save(str(folder / "tokenizer.json"))
  for name, content in files.items():
    (folder / name.replace("__", ".")).write_text(content)
  return str(folder / "tokenizer.json"), [tokenizer.token_to_id(name) for name in names]


def test_the_end_that_the_tokenizers_files_name(folder, tmp_path):
  """Its files come along, so that who uses the data finds the same end."""
  files = {"tokenizer_config__json": '{"eos_token": "[EOS]"}', "chat_template__jinja": "{{ x }}"}
  path, (_, end) = foreign(tmp_path / "hf", "</s>", "[EOS]", **files)
  made = batches.prepare(text_config(folder, tokenizer=path), VOCAB, tmp_path / "data")
  documents = [*token_documents(made.train[0]), *token_documents(made.validation)]
  assert all(ids[-1] == end and end not in ids[:-1] for ids in documents)
  for name, content in files.items():
    assert (tmp_path / "data" / name.replace("__", ".")).read_text() == content
  [first, *_] = batches.validation_batches(made, text_config(folder, tokenizer=path), 2)
  assert first["tokens"][0, 0] == end
  assert (
    json.loads((tmp_path / "data/inputs.json").read_text())["tokenizer"]["eos_token"] == "[EOS]"
  )
  # Another end is other data.
  again = text_config(folder, tokenizer=path, eos_token="</s>")
  with pytest.raises(ValueError, match=r"not overwritten.*\n.*eos_token: \[EOS\] -> \(absent\)"):
    batches.prepare(again, VOCAB, tmp_path / "data")


def test_the_end_that_a_setting_names(folder, tmp_path):
  path, (end,) = foreign(tmp_path / "bare", "[EOS]")
  with pytest.raises(ValueError, match=r"must have a special token that ends a document"):
    batches.prepare(text_config(folder, tokenizer=path), VOCAB, tmp_path / "data")
  with pytest.raises(ValueError, match=r"data.eos_token must be one of .*, got '<eos>'"):
    config = text_config(folder, tokenizer=path, eos_token="<eos>")
    batches.prepare(config, VOCAB, tmp_path / "data")
  config = text_config(folder, tokenizer=path, eos_token="[EOS]")
  made = batches.prepare(config, VOCAB, tmp_path / "data")
  assert all(ids[-1] == end for ids in token_documents(made.train[0]))
  loaded = tokenizer_lib.load_tokenizer(tmp_path / "data/tokenizer.json")  # without the setting
  assert tokenizer_lib.eos_id(loaded, tmp_path / "data") == end
  with pytest.raises(ValueError, match=r"data.eos_token \('x'\) must be a token of data.tokenizer"):
    data_config(eos_token="x")


def test_data_from_before_the_end_was_a_choice_is_used_again(folder, tmp_path):
  path, _ = foreign(tmp_path / "hf", "</s>", "<|endoftext|>")
  batches.prepare(text_config(folder, tokenizer=path), VOCAB, tmp_path / "data")
  assert "eos_token" not in json.loads((tmp_path / "data/inputs.json").read_text())["tokenizer"]


@pytest.mark.parametrize("setting", ["truncation", "padding"])
def test_settings_in_tokenizer_json_do_not_cut_documents(folder, prepared, tmp_path, setting):
  tokenizer = Tokenizer.from_file(str(prepared.manifest.parent / "tokenizer.json"))
  if setting == "truncation":
    tokenizer.enable_truncation(16)
  else:
    tokenizer.enable_padding(length=64, pad_id=4, pad_token="<|pad|>")
  tokenizer.save(str(tmp_path / "tokenizer.json"))
  config = text_config(folder, tokenizer=str(tmp_path / "tokenizer.json"))
  made = batches.prepare(config, VOCAB, tmp_path / "data")
  assert token_documents(made.train[0]) == token_documents(prepared.train[0])
  assert made.validation_tokens == prepared.validation_tokens


PREPARE = """
import sys
from tests.data import cases
from dsmoe.data import batches, encoding, shards
shards.SHARD_BYTES, encoding._BATCH_CHARS = 2**20, 2**16
folder = sys.argv[1]
config = cases.data_config(train_globs=(f"{folder}/a.txt",), validation_globs=(f"{folder}/v.txt",))
print("starts", flush=True)
batches.prepare(config, 4000, f"{folder}/cache")
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("what", ["inputs.json", "train-0-00000.arrayrecord*.tmp"])
def test_signals_end_a_preparation_soon(tmp_path, number, what):
  """While the tokenizer is trained, and while text is tokenised."""
  rng = random.Random(0)
  letters = "abcdefghijklmnopqrstuvwxyz"
  sizes = (99_999, 1_500_000) if what == "inputs.json" else (2_000, 600_000)
  vocabulary = ["".join(rng.choices(letters, k=rng.randrange(2, 9))) for _ in range(sizes[0])]
  (tmp_path / "a.txt").write_text(" ".join(rng.choices(vocabulary, k=sizes[1])))
  (tmp_path / "v.txt").write_text("text")
  process = runs.start("-c", PREPARE, tmp_path)
  assert runs.wait_for(lambda: list((tmp_path / "cache").glob(what)), process)
  time.sleep(0.2)
  process.send_signal(number)
  code, out, err = runs.finish(process)
  assert code == -number, (code, out, err)
  assert not (tmp_path / "cache" / "manifest.json").exists()  # written last
  if what == "inputs.json":
    assert not (tmp_path / "cache" / "tokenizer.json").exists()
    return
  (tmp_path / "cache" / "train-0-00009.arrayrecord.x.tmp").write_text("of a killed process")
  left = runs.start("-c", PREPARE, tmp_path)
  assert runs.finish(left)[0] == 0
  assert not list((tmp_path / "cache").glob("*.tmp"))
