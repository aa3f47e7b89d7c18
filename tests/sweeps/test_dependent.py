"""Fields that follow another one are found, left out of what is shown, and named."""

import numpy as np
import rich.console
from etils import epath

from dsmoe.sweeps import dependent, live, plots, sections, show
from dsmoe.sweeps.results import Sweep, Trial
from tests.sweeps import drawn


def _points(seed, number=7):
  rng = np.random.default_rng(seed)
  for rate in map(float, np.exp(rng.uniform(-9, -3, number))):
    yield {
      "optim.final_learning_rate": rate / 20,
      "optim.learning_rate": rate,
      "optim.z": rate * rate,
      "model.n": int(rng.integers(1, 9)),
      "model.kind": "a",
      "model.flag": True,
    }


def test_multiples_are_found_and_nothing_else():
  for seed in range(20):
    points = list(_points(seed))
    found = dependent.multiples([{}, *points], sorted(points[0]))
    assert list(found) == ["optim.final_learning_rate"]
    other, factor = found["optim.final_learning_rate"]
    assert other == "optim.learning_rate" and np.isclose(factor, 0.05, rtol=1e-12)
    one = points[0] | {"optim.final_learning_rate": points[0]["optim.learning_rate"] / 19}
    assert not dependent.multiples([*points, one], sorted(one))


def test_values_that_tell_nothing():
  fields = ["a", "bb"]
  assert not dependent.multiples([], fields)
  assert not dependent.multiples([{"a": 1.0, "bb": 2.0}] * 3, fields)  # one value
  assert not dependent.multiples([{"a": 0.0, "bb": 0.0}, {"a": 1.0, "bb": 2.0}], fields)
  assert not dependent.multiples([{"a": 1.0, "bb": 2.0}, {"a": 2.0}], fields)  # conditional
  assert dependent.multiples([{"a": 1, "bb": 2}, {"a": 2, "bb": 4}], fields) == {"bb": ("a", 2.0)}


def test_of_three_one_stays():
  points = [{"a": x, "bb": 2 * x, "ccc": 6 * x} for x in (1.0, 2.0, 5.0)]
  assert dependent.multiples(points, ["ccc", "a", "bb"]) == {"bb": ("a", 2.0), "ccc": ("a", 6.0)}


def test_what_is_shown_has_no_column_for_it_and_says_so():
  points = [
    {f: p[f] for f in ("optim.final_learning_rate", "optim.learning_rate")} for p in _points(3)
  ]
  trials = [
    Trial(n, point, 0, "complete", 5.0 + n, epath.Path(f"w/{n}"), "", 1.0, 1e9)
    for n, point in enumerate(points)
  ]
  sweep = Sweep("s", tuple(sorted(points[0])), "final validation_loss", trials)
  kept, said = dependent.without(sweep)
  assert kept.fields == ("optim.learning_rate",) and len(kept.trials) == 7
  assert [t.params for t in kept.trials] == [
    {"optim.learning_rate": p["optim.learning_rate"]} for p in points
  ]
  sentence = "In all trials so far optim.final_learning_rate is 0.05 times optim.learning_rate, and is not listed."
  assert said == [sentence]
  assert sweep.trials[0].params == points[0]  # what is read stays whole
  console = rich.console.Console(width=200)
  with console.capture() as capture:
    console.print(show.table(sweep, {}))
  table = capture.get()
  assert sentence in table and "final_learning_rate=" not in table
  assert "final_learning_rate" not in "\n".join(live.lines(sweep, {}))
  page = sections.page(sweep)
  assert sentence in page and page.count("final_learning_rate") == 1


def test_a_field_that_no_complete_trial_has_is_in_no_picture(tmp_path):
  trials = [drawn.trial(0, {"a.x": 1.0}, 0, 5.0), drawn.trial(1, {"a.x": 2.0}, 0, 5.1)]
  trials.append(drawn.trial(2, {"b.y": 2.0}, 0, None, state="running"))
  sweep = Sweep("s", ("a.x", "b.y"), "final validation_loss", trials)
  page = sections.page(sweep)
  assert "Loss against a.x" in page and "Loss against b.y" not in page
  names = {path.name for path in plots.draw(sweep, tmp_path)}
  assert "against_a.x.png" in names and "against_b.y.png" not in names
