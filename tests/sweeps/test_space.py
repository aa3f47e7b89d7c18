"""Which trials a sweep has, and what is refused before anything is written."""

import dataclasses

import optuna
import pytest

from dsmoe import config as config_lib
from dsmoe.sweeps import draws, space
from dsmoe.sweeps.record import Planned
from tests.regenerate_golden import load

BASE = load("tiny")
FIELDS = config_lib.to_dict(BASE)


def of_grid(*texts, num_seeds=1):
  return space.of_points(BASE, space.grid(texts, BASE), num_seeds, "--grid")


def of_points(*points, num_seeds=1):
  return space.of_points(BASE, points, num_seeds, "sweep(add)")


def test_a_grid_has_every_combination_with_every_seed():
  made = of_grid("optim.learning_rate=1e-3, 3e-3", "model.n_group=2,4,8", num_seeds=2)
  assert made.fields == ("model.n_group", "optim.learning_rate")
  expected, point = [], 0
  for rate in (0.001, 0.003):
    for groups in (2, 4, 8):
      for seed in (0, 1):
        expected.append(
          Planned(point, seed, {"optim.learning_rate": rate, "model.n_group": groups})
        )
      point += 1
  assert made.trials == expected


@pytest.mark.parametrize(
  ("text", "values"),
  [
    ("optim.learning_rate=1,2e-3", [1.0, 0.002]),
    ("optim.schedule=cosine,wsd", ["cosine", "wsd"]),
    ("model.tie_word_embeddings=true,False", [True, False]),
    ("model.q_lora_rank=none,32", [None, 32]),
    ("model.kernels.attention=none,xla", [None, "xla"]),
    ("balance.methods=[bias],[bias,sequence],('sequence',)", [["bias"], ["bias", "sequence"], ["sequence"]]),
    ("data.train_weights=[1.0,2e-3],(1,3)", [[1.0, 0.002], [1.0, 3.0]]),
    ("data.text_field=1,none", ["1", "none"]),
    ("data.validation_globs=[my texts/a b.txt,/data/x],['a, b]',c],[it's],(../c,)", [["my texts/a b.txt", "/data/x"], ["a, b]", "c"], ["it's"], ["../c"]]),
  ],
)  # fmt: skip
def test_values_are_read_as_the_field_has_them(text, values):
  base = BASE
  if "weights" in text:
    data = dataclasses.replace(base.data, train_globs=("a", "b"), train_weights=(1.0, 1.0))
    base = dataclasses.replace(base, data=data)
  made = space.of_points(base, space.grid([text], base), 1, "--grid")
  field = text.partition("=")[0]
  assert [trial.params[field] for trial in made.trials] == values
  assert [type(trial.params[field]) for trial in made.trials] == [type(v) for v in values]


def test_a_seed_in_a_point_makes_its_trials_seeds_of_one_point():
  made = of_grid("seed=4,7", "batch_size=8,16")
  assert made.trials == [
    Planned(0, 4, {"batch_size": 8}),
    Planned(1, 4, {"batch_size": 16}),
    Planned(0, 7, {"batch_size": 8}),
    Planned(1, 7, {"batch_size": 16}),
  ]
  with pytest.raises(ValueError, match=r"--seeds \(2\) must be 1 where --grid sets the field seed"):
    of_grid("seed=4,7", num_seeds=2)


def test_the_experiments_own_grid():
  def sweep(add):
    for groups in (2, 4):
      add(batch_size=16, **{"model.n_group": groups})

  made = of_points(*space.added(sweep), num_seeds=2)
  assert [trial.params["model.n_group"] for trial in made.trials] == [2, 2, 4, 4]
  assert space.config_of(FIELDS, made.trials[3].params | {"seed": 9}) == dataclasses.replace(
    BASE, seed=9, batch_size=16, model=dataclasses.replace(BASE.model, n_group=4)
  )


def test_a_list_of_points(tmp_path):
  path = tmp_path / "points.jsonl"
  path.write_text('{"optim.learning_rate": 0.001}\n\n{"balance.methods": ["bias"]}\n')
  made = of_points(*space.listed(path))
  assert [trial.params for trial in made.trials] == [
    {"optim.learning_rate": 0.001},
    {"balance.methods": ["bias"]},
  ]
  text = '{"data.text_field": "a\u2028b\u0085c"}\r\n'  # JSON allows both raw in a text
  path.write_text("\ufeff" + text, encoding="utf-8")
  assert space.listed(path) == [{"data.text_field": "a\u2028b\u0085c"}]
  twice = '{"batch_size": 8, "batch_size": 16}'
  refused = (("[1]", "map fields"), ("{", "be JSON"), (twice, "be JSON: a field is given twice"))
  for line, message in ((line, f"line 2 .* must {words}") for line, words in refused):
    path.write_text(f'{{"batch_size": 8}}\n{line}\n')
    with pytest.raises(ValueError, match=message):
      space.listed(path)
  path.write_bytes(b'{"batch_size": 8}\n\xff')
  with pytest.raises(ValueError, match=r"the file of --points must be UTF-8, .*jsonl is not"):
    space.listed(path)
  path.write_text("[" * 100_000)
  with pytest.raises(ValueError, match=r"line 1 .* must be JSON"):
    space.listed(path)


