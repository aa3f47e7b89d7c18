"""The sections of a page about routing traces."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from dsmoe.reporting import html, load_sections, routing_analysis, routing_trace
from dsmoe.reporting.html import charts
from dsmoe.reporting.routing_analysis import Analysis
from dsmoe.reporting.run_files import RunFiles

_MOST_PAIRS = 10


def of_run(run: RunFiles, is_named: bool) -> html.Section | None:
  """Returns the section about a run's last routing trace; None for a run without traces."""
  if not run.traces:
    return None
  title = f"Specialisation: {run.name}" if is_named else "Specialisation"
  path = run.traces[-1]
  try:
    trace, analysis, remarks = read(path, run.config)
  except ValueError as error:
    return html.Section(title, [f"The routing trace is left out: {error}"])
  _, M, K = trace.expert_LMK.shape
  text = f"Routing of step {trace.step}: {M:,} tokens, {K} experts a token, from {path.name}."
  return html.Section(title, [text, *remarks, *figures(analysis), *tables(analysis)])


def read(
  path: epath.Path, config: dict[str, Any] | None, num_groups: int | None = None
) -> tuple[routing_trace.Trace, Analysis, list[str]]:
  """Reads and analyses a trace.

  Args:
    path: of the trace, in the folder routing_traces of its run's workdir.
    config: the run's, nested, for groups and domains; None if it is not known.
    num_groups: instead of the config's n_group; None: that.

  Returns:
    The trace, what was found, and sentences about what is not known.

  Raises:
    ValueError: for a file that is no trace, or groups that do not divide its experts.
  """
  trace = routing_trace.read(path)
  remarks: list[str] = []
  if num_groups is None and config is not None:
    count = (config.get("model") or {}).get("n_group")
    num_groups = count if type(count) is int and count > 1 else None
  domains = None
  if config is None:
    remarks.append("Domains are not known without the run's config.json.")
  elif reason := _why_rows_are_not_known(path.parent.parent):
    remarks.append(f"Domains are not known: {reason}.")
  else:
    try:
      domains = routing_analysis.domains_of(trace, config.get("data") or {})
    except ValueError as error:
      remarks.append(f"Domains are not known: {error}.")
  return trace, routing_analysis.analyze(trace, num_groups, domains), remarks


def _why_rows_are_not_known(workdir: epath.Path) -> str:
  """Returns why a trace's rows do not follow from config.json; "" if they do."""
  if any(workdir.glob("config.before_step_*.json")):
    return "the run has changed its config on the way"
  path = workdir / "metrics.jsonl"
  if path.exists() and b'"rewinds": 1' in path.read_bytes():
    return "the run went back and passed over data"
  return ""


def figures(analysis: Analysis) -> list[html.Figure]:
  """Returns pictures of load, pairs, overlap of layers, groups and domains."""
  L, E = analysis.counts_LE.shape
  layers = load_sections.shown_layers(L, E)
  mean_L1 = analysis.counts_LE.mean(axis=1, keepdims=True)
  views = {
    "all": charts.load_map(
      analysis.counts_LE / np.where(mean_L1 > 0, mean_L1, np.nan),
      np.arange(L + 1) - 0.5,
      *("MoE layer", "expert", "load / mean load"),
    )
  }
  alt = f"Heat map of the tokens of {E} experts in {L} layers, over the layer's mean"
  note = "No colour: the mean. Orange: more. Blue: less."
  found = [html.Figure("Tokens by expert", alt, views, note=note)]
  if analysis.domains is not None:
    found.append(_domain_figure(analysis, layers))
  found.append(_pairs_figure(analysis, layers))
  if L > 1:
    above_LL = np.where(np.eye(L) > 0, np.nan, analysis.layer_overlap_LL)
    picture = charts.share_map(above_LL, "of MoE layer", "with MoE layer", "overlap")
    alt = f"Heat map of how well experts of each of {L} layers match experts of another"
    note = "The mean, over experts, of the largest share of tokens in common with an expert of the "
    note += f"other layer, from {analysis.overlap_tokens:,} tokens."
    found.append(html.Figure("Overlap of layers", alt, {"all": picture}, note=note))
  if analysis.groups_LG is not None:
    found.append(_groups_figure(analysis.groups_LG))
  return found


def _domain_figure(analysis: Analysis, layers: Sequence[int]) -> html.Figure:
  assert analysis.domains is not None and analysis.domain_counts_LDE is not None
  views = {}
  for l in layers:
    counts_DE = analysis.domain_counts_LDE[l]
    total_D1 = counts_DE.sum(axis=1, keepdims=True)
    over_DE = counts_DE / np.where(total_D1 > 0, total_D1, np.nan) * counts_DE.shape[1]
    picture = charts.load_map(
      over_DE.T,
      np.arange(counts_DE.shape[1] + 1) - 0.5,
      *("expert", "domain", "share / even share"),
    )
    charts.name_rows(picture, analysis.domains.names)
    views[f"layer {l}"] = picture
  alt = f"Heat map of the choices of {len(analysis.domains.names)} domains by expert"
  note = "Each row sums to one. No colour: as often as if all experts were chosen equally often."
  return html.Figure("Domain by expert", alt, views, note=note)


