"""Tests of dsmoe/data/sources.py."""

import gzip
import hashlib
import json
import lzma
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dsmoe.data import files, sources
from tests.data import cases
from tests.data.cases import data_config, text_config, texts_of, whole_texts


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return cases.make_folder(tmp_path_factory.mktemp("corpus"))


def test_text_jsonl_and_parquet_give_the_same_documents(folder, tmp_path):
  texts = texts_of(folder, "a")
  rows = [json.dumps({"id": i, "body": text}) for i, text in enumerate(texts)]
  (tmp_path / "rows.jsonl").write_text("\n".join([*rows, "", json.dumps({"body": ""})]) + "\n")
  pq.write_table(pa.table({"id": range(len(texts)), "body": texts}), tmp_path / "rows.parquet")
  for name in (f"{folder}/a/*.txt", f"{tmp_path}/*.jsonl", f"{tmp_path}/rows.parquet"):
    source = sources.find_source(name, is_train=True)
    assert whole_texts(source, text_field="body") == texts


def test_bytes_that_are_not_utf8(tmp_path):
  (tmp_path / "a.txt").write_bytes(b"ab\xff\xfecd\r\n")
  (tmp_path / "b.jsonl").write_bytes(b'{"text": "ab\xff"}\n{"text": "\\ud800x"}\n')
  source = sources.find_source(f"{tmp_path}/*", is_train=True)
  texts = whole_texts(source)
  assert texts[:2] == ["ab\ufffd\ufffdcd\r\n", "ab\ufffd"]
  assert texts[2].endswith("x") and texts[2].encode()  # half a surrogate pair is gone


def test_globs_descend_and_are_sorted(tmp_path):
  for name in ("z.txt", "b/a.txt", "b/c/d.txt", "b/c/e.md"):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(name)
  source = sources.find_source(f"{tmp_path}/**/*.txt", is_train=True)
  assert [name for name, _ in source.files] == ["b/a.txt", "b/c/d.txt", "z.txt"]


@pytest.mark.parametrize(
  "pattern, names",
  [
    ("{x}.txt", ["{x}.txt"]),  # names that exist are taken as they are
    ("d[1].txt", ["d[1].txt"]),
    ("[e]/f*.txt", ["f[1].txt"]),
    ("[e]/f[1].txt", ["f[1].txt"]),
    ("{g,h}/*.txt", ["*.txt", "g.txt"]),
    ("{g,h}/g*", ["g.txt"]),
    ("*.{txt,md}", ["a.md", "a.txt", "b.md", "d1.txt", "d[1].txt", "{x}.txt"]),
    ("{a,b}.{md,txt}", ["a.md", "a.txt", "b.md"]),
    ("{a.{txt,md},d1.txt}", ["a.md", "a.txt", "d1.txt"]),
    ("{s,t}/{u,v}/*.txt", ["s/u/1.txt", "t/v/2.txt"]),
    ("**/{1,2}.txt", ["s/u/1.txt", "t/v/2.txt"]),
    ("[ab].md", ["a.md", "b.md"]),
    ("[!a].md", ["b.md"]),
    ("d[[]1].txt", ["d[1].txt"]),
    ("s/./u/*", ["1.txt"]),
    ("s/../a.md", ["a.md"]),
    ("back\\slash.txt", ["back\\slash.txt"]),
    ("with space, comma.txt", ["with space, comma.txt"]),
  ],
)
def test_globs_as_people_write_them(tmp_path, monkeypatch, pattern, names):
  for name in (
    *("a.txt", "a.md", "b.md", "d[1].txt", "d1.txt", "[e]/f[1].txt", "e/f1.txt", "{x}.txt"),
    *("{g,h}/*.txt", "{g,h}/g.txt", "s/u/1.txt", "t/v/2.txt", "back\\slash.txt"),
    "with space, comma.txt",
  ):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(name)
  monkeypatch.setenv("HOME", str(tmp_path))
  monkeypatch.chdir(tmp_path)
  if pattern.startswith("*."):
    names = [*names, "back\\slash.txt", "with space, comma.txt"]
  for prefix in ("", "~/", f"{tmp_path}/"):
    source = sources.find_source(prefix + pattern, is_train=True)
    assert [file for file, _ in source.files] == sorted(names)
    assert all(path.is_file() for _, path in source.files)


def test_a_folder_is_not_a_source(tmp_path):
  (tmp_path / "docs").mkdir()
  (tmp_path / "docs" / "a.txt").write_text("a")
  for name in (f"{tmp_path}/docs", f"{tmp_path}/docs/", f"{tmp_path}/*"):
    with pytest.raises(ValueError, match=r"must match a file; '.*' is a folder, whose files"):
      sources.find_source(name, is_train=True)


def test_what_reading_would_leave_out_or_never_end_with(tmp_path):
  (tmp_path / "a.txt").write_text("a")
  (tmp_path / "b.txt").symlink_to(tmp_path / "a.txt")
  (tmp_path / "c.txt").symlink_to("gone")
  os.mkfifo(tmp_path / "d.pipe")
  found = sources.find_source(f"{tmp_path}/[ab].txt", is_train=True)
  assert [file for file, _ in found.files] == ["a.txt", "b.txt"]
  for pattern in ("*.txt", "c.txt"):
    with pytest.raises(ValueError, match=r"c.txt is a link to gone, which is not there"):
      sources.find_source(f"{tmp_path}/{pattern}", is_train=True)
  for pattern in ("*.pipe", "d.pipe"):
    with pytest.raises(ValueError, match=r"d.pipe is a pipe or a device"):
      sources.find_source(f"{tmp_path}/{pattern}", is_train=True)


