"""Compiles for accelerators that are not attached, and reads their compilers' output."""

import contextlib
import glob
import importlib.util
import multiprocessing
import os
import pathlib
import re
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache

from dsmoe.compilers import bundle_run, bundles, gpu_resources, hlo, scalar_operands
from dsmoe.planning import chips
from dsmoe.planning.chips import Chip
from pallas_kernels import platform

# The chips whose compilers run without a device.
COMPILED = ("v5p", "v6e", "tpu7x", "h100")
# What libtpu looks for while it is loaded, and reports as errors if it is absent. No topology depends
# on the values.
_LIBTPU_VARIABLES = {"TPU_ACCELERATOR_TYPE": "v5p-8", "TPU_WORKER_HOSTNAMES": "localhost"}
# GpuTargetConfigProto of an H100 SXM, which the compiler reads instead of asking a device.
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84942979072
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def chip_of(topology: str) -> Chip:
  """Returns the chip of a topology, "v5p:2x2x1" or "h100" say.

  Raises:
    ValueError: for a chip whose compiler does not run here.
  """
  name = topology.split(":")[0]
  if name not in COMPILED:
    raise ValueError(f"topology must be of a chip among {', '.join(COMPILED)}, got {topology!r}")
  return chips.CHIPS[name]


def missing_compiler(topology: str) -> str | None:
  """Returns a message if a topology's compiler is not installed, else None."""
  gpu = chip_of(topology).name == "h100"
  module, extra = ("jax_cuda13_plugin", "cuda13") if gpu else ("libtpu", "tpu")
  if importlib.util.find_spec(module):
    return None
  files = "constraints-cuda13.txt" if gpu else "constraints.txt"
  command = f'pip install --constraint {files} --editable ".[{extra}]"'
  return f"{topology} needs {module}, the compiler for it: {command}"


def tpu_devices(topology: str) -> list[jax.Device]:
  """Returns the compile-only devices of a TPU topology, "v5p:2x2x1" say; needs libtpu.

  Raises:
    RuntimeError: if libtpu is missing or does not know the topology.
  """
  # Read when libtpu is loaded: do not ask a metadata server, and allow several processes.
  os.environ["TPU_SKIP_MDS_QUERY"] = "1"
  os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "true"
  absent = _LIBTPU_VARIABLES.keys() - os.environ.keys()
  os.environ.update({name: _LIBTPU_VARIABLES[name] for name in absent})
  try:
    return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
  finally:
    for name in absent:  # they would tell dsmoe.runtime of a cluster
      del os.environ[name]


def h100_devices() -> list[jax.Device]:
  """Returns compile-only H100s, two hosts of eight; needs the CUDA plugin, but no driver."""
  os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
  topology = topologies.get_topology_desc(
    platform="cuda", topology_name="h100", topology="2x8x1", target_config=_H100
  )
  return list(topology.devices)


def compile_for(device: jax.Device, fn: Callable, *args) -> Any:
  """Compiles a function for one compile-only device.

  Args:
    device: of `tpu_devices` or `h100_devices`.
    fn: a function of arrays.
    *args: trees of `jax.ShapeDtypeStruct`, one for each argument.

  Returns:
    A `jax.stages.Compiled`.
  """
  mesh = jax.sharding.Mesh(np.array([device]), ("device",))
  whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  args = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=whole), args)
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # where GPU kernels look for the chip
    return compile_lowered(jax.jit(fn, out_shardings=whole).lower(*args))


@contextlib.contextmanager
def tracing_for(mesh: jax.sharding.Mesh) -> Iterator[None]:
  """Traces and lowers what is inside for a mesh of compile-only devices.

  What a config leaves to the chip is then chosen as on those devices, and kernels find them.
  """
  abstract = jax.sharding.use_abstract_mesh(mesh.abstract_mesh)  # where GPU kernels look
  with abstract, platform.tracing_for(mesh.devices.flat[0]):
    yield


