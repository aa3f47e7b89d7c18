"""Checkpoints through orbax: asynchronous, atomic, verified, keep-last-n, keep-every-n, copied.

A checkpoint holds the whole train state (parameters, optimizer, router bias, step), the data
position, and checksums of both, which are compared when it is read. The resolved config lies beside
the checkpoints as config.json.
"""

import contextlib
import json
import zlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from dsmoe.checkpoint import (
  amended,
  contents,
  copies,
  folders,
  integrity,
  second_folder,
  verification,
)
from dsmoe.config import CheckpointConfig
from dsmoe.training.train_step import TrainState


def _manager(workdir: epath.PathLike, options: ocp.CheckpointManagerOptions):
  return ocp.CheckpointManager(
    contents.folder(workdir),
    options=options,
    item_names=("state", "data", "checksums"),
  )


def _delete_unfinished(folder: epath.Path) -> None:
  """Deletes what saves that were killed have left.

  Orbax's option for this works in a thread that nothing waits for before the first save: it ends in
  a traceback where a run is refused or interrupted at once.
  """
  if jax.process_index() == 0:
    folders.delete_unfinished(folder)
  ocp.multihost.sync_global_processes("dsmoe:delete_unfinished")


class NotFiniteError(ValueError):
  """A state with NaN or infinity was to be saved."""


class Checkpointer:
  """Saves and restores a run's checkpoints; a context manager."""

  def __init__(
    self,
    workdir: epath.PathLike,
    config: CheckpointConfig,
    wanted: int | None = None,
    beat: Callable[[], None] = lambda: None,
  ):
    """Opens a workdir's checkpoints; with `config.copy_to` fetches one from the copies if needed.

    Args:
      workdir: the run's.
      config: what is kept and copied.
      wanted: step of the checkpoint that the run resumes from; None: the newest.
      beat: called while the end waits for a copy that makes progress.

    Raises:
      ValueError, OSError: see `second_folder.opened`.
    """
    self._workdir, self._beat = workdir, beat
    self._last_saved: int | None = None  # by this object
    _delete_unfinished(contents.folder(workdir))
    self._stack = contextlib.ExitStack()
    self._copies = self._stack.enter_context(second_folder.opened(workdir, config, wanted))
    keep: list[ocp.checkpoint_managers.PreservationPolicy] = [
      ocp.checkpoint_managers.LatestN(config.keep_last)
    ]
    if config.keep_every_steps:
      keep.append(ocp.checkpoint_managers.EveryNSteps(config.keep_every_steps))
    if self._copies is not None:
      keep.append(copies.KeepInUse(self._copies))
    self._manager = _manager(
      workdir,
      ocp.CheckpointManagerOptions(
        preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy(keep),
        enable_async_checkpointing=True,
        async_options=ocp.AsyncOptions(post_finalization_callback=self._verify),
      ),
    )
    self._verification: verification.Verification | None = None  # of the save that is under way

  def _verify(self) -> None:
    assert self._verification is not None
    self._verification.check(contents.folder(self._workdir))

  def find_step(self, step: int | None = None) -> int | None:
    """Returns `step`, or that of the newest complete checkpoint, None if there is none.

    Raises:
      ValueError: when there is no checkpoint of `step`.
    """
    steps = self._manager.all_steps()
    if step is not None and step not in steps:
      raise ValueError(
        f"resume_from must be the step of a checkpoint in {self._workdir} ({_listed(steps)}), "
        f"got {step}"
      )
    return step if step is not None else self._manager.latest_step()

  def save(self, state: TrainState, position: Any) -> None:
    """Starts saving in the background; does nothing when there is a checkpoint of this step.

    Args:
      state: as the train step returned it.
      position: the place in the training data, as values of JSON.

    Raises:
      NotFiniteError: when a number of the state is not finite; nothing is saved.
      DamagedSaveError: when the save before this one was not written as it must be.
    """
    step = int(state.step)
    if step in self._manager.all_steps():
      return
    measured = integrity.measure(state._asdict())
    if broken := [name for name, (_, finite) in measured.items() if not finite]:
      newest = self._manager.latest_step()
      raise NotFiniteError(
        f"the state after step {step} must be finite to be saved, {len(broken)} of its "
        f"{len(measured)} arrays are not ({broken[0]} first); "
        + (
          f"the newest checkpoint in {self._workdir} is that of step {newest}"
          if newest is not None
          else f"there is no checkpoint in {self._workdir} yet"
        )
      )
    checksums = {"data": _json_checksum(position)}
    checksums |= {name: checksum for name, (checksum, _) in measured.items()}
    items = ocp.args.Composite(
      state=ocp.args.StandardSave(state._asdict()),
      data=ocp.args.JsonSave(position),
      checksums=ocp.args.JsonSave(checksums),
    )
    self.wait()
    beside = {"data": position, "checksums": checksums}
    self._verification = verification.Verification(step, state._asdict(), beside, checksums)
    self._verification.start(contents.folder(self._workdir))
    self._last_saved = step
    if self._copies is not None and self._copies.is_due(step):
      self._copies.request(step)
    self._manager.save(step, args=items)

  def restore(self, abstract: TrainState, step: int) -> tuple[TrainState, Any]:
    """Reads a checkpoint into the shardings of `abstract`; it may be written by any mesh.

    Returns:
      The state and the position that was saved with it, or that `amend` has written since.

    Raises:
      ValueError: when the checkpoint is damaged, or its arrays are not those of the model.
    """
    items = {"state": ocp.args.StandardRestore(abstract._asdict()), "data": ocp.args.JsonRestore()}
    restored = _read(self._manager, self._workdir, step, items)
    with contents.named_damage(self._workdir, step):
      position = amended.read(contents.step_folder(self._workdir, step))
    return TrainState(**restored["state"]), restored["data"] if position is None else position

  def amend(self, state: TrainState, position: Any) -> None:
    """Lets a run that resumes from the checkpoint of this state go on elsewhere in the data.

    Where there is no checkpoint of the state's step, as of a run that begins anew, it is saved.
    """
    step = int(state.step)
    if step in self._manager.all_steps():
      amended.write(contents.step_folder(self._workdir, step), position)
    else:
      self.save(state, position)

  def set_later_aside(self, step: int) -> epath.Path | None:
    """Moves the checkpoints after `step` out of a run that goes on from there.

    Returns:
      The new folder beside `checkpoints` that holds them; None when there are none.
    """
    if self._copies is not None:
      self._copies.set_later_aside(step)
    later = [found for found in self._manager.all_steps() if found > step]
    if not later:
      return None
    folder = contents.folder(self._workdir)
    aside = folders.unused(folder.with_name(f"{folder.name}_after_step_{step}"))
    if jax.process_index() == 0:
      aside.mkdir()
      for found in sorted(later, reverse=True):
        (folder / str(found)).rename(aside / str(found))
    ocp.multihost.sync_global_processes("dsmoe:set_later_aside")
    self._manager.reload()
    return aside

  def delete(self, step: int) -> None:
    """Deletes a checkpoint."""
    self._manager.delete(step)

  def wait(self) -> None:
    """Blocks until every checkpoint whose saving was started is on disk, and is verified.

    Raises:
      DamagedSaveError: when what was written is not what was saved.
    """
    self._manager.wait_until_finished()

  def __enter__(self) -> "Checkpointer":
    return self

  def __exit__(self, kind: type[BaseException] | None, *_):
    with self._stack:
      try:
        self.wait()
        # Of several processes one may have failed alone: it waits for no other.
        alone = jax.process_count() == 1 and kind is not None and issubclass(kind, Exception)
        if self._copies is not None and (kind is None or alone):
          is_saved = self._last_saved is not None
          newest = self._manager.latest_step() if kind is None else self._last_saved
          self._copies.finish(newest, is_saved, self._beat)
      finally:
        if self._copies is not None:
          self._copies.abandon()
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
  items = {
    "state": ocp.args.PyTreeRestore(
      wanted,
      restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
      partial_restore=True,
    )
  }
  with _manager(workdir, ocp.CheckpointManagerOptions(create=False)) as manager:
    state = _read(manager, workdir, step, items)["state"]
  return state["params"], state["router_bias"], step


