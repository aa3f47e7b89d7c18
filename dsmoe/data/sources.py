"""Reads text from files or from the Python standard library.

A source is the set of files that one entry of `data.train_globs` or `data.validation_globs` names.
A text file is one document; in .jsonl files each line is one, in .parquet files each row. Everything
is streamed.
"""

import dataclasses
import glob
import hashlib
import json
import lzma
import sysconfig
import time
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow.parquet as pq
from etils import epath

from dsmoe.config import DataConfig

STDLIB = "stdlib"
SYNTHETIC = "synthetic"

# Left out: not written by people, or different from machine to machine.
_STDLIB_EXCLUDED = frozenset(
  ("test", "tests", "idlelib", "lib2to3", "encodings", "pydoc_data", "turtledemo")
  + ("site-packages", "dist-packages", "__pycache__")
)
# This salt, chosen among others, puts 6 to 7% of the bytes of Python 3.11 and 3.12 in validation,
# spread over 16 modules.
_STDLIB_SPLIT = "37"
_STDLIB_VALIDATION_PERCENT = 7
_READ_BYTES = 1 << 20
_WILDCARDS = frozenset("*?[")


@dataclasses.dataclass(frozen=True)
class Source:
  """The files that one entry of the config names.

  `name` is the entry itself; `files` pairs each file's name, relative to the folder before
  the glob's first wildcard, with its path, in order of name. "synthetic" has no files.
  """

  name: str
  files: tuple[tuple[str, epath.Path], ...]


def find_source(name: str, is_train: bool) -> Source:
  """Finds the files of one entry of `data.train_globs` or `data.validation_globs`.

  Args:
    name: a glob, local or gs:// (`**` descends, on disk only), or "stdlib", or "synthetic".
    is_train: whether to find the training or the validation part of "stdlib", the only source
      that is split.

  Raises:
    ValueError: if no file matches.
  """
  if name == SYNTHETIC:
    return Source(name, ())
  if name == STDLIB:
    root = epath.Path(sysconfig.get_paths()["stdlib"])
    names = [
      file
      for file in _glob(root, "**/*.py")
      if _is_program(file) and stdlib_is_train(file) == is_train
    ]
  else:
    root, pattern = _split_glob(name)
    names = _glob(root, pattern)
  found = tuple((file, root / file) for file in sorted(names) if (root / file).is_file())
  if not found:
    field = "train_globs" if is_train else "validation_globs"
    raise ValueError(f"every glob of data.{field} must match a file; {name!r} matches none")
  return Source(name, found)


def stdlib_is_train(file: str) -> bool:
  """Returns whether a standard-library file is for training, decided by its top-level module."""
  module = file.split("/")[0].removesuffix(".py")
  digest = hashlib.sha256(f"{_STDLIB_SPLIT}:{module}".encode()).hexdigest()
  return int(digest, 16) % 100 >= _STDLIB_VALIDATION_PERCENT


def _is_program(file: str) -> bool:
  *folders, base = file.split("/")
  if any(folder in _STDLIB_EXCLUDED or folder.startswith("config-") for folder in folders):
    return False
  return not base.startswith("_sysconfigdata")  # the build's own paths and flags


def _split_glob(name: str) -> tuple[epath.Path, str]:
  """Splits a glob into the folder before its first wildcard and the rest, at least the file."""
  path = epath.Path(name)
  root = path.parent
  while any(set(part) & _WILDCARDS for part in root.parts):
    root = root.parent
  return root, path.relative_to(root).as_posix()


def _glob(root: epath.Path, pattern: str) -> list[str]:
  """Returns the names, relative to `root`, that match."""
  if "://" in root.as_posix():
    return [path.relative_to(root).as_posix() for path in root.glob(pattern)]
  return glob.glob(pattern, root_dir=root, recursive=True)  # epath refuses "**"


def documents(source: Source, text_field: str) -> Iterator[str]:
  """Reads a source's documents in order, without the empty ones.

  Bytes that are not UTF-8 become U+FFFD.

  Args:
    source: files; not "synthetic".
    text_field: the key (.jsonl) or column (.parquet) of the text.

  Raises:
    ValueError: naming file and row, for a row that is not JSON or whose text is not a string.
  """
  for file, path in source.files:
    if path.suffix == ".jsonl":
      texts = _read_jsonl(file, path, text_field)
    elif path.suffix == ".parquet":
      texts = _read_parquet(file, path, text_field)
    else:
      texts = iter([path.read_bytes().decode("utf-8", errors="replace")])
    yield from (text for text in texts if text)


