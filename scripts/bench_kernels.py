"""Measures kernels beside their baselines: compiled without a device, or timed on the attached one.

  python scripts/bench_kernels.py --compile-only --topology=v5p:2x2x1 --plot=roofline.png
  python scripts/bench_kernels.py --config=experiments/bench_small.py --tokens=4096
  python scripts/bench_kernels.py --shapes=v3 --kernels=routing,decode_attention
  python scripts/bench_kernels.py --config=experiments/bench_small.py --tune=tiles.json

The first command compiles each kernel, implementation and shape for a chip (v5p, v6e, tpu7x: needs
the tpu extra; h100: the cuda13 extra) and reads bytes, bundles, matrix-unit occupancy and spills
from the compiler's dumps. The second and third time kernels on the attached device, at the sizes
of an experiment or at one of the shapes of the first command; every implementation is checked
against --oracle before. The file of --json grows kernel by kernel. The fourth times the tile sizes
of an expert layer and stores the fastest in a table, for configs with model.kernels.tuned=tiles.json.
"""

import importlib
import math
import pathlib
from collections.abc import Iterator

import jax
import rich.console
import rich.progress
from absl import app, flags
from ml_collections import config_flags

from dsmoe import config as config_lib
from dsmoe import runtime
from dsmoe.compilers import compile_only
from dsmoe.kernel_bench import bench, cases, selection
from dsmoe.kernel_bench.cases import Shape
from dsmoe.reporting import output, plots
from pallas_kernels import grouped_matmul

# Experiment, tokens a device routes, sequence length, devices the experts are spread over.
_SHAPES = {
  "v3": ("deepseek_v3", 8192, 4096, 8),
  "v2_lite": ("deepseek_v2_lite", 8192, 4096, 1),
  "tiny": ("tiny", 2048, 256, 1),
}

_DEFAULT_KERNEL = "grouped_swiglu"  # timed if --kernels is not given

_COMPILE_ONLY = flags.DEFINE_bool("compile_only", False, "Compile for --topology; run nothing.")
flags.DEFINE_alias("compile-only", "compile_only")
_TOPOLOGY = flags.DEFINE_string("topology", "v5p:2x2x1", "v5p:2x2x1, v6e:2x2x1, tpu7x:2x2x1, h100.")
_KERNELS = flags.DEFINE_list(
  "kernels", [], "Kernels to measure; by default all are compiled, or grouped_swiglu is timed."
)
_IMPLEMENTATIONS = flags.DEFINE_list(
  "implementations",
  [],
  "Implementations to measure; by default all, but on CPU blocked and xla, or the reference, and on "
  "an attached GPU those that do not take seconds a call.",
)
_NAMES = flags.DEFINE_list("shapes", [], "Shapes to compile (by default all) or to time.")
_LIMIT = flags.DEFINE_integer(
  "limit_secs", 300, "Time limit for compiling one case, in seconds; 0: none.", lower_bound=0
)
_PLOT = flags.DEFINE_string("plot", None, "PNG file for the roofline of the compiled kernels.")
_CONFIG = config_flags.DEFINE_config_file("config", None, "Experiment whose sizes are timed.")
_ORACLE = flags.DEFINE_string(
  "oracle",
  None,
  "The implementation that the others are checked against before timing; by default the reference, "
  "or on an attached TPU or GPU XLA's form where there is one.",
)
_TOKENS = flags.DEFINE_integer("tokens", 4096, "Tokens routed with --config.", lower_bound=1)
_ROUNDS = flags.DEFINE_integer(
  "rounds", 15, "How often each implementation is timed.", lower_bound=1
)
_TUNE = flags.DEFINE_string("tune", None, "Time tile sizes and store the fastest in this table.")
_JSON = output.define_json()


def load_shape(
  experiment: str, tokens: int, sequence_length: int, expert_devices: int, decode_attention: str
) -> Shape:
  """Returns a shape of an experiment's model.

  Args:
    experiment: name of a module of `experiments`.
    tokens, sequence_length, expert_devices: see `Shape`.
    decode_attention: implementation that the layout of the cache is for.
  """
  config = importlib.import_module(f"experiments.{experiment}").get_config()
  config.model.kernels.decode_attention = decode_attention
  model = config_lib.from_config_dict(config).model
  return Shape(model, tokens, sequence_length, expert_devices)


