"""Reads the documents of one file: text, JSON lines, a JSON array or Parquet, plain or compressed.

The compression is told by the first bytes. The format is told by the name's suffix, in any case and
without that of the compression, and where the suffix says nothing by the first bytes. Everything is
streamed: a document is a sequence of pieces of bounded size.
"""

import bz2
import codecs
import collections
import gzip
import itertools
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO, NamedTuple

from etils import epath

from dsmoe.config import DataConfig

PIECE_CHARS = 1 << 20
COMPRESSED_SUFFIXES = (".gz", ".gzip", ".bz2", ".xz", ".zst", ".zstd")

_BLOCK_BYTES = 1 << 20
_SNIFF_CHARS = 16 << 20  # of a first line, to tell whether it is JSON
_ROW_CHARS = 256 << 20  # of a JSON value, which is parsed whole
_MAGIC = {
  "gzip": re.compile(rb"\x1f\x8b"),
  "bzip2": re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"),
  "xz": re.compile(rb"\xfd7zXZ\0"),
  "zstd": re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"),  # or a skippable frame
}
_OF_SUFFIX = dict(zip(COMPRESSED_SUFFIXES, ("gzip", "gzip", "bzip2", "xz", "zstd", "zstd")))
_JSON_SUFFIXES = (".jsonl", ".ndjson", ".jsonlines", ".jl", ".json")
PARQUET_SUFFIXES = (".parquet", ".pq")
_REFUSED_SUFFIXES = frozenset(
  (
    ".csv",
    ".tsv",
    ".tab",
    ".psv",
    ".tar",
    ".zip",
    ".7z",
    ".rar",
    ".br",
    ".lz4",
    ".sz",
    ".snappy",
    ".orc",
    ".avro",
  )
  + (".arrow", ".feather", ".npy", ".npz", ".pkl", ".pt", ".safetensors", ".pdf", ".docx", ".xlsx")
  + (".png", ".jpg", ".jpeg", ".gif", ".webp", ".mp3", ".mp4")
)
_REFUSED = (
  (0, codecs.BOM_UTF16_LE, "UTF-16 or UTF-32 text"),
  (0, codecs.BOM_UTF16_BE, "UTF-16 text"),
  (0, b"\0\0\xfe\xff", "UTF-32 text"),
  (0, b"PK\x03\x04", "a zip archive"),
  (0, b"PAR1", "Parquet in a compressed file"),
  (0, b"ARROW1", "an Arrow file"),
  (0, b"%PDF-", "a PDF document"),
  (257, b"ustar", "a tar archive"),
)
_READABLE = (
  "readable are UTF-8 text, JSON lines, a JSON array and Parquet, the first three also compressed "
  "by gzip, bzip2, xz or zstd"
)
_DECOMPRESSION_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError)
# A file is no text if it has more of these, and they are more than that share of its bytes.
_BAD_PLACES = ((8, 1 / 100), (2, 1 / 10))
_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can spell a half, no UTF-8 text can hold it
_CONTROLS = bytes({*range(32)} - {*b"\b\t\n\v\f\r\x1b"})

Faults = collections.Counter[str]  # what was passed over -> how often


class Piece(NamedTuple):
  """Up to `PIECE_CHARS` characters of a document, and whether the document ends with them."""

  text: str
  is_end: bool


def read(file: str, path: epath.Path, config: DataConfig, faults: Faults) -> Iterator[Piece]:
  """Reads a file's documents in order, without the empty ones.

  Args:
    file: its name in messages.
    path: where it is.
    config: `text_field` is the key or column of the text, with dots the path to a nested one;
      `skip_null_rows` says whether rows without it are passed over.
    faults: counts bytes that are not UTF-8, which become U+FFFD, and rows passed over.

  Raises:
    ValueError: naming the file, and row or line, for a file that is damaged or of another kind,
      for a row that is not JSON and for one whose text is not a string.
  """
  with path.open("rb") as f:
    name, compression = _compression(file, path.name.lower(), f)
    suffix = epath.Path(name).suffix
    if compression is None and (suffix in PARQUET_SUFFIXES or _starts(f, b"PAR1")):
      rows = _parquet_rows(file, f, config.text_field)
    else:
      if suffix in _REFUSED_SUFFIXES:
        raise ValueError(f"{file} is a {suffix} file; {_READABLE}")
      blocks = _blocks(file, _decompressed(f, compression), compression)
      head, texts = _head(_utf8(file, blocks, faults))
      if suffix not in _JSON_SUFFIXES and not _is_json(head):
        yield from _text_pieces(texts)
        return
      is_lines = not head.lstrip().startswith("[") and (suffix != ".json" or _is_json(head))
      rows = _json_lines(file, texts) if is_lines else _json_values(file, texts)
    for where, row in rows:
      text = _text_of(row, config.text_field)
      if text is None and config.skip_null_rows:
        faults[f"{file}: rows without {config.text_field!r}, passed over"] += 1
        continue
      if not isinstance(text, str):
        raise ValueError(
          f"data.text_field {config.text_field!r} must be a string; at {where} it is {text!r:.80}"
          + (", and data.skip_null_rows is off" if text is None else "")
        )
      text, halves = _SURROGATE.subn("\ufffd", text)
      if halves:
        faults[f"{file}: halves of surrogate pairs, read as U+FFFD"] += halves
      for i in range(0, len(text), PIECE_CHARS):
        yield Piece(text[i : i + PIECE_CHARS], i + PIECE_CHARS >= len(text))


