"""Tokenises text once and stores it: ArrayRecord files, the tokenizer and a manifest.

One record is one document: little-endian uint32 ids, ended by the end-of-document id. Beside each
`x.arrayrecord` is `x.lengths.npy`, its documents' lengths in tokens (int32). Other files:
`inputs.json` (sources and settings, written first), `tokenizer.json` and the files that belong to
it, `manifest.json` (all files with hashes, written last) and `hashes.json` (hashes of source files that need not be read again).
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from array_record.python import array_record_module
from etils import epath
from rich.console import Console
from rich.progress import Progress
from tokenizers import Tokenizer

from dsmoe.config import DataConfig, differences
from dsmoe.data import sources
from dsmoe.data import tokenizer as tokenizer_lib

SYNTHETIC_VALIDATION_ROWS = 64

_SHARD_BYTES = 64 << 20  # text in one ArrayRecord file; an interruption loses at most one file
_ENCODE_BYTES = 1 << 20  # text encoded at once
_SAMPLE_BYTES = 50 << 20  # text a tokenizer is trained on
_MAX_DIFFERENCES = 8  # lines in an error message

Encode = Callable[[list[str]], list[np.ndarray]]  # from documents to their ids


@dataclasses.dataclass(frozen=True)
class PreparedData:
  """What `prepare` made.

  Attributes:
    tokenizer: None if every source is "synthetic".
    vocab_size: the model's; ids are below it.
    train: for each of `data.train_globs` its ArrayRecord files; () for "synthetic".
    validation: the ArrayRecord files of the validation set, in order.
    train_bytes: of UTF-8 text, for each of `data.train_globs`.
    train_tokens: ids, one end a document among them, for each of `data.train_globs`.
    validation_bytes: of UTF-8 text; a synthetic token counts as one byte.
    validation_tokens: ids, one end a document among them.
    manifest: manifest.json; `manifest_sha256` in it stands for all the data.
  """

  tokenizer: Tokenizer | None
  vocab_size: int
  train: tuple[tuple[epath.Path, ...], ...]
  validation: tuple[epath.Path, ...]
  train_bytes: tuple[int, ...]
  train_tokens: tuple[int, ...]
  validation_bytes: int
  validation_tokens: int
  manifest: epath.Path


def prepare(config: DataConfig, vocab_size: int, directory: epath.PathLike) -> PreparedData:
  """Tokenises the corpus into `directory`, or checks that what is there was made from it.

  After an interruption, complete files are kept and the others are written. A file gets its name
  when it is complete, so several processes may do this at the same time. Nothing is overwritten.

  Args:
    config: the globs, text field and tokenizer, and for synthetic validation the sequence length.
    vocab_size: the model's; a tokenizer is trained to this size if none is given.
    directory: a local directory, because ArrayRecord reads no others; created if it is absent.

  Raises:
    ValueError: if a glob matches nothing, a file does not have its suffix's format, the tokenizer
      does not fit, or `directory` holds data made from other sources or settings (naming them).
  """
  directory = epath.Path(directory)
  if "://" in directory.as_posix():
    raise ValueError(f"data.cache_dir must be a local directory, got {directory}")
  by_name = find_sources(config)
  directory.mkdir(parents=True, exist_ok=True)
  inputs = _inputs(config, vocab_size, by_name, directory)
  _claim(directory, inputs, by_name)
  tokenizer = _tokenizer(config, vocab_size, by_name, directory)
  path = directory / "manifest.json"
  if not path.exists():
    _write_json(path, _make(inputs, tokenizer, by_name, config.text_field, directory))
  shards = _checked_shards(path)

  def total(prefix: str, key: str) -> int:
    return sum(shard[key] for name, shard in shards.items() if name.startswith(f"{prefix}-"))

  def paths(prefix: str) -> tuple[epath.Path, ...]:
    return tuple(directory / name for name in sorted(shards) if name.startswith(f"{prefix}-"))

  train = [name for name in by_name if name.startswith("train-")]
  held_out = [name for name in by_name if name.startswith("validation-")]
  is_synthetic = sources.SYNTHETIC in config.validation_globs
  synthetic = is_synthetic * SYNTHETIC_VALIDATION_ROWS * config.sequence_length
  return PreparedData(
    tokenizer=tokenizer,
    vocab_size=vocab_size,
    train=tuple(paths(name) for name in train),
    validation=tuple(path for name in held_out for path in paths(name)),
    train_bytes=tuple(total(name, "bytes") for name in train),
    train_tokens=tuple(total(name, "tokens") for name in train),
    validation_bytes=total("validation", "bytes") + synthetic,
    validation_tokens=total("validation", "tokens") + synthetic,
    manifest=path,
  )


def lengths_path(path: epath.Path) -> epath.Path:
  """Returns where the lengths of an ArrayRecord file's documents are."""
  return path.with_suffix(".lengths.npy")


