"""python -m dsmoe.train whose process 1 stops the run at its first point; prints each one's result."""

import jax
from absl import flags

from dsmoe import train
from dsmoe.reporting import output


def stopped(*args):
  run = train.points(*args)
  next(run)
  if jax.process_index() == 1:
    result = train.stop(run, "pruned")
  else:
    try:
      next(run)
    except StopIteration as end:
      result = end.value
  print(f"result: {result.step} {result.why}", flush=True)
  return result


if __name__ == "__main__":
  train.train = stopped
  flags.mark_flags_as_required(["config", "workdir"])
  output.run_script(train.main)
