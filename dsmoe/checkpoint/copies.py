"""Copies of a run's checkpoints in a second folder, which outlives the disk that the workdir is on.

The second folder is a workdir too, with config.json, metrics.jsonl and the tokenizer beside the
checkpoints. The files of a checkpoint that is complete and verified are copied, by a thread of the
first process, which therefore must see all of them: the workdir is a folder that all hosts share.

Orbax has tiers of its own, which do not serve here. `experimental.emergency.CheckpointManager`
refuses a mesh without at least two replicas of the state, and FSDP has none;
`multi_tier_checkpointing` leaves the copying to a replicator, a service of GKE with a driver for
disks in memory; both save at fixed steps only, cannot delete, and are marked experimental.
"""

import threading
from collections.abc import Callable, Sequence
from concurrent import futures

import jax
import orbax.checkpoint as ocp
from etils import epath

from dsmoe.checkpoint import contents, folders, run_config
from dsmoe.checkpoint.source import tokenizer_path
from dsmoe.config import CheckpointConfig
from dsmoe.data import tokenizer as tokenizer_lib
from dsmoe.parallel import processes

_POLL_SECS = 0.2
_SAY_SECS = 10.0
_ABANDON_SECS = 30.0  # an object store may not answer
# Without inputs.json the tokenizer would be taken for one of unknown origin when a run trains there.
_OF_THE_TEXT = (tokenizer_lib.FILE, *tokenizer_lib.BESIDE, "inputs.json")


class Copies:
  """Copies checkpoints in the background, and deletes old copies; in the first process only."""

  def __init__(
    self,
    workdir: epath.PathLike,
    config: CheckpointConfig,
    check_owner: Callable[[], None] = lambda: None,
  ):
    """Starts the thread.

    Args:
      workdir: the run's.
      config: with `copy_to`.
      check_owner: called before anything is written; raises if another run copies to the same place.
    """
    self._workdir, self._config, self._check_owner = workdir, config, check_owner
    self._present: int | None = None  # the step that is being copied
    self._next: int | None = None  # the step that is copied then; newer ones take its place
    self._aside: int | None = None  # copies after this step are to be set aside
    self._is_tidy = False  # whether what was killed before has been deleted from the copies
    self._copied: int | None = None
    self._failed = self._ending = self._abandoned = False
    self._bytes, self._total_bytes = 0, 0
    self._changed = threading.Condition()
    self._thread = threading.Thread(target=self._work, name="copies", daemon=True)
    if processes.is_first():
      self._thread.start()

  def request(self, step: int) -> None:
    """Asks for a copy of a checkpoint, which may be unfinished yet; returns at once."""
    with self._changed:
      self._next = step
      self._changed.notify_all()

  def is_due(self, step: int) -> bool:
    """Whether the checkpoint of a step is copied by the rhythm."""
    return step % self._config.copy_every_steps == 0

  def in_use(self) -> set[int]:
    """Returns the steps whose checkpoints must not be deleted yet."""
    with self._changed:
      return {step for step in (self._present, self._next) if step is not None}

  def set_later_aside(self, step: int) -> None:
    """Moves the copies after `step` out of a run that goes on from there, before the next copy."""
    self._aside = step

  def finish(self, newest: int | None, was_saved: bool, beat: Callable[[], None]) -> None:
    """Waits until the newest checkpoint is copied, or could not be; no save is under way.

    Every process calls this, or none.

    Args:
      newest: its step; None when there is no checkpoint.
      was_saved: whether this start saved it, so that a copy from before is another.
      beat: called while the copy makes progress.
    """
    if not processes.is_first():
      with futures.ThreadPoolExecutor(1, "await_copies") as pool:
        waited_for = pool.submit(processes.await_text, "copies/finished")
        while not futures.wait([waited_for], 1.0).done:
          beat()
        waited_for.result()
      return
    with self._changed:
      is_asked = newest in (self._present, self._next)
    if newest is not None and newest != self._copied and not is_asked:
      if was_saved or not self._has_copy(newest):
        self.request(newest)
    with self._changed:
      self._ending = True
      self._changed.notify_all()
    self._wait(beat)
    if jax.process_count() > 1:
      processes.publish("copies/finished", "")

  def abandon(self) -> None:
    """Ends the thread soon; what it has copied of a checkpoint does not count as one."""
    with self._changed:
      self._abandoned = True
      self._changed.notify_all()
    if self._thread.ident is not None:
      self._thread.join(_ABANDON_SECS)

  def _wait(self, beat: Callable[[], None]) -> None:
    before, said = -1, False
    while self._thread.is_alive():
      self._thread.join(_SAY_SECS if said else 1.0)
      if not self._thread.is_alive():
        return
      step, done, total = self._present, self._bytes, self._total_bytes
      processes.say(
        f"waiting for the copy of checkpoint {step} to {self._config.copy_to}: "
        f"{done / 1e9:,.1f} of {total / 1e9:,.1f} GB"
      )
      said = True
      if done != before:  # else the watchdog ends a copy that hangs
        beat()
      before = done

  def _work(self) -> None:
    """Copies what was asked for until the run ends."""
    while True:
      with self._changed:
        self._changed.wait_for(lambda: self._abandoned or self._ending or self._next is not None)
        if self._abandoned or self._next is None:
          return
        step = self._present = self._next
        self._next = None
      try:
        self._tidy()
        if self._awaits(contents.step_folder(self._workdir, step)):
          self._copy(step)
          self._failed = False
      except Exception as error:  # file systems raise errors of many kinds
        self._say_failure(step, error)
      with self._changed:
        self._present = None

  def _tidy(self) -> None:
    """Deletes what a kill has left in the copies, and sets later ones aside."""
    self._check_owner()
    copy_to = self._config.copy_to
    if not self._is_tidy:
      folders.delete_unfinished(contents.folder(copy_to))
      self._is_tidy = True
    if self._aside is not None:
      _set_aside(copy_to, self._aside)
      self._aside = None

  def _awaits(self, folder: epath.Path) -> bool:
    """Waits for a save; returns False for one that ends without a checkpoint, or a run that ends."""
    while not folders.is_complete(folder):
      with self._changed:
        if self._changed.wait_for(lambda: self._ending or self._abandoned, _POLL_SECS):
          return folders.is_complete(folder) and not self._abandoned
    return not self._abandoned

  def _copy(self, step: int) -> None:
    workdir, copy_to = epath.Path(self._workdir), epath.Path(self._config.copy_to)
    copy_to.mkdir(parents=True, exist_ok=True)
    copy_beside(workdir, copy_to)
    if (workdir / run_config.CONFIG_FILE).exists():
      text = tokenizer_path(run_config.load_config(workdir), workdir).parent
      (copy_to / "data").mkdir(exist_ok=True)
      for name in _OF_THE_TEXT:
        folders.copy_file(text / name, copy_to / "data" / name)
    source = contents.step_folder(workdir, step)
    self._bytes = 0
    self._total_bytes = sum(path.stat().length for path in folders.files(source))
    folders.copy_folder(source, contents.step_folder(copy_to, step), self._count)
    self._copied = step
    if self._config.copy_keep:
      for old in folders.steps_in(copy_to)[: -self._config.copy_keep]:
        folders.delete(contents.step_folder(copy_to, old))

  def _count(self, num_bytes: int) -> None:
    if self._abandoned:
      raise InterruptedError("the run has ended")
    with self._changed:
      self._bytes += num_bytes

  def _has_copy(self, step: int) -> bool:
    try:
      return step in folders.steps_in(self._config.copy_to)
    except Exception:  # then copying says what is wrong
      return False

  def _say_failure(self, step: int, error: Exception) -> None:
    if self._abandoned or (self._failed and not self._ending):
      return
    self._failed = True
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    then = "the same command tries again" if self._ending else "the run goes on, the next is tried"
    print(
      f"checkpoint {step} is not copied to {self._config.copy_to} ({reason}); {then}", flush=True
    )


