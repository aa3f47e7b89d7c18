"""Runs dsmoe.train and notes every training row that this process reads: its number and a digest.

The file to which lines of JSON are added is named by the variable ROWS_FILE.
"""

import hashlib
import json
import os
import runpy

from dsmoe.data import batches

_train_iterator = batches.train_iterator


def recorded(prepared, config, batch_size, part, parts, position):
  """Yields what `train_iterator` does, with each row's number in the run as the loop takes it."""
  rows = batch_size // parts
  first = position.sequences + part * rows
  for batch in _train_iterator(prepared, config, batch_size, part, parts, position):
    with open(os.environ["ROWS_FILE"], "a") as file:
      for row in range(rows):
        content = b"".join(batch[name][row].tobytes() for name in sorted(batch))
        digest = hashlib.sha256(content).hexdigest()
        file.write(json.dumps([first + row, digest]) + "\n")
    first += batch_size
    yield batch


batches.train_iterator = recorded
if __name__ == "__main__":
  runpy.run_module("dsmoe.train", run_name="__main__", alter_sys=True)
