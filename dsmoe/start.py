"""How a run starts: on its devices; from a checkpoint, the weights of another run, or nothing."""

import functools
from typing import Any, NamedTuple

import jax
from etils import epath

from dsmoe import checkpoint
from dsmoe.config import Config
from dsmoe.data import batches as data
from dsmoe.parallel import mesh as mesh_lib
from dsmoe.parallel import processes
from dsmoe.reporting import metrics
from dsmoe.training import elastic, train_step
from dsmoe.training.programs import Programs


def on_these_devices(config: Config) -> Config:
  """Returns the config, with a mesh that fits the devices of all processes; see `elastic`."""
  return elastic.config_for(config, jax.device_count(), len(mesh_lib.slices(jax.devices())))


class Origin(NamedTuple):
  """Where a run starts."""

  step: int
  is_resumed: bool  # from the checkpoint of `step`, in the run's own workdir
  weights: tuple[Any, Any, int] | None  # of another run: parameters, router bias, step


def find(
  checkpoints: checkpoint.Checkpointer,
  workdir: epath.Path,
  config: Config,
  abstract: train_step.TrainState,
  allow_config_change: bool,
  init_from: epath.PathLike | None,
  resume_from: int | None,
) -> Origin:
  """Finds where a run starts; writes nothing.

  Args:
    checkpoints: the run's.
    workdir: the run's.
    config: as it was asked for.
    abstract: of the state, as `train_step.abstract_state` returns it.
    allow_config_change, init_from, resume_from: see `dsmoe.train.points`.

  Raises:
    ValueError: when the run cannot go on from the checkpoint, or the weights do not fit.
  """
  with processes.failing_together():
    found = checkpoints.find_step(resume_from)
    first = found or 0
    if found is not None:
      checkpoint.check_config(workdir, config, found, abstract, allow_config_change)
    if first > config.num_steps:
      raise ValueError(
        f"num_steps ({config.num_steps}) must be at least the step that the run in {workdir} has "
        f"reached ({first})"
      )
  weights = None
  if init_from and not first:
    weights = checkpoint.restore_weights(init_from, abstract.params, abstract.router_bias)
  # A checkpoint of step 0 has the weights that an earlier start took from another run.
  return Origin(first, found is not None and weights is None, weights)


def state(
  origin: Origin,
  checkpoints: checkpoint.Checkpointer,
  workdir: epath.Path,
  config: Config,
  mesh: jax.sharding.Mesh,
  abstract: train_step.TrainState,
  programs: Programs,
) -> tuple[train_step.TrainState, data.Position, dict]:
  """Restores the state, or makes a new one; says what it is, and sets later checkpoints aside.

  Returns:
    The state, the place in the data, and what was saved beside the state, which
    `bad_steps.BadSteps` reads.
  """
  what = "initialising parameters and optimizer"
  if origin.is_resumed:
    what = f"restoring checkpoint {origin.step}"
  processes.say(f"{what}, reading the first batch")
  if not origin.is_resumed:
    new = programs.init_state(config, mesh)
    if origin.weights is not None:
      new = new._replace(params=origin.weights[0], router_bias=origin.weights[1])
    return new, data.first_position(config.data), {}
  restored, saved = checkpoints.restore(abstract, origin.step)
  config_then = functools.partial(checkpoint.config_of_step, workdir, origin.step)
  position = data.position_from_dict(saved, config_then)
  processes.say(f"resumed from step {origin.step}")
  if (aside := checkpoints.set_later_aside(origin.step)) is not None:
    if processes.is_first() and (workdir / metrics.METRICS_FILE).exists():
      (workdir / metrics.METRICS_FILE).copy(aside / metrics.METRICS_FILE)
    processes.say(f"later checkpoints and metrics are kept in {aside}")
  return restored, position, saved