@pytest.mark.parametrize(
  ("point", "message"),
  [
    ({"optim.lr": 1.0}, "config.optim has no field 'lr'; did you mean '.*'"),
    ({"optimizer.lr": 1.0}, "config has no field 'optimizer'; did you mean 'optim'"),
    ({"seed.x": 1}, "seed is a value and has no field 'x'"),
    ({"optim": {"beta1": 0.5}}, "it is a group of fields, .*: optim"),
    ({"batch_size": 1.5}, "config.batch_size must be int, got 1.5 of type float"),
    ({"optim.schedule": "linear"}, "schedule must be one of cosine, wsd, got 'linear'"),
    (
      {"model.n_group": 3, "batch_size": 8},
      r"n_routed_experts \(16\) must be divisible by n_group",
    ),
    ({}, "a point must map at least one config field to a value"),
    ({3: 4}, "a point's fields must be names such as"),
  ],
)
def test_points_that_make_no_config_are_refused(point, message):
  with pytest.raises(ValueError, match=message):
    of_points({"optim.learning_rate": 0.5}, point)
  if len(point) == 2:
    with pytest.raises(
      ValueError, match=r"the point model.n_group=3, batch_size=8 must make a config"
    ):
      of_points(point)


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: of_points(), r"at least one point, and sweep\(add\) gives none"),
    (lambda: of_grid("batch_size"), "--grid must be FIELD=VALUE,VALUE,..., got 'batch_size'"),
    (lambda: of_grid("batch_size=4", "batch_size=8"), "each field once, got batch_size twice"),
    (lambda: of_grid("batch_size=8,8"), "each point once, got batch_size=8 twice"),
    (lambda: of_grid("optim.learning_rate=1,1.0"), "each point once"),
    (lambda: of_grid("balance.methods=[bias,sequence"), "methods must be a tuple, got '.bias,sequence'"),
    (lambda: of_grid("batch_size={3: 4}"), "batch_size must be int, got '{3: 4}' of type str"),
    (lambda: of_grid("batch_size=4", num_seeds=0), "--seeds must be at least 1, got 0"),
    (
      lambda: of_grid("seed=" + ",".join(map(str, range(101))), "batch_size=" + ",".join(map(str, range(100)))),
      "at most 10,000 points, got 10,100: 101 of seed x 100 of batch_size",
    ),
    (
      lambda: of_grid("batch_size=8,16", num_seeds=5001),
      "at most 10,000 trials, got 2 points of --grid with 5001 seeds each",
    ),
  ],
)  # fmt: skip
def test_spaces_that_are_refused(make, message):
  with pytest.raises(ValueError, match=message):
    make()


def search(trial):
  """A space with a parameter that only some points have."""
  point = {"optim.learning_rate": trial.suggest_float("rate", 1e-4, 1e-2, log=True)}
  if trial.suggest_categorical("grouped", [True, False]):
    groups = trial.suggest_categorical("groups", [2, 4])
    point |= {"model.n_group": groups, "model.topk_group": groups // 2}
  return point


def test_a_search_is_drawn_from_what_is_known():
  probed = list(draws.probe(search))
  made = space.of_search(BASE, search, 3, 2, probed)
  assert made.trials == [Planned(point, seed, None) for point in range(3) for seed in range(2)]
  assert made.fields == ("model.n_group", "model.topk_group", "optim.learning_rate")
  assert [point for _, point in draws.probe(search)] == [point for _, point in probed]
  assert {len(point) for point in made.draws} == {1, 3}
  history = []
  for number in range(14):
    frozen, point = draws.draw(search, history, number)
    again, same = draws.draw(search, history, number)
    assert point == same and frozen.params == again.params
    frozen.state = type(frozen.state).COMPLETE
    frozen.values, frozen.datetime_complete = [point["optim.learning_rate"]], frozen.datetime_start
    history.append(frozen)
  rates = [trial.values[0] for trial in history]
  assert sum(rates[10:]) / 4 < sum(rates[:10]) / 10  # it has learned that lower is better


@pytest.mark.parametrize(
  "search, message",
  [
    (lambda trial: {"batch_size": 4}, "must have at least one parameter, and .* suggests none"),
    (lambda trial: trial.suggest_int("b", 1, 9), "must return the config fields that it sets"),
    (lambda trial: 1 / 0, "must draw a point, and raised ZeroDivisionError: division by zero"),
  ],
)
def test_only_what_a_search_does_wrong_is_blamed_on_it(monkeypatch, search, message):
  with pytest.raises(draws.SearchError, match=message):
    draws.draw(search, [], 1)

  def ask(self):
    raise OSError("the storage has no room")

  monkeypatch.setattr(optuna.Study, "ask", ask)
  with pytest.raises(OSError, match="no room"):
    draws.draw(search, [], 1)


@pytest.mark.parametrize(
  ("wrong", "message"),
  [
    (lambda trial: {}, "must have at least one parameter, and <lambda>.trial. suggests none"),
    (
      lambda trial: trial.suggest_int("batch_size", 1, 9),
      "must return the config fields .* got [1-9]",
    ),
    (
      lambda trial: {"batch_size": trial.suggest_float("b", 1, 9)},
      "config.batch_size must be int, got",
    ),
    (
      lambda trial: {"seed": trial.suggest_int("seed", 1, 9)},
      "must leave the field seed to --seeds, got [1-9]",
    ),
  ],
)
def test_searches_that_are_refused(wrong, message):
  with pytest.raises(ValueError, match=message):
    space.of_search(BASE, wrong, 3, 1, draws.probe(wrong))
