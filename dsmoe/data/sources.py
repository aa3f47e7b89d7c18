"""Finds the files of a source and reads their documents one after the other.

A source is the set of files that one entry of `data.train_globs` or `data.validation_globs` names,
or the Python standard library. A text file is one document; in JSON and Parquet each row is one, as
dsmoe/data/files.py reads them. Everything is streamed.
"""

import dataclasses
import glob
import hashlib
import itertools
import lzma
import os
import re
import sysconfig
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from etils import epath

from dsmoe.config import DataConfig
from dsmoe.data import files
from dsmoe.data.files import Faults, Piece

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
_WILDCARDS, _GROUPS = frozenset("*?"), frozenset("[{")
_COMPRESSION_RATIO = 4  # of text, roughly


@dataclasses.dataclass(frozen=True)
class Source:
  """The files that one entry of the config names.

  `name` is the entry itself; `files` pairs each file's name, relative to the folder before
  the glob's first wildcard, with its path, in order of name. "synthetic" has no files.
  """

  name: str
  files: tuple[tuple[str, epath.Path], ...]


def find_source(name: str, is_train: bool, field: str | None = None) -> Source:
  """Finds the files of one entry of `data.train_globs` or `data.validation_globs`.

  Args:
    name: a glob, local or gs://, or "stdlib", or "synthetic". `**` descends, on disk only; `~` is
      the home folder; `{a,b}` stands for a and b. A name with [ or { that exists is taken as it is.
    is_train: whether to find the training or the validation part of "stdlib", the only source
      that is split.
    field: what the user gave the glob as, for the error; None: the config's.

  Raises:
    ValueError: if no file matches, or a link that leads nowhere, a pipe or a device does.
  """
  if name == SYNTHETIC:
    return Source(name, ())
  if name == STDLIB:
    root = epath.Path(sysconfig.get_paths()["stdlib"])
    names = {file for file in _programs(root) if stdlib_is_train(file) == is_train}
  else:
    try:
      root, names = _find(name)
    except KeyError as error:  # how etils names a file system it does not know
      raise ValueError(f"data must be on disk or on gs://, got {name!r}") from error
  found = tuple((file, root / file) for file in sorted(names) if _is_file(root / file))
  if not found:
    field = field or ("data.train_globs" if is_train else "data.validation_globs")
    is_folder = any((root / file).is_dir() for file in names)
    what = "is a folder, whose files are named by /*" if is_folder else "matches none"
    raise ValueError(f"every glob of {field} must match a file; {name!r} {what}")
  return Source(name, found)


def stdlib_is_train(file: str) -> bool:
  """Returns whether a standard-library file is for training, decided by its top-level module."""
  module = file.split("/")[0].removesuffix(".py")
  digest = hashlib.sha256(f"{_STDLIB_SPLIT}:{module}".encode()).hexdigest()
  return int(digest, 16) % 100 >= _STDLIB_VALIDATION_PERCENT


def _programs(root: epath.Path) -> Iterator[str]:
  """Yields the names, relative to `root`, of the standard library's programs."""
  for folder in _folders(os.fspath(root), _is_left_out):
    for name in glob.glob("*.py", root_dir=folder):
      if not name.startswith("_sysconfigdata"):  # the build's own paths and flags
        yield os.path.relpath(os.path.join(folder, name), root)


def _is_left_out(folder: str) -> bool:
  return folder in _STDLIB_EXCLUDED or folder.startswith("config-")


def _find(name: str) -> tuple[epath.Path, set[str]]:
  """Returns the folder before a glob's first wildcard, and the names in it that match."""
  path = epath.Path(name).expanduser()
  root, *folders = (*reversed(path.parents), path) if path.parent != path else (path,)
  depth = 0
  while depth < len(folders) - 1 and _is_literal(folders[depth]):
    root, depth = folders[depth], depth + 1
  if root == path.parent and _is_literal(path):
    return root, {path.name}
  pattern = path.relative_to(root).as_posix()
  return root, {file for each in _alternatives(pattern) for file in _glob(root, each)}


def _is_literal(path: epath.Path) -> bool:
  """Returns whether a path's last part is a name and no pattern; [ and { may stand in names."""
  part = frozenset(path.name)
  return not part & _WILDCARDS and (not part & _GROUPS or path.exists())


def _alternatives(pattern: str) -> list[str]:
  """Expands the first {a,b} of a pattern, and so on; groups may stand in groups."""
  match = re.search(r"\{([^{}]*,[^{}]*)\}", pattern)
  if match is None:
    return [pattern]
  before, after = pattern[: match.start()], pattern[match.end() :]
  return [p for choice in match[1].split(",") for p in _alternatives(before + choice + after)]


