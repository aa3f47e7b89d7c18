"""The series of a run's metrics.jsonl, as plots and reports draw them.

L is the number of MoE layers, T the number of logged steps. Series of single experts that are longer
than 256 points are averaged, so that a long run is read in bounded memory.
"""

import itertools
from collections.abc import Iterable
from typing import Any

import numpy as np

from dsmoe.reporting import metrics

MAX_POINTS = 256  # even
SMOOTHED_POINTS = 40  # a loss of at least so many points is drawn with its running mean
_WIDE = ("expert_counts", "router_bias")  # [L, E] in each line: averaged while they are read


class Thinned:
  """At most MAX_POINTS means of equally many neighbouring (step, array) of a long series."""

  def __init__(self):
    self.sums: list[tuple[int, int, np.ndarray]] = []  # how many, sum of steps, sum of arrays
    self.stride = 1

  def add(self, step: int, array: np.ndarray) -> None:
    if self.sums and self.sums[-1][0] < self.stride:
      num, steps, total = self.sums[-1]
      self.sums[-1] = (num + 1, steps + step, total + array)
      return
    if len(self.sums) == MAX_POINTS:
      pairs = zip(self.sums[::2], self.sums[1::2])
      self.sums = [(a[0] + b[0], a[1] + b[1], a[2] + b[2]) for a, b in pairs]
      self.stride *= 2
      return self.add(step, array)
    self.sums.append((1, step, array))

  def means(self) -> tuple[np.ndarray, np.ndarray]:
    """Returns float steps [T] and arrays [T, L, E]."""
    return (
      np.array([steps / num for num, steps, _ in self.sums]),
      np.array([total / num for num, _, total in self.sums]),
    )


class Run:
  """The series of a metrics file; ValueError for expert counts or biases that change their shape."""

  def __init__(self, rows: Iterable[dict[str, Any]]):
    self.rows: list[dict[str, Any]] = []
    self.wide = {name: Thinned() for name in _WIDE}
    shapes: dict[str, tuple[int, ...]] = {}
    for row in rows:
      for name in _WIDE:
        if row.get(name):
          array = np.asarray(row[name], np.float64)
          if array.ndim != 2 or array.shape != shapes.setdefault(name, array.shape):
            raise ValueError(
              f"{name} of step {row['step']} must have a row for each layer, all of one length and "
              f"as in the lines before, its shape is {array.shape}"
            )
          self.wide[name].add(row["step"], array)
      self.rows.append({name: value for name, value in row.items() if name not in _WIDE})

  def series(self, name: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Returns steps [T] and values [T] or [T, L], null as NaN; None if there is no value.

    NaN also parts validation losses on different rows, which are points of different curves.
    """
    rows = [row for row in self.rows if row.get(name) not in (None, [])]
    if not rows:
      return None
    if name == "validation_loss":
      parts = itertools.groupby(rows, metrics.validation_curve)
      rows = [row for _, part in parts for row in (*part, {"step": np.nan, name: np.nan})][:-1]
    return np.array([row["step"] for row in rows]), np.array([row[name] for row in rows], float)


def running_mean(value_T, reach: int) -> np.ndarray:
  """Averages each point with `reach` neighbours on either side, fewer at the ends."""
  sums = np.concatenate([[0.0], np.cumsum(value_T, dtype=np.float64)])
  at = np.arange(len(value_T))
  first, end = np.maximum(at - reach, 0), np.minimum(at + reach + 1, len(value_T))
  return (sums[end] - sums[first]) / (end - first)
