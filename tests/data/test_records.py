"""Tests of dsmoe/data/records.py."""

import dataclasses
import hashlib
import itertools
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer

from dsmoe.data import batches, records
from dsmoe.data import tokenizer as tokenizer_lib
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
    ("a.jsonl", '{"text": "x"}\n["y"]', r"'text' must be a string; at a.jsonl:2 it is None"),
    ("a.txt", "", r"must have text; .*a.txt' \(train-0\) has none"),
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
  monkeypatch.setattr(records, "_SHARD_BYTES", 300)
  monkeypatch.setattr(records, "_ENCODE_BYTES", 100)
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
  (tmp_path / "killed" / "train-0-00003.arrayrecord.x.tmp").unlink()
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
  refused(r"train-0-00000.arrayrecord must have \d+ bytes")


def test_a_given_tokenizer(folder, prepared, tmp_path):
  path = str(prepared.manifest.parent / "tokenizer.json")
  again = batches.prepare(text_config(folder, tokenizer=path), VOCAB + 100, tmp_path)
  assert token_documents(again.train[0]) == token_documents(prepared.train[0])
  size = prepared.tokenizer.get_vocab_size()
  with pytest.raises(ValueError, match=rf"vocabulary \({size} ids\).*vocab_size \({size - 1}\)"):
    batches.prepare(text_config(folder, tokenizer=path), size - 1, tmp_path / "small")
  with pytest.raises(ValueError, match=r"tokenizer.json, got absent.json"):
    batches.prepare(text_config(folder, tokenizer="absent.json"), VOCAB, tmp_path / "none")


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