def compile_lowered(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
  """Compiles a program lowered for compile-only devices, without the persistent cache.

  The cache can write such executables but cannot read them back.
  """
  cached = jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]
  jax.config.update("jax_enable_compilation_cache", False)
  compilation_cache.reset_cache()  # JAX asks the setting once
  try:
    return lowered.compile()
  finally:
    jax.config.update("jax_enable_compilation_cache", cached)
    compilation_cache.reset_cache()


def in_fresh_process(fn: Callable, *args, limit_secs: int = 0) -> Any:
  """Returns fn(*args), computed in a new process, as compilers read some flags only at start.

  Args:
    fn: a function of a module, which the process imports.
    *args: its arguments.
    limit_secs: time limit; 0: none.

  Raises:
    TimeoutError: if it takes longer.
    RuntimeError: if the process dies, with the last lines it printed.
    Exception: whatever fn raises.
  """
  with tempfile.NamedTemporaryFile(mode="r", errors="replace") as log:
    context = multiprocessing.get_context("spawn")
    with futures.ProcessPoolExecutor(1, context, _begin, (log.name, limit_secs)) as pool:
      start = time.monotonic()
      try:
        return pool.submit(fn, *args).result()
      except futures.process.BrokenProcessPool as error:
        if 0 < limit_secs <= time.monotonic() - start:
          raise TimeoutError(f"given up after {limit_secs} s") from error
        last = "\n".join(log.read().strip().splitlines()[-5:])
        raise RuntimeError(f"the compiling process died: {last}") from error


def _begin(path: str, limit_secs: int) -> None:
  """Redirects output to a file, and has the system end the process at the time limit.

  A signal handler in Python would not run while a compiler runs.
  """
  signal.alarm(limit_secs)
  _print_into(path)


def _print_into(path: str) -> None:
  """Redirects the output of this process and its libraries to a file."""
  file = os.open(path, os.O_WRONLY | os.O_APPEND)
  os.dup2(file, 1)
  os.dup2(file, 2)


@contextlib.contextmanager
def dumped(topology: str, fn: Callable, *args):
  """Compiles a function for a TPU; yields (its HLO, the folder of its kernels' code).

  Use it once in a process, before anything loads libtpu (`in_fresh_process`): libtpu reads its
  flags when it is loaded.
  """
  with tempfile.TemporaryDirectory() as folder:
    # Only the last of about 80 passes over each kernel is dumped, a fiftieth of the text.
    flags = {
      "xla_jf_dump_to": folder,
      "xla_jf_dump_llo_text": "true",
      "xla_jf_dump_llo_pass_label_regex": "final_.*|deduplication.*",
    }
    os.environ["LIBTPU_INIT_ARGS"] = " ".join(f"--{k}={v}" for k, v in flags.items())
    yield compile_for(tpu_devices(topology)[0], fn, *args).as_text(), pathlib.Path(folder)


def tpu_figures(topology: str, fn: Callable, *args) -> dict[str, Any]:
  """Compiles a function for a TPU, as `dumped` does, and returns its `read_figures`.

  Args:
    args: trees of `jax.ShapeDtypeStruct`, or of arrays that decide what kernels do.
  """
  scalars = scalar_operands.of_kernels(fn, *args)
  with dumped(topology, fn, *args) as (text, folder):
    return read_figures(text, folder, chip_of(topology), scalars)


def h100_figures(fn: Callable, *args) -> dict[str, Any]:
  """Compiles a function for an H100 and returns the costs of the compiled program.

  Call it in a new process (`in_fresh_process`): it reads what the compiler prints.

  Returns:
    `bytes`: to and from HBM, each operand and result of a kernel once. The worst value of its
    Mosaic GPU kernels, None if it has none: `registers` and `spill_bytes` per thread,
    `shared_bytes` per block, `blocks_per_sm`.
  """
  os.environ |= {"MOSAIC_GPU_DUMP_PTXAS": "1", "MOSAIC_GPU_DUMP_HOST_LLVM": "1"}
  with tempfile.NamedTemporaryFile(mode="r", errors="replace") as printed:
    _print_into(printed.name)
    compiled = compile_for(h100_devices()[0], fn, *args)
    found = list(gpu_resources.h100_resources(printed.read()).values())
  computations, entry = hlo.parse(compiled.as_text())
  moved = sum(
    times * hlo.hbm_bytes(instruction, computation, computations)
    for instruction, computation, times in hlo.executed(computations, entry)
  )
  return {
    "bytes": moved,
    "registers": max((k["registers"] for k in found), default=None),
    "spill_bytes": max(
      (k["spill_store_bytes"] + k["spill_load_bytes"] for k in found), default=None
    ),
    "shared_bytes": max((k["shared_bytes"] for k in found if "shared_bytes" in k), default=None),
    "blocks_per_sm": min((k["blocks_per_sm"] for k in found if "blocks_per_sm" in k), default=None),
  }


