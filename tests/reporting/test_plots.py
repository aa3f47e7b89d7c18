import numpy as np
import pytest
from matplotlib import image

from dsmoe.reporting import metrics, plots, series
from tests import runs

ALL = ["losses", "learning_rate", "throughput", "expert_load", "router_bias", "balance"]


def _fake_run(workdir, num_steps, L, E, mfu=0.4):
  rng = np.random.default_rng(0)
  running = metrics.RunningLoad()
  with metrics.MetricsWriter(workdir, tensorboard=False) as writer:
    for step in range(1, num_steps + 1):
      counts_LE = rng.integers(0, 50, (L, E))
      running.add(counts_LE)
      bias_LE = rng.normal(0, 0.1, (L, E)).astype(np.float32)
      values = {"loss": 5 / step, "cross_entropy": 4 / step, "z_loss": 0.0, "mtp_loss": 6 / step}
      values |= {"balance_loss": 1.1, "learning_rate": 1e-3, "grad_norm": 1 / step}
      values |= {f"grad_norm/block_{i}": float(i) for i in range(12)}
      values |= {"tokens_per_sec": 1000.0, "mfu": mfu, "gflops_per_sec": 3.0}
      values |= metrics.load_statistics(counts_LE) | running.statistics()
      values |= {"expert_counts": counts_LE, "router_bias": bias_LE}
      writer.write(step, values)
    writer.write(num_steps, {"validation_loss": 1.0, "validation_bits_per_byte": 0.4})


def _check(paths, names):
  assert [path.name for path in paths] == [f"{name}.png" for name in names]
  for path in paths:
    assert path.parent.name == "plots"
    pixels = image.imread(path)  # fails on a broken file
    assert min(pixels.shape[:2]) > 300, path.name
    assert len(np.unique(pixels @ [1.0, 300.0, 300.0**2, 300.0**3])) > 50, path.name  # colours


@pytest.mark.parametrize(
  ("num_steps", "L", "E", "mfu"), [(6, 3, 5, 0.4), (1, 1, 2, None)], ids=["small", "one step"]
)
def test_every_plot_is_drawn(tmp_path, num_steps, L, E, mfu):
  _fake_run(tmp_path, num_steps, L, E, mfu)
  _check(plots.draw(tmp_path), ALL)


def test_the_whole_validation_set_is_a_point_beside_the_curve(tmp_path):
  with metrics.MetricsWriter(tmp_path, tensorboard=False) as writer:
    writer.write(1, {"validation_loss": 3.0})
    writer.write(2, {"validation_loss": 2.0, "whole_validation_loss": 2.5})
  [ax] = plots._draw_losses(series.Run(metrics.read_metrics(tmp_path))).axes
  lines = {line.get_label(): line.get_ydata().tolist() for line in ax.lines}
  assert lines == {"validation loss": [3.0, 2.0], "validation loss, whole set": [2.5]}
  assert ax.lines[1].get_linestyle() == "None" and ax.lines[1].get_marker() == "D"


@pytest.mark.parametrize("name", ["validation_tokens", "validation_checksum"])
def test_validation_on_other_tokens_is_another_curve(tmp_path, name):
  with metrics.MetricsWriter(tmp_path, tensorboard=False) as writer:
    for step, (loss, tokens) in enumerate([(3.0, 8), (2.5, 8), (2.75, 16), (2.0, 16)]):
      writer.write(step, {"validation_loss": loss, name: tokens})
  [ax] = plots._draw_losses(series.Run(metrics.read_metrics(tmp_path))).axes
  [line] = ax.lines
  np.testing.assert_array_equal(line.get_xdata(), [0, 1, np.nan, 2, 3])
  np.testing.assert_array_equal(line.get_ydata(), [3.0, 2.5, np.nan, 2.75, 2.0])


def test_plots_without_data_are_left_out(tmp_path):
  with metrics.MetricsWriter(tmp_path, tensorboard=False) as writer:
    assert plots.draw(tmp_path) == []
    for step in (1, 2):
      writer.write(step, {"loss": 3.0 - step, "mfu": None, "max_vio": [], "expert_counts": []})
  _check(plots.draw(tmp_path), ["losses"])


