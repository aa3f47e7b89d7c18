"""python -m dsmoe.train whose sixth batch or sixth step never comes; for the test of the watchdog.

python tests/hanging_run.py data|step --config=... --workdir=...
"""

import itertools
import sys
import threading

from absl import flags

from dsmoe import train
from dsmoe.data import batches as data
from dsmoe.reporting import output


def wait_for_ever():
  threading.Event().wait()


def main() -> None:
  what = sys.argv.pop(1)
  number = itertools.count(1)
  fetch, train_iterator = train.fetch, data.train_iterator

  def fetch_five(step_metrics):
    if next(number) > 5:
      wait_for_ever()
    return fetch(step_metrics)

  def read_five(*args):
    yield from itertools.islice(train_iterator(*args), 5)
    wait_for_ever()

  if what == "step":
    train.fetch = fetch_five
  else:
    data.train_iterator = read_five
  flags.mark_flags_as_required(["config", "workdir"])
  output.run_script(train.main)


if __name__ == "__main__":
  main()
