"""Which mesh axes arrays vary over, inside `jax.shard_map` with `check_vma=True`.

There every array's type says over which axes of the mesh its value differs from device to device.
A kernel's results and the start of a loop's carry must be given that type explicitly, and operands
of a custom gradient must agree in it. Outside `shard_map` nothing varies and these functions
change nothing.
"""

import jax
import jax.numpy as jnp


def varying_axes(*trees) -> frozenset[str]:
  """Returns the mesh axes that any array of the trees varies over."""
  axes = (jax.typeof(a).manual_axis_type.varying for a in jax.tree.leaves(trees))
  return frozenset().union(*axes)


def _cast(tree, axes: frozenset[str]):
  """Casts arrays to vary over further axes."""

  def cast(a):
    missing = tuple(sorted(axes - varying_axes(a)))
    return jax.lax.pcast(a, missing, to="varying") if missing else a

  return jax.tree.map(cast, tree)


def vary_alike(*operands):
  """Returns the operands as a list, each varying over every mesh axis that any of them varies over.

  The gradient to an operand that was the same on all devices is then summed over them.

  Args:
    operands: trees of arrays.
  """
  return _cast(list(operands), varying_axes(*operands))


def varying_like(tree, *operands):
  """Returns a tree of arrays or structs that vary over what any of the operands varies over.

  Args:
    tree: arrays, or `jax.ShapeDtypeStruct`s that describe a kernel's results.
    operands: trees of arrays.
  """
  axes = varying_axes(*operands)
  kind = jax.sharding.ManualAxisType(varying=axes)

  def like(a):
    if isinstance(a, jax.ShapeDtypeStruct):
      return jax.ShapeDtypeStruct(a.shape, a.dtype, manual_axis_type=kind)
    return _cast(a, axes)

  return jax.tree.map(like, tree)


def zeros_like_operands(shape, dtype, *operands):
  """Returns zeros that vary over every mesh axis that any of the operands varies over."""
  return varying_like(jnp.zeros(shape, dtype), *operands)