def test_heat_map_shows_load_over_mean(tmp_path):
  with metrics.MetricsWriter(tmp_path, tensorboard=False) as writer:
    for step in (10, 20):
      writer.write(step, {"expert_counts": [[0, 2, 4], [5, 5, 5]]})
  run = series.Run(metrics.iter_metrics(tmp_path))
  picture = plots._draw_expert_load(run)
  drawn = {ax.get_title(): ax for ax in picture.axes if ax.get_title()}
  assert list(drawn) == ["MoE layer 0", "MoE layer 1"]
  for title, column in (("MoE layer 0", [0.0, 1.0, 2.0]), ("MoE layer 1", [1.0, 1.0, 1.0])):
    (shown,) = drawn[title].images
    np.testing.assert_allclose(shown.get_array(), np.array([column, column]).T)
    assert float(shown.norm(1.0)) == 0.5  # balanced is the middle of the colours
    assert list(shown.get_extent()[:2]) == [5.0, 25.0]


def test_layers_wrap_and_all_appear():
  picture, panels = plots._grid(61, "title", "label")
  assert [ax.get_title() for ax in panels] == [f"MoE layer {l}" for l in range(61)]
  assert len(picture.axes) == 61
  wide, high = picture.get_size_inches()
  assert 0.5 < wide / high < 2


@pytest.mark.parametrize("length", [1, 255, 256, 257, 1000])
def test_long_series_are_thinned_to_means(length):
  thinned = series.Thinned()
  for step in range(length):
    thinned.add(step, np.array([[2.0 * step]]))
  step_T, value_TLE = thinned.means()
  stride = max(1, 2 ** int(np.ceil(np.log2(length / 256))))
  groups = [np.arange(length)[i : i + stride] for i in range(0, length, stride)]
  np.testing.assert_allclose(step_T, [g.mean() for g in groups])
  np.testing.assert_allclose(value_TLE[:, 0, 0], 2 * step_T)
  assert len(step_T) <= 256


def _report(*arguments):
  return runs.call("-m", "scripts.report", *arguments)


def test_report_prints_the_table_and_redraws(tmp_path):
  _fake_run(tmp_path, 3, 2, 4)
  code, out, err = _report(f"--workdir={tmp_path}")
  assert code == 0, err
  assert "best validation loss" in out and "1.0000 at step 3" in out
  drawn = [str(tmp_path / "plots" / f"{name}.png") for name in ALL]
  assert out.splitlines()[-len(ALL) :] == drawn


def test_report_names_the_missing_file(tmp_path):
  code, out, err = _report(f"--workdir={tmp_path}")
  assert (code, out) == (2, "")
  assert err == f"error: {tmp_path} must hold metrics.jsonl, it does not\n"


def test_running_mean_matches_a_loop_and_keeps_the_ends():
  values = np.random.default_rng(4).normal(size=11)
  expected = [values[max(i - 3, 0) : i + 4].mean() for i in range(11)]
  np.testing.assert_allclose(series.running_mean(values, 3), expected, rtol=1e-12)


def test_each_layers_gradient_norm_is_a_line_of_its_own(tmp_path):
  with metrics.MetricsWriter(tmp_path, tensorboard=False) as writer:
    for step in (1, 2, 3):
      norms = {"grad_norm/embed": 1.0, "grad_norm/moe_layers": [2.0 * step, 3.0 * step]}
      writer.write(step, {"learning_rate": 0.1, "grad_norm": 4.0} | norms)
  picture = plots._draw_learning_rate(series.Run(metrics.read_metrics(tmp_path)))
  lines = {line.get_label(): line.get_ydata().tolist() for line in picture.axes[2].lines}
  assert lines == {
    "embed": [1.0, 1.0, 1.0],
    "moe_layers 0": [2.0, 4.0, 6.0],
    "moe_layers 1": [3.0, 6.0, 9.0],
  }
  colors = {line.get_color() for line in picture.axes[2].lines}
  assert len(colors) == 3


def test_roofline(tmp_path):
  head = {"shape": "v3", "chip": "v5p", "bytes": 1e9}
  rows = [
    head | {"kernel": "matmul", "implementation": "ours", "flops": 1e12, "secs": 0.003},
    head | {"kernel": "matmul", "implementation": "theirs", "flops": 1e12, "secs": 0.005},
    head | {"kernel": "permute", "implementation": "ours", "flops": 0, "secs": 1e-4},
    {"kernel": "matmul", "implementation": "absent", "shape": "v3", "error": "absent"},
  ]
  for name, some in (("all", rows), ("none", rows[2:])):
    path = tmp_path / f"{name}.png"
    plots.draw_roofline(some, 459e12, 2765e9, path)
    assert min(image.imread(path).shape[:2]) > 300
