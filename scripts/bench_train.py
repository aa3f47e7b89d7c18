"""Measures a config's training step: tokens/s, compile seconds, peak memory, GFLOP/s, MFU.

  python scripts/bench_train.py --config=experiments/bench_small.py --steps=10 --json=-
  python scripts/bench_train.py --config=experiments/deepseek_v3.py --topology=v5p:8x8x8 --config.batch_size=512

A measured step is a whole one: the next batch is read while it runs, and its metrics are fetched.
Validation data is not read; with --synthetic no training data is read either. With --topology
nothing runs: the step is compiled for chips that are not attached, and its memory and the bytes
between devices are read from the compiled program.
"""

import dataclasses
import resource
import statistics
import sys
import tempfile
import time
from typing import Any

import jax
import rich
import rich.console
from absl import flags
from ml_collections import config_flags

from dsmoe import config as config_lib
from dsmoe import platforms, runtime
from dsmoe.compilers import compile_only
from dsmoe.config import Config
from dsmoe.data import batches as data
from dsmoe.data import records
from dsmoe.parallel import mesh as mesh_lib
from dsmoe.planning import accounting, compiled_step
from dsmoe.platforms import cpu
from dsmoe.reporting import output, progress
from dsmoe.training import hyperparameters, train_step

_WARMUP_STEPS = 2  # made after compiling, and not measured

_CONFIG = config_flags.DEFINE_config_file("config", None, "An experiment, experiments/<name>.py.")
_STEPS = flags.DEFINE_integer("steps", 10, "Steps to measure.", lower_bound=1)
_SYNTHETIC = flags.DEFINE_bool(
  "synthetic", False, "Train on random tokens instead of the config's data."
)
_TOPOLOGY = flags.DEFINE_string(
  "topology",
  None,
  "Compile the step for chips that are not attached instead: v5p:8x8x8, v6e:4x4 or h100, say.",
)
_JSON = output.define_json()


def peak_rss_mib() -> float:
  """Returns the largest amount of memory that this process has held."""
  unit_bytes = 1 if sys.platform == "darwin" else 1024
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit_bytes / 2**20


def peak_device_mib() -> float | None:
  """Returns the peak memory of the device with the highest, or None where it is not counted."""
  stats = [device.memory_stats() or {} for device in jax.local_devices()]
  peaks = [s["peak_bytes_in_use"] / 2**20 for s in stats if "peak_bytes_in_use" in s]
  return max(peaks, default=None)


def measure(config: Config, steps: int, folder: str) -> dict[str, Any]:
  """Compiles the step and runs it; returns the figures by name."""
  mesh = train_step.make_mesh(config)
  directory = config.data.cache_dir or folder
  prepared = records.prepare(config.data, config.model.vocab_size, directory)
  processes = (jax.process_index(), jax.process_count())
  batches = data.train_iterator(prepared, config.data, config.batch_size, *processes)
  state = train_step.init_state(config, mesh)
  batch = mesh_lib.to_global(next(batches), mesh)
  start = time.perf_counter()
  hyper = hyperparameters.of(config)
  step_fn = train_step.make_train_step(config, mesh).lower(state, batch, hyper).compile()
  compile_secs = time.perf_counter() - start
  cpu.release_memory()

  tokens = config.batch_size * config.data.sequence_length
  secs = []
  console = rich.console.Console(stderr=True)  # stdout is for the results
  with progress.Progress(_WARMUP_STEPS + steps, console=console) as bar:
    for step in range(1, _WARMUP_STEPS + steps + 1):
      start = time.perf_counter()
      state, metrics = step_fn(state, batch, hyper)
      batch = mesh_lib.to_global(next(batches), mesh)
      metrics = jax.device_get(metrics)
      secs.append(time.perf_counter() - start)
      loss = float(metrics["losses"].total)
      bar.update(step, dict(loss=loss, tokens_per_sec=tokens / secs[-1], step_secs=secs[-1]))
  median_secs = statistics.median(secs[_WARMUP_STEPS:])
  flops = accounting.flops_per_token(config.model, config.data.sequence_length)["causal_mtp"]
  flops_per_sec = flops * tokens / median_secs
  peak = accounting.peak_flops(jax.devices()[0])
  return {
    "tokens_per_sec": tokens / median_secs,
    "median_step_secs": median_secs,
    "compile_secs": compile_secs,
    "peak_rss_mib": peak_rss_mib(),
    "peak_device_mib": peak_device_mib(),
    "gflops_per_sec": flops_per_sec / 1e9,
    "mfu": peak and flops_per_sec / (peak * mesh.size),
    "loss": loss,
    "num_parameters": accounting.parameters(config.model)["total"],
    "devices": f"{mesh.size} x {jax.devices()[0].device_kind}",
    "jax": jax.__version__,
  }


