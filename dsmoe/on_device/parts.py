"""What a session measures, part by part: the commands, at the sizes of a GPU and at tiny ones.

A part adds its rows as it gets them; what it has added counts although it fails afterwards.
"""

import collections
import dataclasses
import json
import pathlib
import re
import xml.etree.ElementTree
from collections.abc import Callable
from typing import Any

from dsmoe.on_device import serving, training
from dsmoe.on_device.processes import Failed, Runner

Rows = list[dict[str, Any]]

# A few layers of DeepSeek-V2-Lite on one device: what a training step and decoding are measured on.
_LAYERS, _BATCH, _SEQUENCE = 4, 16, 2048
_V2_LITE = (
  "--config=experiments/deepseek_v2_lite.py",
  f"--config.model.num_hidden_layers={_LAYERS}",
  "--config.mesh.expert=1",
)
_MODEL: dict[str, Any] = {"model": "deepseek_v2_lite", "layers": _LAYERS}
_TINY = (
  *("--config=experiments/deepseek_v2_lite.py", "--config.mesh.expert=1"),
  *training.sizes(training.TINY),
)

# All that `bench_kernels` has, with the gradients where there are some; `routed_swiglu` is timed with
# `grouped_swiglu`, as its `local dispatch`.
KERNELS = (
  *("routing", "permute", "combine", "grouped_matmul", "grouped_swiglu", "attention"),
  *("decode_attention", "quantized_matmul", "quantized_routed_swiglu"),
)


@dataclasses.dataclass(frozen=True)
class Part:
  """Something that is measured by itself.

  Attributes:
    name: of the part, in every row.
    limit_secs: its time. Of parts that run one after the other, one gets the time that those before
      it have left over too.
    measure: adds rows; the last argument says whether the sizes are tiny, for a CPU.
    env: variables of its processes on a GPU.
  """

  name: str
  limit_secs: float
  measure: Callable[[Runner, Rows, bool], None]
  env: dict[str, str] = dataclasses.field(default_factory=dict)


def values(runner: Runner, rows: Rows, is_dry_run: bool) -> None:
  """Runs the tests of what the GPU kernels compute on the device; one of them on a CPU."""
  report = runner.folder / "values.xml"
  args = ["-m", "pytest", "tests/pallas_kernels", f"--junitxml={report}", "-p", "no:cacheprovider"]
  args.append("-vv")  # a line for each test, which stays where the time is up before the report
  if is_dry_run:
    args[2] += "/test_gpu.py"
    args += ["-n", "0", "-k", "whole_lanes"]
  else:
    args += ["-n", "8", "--dist", "worksteal", "-m", "hopper and not gpu"]
  tests = runner.start(*args)
  try:
    runner.finish(tests)
  finally:
    rows.append(_counted(report) if report.exists() else counted_so_far(runner.text(tests)))


def _counted(report: pathlib.Path) -> dict[str, Any]:
  """Returns how many tests passed, were skipped and failed, and the names of those that failed."""
  cases = list(xml.etree.ElementTree.parse(report).iter("testcase"))
  failed = [
    c.get("name") for c in cases if c.find("failure") is not None or c.find("error") is not None
  ]
  skipped = sum(case.find("skipped") is not None for case in cases)
  passed = len(cases) - len(failed) - skipped
  return {"passed": passed, "skipped": skipped, "failed": len(failed), "failures": failed}


def counted_so_far(text: str) -> dict[str, Any]:
  """Returns the same of what pytest has printed before it was cut off."""
  found = re.findall(r"^\[gw\d+\] \[ *\d+%\] (\w+) (.+?) *$", text, re.MULTILINE)
  counts = collections.Counter(outcome for outcome, _ in found)
  failures = [name for outcome, name in found if outcome in ("FAILED", "ERROR")]
  row = {"passed": counts["PASSED"], "skipped": counts["SKIPPED"], "failed": len(failures)}
  return row | {"failures": failures, "is_cut_off": True}


def kernels(shape: str) -> Callable[[Runner, Rows, bool], None]:
  """Returns what times every kernel at the sizes of a model, beside its baselines."""

  def measure(runner: Runner, rows: Rows, is_dry_run: bool) -> None:
    args = [f"--shapes={shape}", f"--kernels={','.join(KERNELS)}", "--rounds=10"]
    if is_dry_run:
      few = {"v3": "routing,grouped_matmul", "v2_lite": "decode_attention"}[shape]
      args = ["--shapes=tiny", f"--kernels={few}", "--rounds=1"]
    _of_json(runner, rows, lambda found: found, "scripts/bench_kernels.py", *args)

  return measure


