"""Measures one MoE layer of an experiment on a mesh, with each exchange of expert parallelism.

  python scripts/bench_expert_parallel.py --config=experiments/tiny.py --mesh=expert:8 --fake_devices=8
  python scripts/bench_expert_parallel.py --config=experiments/deepseek_v3.py --mesh=expert:64 --topology=v5p:4x4x4
  python scripts/bench_expert_parallel.py --config=experiments/tiny.py --what_if --chip=v5p --routing=trace:FILE

The first runs the layer on the attached devices (on CPU, on fake ones). Each back end is checked
against the dense oracle before, values and every gradient; a wrong one is reported and not timed,
and the command then ends with exit code 1, as it does where one cannot be run or compiled.
The parts of its time are read from a profile, by the scopes that its operations were made in. The
second compiles it for chips that are not attached (v5p, v6e, tpu7x: needs the tpu extra; h100, two
hosts of eight: the cuda13 extra) and reads bytes by mesh axis, buffers and FLOPs from the compiled
program. The third runs and compiles nothing: from a trace that training recorded with
--config.log.routing_trace_steps it computes what every back end, expert degree and number of copied
experts would send, drop and need.

What an exchange costs is seen beside the same layer without one: with --single_device, which needs
--fake_devices and as many cores, a process pinned to a core of its own runs the whole layer on the
tokens of one device. `of one device` is the share of its rate that each device of the mesh keeps,
`of devices at once` the same beside a process on each core at the same time. For two devices:

  python scripts/bench_expert_parallel.py --config=experiments/bench_small.py --mesh=expert:2 --fake_devices=2 --back_ends=all_to_all --single_device --rounds=30

Options of an exchange are set with its dispatch, as --config.model.dispatch=all_to_all
--config.model.exchange.receive_capacity=1.5; every back end takes those that it reads.

Bytes a token are of x, one way: `wire` leaves its device, `least` is a row for each other device
that owns one of the token's experts, `logical` counts the device itself too, where it owns one. A
link's peak is that of one direction: half of what is published for both together. Of a compiled
program, `peak` is the memory in use at once, arguments and results included, and `temp` is what the
compiler sets aside for temporary buffers: more than they need at once, where the chip has room.
"""

import functools
import json

import jax
import rich.console
import rich.progress
from absl import app, flags
from etils import epath
from ml_collections import config_flags

from dsmoe import config as config_lib
from dsmoe import runtime
from dsmoe.compilers import compile_only
from dsmoe.config import Config, ExchangeConfig, MeshConfig
from dsmoe.expert_parallel_bench import compiled, executed, routings, show, single
from dsmoe.parallel import dispatch
from dsmoe.parallel import mesh as mesh_lib
from dsmoe.planning import chips, exchanges
from dsmoe.planning import what_if as what_if_lib
from dsmoe.reporting import output, routing_trace
from dsmoe.training import exchange_layer

_CONFIG = config_flags.DEFINE_config_file("config", None, "Experiment whose layer is measured.")
_MESH = flags.DEFINE_list(
  "mesh", [], "Sizes of mesh axes, as data:2,expert:4; by default config.mesh."
)
_ROUTING = flags.DEFINE_list(
  "routing", ["balanced"], "Of balanced, zipf:A, trace:FILE; what tokens choose. Not compiled."
)
_TRACE_LAYER = flags.DEFINE_integer(
  "trace_layer", 0, "MoE layer of a trace that is timed.", lower_bound=0
)
_BACK_ENDS = flags.DEFINE_list("back_ends", [], "Exchanges to measure, by default all but dense.")
_TOKENS = flags.DEFINE_integer("tokens", 4096, "Tokens of each device.", lower_bound=1)
_ROUNDS = flags.DEFINE_integer("rounds", 10, "How often each program is timed.", lower_bound=1)
_CHECK_TOKENS = flags.DEFINE_integer(
  "check_tokens", 256, "Tokens of each device that the oracle computes, at most.", lower_bound=1
)
_FAKE_DEVICES = flags.DEFINE_integer(
  "fake_devices", 0, "Devices that the CPU shows as.", lower_bound=0
)
_TOPOLOGY = flags.DEFINE_string(
  "topology", None, "Compile for v5p:4x4x4, v6e:..., tpu7x:..., h100."
)
_SINGLE = flags.DEFINE_bool(
  "single_device",
  False,
  "Time the layer without an exchange too, in a process for each core; needs --fake_devices.",
)
_LIMIT = flags.DEFINE_integer(
  "limit_secs", 600, "Time limit for compiling one back end, in seconds; 0: none.", lower_bound=0
)
_WHAT_IF = flags.DEFINE_bool("what_if", False, "Compute from --routing=trace:FILE; run nothing.")
_CHIP = flags.DEFINE_enum("chip", "v5p", sorted(chips.CHIPS), "Chip whose peaks bound a what-if.")
_DEGREES = flags.DEFINE_list("degrees", ["2", "4", "8"], "Expert degrees of a what-if.")
_DEVICES = flags.DEFINE_integer(
  "devices", 8, "Devices over which a what-if splits the batch.", lower_bound=1
)
_COPIES = flags.DEFINE_list("copies", ["0"], "Slots for copies of hot experts in a what-if.")
_PLOT = flags.DEFINE_string("plot", None, "PNG file for a picture of the rows.")
_COMPARE = flags.DEFINE_string("compare", None, "JSON file of --json; the other follows it.")
_JSON = output.define_json()


def mesh_config(config: Config) -> MeshConfig:
  """Returns the mesh that --mesh names, or the config's."""
  return mesh_lib.axes_of_flag(_MESH.value) if _MESH.value else config.mesh


