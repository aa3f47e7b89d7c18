"""What a run does at its start with the folder of its copies: checks, lock, fetching a checkpoint."""

import contextlib
import uuid
from collections.abc import Iterator

import jax
from etils import epath

from dsmoe.checkpoint import contents, copies, folders
from dsmoe.checkpoint.lock import owned
from dsmoe.config import CheckpointConfig
from dsmoe.parallel import processes


@contextlib.contextmanager
def opened(
  workdir: epath.PathLike, config: CheckpointConfig, wanted: int | None
) -> Iterator[copies.Copies | None]:
  """Fetches a checkpoint that the workdir lacks, and copies others until the context ends.

  Every process calls this.

  Args:
    workdir: the run's.
    config: with or without `copy_to`; without one there is nothing to do.
    wanted: step of the checkpoint that the run resumes from; None: the newest.

  Raises:
    ValueError: for copies inside the workdir or around it; for a workdir that is not the same for all
      processes; when another run copies to the same folder.
    OSError: when the copies cannot be read.
  """
  copy_to = config.copy_to
  if not copy_to:
    yield None
    return
  _check_folders(workdir, copy_to)
  with contextlib.ExitStack() as stack:
    with processes.failing_together():
      check_owner = stack.enter_context(owned(copy_to))
    fetched = processes.first_then_others(
      f"to look for checkpoints in {copy_to}", lambda: _fetch(workdir, copy_to, wanted)
    )
    if fetched is not None:
      processes.say(f"fetched checkpoint {fetched} from {copy_to}, as {workdir} does not have it")
    yield copies.Copies(workdir, config, check_owner)


def _fetch(workdir: epath.PathLike, copy_to: epath.PathLike, step: int | None) -> int | None:
  """Copies a checkpoint back into a workdir that lacks it.

  Args:
    workdir: the run's.
    copy_to: the folder of the copies.
    step: of the checkpoint; None: the newest copy, for a workdir without any checkpoint, with
      config.json and metrics.jsonl beside it.

  Returns:
    The step; None when nothing is to be fetched.
  """
  here = folders.steps_in(workdir)
  if step in here or (step is None and here):
    return None
  there = folders.steps_in(copy_to)
  if not there or (step is not None and step not in there):
    return None
  step = there[-1] if step is None else step
  if not here:
    epath.Path(workdir).mkdir(parents=True, exist_ok=True)
    copies.copy_beside(epath.Path(copy_to), epath.Path(workdir))
  folders.copy_folder(contents.step_folder(copy_to, step), contents.step_folder(workdir, step))
  return step


def _check_folders(workdir: epath.PathLike, copy_to: str) -> None:
  """Checks that copies go elsewhere, and that all processes see one workdir.

  Raises:
    ValueError: for copies inside the workdir or around it, or a workdir that is another for each host.
  """
  contents.check_path(copy_to)
  here, there = (f"{contents.folder(path).parent}/" for path in (workdir, copy_to))
  if here.startswith(there) or there.startswith(here):
    raise ValueError(
      f"checkpoint.copy_to must be a folder outside the workdir, got {copy_to} and {workdir}"
    )
  if jax.process_count() == 1:
    return
  probe = epath.Path(workdir) / f"seen_by_all.{processes.exchange(uuid.uuid4().hex)[0]}.tmp"
  with _made_by_first(probe), processes.failing_together():
    if not probe.exists():
      raise ValueError(
        f"with checkpoint.copy_to the workdir must be one folder that all processes see, which the "
        f"first one copies, got {workdir}, whose files of process 0 this process does not see"
      )


@contextlib.contextmanager
def _made_by_first(path: epath.Path) -> Iterator[None]:
  with processes.failing_together():
    if processes.is_first():
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_text("")
  try:
    yield
  finally:
    if processes.is_first():
      path.unlink(missing_ok=True)
