"""Compiling without a device: chips, processes, and what is read from a program's dump."""

import dataclasses
import math
import os
import subprocess
import sys
import time

import numpy as np
import pytest

from dsmoe.compilers import compile_only
from dsmoe.planning import chips
from tests import runs
from tests.compilers.test_bundles import CODE, DYNAMIC, TABLE

# A Pallas kernel that declares 1,000 bytes, beside one fusion.
MODULE = """HloModule made_up, is_scheduled=true

%double (p0: f32[1024,128]) -> f32[1024,128] {
  %p0 = f32[1024,128]{1,0:T(8,128)} parameter(0)
  ROOT %sum = f32[1024,128]{1,0:T(8,128)} add(%p0, %p0)
}

ENTRY %main (a: f32[1024,128]) -> f32[1024,128] {
  %a = f32[1024,128]{1,0:T(8,128)} parameter(0)
  %add_fusion = f32[1024,128]{1,0:T(8,128)} fusion(%a), kind=kLoop, calls=%double, backend_config={"window_config":{"estimated_cycles":"70"},"used_scoped_memory_configs":[{"memory_space":"1","offset":"0","size":"4096"}]}
  ROOT %ours.1 = f32[1024,128]{1,0:T(8,128)} custom-call(%add_fusion), custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{"body":"AA","cost_estimate":{"flops":"COUNT","transcendentals":"0","bytes_accessed":"1000"}},"used_scoped_memory_configs":[{"memory_space":"1","offset":"0","size":"12288"}]}
}
"""


def made_up_chip():
  """Two cycles a second, 4,096 bytes a second."""
  v5p = chips.CHIPS["v5p"]
  return dataclasses.replace(v5p, hbm_bytes_per_sec=4096.0, clock_hz=2.0, mxu_size=128)


def test_unknown_chips_are_refused():
  assert compile_only.chip_of("v6e:2x2x1").name == "v6e"
  with pytest.raises(ValueError, match="among v5p, v6e, tpu7x, h100, got 'v9:2x2x1'"):
    compile_only.chip_of("v9:2x2x1")


@pytest.mark.tpu
def test_libtpu_reports_no_errors_and_no_cluster_is_named_afterwards():
  if missing := compile_only.missing_compiler("v5p:2x2x1"):
    pytest.skip(missing)
  program = """
import os
from dsmoe.compilers import compile_only
print(len(compile_only.tpu_devices("v5p:2x2x1")), "TPU_WORKER_HOSTNAMES" in os.environ)
"""
  environment = {name: value for name, value in os.environ.items() if not name.startswith("TPU_")}
  done = subprocess.run(
    [sys.executable, "-c", program],
    cwd=runs.ROOT,
    env=environment,
    capture_output=True,
    text=True,
    check=True,
  )
  assert done.stdout == "4 False\n"
  assert "INVALID_ARGUMENT" not in done.stderr


def test_a_fresh_process():
  assert compile_only.in_fresh_process(os.getpid) != os.getpid()
  with pytest.raises(ValueError, match=r"math domain error|nonnegative"):
    compile_only.in_fresh_process(math.sqrt, -1.0)
  with pytest.raises(RuntimeError, match="the compiling process died"):
    compile_only.in_fresh_process(os._exit, 3, limit_secs=60)
  with pytest.raises(TimeoutError, match="given up after 1 s"):
    compile_only.in_fresh_process(time.sleep, 60, limit_secs=1)


def _dump(folder, name, code):
  (folder / f"17-{name}-02-final_bundles.txt").write_text(code)
  (folder / f"17-{name}-01-schedule-analysis_final_bundles.txt").write_text("")
  (folder / f"17-{name}-00-final_hlo-static-per-bundle-utilization.txt").write_text(TABLE)


def test_figures_of_a_program(tmp_path):
  _dump(tmp_path, "ours.1", CODE)
  _dump(tmp_path, "another_fusion", CODE)  # the same code as add_fusion, dumped once
  (tmp_path / "17-TLP-03-deduplication-map.txt").write_text(
    "key:another_fusion\nordinal:1\nequivalent_hlos[size=2]:\n  another_fusion\n  add_fusion\n"
  )
  chip = made_up_chip()
  found = compile_only.read_figures(MODULE.replace("COUNT", "77"), tmp_path, chip)
  array = 1024 * 128 * 4
  dma = 6 * 2048 * 32 + 512 * 32  # in at each of six steps; out at the first, when s3 < 1
  assert found == {
    "bytes": 2 * array + dma,
    "declared_bytes": 1000,
    "declared_flops": 77,
    "dma_bytes": dma,
    "mxu_flops": 2 * 96 * 40 * 128**2,
    "vmem_bytes": 12288,
    "estimated_cycles": 70,
    # The fusion's code is 3 + 6 * 12 + 96 * 7 bundles at most. Of the kernel's, one is skipped at
    # five of six steps.
    "schedule_cycles": max(747, 2 * array // 4096 * 2) + 747,  # 3 + 6 * 12 + 96 * 7 bundles each
    "bundles": 22,
    "mxu_occupancy": pytest.approx(35 / 88),
    "steady_mxu_occupancy": pytest.approx(25 / 28),
    "spill_share": pytest.approx(2 / 22),
    "fill_share": pytest.approx(3 / 22),
  }


def test_a_grid_that_is_data(tmp_path):
  """Nothing is said without its size; with it, what the code does."""
  _dump(tmp_path, "ours.1", DYNAMIC)
  chip = made_up_chip()
  text = MODULE.replace("COUNT", "77")
  found = compile_only.read_figures(text, tmp_path, chip)
  assert found["dma_bytes"] is None and found["mxu_flops"] is None
  assert found["bytes"] == 2 * 1024 * 128 * 4 + 1000
  sizes = {"ours": [{1: np.array([4])}]}
  found = compile_only.read_figures(text, tmp_path, chip, sizes)
  assert found["mxu_flops"] == 2 * 4 * 16 * 40 * 128**2
  assert found["dma_bytes"] == 4 * 2048 * 32 + 512 * 32
