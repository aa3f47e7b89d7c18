import json
import math

import numpy as np
import pytest
from etils import epath

from dsmoe.reporting import appended, metrics

COUNTS_LE = np.array([[4, 4, 4, 4], [16, 0, 0, 0], [10, 5, 1, 0], [35, 3, 1, 1]], np.int32)


def _oracle(counts):
  """One layer's statistics, in plain Python."""
  E, total = len(counts), sum(counts)
  mean = total / E
  variance = sum((c - mean) ** 2 for c in counts) / E
  shares = [c / total for c in counts if c]
  return {
    "max_vio": max(counts) / mean - 1,
    "load_cv": math.sqrt(variance) / mean,
    "load_entropy": -sum(p * math.log(p) for p in shares) / math.log(E),
    "dead_experts": sum(c == 0 for c in counts),
    "starved_experts": sum(c < 0.1 * mean for c in counts),
  }


def test_load_statistics_match_a_loop():
  got = metrics.load_statistics(COUNTS_LE)
  for l, counts in enumerate(COUNTS_LE.tolist()):
    expected = _oracle(counts)
    assert set(got) == set(expected)
    for name, value in expected.items():
      np.testing.assert_allclose(got[name][l], value, rtol=1e-12, atol=1e-15, err_msg=name)


def test_load_statistics_known_by_hand():
  got = metrics.load_statistics(COUNTS_LE)
  np.testing.assert_allclose(got["max_vio"], [0.0, 3.0, 1.5, 2.5])
  np.testing.assert_allclose(got["load_entropy"][:2], [1.0, 0.0], atol=1e-15)
  np.testing.assert_allclose(got["load_cv"][:2], [0.0, math.sqrt(3)])
  assert got["dead_experts"].tolist() == [0, 3, 1, 0]
  assert got["starved_experts"].tolist() == [0, 3, 1, 0]


def test_an_expert_at_a_tenth_of_the_mean_is_not_starved():
  got = metrics.load_statistics(np.array([[1, 19, 10], [1, 20, 10]]))
  assert got["starved_experts"].tolist() == [0, 1]


def test_counts_beyond_int32_do_not_overflow():
  counts_LE = np.array([[2**31 - 1, 2**31 - 1]], np.int32)
  assert metrics.load_statistics(counts_LE)["max_vio"].tolist() == [0.0]
  assert metrics.load_statistics(counts_LE)["starved_experts"].tolist() == [0]


def test_a_layer_without_tokens_has_no_ratios():
  got = metrics.load_statistics(np.array([[0, 0], [1, 1]]))
  for name in ("max_vio", "load_cv", "load_entropy"):
    assert np.isnan(got[name]).tolist() == [True, False], name
  assert got["dead_experts"].tolist() == [2, 0]


@pytest.mark.parametrize(
  ("counts", "message"),
  [
    (np.ones((2, 3)), "float64"),
    (np.ones(3, int), r"\(3,\)"),
    (np.ones((3, 0), int), r"\(3, 0\)"),
    (np.array([[1, -2]]), "got -2"),
  ],
)
def test_bad_counts_are_refused(counts, message):
  with pytest.raises(ValueError, match=message):
    metrics.load_statistics(counts)


def test_bias_range():
  assert metrics.bias_range(np.array([[-1.0, 0.5, 2.0], [3.0, 3.0, 3.0]])).tolist() == [3.0, 0.0]


def test_running_load_sums_everything_or_a_window():
  steps = [np.array([[6, 0, 0]]), np.array([[0, 6, 0]]), np.array([[0, 4, 2]])]
  whole, window = metrics.RunningLoad(), metrics.RunningLoad(window=2)
  assert whole.statistics() == {}
  for counts_LE in steps:
    whole.add(counts_LE)
    window.add(counts_LE)
  # Sums [6, 10, 2] and [0, 10, 2].
  assert whole.statistics()["max_vio_running"].tolist() == pytest.approx([10 / 6 - 1])
  assert whole.statistics()["dead_experts_running"].tolist() == [0]
  assert window.statistics()["max_vio_running"].tolist() == pytest.approx([10 / 4 - 1])
  assert window.statistics()["dead_experts_running"].tolist() == [1]
  with pytest.raises(ValueError, match=r"\(1, 3\).*\(1, 2\)"):
    whole.add(np.array([[1, 1]]))
  with pytest.raises(ValueError, match="got 0"):
    metrics.RunningLoad(window=0)


