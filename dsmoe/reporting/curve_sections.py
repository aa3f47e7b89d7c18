"""Curves of runs, over steps, tokens and FLOPs."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dsmoe.reporting import html, metrics
from dsmoe.reporting.html import charts
from dsmoe.reporting.run_files import RunFiles, flops_per_token, tokens_at


def curves(runs: Sequence[RunFiles]) -> html.Section:
  """Returns losses, learning rate and gradient norm over steps, tokens and FLOPs."""
  figures: list[html.Figure | None] = []
  for name, title, y_label, scale in (
    ("cross_entropy", "Training cross-entropy", "nats per token", "free"),
    ("mtp_loss", "Multi-token prediction loss", "nats per token", "free"),
    ("balance_loss", "Sequence-wise balance loss", "loss", "free"),
    ("z_loss", "z-loss", "nats²", "free"),
  ):
    figures.append(metric_figure(runs, name, title, y_label, scale, is_smoothed=True))
  figures[1:1] = [*_validation(runs), *differences(runs)]
  figures.append(
    metric_figure(runs, "learning_rate", "Learning rate", "learning rate", "from zero")
  )
  title = "Gradient norm before clipping"
  figures.append(metric_figure(runs, "grad_norm", title, "norm", "log", is_smoothed=True))
  return html.Section("Curves", [figure for figure in figures if figure is not None])


def validation_rows(runs: Sequence[RunFiles]) -> dict[Any, dict[str, list[dict]]]:
  """Returns the points of the validation curve by their rows of the validation set, and by run.

  Losses on two sets of rows do not compare. Where a run did not record which ones it took, they
  count as its own.
  """
  subsets: dict[Any, dict[str, list[dict]]] = {}
  for run in runs:
    for row in run.series.rows:
      if row.get("validation_loss") is not None:
        subset: Any = metrics.validation_curve(row)
        if None in subset:  # it cannot be known to be another run's
          subset = (*subset, run.name)
        subsets.setdefault(subset, {}).setdefault(run.name, []).append(row)
  return subsets


def _validation(runs: Sequence[RunFiles]) -> list[html.Figure]:
  """Returns a figure for each subset of the validation set."""
  subsets = validation_rows(runs)
  figures = []
  for number, (subset, rows_of) in enumerate(subsets.items(), 1):
    tokens = f" on {subset[0]:,} tokens" if subset[0] is not None else ""
    which = f", subset {number} of {len(subsets)}" if len(subsets) > 1 else ""
    own = [
      (run, np.array([r["step"] for r in rows]), np.array([r["validation_loss"] for r in rows]))
      for run in runs
      if (rows := rows_of.get(run.name))
    ]
    note = "Points on other rows of the validation set are in a figure of their own."
    figures.append(
      _over_axes(
        own,
        runs,
        f"Validation loss{tokens}{which}",
        "nats per token",
        "free",
        is_marked=True,
        note=note if len(subsets) > 1 else "",
      )
    )
  return figures


def differences(runs: Sequence[RunFiles]) -> list[html.Figure]:
  """Returns by how many percent losses of runs differ from the first one's, on the same text.

  A run has a line if its batches are the first run's, which their configs tell. Losses are compared
  at the steps that both logged, those of validation on the same rows.
  """
  first, *others = runs
  others = [run for run in others if _batches(run) is not None and _batches(run) == _batches(first)]
  figures = []
  for name, title in (
    ("cross_entropy", "Training cross-entropy"),
    ("validation_loss", "Validation loss"),
  ):
    base, own = _by_place(first, name), []
    for run in others:
      compared = _by_place(run, name)
      places = sorted(base.keys() & compared.keys(), key=lambda place: place[0])
      step_T = np.array([step for step, _ in places])
      percent_T = np.array([100 * (compared[p] - base[p]) / base[p] for p in places])
      if len(places) > 1:
        own.append((run, step_T, percent_T))
    if not own:
      continue
    means = [f"{run.name} {y_T[len(y_T) // 2 :].mean():+.3g}%" for run, _, y_T in own]
    is_single = name == "cross_entropy"  # of single steps, with the noise of each
    note = smoothing_note([len(y_T) for *_, y_T in own]) if is_single else ""
    note = f"{note} Mean of the later half of the points: {', '.join(means)}.".strip()
    figures.append(
      _over_axes(
        own,
        runs,
        f"{title}, difference from {first.name}",
        "percent",
        "free",
        is_smoothed=is_single,
        is_marked=not is_single,
        note=note,
      )
    )
  return figures


def _batches(run: RunFiles) -> Any:
  """Returns what decides which tokens a run's steps train on; None where its config is not known."""
  if run.config is None:
    return None
  text = {name: value for name, value in run.config["data"].items() if name != "cache_dir"}
  return run.config["batch_size"], run.config["model"]["vocab_size"], text


