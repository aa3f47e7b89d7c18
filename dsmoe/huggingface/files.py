"""Reads and writes safetensors files by rows, in one file or in shards.

Only the rows asked for are in memory: files are read and written, never mapped, so that a
checkpoint larger than the machine's memory can be converted.

This reader stays ours because no library does that. Peak resident memory of reading a float32
tensor of 2,048 MB (1,953 MiB), 5,000 of its 500,000 rows at a time, with the process before it:
  this module                                        +  19 MiB
  safetensors 0.8.0, safe_open(...).get_slice        +1,970 MiB: it maps the file
  orbax-checkpoint 0.12.8, experimental.v1           +2,093 MiB: it reads whole shards
Besides, safetensors 0.8.0 cannot return float8 tensors as NumPy arrays (it looks for
`numpy.float8_e4m3fn`), orbax does not know F8_E8M0, and neither writes a file by rows.

Depends on the format alone: a length, a JSON header with `dtype`, `shape` and `data_offsets`, and
the tensors without gaps. A new dtype in published checkpoints is refused by `read_header` until
it is added to `DTYPES` or `OTHER_BYTES`. tests/huggingface/test_files.py compares every dtype, both
ways, with the installed safetensors library, and fails first.

Source: https://github.com/huggingface/safetensors (the format).
"""

