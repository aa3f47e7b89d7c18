"""Shows where the time of traced training steps went, by part of the model.

  python scripts/read_profile.py runs/tiny
  python scripts/read_profile.py runs/tiny --step=100 --plot=profile.png

A run traces steps with --config.profile.steps=FIRST:END. The argument is its workdir, or the folder of
one trace in it. For each part: the time of its operations forward, backward, recomputed by
rematerialisation, and other, of which no gradient is taken. Then, on the clock: when nothing ran, when
collectives ran and whether computations ran beside them, and the least time that the chip's published
peaks allow for the model's FLOPs, the program's memory traffic and its collectives.
"""

import rich.console
from absl import app, flags

from dsmoe.profiling import show, summary
from dsmoe.reporting import output

_STEP = flags.DEFINE_integer(
  "step", None, "First step of the trace to show, by default of the latest.", lower_bound=1
)
_PLOT = flags.DEFINE_string("plot", None, "PNG file for a picture of the parts.")
_JSON = output.define_json()


def main(argv: list[str]) -> None:
  if len(argv) != 2 or not argv[1].strip():
    raise app.UsageError("give one workdir, or one folder of a trace")
  found = summary.read(summary.find(argv[1], _STEP.value))
  output.write_json(_JSON.value, found)
  if _PLOT.value:
    show.draw(found, _PLOT.value)
  if _JSON.value == output.STDOUT:
    return
  console = rich.console.Console()
  console.print(f"{found['folder']}: {show.heading(found)}", markup=False, soft_wrap=True)
  for table in show.tables(found):
    console.print(table)
  for note in show.notes(found):
    console.print(note, markup=False, soft_wrap=True)


if __name__ == "__main__":
  output.run_script(main)
