"""The three ways to measure an exchange, as their commands are run."""

import json

import numpy as np
import pytest

from dsmoe.reporting import routing_trace
from tests import runs
from tests.scripts.test_scripts import failure

SCRIPT = "scripts/bench_expert_parallel.py"
SMALL = (
  "--config=experiments/tiny.py",
  "--config.model.hidden_size=32",
  "--config.model.moe_intermediate_size=16",
  "--config.model.n_group=1",
  "--config.model.topk_group=1",
)


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
  """Two layers of 16 rows of 8 tokens, each 4 of 16 experts."""
  rng = np.random.default_rng(0)
  expert_LMK = np.argsort(rng.random((2, 128, 16)), axis=2)[:, :, :4].astype(np.uint8)
  path = tmp_path_factory.mktemp("trace") / "step_3_process_0.npz"
  counts_LE = [np.bincount(e.ravel(), minlength=16) for e in expert_LMK]
  np.savez_compressed(
    path,
    expert_LMK=expert_LMK,
    place_M=np.arange(128),
    counts_LE=np.array(counts_LE, np.int32),
    **dict(step=3, num_rows=16, sequence_length=8, num_microbatches=1, num_processes=1),
  )
  assert routing_trace.read(path).step == 3
  return path


@pytest.mark.slow
def test_executed_with_a_drawn_and_a_recorded_routing(trace, tmp_path):
  """One of two exchanges cannot run: it is named after the table, and the exit code is 1."""
  files = (f"--json={tmp_path}/rows.json", f"--plot={tmp_path}/rows.png")
  flags = ("--mesh=data:2,expert:2", "--fake_devices=4", "--tokens=16", "--rounds=1")
  routing = f"--routing=zipf:1.2,trace:{trace}"
  exchange = ("--config.model.dispatch=all_to_all", "--config.model.exchange.moe_chunks=3")
  back_ends = "--back_ends=all_gather,all_to_all"
  code, out, err = runs.call(SCRIPT, *SMALL, *flags, *files, routing, *exchange, back_ends)
  assert code == 1 and err.strip().splitlines()[-1] == "error: wrong, or not run: all_to_all"
  table, _, errors = out.partition("all_to_all")
  assert "no claim about accelerators" in table and "all_gather" in table
  reason = "ValueError: model.exchange.moe_chunks (3) must divide the tokens of a device (16)"
  assert errors.splitlines()[0] == f" zipf:1.2: {reason}"
  rows = json.loads((tmp_path / "rows.json").read_text())
  failed = [row["back_end"] for row in rows if "error" in row]
  assert failed == ["all_to_all"] * 2
  rows = [row for row in rows if "error" not in row]
  assert len(rows) == 4
  assert {row["routing"] for row in rows} == {"zipf:1.2", f"trace:{trace}"}
  assert all(row["wire_bytes_per_token"] == 32 * 4 for row in rows)
  assert (tmp_path / "rows.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_what_if_and_comparison(trace, tmp_path):
  flags = (*SMALL, "--what_if", f"--routing=trace:{trace}", "--degrees=2,4")
  picture = f"--plot={tmp_path}/what_if.png"
  rows = json.loads(runs.run(SCRIPT, *flags, picture, "--json=-"))
  assert {row["expert_degree"] for row in rows} == {2, 4}
  gathered = [row for row in rows if row["back_end"] == "all_gather"]
  assert [row["wire_bytes_per_token"] for row in gathered] == [2 * 128, 2 * 3 * 128]
  assert all("not run" in row["stamp"] for row in rows)
  assert (tmp_path / "what_if.png").read_bytes().startswith(b"\x89PNG")
  (tmp_path / "a.json").write_text(json.dumps(rows))
  rows[0]["wire_bytes_per_token"] *= 2
  (tmp_path / "b.json").write_text(json.dumps(rows[:-1]))
  out = runs.run(SCRIPT, "--compare", f"{tmp_path}/a.json", f"{tmp_path}/b.json")
  assert "2.000" in out and "only in the first" in out


@pytest.mark.tpu
def test_compiled_for_a_tpu(tmp_path):
  pytest.importorskip("libtpu", reason="needs libtpu, the compiler of TPUs: pip install .[tpu]")
  flags = ("--mesh=data:2,expert:2", "--topology=v5p:2x2x1", "--tokens=256")
  sizes = ("--config=experiments/tiny.py", "--config.model.hidden_size=256")
  sizes += ("--config.model.compute_dtype=bfloat16",)
  picture = f"--plot={tmp_path}/rows.png"
  out = runs.run(SCRIPT, *sizes, *flags, picture, "--back_ends=all_gather", "--json=-")
  forward, both = json.loads(out)
  assert forward["stamp"] == "compiled for v5p, not run"
  assert forward["direction"] == "forward" and both["direction"] == "forward + backward"
  # A row to the one other device of the axis and a sum back; shared experts' weights beside them.
  rows = 256 * 256 * 2
  assert 2 * rows <= forward["axis_bytes"]["expert"]["sent_bytes"] < 3 * rows
  assert forward["axis_bytes"]["data"]["sent_bytes"] > 0
  for row in (forward, both):
    assert row["bound"] in ("compute", "HBM", "links")
    assert row["executed_over_useful"] == row["flops"] / row["useful_flops"] > 1
    assert row["buffer_bytes"]["temporary"] > 0
  # Buffers hold the rows of both devices, those of all but one of 16 experts filled up to a tile of
  # 128; beside them the shared expert, the router, and what its kernel declares for its choices.
  buffer = 2 * 256 * 4 + 15 * 128
  products = 2 * 256 * (3 * 96 * (buffer + 256) + 256 * 16)
  assert products < forward["flops"] < 1.01 * products


@pytest.mark.parametrize(
  "args, message",
  [
    ((), "give --config, or --compare with two files"),
    (("--mesh=experts:8",), "--mesh must name axes and sizes as data:2,expert:4, got 'experts:8'"),
    (("--back_ends=fast",), "--back_ends must be among"),
    (("--mesh=expert:2", "--fake_devices=2", "--back_ends=local"), "expert degree of 1, got 2"),
    (("--fake_devices=2", "--routing=even"), "routing must be balanced, zipf:A or trace:FILE"),
    (("--what_if",), "--what_if needs --routing=trace:FILE, got balanced"),
    (("--what_if", "--routing=trace:/nowhere"), "must exist, got /nowhere"),
    (("--what_if", "--topology=v5p:2x2x1"), "so --topology must not be given"),
    (("--compare=a.json",), "--compare takes two files"),
    (("--single_device",), "--single_device needs --fake_devices"),
    (("--single_device", "--fake_devices=9999"), "each device of the mesh (9999), got"),
    (("--single_device", "--what_if"), "goes without --topology, --what_if"),
  ],
)
def test_mistakes_end_in_one_sentence(args, message):
  last = failure(SCRIPT, *(SMALL if args else ()), *args)
  assert last.startswith("error: ") and message in last
