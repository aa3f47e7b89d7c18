"""The session for a GPU, as a dry run on a CPU, so that none is lost to a mistake."""

import json
import shutil

import pytest

from dsmoe.on_device import parts, record
from tests import runs


@pytest.mark.slow
def test_dry_run(tmp_path):
  """Every part runs, at tiny sizes, and leaves rows with their stamps."""
  code, out, _ = runs.finish(
    runs.start("scripts/on_device.py", "--dry_run", f"--out={tmp_path}/out")
  )
  log = (tmp_path / "out" / "log.txt").read_text()
  rows = record.read(tmp_path / "out" / "results.json")
  ends = {row["part"]: row["ended"] for row in rows if "ended" in row}
  assert ends == dict.fromkeys(parts.NAMES, "well"), log[-6000:]
  assert code == 0 and out == ""
  assert all(row["dry_run"] and row["chip"] == "cpu" and row["jax"] for row in rows)
  found = {name: [r for r in rows if r["part"] == name and "ended" not in r] for name in ends}
  assert found["values"][0]["passed"] == 1 and found["values"][0]["failures"] == []
  assert {row["kernel"] for row in found["kernels_v3"]} == {"routing", "grouped_matmul"}
  assert {row["kernel"] for row in found["kernels_v2_lite"]} == {"decode_attention"}
  assert (
    found["compile_fp8"][0]["compile_secs"] > 0 and "tokens_per_sec" not in found["compile_fp8"][0]
  )
  for name in ("step_bfloat16", "step_fp8"):
    assert found[name][0]["tokens_per_sec"] > 0
  [train] = found["train"]
  assert train["steps"] == 40 and 0 < train["resumed_from_step"] <= train["killed_at_step"] < 40
  assert train["largest_difference"] == 0
  assert found["serve"][0]["answered"] == found["serve"][0]["requests"] == 4
  assert [row["batch"] for row in found["decode"]] == [2]
  assert found["decode"][0]["cache_tokens"] == 24 and found["decode"][0]["step_secs"] > 0
  refused = runs.call("scripts/device_tables.py", f"--folder={tmp_path}/out")
  assert refused[0] == 2 and "got 1 sessions" in refused[2]


@pytest.mark.parametrize(
  "args, message",
  [
    (("--parts=decode,all",), "--parts must be among values, train, serve, compile_fp8,"),
    ((), "an NVIDIA GPU must be attached, or --dry_run given: nvidia-smi names none"),
    (("--dry_run", "more"), "only flags may be given"),
  ],
)
def test_mistakes_end_in_one_sentence(tmp_path, args, message):
  if not args and shutil.which("nvidia-smi"):
    pytest.skip("there may be a GPU")
  code, out, err = runs.call("scripts/on_device.py", f"--out={tmp_path}", *args)
  assert (code, out) == (2, "") and "Traceback" not in err
  [line] = err.splitlines()
  assert line.startswith("error: ") and message in line


def test_the_tables_are_written(tmp_path):
  for name, date in (("a.json", "2027-01-01"), ("b.json", "2027-01-02")):
    stamp = dict.fromkeys(record.STAMP, "x") | {"date": date, "dry_run": False}
    row = {"part": "values", "passed": 3, "failed": 0, "skipped": 0}
    (tmp_path / name).write_text(json.dumps([row | stamp]))
  document = tmp_path / "text.md"
  document.write_text(
    "<!-- Written by scripts/device_tables.py. --><!-- End of what scripts/device_tables.py wrote. -->"
  )
  runs.run("scripts/device_tables.py", f"--folder={tmp_path}", f"--document={document}")
  text = document.read_text()
  assert text.index("### x, 2027-01-02") < text.index("### x, 2027-01-01")
  assert text.count("3 tests passed, 0 failed, 0 skipped") == 2