def _starts(f: BinaryIO, magic: bytes) -> bool:
  found = f.read(len(magic)) == magic
  f.seek(0)
  return found


def _compression(file: str, name: str, f: BinaryIO) -> tuple[str, str | None]:
  """Returns the name without the compression's suffix, and the compression or None."""
  head = f.read(16)
  f.seek(0)
  found = next((kind for kind, magic in _MAGIC.items() if magic.match(head)), None)
  suffix = next((s for s in COMPRESSED_SUFFIXES if name.endswith(s)), "")
  if suffix and found is None:
    raise ValueError(
      f"a file named {suffix} must be compressed, but {file} does not begin as {_OF_SUFFIX[suffix]}"
    )
  return name.removesuffix(suffix), found


def _decompressed(f: BinaryIO, compression: str | None) -> Iterator[bytes]:
  match compression:
    case "bzip2":
      return _streams(f, bz2.BZ2Decompressor)
    case "xz":
      return _streams(f, lzma.LZMADecompressor)
    case "gzip":
      stream: Any = gzip.GzipFile(fileobj=f)
    case "zstd":
      import pyarrow as pa  # here, since 25 MiB are much for what reads no such file

      stream = pa.CompressedInputStream(pa.PythonFile(f, "r"), "zstd")
    case _:
      stream = f
  return iter(lambda: stream.read(_BLOCK_BYTES), b"")


def _streams(f: BinaryIO, make: Callable[[], Any]) -> Iterator[bytes]:
  """Decompresses streams that follow each other; Python's files would stop at what is damaged."""
  decompressor = make()
  while True:
    data = b""
    if decompressor.eof:
      data = (decompressor.unused_data or f.read(_BLOCK_BYTES)).lstrip(b"\0")  # padding of xz
      if not data:
        return
      decompressor = make()
    elif decompressor.needs_input:
      data = f.read(_BLOCK_BYTES)
      if not data:
        raise EOFError("its end is missing")
    yield decompressor.decompress(data, _BLOCK_BYTES)


def _blocks(file: str, blocks: Iterator[bytes], compression: str | None) -> Iterator[bytes]:
  """Names the file in errors; refuses what its first bytes show to be no text."""
  is_first = True
  while True:
    try:
      block = next(blocks, None)
    except _DECOMPRESSION_ERRORS as error:
      if compression is None:
        raise
      raise ValueError(f"{file} must be a whole {compression} file: {error}") from error
    if block is None:
      return
    if block and is_first:
      is_first = False
      for offset, magic, kind in _REFUSED:
        if block[offset:].startswith(magic):
          raise ValueError(f"{file} is {kind}; {_READABLE}")
    if block:
      yield block


def _utf8(file: str, blocks: Iterable[bytes], faults: Faults) -> Iterator[str]:
  """Decodes UTF-8, without a byte-order mark; refuses a file that is largely something else."""
  rest, size, bad, controls, is_first = b"", 0, 0, 0, True
  for block in itertools.chain(blocks, [b""]):
    data = rest + block
    end = _whole_characters(data) if block else len(data)
    data, rest = data[:end], data[end:]
    try:
      text = data.decode()
    except UnicodeDecodeError:
      text = data.decode(errors="replace")
      places = text.count("\ufffd") - data.count("\ufffd".encode())
      faults[f"{file}: places that are not UTF-8, read as U+FFFD"] += places
      bad += places
    size += len(data)
    controls += len(data) - len(data.translate(None, _CONTROLS))
    if any(bad + controls > max(least, share * size) for least, share in _BAD_PLACES):
      raise ValueError(
        f"{file} must be UTF-8 text, but {bad} places of its first {size} bytes are not UTF-8 and "
        f"{controls} are control characters; {_READABLE}"
      )
    if is_first:
      text = text.removeprefix("\ufeff")
    is_first = is_first and not text
    if text:
      yield text


def _whole_characters(data: bytes) -> int:
  """Returns how many bytes come before a character of UTF-8 that is cut at the end."""
  for back in range(1, min(4, len(data) + 1)):
    byte = data[-back]
    if byte >= 0xC0:
      needed = 2 + (byte >= 0xE0) + (byte >= 0xF0)
      return len(data) - back if needed > back else len(data)
    if byte < 0x80:
      break
  return len(data)