def _by_place(run: RunFiles, name: str) -> dict[tuple[int, Any], float]:
  """Returns the positive values of a loss by (step, rows of the validation set or None)."""
  rows = [row for row in run.series.rows if (row.get(name) or 0) > 0]
  is_training = name == "cross_entropy"
  return {
    (row["step"], None if is_training else metrics.validation_curve(row)): row[name] for row in rows
  }


def metric_figure(
  runs: Sequence[RunFiles],
  name: str,
  title: str,
  y_label: str,
  scale: str,
  is_smoothed: bool = False,
  factor: float = 1.0,
) -> html.Figure | None:
  """Returns a metric of all runs that have it; None if it is nowhere, or zero everywhere."""
  own = [(run, xy[0], xy[1] * factor) for run in runs if (xy := run.xy(name)) is not None]
  own = [one for one in own if one[2].ndim == 1]
  if not any(np.nan_to_num(y_T).any() for *_, y_T in own):
    return None
  note = ""
  if is_smoothed:
    note = smoothing_note([len(y_T) for *_, y_T in own])
  return _over_axes(own, runs, title, y_label, scale, is_smoothed=is_smoothed, note=note)


def _over_axes(
  own: Sequence[tuple[RunFiles, np.ndarray, np.ndarray]],
  runs: Sequence[RunFiles],
  title: str,
  y_label: str,
  scale: str,
  is_smoothed: bool = False,
  is_marked: bool = False,
  note: str = "",
) -> html.Figure:
  """Returns lines over steps, and over tokens and FLOPs where every one of the runs tells them."""
  keys = dict(zip((run.name for run in runs), charts.keys([run.name for run in runs])))
  axes: dict[str, tuple[str, Callable[[RunFiles, np.ndarray], np.ndarray | None]]] = {
    "steps": ("optimizer step", lambda run, step_T: step_T),
    "tokens": ("training tokens", tokens_at),
    "FLOPs": ("training FLOPs", _flops_at),
  }
  views = {}
  for label, (x_label, at) in axes.items():
    x_of = [at(run, step_T) for run, step_T, _ in own]
    if any(x_T is None for x_T in x_of):
      continue
    drawn = [
      charts.Line(x_T, y_T, keys[run.name], is_marked, is_smoothed)
      for x_T, (run, _, y_T) in zip(x_of, own)
      if x_T is not None
    ]
    views[label] = charts.lines(drawn, x_label, y_label, scale)
  legend = [keys[run.name] for run, *_ in own] if len(runs) > 1 else []
  ends = "; ".join(f"{run.name}: {ends_of(y_T)}" for run, _, y_T in own[:4])
  return html.Figure(title, f"{title} in {y_label}, line chart. {ends}", views, legend, note)


def smoothing_note(lengths: Sequence[int]) -> str:
  """Returns what the faint and the strong lines of series of these lengths are; "" without any."""
  if not (reach := max(map(charts.reach, lengths))):
    return ""
  note = f"Faint: each logged step. Strong: the mean of {2 * reach + 1} neighbouring points"
  return note + (
    " of the longest run, of the same share of the others." if len(lengths) > 1 else "."
  )


def _flops_at(run: RunFiles, step_T: np.ndarray) -> np.ndarray | None:
  tokens_T, flops = tokens_at(run, step_T), flops_per_token(run)
  return None if tokens_T is None or flops is None else tokens_T * flops


def ends_of(y_T: np.ndarray) -> str:
  finite = y_T[np.isfinite(y_T)]
  return f"from {finite[0]:.4g} to {finite[-1]:.4g}" if len(finite) else "no finite value"
