"""A page about a sweep: what it says, and that it is well-formed for sweeps of every kind."""

import numpy as np
import pytest

from dsmoe.reporting import html
from dsmoe.sweeps import figures, plots, results, sections, verdict
from tests import html_dom, runs
from tests.sweeps import drawn, fake_sweep

FIELDS = ("optim.learning_rate", "balance.bias_update_speed", "model.scoring_func")


def grid(num_seeds: int = 2) -> results.Sweep:
  params = [
    dict(zip(FIELDS, (rate, speed, score)))
    for rate in (1e-3, 3e-3, 1e-1)
    for speed in (0.0, 0.01)
    for score in ("sigmoid", "softmax")
  ]
  mean = [2 + 0.2 * (p[FIELDS[0]] > 0.05) + (p[FIELDS[2]] == "softmax") * 0.1 for p in params]
  mean[-1] = 40.0
  value = drawn.losses(np.random.default_rng(0), mean, num_seeds, 0.02, 0.003)
  trials = drawn.trials(value, params)
  last = len(trials)
  error = "the loss of step 41 must be finite, got <nan> & $x$"
  trials.append(drawn.trial(last, params[0], 7, None, error=error, flops=float("nan")))
  trials.append(drawn.trial(last + 1, params[1], 7, None, state="pruned"))
  trials.append(drawn.trial(last + 2, params[2], 7, None, state="running"))
  trials.append(drawn.trial(last + 3, params[2], 8, None, state="interrupted", lost_flops=5e11))
  trials += [drawn.trial(last + n, params[2], 5 + n, None, state="waiting") for n in (4, 5)]
  trials = [trial._replace(num_devices=10) for trial in trials]
  return results.Sweep("grid", FIELDS, "final validation_loss", trials)


def page(sweep: results.Sweep, **kwargs) -> html_dom.Node:
  return html_dom.check(html.page(sweep.name, sections.of_sweep(sweep, **kwargs)))


def tables(root: html_dom.Node) -> dict[str, list[list[str]]]:
  return {
    table.all("caption")[0].all("b")[0].text(): [
      [cell.text() for cell in row.all("th", "td")] for row in table.all("tbody")[0].all("tr")
    ]
    for table in root.all("table")
  }


def test_a_grid():
  root = page(grid(), price_per_device_hour=6.0)
  words, found = " ".join(root.text().split()), tables(root)
  titles = [h.text() for h in root.all("h2")]
  assert titles == [
    "Verdict",
    "Loss against each field",
    "Importance of the fields",
    "All settings",
    "Seeds",
    "Trials that did not end well",
    "Compute of the sweep",
  ]
  assert "4 of 12 settings are tied: any of them may be the best" in words
  assert "model.scoring_func=softmax against sigmoid:" in words
  assert "nats worse (95% interval" in words and "6 matched pairs of settings" in words
  assert "3 settings with a far higher loss" in words or "1 setting with a far higher loss" in words
  ranking = found["Ranking"]
  assert len(ranking) == 12 and [row[2] for row in ranking] == ["tied"] * 4 + ["worse"] * 8
  assert ranking[0][0] == "1" and ranking[0][-1] == "" and ranking[4][-1].startswith("0.0992 (")
  assert {row[0] for row in found["Importance"]} == set(FIELDS) and len(found["Importance"]) == 3
  assert found["Failed and pruned trials"][0][-1].endswith("got <nan> & $x$")
  assert found["Seeds by setting"] == [["2", "12", "4"]]
  compute = {row[0]: row[1:] for row in found["Compute by state"]}
  assert compute["complete"] == ["24", "0.4", "4", "2.4e+13", "0", "24.00"]
  assert compute["interrupted"][4] == compute["all"][4] == "5e+11"
  states = ("complete", "pruned", "failed", "running", "interrupted", "waiting")
  assert [compute[state][0] for state in states] == ["24", "1", "1", "1", "1", "2"]
  assert compute["all"][0] == "30"
  assert compute["complete, of tied settings"][0] == "8" and compute["all"][3] == "not known"
  assert len(root.all("figure")) == 6


