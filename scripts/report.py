"""Redraws a run's plots and prints its final table, from its metrics.jsonl alone.

python scripts/report.py --workdir=runs/tiny
"""

from absl import app, flags
from etils import epath
from rich import console

from dsmoe.reporting import metrics, output, plots, progress

_WORKDIR = flags.DEFINE_string(
  "workdir", None, "The run's folder, on disk or gs://.", required=True
)
_PLOTS = flags.DEFINE_bool("plots", True, "Whether to redraw the plots.")


def main(argv: list[str]) -> None:
  output.refuse_arguments(argv)
  if not _WORKDIR.value.strip():
    raise app.UsageError("--workdir must not be empty")
  workdir = epath.Path(_WORKDIR.value)
  if not (workdir / metrics.METRICS_FILE).exists():
    raise app.UsageError(f"--workdir={workdir} must hold {metrics.METRICS_FILE}, it does not")
  pairs = progress.summary(metrics.iter_metrics(workdir))
  if not pairs:
    raise app.UsageError(f"{workdir / metrics.METRICS_FILE} must have a whole line, it has none")
  console.Console().print(progress.final_table(pairs, title=str(workdir)))
  for path in plots.draw(workdir) if _PLOTS.value else []:
    print(path)


if __name__ == "__main__":
  output.run_script(main)
