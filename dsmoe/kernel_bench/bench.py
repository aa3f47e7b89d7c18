"""Measures a kernel's implementations: compiled without a device, or timed on the attached one.

Before any timing, each implementation is checked against an oracle. All are timed in turns, so that
a busy machine slows all of them; on a GPU the driver's count of the kernels' time is used. The
grouped SwiGLU is measured beside two more computations, whose oracle is the reference: `dense`,
every row through one expert, which bounds what is possible; and `local dispatch`, the whole of a
layer on one device.
"""

import functools
import importlib
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import rich.box
import rich.console
import rich.progress
import rich.table

from dsmoe import platforms
from dsmoe.compilers import compile_only
from dsmoe.kernel_bench import cases
from dsmoe.kernel_bench.cases import Shape
from pallas_kernels.grouped_matmul import TILES, grouped_swiglu, tile_table

_COLUMNS = {
  "bytes": "MB",
  "least_bytes": "least MB",
  "declared_bytes": "declared MB",
  "flops": "GFLOP",
  "mxu_flops": "MXU GFLOP",
  "bound_secs": "bound ms",
  "cycles_bound": "cycles",
  "bundles": "bundles",
  "mxu_occupancy": "MXU",
  "steady_mxu_occupancy": "MXU, loop",
  "spill_share": "spills",
  "fill_share": "fills",
  "vmem_bytes": "VMEM MB",
  "registers": "registers",
  "spill_bytes": "spill B",
  "shared_bytes": "shared B",
  "blocks_per_sm": "blocks/SM",
}
_COLUMNS |= {
  "median_secs": "ms",
  "gflops_per_sec": "GFLOP/s",
  "of_dense": "of dense",
  "chosen": "chosen",
}
_SCALE = {"bytes": 1e-6, "least_bytes": 1e-6, "vmem_bytes": 1e-6}
_SCALE |= {"declared_bytes": 1e-6, "flops": 1e-9, "mxu_flops": 1e-9}
_SCALE |= {"bound_secs": 1e3, "median_secs": 1e3}


def compile_row(
  topology: str, kernel: str, implementation: str, name: str, shape: Shape, limit_secs: int = 0
) -> dict:
  """Compiles a case for a chip, in a process of its own, and returns a row of its figures.

  Args:
    topology: for instance "v5p:2x2x1" or "h100".
    kernel, implementation, shape: the case.
    name: name of the shape.
    limit_secs: time limit for compiling; 0: none.

  Returns:
    The figures of `compile_only.tpu_figures` or `h100_figures`; the case's `flops` and
    `least_bytes`; `bound_secs`, the time that FLOPs and bytes take at the chip's peaks;
    `cycles_bound`, the larger of that time and the schedule, in cycles; `secs`, the same in
    seconds. If the case cannot be compiled, `error` says why.
  """
  chip = compile_only.chip_of(topology)
  row: dict[str, Any] = {
    "kernel": kernel,
    "implementation": implementation,
    "shape": name,
    "chip": chip.name,
  }
  try:
    found = cases.case(kernel, implementation, shape)
    row |= {"flops": found.flops, "least_bytes": found.least_bytes}
    row |= compile_only.in_fresh_process(
      _figures, topology, kernel, implementation, shape, limit_secs=limit_secs
    )
  except Exception as error:
    return row | {"error": reason(error)}
  assert chip.hbm_bytes_per_sec, f"the table must have the bandwidth of {chip.name}"
  row["bound_secs"] = max(row["flops"] / chip.peak_flops, row["bytes"] / chip.hbm_bytes_per_sec)
  row["secs"] = row["bound_secs"]
  if chip.clock_hz and "schedule_cycles" in row:
    row["cycles_bound"] = max(row["schedule_cycles"], round(row["bound_secs"] * chip.clock_hz))
    row["secs"] = row["cycles_bound"] / chip.clock_hz
  return row


def reason(error: Exception) -> str:
  """Returns an error's type and the beginning of its message; "absent" for a missing library."""
  if isinstance(error, ImportError):
    return f"absent: {error}"
  return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _figures(topology: str, kernel: str, implementation: str, shape: Shape) -> dict[str, Any]:
  jax.config.update("jax_platforms", "cpu")
  found = cases.case(kernel, implementation, shape)
  if topology.startswith("h100"):
    return compile_only.h100_figures(found.fn, *found.args)
  return compile_only.tpu_figures(topology, found.fn, *cases.known_args(kernel, shape))


def ways(
  kernel: str, shape: Shape, names: Iterable[str], oracle_name: str = "reference"
) -> dict[str, tuple]:
  """Returns by name (builder of the function, its oracle, the arguments of both)."""
  args = jax.jit(functools.partial(cases.OPERATIONS[kernel].draw, shape))()
  known = cases.IMPLEMENTATIONS[kernel]
  oracle = known[oracle_name](shape)
  found = {name: (functools.partial(known[name], shape), oracle, args) for name in names}
  return found if kernel != "grouped_swiglu" else _bounds_of_swiglu(shape, args) | found


