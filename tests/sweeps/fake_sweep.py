"""A sweep that was never run: its record, its journal and its trials' curves."""

import json
import math

from etils import epath

from dsmoe.sweeps import record as record_lib
from dsmoe.sweeps import results
from dsmoe.sweeps import study as study_lib

FIELDS = ("balance.bias_update_speed", "optim.learning_rate")
STEPS = (20, 40, 60, 80)


def loss(params: dict, seed: int, step: int) -> float:
  """A curve that falls to the best loss at a learning rate of 2e-3; seeds differ by some 0.02."""
  rate = math.log10(params["optim.learning_rate"] / 2e-3) ** 2
  noise = 0.01 * math.sin(37.0 * seed + 11.0 * step)
  return 3.0 + 0.4 * rate + 5.0 * params["balance.bias_update_speed"] + 2.0 / step**0.5 + noise


def record(seeds=(0, 1, 2), name="fake") -> record_lib.Record:
  """Three learning rates by two speeds, each with every seed."""
  points = [
    {"optim.learning_rate": rate, "balance.bias_update_speed": speed}
    for rate in (5e-4, 2e-3, 8e-3)
    for speed in (0.001, 0.01)
  ]
  return record_lib.Record(
    name=name,
    identity="0123",
    objective="final validation_loss",
    storage="journal",
    experiment="",
    fields=FIELDS,
    trials=[
      record_lib.Planned(number, seed, params)
      for number, params in enumerate(points)
      for seed in seeds
    ],
    draws=[],
    pruner={"name": "none"},
    config={"seed": 0, "num_steps": STEPS[-1]},
    corpus="",
    code={},
  )


def make(workdir: epath.PathLike) -> results.Sweep:
  """Writes a sweep in which trials are of every state but running; returns what `results.read` reads.

  The first twelve trials are complete, the 13th was pruned, the 14th failed, the 15th was
  interrupted and the others wait.
  """
  workdir = epath.Path(workdir)
  workdir.mkdir(parents=True, exist_ok=True)
  plan = record()
  record_lib.write(workdir, plan)
  study = study_lib.Study(workdir, plan, creates=True)
  for number, (_, seed, params, _) in enumerate(plan.trials[:15]):
    trial = study.create(number, params, seed, None)
    steps = STEPS if number < 12 else STEPS[:2]
    write_curve(results.trial_folder(workdir, number), params, seed, steps)
    for step in steps:
      study.report(trial, step, loss(params, seed, step))
    notes = {"seconds": 10.0 + number, "flops": 1e12}
    if number < 12:
      study.set_state(trial, "complete", loss(params, seed, STEPS[-1]), **notes)
    elif number == 12:
      study.set_state(trial, "pruned", **notes)
    elif number == 13:
      study.set_state(trial, "failed", error="the loss of step 41 must be finite, got nan", **notes)
  return results.read(workdir)


def write_curve(folder: epath.Path, params: dict, seed: int, steps) -> None:
  """Writes a run's metrics.jsonl with the points of its validation curve."""
  folder.mkdir(parents=True, exist_ok=True)
  lines = [
    {"step": step, "tokens": 2048 * step, "validation_loss": loss(params, seed, step)}
    for step in steps
  ]
  (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
