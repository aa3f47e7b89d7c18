"""Follows runs live from their files, on disk or on gs://.

  python scripts/watch.py runs/tiny runs/wide
  python scripts/watch.py --once runs/*

The arguments are workdirs. The table shows them in this order: the step, the last loss and validation
loss, the speed, rows that exchanges dropped in all steps, the time left, and the state (starting,
running, silent for long, stopped by a signal or an error, finished) with when the run last wrote. What
no run has is left out, and in a narrow terminal the bars, then MFU and speed. It ends when all runs have finished, or with Ctrl-C.
"""

import contextlib
import time

import rich.console
import rich.live
from absl import app, flags
from etils import epath

from dsmoe.reporting import output, watch

_EVERY = flags.DEFINE_float(
  "every", 5.0, "Seconds between two looks at the files.", lower_bound=0.1, upper_bound=86400
)
_ONCE = flags.DEFINE_bool("once", False, "Print one table and end; --json does so too.")
_JSON = output.define_json()


def workdirs(arguments: list[str], is_once: bool) -> list[str]:
  """Returns the workdirs to follow, each once; some of them may appear later."""
  found = list(dict.fromkeys(name.rstrip("/") or name for name in arguments))
  if not found or not all(name.strip() for name in found):
    raise app.UsageError("give one workdir or several")
  missing = [name for name in found if not epath.Path(name).exists()]
  if missing and (is_once or missing == found):
    raise app.UsageError(f"a workdir must be a folder, there is no {', '.join(missing)}")
  return found


def follow(console: rich.console.Console, runs: list[watch.Run]) -> None:
  """Shows the runs until all have finished."""
  is_live = console.is_terminal and not console.is_dumb_terminal
  with contextlib.ExitStack() as stack:
    live = rich.live.Live(console=console, auto_refresh=False)
    if is_live:
      stack.enter_context(live)
    while True:
      statuses = [run.poll(time.time()) for run in runs]
      if is_live:
        live.update(watch.table(statuses, console.width), refresh=True)
      else:
        console.print(watch.table(statuses, console.width))
      if all(status.state == "finished" for status in statuses):
        return
      time.sleep(_EVERY.value)


def main(argv: list[str]) -> None:
  is_once = _ONCE.value or _JSON.value is not None
  runs = [watch.Run(name) for name in workdirs(argv[1:], is_once)]
  console = rich.console.Console()
  if not is_once:
    with contextlib.suppress(KeyboardInterrupt):
      follow(console, runs)
    return
  statuses = [run.poll(time.time()) for run in runs]
  output.write_json(_JSON.value, [status._asdict() for status in statuses])
  if _JSON.value != output.STDOUT:
    console.print(watch.table(statuses, console.width))


if __name__ == "__main__":
  output.run_script(main)
