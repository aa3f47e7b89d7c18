"""The arrays of a checkpoint slice by slice, for those larger than memory.

What is written here orbax restores, as any checkpoint: one zarr array a leaf, chunk by chunk.
"""

import base64
import hashlib
import json
import math
import pathlib
import threading
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import tensorstore as ts
from etils import epath

from dsmoe import checkpoint

Path = tuple[str, ...]  # of a leaf: ("params", "moe_layers", "mlp", "router")
# orbax's numbers for a dict's key and for its own format.
_DICT_KEY = 2
_CACHE_BYTES = 32 << 20  # beside a chunk: what OCDBT keeps
_HANDLERS = {
  "state": "orbax.checkpoint._src.handlers.standard_checkpoint_handler.StandardCheckpointHandler"
}


def create(
  folder: epath.Path, path: Path, shape: tuple[int, ...], dtype: str, chunk: tuple[int, ...]
) -> ts.TensorStore:
  """Makes an array, or opens it if it is there; its chunks are files, written whole or not at all.

  Args:
    folder: where the state of a step lies.
    path: of the leaf.
    shape, dtype: of the whole leaf; a NumPy dtype's name.
    chunk: what is written, and later read, at once.
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
  """Writes what orbax wants beside the arrays in `step_folder`/state, to read them."""
  entries = {}
  for path, shape in shapes.items():
    entries[str(path)] = {
      "key_metadata": [{"key": key, "key_type": _DICT_KEY} for key in path],
      "value_metadata": {
        **{"value_type": "jax.Array", "skip_deserialize": False},
        "write_shape": list(shape),
      },
    }
  tree = {"tree_metadata": entries, "use_ocdbt": False, "use_zarr3": False}
  tree |= {"store_array_data_equal_to_fill_value": True, "custom_metadata": None}
  (step_folder / "state" / "_METADATA").write_text(json.dumps(tree))
  # Where the arrays go when a reader does not say.
  place = {"sharding_type": "SingleDeviceSharding", "device_str": str(jax.local_devices()[0])}
  names = (base64.b64encode(".".join(path).encode()).decode() for path in shapes)
  (step_folder / "state" / "_sharding").write_text(
    json.dumps(dict.fromkeys(names, json.dumps(place)))
  )
  step: dict[str, Any] = {"item_handlers": _HANDLERS, "metrics": {}, "performance_metrics": {}}
  step |= {"init_timestamp_nsecs": 0, "commit_timestamp_nsecs": 0, "custom_metadata": {}}
  (step_folder / "_CHECKPOINT_METADATA").write_text(json.dumps(step))


class Arrays:
  """The arrays of a step by path, one at a time: of the newest, the newest chunk is kept.

  A chunk is decoded whole, and in a run's own checkpoint it can be a whole array: read the
  slices of one array after another.
  """

  def __init__(self, specs: Mapping[Path, dict[str, Any]], chunk_bytes: Mapping[Path, int]):
    self._specs, self._chunk_bytes = specs, chunk_bytes
    self._lock = threading.Lock()
    self._newest: tuple[Path, ts.TensorStore] | None = None

  def __getitem__(self, path: Path) -> ts.TensorStore:
    with self._lock:  # else several threads would each decode the same chunk
      if self._newest is None or self._newest[0] != path:
        self._newest = None
        cache = {"total_bytes_limit": self._chunk_bytes[path] + _CACHE_BYTES}
        context = ts.Context({"cache_pool": cache})
        self._newest = path, ts.open(self._specs[path], open=True, context=context).result()
      return self._newest[1]


def identity(workdir: epath.PathLike, step: int) -> str:
  """Returns what tells a step's state from any other: a hash of its files' sizes and times."""
  folder = pathlib.Path(checkpoint.step_folder(workdir, step) / "state")
  digest = hashlib.sha256()
  for path in sorted(path for path in folder.rglob("*") if path.is_file()):
    stat = path.stat()
    digest.update(f"{path.relative_to(folder)} {stat.st_size} {stat.st_mtime_ns}\n".encode())
  return digest.hexdigest()


def open_step(workdir: epath.PathLike, step: int, shapes: Mapping[Path, tuple[int, ...]]) -> Arrays:
  """Opens arrays of a step, to be read by slices; nothing is read yet.

  Args:
    workdir: the run's.
    step: one of its checkpoints.
    shapes: of the leaves wanted, by path.

  Raises:
    ValueError: when an array is missing, or of another shape, naming it; later, when a chunk
      is missing.
  """
  folder = checkpoint.step_folder(workdir, step) / "state"
  try:
    metadata = json.loads((folder / "_METADATA").read_text())
    ocdbt, zarr3 = metadata["use_ocdbt"], metadata["use_zarr3"]
    # Else orbax left out the chunks of zeros.
    all_stored = metadata.get("store_array_data_equal_to_fill_value", False)
  except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
    raise ValueError(f"{folder / '_METADATA'} must be orbax's metadata: {error!r}") from error
  specs: dict[Path, dict[str, Any]] = {}
  chunk_bytes: dict[Path, int] = {}
  for path, shape in shapes.items():
    name = ".".join(path)
    kvstore: dict[str, Any] = {"driver": "file", "path": f"{folder}/"}
    if ocdbt:
      kvstore = {"driver": "ocdbt", "base": kvstore, "path": f"{name}/"}
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
    chunk: Any = array.chunk_layout.read_chunk.shape
    chunk_bytes[path] = math.prod(chunk) * array.dtype.numpy_dtype.itemsize
  return Arrays(specs, chunk_bytes)
