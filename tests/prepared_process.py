"""A Python process that has imported everything, and runs programs in forks of itself.

A script takes seconds to import JAX, Orbax and Matplotlib. This process does it once and then reads
lines of JSON from stdin: {"args": what follows `python`, "out": file, "err": file}. For each it runs
the program in a fork, whose output goes to those files, and writes the exit code to stdout. Use it
as `runs.call`.
"""

import gc
import importlib
import json
import os
import pkgutil
import runpy
import signal
import sys
import warnings

import dsmoe

LIMIT_SECS = 600


def run(args: list[str]) -> None:
  """Runs `-m module ...` or `file.py ...` as Python itself does."""
  if args[0] == "-m":
    sys.argv = args[1:]
    runpy.run_module(args[1], run_name="__main__", alter_sys=True)
  else:
    sys.argv = args
    sys.path[0] = os.path.dirname(os.path.abspath(args[0]))
    runpy.run_path(args[0], run_name="__main__")


def main() -> None:
  warnings.filterwarnings("ignore", message="os.fork")  # no thread has been started
  for module in pkgutil.walk_packages(dsmoe.__path__, "dsmoe."):
    # dsmoe.train defines flags; what an extra lacks here is imported, and refused, by the program.
    if module.name != "dsmoe.train":
      try:
        importlib.import_module(module.name)
      except ImportError:
        continue
  # A fork that goes through what was imported, and so copies its pages, as Python does several times
  # when it ends, takes a second of a core; of what is frozen it goes through nothing.
  gc.collect()
  gc.freeze()
  for line in sys.stdin:
    task = json.loads(line)
    child = os.fork()
    if child == 0:
      signal.alarm(LIMIT_SECS)
      for descriptor, path in ((0, os.devnull), (1, task["out"]), (2, task["err"])):
        opened = os.open(path, os.O_RDWR | os.O_CREAT)
        os.dup2(opened, descriptor)
      return run(task["args"])
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
  main()
