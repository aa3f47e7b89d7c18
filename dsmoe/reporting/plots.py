"""Draws the plots of a run from its metrics.jsonl alone, and rooflines of kernels.

L is the number of MoE layers, T the number of logged steps.
"""

import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from etils import epath
from matplotlib import collections as mpl_collections
from matplotlib import colors, figure, ticker

from dsmoe.reporting import metrics, series

_DOTS_PER_INCH = 110
# Points of validation, drawn larger and never averaged.
_MARKS = {"validation_loss": "o--", "whole_validation_loss": "D"}


def draw(workdir: epath.PathLike) -> list[epath.Path]:
  """Draws what the metrics allow into <workdir>/plots, replacing earlier pictures.

  Args:
    workdir: of a run; holds metrics.jsonl.

  Returns:
    The PNG files: losses, learning_rate, throughput, expert_load, router_bias and balance, except
    those without data.

  Raises:
    FileNotFoundError, ValueError: see `metrics.read_metrics`.
  """
  workdir = epath.Path(workdir)
  run = series.Run(metrics.iter_metrics(workdir))
  paths = []
  for name, make in _PLOTS.items():
    picture = make(run)
    if picture is None:
      continue
    buffer = io.BytesIO()
    picture.savefig(buffer, format="png", dpi=_DOTS_PER_INCH)
    path = workdir / "plots" / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(buffer.getvalue())
    paths.append(path)
  return paths


class _Panel(NamedTuple):
  title: str
  label: str  # of the y axis
  scale: str  # free | from zero | log
  lines: list[tuple[str, str]]  # metric, legend


def _draw_losses(run: series.Run) -> figure.Figure | None:
  main = [("loss", "train loss, all terms"), ("cross_entropy", "train cross-entropy")]
  main += [("validation_loss", "validation loss")]
  (curve, whole) = (run.series(name) for name in _MARKS)
  if whole is not None and (curve is None or whole[1][-1] != curve[1][-1]):
    main += [("whole_validation_loss", "validation loss, whole set")]
  panels = [_Panel("Loss", "nats per token", "free", main)]
  for name, title, label in (
    ("mtp_loss", "Multi-token prediction loss", "nats per token"),
    ("balance_loss", "Sequence-wise balance loss", "loss (no unit)"),
    ("z_loss", "z-loss", "loss (nats²)"),
  ):
    if (xy := run.series(name)) is not None and xy[1].any():
      panels.append(_Panel(title, label, "free", [(name, title)]))
  return _draw_lines(run, panels)


def _draw_learning_rate(run: series.Run) -> figure.Figure | None:
  names = dict.fromkeys(name for row in run.rows for name in row)
  blocks = [(name, name[len("grad_norm/") :]) for name in names if name.startswith("grad_norm/")]
  panels = [
    _Panel("Learning rate", "learning rate", "from zero", [("learning_rate", "learning rate")]),
    _Panel("Global gradient norm, before clipping", "norm", "log", [("grad_norm", "all")]),
    _Panel("Gradient norm of each block", "norm", "log", blocks),
  ]
  return _draw_lines(run, panels)


def _draw_throughput(run: series.Run) -> figure.Figure | None:
  panels = [
    _Panel("Throughput", "tokens per second", "from zero", [("tokens_per_sec", "")]),
    _Panel("Arithmetic achieved", "GFLOP/s", "from zero", [("gflops_per_sec", "")]),
  ]
  if run.series("mfu") is not None:
    panels[1] = _Panel("Model FLOPs utilisation", "MFU (%)", "from zero", [("mfu", "")])
  return _draw_lines(run, panels)


def _lines(
  run: series.Run, name: str, legend: str
) -> list[tuple[str, str, np.ndarray, np.ndarray]]:
  """Returns (name, legend, steps, values) of a metric's line, or of each layer's."""
  if (xy := run.series(name)) is None:
    return []
  step_T, value = xy
  if value.ndim == 1:
    return [(name, legend, step_T, value)]
  return [(name, f"{legend} {i}", step_T, value[:, i]) for i in range(value.shape[1])]


