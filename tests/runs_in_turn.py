"""Trains short runs one after the other in one process, and prints what each leaves in it.

python tests/runs_in_turn.py SEED=WORKDIR...

A line of JSON a run: the bytes of arrays that are alive, the names of threads, and the handlers of
signals.
"""

import dataclasses
import gc
import json
import signal
import sys
import threading
import time

import jax

from dsmoe import config as config_lib
from dsmoe import train
from tests.configs import short_run


def main() -> None:
  config = config_lib.from_config_dict(short_run.get_config())
  for argument in sys.argv[1:]:
    seed, workdir = argument.split("=", 1)
    result = train.train(dataclasses.replace(config, seed=int(seed), num_steps=7), workdir)
    assert result.why == "finished", result
    gc.collect()
    end = time.monotonic() + 60
    while threading.active_count() > 1 and time.monotonic() < end:  # threads that were told to end
      time.sleep(0.01)
    left = {
      "array_bytes": sum(array.nbytes for array in jax.live_arrays()),
      "threads": sorted(thread.name for thread in threading.enumerate()),
      "handlers": [str(signal.getsignal(n)) for n in (signal.SIGINT, signal.SIGTERM)],
    }
    print("left: " + json.dumps(left), flush=True)


if __name__ == "__main__":
  main()
