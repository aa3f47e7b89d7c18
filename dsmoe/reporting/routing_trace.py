"""Routing traces: which experts each token of a training step chose, in every MoE layer.

Training writes one file a process for each of `log.routing_trace_steps`, a NumPy archive,
`<workdir>/routing_traces/step_<step>_process_<number>.npz`, which holds

  expert_LMK         uint8, or uint16 from 256 experts on: the experts of the process' tokens, by
                     layer, the MTP modules' last; K experts a token
  place_M            int64: each token's place in the step's batch, row times sequence length plus
                     position, ascending
  counts_LE          int32: tokens of the whole batch that each expert received
  step, num_rows, sequence_length, num_microbatches, num_processes: int64 scalars

Its size is about layers times tokens times K bytes: 7.6 MB for 16,384 tokens of DeepSeek-V3.
On a mesh each of the batch's `num_devices` parts is a run of equally many consecutive rows, and
each of its microbatches a run of the part's.

Shapes: L MoE layers, B rows, S positions, M tokens, K experts a token, E experts.
"""

import io
import re
import zipfile
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

FOLDER = "routing_traces"
_SCALARS = ("step", "num_rows", "sequence_length", "num_microbatches", "num_processes")


class Trace(NamedTuple):
  """The routing of one training step; the tokens are in the order of the batch."""

  expert_LMK: np.ndarray  # uint8 or uint16
  counts_LE: np.ndarray  # int32
  step: int
  num_rows: int
  sequence_length: int
  num_microbatches: int

  @property
  def num_experts(self) -> int:
    return self.counts_LE.shape[1]


def write(
  workdir: epath.PathLike,
  step: int,
  expert_LBSK: jax.Array,
  counts_LE: np.ndarray,
  num_microbatches: int,
) -> epath.Path:
  """Writes this process's part of a step's routing; returns the file.

  Args:
    workdir: of the run.
    step: number of the step.
    expert_LBSK: a global array of ints; of parts held more than once, one counts.
    counts_LE: int32, over the whole batch.
    num_microbatches: of the step.
  """
  _, B, S, _ = expert_LBSK.shape
  dtype = np.uint8 if counts_LE.shape[1] < 256 else np.uint16
  parts, places = [], []
  for shard in expert_LBSK.addressable_shards:
    if shard.replica_id:
      continue
    rows, positions = (np.arange(n)[s] for n, s in zip((B, S), shard.index[1:3]))
    places.append((rows[:, None] * S + positions[None, :]).reshape(-1))
    part_LBSK = np.asarray(shard.data).astype(dtype)
    parts.append(part_LBSK.reshape(part_LBSK.shape[0], -1, part_LBSK.shape[3]))
  place_M = np.concatenate(places)
  order_M = np.argsort(place_M)
  buffer = io.BytesIO()
  numbers = (step, B, S, num_microbatches, jax.process_count())
  scalars: dict[str, Any] = {n: np.int64(value) for n, value in zip(_SCALARS, numbers)}
  np.savez_compressed(
    buffer,
    expert_LMK=np.concatenate(parts, axis=1)[:, order_M],
    place_M=place_M[order_M],
    counts_LE=np.asarray(counts_LE, np.int32),
    **scalars,
  )
  path = epath.Path(workdir) / FOLDER / f"step_{step}_process_{jax.process_index()}.npz"
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(buffer.getvalue())
  return path


def read(path: epath.PathLike) -> Trace:
  """Reads the trace of a step.

  Args:
    path: the file of any of its processes; the others' must lie beside it.

  Raises:
    ValueError: when a file is no trace, a process' file is missing, or tokens are.
  """
  parts = [_read_file(epath.Path(path))]
  scalars = {name: int(parts[0][name]) for name in _SCALARS}
  if scalars["num_processes"] > 1:
    parts = [_read_file(p) for p in _of_all_processes(epath.Path(path), scalars["num_processes"])]
  place_M = np.concatenate([part["place_M"] for part in parts])
  tokens = scalars["num_rows"] * scalars["sequence_length"]
  if not np.array_equal(np.sort(place_M), np.arange(tokens)):
    raise ValueError(
      f"the files of a routing trace must hold each of its {tokens} tokens once, {path} and those "
      f"beside it hold {len(place_M)}"
    )
  expert_LMK = np.concatenate([part["expert_LMK"] for part in parts], axis=1)
  del scalars["num_processes"]
  return Trace(expert_LMK[:, np.argsort(place_M)], parts[0]["counts_LE"], **scalars)


def _of_all_processes(path: epath.Path, num_processes: int) -> list[epath.Path]:
  stem = re.sub(r"process_\d+\.npz$", "process_", path.name)
  paths = [path.parent / f"{stem}{number}.npz" for number in range(num_processes)]
  if missing := [p.name for p in paths if not p.exists()]:
    raise ValueError(
      f"a routing trace of {num_processes} processes must have a file of each in {path.parent}, "
      f"{missing[0]} is missing"
    )
  return paths


def _read_file(path: epath.Path) -> dict[str, np.ndarray]:
  if not path.exists():
    raise ValueError(f"the file of a routing trace must exist, got {path}")
  try:
    with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
      return {name: file[name] for name in ("expert_LMK", "place_M", "counts_LE", *_SCALARS)}
  except (KeyError, ValueError, OSError, zipfile.BadZipFile) as error:
    raise ValueError(f"{path} must be a routing trace that training wrote: {error}") from None