@pytest.mark.parametrize("window", [None, 2])
def test_running_load_goes_on_after_a_resume(tmp_path, window):
  rng = np.random.default_rng(0)
  straight = metrics.RunningLoad(window)
  with metrics.MetricsWriter(tmp_path, tensorboard=False) as writer:
    for step in range(1, 6):
      counts_LE = rng.integers(0, 9, (2, 4))
      if step <= 3:
        straight.add(counts_LE)
      writer.write(step, {"expert_counts": counts_LE})
      writer.write(step, {"validation_loss": 1.0})
  metrics.MetricsWriter(tmp_path, tensorboard=False, start_step=3).close()
  resumed = metrics.RunningLoad.from_rows(metrics.iter_metrics(tmp_path), window)
  counts_LE = rng.integers(0, 9, (2, 4))
  straight.add(counts_LE)
  resumed.add(counts_LE)
  for name, value in straight.statistics().items():
    np.testing.assert_array_equal(resumed.statistics()[name], value)


@pytest.mark.parametrize("counts", ["abc", [[1, 2], [3]], [[1, 2, 3]], [[1, -2]], 7, [[0.5, 1]]])
def test_damaged_counts_are_named_by_their_line(counts):
  rows = [{"step": 10, "expert_counts": [[1, 2]]}, {"step": 20, "expert_counts": counts}]
  with pytest.raises(ValueError, match=r"of step 20 in metrics\.jsonl are damaged .*delete that"):
    metrics.RunningLoad.from_rows(rows)


def test_lines_hold_plain_numbers(tmp_path):
  with metrics.MetricsWriter(tmp_path / "new", tensorboard=False) as writer:
    writer.write(
      np.int64(7),
      {
        "loss": np.float32(0.1),
        "mfu": None,
        "tokens": np.int32(3),
        "grad_norm": float("inf"),
        "max_vio": np.array([0.25, np.nan]),
        "router_bias": np.array([[0.001, -0.003]], np.float32),
        "expert_counts": [[1, 2]],
      },
    )
    line = (tmp_path / "new" / "metrics.jsonl").read_text()  # before the file is closed
  assert json.loads(line) == {
    "step": 7,
    "loss": 0.1,
    "mfu": None,
    "tokens": 3,
    "grad_norm": None,
    "max_vio": [0.25, None],
    "router_bias": [[0.001, -0.003]],
    "expert_counts": [[1, 2]],
  }
  assert '"tokens": 3,' in line and "[[1, 2]]" in line


@pytest.mark.parametrize("value", ["text", {"a": 1}, np.zeros((1, 1, 1)), 1j])
def test_other_values_are_refused_by_name(tmp_path, value):
  with metrics.MetricsWriter(tmp_path, tensorboard=False) as writer:
    with pytest.raises(ValueError, match="strange"):
      writer.write(1, {"strange": value})
  assert metrics.read_metrics(tmp_path) == []


def test_a_model_without_moe_layers_is_measured(tmp_path):
  running = metrics.RunningLoad()
  counts_LE = np.zeros((0, 4), np.int32)
  running.add(counts_LE)
  values = metrics.load_statistics(counts_LE) | running.statistics()
  values |= {"bias_range": metrics.bias_range(np.zeros((0, 4), np.float32))}
  values |= {"expert_counts": counts_LE, "router_bias": np.zeros((0, 4), np.float32)}
  with metrics.MetricsWriter(tmp_path, tensorboard=True) as writer:
    writer.write(1, values)
  assert metrics.read_metrics(tmp_path) == [{"step": 1} | {name: [] for name in values}]
  assert metrics.RunningLoad.from_rows(metrics.iter_metrics(tmp_path)).statistics() == {}


def _write(workdir, steps, start_step=0):
  with metrics.MetricsWriter(workdir, tensorboard=False, start_step=start_step) as writer:
    for step in steps:
      writer.write(step, {"loss": step / 10})


def _steps(workdir):
  return [row["step"] for row in metrics.read_metrics(workdir)]


def _names(workdir):
  return sorted(path.name for path in workdir.iterdir())


def test_resume_removes_later_lines_and_what_killed_runs_left(tmp_path):
  _write(tmp_path, [10, 20, 30])
  for name in ("before_step_20", "before_step_20.1", "before_step_5.tmp", "tmp"):
    (tmp_path / f"metrics.jsonl.{name}").write_text('{"step": 30}\n')
  (tmp_path / "metrics.jsonl.mine").write_text("kept")
  _write(tmp_path, [30, 40], start_step=20)
  assert _steps(tmp_path) == [10, 20, 30, 40]
  _write(tmp_path, [], start_step=20)
  assert _steps(tmp_path) == [10, 20]
  assert _names(tmp_path) == ["metrics.jsonl", "metrics.jsonl.mine"]


def test_resume_from_the_last_line_changes_nothing(tmp_path):
  _write(tmp_path, [10, 20])
  before = (tmp_path / "metrics.jsonl").read_bytes()
  _write(tmp_path, [], start_step=20)
  assert (tmp_path / "metrics.jsonl").read_bytes() == before
  assert _names(tmp_path) == ["metrics.jsonl"]


