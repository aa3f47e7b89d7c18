"""The load of experts over a run, and how the router bias moved against it."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from dsmoe.reporting import curve_sections, html, routing_analysis
from dsmoe.reporting.html import charts
from dsmoe.reporting.run_files import RunFiles

_MOST_EXPERTS = 400  # that are drawn one by one, over all layers, so that a page stays small
_MOST_POINTS = 20_000  # of the lines of their biases


def expert_load(run: RunFiles, is_named: bool) -> html.Section | None:
  """Returns the load of experts over the steps, and how uneven it was; None without experts."""
  parts: list[Any] = []
  if run.series.wide["expert_counts"].sums:
    step_T, count_TLE = run.series.wide["expert_counts"].means()
    mean_TL1 = count_TLE.mean(axis=2, keepdims=True)
    load_TLE = count_TLE / np.where(mean_TL1 > 0, mean_TL1, np.nan)
    T, L, E = load_TLE.shape
    views = {
      f"layer {l}": charts.load_map(
        load_TLE[:, l], _edges(step_T), "optimizer step", "expert", "load / mean load"
      )
      for l in shown_layers(L, E)
    }
    title = f"Load of each of {E} experts over the steps"
    alt = f"Heat map of the load of {E} experts over {T} points in time, over the layer's mean"
    parts.append(html.Figure(title, alt, views, note=_heat_note(L, E)))
    total_LE = count_TLE.sum(axis=0)
    share_LE = total_LE / np.maximum(total_LE.mean(axis=1, keepdims=True), 1e-9)
    parts.append(
      html.Figure(
        "Tokens by expert, all logged steps",
        f"Heat map of the load of {E} experts in {L} layers, summed over the logged steps",
        {
          "all": charts.load_map(
            share_LE, np.arange(L + 1) - 0.5, "MoE layer", "expert", "load / mean load"
          )
        },
      )
    )
  for name, title, y_label, is_smoothed in (
    ("max_vio", "MaxVio: largest load over mean load, minus 1", "MaxVio", True),
    ("dead_experts", "Experts without a token in a step", "experts", False),
    ("groups_per_token", "Groups that a token's choices lie in", "groups", True),
  ):
    if (xy := run.xy(name)) is not None and xy[1].ndim == 2 and np.nan_to_num(xy[1]).any():
      parts.append(_by_layer(xy, title, y_label, is_smoothed))
  return html.Section(_titled("Expert load", run, is_named), parts) if parts else None


def _by_layer(
  xy: tuple[np.ndarray, np.ndarray], title: str, y_label: str, is_smoothed: bool
) -> html.Figure:
  """Returns a line a layer; of many layers, their mean, smallest and largest."""
  step_T, value_TL = xy
  L = value_TL.shape[1]
  if L <= len(charts.PALETTE):
    named = [(f"layer {l}", value_TL[:, l]) for l in range(L)]
  else:
    named = [("largest layer", value_TL.max(axis=1)), ("mean of layers", value_TL.mean(axis=1))]
    named.append(("smallest layer", value_TL.min(axis=1)))
  drawn = [
    charts.Line(step_T, y_T, key, is_smoothed=is_smoothed)
    for (_, y_T), key in zip(named, charts.keys([name for name, _ in named]))
  ]
  ends = "; ".join(f"{name}: {curve_sections.ends_of(y_T)}" for name, y_T in named[:4])
  legend = [line.key for line in drawn]
  views = {"steps": charts.lines(drawn, "optimizer step", y_label, "from zero")}
  note = curve_sections.smoothing_note([len(step_T)]) if is_smoothed else ""
  return html.Figure(title, f"{title}, line chart over steps. {ends}", views, legend, note)


def router_bias(run: RunFiles, is_named: bool) -> html.Section | None:
  """Returns how each expert's bias moved; None for a model without."""
  if not run.series.wide["router_bias"].sums:
    return None
  step_T, bias_TLE = run.series.wide["router_bias"].means()
  if not np.nan_to_num(bias_TLE).any():
    return None
  T, L, E = bias_TLE.shape
  keys = charts.keys([f"expert {e}" for e in range(E)])
  views = {}
  layers = shown_layers(L, E)
  few_T = np.unique(np.linspace(0, T - 1, min(T, _MOST_POINTS // (E * len(layers)) + 2), dtype=int))
  for l in layers:
    drawn = [charts.Line(step_T[few_T], bias_TLE[few_T, l, e], keys[e]) for e in range(E)]
    views[f"layer {l}"] = charts.lines(drawn, "optimizer step", "bias (score units)")
  low, high = np.nanmin(bias_TLE[-1]), np.nanmax(bias_TLE[-1])
  alt = f"Lines of the router bias of {E} experts; at the end from {low:.3g} to {high:.3g}"
  legend = keys if E <= len(charts.PALETTE) * 2 else []
  note = "Only differences of biases select experts, so that all may drift together."
  parts: list[Any] = [html.Figure("Bias of each expert", alt, views, legend, note)]
  if (xy := run.xy("bias_range")) is not None and xy[1].ndim == 2:
    parts.append(_by_layer(xy, "Largest minus smallest bias", "score units", False))
  return html.Section(_titled("Router bias", run, is_named), parts)


def _titled(title: str, run: RunFiles, is_named: bool) -> str:
  return f"{title}: {run.name}" if is_named else title


def shown_layers(num_layers: int, num_experts: int) -> Sequence[int]:
  """Returns the layers whose experts are drawn one by one."""
  most = max(2, min(8, _MOST_EXPERTS // num_experts))
  return routing_analysis.shown_layers(num_layers, most)


def _heat_note(num_layers: int, num_experts: int) -> str:
  note = "No colour: the mean. Orange: more. Blue: less."
  if (shown := len(shown_layers(num_layers, num_experts))) < num_layers:
    note += f" {shown} of {num_layers} layers are shown."
  return note


def _edges(step_T: np.ndarray) -> np.ndarray:
  """Returns the T + 1 borders between points in time, half-way."""
  if len(step_T) == 1:
    return np.array([step_T[0] - 0.5, step_T[0] + 0.5])
  middle = (step_T[1:] + step_T[:-1]) / 2
  ends = (1.5 * step_T[0] - 0.5 * step_T[1], 1.5 * step_T[-1] - 0.5 * step_T[-2])
  return np.concatenate([[ends[0]], middle, [ends[1]]])
