"""Charts for a page: small enough for a telephone, in colours that a light and a dark ground allow.

Heat maps shade with transparency: a value of no interest shows the ground itself.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib import colors, figure, ticker

from dsmoe.reporting import series
from dsmoe.reporting.html import svg
from dsmoe.reporting.html.page import Key

# Each differs from white and from the dark ground by a contrast of at least 3.
PALETTE = (
  *("#2f7fd6", "#d9661f", "#2b9348", "#a85bd0", "#d6455d"),
  *("#15908c", "#b07d12", "#d0489b", "#808080", "#6b70e0"),
)
_DASHES = ("", "7 3", "2 2")
_SIZE = (5.0, 3.2)  # inches; a telephone shows it at about two thirds of a point a pixel


class Line(NamedTuple):
  """A line of a chart; NaN parts it."""

  x_T: np.ndarray
  y_T: np.ndarray
  key: Key
  is_marked: bool = False  # its points are drawn too
  is_smoothed: bool = False  # it is drawn faintly, and its running mean over it


def keys(labels: Sequence[str]) -> list[Key]:
  """Returns a legend's entries, in colours and dashes of which 30 differ."""
  count = len(PALETTE)
  return [
    Key(label, PALETTE[i % count], _DASHES[i // count % len(_DASHES)])
    for i, label in enumerate(labels)
  ]


def reach(length: int) -> int:
  """Returns how many neighbours on either side the running mean of a long series takes; 0: none."""
  return length // 20 if length >= series.SMOOTHED_POINTS else 0


def lines(drawn: Sequence[Line], x_label: str, y_label: str, scale: str = "free") -> figure.Figure:
  """Draws lines; of those with over 2 MAX_POINTS points the means of equally many neighbours.

  Args:
    drawn: the lines.
    x_label, y_label: of the axes.
    scale: of the y axis: free | from zero | log.
  """
  picture, ax = axes(x_label, y_label)
  for line in drawn:
    x_T, y_T = np.asarray(line.x_T, float), np.asarray(line.y_T, float)
    style: dict[str, Any] = {"color": line.key.color, "linewidth": 1.4}
    if line.key.dash:
      style["dashes"] = [float(length) for length in line.key.dash.split()]
    if line.is_marked or len(x_T) == 1:
      style |= {"marker": "o", "markersize": 3.5}
    if line.is_smoothed and reach(len(y_T)):
      x_T, y_T = x_T[np.isfinite(y_T)], y_T[np.isfinite(y_T)]
      ax.plot(*_thinned(x_T, y_T), color=line.key.color, linewidth=0.7, alpha=0.4)
      y_T = series.running_mean(y_T, reach(len(y_T)))
    ax.plot(*(_thinned(x_T, y_T) if not line.is_marked else (x_T, y_T)), **style)
  ax.grid(color="black", alpha=0.15, linewidth=0.6)
  finite = [line.y_T for line in drawn if np.isfinite(np.asarray(line.y_T, float)).any()]
  if scale == "log" and finite and all((np.asarray(y_T, float) > 0).any() for y_T in finite):
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter(ticker.NullFormatter())
  elif scale == "from zero" and finite:
    ax.set_ylim(0, 1.08 * ax.dataLim.ymax or 1)
  ax.xaxis.set_major_formatter(_short())
  if scale != "log":
    ax.yaxis.set_major_formatter(_short())
  return picture


def bars(labels: Sequence[str], values: Sequence[float], x_label: str) -> figure.Figure:
  """Draws horizontal bars, one a label, each with its value."""
  picture, ax = axes(x_label, "", high=0.9 + 0.26 * len(labels))
  ax.barh(range(len(labels)), values, color=PALETTE[0], height=0.7)
  ax.set_yticks(range(len(labels)), [svg.literal(label) for label in labels])
  ax.invert_yaxis()
  ax.xaxis.set_major_formatter(_short())
  return picture


def load_map(
  load_XY: np.ndarray, x_edges: np.ndarray, x_label: str, y_label: str, bar_label: str
) -> figure.Figure:
  """Draws loads over their mean: 1 is transparent, less is blue, more is orange, up to 4 times.

  Args:
    load_XY: [X, Y]; NaN shows the ground.
    x_edges: the X + 1 borders.
    x_label, y_label, bar_label: of the axes and of the bar of colours.
  """
  top = float(np.clip(np.nan_to_num(load_XY).max(initial=0), 2.0, 4.0))
  norm = colors.TwoSlopeNorm(1.0, vmin=0.0, vmax=top)
  return _map(load_XY, x_edges, (x_label, y_label, bar_label), _two_sided(), norm)


def share_map(share_XY: np.ndarray, x_label: str, y_label: str, bar_label: str) -> figure.Figure:
  """Draws values from 0, which are transparent, to their largest.

  Args:
    share_XY: [X, Y], at least 0; NaN shows the ground.
    x_label, y_label, bar_label: of the axes and of the bar of colours.
  """
  top = float(np.nan_to_num(share_XY).max(initial=0)) or 1.0
  edges = np.arange(share_XY.shape[0] + 1) - 0.5
  norm = colors.Normalize(0.0, top)
  return _map(share_XY, edges, (x_label, y_label, bar_label), _one_sided(), norm)


def name_rows(picture: figure.Figure, names: Sequence[str]) -> None:
  """Gives the rows of a map names instead of numbers; of long ones the middle is left out."""
  short = [name if len(name) <= 18 else f"{name[:8]}…{name[-9:]}" for name in names]
  axes = picture.axes[0]
  axes.set_yticks(range(len(names)), [svg.literal(name) for name in short])


def _map(values_XY, x_edges, labels: tuple[str, str, str], colormap, norm) -> figure.Figure:
  picture, ax = axes(*labels[:2])
  Y = values_XY.shape[1]
  image = ax.pcolorfast(x_edges, np.arange(Y + 1) - 0.5, values_XY.T, cmap=colormap, norm=norm)
  ax.set_ylim(Y - 0.5, -0.5)
  ax.yaxis.set_major_locator(ticker.MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
  ax.xaxis.set_major_locator(ticker.MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
  ax.xaxis.set_major_formatter(_short())
  highest = float(np.nan_to_num(values_XY).max(initial=0))
  is_cut = norm.vmax is not None and highest > norm.vmax
  bar = picture.colorbar(image, ax=ax, label=labels[2], extend="max" if is_cut else "neither")
  bar.ax.tick_params(labelsize=8)
  return picture


def axes(x_label: str, y_label: str, high: float = _SIZE[1]) -> tuple[figure.Figure, Any]:
  """Returns a figure of the page's width, `high` inches high, and its axes with their labels."""
  picture = figure.Figure(figsize=(_SIZE[0], high), layout="constrained")
  ax = picture.subplots()
  ax.set_xlabel(x_label)
  ax.set_ylabel(y_label)
  ax.tick_params(labelsize=9)
  ax.spines[["top", "right"]].set_visible(False)
  return picture, ax


def _short() -> ticker.Formatter:
  """Writes 12000 as 12k, 3e18 as 3E, and small numbers as they are."""
  steps: Mapping[float, str] = {1e18: "E", 1e15: "P", 1e12: "T", 1e9: "G", 1e6: "M", 1e3: "k"}

  def text(value: float, _: Any = None) -> str:
    for step, letter in steps.items():
      if abs(value) >= 10 * step or (abs(value) >= step and step > 1e3):
        return f"{value / step:g}{letter}"
    return f"{value:g}".replace("-", "−")

  return ticker.FuncFormatter(text)


def _thinned(x_T: np.ndarray, y_T: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  stride = math.ceil(len(x_T) / (2 * series.MAX_POINTS))
  if stride <= 1:
    return x_T, y_T
  starts = np.arange(0, len(x_T), stride)
  sizes = np.diff([*starts, len(x_T)])
  return np.add.reduceat(x_T, starts) / sizes, np.add.reduceat(y_T, starts) / sizes


def _two_sided() -> colors.Colormap:
  """Returns 33 colours, few so that pictures are small, of which the middle one is transparent."""
  blue, orange = matplotlib.colors.to_rgb(PALETTE[0]), matplotlib.colors.to_rgb(PALETTE[1])
  half = [(*blue, 1 - a) for a in np.linspace(0, 1, 17)]
  return colors.ListedColormap([*half, *((*orange, a) for a in np.linspace(0, 1, 17)[1:])])


def _one_sided() -> colors.Colormap:
  blue = matplotlib.colors.to_rgb(PALETTE[0])
  return colors.ListedColormap([(*blue, a) for a in np.linspace(0, 1, 33)])