def find_sources(config: DataConfig) -> dict[str, sources.Source]:
  """Finds every file of the config's globs, by "train-<i>" and "validation-<i>".

  Raises:
    ValueError: if a glob matches nothing, or "synthetic" does not stand alone in validation.
  """
  train, held_out = config.train_globs, config.validation_globs
  if sources.SYNTHETIC in held_out and len(held_out) > 1:
    raise ValueError(f"'synthetic' must stand alone in data.validation_globs, got {held_out}")
  by_name = {f"train-{i}": sources.find_source(g, is_train=True) for i, g in enumerate(train)}
  for i, g in enumerate(held_out):
    by_name[f"validation-{i}"] = sources.find_source(g, is_train=False)
  return by_name


def _inputs(
  config: DataConfig, vocab_size: int, by_name: Mapping[str, sources.Source], directory: epath.Path
) -> dict[str, Any]:
  """Returns a description of the sources and settings that the data depends on."""
  cache = directory / "hashes.json"
  old = json.loads(cache.read_text()) if cache.exists() else {}
  known = dict(old)
  hashes = {name: sources.sha256s(source, known) for name, source in by_name.items()}
  if known != old:
    _write_json(cache, known)
  if config.tokenizer:
    path = epath.Path(config.tokenizer)
    loaded = tokenizer_lib.load_tokenizer(path, vocab_size, config.eos_token)
    tokenizer: dict[str, Any] = {"sha256": sources.file_sha256(path)}
    end = tokenizer_lib.eos_id(loaded, tokenizer_lib.folder_of(path), config.eos_token)
    if end not in tokenizer_lib.known_ends(loaded)[:1]:  # data from before there was a choice
      tokenizer["eos_token"] = loaded.id_to_token(end)
  else:
    tokenizer = {"trained_to_vocab_size": vocab_size, "sample_bytes": _SAMPLE_BYTES}
  return {
    "tokenizer": tokenizer if any(hashes.values()) else {},
    "text_field": config.text_field,
    "shard_bytes": _SHARD_BYTES,
    "sources": {n: {"glob": s.name, "sha256": hashes[n]} for n, s in by_name.items()},
  }


def _claim(
  directory: epath.Path, inputs: dict[str, Any], by_name: Mapping[str, sources.Source]
) -> None:
  """Writes inputs.json, or checks that what the directory holds was made from the same."""
  path = directory / "inputs.json"
  if not (directory / "tokenizer.json").exists() and not (directory / "manifest.json").exists():
    for name, source in by_name.items():
      if source.files and next(sources.documents(source, inputs["text_field"]), None) is None:
        raise ValueError(f"every source must have text; {source.name!r} ({name}) has none")
    _write_json(path, inputs)
  found = differences(json.loads(path.read_text()), inputs)
  if found:
    more = [f"and {len(found) - _MAX_DIFFERENCES} more"] if len(found) > _MAX_DIFFERENCES else []
    raise ValueError(
      f"{directory} holds data made from other sources or settings and is not overwritten; name "
      "another data.cache_dir, or restore:\n  " + "\n  ".join(found[:_MAX_DIFFERENCES] + more)
    )


def _tokenizer(
  config: DataConfig, vocab_size: int, by_name: Mapping[str, sources.Source], directory: epath.Path
) -> Tokenizer | None:
  """Loads the tokenizer of the data, after training or copying it if it is not there yet."""
  text_sources = {name: source for name, source in by_name.items() if source.files}
  if not text_sources:
    return None
  path = directory / "tokenizer.json"
  if not path.exists():
    if config.tokenizer:
      given = epath.Path(config.tokenizer)
      text = given.read_text(encoding="utf-8")
      for name, content in tokenizer_lib.files_beside(given, config.eos_token).items():
        with _whole(directory / name) as temporary:
          temporary.write_text(content, encoding="utf-8")
    else:
      train = [source for name, source in text_sources.items() if name.startswith("train-")]
      texts = sources.sample(train, config.text_field, _SAMPLE_BYTES)
      text = tokenizer_lib.train_tokenizer(texts, vocab_size).to_str(pretty=True)
    with _whole(path) as temporary:
      temporary.write_text(text, encoding="utf-8")
  return tokenizer_lib.load_tokenizer(path, vocab_size)


