"""Counts the FLOPs of matrix products in a traced program, loops as often as they run.

Compilers count the body of a loop once. A Pallas kernel counts as it declares, which for grouped
matmuls is every row of its buffers, whether an expert has it or not. XLA may find that some products
are not needed or are made twice, so a compiled program computes at most this.
"""

import math
from collections.abc import Iterator
from typing import Any


def count(jaxpr: Any) -> int | None:
  """Returns the FLOPs of a jaxpr, one device's inside `shard_map`; None where they are not known.

  Of a conditional the dearest branch counts. They are not known where a product is in a loop of as
  many rounds as the data say, or in a kernel that declares nothing.

  Args:
    jaxpr: a `Jaxpr` or `ClosedJaxpr`, as `jax.jit(fn).trace(*args).jaxpr` is.
  """
  total = 0
  for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
    own = _of_equation(equation)
    if own is None:
      return None
    total += own
  return total


def _of_equation(equation: Any) -> int | None:
  name, params = equation.primitive.name, equation.params
  if name == "dot_general":
    (contracted, _), _ = params["dimension_numbers"]
    shape = equation.invars[0].aval.shape
    return 2 * equation.outvars[0].aval.size * math.prod(shape[i] for i in contracted)
  if name == "ragged_dot_general":
    dims, (lhs, _, sizes) = params["ragged_dot_dimension_numbers"], equation.invars
    (contracted, _), _ = dims.dot_dimension_numbers
    inner = math.prod(lhs.aval.shape[i] for i in contracted)
    # Where the groups share the contracted rows, each has a result of its own.
    shared = dims.lhs_ragged_dimensions[0] in contracted
    return 2 * equation.outvars[0].aval.size * inner // (sizes.aval.size if shared else 1)
  if (
    "cost_estimate" in params
  ):  # of Pallas: pallas_call, and mpmd_map, which Mosaic GPU's kernels are
    cost = params["cost_estimate"]
    return None if cost is None else int(cost.flops)
  inner_flops = [count(inner) for inner in _jaxprs(params)]
  if None in inner_flops:
    return None
  known = [flops for flops in inner_flops if flops is not None]
  if name == "cond":
    return max(known)
  if name == "while":
    return None if any(known) else 0
  return sum(known) * (params["length"] if name == "scan" else 1)


def _jaxprs(params: dict[str, Any]) -> Iterator[Any]:
  """Yields the jaxprs among an equation's parameters, those in tuples and lists too."""
  for value in params.values():
    for each in value if isinstance(value, (tuple, list)) else (value,):
      if hasattr(each, "eqns") or hasattr(getattr(each, "jaxpr", None), "eqns"):
        yield each