def _draw_lines(run: series.Run, panels: list[_Panel]) -> figure.Figure | None:
  """Draws the panels that have data below each other."""
  found = []
  for title, label, scale, names in panels:
    lines = [line for n, legend in names for line in _lines(run, n, legend)]
    if lines:
      found.append((title, label, scale, lines))
  if not found:
    return None
  most = max(len(lines) for *_, lines in found)
  columns = math.ceil(most / 20) if most > 10 else 0  # of a legend beside its panel
  size = (9 + columns, 1.2 + 2.8 * len(found))
  picture = figure.Figure(figsize=size, layout="constrained")
  axes = picture.subplots(len(found), 1, sharex=True, squeeze=False)[:, 0]
  for ax, (title, label, scale, lines) in zip(axes, found):
    palette = matplotlib.colormaps["viridis"](np.linspace(0, 0.95, len(lines)))
    for i, (name, legend, step_T, value_T) in enumerate(lines):
      style = _MARKS.get(name) or _style(step_T)
      value_T = value_T * 100 if name == "mfu" else value_T
      color = f"C{i}" if len(lines) <= 10 else palette[i]
      if scale == "free" and len(value_T) >= series.SMOOTHED_POINTS and name not in _MARKS:
        ax.plot(step_T, value_T, color=color, linewidth=0.8, alpha=0.3)
        value_T = series.running_mean(value_T, len(value_T) // 20)
        legend += f", mean of {2 * (len(value_T) // 20) + 1} points"
      width = 3.5 if name == "loss" else 1.2  # else the cross-entropy, nearly equal, would hide it
      ax.plot(step_T, value_T, style, label=legend, color=color, linewidth=width, markersize=5)
    ax.set_title(title, fontsize=11)
    ax.set_ylabel(label)
    ax.grid(alpha=0.3)
    ax.xaxis.set_major_locator(_integers(10))
    if scale == "log" and all((line[3] > 0).any() for line in lines):
      ax.set_yscale("log")
      ax.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
      ax.yaxis.set_major_formatter("{x:g}")
      ax.yaxis.set_minor_formatter(ticker.NullFormatter())
    elif scale == "from zero":
      ax.set_ylim(0, 1.08 * ax.dataLim.ymax or 1)
    if len(lines) > 4:  # inside, it would hide some
      font, columns = (6, columns) if len(lines) > 10 else (8, 1)
      ax.legend(fontsize=font, ncols=columns, loc="center left", bbox_to_anchor=(1, 0.5))
    elif len(lines) > 1:
      ax.legend(fontsize=8)
  axes[-1].set_xlabel("optimizer step")
  return picture


def _draw_expert_load(run: series.Run) -> figure.Figure | None:
  if not run.wide["expert_counts"].sums:
    return None
  step_T, count_TLE = run.wide["expert_counts"].means()
  _, L, E = count_TLE.shape
  mean_TL1 = count_TLE.mean(axis=2, keepdims=True)
  load_TLE = count_TLE / np.where(mean_TL1 > 0, mean_TL1, np.nan)
  top = float(np.clip(np.nan_to_num(load_TLE).max(), 2.0, 4.0))
  norm = colors.TwoSlopeNorm(1.0, vmin=0.0, vmax=top)
  edge_T = _edges(step_T)
  picture, panels = _grid(L, "Expert load over mean load", "expert")
  for l, ax in enumerate(panels):
    border_E = np.arange(E + 1) - 0.5
    image = ax.pcolorfast(edge_T, border_E, load_TLE[:, l].T, cmap="RdBu_r", norm=norm)
    ax.set_ylim(E - 0.5, -0.5)
    ax.yaxis.set_major_locator(_integers(5))
  bar = picture.colorbar(
    image,
    ax=picture.axes,
    extend="max" if np.nanmax(load_TLE, initial=0) > top else "neither",
    label="load / mean load (1: balanced)",
    aspect=30 if L <= 16 else 60,
  )
  bar.set_ticks([0, 0.25, 0.5, 0.75, 1] + [t for t in (1.5, 2, 3, 4) if t <= top])
  return picture


def _draw_router_bias(run: series.Run) -> figure.Figure | None:
  if not run.wide["router_bias"].sums:
    return None
  step_T, bias_TLE = run.wide["router_bias"].means()
  _, L, E = bias_TLE.shape
  edge_T = _edges(step_T)
  if len(step_T) == 1:  # a line needs two points
    step_T, bias_TLE = edge_T, np.repeat(bias_TLE, 2, axis=0)
  picture, panels = _grid(L, "Router bias of each expert", "bias (score units)")
  low, high = np.nanmin(bias_TLE), np.nanmax(bias_TLE)
  margin = 0.05 * (high - low) or 1e-3
  map_of: dict[str, Any] = {"cmap": "viridis"}
  if E <= 20:  # colours that can be told apart
    map_of = {"cmap": colors.ListedColormap(matplotlib.colormaps["tab20"](range(E)))}
    map_of["norm"] = colors.BoundaryNorm(np.arange(E + 1) - 0.5, E)
  for l, ax in enumerate(panels):
    points = [np.column_stack([step_T, bias_TLE[:, l, e]]) for e in range(E)]
    lines = mpl_collections.LineCollection(points, linewidths=1.0 if E <= 32 else 0.5)
    lines.set(array=np.arange(E), **map_of)
    ax.add_collection(lines)
    ax.axhline(0, color="black", linewidth=0.5, linestyle=":")
    ax.set_xlim(edge_T[0], edge_T[-1])
    ax.set_ylim(low - margin, high + margin)
  bar = picture.colorbar(lines, ax=picture.axes, label="expert", aspect=30 if L <= 16 else 60)
  if E <= 20:
    bar.set_ticks(range(E))
    bar.minorticks_off()
  else:
    bar.locator = _integers(8)
  return picture


def _draw_balance(run: series.Run) -> figure.Figure | None:
  found = [
    (label, color, *xy)
    for name, label, color in (("max_vio", "batch", "C0"), ("max_vio_running", "running sum", "C1"))
    if (xy := run.series(name)) is not None
  ]
  if not found:
    return None
  L = found[0][3].shape[1]
  picture, panels = _grid(L, "MaxVio: largest load / mean load - 1", "MaxVio")
  for l, ax in enumerate(panels):
    for label, color, step_T, value_TL in found:
      ax.plot(step_T, value_TL[:, l], _style(step_T), color=color, label=label, linewidth=1)
    ax.grid(alpha=0.3)
  top = max(np.nan_to_num(value_TL).max() for *_, value_TL in found)
  picture.axes[0].set_ylim(0, 1.05 * top or 1)
  picture.legend(*picture.axes[0].get_legend_handles_labels(), loc="outside right upper")
  return picture


def _grid(num_layers: int, title: str, label: str) -> tuple[figure.Figure, list[Any]]:
  """Makes one panel a layer, wrapped into about a square, with shared axes and labels."""
  columns = min(8, math.ceil(math.sqrt(num_layers)))
  rows = math.ceil(num_layers / columns)
  wide, high = (2.2, 1.6) if columns > 4 else (3.2, 2.6) if columns > 1 else (7.0, 4.2)
  picture = figure.Figure(figsize=(wide * columns + 1.5, high * rows + 1.2), layout="constrained")
  axes = picture.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
  for l, ax in enumerate(axes):
    if l >= num_layers:
      picture.delaxes(ax)
      continue
    ax.set_title(f"MoE layer {l}", fontsize=9)
    ax.tick_params(labelsize=8, labelbottom=l + columns >= num_layers)
    ax.xaxis.set_major_locator(_integers(4))
  picture.suptitle(title)
  picture.supxlabel("optimizer step")
  picture.supylabel(label)
  return picture, list(axes[:num_layers])


def _edges(step_T: np.ndarray) -> np.ndarray:
  """Returns the T + 1 borders between steps, half-way."""
  half = np.diff(step_T) / 2 if len(step_T) > 1 else np.array([0.5])
  inner = step_T[:-1] + half[: len(step_T) - 1]
  return np.concatenate([step_T[:1] - half[0], inner, step_T[-1:] + half[-1]])


def _integers(most: int) -> ticker.MaxNLocator:
  return ticker.MaxNLocator(most, integer=True, steps=[1, 2, 5, 10], min_n_ticks=1)


def _style(step_T: np.ndarray) -> str:
  return ".-" if len(step_T) < 40 else "-"  # show the points if they are few


def draw_roofline(
  rows: Sequence[Mapping[str, Any]], peak_flops: float, bandwidth: float, path: epath.PathLike
) -> None:
  """Draws a roofline: each kernel's FLOP/s over its FLOPs per byte, below the chip's limits.

  Args:
    rows: each with kernel, implementation, shape, chip, flops, bytes and secs, the time that the
      kernel takes; rows where one of these is None or 0 are left out.
    peak_flops: the chip's peak, FLOP/s.
    bandwidth: the chip's HBM bandwidth, bytes per second.
    path: the PNG file to write.
  """
  rows = [row for row in rows if all(row.get(name) for name in ("flops", "bytes", "secs"))]
  intensity = [row["flops"] / row["bytes"] for row in rows]
  rate = [row["flops"] / row["secs"] for row in rows]
  ridge = peak_flops / bandwidth
  low, high = min([ridge / 10, *intensity]) / 2, max([ridge * 10, *intensity]) * 2
  picture = figure.Figure(figsize=(11, 6), layout="constrained")
  ax = picture.subplots()
  ax.plot([low, ridge, high], [low * bandwidth, peak_flops, peak_flops], color="black")
  # Colors are implementations, markers kernels (hollow: their gradients), sizes shapes.
  columns = ("implementation", "kernel", "shape")
  names, kernels, shapes = (
    list(dict.fromkeys(str(row[c]).removesuffix("_gradient") for row in rows)) for c in columns
  )
  colors = {name: f"C{i % 10}" for i, name in enumerate(names)}
  markers = {kernel: "osD^vP*X<>hp"[i % 12] for i, kernel in enumerate(kernels)}
  sizes = {shape: max(11 - 3 * i, 3) for i, shape in enumerate(shapes)}
  for row, x, y in zip(rows, intensity, rate):
    kernel = row["kernel"].removesuffix("_gradient")
    fill = "full" if kernel == row["kernel"] else "none"
    color, size = colors[row["implementation"]], sizes[row["shape"]]
    ax.plot(x, y, markers[kernel], color=color, markersize=size, fillstyle=fill, alpha=0.8)
  for name, color in colors.items():
    ax.plot([], [], "s", color=color, label=name)
  for kernel, marker in markers.items():
    ax.plot([], [], marker, color="grey", label=kernel)
  if any(row["kernel"].endswith("_gradient") for row in rows):
    ax.plot([], [], "o", color="grey", fillstyle="none", label="hollow: its gradient")
  for shape, size in sizes.items():
    ax.plot([], [], "o", color="lightgrey", markersize=size, label=shape)
  ax.set(xscale="log", yscale="log", xlabel="FLOP per byte of HBM traffic")
  ax.set_ylabel("FLOP/s, of the operation, that code and chip allow")
  ax.set_title(
    f"{rows[0]['chip'] if rows else ''}: {peak_flops / 1e12:,.0f} TFLOP/s, "
    f"{bandwidth / 1e9:,.0f} GB/s"
  )
  ax.grid(alpha=0.3, which="both")
  if rows:
    ax.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
  picture.savefig(epath.Path(path), format="png", dpi=_DOTS_PER_INCH)


_PLOTS: dict[str, Callable[[series.Run], figure.Figure | None]] = {
  "losses": _draw_losses,
  "learning_rate": _draw_learning_rate,
  "throughput": _draw_throughput,
  "expert_load": _draw_expert_load,
  "router_bias": _draw_router_bias,
  "balance": _draw_balance,
}
