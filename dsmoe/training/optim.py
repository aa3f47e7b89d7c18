"""Optimizer and learning-rate schedule, from optax. New ones are added to the two tables.

What is elementwise runs on the sharded arrays as it is. What is not, the gradient's norm, is
written from one device's view and called inside `mesh.shard_map`, like the model.

Shapes: L layers of a stack.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dsmoe.config import OptimConfig
from dsmoe.model import parameters
from dsmoe.parallel import collectives
from dsmoe.parallel.mesh import AXES
from pallas_kernels import varying


def _cosine(config: OptimConfig, num_steps: int) -> optax.Schedule:
  """Warms up linearly from 0, then half a cosine down to the end of the run."""
  return optax.warmup_cosine_decay_schedule(
    init_value=0.0,
    peak_value=config.learning_rate,
    warmup_steps=config.warmup_steps,
    decay_steps=num_steps,
    end_value=config.final_learning_rate,
  )


def _wsd(config: OptimConfig, num_steps: int) -> optax.Schedule:
  """Warms up linearly, stays at the peak, decays linearly over the last `decay_steps`."""
  peak = config.learning_rate
  return optax.join_schedules(
    [
      optax.linear_schedule(0.0, peak, config.warmup_steps),
      optax.constant_schedule(peak),
      optax.linear_schedule(peak, config.final_learning_rate, config.decay_steps),
    ],
    [config.warmup_steps, num_steps - config.decay_steps],
  )


def _adamw(config: OptimConfig, learning_rate: optax.Schedule) -> optax.GradientTransformation:
  return optax.adamw(
    learning_rate,
    b1=config.beta1,
    b2=config.beta2,
    eps=config.epsilon,
    weight_decay=config.weight_decay,
    mask=parameters.decayed,
    mu_dtype=jnp.dtype(config.moment_dtype),
  )


SCHEDULES: dict[str, Callable[..., optax.Schedule]] = {"cosine": _cosine, "wsd": _wsd}
OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {"adamw": _adamw}


def schedule(config: OptimConfig, num_steps: int) -> optax.Schedule:
  """Returns learning rate by optimizer step."""
  return SCHEDULES[config.schedule](config, num_steps)


def make(config: OptimConfig, num_steps: int) -> optax.GradientTransformationExtraArgs:
  """Returns clipping and the optimizer with its schedule.

  Its `update` takes `norm`, the gradient's of `norms`.
  """
  optimizer = optax.with_extra_args_support(
    OPTIMIZERS[config.name](config, schedule(config, num_steps))
  )
  return optax.chain(_clip(config.clip_norm), optimizer) if config.clip_norm else optimizer


def _clip(limit: float) -> optax.GradientTransformationExtraArgs:
  """Scales gradients down to the limit where their norm is above it."""

  def update(gradients, state, params=None, *, norm, **_):
    factor = jnp.where(norm < limit, 1.0, limit / norm)
    return jax.tree.map(lambda g: g * factor.astype(g.dtype), gradients), state

  return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)


def norms(gradients: dict[str, Any]) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Returns the norm of all gradients, and of each top-level part; call inside `mesh.shard_map`.

  A device sums the squares of what it holds, of what several devices hold alike only where it is
  the first of them; one sum over the mesh, of a number for each part and layer, does the rest.

  Args:
    gradients: this device's shards of a tree like the parameters.

  Returns:
    Float32, alike on all devices: a scalar, and by name scalars, or [L] for a stack of layers.
  """
  squares = {
    name: sum(_own_squares(g, name in parameters.STACKS) for g in jax.tree.leaves(part))
    for name, part in gradients.items()
  }
  sizes = [square_L.size for square_L in squares.values()]
  total = collectives.sum_over_mesh(jnp.concatenate([a.reshape(-1) for a in squares.values()]))
  parts = jnp.split(total, [sum(sizes[: i + 1]) for i in range(len(sizes) - 1)])
  by_name = {
    name: jnp.sqrt(part.reshape(squares[name].shape)) for name, part in zip(squares, parts)
  }
  return jnp.sqrt(jnp.sum(total)), by_name


def _own_squares(gradient, is_stacked: bool):
  """Returns the sum of squares that this device adds to all devices', of each layer of a stack."""
  axes = tuple(range(1, gradient.ndim)) if is_stacked else None
  square_L = jnp.sum(jnp.square(gradient.astype(jnp.float32)), axis=axes)
  alike = [axis for axis in AXES if axis not in varying.varying_axes(gradient)]
  return collectives.on_first_device(square_L, alike)