import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from dsmoe.huggingface.config import fail
from dsmoe.huggingface.fp8 import FP8_BLOCK, dequantise

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SCALE = "_scale_inv"  # added to the name of an FP8 weight
DTYPES: dict[str, Any] = {
  "F32": np.dtype(np.float32),
  "BF16": np.dtype(ml_dtypes.bfloat16),
  "F16": np.dtype(np.float16),
  "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
  "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}
# Bytes of the dtypes that are not read, so that other tensors of the same file can be.
OTHER_BYTES = {
  "F64": 8,
  "I64": 8,
  "U64": 8,
  "I32": 4,
  "U32": 4,
  "I16": 2,
  "U16": 2,
  "I8": 1,
  "U8": 1,
  "BOOL": 1,
  "F8_E5M2": 1,
}
WEIGHT_DTYPES = ("F32", "BF16", "F16", "F8_E4M3")
SCALE_DTYPES = ("F32", "F8_E8M0")


class Stored(NamedTuple):
  """The place of a tensor in a file."""

  file: pathlib.Path
  dtype: str  # as safetensors spells it
  shape: tuple[int, ...]
  start: int  # offset of its first byte in the file

  @property
  def row_bytes(self) -> int:
    return math.prod(self.shape[1:]) * _itemsize(self.dtype)

  @property
  def num_bytes(self) -> int:
    return math.prod(self.shape) * _itemsize(self.dtype)


def _itemsize(dtype: str) -> int:
  return DTYPES[dtype].itemsize if dtype in DTYPES else OTHER_BYTES[dtype]


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """Reads a JSON object.

  Raises:
    ValueError: when the file is not one.
  """
  try:
    value = json.loads(path.read_text(encoding="utf-8"))
  except (ValueError, RecursionError) as error:
    raise ValueError(f"{path} must be a JSON file: {error}") from error
  if not isinstance(value, dict):
    fail(f"{path} must hold a JSON object, got {type(value).__name__}")
  return value


def read_header(path: pathlib.Path) -> dict[str, Stored]:
  """Reads which tensors a safetensors file holds, and checks that all their bytes are there.

  Raises:
    ValueError: naming the file, and the tensor if a single one is wrong.
  """
  whole = f"{path} must be a whole safetensors file"
  size = path.stat().st_size
  with path.open("rb") as file:
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or 8 + length > size:
      fail(f"{whole}: its header takes {8 + length} bytes, the file has {size}")
    try:
      entries = json.loads(file.read(length))
      entries.pop("__metadata__", None)
      entries = sorted(entries.items(), key=lambda item: item[1]["data_offsets"])
      found: list[tuple[str, str, tuple[int, ...], int, int]] = [
        (name, str(e["dtype"]), tuple(map(int, e["shape"])), int(first), int(last))
        for name, e in entries
        for first, last in [e["data_offsets"]]
      ]
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
      raise ValueError(f"{whole}: its header is broken ({error!r})") from error
  result, end = {}, 0
  for name, dtype, shape, first, last in found:
    if dtype not in DTYPES and dtype not in OTHER_BYTES:
      fail(f"tensor {name} in {path} must be one of {', '.join(WEIGHT_DTYPES)}, got {dtype}")
    result[name] = stored = Stored(path, dtype, shape, 8 + length + first)
    if first != end or last - first != stored.num_bytes:
      fail(
        f"{whole}: tensor {name}, {dtype} {list(shape)}, needs {stored.num_bytes} bytes from "
        f"{end} on, its header says {first} to {last}"
      )
    if 8 + length + last > size:
      fail(f"{whole}: tensor {name} ends at byte {8 + length + last}, the file has {size}")
    end = last
  if 8 + length + end != size:
    fail(f"{whole}: its tensors end at byte {8 + length + end}, the file has {size}")
  return result


def read_folder(folder: pathlib.Path) -> dict[str, Stored]:
  """Finds every tensor of a checkpoint, in one file or in the shards that an index names.

  Raises:
    ValueError: naming the file, if it is missing, broken or contradicts the index.
  """
  if (folder / WEIGHTS).exists():
    return read_header(folder / WEIGHTS)
  if not (folder / INDEX).exists():
    fail(f"{folder} must hold {WEIGHTS} or {INDEX}, it has neither")
  weight_map = read_json(folder / INDEX).get("weight_map")
  if not isinstance(weight_map, dict) or not weight_map:
    fail(f"{folder / INDEX} must have a weight_map from tensors to files, got {weight_map!r}")
  shards: dict[str, set[str]] = {}
  for name, shard in weight_map.items():
    if not isinstance(shard, str):
      fail(f"{folder / INDEX}: weight_map must name a file for {name}, got {shard!r}")
    shards.setdefault(shard, set()).add(name)
  result: dict[str, Stored] = {}
  for shard, listed in shards.items():
    if not (folder / shard).exists():
      fail(f"shard {folder / shard} must exist: {INDEX} says it holds {min(listed)}")
    held = read_header(folder / shard)
    if set(held) != listed:
      fail(
        f"{folder / shard} must hold the tensors {INDEX} lists for it: it lacks "
        f"{sorted(listed - set(held))[:3]}, and {sorted(set(held) - listed)[:3]} are not listed"
      )
    result |= held
  return result


def read_rows(stored: Stored, start: int = 0, stop: int | None = None) -> np.ndarray:
  """Reads rows [start, stop) of a tensor's first dimension, in its own dtype."""
  shape = stored.shape
  if shape:
    shape = ((shape[0] if stop is None else stop) - start, *shape[1:])
  buffer: Any = np.empty(stored._replace(shape=shape).num_bytes, np.uint8)
  with stored.file.open("rb", buffering=0) as file:
    file.seek(stored.start + start * stored.row_bytes)
    done = 0
    while done < buffer.size:  # a read may return less, 2 GiB at most
      got = file.readinto(memoryview(buffer)[done:])
      if not got:
        fail(f"{stored.file} must be a whole safetensors file: it ended while it was read")
      done += got
  return buffer.view(DTYPES[stored.dtype]).reshape(shape)


class TensorFiles:
  """The tensors of a published checkpoint, read by rows; FP8 weights have their scales applied."""

  def __init__(self, folder: pathlib.Path, fp8_block: tuple[int, int] | None):
    """Reads the headers.

    Args:
      folder: holds the files.
      fp8_block: the block that shares a scale, see `huggingface.config.fp8_block`.

    Raises:
      ValueError: naming file and tensor, if the files contradict each other or `fp8_block`.
    """
    stored = read_folder(folder)
    self._block = fp8_block or FP8_BLOCK
    self.scales = {name: s for name, s in stored.items() if name.endswith(SCALE)}
    self.stored = {name: s for name, s in stored.items() if name not in self.scales}
    quantised = {name for name, s in self.stored.items() if s.dtype == "F8_E4M3"}
    if (quantised and not fp8_block) or (self.stored and fp8_block and not quantised):
      name = min(quantised or self.stored)
      fail(
        f"config.json must have a quantization_config if and only if there are FP8 weights, it "
        f"has {'one' if fp8_block else 'none'}, but {self.where(name)} is {self.stored[name].dtype}"
      )
    for name in sorted(quantised):
      self._check_scale(name)
    for name, scale in self.scales.items():
      weight = name.removesuffix(SCALE)
      if weight not in quantised:
        what = self.stored[weight].dtype if weight in self.stored else "in no file"
        fail(f"tensor {name} in {scale.file} must belong to an FP8 weight, {weight} is {what}")

  def _check_scale(self, name: str) -> None:
    stored, scale = self.stored[name], self.scales.get(name + SCALE)
    if scale is None:
      fail(f"{self.where(name)} is FP8 and needs a scale, {name + SCALE} is in no file")
    wanted = tuple(-(-n // b) for n, b in zip(stored.shape, self._block))
    if scale.shape != wanted or len(stored.shape) != 2:
      fail(
        f"tensor {name + SCALE} in {scale.file} must have one number a block of {self._block}, "
        f"{list(wanted)} for {name} of {list(stored.shape)}, got {list(scale.shape)}"
      )
    if scale.dtype not in SCALE_DTYPES:
      fail(
        f"tensor {name + SCALE} in {scale.file} must be one of {', '.join(SCALE_DTYPES)}, got "
        f"{scale.dtype}"
      )

  def where(self, name: str) -> str:
    """Returns the tensor and its file, for messages."""
    return f"tensor {name} in {self.stored[name].file}"

  def check(self, name: str, shape: tuple[int, ...]) -> None:
    """Checks dtype and shape.

    Raises:
      ValueError: naming file and tensor.
    """
    stored = self.stored[name]
    if stored.dtype not in WEIGHT_DTYPES:
      fail(f"{self.where(name)} must be one of {', '.join(WEIGHT_DTYPES)}, got {stored.dtype}")
    if stored.shape != shape:
      fail(
        f"{self.where(name)} must have the shape config.json gives it, {list(shape)}, got "
        f"{list(stored.shape)}"
      )

  def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
    """Reads rows of a weight in its own dtype; rows of an FP8 weight are scaled, in float32."""
    stored = self.stored[name]
    rows = read_rows(stored, start, stop)
    if stored.dtype != "F8_E4M3":
      return rows
    return dequantise(rows, read_rows(self.scales[name + SCALE]), start, self._block)


def create_shards(
  folder: pathlib.Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]], max_shard_bytes: int
) -> dict[str, Stored]:
  """Creates the files of some tensors with their headers; `write_rows` adds the data.

  Files of the same tensors that exist already keep their data.

  Args:
    folder: where the files go.
    tensors: dtype and shape by name, in the order in which they are divided into shards.
    max_shard_bytes: upper limit of the bytes of a file's tensors; a single tensor may exceed it.

  Returns:
    The place of each tensor. A single file has no index, like those that transformers writes.
  """
  shards: list[dict[str, Stored]] = [{}]
  room = max_shard_bytes
  for name, (dtype, shape) in tensors.items():
    stored = Stored(folder, dtype, shape, 0)
    if shards[-1] and stored.num_bytes > room:
      shards.append({})
      room = max_shard_bytes
    shards[-1][name] = stored
    room -= stored.num_bytes
  result: dict[str, Stored] = {}
  for number, shard in enumerate(shards, 1):
    one = len(shards) == 1
    path = folder / (WEIGHTS if one else f"model-{number:05}-of-{len(shards):05}.safetensors")
    # The widest dtype comes first, so that each tensor is aligned to its own width.
    names = sorted(shard, key=lambda name: -_itemsize(shard[name].dtype))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
      _, dtype, shape, _ = shard[name]
      offsets = [end, end := end + shard[name].num_bytes]
      header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("r+b" if path.exists() else "w+b") as file:
      file.write(len(text).to_bytes(8, "little") + text)
      file.truncate(8 + len(text) + end)
    for name in names:
      start = 8 + len(text) + header[name]["data_offsets"][0]
      result[name] = shard[name]._replace(file=path, start=start)
  if len(shards) > 1:
    total = sum(stored.num_bytes for stored in result.values())
    weight_map = {name: result[name].file.name for name in tensors}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2))
  return result


def write_rows(stored: Stored, start: int, rows: np.ndarray) -> None:
  """Writes rows in the tensor's dtype, the first of them at row `start`."""
  assert rows.dtype == DTYPES[stored.dtype] and rows.shape[1:] == stored.shape[1:]
  with stored.file.open("r+b") as file:
    file.seek(stored.start + start * stored.row_bytes)
    file.write(np.ascontiguousarray(rows).reshape(-1).view(np.uint8).data)