def _check_step(step: int, state: dict[str, Any], checksums: dict[str, str]) -> None:
  """Raises ValueError for the checkpoint of another step under this one's name.

  Where the state is read without its step, the step's checksum tells; imported weights have none.
  """
  expected, _ = integrity.measure({"step": np.int32(step)})["step"]
  is_other = "step" in checksums and checksums["step"] != expected
  if is_other or int(state.get("step", step)) != step:
    raise ValueError(f"its state is that of another step than {step}, whose name it has")


def _listed(steps: Any) -> str:
  return ", ".join(map(str, sorted(steps))) or "none"


def _json_checksum(value: Any) -> str:
  return f"json {zlib.crc32(json.dumps(value, sort_keys=True).encode()):08x}"


def _read(
  manager: ocp.CheckpointManager, workdir: epath.PathLike, step: int, items: dict[str, Any]
) -> Any:
  """Returns the items of a checkpoint after comparing their checksums, if it has any.

  Raises:
    ValueError: whatever is wrong, naming the checkpoint.
  """
  checksums = contents.saved_checksums(workdir, step)
  with contents.named_damage(workdir, step):
    restored = manager.restore(step, args=ocp.args.Composite(**items))
    _check_step(step, restored["state"], checksums or {})
    if checksums is not None:
      for name, (checksum, _) in integrity.measure(restored["state"]).items():
        contents.compare_checksum(name, checksums, checksum)
      if "data" in items:
        contents.compare_checksum("data", checksums, _json_checksum(restored["data"]))
    return restored