def step(precision: str, compiles: bool = False) -> Callable[[Runner, Rows, bool], None]:
  """Returns what measures a training step of DeepSeek-V2-Lite's sizes in a precision of its matmuls.

  Args:
    precision: `config.model.matmul_precision`.
    compiles: whether it only compiles the step, for the session's compilation cache.
  """

  def measure(runner: Runner, rows: Rows, is_dry_run: bool) -> None:
    args = [*_V2_LITE, f"--config.batch_size={_BATCH}", f"--steps={1 if compiles else 10}"]
    args.append(f"--config.data.sequence_length={_SEQUENCE}")
    if is_dry_run:
      args = [*_TINY, "--config.batch_size=2", "--config.data.sequence_length=16", "--steps=1"]
    args += ["--synthetic", f"--config.model.matmul_precision={precision}"]
    label: dict[str, Any] = {"kernels": "compiled", "precision": precision}
    if not is_dry_run:
      label |= _MODEL | {"rows": _BATCH, "tokens": _SEQUENCE}

    def rows_of(found: dict[str, Any]) -> Rows:
      if compiles:
        return [label | {"compile_secs": found["compile_secs"]}]
      return [label | found]

    _of_json(runner, rows, rows_of, "scripts/bench_train.py", *args)

  return measure


def decode(runner: Runner, rows: Rows, is_dry_run: bool) -> None:
  """Times decoding with a full cache, at several numbers of rows."""
  args = [*_V2_LITE, "--batches=1,8,64,256", "--cache_tokens=4096", "--repeats=20"]
  if is_dry_run:
    args = [*_TINY, "--batches=2", "--cache_tokens=24", "--repeats=1"]
    args.append("--config.data.sequence_length=16")
  label = {} if is_dry_run else _MODEL

  def labelled(found: dict[str, Any]) -> Rows:
    shared = label | {"read_bytes_per_sec": found["read_bytes_per_sec"]}
    return [shared | row for row in found["runs"]]

  _of_json(runner, rows, labelled, "scripts/bench_decode.py", *args)


def _of_json(runner: Runner, rows: Rows, rows_of: Callable[[Any], Rows], *args: str) -> None:
  """Runs a benchmark and adds the rows of its JSON, also when it ends early."""
  path = runner.folder / f"{pathlib.Path(args[0]).stem}.json"
  path.unlink(missing_ok=True)
  try:
    runner.run(*args, f"--json={path}")
  finally:
    if path.exists():
      rows += rows_of(json.loads(path.read_text()))
  if errors := [row["error"] for row in rows if "error" in row]:
    raise Failed(f"{len(errors)} of {len(rows)} rows have an error, the first one: {errors[0]}")


# A platform that is named must start: nothing may run on the CPU with the name of the GPU.
_ON_GPU = {"JAX_PLATFORMS": "cuda,cpu", "XLA_FLAGS": ""}
_SHARED = _ON_GPU | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # several processes share the device
_ALONE = _ON_GPU | {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.9"}
_TESTS = _SHARED | {"DSMOE_TEST_PLATFORM": "cuda"}

# Stages follow one another. The lanes of a stage run beside each other, the parts of a lane one after
# the other. Only what is not compared shares the device: all of it compiles for most of its time.
STAGES: tuple[tuple[tuple[Part, ...], ...], ...] = (
  (
    (Part("values", 170, values, _TESTS),),
    (
      Part("train", 115, training.measure, _SHARED),
      Part("serve", 55, serving.measure, _SHARED),
    ),
    (Part("compile_fp8", 170, step("fp8", compiles=True), _SHARED),),
  ),
  (
    (
      Part("kernels_v3", 110, kernels("v3"), _ALONE),
      Part("step_bfloat16", 55, step("compute_dtype"), _ALONE),
      Part("step_fp8", 50, step("fp8"), _ALONE),
      Part("decode", 50, decode, _ALONE),
      Part("kernels_v2_lite", 45, kernels("v2_lite"), _ALONE),
    ),
  ),
)
NAMES = tuple(part.name for stage in STAGES for lane in stage for part in lane)


def longest_secs() -> float:
  """Returns the time that a session takes at most, of all parts."""
  return sum(max(sum(part.limit_secs for part in lane) for lane in stage) for stage in STAGES)