def _bounds_of_swiglu(shape: Shape, args: tuple) -> dict[str, tuple]:
  x_PD, weight_P, w_gate_EDF, w_up_EDF, w_down_EFD, sizes_E = args
  one = tuple(w[:1] for w in (w_gate_EDF, w_up_EDF, w_down_EFD))

  def dense(x_PD, weight_P, w_gate_EDF, w_up_EDF, w_down_EFD, sizes_E):
    inner_PF = jax.nn.silu(x_PD @ w_gate_EDF[0]) * (x_PD @ w_up_EDF[0]) * weight_P[:, None]
    return inner_PF.astype(x_PD.dtype) @ w_down_EFD[0]

  swiglu = functools.partial(grouped_swiglu, implementation="reference")
  routed = functools.partial(cases.routed_swiglu, implementation="reference")
  return {
    "dense": (lambda: dense, swiglu, (x_PD, weight_P, *one, sizes_E.sum(keepdims=True))),
    "local dispatch": (
      lambda: cases.routed_swiglu,
      routed,
      cases.OPERATIONS["routed_swiglu"].draw(shape),
    ),
  }


def _with_gradient(fn: Callable) -> Callable:
  """Returns a function that computes fn's results and the gradients of its real arguments."""

  def run(*args):
    real = [jnp.issubdtype(a.dtype, jnp.inexact) for a in args]

    def of_real(*operands):
      rest = iter(operands)
      out = jax.tree.leaves(fn(*(next(rest) if r else a for r, a in zip(real, args))))
      inexact = [o for o in out if jnp.issubdtype(o.dtype, jnp.inexact)]
      return inexact, [o for o in out if not jnp.issubdtype(o.dtype, jnp.inexact)]

    operands = [a for r, a in zip(real, args) if r]
    values, vjp, others = jax.vjp(of_real, *operands, has_aux=True)
    return values, others, vjp([jnp.sin(v.astype(jnp.float32)).astype(v.dtype) for v in values])

  return run


@jax.jit
def _difference(a, b):
  """Returns the largest difference over the largest magnitude; for integers, their sums."""
  reduce = jnp.sum if jnp.issubdtype(a.dtype, jnp.integer) else jnp.max
  a, b = a.astype(jnp.float32), b.astype(jnp.float32)
  return reduce(jnp.abs(a - b)) / jnp.maximum(reduce(jnp.abs(b)), 1e-30)


def check(fn: Callable, expected: Any, args: tuple) -> None:
  """Raises AssertionError if fn, a compiled function, does not return the expected values.

  For integers, sums of differences are compared: where two experts' scores differ by rounding only,
  one choice may differ, and with it two counts and the ranks that follow.
  """
  dtype = next(a.dtype for a in args if jnp.issubdtype(a.dtype, jnp.inexact))
  limits = {True: 1e-3, False: 1e-4 if dtype == jnp.float32 else 5e-2}
  actual = fn(*args)
  for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
    if a.shape != b.shape:
      raise AssertionError(f"has shape {a.shape}, not {b.shape}")
    limit, found = limits[jnp.issubdtype(a.dtype, jnp.integer)], float(_difference(a, b))
    if not found <= limit:
      raise AssertionError(f"differs by {found:.2g} of {a.dtype} {a.shape}, not {limit} at most")


def _secs_of(run: Callable, args: tuple) -> float:
  """Runs a function once and returns its seconds: on a GPU those of its kernels, else elapsed."""
  if jax.default_backend() == "gpu":
    profiler = importlib.import_module("jax.experimental.mosaic.gpu.profiler")
    return profiler.Cupti(finalize=False).measure(run)(*args)[1] / 1e3
  start = time.perf_counter()
  jax.block_until_ready(run(*args))
  return time.perf_counter() - start


def _in_turns(compiled: dict[Any, tuple], rounds: int) -> dict[Any, list[float]]:
  """Times each (function, arguments) once a round, after two rounds of warm-up; returns seconds."""
  secs: dict[Any, list[float]] = {key: [] for key in compiled}
  to = rich.console.Console(stderr=True)
  for round_number in rich.progress.track(range(rounds + 2), "timing", console=to, transient=True):
    for key, (run, args) in compiled.items():
      took = _secs_of(run, args)
      if round_number >= 2:
        secs[key].append(took)
  return secs