class Kernel(NamedTuple):
  """The code of a kernel or fusion."""

  code: list[str]  # bundles
  loops: list[bundles.Loop]
  use: bundles.Utilization

  def cycles(self) -> int:
    """Returns its bundles times the trips of their loops, with every branch taken."""
    return int(bundles.runs(self.code, self.loops).sum())

  def run(self, operands: dict, mxu_size: int) -> dict[str, int] | None:
    """Runs its code with the given scalar operands.

    Returns:
      cycles: the bundles that a core issues; dma_bytes: to and from HBM; mxu_flops. None if the
      code depends on more than the scalar operands, or is not understood by `bundle_run`.
    """
    cores = 2 if any("BarrierMegacore" in bundle for bundle in self.code) else 1
    try:
      runs = [bundle_run.run(self.code, operands, core) for core in range(cores)]
    except (ValueError, NotImplementedError):
      return None
    moved = [(way.count("hbm"), size) for r in runs for way, size in r.moved.items()]
    return {
      "cycles": max(int(r.visits_N.sum()) for r in runs),
      "dma_bytes": sum(times * size for times, size in moved),
      "mxu_flops": sum(2 * bundles.matmul_macs(self.code, r.visits_N, mxu_size) for r in runs),
    }


def read_kernels(folder: pathlib.Path) -> dict[str, Kernel]:
  """Returns the kernels of a dump by the name of their HLO instruction."""
  kernels = {}
  for path in sorted(folder.glob("*-final_bundles.txt")):
    match = re.match(r"(\d+-(.+))-\d+-final_bundles\.txt", path.name)
    if match is None or "schedule-analysis" in path.name:
      continue
    table = f"{glob.escape(match[1])}-*-final_hlo-static-per-bundle-utilization.txt"
    use = bundles.read_utilization(next(folder.glob(table)).read_text())
    code = bundles.read_bundles(path.read_text())
    kernels[match[2]] = Kernel(code, bundles.loops(code), use)
  for path in folder.glob("*-deduplication-map.txt"):
    for part in path.read_text().split("key:")[1:]:
      key, *lines = part.split()
      names = [line for line in lines if not line.startswith(("ordinal", "equivalent", "key"))]
      kernels |= {name: kernels[key] for name in names if key in kernels and name not in kernels}
  return kernels


