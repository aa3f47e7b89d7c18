"""Measures kernels beside their rivals: by the real compilers without a device, or by the clock.

  python scripts/bench_kernels.py --compile-only --topology=v5p:2x2x1 --plot=roofline.png
  python scripts/bench_kernels.py --config=experiments/bench_small.py --tokens=4096
  python scripts/bench_kernels.py --shapes=v3 --kernels=routing,decode_attention
  python scripts/bench_kernels.py --config=experiments/bench_small.py --tune=tiles.json

The first compiles each kernel, implementation and shape for a chip (v5p, v6e, tpu7x: needs the
tpu extra; h100: the cuda13 extra) and reads bytes, bundles, matrix-unit occupancy and spills from
what the compiler made of it. The second times them on the attached device, checked against the
reference before (or --oracle); the third does at shapes of the first. The fourth times the tiles of
an expert layer there and keeps the fastest for configs with model.kernels.tuned=tiles.json.
"""

import importlib
import json
import math
import pathlib

import jax
import rich.console
import rich.progress
from absl import app, flags
from ml_collections import config_flags

from dsmoe import config as config_lib
from dsmoe import runtime
from dsmoe.compilers import compile_only
from dsmoe.kernel_bench import bench
from dsmoe.kernel_bench import cases as kernel_cases
from dsmoe.kernel_bench.cases import Shape
from dsmoe.reporting import plots
from pallas_kernels import grouped_matmul

# Experiment, tokens a device routes, sequence length, devices the experts are spread over.
_SHAPES = {
  "v3": ("deepseek_v3", 8192, 4096, 8),
  "v2_lite": ("deepseek_v2_lite", 8192, 4096, 1),
  "tiny": ("tiny", 2048, 256, 1),
}

# What implementations' names begin with that can be compiled for one platform only.
_ONLY_ON = {
  "tpu": ("mosaic_tpu", "megablox", "splash", "tokamax", "unfused"),
  "gpu": ("mosaic_gpu", "jax_mosaic_gpu", "cudnn"),
}

_DEFAULT_KERNEL = "grouped_swiglu"  # to be timed

_COMPILE_ONLY = flags.DEFINE_bool("compile_only", False, "Compile for --topology; run nothing.")
flags.DEFINE_alias("compile-only", "compile_only")
_TOPOLOGY = flags.DEFINE_string("topology", "v5p:2x2x1", "v5p:2x2x1, v6e:2x2x1, tpu7x:2x2x1, h100.")
_KERNELS = flags.DEFINE_list("kernels", [], "Some; by default all, timed: grouped_swiglu.")
_IMPLEMENTATIONS = flags.DEFINE_list(
  "implementations", [], "Some; by default all, timed on CPU: blocked and xla, or the reference."
)
_NAMES = flags.DEFINE_list("shapes", [], "Shapes to compile, by default all, or to time.")
_LIMIT = flags.DEFINE_integer(
  "limit_secs", 300, "Compiling a case is given up after so long; 0: never.", lower_bound=0
)
_PLOT = flags.DEFINE_string("plot", None, "A PNG to draw the compiled kernels' roofline into.")
_CONFIG = config_flags.DEFINE_config_file("config", None, "The experiment whose sizes are timed.")
_ORACLE = flags.DEFINE_string(
  "oracle", "reference", "The implementation that the others are checked against before timing."
)
_TOKENS = flags.DEFINE_integer("tokens", 4096, "Tokens routed with --config.", lower_bound=1)
_ROUNDS = flags.DEFINE_integer("rounds", 15, "Times each way is timed.", lower_bound=1)
_TUNE = flags.DEFINE_string("tune", None, "Time tiles; the fastest go into this table.")
_JSON = flags.DEFINE_bool("json", False, "End with one line of JSON.")


def load_shape(
  experiment: str, tokens: int, sequence_length: int, expert_devices: int, decode_attention: str
) -> Shape:
  """Returns a shape of an experiment's model, its cache laid out for a kernel."""
  config = importlib.import_module(f"experiments.{experiment}").get_config()
  config.model.kernels.decode_attention = decode_attention
  model = config_lib.from_config_dict(config).model
  return Shape(model, tokens, sequence_length, expert_devices)


def chosen(kernel: str, platform: str) -> list[str]:
  """Returns the implementations of a kernel to measure on a platform: those asked for, or all."""
  known = list(kernel_cases.IMPLEMENTATIONS[kernel])
  if wanted := _IMPLEMENTATIONS.value:
    return [name for name in known if name in wanted]
  if platform == "cpu":  # where the others look at every expert's rows
    return [name for name in known if name in ("blocked", "xla")] or ["reference"]
  foreign = _ONLY_ON["gpu" if platform == "tpu" else "tpu"]
  return [name for name in known if not name.startswith(foreign)]


