"""The pictures of a sweep, for a page: black is the page's ink, other colours suit light and dark."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import figure, ticker

from dsmoe.reporting.html import Key, charts, svg
from dsmoe.sweeps import effects, sentences, verdict
from dsmoe.sweeps.importance import Importance

TIED, OTHER, MARK = charts.PALETTE[0], charts.PALETTE[8], charts.PALETTE[1]
KEYS = (Key("tied with the best", TIED), Key("worse beyond the noise", OTHER))
MOST_RANKED = 20
MOST_SETTINGS = 500  # in one picture, the best ones
_WIDTH = 5.0  # inches
_LOG_RATIO = 8.0  # a field whose values span as much has a logarithmic axis
_MOST_TICKS = 6
_NOT_SET = 0.15  # how far below the lowest value those settings are that do not have the field
_FAR = 5.0  # losses this many times as far from the median as that is from the best are cut


def ranking(found: verdict.Ranking) -> figure.Figure:
  """Draws the best settings by rank: the loss of each run, and the mean with its interval.

  Far higher losses are at the right edge.
  """
  shown = found.ranked[:MOST_RANKED]
  picture, ax = charts.axes("final validation loss (nats a token)", "rank", 0.9 + 0.24 * len(shown))
  limit = _limit([ranked.mean for ranked in shown])
  for row, ranked in enumerate(shown):
    color = _color(ranked)
    if ranked.mean > limit:
      ax.plot(limit, row, ">", color=color, markersize=4.5)
      continue
    losses = [loss for loss in ranked.setting.losses.values() if loss <= limit]
    ax.plot(losses, [row] * len(losses), "|", color=color, markersize=7, alpha=0.6)
    if ranked.interval is not None:
      low, high = ranked.interval
      ax.plot([low, min(high, limit)], [row, row], color=color, linewidth=1.4)
    ax.plot(ranked.mean, row, "o", color=color, markersize=4.5)
  ax.set_yticks(range(len(shown)), [str(row + 1) for row in range(len(shown))])
  ax.set_ylim(len(shown) - 0.5, -0.5)
  ax.grid(axis="x", color="black", alpha=0.15, linewidth=0.6)
  ax.xaxis.set_major_locator(ticker.MaxNLocator(5))
  return picture


def against(found: verdict.Ranking, field: str) -> tuple[figure.Figure, int]:
  """Draws the mean loss of settings over one field's value, with intervals.

  Returns:
    The picture, and how many settings are shown at its upper edge because their losses are far higher.
  """
  shown = [r for r in found.ranked[:MOST_SETTINGS] if field in r.setting.params][::-1]
  values = [ranked.setting.params[field] for ranked in shown]
  picture, ax = charts.axes(svg.literal(field), "final validation loss (nats a token)", 3.2)
  place_S = _scale_axis(ax, values)
  limit = _limit([ranked.mean for ranked in shown])
  num_far = 0
  for ranked, place in zip(shown, place_S):
    color = _color(ranked)
    if ranked.mean > limit:
      num_far += 1
      ax.plot(place, limit, "^", color=color, markersize=4.5)
      continue
    if ranked.interval is not None:
      low, high = ranked.interval
      ax.plot([place, place], [low, min(high, limit)], color=color, linewidth=1.2, alpha=0.7)
    ax.plot(place, ranked.mean, "o", color=color, markersize=4, alpha=0.9)
  ax.grid(axis="y", color="black", alpha=0.15, linewidth=0.6)
  return picture, num_far


def parallel(found: verdict.Ranking, fields: Sequence[str], names: Mapping[str, str]):
  """Draws each setting as a line through an axis for each field and one for the loss."""
  shown = found.ranked[:MOST_SETTINGS][::-1]
  picture = figure.Figure(figsize=(max(_WIDTH, 1.5 * (len(fields) + 1)), 3.6), layout="constrained")
  ax = picture.subplots()
  columns = [_column(ax, n, [r.setting.params.get(f) for r in shown]) for n, f in enumerate(fields)]
  limit = _limit([ranked.mean for ranked in shown])
  columns.append(_column(ax, len(fields), [min(r.mean, limit) for r in shown], "{:.4f}"))
  for row, ranked in enumerate(shown):
    style: dict[str, Any] = {"color": _color(ranked), "linewidth": 1.6 if ranked.is_tied else 0.9}
    alpha = 0.9 if ranked.is_tied else 0.25 + 0.35 * row / len(shown)
    ax.plot(range(len(columns)), [column[row] for column in columns], alpha=alpha, **style)
  for n in range(len(columns)):
    ax.axvline(n, color="black", linewidth=0.8)
  labels = [_broken(svg.literal(names.get(field, field))) for field in fields]
  ax.set_xticks(range(len(columns)), [*labels, "final\nloss"], fontsize=9)
  ax.tick_params(length=0, pad=12)
  ax.set_yticks([])
  ax.set_xlim(-0.35, len(columns) - 0.4)
  ax.set_ylim(-0.08, 1.08)
  ax.spines[:].set_visible(False)
  return picture


def importance(found: Sequence[Importance], names: Mapping[str, str]) -> figure.Figure:
  """Draws each field's share with its interval, and a mark for what chance reaches."""
  picture, ax = charts.axes("share of the variance of ranks", "", 0.9 + 0.36 * len(found))
  for row, one in enumerate(found):
    color = TIED if one.is_beyond_chance else OTHER
    ax.barh(row, max(one.share, 0.0), color=color, height=0.6, alpha=0.55)
    ax.plot([max(one.low, 0.0), max(one.high, 0.0)], [row, row], color="black", linewidth=1.2)
    ax.plot([one.chance] * 2, [row - 0.38, row + 0.38], color=MARK, linewidth=2)
  ax.set_yticks(range(len(found)), [svg.literal(names.get(one.field, one.field)) for one in found])
  ax.set_ylim(len(found) - 0.5, -0.5)
  ax.set_xlim(0, max(1.0, *(one.chance for one in found)))
  ax.xaxis.set_major_formatter(ticker.PercentFormatter(1.0))
  return picture


