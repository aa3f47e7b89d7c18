"""Tests of dsmoe/data/files.py: each format and compression, and what is refused."""

import bz2
import gzip
import io
import json
import lzma
import pickle
import random
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dsmoe.data import files, sources
from tests.data.cases import data_config, whole_texts

TEXTS = ["one\u2028two\u0085three", "naïve ὦ 😀", "\ttabs\r\nand lines\n", "x" * 3000]
LINES = "".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in TEXTS).encode()


def zstd(data):
  return pa.Codec("zstd").compress(data, asbytes=True)


COMPRESSIONS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}


def read(tmp_path, name, data, **values):
  (tmp_path / name).write_bytes(data)
  return whole_texts(sources.find_source(f"{tmp_path}/{name}", is_train=True), **values)


def array(texts, **settings):
  return json.dumps([{"text": t} for t in texts], **settings).encode()


def parquet(**columns):
  file = io.BytesIO()
  pq.write_table(pa.table(columns), file)
  return file.getvalue()


@pytest.mark.parametrize("suffix, compress", COMPRESSIONS.items())
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "A.JSONL", "a.ndjson", "a.txt", "a"])
def test_compressed_json_lines(tmp_path, name, suffix, compress):
  for ending in (suffix, suffix.upper(), ".part"):  # told by the first bytes
    assert read(tmp_path, name + ending, compress(LINES)) == TEXTS
  # Files that were joined, as cat joins them, and as parallel compressors write them.
  half = LINES.index(b"\n") + 1
  joined = compress(LINES[:half]) + compress(LINES[half:])
  assert read(tmp_path, name + suffix, joined) == TEXTS


@pytest.mark.parametrize("suffix, compress", COMPRESSIONS.items())
def test_compressed_text(tmp_path, suffix, compress):
  text = "BZhang wrote:\n" + "".join(TEXTS)
  assert read(tmp_path, "a.txt" + suffix, compress(text.encode())) == [text]
  assert read(tmp_path, "a.txt", text.encode()) == [text]