def _head(texts: Iterator[str]) -> tuple[str, Iterator[str]]:
  """Returns the first block, prolonged to a line where it may be JSON, and the whole stream."""
  head = next(texts, "")
  if head.lstrip().startswith("{"):
    parts = [head]
    size = len(head)
    while "\n" not in parts[-1] and size < _SNIFF_CHARS and (text := next(texts, "")):
      parts.append(text)
      size += len(text)
    head = "".join(parts)
  return head, itertools.chain([head], texts)


def _is_json(head: str) -> bool:
  """Returns whether the first lines are JSON objects, or an array of objects begins."""
  if re.match(r'\s*\[\s*\{\s*"', head):
    return True
  first, *second = head.lstrip().split("\n", 2)[:2]
  if not first.startswith("{") or "".join(second).lstrip()[:1] not in ("", "{"):
    return False
  try:
    return bool(json.loads(first))
  except (ValueError, RecursionError):
    return False


def _text_pieces(texts: Iterable[str]) -> Iterator[Piece]:
  """Cuts one document that comes in blocks."""
  left = ""
  for text in texts:
    left += text
    while len(left) > PIECE_CHARS:
      yield Piece(left[:PIECE_CHARS], False)
      left = left[PIECE_CHARS:]
  if left:
    yield Piece(left, True)


def _json_lines(file: str, texts: Iterable[str]) -> Iterator[tuple[str, Any]]:
  """Parses each line; lines end at a newline only, other separators may stand in strings."""
  for number, line in enumerate(_lines(file, texts), start=1):
    if line.strip():
      try:
        yield f"{file}:{number}", json.loads(line)
      except (ValueError, RecursionError) as error:
        raise ValueError(f"every line must be JSON; {file}:{number} is not: {error}") from error


def _lines(file: str, texts: Iterable[str]) -> Iterator[str]:
  parts: list[str] = []  # of a line whose end was not read yet
  size = 0
  for text in texts:
    first, *others = text.split("\n")
    parts.append(first)
    size += len(first)
    if size > _ROW_CHARS:
      raise ValueError(f"a line of JSON must have at most {_ROW_CHARS} characters; {file} has more")
    for line in others:
      yield "".join(parts)
      parts, size = [line], len(line)
  yield "".join(parts)


def _json_values(file: str, texts: Iterable[str]) -> Iterator[tuple[str, Any]]:
  """Parses a JSON array's elements, or the values of a file that has one after the other."""
  decoder = json.JSONDecoder()
  buffer, wanted, number, is_array, is_closed = "", 0, 0, False, False
  for text in itertools.chain(texts, [""]):
    buffer += text
    if text and len(buffer) < wanted:
      continue  # a long value is tried again when the buffer has doubled
    at, error = 0, None
    while True:
      at = re.compile(r"[\s,]*" if number and not is_closed else r"\s*").match(buffer, at).end()  # type: ignore[union-attr]
      if at == len(buffer):
        break
      if is_closed:
        raise ValueError(f"{file} must be one JSON array; something follows its end")
      if not number and not is_array and buffer[at] == "[":
        is_array, at = True, at + 1
        continue
      if is_array and buffer[at] == "]":
        is_closed, at = True, at + 1
        continue
      try:
        value, end = decoder.raw_decode(buffer, at)
      except (ValueError, RecursionError) as caught:
        error = caught
        break
      yield f"{file} row {number}", value
      number, at = number + 1, end
    buffer = buffer[at:]
    wanted = 2 * len(buffer)
    if error and (not text or len(buffer) > _ROW_CHARS):
      raise ValueError(f"{file} must be JSON; row {number} is not: {error}") from error
  if is_array and not is_closed:
    raise ValueError(f"{file} must be a whole JSON array; its end is missing")


def _parquet_rows(file: str, f: BinaryIO, text_field: str) -> Iterator[tuple[str, Any]]:
  import pyarrow as pa  # as above
  import pyarrow.parquet as pq

  number = 0
  try:
    with pq.ParquetFile(f, page_checksum_verification=True) as table:
      columns = table.schema_arrow.names
      column = text_field if text_field in columns else text_field.split(".")[0]
      if columns.count(column) > 1:
        raise ValueError(f"{file} must have one column {column!r}, it has {columns.count(column)}")
      if column in columns:
        for batch in table.iter_batches(batch_size=256, columns=[column]):
          for row in batch.to_pylist():
            yield f"{file} row {number}", row
            number += 1
        return
  except (pa.ArrowException, OSError, LookupError, UnicodeError) as error:
    raise ValueError(f"{file} must be a whole Parquet file; row {number}: {error}") from error
  raise ValueError(
    f"data.text_field must be a column; {text_field!r} is not one of {file}'s columns "
    f"{', '.join(columns)}"
  )


def _text_of(row: Any, text_field: str) -> Any:
  """Returns a row's text; a row may be the text itself, and a dot leads to a nested field."""
  if not isinstance(row, dict):
    return row
  if text_field in row:
    return row[text_field]
  for part in text_field.split("."):
    row = row.get(part) if isinstance(row, dict) else None
  return row
