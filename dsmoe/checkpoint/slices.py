"""Reads and writes the arrays of a checkpoint by slices, for checkpoints larger than memory.

orbax restores what is written here like any checkpoint: each leaf is a zarr array, in chunks.

Depends on private formats of orbax (written with 0.12.8, whose public API saves whole arrays
only): the files `_METADATA`, `_sharding` and `_CHECKPOINT_METADATA`, which `write_metadata` writes
and of which `open_step` reads the first; the names of leaves ("params.embed") and of the handler's
class. If another orbax changes them, checkpoints made by `scripts/convert_hf.py import` cannot be
restored, and `export` and `verify` cannot read the checkpoints of runs; training and its own
checkpoints do not pass through here. tests/checkpoint/test_slices.py compares every key and value
with what the installed orbax writes, and fails first.
"""

import base64
import hashlib
import json
import math
import pathlib
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import tensorstore as ts
from etils import epath

from dsmoe.checkpoint import contents, integrity

Path = tuple[str, ...]  # of a leaf: ("params", "moe_layers", "mlp", "router")
_DICT_KEY = 2  # orbax's number for a key of a dict
_CACHE_BYTES = 32 << 20  # what OCDBT keeps in memory beside a chunk
_BLOCK_BYTES = 64 << 20  # of an array, read at once for its checksum
_HANDLERS = {
  "state": "orbax.checkpoint._src.handlers.standard_checkpoint_handler.StandardCheckpointHandler"
}


def create(
  folder: epath.Path, path: Path, shape: tuple[int, ...], dtype: str, chunk: tuple[int, ...]
) -> ts.TensorStore:
  """Creates an array, or opens an existing one; each chunk is a file, replaced atomically.

  Args:
    folder: the folder of a step's state.
    path: path of the leaf.
    shape: shape of the whole leaf.
    dtype: name of a NumPy dtype, or "bfloat16".
    chunk: shape of the blocks that are written, and later read, at once.
  """
  spec = {
    "driver": "zarr",
    "kvstore": {"driver": "file", "path": str(folder / ".".join(path))},
    "metadata": {"shape": shape, "chunks": chunk, "dtype": _zarr_dtype(dtype), "compressor": None},
    "store_data_equal_to_fill_value": True,
  }
  return ts.open(spec, create=True, open=True).result()


def _zarr_dtype(dtype: str) -> str:
  return dtype if dtype == "bfloat16" else np.dtype(dtype).str


def write_metadata(step_folder: epath.Path, shapes: Mapping[Path, tuple[int, ...]]) -> None:
  """Writes the metadata files without which orbax does not read the arrays of a step.

  Args:
    step_folder: the arrays are in its folder `state`.
    shapes: shapes of all leaves, by path.
  """
  entries = {}
  for path, shape in shapes.items():
    entries[str(path)] = {
      "key_metadata": [{"key": key, "key_type": _DICT_KEY} for key in path],
      "value_metadata": {
        "value_type": "jax.Array",
        "skip_deserialize": False,
        "write_shape": list(shape),
      },
    }
  tree = {
    "tree_metadata": entries,
    "use_ocdbt": False,
    "use_zarr3": False,
    "store_array_data_equal_to_fill_value": True,
    "custom_metadata": None,
  }
  (step_folder / "state" / "_METADATA").write_text(json.dumps(tree))
  # The sharding of arrays that are restored without one.
  place = {"sharding_type": "SingleDeviceSharding", "device_str": str(jax.local_devices()[0])}
  names = (base64.b64encode(".".join(path).encode()).decode() for path in shapes)
  (step_folder / "state" / "_sharding").write_text(
    json.dumps(dict.fromkeys(names, json.dumps(place)))
  )
  step: dict[str, Any] = {
    "item_handlers": _HANDLERS,
    "metrics": {},
    "performance_metrics": {},
    "init_timestamp_nsecs": 0,
    "commit_timestamp_nsecs": 0,
    "custom_metadata": {},
  }
  (step_folder / "_CHECKPOINT_METADATA").write_text(json.dumps(step))


class Arrays:
  """The arrays of a step, by path. Only the last array that was used keeps a chunk in memory.

  Chunks are decoded whole, and in a run's own checkpoint a chunk can be a whole array. Read all
  slices of one array before those of the next.
  """

  def __init__(self, specs: Mapping[Path, dict[str, Any]], chunk_bytes: Mapping[Path, int]):
    self._specs, self._chunk_bytes = specs, chunk_bytes
    self._lock = threading.Lock()
    self._newest: tuple[Path, ts.TensorStore] | None = None

  def __getitem__(self, path: Path) -> ts.TensorStore:
    with self._lock:  # without it, several threads would decode the same chunk
      if self._newest is None or self._newest[0] != path:
        self._newest = None
        cache = {"total_bytes_limit": self._chunk_bytes[path] + _CACHE_BYTES}
        context = ts.Context({"cache_pool": cache})
        self._newest = path, ts.open(self._specs[path], open=True, context=context).result()
      return self._newest[1]


