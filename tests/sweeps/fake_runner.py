"""A runner of a sweep whose trials only sleep, for the tests of killing.

  python tests/sweeps/fake_runner.py SWEEP MACHINE NUM_WORKERS STORAGE

SWEEP/space.json has the points, or how many a search draws, and the number of seeds; STORAGE is ""
for the journal.
"""

import importlib
import json
import sys

from etils import epath

from dsmoe import config as config_lib
from dsmoe.sweeps import begin, draws, live, record, results, runner, space
from dsmoe.sweeps import storage as storage_lib
from dsmoe.sweeps.devices import Slot

ROOT = epath.Path(__file__).resolve().parent.parent.parent


def search(trial):
  """Draws both fields."""
  return {
    "optim.learning_rate": trial.suggest_float("rate", 1e-4, 1e-1, log=True),
    "balance.bias_update_speed": trial.suggest_float("speed", 0.0, 0.1),
  }


def config() -> config_lib.Config:
  """Returns the config that the trials start from."""
  return config_lib.from_config_dict(
    importlib.import_module("tests.configs.short_run").get_config()
  )


def record_of(found: space.Space, base: config_lib.Config, **changes) -> record.Record:
  """Returns the record of a sweep of a space, whose trials start from the config `base`."""
  return record.Record(
    name="made",
    identity="89",
    objective="final validation_loss",
    storage="journal",
    experiment=str(epath.Path(__file__).resolve()) if found.draws else "",
    fields=found.fields,
    trials=found.trials,
    draws=found.draws,
    pruner={"name": "none"},
    config=config_lib.to_dict(base),
    corpus="",
    code={},
  )._replace(**changes)


def main(workdir: str, machine: str, num_workers: str, storage: str) -> int:
  folder, base = epath.Path(workdir), config()
  wanted, num_seeds, max_restarts = json.loads((folder / "space.json").read_text())
  if isinstance(wanted, int):
    found = space.of_search(base, search, wanted, num_seeds, draws.probe(search))
  else:
    found = space.of_points(base, wanted, num_seeds, "space.json")
  kind = storage_lib.kind_of(storage or None)
  made = record_of(found, base, name=folder.name, identity=workdir, storage=kind)
  made, opened = begin.begin(folder, storage or None, base, made, print)
  slots = [Slot(f"{machine}-{number}", {}, ()) for number in range(int(num_workers))]
  received = runner.run(
    folder,
    storage or None,
    slots,
    folder / "logs",
    max_restarts,
    60.0,
    lambda said: print(live.heading(results.of(folder, made, opened), {}), flush=True),
    lambda text: print(text, flush=True),
    (sys.executable, str(ROOT / "tests" / "sweeps" / "fake_run.py")),
  )
  return 3 if received else 0


if __name__ == "__main__":
  sys.exit(main(*sys.argv[1:]))