@pytest.mark.parametrize("suffix, compress", COMPRESSIONS.items())
def test_damaged_compressed_files_are_named(tmp_path, suffix, compress):
  data = compress(random.Random(0).randbytes(2000).hex().encode())
  damages = (data[:-1], data[: len(data) // 2], data[:20] + b"????????" + data[28:])
  for damaged in (*damages, data + b"garbage", data + bytes([data[0] ^ 1]) + data[1:]):
    with pytest.raises(ValueError, match=rf"a.txt{suffix} must be a whole \w+ file"):
      read(tmp_path, "a.txt" + suffix, damaged)
  with pytest.raises(ValueError, match=rf"a.jsonl{suffix} does not begin as"):
    read(tmp_path, "a.jsonl" + suffix, LINES)


@pytest.mark.parametrize("block", [1, 2, 3, 7, 1 << 20])
@pytest.mark.parametrize("settings", [{}, {"indent": 2}, {"ensure_ascii": False}])
def test_json_arrays(tmp_path, monkeypatch, block, settings):
  monkeypatch.setattr(files, "_BLOCK_BYTES", block)
  texts = [*TEXTS[:3], '[{"text": "]"}]', ","]
  assert read(tmp_path, "a.json", array(texts, **settings)) == texts
  assert read(tmp_path, "a.json", b"\xef\xbb\xbf \n" + array(texts, **settings)) == texts
  assert read(tmp_path, "a.json.gz", gzip.compress(array(texts, **settings))) == texts
  assert read(tmp_path, "a.json", json.dumps(texts).encode()) == texts  # of strings
  assert read(tmp_path, "a.json", json.dumps({"text": "x", "n": 1}, indent=1).encode()) == ["x"]
  with pytest.raises(ValueError, match=r"a.json must be a whole JSON array; its end is missing"):
    read(tmp_path, "a.json", array(texts, **settings).rstrip()[:-1])
  with pytest.raises(ValueError, match=r"a.json must be JSON; row 4 is not"):
    read(tmp_path, "a.json", array(texts, **settings)[:-4])
  with pytest.raises(ValueError, match=r"a.json must be one JSON array; something follows"):
    read(tmp_path, "a.json", array(texts, **settings) + b"[]")


def test_an_array_is_told_by_its_beginning(tmp_path):
  assert read(tmp_path, "docs.data", array(TEXTS, indent=1)) == TEXTS
  for text in ("[link](a.html)\n", "{\n not JSON", '{"a": 1}\nprose', "{}\n", "[section]\na=1\n"):
    assert read(tmp_path, "a.txt", text.encode()) == [text]


@pytest.mark.parametrize("block", [1, 2, 3, 5, 1 << 20])
def test_blocks_do_not_show(tmp_path, monkeypatch, block):
  monkeypatch.setattr(files, "_BLOCK_BYTES", block)
  assert read(tmp_path, "a.jsonl", LINES) == TEXTS
  for data in (b"a\xf0\x9f\x98\x80\xe1\x88b", b"\xe2\x82", b"ab\xff\xfecd\r\n", b"\xf0\x9f\x98"):
    assert read(tmp_path, "a.txt", data) == [data.decode(errors="replace")]


@pytest.mark.parametrize("block, piece", [(3, 2), (100, 7), (1 << 20, 1000)])
def test_long_documents_come_in_pieces(tmp_path, monkeypatch, block, piece):
  monkeypatch.setattr(files, "_BLOCK_BYTES", block)
  monkeypatch.setattr(files, "PIECE_CHARS", piece)
  for name, data in (("a.txt", TEXTS[3].encode()), ("b.jsonl", LINES)):
    (tmp_path / name).write_bytes(data)
    pieces = list(sources.documents(sources.find_source(f"{tmp_path}/{name}", True), data_config()))
    assert max(len(p.text) for p in pieces) == min(piece, 3000)
    assert all(p.text for p in pieces)
  assert read(tmp_path, "a.txt", TEXTS[3].encode()) == TEXTS[3:]
  assert read(tmp_path, "b.jsonl", LINES) == TEXTS


def test_byte_order_mark(tmp_path):
  for name in ("a.txt", "a.jsonl", "a.json"):
    data = LINES if "json" in name else "text\ufeff".encode()
    expected = TEXTS if "json" in name else ["text\ufeff"]
    assert read(tmp_path, name, b"\xef\xbb\xbf" + data) == expected


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a"])
def test_other_encodings_are_refused(tmp_path, name, encoding):
  text = "\n".join(json.dumps({"text": "Häuser für Möwen"}, ensure_ascii=False) for _ in range(20))
  with pytest.raises(ValueError, match=rf"{name} (is UTF-|must be UTF-8 text, but)"):
    read(tmp_path, name, text.encode(encoding))
  with pytest.raises(ValueError, match=rf"{name}.gz (is UTF-|must be UTF-8 text, but)"):
    read(tmp_path, name + ".gz", gzip.compress(text.encode(encoding)))


def tar(data):
  file = io.BytesIO()
  with tarfile.open(fileobj=file, mode="w") as archive:
    info = tarfile.TarInfo("a.txt")
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))
  return file.getvalue()


def npy(values):
  file = io.BytesIO()
  np.save(file, values)
  return file.getvalue()