def _make(
  inputs: dict[str, Any],
  tokenizer: Tokenizer | None,
  by_name: Mapping[str, sources.Source],
  text_field: str,
  directory: epath.Path,
) -> dict[str, Any]:
  """Writes the ArrayRecord files that are missing; returns the manifest."""
  manifest: dict[str, Any] = {"inputs": inputs, "shards": {}}
  if tokenizer is not None:
    manifest["tokenizer_sha256"] = sources.file_sha256(directory / "tokenizer.json")
    encoder = tokenizer_lib.text_only(tokenizer)
    end = tokenizer_lib.eos_id(tokenizer, directory)

    def encode(group: list[str]) -> list[np.ndarray]:
      return tokenizer_lib.encode_documents(encoder, group, end)

    with Progress(console=Console(stderr=True)) as progress:
      for prefix, source in by_name.items():  # "synthetic" has no documents
        size = sum(path.stat().length for _, path in source.files)
        task = progress.add_task(f"tokenising {prefix}", total=size)
        texts = sources.documents(source, text_field)
        advance = functools.partial(progress.advance, task)
        manifest["shards"] |= _make_shards(encode, texts, directory, prefix, advance)
        progress.update(task, completed=size)
  return manifest | {"manifest_sha256": _json_sha256(manifest)}


def _make_shards(
  encode: Encode,
  texts: Iterable[str],
  directory: epath.Path,
  prefix: str,
  advance: Callable[[int], None],
) -> dict[str, dict[str, Any]]:
  """Writes documents into ArrayRecord files, unless they are there; returns facts by name."""
  shards = {}
  for i, group in enumerate(sources.groups(texts, _SHARD_BYTES)):
    path = directory / f"{prefix}-{i:05d}.arrayrecord"
    if not path.exists():
      _write_shard(encode, group, path, advance)
    lengths = np.load(lengths_path(path))
    shards[path.name] = {
      "documents": len(lengths),
      "bytes": sources.num_bytes(group),
      "tokens": int(lengths.sum(dtype=np.int64)),
      "size": path.stat().length,
      "sha256": sources.file_sha256(path),
    }
  return shards


def _write_shard(
  encode: Encode, texts: list[str], path: epath.Path, advance: Callable[[int], None]
) -> None:
  """Writes one ArrayRecord file and its lengths; the former gets its name last."""
  lengths = []
  with _whole(path) as temporary:
    # One record a group: documents are read one by one, in any order.
    writer = array_record_module.ArrayRecordWriter(str(temporary), "group_size:1")
    for group in sources.groups(texts, _ENCODE_BYTES):
      for tokens in encode(group):
        writer.write(tokens.astype("<u4").tobytes())
        lengths.append(len(tokens))
      advance(sources.num_bytes(group))
    writer.close()
    with _whole(lengths_path(path)) as other, other.open("wb") as f:
      np.save(f, np.array(lengths, np.int32))


def _checked_shards(path: epath.Path) -> dict[str, dict[str, Any]]:
  """Reads the manifest's shards, checking that it is whole and the files are there."""
  manifest = json.loads(path.read_text())
  said = manifest.pop("manifest_sha256")
  if said != _json_sha256(manifest):
    raise ValueError(f"manifest_sha256 must be that of the manifest; in {path} it is not: {said}")
  if "tokenizer_sha256" in manifest:
    said, found = manifest["tokenizer_sha256"], sources.file_sha256(path.parent / "tokenizer.json")
    if said != found:
      raise ValueError(f"{path.parent}/tokenizer.json changed: SHA-256 {said} -> {found}")
  for name, shard in manifest["shards"].items():
    file = path.parent / name
    found = file.stat().length if file.exists() else "none"
    if found != shard["size"]:
      raise ValueError(f"{file} must have {shard['size']} bytes, as in {path.name}; it has {found}")
  return manifest["shards"]


def _json_sha256(value: Any) -> str:
  return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _write_json(path: epath.Path, value: Any) -> None:
  with _whole(path) as temporary:
    temporary.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")


@contextlib.contextmanager
def _whole(path: epath.Path) -> Iterator[epath.Path]:
  """Gives a temporary file that becomes `path` at the end, or goes if something is raised."""
  temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
  try:
    yield temporary
    temporary.replace(path)
  finally:
    temporary.unlink(missing_ok=True)
