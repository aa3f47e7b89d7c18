"""Compiled programs that the runs of one process share, such as the trials of a sweep."""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from dsmoe.config import Config
from dsmoe.training import exchange_check, hyperparameters, kernel_check, train_step
from dsmoe.training.train_step import TrainState


class Programs:
  """Makes the programs of runs, and keeps them for later runs that need the very same ones.

  Those are runs whose configs have equal `hyperparameters.program_key`s, on equal meshes: they
  differ in arguments of the programs, such as the learning rate, or in what no program reads. JAX's
  own settings must be the same for all runs of one object.
  """

  def __init__(self, limit: int = 4):
    """Has no program yet.

    Args:
      limit: how many of each kind are kept, at least 1; the one least recently used goes first.
    """
    self._limit = limit
    self._kept: dict[str, dict[Any, Any]] = {}

  def train_step(
    self, config: Config, mesh: jax.sharding.Mesh, args: Sequence[Any], record_routing: bool = False
  ) -> jax.stages.Compiled:
    """Returns the compiled gated step of `train_step.make_train_step`.

    Args:
      config: of the run.
      mesh: that it runs on.
      args: the step's: state, batch, Hyperparameters and Gate; the config and the mesh determine
        their shapes.
      record_routing: whether its metrics have each token's experts.
    """

    def make() -> jax.stages.Compiled:
      step = train_step.make_train_step(config, mesh, record_routing=record_routing, is_gated=True)
      return step.lower(*args).compile()

    return self._keep(f"train step, record_routing={record_routing}", config, mesh, make)

  def abstract_state(self, config: Config, mesh: jax.sharding.Mesh) -> TrainState:
    """Returns `train_step.abstract_state`, for which the model is traced."""
    make = lambda: train_step.abstract_state(config, mesh)  # noqa: E731
    return self._keep("abstract state", config, mesh, make)

  def init_state(self, config: Config, mesh: jax.sharding.Mesh) -> TrainState:
    """Creates the state on the mesh, like `train_step.init_state`."""
    make = lambda: train_step.make_init(config, mesh)  # noqa: E731
    init = self._keep("initial state", config, mesh, make)
    return init(hyperparameters.initialisation_of(config))

  def eval_step(self, config: Config, mesh: jax.sharding.Mesh) -> Callable:
    """Returns the function of `train_step.make_eval_step`."""
    make = lambda: train_step.make_eval_step(config, mesh)  # noqa: E731
    return self._keep("evaluation", config, mesh, make)

  def check(self, config: Config, mesh: jax.sharding.Mesh) -> list[str]:
    """Checks the kernels and the exchange of a run that no earlier run has checked.

    Returns:
      A line for each of the two checks that ran now.

    Raises:
      WrongKernelError, WrongExchangeError: see `kernel_check` and `exchange_check`.
    """
    lines = []

    def run() -> bool:
      lines.extend([kernel_check.check(config), exchange_check.check(config, mesh)])
      return True

    self._keep("checks", config, mesh, run)
    return [line for line in lines if line is not None]

  def _keep(self, kind: str, config: Config, mesh: jax.sharding.Mesh, make: Callable[[], Any]):
    """Returns what `make` returned for an equal key and mesh, or returns now."""
    kept, key = self._kept.setdefault(kind, {}), (hyperparameters.program_key(config), mesh)
    made = kept.pop(key) if key in kept else make()
    kept[key] = made  # as the last one
    if len(kept) > self._limit:
      del kept[next(iter(kept))]
    return made
