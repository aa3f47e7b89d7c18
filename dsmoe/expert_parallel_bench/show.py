"""Tables and pictures of the benchmark's rows, and the comparison of two files of them."""

from collections.abc import Sequence
from typing import Any

import rich.box
import rich.table
from etils import epath
from matplotlib import figure

from dsmoe.expert_parallel_bench.profile import PARTS

Row = dict[str, Any]
_DOTS_PER_INCH = 110
Series = list[tuple[str, str, float]]  # legend, figure, factor
_BYTES: Series = [
  ("wire", "wire_bytes_per_token", 1.0),
  ("least", "least_bytes_per_token", 1.0),
]
# What a row is of, then its figures: title, factor. The first that a row has of each kind counts.
_KEYS = {
  "routing": "routing",
  "back_end": "back end",
  "direction": "direction",
  "expert_degree": "degree",
  "copies": "copies",
}
_FIGURES = {
  "median_secs": ("ms", 1e3),
  "spread": ("spread", 1),
  "tokens_per_sec": ("tokens/s", 1),
  "of_one_device": ("of one device", 1),
  "of_devices_at_once": ("of devices at once", 1),
  **{f"parts_secs.{part}": (part, 1e3) for part in (*PARTS, "other")},
  "wire_bytes_per_token": ("wire B/token", 1),
  "least_bytes_per_token": ("least", 1),
  "logical_bytes_per_token": ("logical", 1),
  "wire_bytes_per_sec": ("wire GB/s", 1e-9),
  "logical_bytes_per_sec": ("logical GB/s", 1e-9),
  "of_link_peak": ("of peak", 1),
  "buffer_factor": ("buffer factor", 1),
  "dropped_rows": ("dropped", 1),
  "peak_bytes": ("peak GiB", 2**-30),
  "buffer_bytes.temporary": ("temp GiB", 2**-30),
  "flops": ("GFLOP at most", 1e-9),
  "executed_over_useful": ("of useful", 1),
  "bytes": ("HBM GB", 1e-9),
  "compute_secs": ("compute ms", 1e3),
  "hbm_secs": ("HBM ms", 1e3),
  "link_secs": ("link ms", 1e3),
  "optimal_secs": ("optimal ms", 1e3),
  "bound": ("bound", None),
  "bound_secs": ("bound ms", 1e3),
}


def value_of(row: Row, name: str) -> Any:
  """Returns a figure of a row; `a.b` is b within a, None where there is none."""
  found: Any = row
  for part in name.split("."):
    found = found.get(part) if isinstance(found, dict) else None
  return None if isinstance(found, dict) else found


def _columns(rows: Sequence[Row]) -> dict[str, tuple[str, float | None]]:
  """Returns the figures that some row has, with those of each mesh axis."""
  found: dict[str, tuple[str, float | None]] = {}
  for name, column in _FIGURES.items():
    if name == "compute_secs":
      for axis in _axes(rows, "axis_bytes"):
        found[f"axis_bytes.{axis}.sent_bytes"] = (f"{axis} MB sent", 1e-6)
    if name == "link_secs":
      found |= {f"link_secs.{axis}": (f"{axis} ms", 1e3) for axis in _axes(rows, name)}
    if any(value_of(row, name) is not None for row in rows):
      found[name] = column
  return found


def _axes(rows: Sequence[Row], name: str) -> list[str]:
  """Returns the mesh axes by which some row gives a figure."""
  return list(dict.fromkeys(a for r in rows if isinstance(r.get(name), dict) for a in r[name]))


def table(rows: Sequence[Row]) -> rich.table.Table:
  """Returns a table of the rows without errors, a column for each figure that some row has."""
  rows = [row for row in rows if "error" not in row]
  keys = {k: title for k, title in _KEYS.items() if any(k in row for row in rows)}
  shown = rich.table.Table(*keys.values(), box=rich.box.SIMPLE)
  columns = _columns(rows)
  for title, _ in columns.values():
    shown.add_column(title, justify="right")
  for row in rows:
    figures = (_text(value_of(row, name), scale) for name, (_, scale) in columns.items())
    shown.add_row(*(str(row.get(k, "")) for k in keys), *figures)
  return shown


def _text(value: Any, scale: float | None) -> str:
  if value is None or scale is None:
    return value or ""
  value *= scale
  return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.3g}"