def _color(ranked: verdict.Ranked) -> str:
  return TIED if ranked.is_tied else OTHER


def _limit(losses: Sequence[float]) -> float:
  """Returns where losses are cut that are far higher than the median, above all others, or infinity."""
  loss_S = np.asarray(losses)
  low, middle = loss_S.min(), np.median(loss_S)
  near_S = loss_S[loss_S <= middle + _FAR * (middle - low)]
  if len(near_S) == len(loss_S):
    return float("inf")
  return float(near_S.max() + 0.1 * (near_S.max() - low))


def _is_log(values: Sequence[Any]) -> bool:
  return min(values) > 0 and max(values) / min(values) >= _LOG_RATIO


def _are_numbers(values: Sequence[Any]) -> bool:
  return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def _text(value: Any) -> str:
  return "not set" if value is None else sentences.text(value)


def _scale_axis(ax, values: Sequence[Any]) -> list[float]:
  """Sets the x axis up for a field's values, and returns where they are."""
  distinct = sorted({verdict.key({"": v}): v for v in values}.values(), key=effects.order)
  if not _are_numbers(values):
    keys = [verdict.key({"": value}) for value in distinct]
    labels = [svg.literal(_text(value)) for value in distinct]
    turn = 30 if max(map(len, labels)) * len(labels) > 40 else 0
    ax.set_xticks(range(len(distinct)), labels, rotation=turn, ha="right" if turn else "center")
    ax.set_xlim(-0.5, len(distinct) - 0.5)
    return [float(keys.index(verdict.key({"": value}))) for value in values]
  if _is_log(values):
    ax.set_xscale("log")
    ratio = max(values) / min(values)
    subs = (1.0,) if ratio > 1e3 else (1.0, 3.0) if ratio > 50 else (1.0, 2.0, 5.0)
    ax.xaxis.set_major_locator(ticker.LogLocator(subs=subs))
    ax.xaxis.set_major_formatter("{x:g}")  # not powers, whose text a page's SVG does not show
    ax.xaxis.set_minor_formatter(ticker.NullFormatter())
  if len(distinct) <= _MOST_TICKS:
    ax.set_xticks(distinct, [_text(value) for value in distinct])
    ax.xaxis.set_minor_locator(ticker.NullLocator())
  return [float(value) for value in values]


def _column(ax, at: int, values: Sequence[Any], form: str = "{:.3g}") -> list[float]:
  """Labels one axis of parallel coordinates, and returns heights from 0 to 1 of its values.

  What is not set is at the bottom, below the others. `form` is that of floating-point numbers.
  """
  keys = [verdict.key({"": value}) for value in values]
  given = [value for value in values if value is not None]
  bottom = 0.0 if len(given) == len(values) else _NOT_SET
  distinct = sorted({verdict.key({"": v}): v for v in given}.values(), key=effects.order)
  place = {verdict.key({"": value}): float(n) for n, value in enumerate(distinct)}
  if given and _are_numbers(given):
    place = {key: float(np.log(v) if _is_log(given) else v) for key, v in zip(place, distinct)}
    if len(distinct) > _MOST_TICKS:
      distinct = [distinct[0], distinct[-1]]
  low, high = min(place.values(), default=0.0), max(place.values(), default=0.0)
  heights = {
    key: bottom + (1 - bottom) * ((where - low) / (high - low) if high > low else 0.5)
    for key, where in place.items()
  }
  if bottom:
    heights[verdict.key({"": None})] = 0.0
    distinct = [None, *distinct]
  for value in distinct:
    text = form.format(value) if isinstance(value, float) else _text(value)
    height = heights[verdict.key({"": value})]
    is_lowest = height == min(heights.values())
    where, side = (height - 0.015, "top") if is_lowest else (height + 0.01, "bottom")
    ax.text(at + 0.03, where, svg.literal(text), fontsize=9, va=side, zorder=5)
  return [heights[key] for key in keys]


def _broken(name: str) -> str:
  """Breaks a long name at an underscore or a dot near its middle."""
  places = [n for n, letter in enumerate(name) if letter in "_." and 0 < n < len(name) - 1]
  if len(name) <= 12 or not places:
    return name
  at = min(places, key=lambda n: abs(n - len(name) / 2))
  return f"{name[: at + 1]}\n{name[at + 1 :]}"