def _glob(root: epath.Path, pattern: str) -> list[str]:
  """Returns the names, relative to `root`, that match."""
  if "://" in root.as_posix():
    return [path.relative_to(root).as_posix() for path in root.glob(pattern)]
  parts = pattern.split("/")
  if "**" not in parts:
    return glob.glob(pattern, root_dir=root)
  at = parts.index("**")
  before, after = "/".join(parts[:at]), "/".join(parts[at + 1 :]) or "*"
  tops = glob.glob(before, root_dir=root) if before else [""]
  folders = (folder for top in tops for folder in _folders(os.path.join(root, top)))
  paths = (os.path.join(f, name) for f in folders for name in _glob(epath.Path(f), after))
  return [os.path.relpath(path, root) for path in paths]


def _folders(
  folder: str,
  skips: Callable[[str], bool] = lambda name: False,
  passed: frozenset[str] = frozenset(),
) -> Iterator[str]:
  """Yields a folder and those below it; a link to one that was passed leads round for ever.

  Args:
    folder: its path. One that is none is passed over.
    skips: whether to leave out a folder of this name, and all below it.
    passed: real paths of the folders above, where links to them may lie below.
  """
  real = os.path.realpath(folder)
  if real in passed or not os.path.isdir(folder):
    return
  yield folder
  with os.scandir(folder) as entries:
    names = sorted(entry.name for entry in entries if entry.is_dir())
  for name in names:
    if not name.startswith(".") and not skips(name):
      yield from _folders(os.path.join(folder, name), skips, passed | {real})


def _is_file(path: epath.Path) -> bool:
  """Raises ValueError for what would be left out in silence, or block whoever reads it."""
  if "://" in os.fspath(path):
    return path.is_file()
  if os.path.islink(path) and not os.path.exists(path):
    raise ValueError(
      f"data must be in files, {path} is a link to {os.readlink(path)}, which is not there"
    )
  if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
    raise ValueError(f"data must be in files, {path} is a pipe or a device")
  return os.path.isfile(path)


def documents(source: Source, config: DataConfig, faults: Faults | None = None) -> Iterator[Piece]:
  """Reads a source's documents in order, without the empty ones, each as one or more pieces.

  Args:
    source: files; not "synthetic".
    config: the text's field, and what is done with rows without it; see `files.read`.
    faults: counts what was passed over or replaced.

  Raises:
    ValueError: naming the file, for one that cannot be read.
  """
  for file, path in source.files:
    yield from files.read(file, path, config, Faults() if faults is None else faults)


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


def sample(sources: Iterable[Source], config: DataConfig, limit_bytes: int) -> Iterator[str]:
  """Yields about `limit_bytes` of text, spread evenly over the sources, the same every time."""
  sources = list(sources)
  size = sum(_text_bytes(path) for source in sources for _, path in source.files)
  share = min(1.0, limit_bytes / max(size, 1))
  left = limit_bytes
  for i, source in enumerate(sources):
    for j, piece in enumerate(documents(source, config)):
      if zlib.crc32(f"{i}:{j}".encode()) < share * 2**32:
        yield piece.text[:left]
        left -= num_bytes(piece)
        if left <= 0:
          return


def _text_bytes(path: epath.Path) -> int:
  """Returns a file's bytes of text, roughly where it is compressed."""
  is_compressed = path.suffix.lower() in (*files.COMPRESSED_SUFFIXES, *files.PARQUET_SUFFIXES)
  return path.stat().length * (_COMPRESSION_RATIO if is_compressed else 1)


def groups(pieces: Iterable[Piece], limit_bytes: int) -> Iterator[Iterator[Piece]]:
  """Cuts a stream of documents wherever `limit_bytes` of text have come together.

  Each group must be read to its end before the next one is taken.
  """

  def numbered() -> Iterator[tuple[int, Piece]]:
    number, size = 0, 0
    for piece in pieces:
      yield number, piece
      size += num_bytes(piece)
      if piece.is_end and size >= limit_bytes:
        number, size = number + 1, 0

  for _, group in itertools.groupby(numbered(), key=lambda pair: pair[0]):
    yield (piece for _, piece in group)


def num_bytes(piece: Piece) -> int:
  """Counts UTF-8 bytes."""
  return len(piece.text.encode())


def validation_documents(config: DataConfig) -> Iterator[Piece]:
  """Reads the held-out documents in the order of `data.validation_globs`."""
  for name in config.validation_globs:
    yield from documents(find_source(name, is_train=False), config)


def compressed_bits_per_byte(pieces: Iterable[Piece]) -> dict[str, float]:
  """Compresses documents, joined without separator, as a yardstick for a language model.

  Args:
    pieces: the held-out documents, for instance `validation_documents(config)`.

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
  for piece in pieces:
    data = piece.text.encode()
    text_bytes += len(data)
    for name, compressor in compressors.items():
      sizes[name] += len(compressor.compress(data))
  if not text_bytes:
    raise ValueError("there must be text to compress, got 0 bytes")
  for name, compressor in compressors.items():
    sizes[name] += len(compressor.flush())
  return {name: 8 * size / text_bytes for name, size in sizes.items()}
