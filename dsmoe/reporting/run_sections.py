"""The sections of a page about one run or several together."""

from collections.abc import Sequence
from typing import Any

from dsmoe.reporting import (
  cost_sections,
  curve_sections,
  html,
  load_sections,
  progress,
  routing_sections,
)
from dsmoe.reporting.run_files import RunFiles, differing

_MOST_RUNS = 6  # whose load is shown
_MANY_EXPERTS = 1024  # of all layers


def of_runs(runs: Sequence[RunFiles], price_per_device_hour: float | None) -> list[html.Section]:
  """Returns the sections about runs, without those that have nothing to show.

  Args:
    runs: at least one.
    price_per_device_hour: in any currency; None: no price is stated.
  """
  sections: list[html.Section | None] = [
    summary(runs),
    curve_sections.curves(runs),
    config_fields(runs),
  ]
  is_named = len(runs) > 1
  # A page with the experts of many runs, or of a few with thousands of experts, would be large.
  counts = [run.series.wide["expert_counts"].sums for run in runs]
  most = 2 if any(sums and sums[0][2].size > _MANY_EXPERTS for sums in counts) else _MOST_RUNS
  if len(runs) <= most:
    for of_run in (load_sections.expert_load, load_sections.router_bias, routing_sections.of_run):
      sections += [of_run(run, is_named) for run in runs]
  else:
    text = f"The load of experts is shown on pages of up to {most} such runs, this one is of "
    sections.append(html.Section("Expert load", [f"{text}{len(runs)}."]))
  sections += [
    cost_sections.speed(runs),
    cost_sections.compute(runs, price_per_device_hour),
    samples(runs),
  ]
  return [section for section in sections if section is not None and section.parts]


def summary(runs: Sequence[RunFiles]) -> html.Section:
  """Returns each run's last figures as one table, a column a run."""
  found = [dict(progress.summary(run.series.rows)) for run in runs]
  subsets = curve_sections.validation_rows(runs)
  why = {run.name: run.result.get("why") for run in runs}
  if any(isinstance(reason, str) for reason in why.values()):
    found = [pairs | {"ended": str(why[run.name] or "")} for pairs, run in zip(found, runs)]
  for number, rows_of in enumerate(subsets.values(), 1):
    for run, pairs in zip(runs, found):
      if len(subsets) > 1 and run.name in rows_of:
        pairs["subset of the validation set, latest"] = str(number)
  names = list(dict.fromkeys(name for pairs in found for name in pairs))
  rows = [[name, *(pairs.get(name, "") for pairs in found)] for name in names]
  parts: list[Any] = [html.Table("Figures of the last step", ["", *(r.name for r in runs)], rows)]
  if len(subsets) > 1:
    parts.append("Validation losses on different subsets of the validation set do not compare.")
  parts += [remark for run in runs for remark in run.remarks]
  return html.Section("Summary", parts)


def config_fields(runs: Sequence[RunFiles]) -> html.Section | None:
  """Returns the config fields that differ between runs; None for a single one."""
  known = {run.name: run.config for run in runs if run.config is not None}
  if len(runs) < 2:
    return None
  parts: list[Any] = []
  if len(known) < len(runs):
    unknown = ", ".join(run.name for run in runs if run.name not in known)
    parts.append(f"Without a config.json that can be read: {unknown}.")
  if len(known) > 1:
    fields = differing(known)
    rows = [[field, *(_value(v) for v in values)] for field, values in fields.items()]
    if rows:
      header = ["field", *known]
      parts.append(html.Table("Config fields that differ", header, rows))
    else:
      parts.append("The configs are equal in every field.")
  return html.Section("Configs", parts)


def _value(value: Any) -> str:
  return ", ".join(map(str, value)) if isinstance(value, list) and value else str(value)


def samples(runs: Sequence[RunFiles]) -> html.Section:
  """Returns what the models wrote at the end, where the runs kept it."""
  texts = [html.Text(run.name, run.sample) for run in runs if run.sample]
  return html.Section("What the models write", texts)