@pytest.mark.parametrize(
  "name, data, what",
  [
    ("a.csv", b"id,text\n1,x\n", "a.csv is a .csv file"),
    ("A.TSV", b"id\ttext\n1\tx\n", "A.TSV is a .tsv file"),
    ("a.csv.gz", gzip.compress(b"id,text\n1,x\n"), "a.csv.gz is a .csv file"),
    ("a.txt", tar(b"text " * 50_000), "a.txt is a tar archive"),
    ("a.tar.gz", gzip.compress(tar(b"text")), "a.tar.gz is a .tar file"),
    ("a", b"PK\x03\x04" + b"word/document.xml" * 99, "a is a zip archive"),
    ("a.arrow", b"ARROW1\0\0" + b"text" * 99, "a.arrow is a .arrow file"),
    ("a.pdf", b"%PDF-1.4\n" + b"text " * 99, "a.pdf is a .pdf file"),
    ("a.parquet.gz", gzip.compress(parquet(text=["x"])), "is Parquet in a compressed file"),
    ("a.png", random.Random(0).randbytes(500), "a.png is a .png file"),
    ("a.npy", npy(np.arange(100)), "a.npy is a .npy file"),
    ("a.feather.bin", b"ARROW1\0\0" + b"text" * 99, "a.feather.bin is an Arrow file"),
    ("b.bin", b"%PDF-1.4\n" + b"text " * 99, "b.bin is a PDF document"),
    ("tar.gz", gzip.compress(tar(b"text")), "tar.gz is a tar archive"),
    ("image", random.Random(0).randbytes(500), "image must be UTF-8 text, but"),
    ("array", npy(np.arange(100)), "array must be UTF-8 text, but"),
    ("a.bin", pa.Codec("brotli").compress(LINES[-300:], asbytes=True), "a.bin must be UTF-8 text"),
    ("list", pickle.dumps(["text"] * 5 + list(range(50))), "list must be UTF-8 text, but"),
    (
      "a.parquet",
      parquet(text=pa.array([b"a\xff"]).view(pa.string())),
      "a.parquet must be a whole",
    ),
    ("a.json", b"[1, 2]", "must be a string; at a.json row 0 it is 1"),
    ("a.gz", gzip.compress(gzip.compress(b"text" * 99)), "a.gz must be UTF-8 text, but"),
    ("a.parquet", b"no parquet", "a.parquet must be a whole Parquet file"),
    ("a.parquet", parquet(text=["x"] * 99)[:-9], "a.parquet must be a whole Parquet file"),
    ("a.parquet", b"", "a.parquet must be a whole Parquet file"),
    ("a.parquet", parquet(text=[b"x"]), "must be a string; at a.parquet row 0 it is b'x'"),
    ("a.parquet", parquet(text=[["x"]]), r"must be a string; at a.parquet row 0 it is \['x'\]"),
    ("a.jsonl", b'{"text": 3}', "must be a string; at a.jsonl:1 it is 3"),
    ("a.jsonl", b'["x"]\n{"text": "x"}', "a.jsonl must be one JSON array; something follows"),
    ("a.jsonl", b'{"text": "x"}\n' + b"[" * 10**5, "must be JSON; a.jsonl:2 is not"),
    ("a.json", b'{"id1": "x", "id2": "y"}', "must be a string; at a.json:1 it is None"),
    ("a.json", b'{\n"id1": "x",\n "id2": "y"}', "must be a string; at a.json row 0 it is None"),
  ],
  # Compressed data has the time in it, and names of tests must not.
  ids=lambda value: value if isinstance(value, str) else "data",
)
def test_what_is_not_readable_is_named(tmp_path, name, data, what):
  with pytest.raises(ValueError, match=what):
    read(tmp_path, name, data)


def test_a_damaged_page_of_parquet_is_named(tmp_path):
  file = io.BytesIO()
  texts = [random.Random(i).randbytes(50).hex() for i in range(500)]
  pq.write_table(pa.table({"text": texts}), file, write_page_checksum=True, use_dictionary=False)
  data = file.getvalue()
  data = data[:9000] + bytes([data[9000] ^ 1]) + data[9001:]
  with pytest.raises(ValueError, match=r"a.parquet must be a whole Parquet file; row"):
    read(tmp_path, "a.parquet", data)


def test_two_columns_of_one_name_are_refused(tmp_path):
  file = io.BytesIO()
  columns = [pa.array(["a"]), pa.array(["b"])]
  pq.write_table(pa.Table.from_arrays(columns, names=["text", "text"]), file)
  with pytest.raises(ValueError, match=r"a.parquet must have one column 'text', it has 2"):
    read(tmp_path, "a.parquet", file.getvalue())


