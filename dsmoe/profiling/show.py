"""The table and the picture of a trace's figures."""

from typing import Any

import rich.box
import rich.table
from etils import epath
from matplotlib import figure

from dsmoe.profiling.scopes import DIRECTIONS

_DOTS_PER_INCH = 110
_COLORS = {"forward": "C0", "backward": "C1", "recomputed": "C4", "other": "C7"}


def tables(found: dict[str, Any]) -> list[rich.table.Table]:
  """Returns the table of parts, and that of the clock and the bound.

  Args:
    found: of `summary.read`.
  """
  return [_parts(found), _clock(found)]


def heading(found: dict[str, Any]) -> str:
  """Returns what a trace is of, in a line."""
  steps, processes = found["steps"], found["processes"]
  which = f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]}"
  missing = "" if len(processes) == found["num_processes"] else f" of {found['num_processes']}"
  devices = len(found["devices"])
  of = f"{devices} x {found['device_kind']}"
  if found["num_processes"] > 1:
    of += f" of {len(processes)}{missing} processes"
  return f"{which}, {of}; ms of a step" + (", mean over devices" if devices > 1 else "")


def _ms(secs: float) -> str:
  return f"{secs * 1e3:,.2f}"


def _parts(found: dict[str, Any]) -> rich.table.Table:
  directions = [d for d in DIRECTIONS if any(row[d] for row in found["parts"].values())]
  shown = rich.table.Table("part", box=rich.box.SIMPLE)
  for title in (*directions, "all", "share"):
    shown.add_column(title, justify="right")
  for part, row in found["parts"].items():
    secs = sum(row.values())
    cells = [_ms(row[d]) if row[d] else "" for d in directions]
    shown.add_row(part, *cells, _ms(secs), f"{_share(secs, found['secs']):.1%}")
  sums = [_ms(sum(row[d] for row in found["parts"].values())) for d in directions]
  shown.add_section()
  shown.add_row("all", *sums, _ms(found["secs"]), "100.0%")
  return shown


def _share(part: float, whole: float) -> float:
  return part / whole if whole else 0.0


def _clock(found: dict[str, Any]) -> rich.table.Table:
  """Lists what the clock says, and how far it is from the bound."""
  clock, bound = found["clock"], found["bound"]
  window = clock["window_secs"]
  shown = rich.table.Table("on the clock", box=rich.box.SIMPLE)
  shown.add_column("ms", justify="right")
  shown.add_column("of the step", justify="right")

  def add(label: str, secs: float) -> None:
    shown.add_row(label, _ms(secs), f"{_share(secs, window):.1%}")

  add("the step", window)
  add(_idle(found), clock["idle_secs"])
  add("collectives run", clock["collective_secs"])
  add("collectives run and no computation does", clock["exposed_collective_secs"])
  if bound is None:
    return shown
  add(f"least for the model's FLOPs ({bound['chip']})", bound["compute_secs"])
  if bound["hbm_secs"] is not None:
    add("least for the bytes in memory", bound["hbm_secs"])
  for axis, secs in bound["link_secs"].items():
    add(f"least for the links along {axis}", secs)
  add(f"gap to the bound, {bound['bound']}", window - bound["bound_secs"])
  return shown


def _idle(found: dict[str, Any]) -> str:
  return "no operation is seen" if found["platform"] == "cpu" else "nothing runs"


def notes(found: dict[str, Any]) -> list[str]:
  """Returns the sentences that belong under the tables."""
  said = []
  if found["platform"] == "cpu":
    said.append(
      "On a CPU the parts are seconds of threads, of which several may run at once. A matrix product "
      "that the CPU's pool of threads computes is seen until it is handed over; the rest of it is "
      "among the time in which no operation is seen."
    )
  if found["platform"] == "gpu":
    said.append("On a GPU the parts are seconds of streams, of which several may run at once.")
  if found["bound"] is None:
    said.append(f"No bound is known for {found['device_kind']}: the table of chips lacks it.")
  return said


def draw(found: dict[str, Any], path: epath.PathLike) -> None:
  """Draws the parts as stacked bars, and the clock with the bound below them, into a PNG file.

  Args:
    found: of `summary.read`.
    path: the file.
  """
  parts = found["parts"]
  picture = figure.Figure(figsize=(9, 2.6 + 0.3 * len(parts)), layout="constrained")
  ratios = [0.4 + 0.3 * len(parts), 0.75]
  upper, lower = picture.subplots(2, 1, height_ratios=ratios)
  labels, left = list(parts), [0.0] * len(parts)
  for direction in DIRECTIONS:
    widths = [parts[part][direction] * 1e3 for part in labels]
    if any(widths):
      upper.barh(labels, widths, 0.75, left=left, label=direction, color=_COLORS[direction])
    left = [a + b for a, b in zip(left, widths)]
  for place, total in enumerate(left):
    text = f" {_share(total * 1e-3, found['secs']):.1%}"
    upper.text(total, place, text, va="center", fontsize=8)
  upper.set_ylim(len(labels) - 0.4, -0.6)
  upper.set_xlim(0, 1.1 * max(left))
  upper.set_xlabel("ms of a step")
  upper.legend(fontsize=8, loc="lower right")
  upper.grid(alpha=0.3, axis="x")
  upper.set_title("Operations by part", fontsize=10)
  _draw_clock(lower, found)
  picture.suptitle(heading(found), fontsize=10)
  picture.savefig(epath.Path(path), format="png", dpi=_DOTS_PER_INCH)


def _draw_clock(ax, found: dict[str, Any]) -> None:
  """Draws how a step's time on the clock divides, and the bound as a line."""
  clock, bound = found["clock"], found["bound"]
  exposed, idle = clock["exposed_collective_secs"], clock["idle_secs"]
  pieces = {
    "a computation runs": (clock["window_secs"] - exposed - idle, "C2"),
    "only a collective runs": (exposed, "C3"),
    _idle(found): (idle, "lightgrey"),
  }
  left = 0.0
  for label, (secs, color) in pieces.items():
    ax.barh([0], [secs * 1e3], 0.6, left=left, label=label, color=color)
    left += secs * 1e3
  if bound is not None:
    label = f"bound ({bound['bound']})"
    ax.axvline(bound["bound_secs"] * 1e3, color="black", linestyle="--", label=label)
  ax.set_yticks([])
  ax.set_ylim(-0.5, 1.1)
  ax.set_xlabel("ms of a step, on the clock")
  ax.legend(fontsize=8, loc="upper center", ncols=4, frameon=False)
