"""Rows of a tile by measurement: what was fastest on a device, in a table on disk.

`scripts/bench_kernels.py --tune=PATH` measures and writes; a config whose kernels.tuned is PATH
reads when its step is traced. What the table does not list, the kernels decide by themselves.

The table is JSON: {device kind: {sizes: rows}}.

Shapes: P rows, E experts, D hidden, F inner.
"""

import functools
import json
import math
import os
import pathlib

import jax
import jax.numpy as jnp

from pallas_kernels import platform
from pallas_kernels.grouped_matmul.api import TILES, chosen


def entry(implementation: str, P: int, E: int, D: int, F: int, dtype) -> str:
  """Returns what an entry is for: the sizes, rows an expert rounded to a power of two."""
  rows = 2 ** round(math.log2(max(P / E, 1)))
  return f"{implementation} {jnp.dtype(dtype).name} {D}x{F}, {rows} rows an expert"


@functools.cache
def load(path: str) -> dict[str, dict[str, int]]:
  """Reads a table.

  Raises:
    ValueError: for a file that is not there or not a table.
  """
  try:
    table = json.loads(pathlib.Path(path).read_text())
    ok = all(type(rows) is int for sizes in table.values() for rows in sizes.values())
  except (OSError, ValueError, AttributeError) as error:
    raise ValueError(
      f"kernels.tuned must be a table that bench_kernels --tune wrote, {path} is not: {error}"
    ) from error
  if not ok:
    raise ValueError(f"kernels.tuned must hold rows of tiles as integers, got {path}")
  return table


def tile(
  path: str | None, implementation: str | None, P: int, E: int, D: int, F: int, dtype
) -> int | None:
  """Returns the rows of a tile that the table lists for this device and these sizes, or None.

  Args:
    path: of the table; None: there is none.
    implementation: as `grouped_swiglu` takes it.
    P, E, D, F: rows of all experts together, experts, hidden and inner size.
    dtype: of the operands.
  """
  implementation = chosen(implementation)
  if path is None or implementation not in TILES:
    return None
  sizes = load(path).get(platform.device_kind(), {})
  return sizes.get(entry(implementation, P, E, D, F, dtype))


def store(path: str, name: str, rows: int) -> None:
  """Adds an entry of this device to a table, or to a new one; other entries stay."""
  file = pathlib.Path(path)
  load.cache_clear()
  table = dict(load(path)) if file.exists() else {}
  device = jax.devices()[0].device_kind
  table[device] = table.get(device, {}) | {name: rows}
  file.parent.mkdir(parents=True, exist_ok=True)
  draft = file.with_name(f"{file.name}.{os.getpid()}")
  draft.write_text(json.dumps(table, indent=2, sort_keys=True) + "\n")
  draft.replace(file)  # whole, or not at all
  load.cache_clear()
