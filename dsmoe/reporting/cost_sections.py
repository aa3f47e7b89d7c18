"""The speed of runs, where their wall time went, and what they cost."""

import datetime
from collections.abc import Sequence
from typing import Any

import numpy as np

from dsmoe.reporting import curve_sections, goodput, html
from dsmoe.reporting.run_files import RunFiles, flops_per_token


def speed(runs: Sequence[RunFiles]) -> html.Section:
  """Returns throughput, and where the wall time went."""
  figures: list[Any] = [
    curve_sections.metric_figure(
      runs, "tokens_per_sec", "Throughput", "tokens per second", "from zero"
    ),
    curve_sections.metric_figure(
      runs, "mfu", "Model FLOPs utilisation", "MFU (%)", "from zero", factor=100.0
    ),
  ]
  if figures[1] is None:
    title = "Arithmetic achieved"
    figures[1] = curve_sections.metric_figure(runs, "gflops_per_sec", title, "GFLOP/s", "from zero")
  accounts = {run.name: goodput.account(run.goodput) for run in runs if run.goodput}
  parts = [figure for figure in figures if figure is not None]
  if accounts:
    rows = [["starts", *(str(account.num_starts) for account in accounts.values())]]
    totals = [sum(account.secs.values()) for account in accounts.values()]
    rows.append(["wall time", *map(duration, totals)])
    for phase, label in goodput.LABELS.items():
      secs = [account.secs[phase] for account in accounts.values()]
      if any(secs):
        cells = (f"{duration(s)} ({s / (t or 1):.1%})" if s else "" for s, t in zip(secs, totals))
        rows.append([label, *cells])
    note = "Goodput is the share that was spent stepping."
    parts.append(html.Table("Where the wall time went", ["", *accounts], rows, note))
  return html.Section("Speed and goodput", parts)


def compute(runs: Sequence[RunFiles], price_per_device_hour: float | None) -> html.Section:
  """Returns what each run used: tokens, FLOPs, device hours, and their price if it is given."""
  header = ["run", "tokens", "training FLOPs", "wall time", "devices", "device hours"]
  header += ["price"] if price_per_device_hour is not None else []
  rows, is_unknown = [], False
  for run in runs:
    last = [row["tokens"] for row in run.series.rows if row.get("tokens") is not None]
    flops, count = flops_per_token(run), num_devices(run)
    secs = sum(goodput.account(run.goodput).secs[name] for name in goodput.HELD)
    hours = secs / 3600 * count if count and run.goodput else None
    is_unknown |= hours is None
    cells = [run.name, f"{last[-1]:,}" if last else "not known"]
    cells.append(f"{last[-1] * flops:.3g}" if last and flops else "not known")
    cells.append(duration(secs) if run.goodput else "not known")
    cells += [str(count) if count else "not known", _number(hours)]
    if price_per_device_hour is not None:
      cells.append(_number(None if hours is None else hours * price_per_device_hour))
    rows.append(cells)
  note = "Wall time is that in which devices were held, by all starts."
  if price_per_device_hour is not None:
    note += f" A device hour costs {price_per_device_hour:g}."
  parts: list[Any] = [html.Table("Compute used", header, rows, note)]
  parts.append(
    "FLOPs are the model's, forward and backward, of the steps that count; those of steps that were "
    "made again after a restart are in the device hours alone."
  )
  if is_unknown:
    parts.append(
      "Device hours are not known where neither result.json nor a mesh without -1 in config.json "
      "states the number of devices, or where there is no goodput.jsonl."
    )
  return html.Section("Compute and cost", parts)


def num_devices(run: RunFiles) -> int | None:
  """Returns how many devices a run had, from its result.json or its mesh; None if neither says."""
  count = run.result.get("num_devices")
  if type(count) is int and count > 0:
    return count
  mesh = (run.config or {}).get("mesh")
  sizes = [n for n in mesh.values() if type(n) is int] if isinstance(mesh, dict) else []
  return int(np.prod(sizes)) if sizes and min(sizes) > 0 else None


def duration(secs: float) -> str:
  """Returns seconds as hours, minutes and seconds."""
  return str(datetime.timedelta(seconds=round(secs))) if secs >= 1 else f"{secs:.2f} s"


def _number(value: float | None) -> str:
  return "not known" if value is None else f"{value:,.4g}"
