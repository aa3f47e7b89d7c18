"""Finds the scalar operands of a program's Pallas kernels: dynamic grid sizes, prefetched indices.

The part of a traced program that depends on known arguments only is evaluated.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

_MOST = 2**22
_CALLS = ("jaxpr", "call_jaxpr", "fun_jaxpr")  # parameters of equations that hold a called program


def of_kernels(fn: Callable, *args) -> dict[str, list[dict[int, np.ndarray]]]:
  """Returns for each kernel's name, for each of its calls, the known integer operands by index.

  Args:
    fn: a function of arrays.
    *args: known arguments as arrays, unknown ones as `jax.ShapeDtypeStruct`.
  """
  leaves, tree = jax.tree.flatten(args)
  closed = jax.make_jaxpr(lambda *leaves: fn(*jax.tree.unflatten(tree, leaves)))(*leaves)
  known = [None if isinstance(a, jax.ShapeDtypeStruct) else a for a in leaves]
  found: dict[str, list[dict[int, np.ndarray]]] = {}
  _follow(closed.jaxpr, closed.consts, known, found)
  return found


def _follow(jaxpr: Any, consts: Any, known: list, found: dict) -> list:
  """Evaluates the equations whose operands are known; returns the results, None if unknown."""
  values: dict[Any, Any] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *known]))

  def value(atom):
    return atom.val if hasattr(atom, "val") else values.get(atom)

  for equation in jaxpr.eqns:
    operands = [value(v) for v in equation.invars]
    results: list = [None] * len(equation.outvars)
    inner = next((equation.params[n] for n in _CALLS if n in equation.params), None)
    if equation.primitive.name == "pallas_call":
      scalars = {
        i: np.asarray(o)
        for i, o in enumerate(operands)
        if o is not None and np.issubdtype(np.asarray(o).dtype, np.integer)
      }
      found.setdefault(_name(equation), []).append(scalars)
    elif inner is not None and equation.primitive.name not in ("while", "scan", "cond"):
      body, constants = (inner.jaxpr, inner.consts) if hasattr(inner, "consts") else (inner, [])
      if len(body.invars) == len(operands):
        results = _follow(body, constants, operands, found)
    elif all(o is not None for o in operands) and all(map(_may_count, equation.outvars)):
      out = equation.primitive.bind(*operands, **equation.params)
      results = list(out) if equation.primitive.multiple_results else [out]
    values.update(zip(equation.outvars, results))
  return [value(v) for v in jaxpr.outvars]


def _may_count(variable: Any) -> bool:
  """Returns whether an array is small enough to be a kernel's scalars or to determine them."""
  return getattr(variable.aval, "size", 0) <= _MOST


def _name(equation: Any) -> str:
  source = equation.params.get("name_and_src_info")
  return getattr(source, "name", None) or equation.params.get("name") or ""