def test_links_that_lead_back_do_not_repeat_a_file(tmp_path):
  (tmp_path / "a" / "b").mkdir(parents=True)
  (tmp_path / "a" / "x.txt").write_text("x")
  (tmp_path / "a" / "b" / "y.txt").write_text("y")
  (tmp_path / "a" / "self").symlink_to(".")
  (tmp_path / "a" / "b" / "top").symlink_to(tmp_path)
  (tmp_path / "other").symlink_to("a/b")
  found = sources.find_source(f"{tmp_path}/a/**/*.txt", is_train=True)
  assert [file for file, _ in found.files] == ["b/y.txt", "x.txt"]
  found = sources.find_source(f"{tmp_path}/**/*.txt", is_train=True)
  assert [file for file, _ in found.files] == ["a/b/y.txt", "a/x.txt", "other/y.txt"]


def test_packages_beside_the_standard_library_are_not_walked_through(tmp_path, monkeypatch):
  for name in ("json/a.py", "json/tests/b.py", "site-packages/c/d.py", "config-3/e.py"):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("x = 1\n")
  monkeypatch.setattr(sources.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
  walked, scandir = [], os.scandir

  def noted(folder):
    walked.append(os.path.relpath(folder, tmp_path))
    return scandir(folder)

  monkeypatch.setattr(os, "scandir", noted)
  monkeypatch.setattr(sources, "stdlib_is_train", lambda file: True)
  found = sources.find_source("stdlib", is_train=True)
  assert [file for file, _ in found.files] == ["json/a.py"]
  assert set(walked) == {".", "json"}


@pytest.mark.parametrize("name", ["file:///tmp/a.txt", "hdfs://a/b.txt"])
def test_other_file_systems_are_refused(name):
  with pytest.raises(ValueError, match=rf"must be on disk or on gs://, got '{name}'"):
    sources.find_source(name, is_train=True)


def test_sample_takes_parts_of_long_documents(tmp_path, monkeypatch):
  monkeypatch.setattr(files, "PIECE_CHARS", 100)
  text = "".join(f"line {i}\n" for i in range(10_000))
  (tmp_path / "a.txt").write_text(text)
  source = sources.find_source(f"{tmp_path}/a.txt", is_train=True)
  pieces = list(sources.sample([source], data_config(), len(text) // 10))
  places = [text.index(piece) for piece in pieces]
  assert 0.05 < sum(map(len, pieces)) / len(text) <= 0.1
  assert places == sorted(places) and places[-1] > 0.8 * len(text)


@pytest.mark.slow
def test_standard_library():
  train = sources.find_source("stdlib", is_train=True)
  held_out = sources.find_source("stdlib", is_train=False)
  modules = [
    {name.split("/")[0].removesuffix(".py") for name, _ in s.files} for s in (train, held_out)
  ]
  assert not modules[0] & modules[1]
  assert len(modules[1]) >= 10
  assert {"ast", "asyncio"} <= modules[0] | modules[1]
  for name, _ in (*train.files, *held_out.files):
    assert not set(name.split("/")[:-1]) & {
      "test",
      "tests",
      "site-packages",
      "idlelib",
      "__pycache__",
    }
  sizes = [sum(path.stat().length for _, path in s.files) for s in (train, held_out)]
  assert 0.05 < sizes[1] / sum(sizes) < 0.08
  assert sources.find_source("stdlib", is_train=False) == held_out
  assert sources.sha256s(held_out, {}) == sources.sha256s(held_out, {})


def test_untouched_files_are_not_hashed_again(tmp_path, monkeypatch):
  path = tmp_path / "a.txt"
  path.write_text("text")
  source = sources.find_source(str(path), is_train=True)
  known = {}
  os.utime(path, (1e9, 1e9))
  hashes = sources.sha256s(source, known)
  assert hashes == {"a.txt": hashlib.sha256(b"text").hexdigest()}
  with monkeypatch.context() as patch:
    patch.setattr(sources, "file_sha256", None)
    assert sources.sha256s(source, known) == hashes
  path.write_text("TEXT")
  assert sources.sha256s(source, known) == {"a.txt": hashlib.sha256(b"TEXT").hexdigest()}


def test_sample_is_even_and_bounded(folder):
  source = sources.find_source(f"{folder}/a/*.txt", is_train=True)
  texts = texts_of(folder, "a")
  size = sum(len(text.encode()) for text in texts)
  assert list(sources.sample([source], data_config(), size)) == texts
  some = list(sources.sample([source], data_config(), size // 2))
  assert some == list(sources.sample([source], data_config(), size // 2))
  assert 0 < len(some) < len(texts)
  assert sum(len(text) for text in sources.sample([source], data_config(), 10)) <= 10


def test_compressed_bits_per_byte(folder):
  texts = texts_of(folder, "v")
  joined = "".join(texts).encode()
  bits = sources.compressed_bits_per_byte(sources.validation_documents(text_config(folder)))
  assert bits == {
    "gzip": 8 * len(gzip.compress(joined, 9)) / len(joined),
    "xz": 8 * len(lzma.compress(joined, preset=9)) / len(joined),
  }
  with pytest.raises(ValueError, match="got 0 bytes"):
    sources.compressed_bits_per_byte([])