def _read_jsonl(file: str, path: epath.Path, text_field: str) -> Iterator[str]:
  with path.open("rb") as f:
    for number, line in enumerate(f, start=1):
      if not line.strip():
        continue
      try:
        row = json.loads(line.decode("utf-8", errors="replace"))
      except json.JSONDecodeError as error:
        raise ValueError(f"every line must be JSON; {file}:{number} is not: {error}") from error
      text = row.get(text_field) if isinstance(row, dict) else None
      yield _checked(text, f"{file}:{number}", text_field)


def _read_parquet(file: str, path: epath.Path, text_field: str) -> Iterator[str]:
  with path.open("rb") as f, pq.ParquetFile(f) as table:
    if text_field not in table.schema_arrow.names:
      raise ValueError(
        f"data.text_field must be a column; {text_field!r} is not one of {file}'s columns "
        f"{', '.join(table.schema_arrow.names)}"
      )
    number = 0
    for batch in table.iter_batches(batch_size=256, columns=[text_field]):
      for text in batch.column(0).to_pylist():
        yield _checked(text, f"{file} row {number}", text_field)
        number += 1


def _checked(text: object, where: str, text_field: str) -> str:
  if not isinstance(text, str):
    raise ValueError(f"data.text_field {text_field!r} must be a string; at {where} it is {text!r}")
  # JSON can spell half a surrogate pair, which no UTF-8 text can hold.
  return text.encode("utf-8", errors="surrogatepass").decode("utf-8", errors="replace")


def sha256s(source: Source, known: dict[str, list]) -> dict[str, str]:
  """Hashes a source's files, except those that have not changed since they were hashed.

  Args:
    source: the files.
    known: path -> [length in bytes, modification time, time of hashing, SHA-256]; new hashes are
      added to it.

  Returns:
    File name -> SHA-256, hexadecimal.
  """
  hashes = {}
  for file, path in source.files:
    stat = path.stat()
    length, modified, hashed, digest = known.get(str(path), (None, None, 0.0, ""))
    # Times are whole seconds: a file changed in the second it was hashed could look untouched.
    if (length, modified) != (stat.length, stat.mtime) or hashed - stat.mtime < 2:
      hashed, digest = time.time(), file_sha256(path)
      known[str(path)] = [stat.length, stat.mtime, hashed, digest]
    hashes[file] = digest
  return hashes


def file_sha256(path: epath.Path) -> str:
  """Returns the SHA-256 of a file's bytes, hexadecimal."""
  digest = hashlib.sha256()
  with path.open("rb") as f:
    while block := f.read(_READ_BYTES):
      digest.update(block)
  return digest.hexdigest()


def sample(sources: Iterable[Source], text_field: str, limit_bytes: int) -> Iterator[str]:
  """Yields about `limit_bytes` of text, spread evenly over the sources, the same every time."""
  sources = list(sources)
  size = sum(path.stat().length for source in sources for _, path in source.files)
  share = min(1.0, limit_bytes / max(size, 1))
  left = limit_bytes
  for i, source in enumerate(sources):
    for j, text in enumerate(documents(source, text_field)):
      if zlib.crc32(f"{i}:{j}".encode()) < share * 2**32:
        yield text[:left]
        left -= len(text.encode())
        if left <= 0:
          return


def groups(texts: Iterable[str], limit_bytes: int) -> Iterator[list[str]]:
  """Cuts a stream of documents wherever `limit_bytes` of text have come together."""
  group, size = [], 0
  for text in texts:
    group.append(text)
    size += len(text.encode())
    if size >= limit_bytes:
      yield group
      group, size = [], 0
  if group:
    yield group


def num_bytes(texts: Iterable[str]) -> int:
  """Counts UTF-8 bytes."""
  return sum(len(text.encode()) for text in texts)


def validation_documents(config: DataConfig) -> Iterator[str]:
  """Reads the held-out documents in the order of `data.validation_globs`."""
  for name in config.validation_globs:
    yield from documents(find_source(name, is_train=False), config.text_field)


def compressed_bits_per_byte(texts: Iterable[str]) -> dict[str, float]:
  """Compresses documents, joined without separator, as a yardstick for a language model.

  Args:
    texts: the held-out documents, for instance `validation_documents(config)`.

  Returns:
    {"gzip": ..., "xz": ...}: compressed bits for each UTF-8 byte, at preset 9.

  Raises:
    ValueError: if there is no text.
  """
  compressors: dict[str, Any] = {
    "gzip": zlib.compressobj(9, wbits=31),
    "xz": lzma.LZMACompressor(preset=9),
  }
  sizes = dict.fromkeys(compressors, 0)
  text_bytes = 0
  for text in texts:
    data = text.encode()
    text_bytes += len(data)
    for name, compressor in compressors.items():
      sizes[name] += len(compressor.compress(data))
  if not text_bytes:
    raise ValueError("there must be text to compress, got 0 bytes")
  for name, compressor in compressors.items():
    sizes[name] += len(compressor.flush())
  return {name: 8 * size / text_bytes for name, size in sizes.items()}
