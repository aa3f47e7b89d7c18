"""Optimizer and learning-rate schedule, from optax. New ones are added to the two tables."""

from collections.abc import Callable

import jax.numpy as jnp
import optax

from dsmoe.config import OptimConfig
from dsmoe.model import parameters


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


def make(config: OptimConfig, num_steps: int) -> optax.GradientTransformation:
  """Returns clipping and the optimizer with its schedule."""
  optimizer = OPTIMIZERS[config.name](config, schedule(config, num_steps))
  if not config.clip_norm:
    return optimizer
  return optax.chain(optax.clip_by_global_norm(config.clip_norm), optimizer)