def test_parquet_columns(tmp_path):
  table = parquet(
    text=pa.array(["a", "b", "a"]).dictionary_encode(),
    large=pa.array(["a", "b", "a"], pa.large_string()),
    doc=[{"body": {"text": t}, "n": 1} for t in "aba"],
    **{"doc.title": ["a", "b", "a"]},
  )
  for field in ("text", "large", "doc.body.text", "doc.title"):
    for name in ("a.parquet", "A.PARQUET", "a.pq", "a.data"):
      assert read(tmp_path, name, table, text_field=field) == ["a", "b", "a"]
  with pytest.raises(
    ValueError, match=r"'body.text' is not one of a.parquet's columns text, large"
  ):
    read(tmp_path, "a.parquet", table, text_field="body.text")
  with pytest.raises(
    ValueError, match=r"'doc.text' must be a string; at a.parquet row 0 it is None"
  ):
    read(tmp_path, "a.parquet", table, text_field="doc.text")


def test_nested_fields_of_json(tmp_path):
  rows = [{"doc": {"text": "x"}}, {"doc.text": "y", "doc": {"text": "no"}}]
  data = "\n".join(map(json.dumps, rows)).encode()
  assert read(tmp_path, "a.jsonl", data, text_field="doc.text") == ["x", "y"]
  assert read(tmp_path, "a", data, text_field="doc.text") == ["x", "y"]
  with pytest.raises(ValueError, match=r"'doc' must be a string; at a.jsonl:1 it is {'text'"):
    read(tmp_path, "a.jsonl", data, text_field="doc")


@pytest.mark.parametrize(
  "name, data",
  [
    ("a.jsonl", b'{"text": "x"}\n{"text": null}\nnull\n{"body": 1}\n{"text": "y"}'),
    ("a.json", b'[{"text": "x"}, {"text": null}, null, {"body": 1}, {"text": "y"}]'),
    ("a.parquet", parquet(text=["x", None, None, None, "y"])),
  ],
)
def test_null_rows(tmp_path, name, data):
  with pytest.raises(ValueError, match=r"it is None, and data.skip_null_rows is off"):
    read(tmp_path, name, data)
  assert read(tmp_path, name, data, skip_null_rows=True) == ["x", "y"]
  faults = files.Faults()
  source = sources.find_source(f"{tmp_path}/{name}", is_train=True)
  list(sources.documents(source, data_config(skip_null_rows=True), faults))
  assert dict(faults) == {f"{name}: rows without 'text', passed over": 3}
  with pytest.raises(ValueError, match=r"must be a string; at a.jsonl:1 it is 1"):
    read(tmp_path, "a.jsonl", b'{"text": 1}', skip_null_rows=True)


def test_bad_bytes_are_counted(tmp_path):
  data = b"a\xffb\xe2\x82c " + b"text \xef\xbf\xbd " * 10_000 + b"\xe9t\xe9"
  faults = files.Faults()
  (tmp_path / "a.txt").write_bytes(data)
  source = sources.find_source(f"{tmp_path}/a.txt", is_train=True)
  (piece,) = sources.documents(source, data_config(), faults)
  assert piece == (data.decode(errors="replace"), True)
  assert dict(faults) == {"a.txt: places that are not UTF-8, read as U+FFFD": 4}


def test_halves_of_surrogate_pairs_are_counted(tmp_path):
  (tmp_path / "a.jsonl").write_bytes(b'{"text": "a\\ud800b\\udc00\\ud83d\\ude00"}\n')
  faults = files.Faults()
  source = sources.find_source(f"{tmp_path}/a.jsonl", is_train=True)
  [piece] = sources.documents(source, data_config(), faults)
  assert piece == ("a\ufffdb\ufffd\U0001f600", True)
  assert dict(faults) == {"a.jsonl: halves of surrogate pairs, read as U+FFFD": 2}