def measure(
  kernel: str,
  name: str,
  shape: Shape,
  names: Iterable[str],
  rounds: int,
  oracle_name: str = "reference",
) -> list[dict]:
  """Times the implementations of a kernel.

  Args:
    kernel: a key of `cases.OPERATIONS`.
    name, shape: the shape and its name.
    names: the implementations to time.
    rounds: how often each is timed, after two rounds that are not counted.
    oracle_name: the implementation that the others are checked against.

  Returns:
    A row for each implementation and direction: `median_secs`, `gflops_per_sec` of useful work,
    and `of_dense`, the median over the rounds of the ratio to `dense` where that is measured. An
    implementation that does not run here or is wrong has a row with `error`.
  """
  options, rows = platforms.compiler_options(), []
  device = jax.devices()[0].device_kind
  head = {"kernel": kernel, "shape": name, "device": device, "tokens": shape.tokens}
  compiled, expected = {}, {}
  directions: dict[str, Callable] = {"forward": lambda fn: fn}
  if f"{kernel}_gradient" in cases.OPERATIONS:
    directions["forward + backward"] = _with_gradient
  for way, (make, oracle, args) in ways(kernel, shape, names, oracle_name).items():
    differentiated = cases.IMPLEMENTATIONS.get(f"{kernel}_gradient", {})
    is_forward_only = way in cases.IMPLEMENTATIONS[kernel] and way not in differentiated
    for direction, wrap in directions.items():
      if is_forward_only and direction != "forward":
        continue
      try:
        fn = jax.jit(wrap(make()), compiler_options=options)  # what is checked is what is timed
        if (oracle, direction) not in expected:
          expected[oracle, direction] = jax.jit(wrap(oracle))(*args)
        check(fn, expected[oracle, direction], args)
      except Exception as error:
        row = {"implementation": way, "direction": direction, "error": reason(error)}
        rows.append(head | row)
        continue
      compiled[way, direction] = (fn, args)
  expected.clear()
  secs = _in_turns(compiled, rounds)
  flops = cases.OPERATIONS[kernel].flops(shape)
  for (way, direction), times in secs.items():
    work = flops * (1 if direction == "forward" else 3)
    dense = secs.get(("dense", direction))
    rows.append(
      head
      | {
        "implementation": way,
        "direction": direction,
        "median_secs": statistics.median(times),
        "gflops_per_sec": work / statistics.median(times) / 1e9,
        "of_dense": statistics.median(d / t for d, t in zip(dense, times)) if dense else None,
      }
    )
  return rows


def tune_tiles(name: str, shape: Shape, names: Iterable[str], rounds: int, path: str) -> list[dict]:
  """Times each tile size of an expert layer, forward and backward, and stores the fastest.

  Args:
    name, shape: the shape and its name.
    names: implementations with tile sizes to choose from.
    rounds: how often each tile size is timed.
    path: file of the table, see `tile_table`.

  Returns:
    A row for each tile size; `chosen` is true for those stored.

  Raises:
    ValueError: for an implementation without a choice of tile sizes.
  """
  if none := [n for n in names if n not in TILES]:
    raise ValueError(f"only {', '.join(TILES)} have tiles to tune, got {', '.join(none)}")
  args = cases.OPERATIONS["routed_swiglu"].draw(shape)
  oracle = _with_gradient(cases.IMPLEMENTATIONS["routed_swiglu"]["reference"](shape))
  expected = jax.jit(oracle)(*args)
  _, D, F, E, P = shape.dims
  rows: list[dict] = []
  for implementation in names:
    ways = {}
    for tile in TILES[implementation]:
      fn = functools.partial(cases.routed_swiglu, implementation=implementation, tile=tile)
      run = jax.jit(_with_gradient(fn), compiler_options=platforms.compiler_options())
      check(run, expected, args)
      ways[tile] = (run, args)
    medians = {t: statistics.median(times) for t, times in _in_turns(ways, rounds).items()}
    best = min(medians, key=medians.__getitem__)
    for tile, median_secs in medians.items():
      rows.append(
        {
          "kernel": "routed_swiglu",
          "shape": name,
          "implementation": implementation,
          "direction": f"tile of {tile}",
          "median_secs": median_secs,
          "chosen": tile == best,
        }
      )
    key = tile_table.entry(implementation, P, E, D, F, shape.config.compute_dtype)
    tile_table.store(path, key, best)
  return rows


def table(rows: list[dict]) -> rich.table.Table:
  """Returns a table of the rows without errors, with the columns that some row has."""
  columns = {name: title for name, title in _COLUMNS.items() if any(name in row for row in rows)}
  shown = rich.table.Table("kernel", "implementation", "shape", box=rich.box.SIMPLE)
  for title in columns.values():
    shown.add_column(title, justify="right")
  for row in rows:
    name = " ".join(filter(None, (row["implementation"], row.get("direction"))))
    cells = ["" if row.get(c) is None else _figure(c, row[c]) for c in columns]
    if "error" not in row:
      shown.add_row(row["kernel"], name, row["shape"], *cells)
  return shown


def _figure(name: str, value: float) -> str:
  value *= _SCALE.get(name, 1)
  return f"{value:,.0f}" if value >= 1000 or value == int(value) else f"{value:.3g}"