def plan(config: Config, topology: str) -> dict[str, Any]:
  """Compiles the step for a topology; returns the figures by name, and shows that it works."""
  if missing := compile_only.missing_compiler(topology):
    raise ValueError(missing)
  jax.config.update("jax_platforms", "cpu")  # of this process; the topology's chips are elsewhere
  console = rich.console.Console(stderr=True)
  with console.status(f"compiling the step for {topology}, minutes for a large model"):
    return compiled_step.figures(config, topology)


def table_of(found: dict[str, Any]) -> list[tuple[str, str]]:
  """Returns what `plan` found as rows of a table, of each device unless they say otherwise."""
  memory, hbm = found["memory_bytes"], found["hbm_bytes"]
  fits = (
    "" if hbm is None else f" of {hbm / 2**30:.1f}, " + ("fits" if memory < hbm else "too much")
  )
  mesh = ", ".join(f"{axis} {size}" for axis, size in found["mesh"].items() if size > 1)
  rows = [
    ("topology", f"{found['topology']} ({found['stamp']})"),
    ("mesh", mesh or "one device"),
    ("tokens a device and step", f"{found['tokens_per_device']:,}"),
    ("memory, GiB", f"{memory / 2**30:.1f}{fits}"),
  ]
  rows += [(f"  {name}", f"{n / 2**30:.2f}") for name, n in found["buffer_bytes"].items()]
  at_most = ", at most" * found["upper_limit"]
  for axis, sent in found["axis_bytes"].items():
    if axis != "all":
      secs = found["link_secs"].get(axis)
      time_of = "" if secs is None else f", {secs:.3g} s at the links' peak"
      rows.append((f"sent along {axis}{at_most}", f"{sent['sent_bytes'] / 1e6:,.1f} MB{time_of}"))
  compute = f"{found['model_flops']:.3e}, {found['compute_secs']:.3g} s at the chip's peak"
  rows.append(("FLOPs the model needs", compute))
  rows.append(("tokens/s of all devices, at most", f"{found['tokens_per_sec_bound']:,.0f}"))
  return rows


def main(argv: list[str]) -> None:
  output.refuse_arguments(argv)
  config = config_lib.from_config_dict(_CONFIG.value)
  if _TOPOLOGY.value is not None:
    found = plan(config, _TOPOLOGY.value)
    output.write_json(_JSON.value, found)
    if _JSON.value != output.STDOUT:
      rich.print(progress.final_table(table_of(found)))
    return
  runtime.start()
  platforms.check_kernels(config.model.kernels)
  values: dict[str, Any] = {"validation_globs": ()}
  if _SYNTHETIC.value:
    values |= {"train_globs": ("synthetic",), "train_weights": (1.0,), "cache_dir": ""}
  config = dataclasses.replace(config, data=dataclasses.replace(config.data, **values))
  with tempfile.TemporaryDirectory() as folder:
    result = measure(config, _STEPS.value, folder)
  output.write_json(_JSON.value, result)
  if _JSON.value == output.STDOUT:
    return
  rows = []
  for name, value in result.items():
    text = f"{value:,.4g}" if isinstance(value, float) else str(value)
    rows.append((name.replace("_", " "), "not known" if value is None else text))
  rich.print(progress.final_table(rows))


if __name__ == "__main__":
  flags.mark_flag_as_required("config")
  output.run_script(main)