def read_figures(
  text: str, folder: pathlib.Path, chip: Chip, scalars: dict[str, list[dict]] | None = None
) -> dict[str, Any]:
  """Computes the costs of a compiled program from its HLO and the dump of its kernels.

  Args:
    text: the HLO.
    folder: folder of the dump.
    chip: the chip it was compiled for.
    scalars: as `scalar_operands.of_kernels` returns them.

  Returns:
    bytes: to and from HBM. For a Pallas kernel, what its DMAs move, or its cost_estimate if that
      depends on more than the scalars.
    declared_bytes, declared_flops: sums of the cost_estimates of the Pallas kernels.
    dma_bytes, mxu_flops: what their code does; None if it depends on more than the scalars.
    vmem_bytes: the largest use of a kernel.
    estimated_cycles: sum of XLA's own estimates; sorts and Pallas kernels have none.
    schedule_cycles: summed over kernels, the larger of the bundles that a core issues and of the
      time that its bytes take at full bandwidth. XLA's kernels count with every branch taken, and
      loops that depend on more than the scalars count once.
    bundles, mxu_occupancy (share of the MXU slots that are filled), steady_mxu_occupancy (the same
      in the loop that does most of the work), spill_share and fill_share (slots per bundle that
      spill and refill registers): of the Pallas kernels, or of all kernels if there are none.
  """
  bandwidth, clock_hz, mxu_size = chip.hbm_bytes_per_sec, chip.clock_hz, chip.mxu_size
  assert bandwidth and clock_hz and mxu_size, f"the table must have all figures of {chip.name}"
  computations, entry = hlo.parse(text)
  kernels = read_kernels(folder)
  total = {"bytes": 0, "declared_bytes": 0, "declared_flops": 0, "estimated_cycles": 0}
  cycles, vmem = 0.0, [0]
  ours: list[str] = []
  done: list[dict[str, int] | None] = []
  found = {}
  for instruction, computation, times in hlo.executed(computations, entry):
    name, attributes = instruction.name, instruction.attributes
    size = hlo.hbm_bytes(instruction, computation, computations)
    kernel = kernels.get(name)
    busy = kernel.cycles() if kernel else 0
    if kernel is not None:
      found[name] = kernel
    if '"tpu_custom_call"' in attributes and kernel is not None:
      flops, declared = _cost_estimate(attributes)
      # A gradient's kernel is called transpose_jvp_NAME__.1; one without a name, like its function.
      own_name = max((n for n in scalars or {} if n in name), key=len, default="")
      calls = (scalars or {}).get(own_name, [{}])
      earlier = sum(re.sub(r"\.\d+$", "", other) == re.sub(r"\.\d+$", "", name) for other in ours)
      run = kernel.run(calls[min(earlier, len(calls) - 1)], mxu_size)
      size = run["dma_bytes"] if run else declared if declared is not None else size
      busy = run["cycles"] if run else busy
      total["declared_bytes"] += times * (declared or 0)
      total["declared_flops"] += times * (flops or 0)
      ours.append(name)
      done += [run] * times
    if own := re.search(r'"estimated_cycles":"(\d{1,15})"', attributes):  # more: not known
      total["estimated_cycles"] += times * int(own[1])
    if scoped := re.search(r'"used_scoped_memory_configs":\[([^\]]*)\]', attributes):
      vmem += map(int, re.findall(r'"memory_space":"1"[^}]*"size":"(\d+)"', scoped[1]))
    total["bytes"] += times * size
    cycles += times * max(busy, size / bandwidth * clock_hz)
  counted = [found[name] for name in ours] or list(found.values())
  steady = [s[1] for k in counted if (s := bundles.steady_state(k.code, k.loops, k.use))]
  length = max(sum(len(k.code) for k in counted), 1)
  known = [run for run in done if run is not None]
  whole = len(known) == len(done) > 0
  return total | {
    "dma_bytes": sum(run["dma_bytes"] for run in known) if whole else None,
    "mxu_flops": sum(run["mxu_flops"] for run in known) if whole else None,
    "vmem_bytes": max(vmem),
    "schedule_cycles": round(cycles),
    "bundles": sum(len(k.code) for k in counted),
    "mxu_occupancy": sum(len(k.code) * k.use.share("MXU") for k in counted) / length,
    "steady_mxu_occupancy": max(steady, default=None),
    "spill_share": sum(k.use.used("VSTORE:SPILL") for k in counted) / length,
    "fill_share": sum(k.use.used("VLOAD:FILL") for k in counted) / length,
  }


def _cost_estimate(attributes: str) -> tuple[int | None, int | None]:
  """Returns the FLOPs and bytes that a Pallas kernel declares, None if it does not."""
  estimate = re.search(r'"cost_estimate":\{([^}]*)\}', attributes)
  figures = dict(re.findall(r'"(\w+)":"(\d+)"', estimate[1])) if estimate else {}
  flops, moved = figures.get("flops"), figures.get("bytes_accessed")
  return flops and int(flops), moved and int(moved)
