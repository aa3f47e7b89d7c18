"""Draws the pictures of a sweep's report as PNG files, for papers and for pages that take no SVG."""

import io

from etils import epath
from matplotlib import figure

from dsmoe.sweeps import dependent, figures, importance, live, verdict
from dsmoe.sweeps.results import Sweep

_DOTS_PER_INCH = 150


def draw(sweep: Sweep, workdir: epath.PathLike) -> list[epath.Path]:
  """Draws what the sweep allows into <workdir>/plots, replacing earlier pictures.

  Returns:
    The PNG files: ranking, parallel_coordinates, importance and against_<field>; none before a trial is complete.
  """
  sweep, _ = dependent.without(sweep)
  ranking = verdict.rank(sweep.trials)
  fields = [field for field in sweep.fields if field != "seed"]
  names = live.short_names(fields)
  fields = verdict.fields_of(ranking, fields)
  pictures: dict[str, figure.Figure] = {}
  if ranking.ranked:
    pictures["ranking"] = figures.ranking(ranking)
    pictures["parallel_coordinates"] = figures.parallel(ranking, fields, names)
    pictures |= {f"against_{field}": figures.against(ranking, field)[0] for field in fields}
  if shares := importance.importances(sweep.trials, fields):
    pictures["importance"] = figures.importance(shares, names)
  paths = []
  for name, picture in pictures.items():
    buffer = io.BytesIO()
    picture.savefig(buffer, format="png", dpi=_DOTS_PER_INCH)
    path = epath.Path(workdir) / "plots" / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(buffer.getvalue())
    paths.append(path)
  return paths