def _pairs_figure(analysis: Analysis, layers: Sequence[int]) -> html.Figure:
  views = {}
  for l in layers:
    pairs_EE = analysis.pairs_LEE[l]
    lift_EE = routing_analysis.lift(pairs_EE, routing_analysis.num_tokens(analysis, l))
    np.fill_diagonal(lift_EE, np.nan)
    edges = np.arange(len(pairs_EE) + 1) - 0.5
    views[f"layer {l}"] = charts.load_map(lift_EE, edges, "expert", "expert", "lift")
  alt = "Heat map of how often two experts are chosen by the same token, over independent choices"
  note = "Lift: tokens that chose both, over the number if experts were chosen independently, "
  note += "which is 1 (no colour). The diagonal is left out."
  return html.Figure("Co-activation of experts", alt, views, note=note)


def _groups_figure(groups_LG: np.ndarray) -> html.Figure:
  mean_L = routing_analysis.mean_groups(groups_LG)
  labels = [f"layer {l}" for l in range(len(mean_L))]
  picture = charts.bars(labels, mean_L.tolist(), "groups a token")
  alt = (
    f"Bars: from {mean_L.min():.3g} to {mean_L.max():.3g} of {groups_LG.shape[1]} groups a token"
  )
  return html.Figure("Groups that a token's choices lie in", alt, {"all": picture})


def tables(analysis: Analysis) -> list[html.Table]:
  """Returns load by layer, the commonest pairs, and the overlap of domains."""
  found = [load_table(analysis), pairs_table(analysis)]
  if (domains := domains_table(analysis)) is not None:
    found.append(domains)
  if (layers := layers_table(analysis)) is not None:
    found.append(layers)
  return found


def load_table(analysis: Analysis) -> html.Table:
  """Returns a row a layer: how even its load is, and groups a token."""
  header = ["MoE layer", "MaxVio", "load CV", "entropy / ln E", "dead", "starved"]
  names = ("max_vio", "load_cv", "load_entropy", "dead_experts", "starved_experts")
  columns = [[f"{value:.3g}" for value in analysis.load[name]] for name in names]
  if analysis.groups_LG is not None:
    header.append("groups a token")
    columns.append([f"{mean:.3f}" for mean in routing_analysis.mean_groups(analysis.groups_LG)])
  rows = [[str(l), *cells] for l, cells in enumerate(zip(*columns))]
  note = "Dead: without a token. Starved: below a tenth of the mean load, dead ones included."
  return html.Table("Load by layer", header, rows, note)


def pairs_table(analysis: Analysis, most: int = _MOST_PAIRS) -> html.Table:
  """Returns the pairs of experts that most tokens chose together, over all layers."""
  found = [
    (l, *pair)
    for l in range(len(analysis.counts_LE))
    for pair in routing_analysis.strongest_pairs(analysis, l, most)
  ]
  found.sort(key=lambda row: -row[3])
  rows = [
    [str(l), str(e), str(f), f"{tokens:,}", f"{lift:.2f}"] for l, e, f, tokens, lift in found[:most]
  ]
  header = ["MoE layer", "expert", "and expert", "tokens", "lift"]
  return html.Table("Commonest pairs of experts", header, rows)


def domains_table(analysis: Analysis) -> html.Table | None:
  """Returns the overlap of each two domains by layer; None without domains."""
  if analysis.domains is None or analysis.domain_overlap_LDD is None:
    return None
  names = analysis.domains.names
  two = [(a, b) for a in range(len(names)) for b in range(a + 1, len(names))]
  rows = [
    [str(l), *(f"{overlap_DD[a, b]:.3f}" for a, b in two)]
    for l, overlap_DD in enumerate(analysis.domain_overlap_LDD)
  ]
  header = ["MoE layer", *(f"{names[a]} / {names[b]}" for a, b in two)]
  note = "The sum over experts of the smaller of both shares; 1: routed alike."
  return html.Table("Overlap of domains", header, rows, note)


def layers_table(analysis: Analysis) -> html.Table | None:
  """Returns the overlap of each layer with the next, beside independent choices."""
  L = len(analysis.counts_LE)
  if L < 2:
    return None
  rows = [
    [
      f"{l} with {l + 1}",
      f"{analysis.layer_overlap_LL[l, l + 1]:.3f}",
      f"{analysis.chance_overlap_LL[l, l + 1]:.3f}",
    ]
    for l in range(L - 1)
  ]
  header = ["MoE layers", "overlap", "of independent choices"]
  return html.Table("Overlap of neighbouring layers", header, rows)
