"""A page about runs shows what their files hold, once, and names what it leaves out."""

import json
import re

import numpy as np
import pytest
from etils import epath

from dsmoe import config as config_lib
from dsmoe import train
from dsmoe.reporting import (
  cost_sections,
  curve_sections,
  final,
  goodput,
  html,
  metrics,
  routing_sections,
  run_files,
  run_sections,
)
from dsmoe.reporting.html import charts
from tests import html_dom, runs
from tests.helpers import small_config
from tests.reporting.test_html import HOSTILE

L, E, B, S, K = 2, 5, 4, 6, 3
GLOBS = (f"a {HOSTILE}", "b.md")


def write_run(folder, num_steps: int = 45, checksum: int = 7, secs: float = 10.0, **overrides):
  """Writes the files of a run: 100 tokens and 2,000 FLOPs a token in each step."""
  rng = np.random.default_rng(num_steps)
  with metrics.MetricsWriter(folder, tensorboard=False) as writer:
    for step in range(1, num_steps + 1):
      counts_LE = rng.integers(0, 50, (L, E))
      values = {"loss": 5 / step, "cross_entropy": 4 / step, "learning_rate": 1e-3}
      values |= {"grad_norm": 1 / step, "tokens": 100 * step}
      values |= {"tokens_per_sec": 50.0, "gflops_per_sec": 50.0 * 2000 / 1e9, "mfu": None}
      values |= metrics.load_statistics(counts_LE) | {"expert_counts": counts_LE}
      values |= {"router_bias": rng.normal(0, 0.1, (L, E)), "bias_range": [0.1, 0.2]}
      writer.write(step, values)
      if step % 15 == 0:
        point = {"validation_loss": 3 / step, "validation_tokens": 12}
        writer.write(step, point | {"validation_checksum": checksum})
  config = small_config(**overrides)
  (folder / "config.json").write_text(json.dumps(config_lib.to_dict(config)))
  lines = [
    {"step": 0, "time": 100.0, "began": 95.0, "resumed_from": 0, "processes": 1}
    | {"secs": {"start_up": 5.0}},
    {"step": num_steps, "time": 100.0 + secs, "ended": True, "secs": {"step": secs}},
  ]
  (folder / "goodput.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
  return folder


def write_trace(folder, step: int = 3):
  rng = np.random.default_rng(step)
  expert_LMK = np.argsort(rng.random((L, B * S, E)), axis=2)[:, :, :K].astype(np.uint8)
  counts_LE = np.stack([np.bincount(e.ravel(), minlength=E) for e in expert_LMK])
  (folder / "routing_traces").mkdir()
  np.savez_compressed(
    folder / "routing_traces" / f"step_{step}_process_0.npz",
    expert_LMK=expert_LMK,
    place_M=np.arange(B * S),
    counts_LE=counts_LE.astype(np.int32),
    **dict(step=step, num_rows=B, sequence_length=S, num_microbatches=1, num_processes=1),
  )
  return folder / "routing_traces" / f"step_{step}_process_0.npz"


@pytest.fixture(scope="module")
def two(tmp_path_factory):
  """Two runs of equal validation rows; the first has a trace, several sources, and a sample."""
  folder = tmp_path_factory.mktemp("runs")
  options = {"data.train_globs": GLOBS, "data.train_weights": (3.0, 1.0), "mesh.data": 2}
  one = write_run(folder / "one", 45, **options, **{"data.sequence_length": S})
  write_trace(one)
  (one / final.SAMPLE_FILE).write_text(f"a sample {HOSTILE}\x1b[31m")
  other = write_run(folder / HOSTILE.replace("/", "|"), 60, secs=20.0)
  return one, other


def read(*folders):
  return [run_files.read(f, name) for f, name in zip(folders, run_files.names(folders))]


@pytest.fixture(scope="module")
def root(two):
  text = html.page("p", run_sections.of_runs(read(*two), 3.5))
  assert len(text) < 2**20
  return html_dom.check(text)


def figures(root, begins: str):
  return [f for f in root.all("figure") if f.all("figcaption")[0].text().startswith(begins)]


def table(root, title: str) -> list[list[str]]:
  [found] = [t for t in root.all("table") if t.all("caption")[0].text().startswith(title)]
  return [[cell.text() for cell in row.all("th", "td")] for row in found.all("tr")]


def test_every_section_is_there(two, root):
  name = two[1].name
  assert [h2.text() for h2 in root.all("h2")] == [
    *("Summary", "Curves", "Configs", "Expert load: one", f"Expert load: {_short(name)}"),
    *("Router bias: one", f"Router bias: {_short(name)}", "Specialisation: one"),
    *("Speed and goodput", "Compute and cost", "What the models write"),
  ]
  assert root.all("pre")[0].text() == f"a sample {HOSTILE}\\x1b[31m"


def _short(name: str) -> str:
  return f"{name[:19]}…{name[-20:]}" if len(name) > 40 else name


def test_curves_have_three_axes_and_both_runs(two, root):
  [curve] = figures(root, "Training cross-entropy")
  assert [label.text() for label in curve.all("label")] == ["steps", "tokens", "FLOPs"]
  assert [key.text() for key in curve.all("li")] == ["one", _short(two[1].name)]
  colors = [key.all("line")[0].attributes["stroke"] for key in curve.all("li")]
  for picture in curve.all("svg"):
    if picture.attributes.get("role") == "img":
      styles = " ".join(node.attributes.get("style") or "" for node in picture.all("path"))
      assert all(color in styles for color in colors)
  [one] = figures(root, "Validation loss on 12 tokens")
  assert len(one.all("li")) == 2


def test_losses_on_other_validation_rows_are_in_other_figures(two, tmp_path):
  third = write_run(tmp_path / "third", 45, checksum=8)
  with metrics.MetricsWriter(third, tensorboard=False, start_step=45) as writer:
    writer.write(50, {"validation_loss": 0.5, "validation_tokens": 12, "validation_checksum": 7})
  old = write_run(tmp_path / "old", 45)
  path = old / "metrics.jsonl"
  path.write_text(re.sub(r', "validation_(tokens|checksum)": \d+', "", path.read_text()))
  older = tmp_path / "older"
  older.mkdir()
  (older / "metrics.jsonl").write_text(path.read_text())
  found = read(*two, third, old, older)
  root = html_dom.check(html.page("p", [curve_sections.curves(found)]))
  shown = [[key.text() for key in f.all("li")] for f in figures(root, "Validation loss")]
  assert shown == [["one", _short(two[1].name), "third"], ["third"], ["old"], ["older"]]


def test_losses_on_the_same_text_are_compared_in_percent(tmp_path):
  """A run whose losses are 1% higher, one of other batches, and one without a config."""
  runs_of = [write_run(tmp_path / name) for name in ("base", "higher", "other", "unknown")]
  path = runs_of[1] / "metrics.jsonl"
  raised = []
  for line in path.read_text().splitlines():
    row = json.loads(line)
    for name in {"cross_entropy", "validation_loss"} & row.keys():
      row[name] *= 1.01
    raised.append(json.dumps(row) + "\n")
  path.write_text("".join(raised))
  config = json.loads((runs_of[2] / "config.json").read_text())
  config["data"]["seed"] += 1
  (runs_of[2] / "config.json").write_text(json.dumps(config))
  (runs_of[3] / "config.json").unlink()
  found = curve_sections.differences(read(*runs_of))
  assert [one.title for one in found] == [
    "Training cross-entropy, difference from base",
    "Validation loss, difference from base",
  ]
  for one in found:
    assert [key.label for key in one.keys] == ["higher"]
    assert one.note.endswith("Mean of the later half of the points: higher +1%.")
  assert curve_sections.differences(read(runs_of[0])) == []
  assert curve_sections.differences(read(runs_of[0], runs_of[2])) == []


def test_tables_of_differences_and_of_costs(two, root):
  header, *rows = table(root, "Config fields that differ")
  assert header == ["field", "one", _short(two[1].name)]
  found = {name: values for name, *values in rows}
  assert found["data.train_globs"] == [", ".join(GLOBS), "synthetic"]
  assert found["mesh.data"] == ["2", "-1"] and "seed" not in found
  header, one, other = table(root, "Compute used")
  assert header[-1] == "price"
  # 15 s on 2 devices; 45 steps of 100 tokens of 2,000 FLOPs.
  hours = 2 * 15 / 3600
  assert one == ["one", "4,500", "9e+06", "0:00:15", "2", f"{hours:.4g}", f"{3.5 * hours:.4g}"]
  assert other[1:] == ["6,000", "1.2e+07", "0:00:25", "not known", "not known", "not known"]
  rows = {row[0]: row[1:] for row in table(root, "Where the wall time went")[1:]}
  assert rows["stepping"] == ["0:00:10 (66.7%)", "0:00:20 (80.0%)"]
  assert rows["starting up"] == ["0:00:05 (33.3%)", "0:00:05 (20.0%)"]


def test_the_result_file_is_read_where_it_is(two, tmp_path):
  run = write_run(tmp_path / "run")
  (run / "result.json").write_text(json.dumps({"num_devices": 8, "why": "stopped by SIGTERM"}))
  found = read(run)
  parts = [run_sections.summary(found), cost_sections.compute(found, None)]
  root = html_dom.check(html.page("p", parts))
  assert table(root, "Compute used")[1][-2:] == ["8", f"{8 * 15 / 3600:.4g}"]
  assert ["ended", "stopped by SIGTERM"] in table(root, "Figures of the last step")


def test_damaged_files_are_named_and_the_rest_is_shown(tmp_path):
  run = write_run(tmp_path / "run")
  path = write_trace(run)
  (run / "config.json").write_text("[1]")
  (run / "result.json").write_text("{")
  (run / "goodput.jsonl").write_text("{}\n{}\n")
  path.write_bytes(b"no archive")
  found = read(run)
  parts = [run_sections.summary(found), routing_sections.of_run(found[0], False)]
  root = html_dom.check(html.page("p", parts))
  shown = " ".join(p.text() for p in root.all("p"))
  for name in ("config.json", "result.json", goodput.file_of(run, 0).name):
    assert f"{run / name} is left out: " in shown, name
  assert f"The routing trace is left out: {path} must be a routing trace" in shown
  assert curve_sections.curves(found).parts


@pytest.mark.parametrize(
  ("row", "message"),
  [
    ({"loss": [1.0]}, r"loss of step 7 must be a number, it is \[1.0\]"),
    ({"tokens": 1e999}, "tokens of step 7 must be a number, it is inf"),
    ({"max_vio": 3}, "max_vio of step 7 must be a number for each layer, it is 3"),
    ({"max_vio": [[1.0]]}, "max_vio of step 7 must be a number for each layer"),
    ({"max_vio": [1.0, 2.0, 3.0]}, "max_vio of step 7 must be a number for each layer"),
    (
      {"expert_counts": [[1, 2, 3]]},
      r"expert_counts of step 7 must have a row for .*, its shape is \(1, 3\)",
    ),
  ],
)
def test_values_that_no_run_writes_are_damage(tmp_path, row, message):
  first = {"step": 6, "max_vio": [0.1, None], "expert_counts": [[1, 2], [3, 4]]}
  lines = [json.dumps(line) for line in (first, {"step": 7} | row, {"step": 8})]
  (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
  with pytest.raises(ValueError, match=message) as error:
    read(tmp_path)
  assert str(error.value).startswith(f"{tmp_path}/metrics.jsonl is damaged: ")


def test_steps_are_at_the_tokens_that_were_read(tmp_path):
  with metrics.MetricsWriter(tmp_path, tensorboard=False) as writer:
    for step, tokens in ((10, 1000), (20, 3000)):
      writer.write(step, {"tokens": tokens, "tokens_per_sec": 4.0, "gflops_per_sec": 8e-9})
  [run] = read(tmp_path)
  tokens_T = run_files.tokens_at(run, np.array([0, 5, np.nan, 10, 15, 20]))
  np.testing.assert_array_equal(tokens_T, [0, 500, np.nan, 1000, 2000, 3000])
  assert run_files.flops_per_token(run) == pytest.approx(2.0)


def test_names_are_the_fewest_folders_that_differ():
  assert run_files.names(["runs/a", "/x/b/"]) == ["a", "b"]
  assert run_files.names(["x/a/run", "x/b/run", "y/b/run"]) == ["x/a/run", "x/b/run", "y/b/run"]
  assert run_files.names(["a", "./a"]) == ["a (1)", "a (2)"]
  assert run_files.names([f"{'a' * 30}{x}{'b' * 30}" for x in "xy"]) == [
    f"{'a' * 19}…{'b' * 20} (1)",
    f"{'a' * 19}…{'b' * 20} (2)",
  ]
  [name] = run_files.names(["runs/" + "0123456789" * 6])
  assert len(name) == 40 and name.startswith("0123456789") and name.endswith("6789")


def _contrast(one: str, other: str) -> float:
  """WCAG 2's contrast of two colours."""
  lights = []
  for color in (one, other):
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    lights.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
  return (max(lights) + 0.05) / (min(lights) + 0.05)


def test_colours_can_be_seen_on_both_grounds():
  for color in charts.PALETTE:
    for ground in ("#ffffff", "#14171b"):
      assert _contrast(color, ground) >= 3, (color, ground, _contrast(color, ground))
  keys = charts.keys([str(i) for i in range(30)])
  assert len({(key.color, key.dash) for key in keys}) == 30


def test_a_run_keeps_what_its_model_wrote(tmp_path, monkeypatch):
  monkeypatch.setattr(train.generate, "sample", lambda workdir, num_tokens: f"{num_tokens} tokens")
  monkeypatch.setattr(train.final, "rows", lambda config, workdir: [])
  train.report(small_config(**{"log.sample_tokens": 3}), epath.Path(tmp_path))
  write_run(tmp_path)
  assert run_files.read(tmp_path, "run").sample == "3 tokens"


@pytest.mark.slow
def test_the_script_shows_the_others(two, tmp_path):
  empty, damaged = tmp_path / "empty", tmp_path / "damaged"
  for folder, text in ((empty, ""), (damaged, "{}\n{}\n")):
    folder.mkdir()
    (folder / "metrics.jsonl").write_text(text)
  out = tmp_path / "page.html"
  args = (empty, two[0], damaged, tmp_path / "absent", f"--out={out}", "--noplots")
  code, shown, err = runs.call("scripts/report.py", *map(str, args))
  assert code == 0 and shown.splitlines()[-1] == str(out) and "train loss" in shown
  sentences = [line for line in err.splitlines() if line != "making the page"]
  assert [s.startswith("left out: ") for s in sentences] == [True] * 3
  for sentence, folder in zip(sentences, (empty, damaged, tmp_path / "absent")):
    assert str(folder) in sentence
  root = html_dom.check(out.read_text())
  assert root.all("h2")[-1].text() == "Runs that could not be read"
  assert [f"left out: {p.text()}" for p in root.all("section")[-1].all("p")] == sentences
  code, shown, err = runs.call("scripts/report.py", str(empty), str(damaged))
  assert (code, shown) == (2, "") and err.startswith("error: ") and err.count("\n") == 1
  assert str(empty) in err and str(damaged) in err