def named_back_ends(known: list[str]) -> list[str]:
  """Returns the exchanges that --back_ends names, by default all but the oracle."""
  if unknown := [name for name in _BACK_ENDS.value if name not in known]:
    raise ValueError(f"--back_ends must be among {', '.join(known)}, got {', '.join(unknown)}")
  return _BACK_ENDS.value or [name for name in known if name != "dense"]


def back_ends(degree: int, options: ExchangeConfig) -> list[str]:
  """Returns the exchanges to measure: those asked for, or all that such a mesh can have."""
  names = named_back_ends(list(dispatch.BACK_ENDS))
  refusals = {name: exchanges.refused(name, degree, options) for name in names}
  for name in _BACK_ENDS.value:
    if refusals[name]:
      raise ValueError(refusals[name])
  return [name for name in names if not refusals[name]]


def numbers(name: str, values: list[str], least: int) -> list[int]:
  """Returns the numbers of a flag that is a list of them."""
  if not all(value.isdecimal() and int(value) >= least for value in values):
    raise ValueError(f"--{name} must be numbers from {least} on, got {','.join(values)}")
  return [int(value) for value in values]


def run(config: Config) -> list[dict]:
  """Times the layer on the attached devices."""
  cores = single.cores(_FAKE_DEVICES.value) if _SINGLE.value else []
  if _FAKE_DEVICES.value:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", _FAKE_DEVICES.value)
  runtime.start()
  mesh = mesh_lib.make_mesh(mesh_config(config))
  names = back_ends(mesh.shape["expert"], config.model.exchange)
  devices = exchange_layer.num_devices(mesh)
  drawn = {
    name: routings.of_name(name, devices, _TOKENS.value, config.model, _TRACE_LAYER.value)
    for name in _ROUTING.value
  }
  measure = functools.partial(
    executed.measure, config.model, mesh, names, drawn, _ROUNDS.value, _CHECK_TOKENS.value
  )
  if not cores:
    return measure()
  with single.started(cores) as singles:
    return measure(singles=singles)


def compile_layer(config: Config, topology: str) -> list[dict]:
  """Compiles the layer for a topology, each back end in a process of its own."""
  if missing := compile_only.missing_compiler(topology):
    raise ValueError(missing)
  jax.config.update("jax_platforms", "cpu")  # do not look for the device, which is absent
  mesh = mesh_config(config)
  names = back_ends(mesh.expert, config.model.exchange)
  rows, to = [], rich.console.Console(stderr=True)
  for name in rich.progress.track(names, f"compiling for {topology}", console=to):
    args = (topology, mesh, config.model, name, _TOKENS.value)
    rows += compile_only.in_fresh_process(compiled.rows, *args, limit_secs=_LIMIT.value)
  return rows


def what_if(config: Config) -> list[dict]:
  """Computes from a recorded trace what the exchanges would do."""
  kinds = [name.partition(":") for name in _ROUTING.value]
  if len(kinds) != 1 or kinds[0][0] != "trace":
    raise ValueError(f"--what_if needs --routing=trace:FILE, got {','.join(_ROUTING.value)}")
  jax.config.update("jax_platforms", "cpu")  # no device is needed
  trace = routing_trace.read(kinds[0][2])
  rows = what_if_lib.what_if(
    trace,
    config.model,
    _DEVICES.value,
    numbers("degrees", _DEGREES.value, 1),
    named_back_ends(list(exchanges.EXCHANGES)),
    chips.CHIPS[_CHIP.value],
    numbers("copies", _COPIES.value, 0),
  )
  stamp = f"computed from step {trace.step} of {kinds[0][2]} for {_CHIP.value}, not run"
  return [{"stamp": stamp} | row for row in rows]


def compare(argv: list[str]) -> None:
  """Prints the figures in which two files of rows differ."""
  if len(argv) != 2:
    raise app.UsageError("--compare takes two files: --compare A.json B.json")
  first, second = (json.loads(epath.Path(p).read_text()) for p in (_COMPARE.value, argv[1]))
  rich.console.Console(width=200).print(show.compared(first, second))


def main(argv: list[str]) -> None:
  if _COMPARE.value:
    return compare(argv)
  output.refuse_arguments(argv)
  if _CONFIG.value is None:
    raise app.UsageError("give --config, or --compare with two files")
  if _WHAT_IF.value and _TOPOLOGY.value:
    raise app.UsageError("--what_if compiles nothing, so --topology must not be given")
  if _SINGLE.value and (_WHAT_IF.value or _TOPOLOGY.value):
    raise app.UsageError(
      "--single_device times what runs, so it goes without --topology, --what_if"
    )
  config = config_lib.from_config_dict(_CONFIG.value)
  if _TOPOLOGY.value:
    rows = compile_layer(config, _TOPOLOGY.value)
  else:
    rows = what_if(config) if _WHAT_IF.value else run(config)
  output.write_json(_JSON.value, rows)
  if _PLOT.value:
    show.draw(rows, _PLOT.value)
  if _JSON.value != output.STDOUT:
    print_rows(rows)
  if failed := dict.fromkeys(row["back_end"] for row in rows if "error" in row):
    output.fail(f"wrong, or not run: {', '.join(failed)}", 1)


def print_rows(rows: list[dict]) -> None:
  """Prints the table, and a line for each row that has an error."""
  console = rich.console.Console(width=1000)
  for stamp in dict.fromkeys(row["stamp"] for row in rows if row.get("stamp")):
    console.print(stamp, markup=False)
  console.print(show.table(rows))
  for row in rows:
    if "error" in row:
      print(f"{row['back_end']} {row.get('routing', '')}: {row['error']}")


if __name__ == "__main__":
  output.run_script(main)
