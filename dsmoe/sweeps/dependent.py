"""Fields of a sweep that are a fixed multiple of another one.

An experiment may set a field to go with a searched one: final_learning_rate = learning_rate / 20. It
is no dimension of the search. Beside the other field it would be a second column of the same order,
and take half of its importance.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from dsmoe.sweeps import sentences
from dsmoe.sweeps.results import Sweep

_RELATIVE_ERROR = 1e-9  # of a product of two floats, with room


def multiples(
  points: Sequence[Mapping[str, Any]], fields: Sequence[str]
) -> dict[str, tuple[str, float]]:
  """Finds the fields that are a fixed multiple of another one in all points.

  Args:
    points: values of the fields; points without values are passed over.
    fields: in any order. Of two, the one with the longer name is the multiple.

  Returns:
    Field -> the other field and the factor. The other one is in no other pair a multiple. A field
    with one value in all points, or with values that are no numbers or 0, is in no pair.
  """
  points = [point for point in points if point]
  found: dict[str, tuple[str, float]] = {}
  ordered = sorted(fields, key=lambda field: (len(field), field))
  for at, field in enumerate(ordered):
    for other in ordered[:at]:
      if other not in found and (factor := _factor(points, field, other)) is not None:
        found[field] = (other, factor)
        break
  return found


def _factor(points: Sequence[Mapping[str, Any]], field: str, other: str) -> float | None:
  pairs: list[tuple[Any, Any]] = [(point.get(field), point.get(other)) for point in points]
  if not all(_is_number(value) for pair in pairs for value in pair):
    return None
  if len({value for _, value in pairs}) < 2:
    return None
  try:
    factor = pairs[0][0] / pairs[0][1]
    same = all(math.isclose(a, factor * b, rel_tol=_RELATIVE_ERROR) for a, b in pairs)
  except OverflowError:  # of an integer above all floats
    return None
  return factor if same else None


def _is_number(value: Any) -> bool:
  return isinstance(value, int | float) and not isinstance(value, bool) and value != 0


def without(sweep: Sweep) -> tuple[Sweep, list[str]]:
  """Returns a sweep without the fields that are multiples, and a sentence about each of these."""
  fields = [field for field in sweep.fields if field != "seed"]
  found = multiples([trial.params for trial in sweep.trials], fields)
  if not found:
    return sweep, []
  trials = [
    trial._replace(params={f: value for f, value in trial.params.items() if f not in found})
    for trial in sweep.trials
  ]
  kept = tuple(field for field in sweep.fields if field not in found)
  said = [
    f"In all trials so far {field} is {sentences.text(factor)} times {other}, and is not listed."
    for field, (other, factor) in found.items()
  ]
  return sweep._replace(fields=kept, trials=trials), said
