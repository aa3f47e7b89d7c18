"""Loads a run's checkpoint for use: evaluation, generation and serving.

Training resumes through `Checkpointer.restore` instead, which also reads the optimizer's state.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from absl import logging
from etils import epath
from tokenizers import Tokenizer

from dsmoe import platforms
from dsmoe.checkpoint import checkpointer, contents, run_config
from dsmoe.checkpoint.source import tokenizer_path
from dsmoe.config import Config, MeshConfig
from dsmoe.data import tokenizer as tokenizer_lib
from dsmoe.parallel import mesh as mesh_lib
from dsmoe.training import train_step


@dataclasses.dataclass
class LoadedRun:
  """A run's config, and the weights of one of its checkpoints on a mesh, as training stores them."""

  config: Config
  tokenizer_path: epath.Path
  params: Any  # None once `take_weights` was called, and so is `router_bias`
  router_bias: Any
  mesh: jax.sharding.Mesh
  step: int

  def tokenizer(self) -> Tokenizer:
    """Returns the run's tokenizer.

    Raises:
      ValueError: when there is none, the run's data being synthetic.
    """
    if not self.tokenizer_path.exists():
      raise ValueError(f"the run must have a tokenizer, {self.tokenizer_path} does not exist")
    return tokenizer_lib.load_tokenizer(self.tokenizer_path, self.config.model.vocab_size)

  def take_weights(self) -> tuple[Any, Any]:
    """Returns (params, router_bias) and drops this object's references to them.

    A reference held here would keep a second copy of the model in memory for as long as what was
    made of the weights is used.

    Raises:
      ValueError: when they were taken before.
    """
    if self.params is None:
      raise ValueError(f"the weights of step {self.step} were taken before: load the run again")
    weights = self.params, self.router_bias
    self.params = self.router_bias = None
    return weights


def load_run(
  workdir: epath.PathLike,
  step: int | None = None,
  mesh_for: Callable[[Config], jax.sharding.Mesh] | None = None,
) -> LoadedRun:
  """Loads the weights of a run's newest checkpoint, or those of `step`.

  Kernels that the run chose by name and that do not exist on this platform become None, which is
  said in a warning: what is computed stays the same.

  Args:
    workdir: the run's; it may have been written on any number of devices.
    step: the checkpoint; None for the newest.
    mesh_for: returns the mesh for the run's config, or raises ValueError before anything is read;
      None: all devices along `data`.

  Raises:
    ValueError: when `workdir` holds no run or no such checkpoint.
  """
  contents.check_path(workdir)
  workdir = epath.Path(workdir)
  config = run_config.load_config(workdir)
  whole = MeshConfig(stage=1, data=-1, expert=1, context=1, model=1)
  config = dataclasses.replace(config, mesh=whole)
  unusable = platforms.unusable_kernels(config.model.kernels)
  for field, reason in unusable.items():
    logging.warning("kernels.%s of %s is None here: %s", field, workdir, reason)
  kernels = dataclasses.replace(config.model.kernels, **dict.fromkeys(unusable))
  config = dataclasses.replace(config, model=dataclasses.replace(config.model, kernels=kernels))
  mesh = mesh_for(config) if mesh_for else mesh_lib.make_mesh(config.mesh)
  abstract = train_step.abstract_state(config, mesh)
  params, router_bias, step = checkpointer.restore_weights(
    workdir, abstract.params, abstract.router_bias, step
  )
  path = tokenizer_path(config, workdir)
  return LoadedRun(config, path, params, router_bias, mesh, step)
