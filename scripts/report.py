"""Reports on runs: a table and plots of each, and one HTML page about all of them together.

python scripts/report.py runs/tiny
python scripts/report.py runs/one runs/other --out=report.html --price_per_device_hour=2.5
python scripts/report.py runs/sweep

The page is one file that needs no network. Without --out it is report.html in the workdir of a
single run, and in the current folder for several. A run that cannot be read is named and left out.
The page of a sweep begins with its verdict, and goes on with the runs of its best settings.
"""

import sys
import time
from collections.abc import Sequence

from absl import app, flags
from etils import epath
from rich import console

from dsmoe.reporting import final, html, output, plots, progress, run_files, run_sections
from dsmoe.sweeps import live, record, results
from dsmoe.sweeps import plots as sweep_plots
from dsmoe.sweeps import progress as sweep_progress
from dsmoe.sweeps import sections as sweep_sections

_WORKDIR = flags.DEFINE_string(
  "workdir", None, "The folder of a run, on disk or gs://; more may be given without a flag."
)
_OUT = flags.DEFINE_string("out", None, "The HTML file to write.")
_PAGE = flags.DEFINE_bool("page", True, "Whether to write the HTML page.")
_PLOTS = flags.DEFINE_bool("plots", True, "Whether to redraw the plots as PNG files.")
_PRICE = flags.DEFINE_float(
  "price_per_device_hour", None, "What a device costs an hour, in any currency.", lower_bound=0.0
)
_STORAGE = flags.DEFINE_string(
  "storage", None, "The PostgreSQL server that a sweep began with; none for a sweep's own journal."
)


def sweep_of(workdirs: Sequence[epath.Path]) -> results.Sweep | None:
  """Returns the sweep that is the only workdir; None if none of them is one.

  Raises:
    app.UsageError: for a sweep among other workdirs, and --storage without a sweep.
  """
  found = [workdir for workdir in workdirs if record.exists(workdir)]
  if found and len(workdirs) > 1:
    raise app.UsageError(f"a sweep must be reported on by itself, got {found[0]} and others")
  if not found and _STORAGE.value is not None:
    raise app.UsageError("--storage goes with a sweep's workdir, which has sweep.json")
  return results.read(found[0], _STORAGE.value) if found else None


def read(workdirs: Sequence[epath.Path]) -> tuple[list[run_files.RunFiles], list[str]]:
  """Returns the runs that can be read, and a sentence about each of the others."""
  runs, sentences = [], []
  for workdir, name in zip(workdirs, run_files.names(workdirs)):
    try:
      runs.append(run_files.read(workdir, name))
    except (ValueError, OSError) as error:
      sentences.append(str(error))
  return runs, sentences


def page(
  runs: Sequence[run_files.RunFiles],
  sentences: Sequence[str],
  price_per_device_hour: float | None,
  more: Sequence[html.Section] = (),
  title: str = "",
) -> str:
  """Returns the HTML page about runs.

  Args:
    runs: at least one, or none where there are other sections.
    sentences: about runs that are left out.
    price_per_device_hour: None: no price is stated.
    more: sections to begin with, such as those about the sweep that the runs belong to.
    title: of the page; "": it names the run, or says how many there are.
  """
  sections = [*more, *(run_sections.of_runs(runs, price_per_device_hour) if runs else [])]
  if sentences:
    sections.append(html.Section("Runs that could not be read", list(sentences)))
  title = title or (f"Run {runs[0].name}" if len(runs) == 1 else f"{len(runs)} runs")
  return html.page(title, sections, ", ".join(str(run.workdir) for run in runs))


def report_on(sweep: results.Sweep, workdir: epath.Path, out: epath.Path) -> None:
  """Prints the table of a sweep, writes its page and draws its plots."""
  found = sweep_progress.Follower().poll(sweep, time.time())
  console.Console().print(live.render(sweep, found))
  if _PAGE.value:
    print("making the page", file=sys.stderr)
    runs, sentences = read(sweep_sections.best_runs(sweep))
    more = sweep_sections.of_sweep(sweep, _PRICE.value, progress=found)
    out.write_text(page(runs, sentences, _PRICE.value, more, f"Sweep {sweep.name}"))
    print(out)
  if _PLOTS.value:
    print("drawing the plots", file=sys.stderr)
    for path in sweep_plots.draw(sweep, workdir):
      print(path)


def main(argv: list[str]) -> None:
  names = [*([] if _WORKDIR.value is None else [_WORKDIR.value]), *argv[1:]]
  if not names:
    raise app.UsageError("the workdir of at least one run must be given")
  if not all(name.strip() for name in names):
    raise app.UsageError("--workdir must not be empty")
  workdirs = [epath.Path(name) for name in dict.fromkeys(names)]
  out = epath.Path(
    _OUT.value or (workdirs[0] / "report.html" if len(workdirs) == 1 else "report.html")
  )
  if _PAGE.value and _OUT.value and not out.parent.is_dir():
    raise app.UsageError(f"the folder of --out must exist, there is no {out.parent}")
  if (sweep := sweep_of(workdirs)) is not None:
    return report_on(sweep, workdirs[0], out)
  runs, sentences = read(workdirs)
  if not runs:
    raise ValueError("; ".join(sentences))
  for sentence in sentences:
    print(f"left out: {sentence}", file=sys.stderr)
  for run in runs:
    table = progress.final_table(final.figures(run.workdir), title=str(run.workdir))
    console.Console().print(table)
  if _PAGE.value:
    print("making the page", file=sys.stderr)
    out.write_text(page(runs, sentences, _PRICE.value))
    print(out)
  if _PLOTS.value:
    print("drawing the plots", file=sys.stderr)
  for run in runs:
    for path in plots.draw(run.workdir) if _PLOTS.value else []:
      print(path)


if __name__ == "__main__":
  output.run_script(main)