def check_arrays(
  workdir: epath.PathLike, step: int, arrays: Arrays, shapes: Mapping[Path, tuple[int, ...]]
) -> None:
  """Reads the arrays of a step once and compares their checksums, if the checkpoint has any.

  Raises:
    ValueError: naming the checkpoint and the first array that is damaged.
  """
  checksums = contents.saved_checksums(workdir, step)
  if checksums is None:
    return
  with contents.named_damage(workdir, step):
    for path, shape in shapes.items():
      found = integrity.checksum_of_blocks(_blocks(arrays[path], shape))
      contents.compare_checksum(".".join(path), checksums, found)


def _blocks(array: ts.TensorStore, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
  """Yields an array in row-major order: matrix by matrix, and large matrices by their rows."""
  if len(shape) < 2:
    yield array.read().result()
    return
  rows = max(_BLOCK_BYTES // (shape[-1] * array.dtype.numpy_dtype.itemsize), 1)
  for index in np.ndindex(shape[:-2]):
    for first in range(0, shape[-2], rows):
      yield array[(*index, slice(first, min(first + rows, shape[-2])))].read().result()


def identity(workdir: epath.PathLike, step: int) -> str:
  """Returns a hash of the sizes and times of a step's files, equal only for the same state."""
  folder = pathlib.Path(contents.step_folder(workdir, step) / "state")
  digest = hashlib.sha256()
  for path in sorted(path for path in folder.rglob("*") if path.is_file()):
    stat = path.stat()
    digest.update(f"{path.relative_to(folder)} {stat.st_size} {stat.st_mtime_ns}\n".encode())
  return digest.hexdigest()


def open_step(workdir: epath.PathLike, step: int, shapes: Mapping[Path, tuple[int, ...]]) -> Arrays:
  """Opens arrays of a step so that slices can be read; no data is read yet.

  Args:
    workdir: the run's folder.
    step: one of its checkpoints.
    shapes: shapes of the leaves to open, by path.

  Raises:
    ValueError: naming the array, if one is missing or has another shape. Reading a slice later
      raises it for a missing chunk.
  """
  return open_arrays(contents.step_folder(workdir, step) / "state", shapes)


def open_arrays(folder: epath.Path, shapes: Mapping[Path, tuple[int, ...]]) -> Arrays:
  """Opens arrays in the folder of a state; see `open_step`."""
  try:
    metadata = json.loads((folder / "_METADATA").read_text())
    ocdbt, zarr3 = metadata["use_ocdbt"], metadata["use_zarr3"]
    # Without this setting orbax leaves out the chunks of zeros.
    all_stored = metadata.get("store_array_data_equal_to_fill_value", False)
  except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
    raise ValueError(f"{folder / '_METADATA'} must be orbax's metadata: {error!r}") from error
  specs: dict[Path, dict[str, Any]] = {}
  chunk_bytes: dict[Path, int] = {}
  for path, shape in shapes.items():
    name = ".".join(path)
    # TensorStore takes the addresses of object stores, such as gs://bucket/folder/, as they are.
    kvstore: Any = (
      f"{folder}/" if "://" in str(folder) else {"driver": "file", "path": f"{folder}/"}
    )
    if ocdbt:
      kvstore = {"driver": "ocdbt", "base": kvstore, "path": f"{name}/"}
    elif isinstance(kvstore, str):
      kvstore += f"{name}/"
    else:
      kvstore["path"] += f"{name}/"
    specs[path] = {"driver": "zarr3" if zarr3 else "zarr", "kvstore": kvstore}
    specs[path]["fill_missing_data_reads"] = not all_stored
    try:
      array = ts.open(specs[path], open=True).result()
    except ValueError as error:
      raise ValueError(f"{folder} must hold the array {name}: {error}") from error
    if array.shape != shape:
      raise ValueError(
        f"array {name} in {folder} must have the shape config.json gives it, {list(shape)}, got "
        f"{list(array.shape)}"
      )
    chunk: Any = array.chunk_layout.read_chunk.shape or ()  # None for a scalar
    chunk_bytes[path] = math.prod(chunk) * array.dtype.numpy_dtype.itemsize
  return Arrays(specs, chunk_bytes)