def test_a_search_of_numbers_and_a_field_that_some_do_not_have():
  rng = np.random.default_rng(1)
  names = ("a.x", "b.x", "c.kind")
  kinds = ["a", "<script>", "$b$", None]
  params = [
    dict(zip(names, (10 ** rng.uniform(-5, -1), rng.random(), kinds[n % 4]))) for n in range(24)
  ]
  for one in params[:3]:  # their kinds differ
    del one["b.x"]
  sweep = results.Sweep(
    "search", (*names, "seed"), "loss", drawn.trials(rng.random((24, 1)), params)
  )
  root = page(sweep)
  words = " ".join(root.text().split())
  assert "No setting was run with two seeds, so the noise is not known" in words
  assert "No two settings with a loss differ only in a.x or only in b.x" in words
  assert "Further seeds would be spent on tied settings" in words
  assert "<script>" in words and len(root.all("figure")) == 6


@pytest.mark.parametrize("num_complete", [0, 1, 2])
def test_a_sweep_that_has_hardly_begun(num_complete):
  trials = [drawn.trial(n, {"x": n}, 0, 2.0 + n) for n in range(num_complete)]
  trials += [drawn.trial(9, {}, 0, None, state="waiting")]
  root = page(results.Sweep("new", ("x",), "loss", trials))
  words = " ".join(root.text().split())
  assert ("No trial is complete" in words) == (num_complete == 0)
  assert len(root.all("figure")) == (3 if num_complete else 0)


def test_far_losses_are_at_the_edge_and_counted():
  value = np.array([[2.0], [2.1], [2.2], [2.15], [2.05], [50.0], [90.0]])
  picture, num_far = figures.against(verdict.rank(drawn.trials(value)), "x")
  low, high = picture.axes[0].get_ylim()
  assert num_far == 2 and 1.9 < low < 2.0 and 2.2 < high < 2.3
  marks = [line.get_marker() for line in picture.axes[0].lines]
  assert marks.count("^") == 2 and marks.count("o") == 5


def test_an_axis_over_powers_of_ten_has_plain_labels():
  params = [{"lr": lr} for lr in (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2)]
  picture, _ = figures.against(verdict.rank(drawn.trials(np.ones((7, 1)), params)), "lr")
  picture.draw_without_rendering()
  labels = [tick.label1.get_text() for tick in picture.axes[0].xaxis.get_major_ticks()]
  assert picture.axes[0].get_xscale() == "log" and {"0.0001", "0.001", "0.01"} <= set(labels)


def test_intervals_and_runs_are_drawn_whole_where_no_loss_is_far():
  value = np.array([[2.0, 2.02, 2.01], [2.03, 2.05, 2.01]])
  found = verdict.rank(drawn.trials(value))
  lines = figures.ranking(found).axes[0].lines
  drawn_x = np.concatenate([line.get_xdata() for line in lines])
  assert drawn_x.max() == pytest.approx(max(2.05, found.ranked[1].interval[1]))
  assert set(value.ravel()) <= set(drawn_x.tolist())


def test_the_runs_of_the_best_settings():
  value = np.array([[2.2, 2.1], [2.0, 2.9], [1.9, 1.8]])
  trials = drawn.trials(value)
  trials[4] = trials[4]._replace(state="failed", value=None)
  sweep = results.Sweep("s", ("x",), "loss", trials)
  assert [path.name for path in sections.best_runs(sweep, most=2)] == ["0005", "0000"]


def test_plots_of_a_sweep(tmp_path):
  paths = plots.draw(grid(), tmp_path)
  assert {path.name for path in paths} == {
    "ranking.png",
    "parallel_coordinates.png",
    "importance.png",
    *(f"against_{field}.png" for field in FIELDS),
  }
  assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
  assert plots.draw(results.Sweep("new", FIELDS, "loss", []), tmp_path) == []


@pytest.mark.slow
def test_the_report_of_a_sweep(tmp_path):
  found = fake_sweep.make(tmp_path / "sweep")
  code, shown, err = runs.call("scripts/report.py", str(tmp_path / "sweep"), "--noplots")
  assert code == 0, err
  assert "best so far" in shown and str(tmp_path / "sweep" / "report.html") in shown
  root = html_dom.check((tmp_path / "sweep" / "report.html").read_text())
  titles = [h.text() for h in root.all("h2")]
  assert titles[0] == "Verdict" and "Summary" in titles
  best = sections.best_runs(found)
  assert root.all("h1")[0].text() == "Sweep fake" and all(str(run) in root.text() for run in best)
  code, _, err = runs.call("scripts/report.py", str(tmp_path / "sweep"), str(best[0]))
  assert code == 2 and "a sweep must be reported on by itself" in err
