"""The table with which a run ends."""

from etils import epath

from dsmoe.config import Config
from dsmoe.data import sources
from dsmoe.reporting import goodput, metrics, progress

SAMPLE_FILE = "sample.txt"  # in the workdir: what the model wrote at the end


def figures(workdir: epath.PathLike) -> list[tuple[str, str]]:
  """Returns a run's figures, from its files, as (name, value) pairs for `progress.final_table`.

  They are [] when metrics.jsonl has no whole line. What is wrong with a damaged goodput log is said
  in the place of its account: it is no reason for a run that has trained to fail.
  """
  rows = progress.summary(metrics.iter_metrics(workdir))
  if not rows:
    return []
  try:
    return rows + goodput.rows(workdir)
  except ValueError as error:
    return [*rows, ("wall time", str(error))]


def rows(config: Config, workdir: epath.Path) -> list[tuple[str, str]]:
  """Returns the figures, those of compressors on the same text, and where the files are."""
  rows = figures(workdir)
  if "synthetic" not in config.data.validation_globs and config.data.validation_globs:
    documents = sources.validation_documents(config.data)
    for name, bits in sources.compressed_bits_per_byte(documents).items():
      rows.append((f"{name}, bits per byte", f"{bits:.3f}"))
  if config.log.plots:
    from dsmoe.reporting import plots  # matplotlib would be a fifth of what a run imports

    rows += [("plot", str(path)) for path in plots.draw(workdir)]
  rows.append(("checkpoints", str(workdir / "checkpoints")))
  rows.append(("metrics", str(workdir / metrics.METRICS_FILE)))
  return rows