def compared(before: Sequence[Row], after: Sequence[Row]) -> rich.table.Table:
  """Returns a table of the figures in which rows of two files differ, with their ratio.

  Rows are of the same case if all that names them is equal. A figure that one file lacks is left
  out; a case that only one has is named so.
  """
  names = ("topology", "mesh", "tokens_per_device", *_KEYS)
  key = lambda row: tuple(str(row.get(name, "")) for name in names)  # noqa: E731
  old, new = ({key(r): r for r in rows if "error" not in r} for rows in (before, after))
  shown = rich.table.Table("case", "figure", box=rich.box.SIMPLE)
  for title in ("first", "second", "second / first"):
    shown.add_column(title, justify="right")
  for case in dict.fromkeys([*old, *new]):
    label = " ".join(part for part in case if part)
    if case not in old or case not in new:
      shown.add_row(label, f"only in the {'first' if case in old else 'second'}", "", "", "")
      continue
    options = [str(row.get("exchange", "")) for row in (old[case], new[case])]
    if options[0] != options[1]:
      shown.add_row(label, "exchange", *options, "")
    for name, (title, scale) in _columns([old[case], new[case]]).items():
      a, b = value_of(old[case], name), value_of(new[case], name)
      if scale is None or a is None or b is None or a == b:
        continue
      ratio = f"{b / a:.3f}" if a else ""
      shown.add_row(label, title, _text(a, scale), _text(b, scale), ratio)
  return shown


def draw(rows: Sequence[Row], path: epath.PathLike) -> None:
  """Draws the rows into a PNG file.

  Timed rows show their parts, compiled ones their bounds, those of a what-if their bytes a token
  and the buffer factor.

  Args:
    rows: of one kind; those with errors are left out.
    path: the file.
  """
  rows = [row for row in rows if "error" not in row]
  panels = _panels(rows)
  labels = [_label(row) for row in rows]
  stacked = [panel[0].endswith("by part") for panel in panels]
  picture = figure.Figure(
    figsize=(4 + 4 * len(panels), 1.8 + 0.34 * len(rows)), layout="constrained"
  )
  axes = picture.subplots(1, len(panels), sharey=True, squeeze=False)[0]
  for ax, (title, series), stack in zip(axes, panels, stacked):
    _bars(ax, rows, series, stack)
    ax.set_title(title, fontsize=10)
    ax.set_yticks(range(len(rows)), labels, fontsize=8)
    ax.grid(alpha=0.3, axis="x")
  axes[0].set_ylim(len(rows) - 0.4, -0.6)
  picture.suptitle(rows[0].get("stamp") or rows[0].get("device", "") if rows else "", fontsize=10)
  picture.savefig(epath.Path(path), format="png", dpi=_DOTS_PER_INCH)


def _label(row: Row) -> str:
  """Returns what a row is of, with the number of copies only where there are any."""
  words = {"expert_degree": "degree {}", "copies": "{} copies"}
  names = [k for k in _KEYS if k in row and (k != "copies" or row[k])]
  return ", ".join(words.get(k, "{}").format(row[k]) for k in names)


def _panels(rows: Sequence[Row]) -> list[tuple[str, Series]]:
  """Returns titles and series of the panels that show what the rows have."""
  if any("median_secs" in row for row in rows):
    parts: Series = [(part, f"parts_secs.{part}", 1e3) for part in (*PARTS, "other")]
    return [("ms of a run, by part", parts), ("bytes a token, one way", _BYTES)]
  if any("axis_bytes" in row for row in rows):
    bounds: Series = [("compute", "compute_secs", 1e3), ("HBM", "hbm_secs", 1e3)]
    bounds += [(f"links, {axis}", f"link_secs.{axis}", 1e3) for axis in _axes(rows, "link_secs")]
    memory: Series = [("peak", "peak_bytes", 2**-30)]
    return [("ms at the chip's peaks", bounds), ("GiB at the peak", memory)]
  return [
    ("bytes a token and step, one way", _BYTES),
    ("most rows of a device / mean", [("buffer factor", "buffer_factor", 1.0)]),
    (
      "ms of a step at the chip's peaks",
      [("compute", "compute_secs", 1e3), ("links", "link_secs", 1e3)],
    ),
  ]


def _bars(ax, rows: Sequence[Row], series, stacked: bool) -> None:
  """Draws a horizontal bar for each row and series, beside or on top of each other."""
  height = 0.8 if stacked else 0.8 / len(series)
  left = [0.0] * len(rows)
  for i, (label, name, scale) in enumerate(series):
    widths = [(value_of(row, name) or 0) * scale for row in rows]
    places = [y if stacked else y - 0.4 + (i + 0.5) * height for y in range(len(rows))]
    if any(widths):
      ax.barh(places, widths, height, left=left if stacked else None, label=label, color=f"C{i}")
    left = [a + b for a, b in zip(left, widths)]
  if len(series) > 1:
    ax.legend(fontsize=7)