def compiled() -> list[dict]:
  """Returns a row a case, each compiled in a process of its own."""
  jax.config.update("jax_platforms", "cpu")  # no search for the device that is not there
  chip = compile_only.chip_of(_TOPOLOGY.value)
  platform = "gpu" if _TOPOLOGY.value.startswith("h100") else "tpu"
  shapes = {
    name: load_shape(*_SHAPES[name], f"mosaic_{platform}") for name in _NAMES.value or _SHAPES
  }
  cases = [
    (kernel, implementation, name)
    for kernel in _KERNELS.value or kernel_cases.OPERATIONS
    for implementation in chosen(kernel, platform)
    for name in shapes
  ]
  to = rich.console.Console(stderr=True)
  rows = []
  for case in rich.progress.track(cases, f"compiling for {_TOPOLOGY.value}", console=to):
    rows.append(bench.compile_row(_TOPOLOGY.value, *case, shapes[case[-1]], _LIMIT.value))
    to.print(*case, rows[-1].get("error", "compiled"), markup=False, soft_wrap=True)
  if _PLOT.value and chip.hbm_bytes_per_sec:
    plots.draw_roofline(rows, chip.peak_flops, chip.hbm_bytes_per_sec, _PLOT.value)
  return rows


def _timed_shapes() -> dict[str, Shape]:
  if _CONFIG.value is None:
    ours = "mosaic_gpu" if jax.default_backend() == "gpu" else "mosaic_tpu"
    return {name: load_shape(*_SHAPES[name], ours) for name in _NAMES.value}
  config, tokens = config_lib.from_config_dict(_CONFIG.value), _TOKENS.value
  name = pathlib.Path(config_flags.get_config_filename(flags.FLAGS["config"])).stem
  return {name: Shape(config.model, tokens, math.gcd(tokens, config.data.sequence_length), 1)}


def timed() -> list[dict]:
  """Returns a row an implementation and direction, on the attached device."""
  rows = []
  for name, shape in _timed_shapes().items():
    if _TUNE.value:
      tiled = _IMPLEMENTATIONS.value or [grouped_matmul.chosen(None)]
      rows += bench.tune(name, shape, tiled, _ROUNDS.value, _TUNE.value)
      continue
    for kernel in _KERNELS.value or [_DEFAULT_KERNEL]:
      names = chosen(kernel, jax.default_backend())
      rows += bench.measure(kernel, name, shape, names, _ROUNDS.value, _ORACLE.value)
  return rows


def _check_flags() -> None:
  for flag, names, known in (
    ("kernels", _KERNELS.value, list(kernel_cases.OPERATIONS)),
    ("shapes", _NAMES.value, list(_SHAPES)),
    ("tune's implementations", _TUNE.value and _IMPLEMENTATIONS.value, list(grouped_matmul.TILES)),
  ):
    if unknown := [name for name in names or [] if name not in known]:
      raise app.UsageError(f"--{flag} must be among {', '.join(known)}, got {', '.join(unknown)}")
  if _COMPILE_ONLY.value and _TUNE.value:
    raise app.UsageError("--tune times kernels on a device, which --compile-only does not")
  if not _COMPILE_ONLY.value and bool(_NAMES.value) == bool(_CONFIG.value):
    raise app.UsageError(
      "give one of --config and --shapes, whose sizes are timed, or --compile-only"
    )
  if flags.FLAGS["tokens"].present and not _CONFIG.value:
    raise app.UsageError("--tokens goes with --config; --shapes have tokens of their own")
  for kernel in _KERNELS.value or [_DEFAULT_KERNEL]:
    ways = kernel_cases.IMPLEMENTATIONS[kernel]
    if _ORACLE.value not in ways:
      raise app.UsageError(
        f"--oracle must be an implementation of {kernel} ({', '.join(ways)}), got {_ORACLE.value}"
      )
  if _TUNE.value and flags.FLAGS["oracle"].present:
    raise app.UsageError("--tune checks against the reference: it takes no --oracle")
  try:
    missing = compile_only.missing_compiler(_TOPOLOGY.value)
  except ValueError as error:
    raise app.UsageError(str(error)) from None
  if missing and _COMPILE_ONLY.value:
    raise app.UsageError(missing)


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments: {' '.join(argv[1:])}")
  _check_flags()
  if not _COMPILE_ONLY.value:
    runtime.start()
  rows = compiled() if _COMPILE_ONLY.value else timed()
  if _JSON.value:
    print(json.dumps(rows))
  else:
    # As wide as it is: a narrow terminal wraps it, a file holds it whole, nothing is cut.
    rich.console.Console(width=1000).print(bench.table(rows))
    for row in rows:
      if "error" in row:
        names = (row.get(key, "") for key in ("kernel", "implementation", "direction", "shape"))
        print(" ".join(filter(None, names)) + f": {row['error']}")


if __name__ == "__main__":
  app.run(main)
