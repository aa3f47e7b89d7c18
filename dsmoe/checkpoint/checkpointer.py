"""Checkpoints through orbax: asynchronous, atomic, keep-last-n and keep-every-n.

A checkpoint holds the whole train state (parameters, optimizer, router bias, step) and the
data position. The resolved config lies beside them as config.json.
"""

from typing import Any

import orbax.checkpoint as ocp
from etils import epath

from dsmoe.checkpoint import contents
from dsmoe.config import CheckpointConfig
from dsmoe.training.train_step import TrainState


def _manager(workdir: epath.PathLike, options: ocp.CheckpointManagerOptions):
  return ocp.CheckpointManager(
    contents.folder(workdir),
    options=options,
    item_names=("state", "data"),
  )


class Checkpointer:
  """Saves and restores a run's checkpoints; a context manager."""

  def __init__(self, workdir: epath.PathLike, config: CheckpointConfig):
    self._manager = _manager(
      workdir,
      ocp.CheckpointManagerOptions(
        max_to_keep=config.keep_last,
        keep_period=config.keep_every_steps or None,
        enable_async_checkpointing=True,
      ),
    )

  def latest_step(self) -> int | None:
    """Returns the newest complete checkpoint's step, or None."""
    return self._manager.latest_step()

  def save(self, state: TrainState, next_batch: int) -> None:
    """Starts saving in the background; does nothing when there is a checkpoint of this step.

    Args:
      state: as the train step returned it.
      next_batch: global index of the first batch not yet trained on.
    """
    step = int(state.step)
    if step in self._manager.all_steps():
      return
    items = ocp.args.Composite(
      state=ocp.args.StandardSave(state._asdict()),
      data=ocp.args.JsonSave({"next_batch": next_batch}),
    )
    self._manager.save(step, args=items)

  def restore(self, abstract: TrainState, step: int) -> tuple[TrainState, int]:
    """Reads a checkpoint into the shardings of `abstract`; it may be written by any mesh.

    Returns:
      The state and the index of the next batch.

    Raises:
      ValueError: when the checkpoint's arrays are not those of the model.
    """
    items = ocp.args.Composite(
      state=ocp.args.StandardRestore(abstract._asdict()), data=ocp.args.JsonRestore()
    )
    restored = self._manager.restore(step, args=items)
    return TrainState(**restored["state"]), int(restored["data"]["next_batch"])

  def wait(self) -> None:
    """Blocks until every checkpoint whose saving was started is on disk."""
    self._manager.wait_until_finished()

  def __enter__(self) -> "Checkpointer":
    return self

  def __exit__(self, *_):
    self._manager.wait_until_finished()
    self._manager.close()


def find_step(workdir: epath.PathLike, step: int | None = None) -> int:
  """Returns `step` if it is one of the run's checkpoints; the newest for None.

  Raises:
    ValueError: when there is no such checkpoint.
  """
  with _manager(workdir, ocp.CheckpointManagerOptions(create=False)) as manager:
    steps = manager.all_steps()
    step = manager.latest_step() if step is None else step
  if step is None or step not in steps:
    raise ValueError(f"step must be one of the checkpoints in {workdir} ({steps}), got {step}")
  return step


def restore_weights(
  workdir: epath.PathLike, params: Any, router_bias: Any, step: int | None = None
) -> tuple[Any, Any, int]:
  """Reads parameters and router bias only, for evaluation and generation.

  Args:
    workdir: the run's.
    params, router_bias: trees of ShapeDtypeStruct with shardings.
    step: which checkpoint; None: the newest.

  Returns:
    (params, router_bias, step).

  Raises:
    ValueError: when there is no such checkpoint, or its arrays are not those of the model.
  """
  step = find_step(workdir, step)
  wanted = {"params": params, "router_bias": router_bias}
  if other := contents.other_arrays(workdir, step, wanted, all_of_them=False):
    raise ValueError(f"checkpoint {step} in {workdir} must hold the arrays of the model: {other}")
  with _manager(workdir, ocp.CheckpointManagerOptions(create=False)) as manager:
    restored = manager.restore(
      step,
      args=ocp.args.Composite(
        state=ocp.args.PyTreeRestore(
          wanted,
          restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
          partial_restore=True,
        )
      ),
    )["state"]
  return restored["params"], restored["router_bias"], step
