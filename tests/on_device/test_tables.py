"""BENCHMARKS.md has the tables of the files in experiments/measurements/, and what a session leaves becomes one."""

import importlib.util
import json
import pathlib

import pytest

from dsmoe.on_device import record, tables

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
STAMP = {
  **{"date": "2027-01-02", "chip": "NVIDIA H200", "driver": "580.1", "jax": "0.11.2"},
  **{"jaxlib": "0.11.1", "commit": "abc", "dry_run": False},
}


def kernel(kernel, implementation, secs, direction="forward", shape="v3", **more):
  row = {"part": "kernels", "kernel": kernel, "implementation": implementation}
  return row | {"median_secs": secs, "direction": direction, "shape": shape} | more | STAMP


def lines(section: str) -> list[list[str]]:
  rows = [line[1:-1].split(" | ") for line in section.splitlines() if line.startswith("|")]
  return [[cell.strip() for cell in row] for row in rows]


def test_the_document_has_the_tables_of_the_measurements(tmp_path):
  name = ROOT / "scripts/device_tables.py"
  spec = importlib.util.spec_from_file_location("device_tables", name)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  text = (ROOT / "BENCHMARKS.md").read_text(encoding="utf-8")
  assert tables.replaced(text, module.sections(ROOT / "experiments" / "measurements")) == text


def test_kernels_stand_beside_their_baselines():
  rows = [
    kernel("attention", "mosaic_gpu", 0.0028349, gflops_per_sec=456_789.0),
    kernel("attention", "cudnn", 0.00283),
    kernel("attention", "mosaic_gpu", 0.0129, "forward + backward"),
    kernel("attention", "cudnn", None, "forward + backward", error="OOM"),
    kernel("grouped_swiglu", "mosaic_gpu", 0.0075),
    kernel("grouped_swiglu", "local dispatch", 0.0086),
    kernel("quantized_routed_swiglu", "mosaic_gpu", 0.0065),
    kernel("attention", "mosaic_gpu", 0.0003, shape="v2_lite"),
  ]
  found = lines(tables.section(rows))
  assert found[2:7] == [
    ["fused SwiGLU", "7.5", "", ""],
    ["permute, experts, combine", "8.6", "", ""],
    ["attention", "2.83", "457", "cuDNN, values padded to the width of keys: 2.83"],
    ["attention, with gradients", "12.9", "", ""],
    ["FP8 experts, with permute and combine", "6.5", "", "dsmoe in bfloat16: 8.6"],
  ]
  assert found[-1] == ["attention", "0.3", "", ""]


def test_steps_decoding_and_the_other_parts_have_tables():
  step = {"kernels": "compiled", "precision": "fp8", "rows": 16, "tokens": 2048, "mfu": 0.507}
  step |= {"tokens_per_sec": 150_123.4, "peak_device_mib": 65_536.0, "compile_secs": 40.25}
  decode = {"batch": 256, "cache_tokens": 4096, "decode_tokens_per_sec": 9000.4}
  decode |= {"step_secs": 0.0284, "decode_bound_tokens_per_sec": 18_000.8}
  train = {"steps": 200, "killed_at_step": 110, "resumed_from_step": 100, "first_loss": 8.5}
  train |= {"last_loss": 3.254, "largest_difference": 0.0}
  end = {"secs": 9.0, "num_rows": 1}
  rows = [
    {"part": "step_fp8"} | step,
    {"part": "decode"} | decode,
    {"part": "values", "passed": 50, "failed": 1, "skipped": 2},
    {"part": "train"} | train,
    {"part": "values", "ended": "pytest ended with 1: 1 failed"} | end,
    {"part": "decode", "ended": "well"} | end,
  ]
  section = tables.section([row | STAMP for row in rows])
  assert section.startswith(
    "### NVIDIA H200, 2027-01-02\n\njax: 0.11.2; driver: 580.1; commit: abc."
  )
  found = lines(section)
  assert ["compiled, FP8, 16 x 2,048", "150,123", "51%", "64", "40.2"] in found
  assert ["256", "4,096", "9,000", "28.4", "50%"] in found
  assert ["values", "50 tests passed, 1 failed, 2 skipped"] in found
  text = (
    "200 steps, killed at 110, resumed from 100; loss 8.50 to 3.25; losses of steps made twice "
  )
  assert ["train", text + "differ by at most 0"] in found
  assert ["values", "failed: pytest ended with 1: 1 failed"] in found
  assert not [row for row in found if row[0] == "decode"]


@pytest.mark.parametrize("changes", [{"dry_run": True}, {"date": "2027-01-03"}, {"driver": None}])
def test_rows_of_a_dry_run_or_of_two_sessions_make_no_table(changes):
  rows = [kernel("attention", "mosaic_gpu", 0.1), kernel("attention", "cudnn", 0.1) | changes]
  with pytest.raises(ValueError, match="the rows must be of one session on a GPU, got"):
    tables.section(rows)


def test_only_what_is_between_the_marks_is_replaced():
  text = f"a\n{tables.BEGIN}\nold \\1\n{tables.END}\nb\n"
  expected = f"a\n{tables.BEGIN}\n\none \\2\n\ntwo\n\n{tables.END}\nb\n"
  assert tables.replaced(text, ["one \\2", "two"]) == expected
  assert tables.replaced(expected, ["one \\2", "two"]) == expected
  for wrong in ("a", text + text, f"{tables.END}{tables.BEGIN}"):
    with pytest.raises(ValueError, match="the document must have one line '<!-- Written"):
      tables.replaced(wrong, [])


@pytest.mark.parametrize(
  "text, message",
  [
    ("[", "must be JSON"),
    ("{}", "must be a list of rows, got dict"),
    ('[{"part": "values"}]', "must have date, chip, driver, .*, row 0 has not"),
  ],
)
def test_a_file_that_is_none_is_refused(tmp_path, text, message):
  path = tmp_path / "a.json"
  path.write_text(text)
  with pytest.raises(ValueError, match=message):
    record.read(path)
  path.write_text(json.dumps([{"part": "values"} | STAMP]))
  assert record.read(path)[0]["jax"] == "0.11.2"
