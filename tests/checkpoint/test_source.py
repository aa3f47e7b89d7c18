"""Tests of dsmoe/checkpoint/source.py: a new run keeps to the tokenizer of its weights."""

import dataclasses
import json
import shutil

import pytest
from tokenizers import Tokenizer

from dsmoe import checkpoint
from dsmoe.data import records
from tests import runs
from tests.data.cases import VOCAB, make_folder
from tests.helpers import small_config


def config_of(corpus, **data):
  fields = {"train_globs": (f"{corpus}/a/*.txt",), "validation_globs": (f"{corpus}/v/*.txt",)}
  fields = {f"data.{name}": value for name, value in (fields | data).items()}
  return small_config(**runs.TWO_LAYERS, **{"model.vocab_size": VOCAB}, **fields)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
  return make_folder(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def source(corpus, tmp_path):
  """What with_tokenizer_of reads of a run: its config and its data."""
  config = config_of(corpus)
  checkpoint.record_config(tmp_path / "source", config, 0)
  records.prepare(config.data, VOCAB, tmp_path / "source" / "data")
  return tmp_path / "source"


def test_the_sources_tokenizer_and_its_files_are_taken(corpus, source, tmp_path):
  files = {
    "tokenizer_config.json": json.dumps({"eos_token": "<|pad|>"}),
    "generation_config.json": json.dumps({"eos_token_id": 4}),
    "chat_template.jinja": "{{ messages }}",
  }
  for name, content in files.items():
    (source / "data" / name).write_text(content)
  config = checkpoint.with_tokenizer_of(config_of(corpus), source)
  assert config.data.tokenizer == str(source / "data" / "tokenizer.json")
  prepared = records.prepare(config.data, VOCAB, tmp_path / "new")
  assert prepared.tokenizer.to_str() == Tokenizer.from_file(config.data.tokenizer).to_str()
  for name, content in files.items():
    assert (tmp_path / "new" / name).read_text() == content


def test_a_cache_elsewhere_is_found(corpus, tmp_path):
  config = config_of(corpus, cache_dir=str(tmp_path / "cache"))
  checkpoint.record_config(tmp_path / "source", config, 0)
  records.prepare(config.data, VOCAB, tmp_path / "cache")
  taken = checkpoint.with_tokenizer_of(config_of(corpus), tmp_path / "source")
  assert taken.data.tokenizer == str(tmp_path / "cache" / "tokenizer.json")


def test_another_tokenizer_is_refused_unless_allowed(corpus, source, tmp_path):
  path = tmp_path / "other" / "tokenizer.json"
  shutil.copytree(source / "data", path.parent)
  same = config_of(corpus, tokenizer=str(path))
  assert checkpoint.with_tokenizer_of(same, source) == same

  cut = Tokenizer.from_file(str(path))  # settings that are not obeyed make no other tokenizer
  cut.enable_truncation(9)
  cut.save(str(path))
  assert checkpoint.with_tokenizer_of(same, source) == same

  (path.parent / "tokenizer_config.json").write_text('{"eos_token": "<|pad|>"}')
  with pytest.raises(ValueError, match=r"must end with .*, '<\|endoftext\|>', got '<\|pad\|>'"):
    checkpoint.with_tokenizer_of(same, source)
  assert checkpoint.with_tokenizer_of(same, source, allow_other_tokenizer=True) == same

  path.write_text(path.read_text().replace("<|pad|>", "<|pod|>"))
  (path.parent / "tokenizer_config.json").unlink()
  with pytest.raises(
    ValueError, match=r"other/tokenizer.json differs from .*source/data/tok.*--al"
  ):
    checkpoint.with_tokenizer_of(same, source)
  assert checkpoint.with_tokenizer_of(same, source, allow_other_tokenizer=True) == same

  own = config_of(corpus)
  assert checkpoint.with_tokenizer_of(own, source, allow_other_tokenizer=True) == own


def test_a_source_without_a_tokenizer(corpus, tmp_path, caplog):
  """As after random tokens, or an import of weights alone."""
  checkpoint.record_config(tmp_path / "source", small_config(), 0)
  with pytest.raises(ValueError, match=r"tokenizer.json that the weights in .*--allow_other"):
    checkpoint.with_tokenizer_of(config_of(corpus), tmp_path / "source")
  for config in (config_of(corpus, tokenizer="given.json"), small_config()):
    assert checkpoint.with_tokenizer_of(config, tmp_path / "source") == config
  [warning] = caplog.messages
  assert warning.startswith("data.tokenizer cannot be compared with that of the weights in ")
  half = dataclasses.replace(small_config().data, validation_globs=("stdlib",))
  with pytest.raises(ValueError, match=r"data\.tokenizer must be"):
    config = dataclasses.replace(small_config(), data=half)
    checkpoint.with_tokenizer_of(config, tmp_path / "source")
  with pytest.raises(ValueError, match=r"must hold config.json, got .*nowhere"):
    checkpoint.with_tokenizer_of(config_of(corpus), tmp_path / "nowhere")
