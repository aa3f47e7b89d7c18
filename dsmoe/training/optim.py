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
from dsmoe.training.hyperparameters import Hyperparameters
from pallas_kernels import varying


def _cosine(step, hyper: Hyperparameters):
  """Half a cosine from the end of the warm-up down to the end of the run."""
  num_decaying = hyper.num_steps - hyper.warmup_steps
  share = jnp.clip(step - hyper.warmup_steps, 0, num_decaying) / num_decaying
  return (1 + jnp.cos(jnp.pi * share)) / 2


def _wsd(step, hyper: Hyperparameters):
  """The peak, then down linearly over the last `decay_steps`."""
  decaying = step - (hyper.num_steps - hyper.decay_steps)
  return 1 - jnp.clip(decaying, 0, hyper.decay_steps) / jnp.maximum(hyper.decay_steps, 1)


def _adamw(
  config: OptimConfig, hyper: Hyperparameters, learning_rate: optax.Schedule
) -> optax.GradientTransformation:
  return optax.adamw(
    learning_rate,
    b1=hyper.beta1,
    b2=hyper.beta2,
    eps=hyper.epsilon,
    weight_decay=hyper.weight_decay,
    mask=parameters.decayed,
    mu_dtype=jnp.dtype(config.moment_dtype),
  )


# Each returns what is left of the way from the peak to the final learning rate, 1 to 0.
SCHEDULES: dict[str, Callable[[Any, Hyperparameters], jax.Array]] = {"cosine": _cosine, "wsd": _wsd}
OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {"adamw": _adamw}


def schedule(name: str, hyper: Hyperparameters) -> optax.Schedule:
  """Returns learning rate by optimizer step: up linearly from 0 in the warm-up, then as `name` says.

  optax's schedules decide in Python by what are arguments of a compiled step here.

  Args:
    name: of `SCHEDULES`.
    hyper: warmup_steps, num_steps and, for "wsd", decay_steps; learning_rate, the peak, and
      final_learning_rate.
  """

  def learning_rate(step):
    peak, final = hyper.learning_rate, hyper.final_learning_rate
    warming_up = peak * (step / jnp.maximum(hyper.warmup_steps, 1))
    later = final + (peak - final) * SCHEDULES[name](step, hyper)
    return jnp.where(step < hyper.warmup_steps, warming_up, later)

  return learning_rate


def updates_made(opt_state: Any) -> jax.Array:
  """Returns the schedule's step, int32: optimizer steps done, of which skipped ones are none."""
  is_schedule = lambda part: isinstance(part, optax.ScaleByScheduleState)  # noqa: E731
  [schedule] = filter(is_schedule, jax.tree.leaves(opt_state, is_leaf=is_schedule))
  return schedule.count


def make(config: OptimConfig, hyper: Hyperparameters) -> optax.GradientTransformationExtraArgs:
  """Returns clipping and the optimizer with its schedule.

  Its `update` takes `norm`, the gradient's of `norms`.

  Args:
    config: names of optimizer and schedule, the moments' dtype, and whether there is clipping.
    hyper: the numbers, which may be arguments of a compiled step.
  """
  optimizer = optax.with_extra_args_support(
    OPTIMIZERS[config.name](config, hyper, schedule(config.schedule, hyper))
  )
  return optax.chain(_clip(hyper.clip_norm), optimizer) if config.clip_norm else optimizer


def _clip(limit) -> optax.GradientTransformationExtraArgs:
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