@pytest.mark.parametrize("after", [b"", b"\n", b"\n\n", b"\r\n", b"\x00\x00\x00", b"\xff\xfe"])
@pytest.mark.parametrize("kept", [1, 12, -2, -1])
def test_a_last_line_cut_by_a_kill_is_left_out(tmp_path, kept, after):
  """Also if something follows it: the end of a line, or what a disk gave out for it."""
  _write(tmp_path, [10, 20])
  path = tmp_path / "metrics.jsonl"
  first, second = path.read_bytes().splitlines(keepends=True)
  path.write_bytes(first + second[:kept] + after)
  whole = kept == -1 and not after.strip()  # only the end of the line is missing
  assert _steps(tmp_path) == ([10, 20] if whole else [10])
  _write(tmp_path, [30], start_step=20)
  assert _steps(tmp_path) == ([10, 20, 30] if whole else [10, 30])
  assert _names(tmp_path) == ["metrics.jsonl"]


@pytest.mark.parametrize(
  "broken",
  [
    *(b'{"step": 2', b'{"loss": 1.0}', b"[2]", b'{"step": null}', b"", b"\x00", b'{"\xff"}'),
    *(b'{"step": 2, "loss": "7.1"}', b'{"step": 2, "validation_loss": {}}'),
  ],
)
def test_a_broken_line_elsewhere_is_named_with_what_to_do(tmp_path, broken):
  text = b'{"step": 1}\n' + broken + b'\n{"step": 3}\n'
  path = tmp_path / "metrics.jsonl"
  path.write_bytes(text)
  for read in (metrics.read_metrics, lambda w: metrics.MetricsWriter(w, False, start_step=1)):
    with pytest.raises(ValueError, match=rf"^{path}, line 2 must be .*: delete that line"):
      read(tmp_path)
  assert path.read_bytes() == text


def test_no_file_is_an_error(tmp_path):
  with pytest.raises(FileNotFoundError):
    metrics.read_metrics(tmp_path)


def test_a_run_that_goes_back_removes_the_lines_of_steps_to_come(tmp_path):
  writer = metrics.MetricsWriter(tmp_path, tensorboard=False)
  for step in (10, 20, 20, 30):
    writer.write(step, {"loss": step / 10})
  assert [row["step"] for row in writer.cut(20)] == [10, 20, 20]
  writer.write(30, {"loss": 9.0})
  writer.close()
  assert [row["loss"] for row in metrics.read_metrics(tmp_path)] == [1.0, 2.0, 2.0, 9.0]
  assert metrics.NoMetrics().cut(20) == []


def test_a_store_that_cannot_append_gets_whole_files(tmp_path, monkeypatch):
  _write(tmp_path, [10, 20, 30])
  monkeypatch.setattr(appended, "is_remote", lambda path: True)
  writer = metrics.MetricsWriter(tmp_path, tensorboard=False, start_step=20)
  assert _steps(tmp_path) == [10, 20]
  writer.write(30, {})
  assert _steps(tmp_path) == [10, 20]
  writer.flush()
  assert _steps(tmp_path) == [10, 20, 30]
  writer.write(40, {})
  writer.close()
  assert _steps(tmp_path) == [10, 20, 30, 40]


def test_remote_paths_are_told_by_their_scheme():
  assert appended.is_remote(epath.Path("gs://bucket/run"))
  assert not appended.is_remote(epath.Path("/tmp/run"))


def _events(workdir):
  from tensorboardX.proto import event_pb2

  events = []
  for path in sorted((workdir / "tensorboard").iterdir()):
    data = path.read_bytes()
    while data:  # length, its checksum, the event, its checksum
      length = int.from_bytes(data[:8], "little")
      events.append(event_pb2.Event.FromString(data[12 : 12 + length]))
      data = data[16 + length :]
  return events


def test_tensorboard_gets_scalars_and_layers(tmp_path):
  with metrics.MetricsWriter(tmp_path, tensorboard=True, start_step=4) as writer:
    writer.write(
      5,
      {"loss": 2.5, "mfu": None, "max_vio": [0.5, np.nan, 1.5], "expert_counts": [[1, 2], [3, 4]]},
    )
  events = _events(tmp_path)
  got = {(e.step, v.tag): v.simple_value for e in events for v in e.summary.value}
  assert got == {(5, "loss"): 2.5, (5, "max_vio/layer_00"): 0.5, (5, "max_vio/layer_02"): 1.5}
  starts = [e.step for e in events if e.HasField("session_log")]
  assert starts == [5]  # TensorBoard hides what an earlier session wrote from here on