def compiled() -> list[dict]:
  """Compiles every case, each in a process of its own; returns a row for each."""
  jax.config.update("jax_platforms", "cpu")  # do not look for the device, which is absent
  chip = compile_only.chip_of(_TOPOLOGY.value)
  platform = "gpu" if _TOPOLOGY.value.startswith("h100") else "tpu"
  shapes = {
    name: load_shape(*_SHAPES[name], f"mosaic_{platform}") for name in _NAMES.value or _SHAPES
  }
  wanted = [
    (kernel, implementation, name)
    for kernel in _KERNELS.value or cases.OPERATIONS
    for implementation in selection.implementations(kernel, platform, _IMPLEMENTATIONS.value)
    for name in shapes
  ]
  to = rich.console.Console(stderr=True)
  rows = []
  for case in rich.progress.track(wanted, f"compiling for {_TOPOLOGY.value}", console=to):
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


def timed() -> Iterator[list[dict]]:
  """Times every kernel on the attached device.

  Yields:
    A kernel's rows at one shape, one for each implementation and pass. A kernel that cannot be
    measured has a row with `error`, and the others are measured all the same.
  """
  platform = jax.default_backend()
  for name, shape in _timed_shapes().items():
    if _TUNE.value:
      tiled = _IMPLEMENTATIONS.value or [grouped_matmul.chosen(None)]
      yield bench.tune_tiles(name, shape, tiled, _ROUNDS.value, _TUNE.value)
      continue
    for kernel in _KERNELS.value or [_DEFAULT_KERNEL]:
      names = selection.implementations(kernel, platform, _IMPLEMENTATIONS.value, is_timed=True)
      oracle = _ORACLE.value or selection.oracle(kernel, platform)
      try:
        yield bench.measure(kernel, name, shape, names, _ROUNDS.value, oracle)
      except Exception as error:
        row = {"kernel": kernel, "shape": name, "implementation": ", ".join(names)}
        yield [row | {"error": bench.reason(error)}]


def _check_flags() -> None:
  for flag, names, known in (
    ("kernels", _KERNELS.value, list(cases.OPERATIONS)),
    ("shapes", _NAMES.value, list(_SHAPES)),
    ("tune's implementations", _TUNE.value and _IMPLEMENTATIONS.value, list(grouped_matmul.TILES)),
  ):
    if unknown := [name for name in names or [] if name not in known]:
      raise app.UsageError(f"--{flag} must be among {', '.join(known)}, got {', '.join(unknown)}")
  if _COMPILE_ONLY.value and _TUNE.value:
    raise app.UsageError("--tune times kernels on a device, which --compile-only never uses")
  if not _COMPILE_ONLY.value and bool(_NAMES.value) == bool(_CONFIG.value):
    raise app.UsageError(
      "give one of --config and --shapes, whose sizes are timed, or --compile-only"
    )
  if flags.FLAGS["tokens"].present and not _CONFIG.value:
    raise app.UsageError("--tokens goes with --config; --shapes have their own numbers of tokens")
  for kernel in _KERNELS.value or [_DEFAULT_KERNEL]:
    ways = cases.IMPLEMENTATIONS[kernel]
    if _ORACLE.value is not None and _ORACLE.value not in ways:
      raise app.UsageError(
        f"--oracle must be an implementation of {kernel} ({', '.join(ways)}), got {_ORACLE.value}"
      )
  if _TUNE.value and flags.FLAGS["oracle"].present:
    raise app.UsageError("--tune checks against the reference, so --oracle must not be given")
  try:
    missing = compile_only.missing_compiler(_TOPOLOGY.value)
  except ValueError as error:
    raise app.UsageError(f"--topology: {error}") from None
  if missing and _COMPILE_ONLY.value:
    raise app.UsageError(missing)


def main(argv: list[str]) -> None:
  output.refuse_arguments(argv)
  _check_flags()
  if not _COMPILE_ONLY.value:
    runtime.start()
  rows = []
  for more in [compiled()] if _COMPILE_ONLY.value else timed():
    rows += more
    output.write_json_so_far(_JSON.value, rows)
  output.write_json(_JSON.value, rows)
  if _JSON.value != output.STDOUT:
    print_rows(rows)
  if rows and all("error" in row for row in rows):
    output.fail("nothing could be compiled or measured", 1)


def print_rows(rows: list[dict]) -> None:
  """Prints the table, and a line for each row that has an error."""
  # A wide console: a narrow terminal wraps the table, a file holds it whole, nothing is cut.
  rich.console.Console(width=1000).print(bench.table(rows))
  for row in rows:
    if "error" in row:
      names = (row.get(key, "") for key in ("kernel", "implementation", "direction", "shape"))
      print(" ".join(filter(None, names)) + f": {row['error']}")


if __name__ == "__main__":
  output.run_script(main)
