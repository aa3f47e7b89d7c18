"""Tokenises text once and stores it: ArrayRecord files, the tokenizer and a manifest.

Each document is ended by the end-of-document id; dsmoe/data/shards.py describes the ArrayRecord
files. Other files: `inputs.json` (sources and settings, written first), `tokenizer.json` and the
files that belong to it, `manifest.json` (all files with hashes, written last) and `hashes.json`
(hashes of source files that need not be read again). While the manifest is missing, the folder
holds an unfinished preparation, which is continued, or made again when its inputs have changed.
"""

import contextlib
import dataclasses
import functools
import queue
import threading
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from absl import logging
from etils import epath
from rich.console import Console
from rich.progress import Progress
from tokenizers import Tokenizer

from dsmoe.config import DataConfig, differences
from dsmoe.data import files, folder, sources
from dsmoe.data import shards as shards_lib
from dsmoe.data import tokenizer as tokenizer_lib
from dsmoe.data.files import Faults

SYNTHETIC_VALIDATION_ROWS = 64

_SAMPLE_BYTES = 50 << 20  # text a tokenizer is trained on
_MAX_DIFFERENCES = 8  # lines in an error message
_READING = 2  # counts up when the same files give other documents than before
_MADE = ("tokenizer.json", "*.arrayrecord", "*.lengths.npy")


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
  when it is complete, so several processes may do this at the same time. Complete data is never
  overwritten; an unfinished preparation whose sources or settings have changed since is.

  Args:
    config: the globs, text field and tokenizer, and for synthetic validation the sequence length.
    vocab_size: the model's; a tokenizer is trained to this size if none is given.
    directory: a local directory, because ArrayRecord reads no others; created if it is absent.

  Raises:
    ValueError: if a glob matches nothing, a file cannot be read or is damaged, the tokenizer does
      not fit, or `directory` holds data made from other sources or settings (naming them).
  """
  directory = epath.Path(directory).expanduser()
  if "://" in directory.as_posix():
    raise ValueError(f"data.cache_dir must be a local directory, got {directory}")
  by_name = find_sources(config)
  directory.mkdir(parents=True, exist_ok=True)
  path = directory / "manifest.json"
  with contextlib.closing(folder.Lock(directory)) as lock:
    if lock.is_exclusive:
      folder.delete_temporary(directory)
    inputs = _inputs(config, vocab_size, by_name, directory)
    if path.exists():
      shards = _checked_shards(path)
      found = differences(_comparable(folder.read_json(path)["inputs"]), _comparable(inputs))
      if found:
        _refuse(directory, found)
    else:
      _claim(directory, inputs, by_name, config, lock.is_exclusive)
    lock.share()
    tokenizer = _tokenizer(config, vocab_size, by_name, directory)
    if not path.exists():
      folder.write_json(path, _make(inputs, tokenizer, by_name, config, directory))
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


def digest(prepared: PreparedData) -> str:
  """Returns the SHA-256, hexadecimal, that stands for all the data, from the manifest."""
  return folder.read_json(prepared.manifest)["manifest_sha256"]


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
  known = _known_hashes(cache)
  before = dict(known)
  hashes = {name: sources.sha256s(source, known) for name, source in by_name.items()}
  if known != before:
    folder.write_json(cache, {"files": known, "sha256": folder.json_sha256(known)})
  if config.tokenizer:
    path = epath.Path(config.tokenizer).expanduser()
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
    **({"skip_null_rows": True} if config.skip_null_rows else {}),
    "shard_bytes": shards_lib.SHARD_BYTES,
    "reading": _READING,
    "sources": {n: {"glob": s.name, "sha256": hashes[n]} for n, s in by_name.items()},
  }


def _known_hashes(cache: epath.Path) -> dict[str, list]:
  """Reads the hashes of files from before; a damaged file only means that they are made again."""
  if not cache.exists():
    return {}
  try:
    found = folder.read_json(cache)
    if found.get("sha256") == folder.json_sha256(found.get("files")):
      return found["files"]
  except (ValueError, AttributeError):
    pass
  logging.warning(
    f"{cache} is damaged or of an old version: it is made again, every source file is read again"
  )
  return {}


def _comparable(inputs: dict[str, Any]) -> dict[str, Any]:
  """Returns inputs without the version of reading: complete data is used whatever it was."""
  return {key: value for key, value in inputs.items() if key != "reading"}


def _refuse(directory: epath.Path, found: list[str]) -> NoReturn:
  more = [f"and {len(found) - _MAX_DIFFERENCES} more"] if len(found) > _MAX_DIFFERENCES else []
  raise folder.ChangedDataError(
    f"{directory} holds data made from other sources or settings and is not overwritten; name "
    "another data.cache_dir, or restore:\n  " + "\n  ".join(found[:_MAX_DIFFERENCES] + more)
  )


def _claim(
  directory: epath.Path,
  inputs: dict[str, Any],
  by_name: Mapping[str, sources.Source],
  config: DataConfig,
  is_alone: bool,
) -> None:
  """Writes inputs.json, unless an unfinished preparation from the same inputs is there."""
  path = directory / "inputs.json"
  try:
    found = differences(folder.read_json(path) if path.exists() else {}, inputs)
  except (ValueError, AttributeError, TypeError):
    found = [f"{path} is damaged"]
  if not found:
    return
  made = [path for pattern in _MADE for path in directory.glob(pattern)]
  if made and not path.exists():
    raise ValueError(
      f"{directory} holds {made[0].name} and no inputs.json, so it is unknown what that was made "
      "from; delete it, or name another data.cache_dir"
    )
  if made and not is_alone:  # another process may be at work on them
    _refuse(directory, found)
  _check_text(by_name, config)
  if made:
    logging.warning(
      f"{directory} holds an unfinished preparation from other sources or settings, which is made "
      f"again: {found[0]}"
    )
    for file in made:
      file.unlink(missing_ok=True)
  folder.write_json(path, inputs)


def _check_text(by_name: Mapping[str, sources.Source], config: DataConfig) -> None:
  """Reads the validation text, and the beginning of each training file, before any work is done.

  Raises:
    ValueError: if a file cannot be read, or a source is empty or white space only.
  """
  for name, source in sorted(by_name.items(), key=lambda item: item[0].startswith("train")):
    is_train, is_empty, has_text = name.startswith("train"), True, not source.files
    for file, path in source.files:
      for piece in files.read(file, path, config, Faults()):
        is_empty, has_text = False, has_text or not piece.text.isspace()
        if has_text and is_train:
          break
    if not has_text:
      what = "has none" if is_empty else "has none but white space"
      raise ValueError(f"every source must have text; {source.name!r} ({name}) {what}")


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
      given = epath.Path(config.tokenizer).expanduser()
      text = given.read_text(encoding="utf-8")
      for name, content in tokenizer_lib.files_beside(given, config.eos_token).items():
        with folder.whole(directory / name) as temporary:
          temporary.write_text(content, encoding="utf-8")
    else:
      train = [source for name, source in text_sources.items() if name.startswith("train-")]
      texts = sources.sample(train, config, _SAMPLE_BYTES)
      trained = _interruptible(lambda: tokenizer_lib.train_tokenizer(texts, vocab_size))
      text = trained.to_str(pretty=True)
    with folder.whole(path) as temporary:
      temporary.write_text(text, encoding="utf-8")
  return tokenizer_lib.load_tokenizer(path, vocab_size)


def _interruptible(work: Callable[[], Tokenizer]) -> Tokenizer:
  """Returns what `work` does; Ctrl-C ends the wait at once, which native code would hold up."""
  result: queue.SimpleQueue[Tokenizer | BaseException] = queue.SimpleQueue()

  def run() -> None:
    try:
      result.put(work())
    except BaseException as error:
      result.put(error)

  threading.Thread(target=run, daemon=True).start()
  found = result.get()
  if isinstance(found, BaseException):
    raise found
  return found


def _make(
  inputs: dict[str, Any],
  tokenizer: Tokenizer | None,
  by_name: Mapping[str, sources.Source],
  config: DataConfig,
  directory: epath.Path,
) -> dict[str, Any]:
  """Writes the ArrayRecord files that are missing; returns the manifest."""
  manifest: dict[str, Any] = {"inputs": inputs, "shards": {}}
  faults = Faults()
  if tokenizer is not None:
    manifest["tokenizer_sha256"] = sources.file_sha256(directory / "tokenizer.json")
    with Progress(console=Console(stderr=True)) as progress:
      # Validation first: it is short, and what is wrong with it shows at once.
      for prefix, source in sorted(by_name.items(), key=lambda item: item[0].startswith("train")):
        size = sum(path.stat().length for _, path in source.files)
        task = progress.add_task(f"tokenising {prefix}", total=size, visible=size > 0)
        pieces = sources.documents(source, config, faults)
        advance = functools.partial(progress.advance, task)
        manifest["shards"] |= shards_lib.make(tokenizer, pieces, directory, prefix, advance)
        progress.update(task, completed=size)
  for what, count in faults.most_common(_MAX_DIFFERENCES):
    logging.warning(f"{what}: {count}")
  if len(faults) > _MAX_DIFFERENCES:
    logging.warning(f"and the like in {len(faults) - _MAX_DIFFERENCES} more files")
  return manifest | {"manifest_sha256": folder.json_sha256(manifest)}


def _checked_shards(path: epath.Path) -> dict[str, dict[str, Any]]:
  """Reads the manifest's shards, checking that it is whole and the files are those it names.

  The records carry checksums of their own, which are checked when they are read.
  """
  manifest = folder.read_json(path)
  said = manifest.pop("manifest_sha256", None) if isinstance(manifest, dict) else None
  if said != folder.json_sha256(manifest):
    raise folder.ChangedDataError(
      f"{path} must have the manifest_sha256 of what it holds, got {said}; delete it, and "
      "the next start makes it again"
    )
  if "tokenizer_sha256" in manifest:
    file = path.parent / "tokenizer.json"
    said = manifest["tokenizer_sha256"]
    found = sources.file_sha256(file) if file.exists() else "none"
    if said != found:
      raise folder.ChangedDataError(
        f"{file} changed: SHA-256 {said} -> {found}; restore it, or delete {path.parent}, which is "
        "then made again"
      )
  for name, shard in manifest["shards"].items():
    file = path.parent / name
    found = file.stat().length if file.exists() else "none"
    if found != shard["size"]:
      raise folder.ChangedDataError(
        f"{file} must have {shard['size']} bytes, as in {path.name}, it has {found}; {shards_lib.mend(file)}"
      )
    lengths = shards_lib.load_lengths(file)
    if (len(lengths), int(lengths.sum())) != (shard["documents"], shard["tokens"]):
      raise folder.ChangedDataError(
        f"{shards_lib.lengths_path(file)} must have {shard['documents']} documents of {shard['tokens']} tokens, "
        f"as in {path.name}, it has {len(lengths)} of {lengths.sum()}; {shards_lib.mend(file)}"
      )
  return manifest["shards"]