class KeepInUse(ocp.checkpoint_managers.PreservationPolicy):
  """Keeps checkpoints of which a copy is wanted from being deleted before it is made."""

  def __init__(self, copies: Copies):
    self._copies = copies

  def should_preserve(
    self,
    checkpoints: Sequence[ocp.checkpoint_managers.PolicyCheckpointInfo],
    *,
    context: ocp.checkpoint_managers.PreservationContext,
  ) -> Sequence[bool]:
    in_use = self._copies.in_use()
    return [checkpoint.step in in_use for checkpoint in checkpoints]


def copy_beside(source: epath.Path, target: epath.Path) -> None:
  """Copies what a run has beside its checkpoints and goes on with."""
  for path in source.iterdir():
    if path.name in (run_config.CONFIG_FILE, "metrics.jsonl") or (
      path.name.startswith("config.before_step_") and path.suffix == ".json"
    ):
      folders.copy_file(path, target / path.name)


def _set_aside(copy_to: epath.PathLike, step: int) -> None:
  """Moves the copies after `step` to a folder beside the others, the newest first."""
  later = [found for found in folders.steps_in(copy_to) if found > step]
  if not later:
    return
  folder = contents.folder(copy_to)
  aside = folders.unused(folder.with_name(f"{folder.name}_after_step_{step}"))
  aside.mkdir()
  for found in reversed(later):
    folders.move(folder / str(found), aside / str(found))
  print(f"later copies are kept in {aside}", flush=True)
