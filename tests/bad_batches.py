"""python -m dsmoe.train on data of which some batches give a loss that is not finite.

python tests/bad_batches.py 4,7 --config=... --workdir=...

The numbers are those of batches in the run, from 0. Only the last row of such a batch is bad, so that
of several processes the last one alone reads it.
"""

import sys

import numpy as np
from absl import flags

from dsmoe import train
from dsmoe.data import batches
from dsmoe.reporting import output


def main() -> None:
  bad = {int(number) for number in sys.argv.pop(1).split(",")}
  train_iterator = batches.train_iterator

  def with_bad_rows(prepared, config, batch_size, part, parts, position):
    number = position.sequences // batch_size
    for batch in train_iterator(prepared, config, batch_size, part, parts, position):
      if number in bad and part == parts - 1:
        batch["weights"] = np.array(batch["weights"])
        batch["weights"][-1] *= np.nan
      number += 1
      yield batch

  batches.train_iterator = with_bad_rows
  flags.mark_flags_as_required(["config", "workdir"])
  output.run_script(train.main)


if __name__ == "__main__":
  main()
