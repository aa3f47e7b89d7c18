"""What a checkpoint holds, read from its metadata: the names and shapes of its arrays."""

import contextlib
import fnmatch
import functools
import inspect
import json
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from etils.epath import gpath

from dsmoe.parallel import processes

CHECKPOINTS = "checkpoints"

name_of = functools.partial(jax.tree_util.keystr, simple=True, separator=".")


class _LiteralPath(gpath.PosixGPath):
  """A path that is never a pattern itself: orbax finds a checkpoint's files by `path.glob`."""

  def glob(self, pattern: str) -> Iterator["_LiteralPath"]:
    folder, _, name = pattern.rpartition("/")
    paths = list((self / folder).iterdir()) if (self / folder).is_dir() else []
    return (path for path in paths if fnmatch.fnmatchcase(path.name, name))


def check_path(workdir: epath.PathLike) -> None:
  """Raises ValueError for a path in which no checkpoint can be restored, or that is empty."""
  text = os.fspath(workdir)
  if not text.strip():
    raise ValueError(f"a workdir must be the name of a folder, got {text!r}")
  _, separator, rest = text.partition("://")
  parts = rest.split("/") if separator else epath.Path(workdir).resolve().parts
  if odd := [part for part in parts if "\\" in part or part.endswith(":")]:
    raise ValueError(
      f"no folder of a workdir's path may have a backslash in its name or a colon at its end, "
      f"which tensorstore reads otherwise, got {odd[0]!r} in {text}"
    )


def folder(workdir: epath.PathLike) -> epath.Path:
  """Returns the folder of a run's checkpoints.

  Raises:
    ValueError: see `check_path`.
  """
  check_path(workdir)
  if "://" in os.fspath(workdir):  # `resolve` would make it a path on disk
    return _LiteralPath(workdir) / CHECKPOINTS
  return _LiteralPath(epath.Path(workdir).resolve()) / CHECKPOINTS


def step_folder(workdir: epath.PathLike, step: int) -> epath.Path:
  """Returns the folder of a step's checkpoint; see `folder`."""
  return folder(workdir) / str(step)


@contextlib.contextmanager
def named_damage(workdir: epath.PathLike, step: int) -> Iterator[None]:
  """Turns whatever orbax raises while it reads a checkpoint into one sentence that names it."""
  try:
    yield
  except Exception as error:  # its libraries raise errors of many kinds
    processes.wait_if_alone(error)  # another process, with which this one reads, may be gone
    _silence_late_reads()
    reason = " ".join(str(error).split()) or type(error).__name__
    reason = reason if len(reason) <= 300 else f"{reason[:300]}..."
    names = [path.name for path in folder(workdir).iterdir() if path.name.isdigit()]
    others = ", ".join(sorted({*names} - {str(step)}, key=int)) or "none"
    raise ValueError(
      f"checkpoint {step} in {workdir} must be whole, it cannot be read ({reason}); training goes "
      f"on from another one with --resume_from=STEP, other scripts take --step=STEP (here: {others})"
    ) from error


@functools.cache
def _silence_late_reads() -> None:
  """Leaves unprinted what the other reads of a checkpoint say that could not be read.

  They go on in threads of TensorStore. Each would print a traceback when it finds Orbax's event loop
  closed, or its coroutine abandoned: thousands of lines after the sentence that names the damage.
  """
  excepthook, unraisablehook = sys.excepthook, sys.unraisablehook

  def except_closed_loops(kind, value, traceback):
    if str(value) != "Event loop is closed":
      excepthook(kind, value, traceback)

  def except_coroutines(unraisable):
    if not inspect.iscoroutine(unraisable.object):
      unraisablehook(unraisable)

  sys.excepthook, sys.unraisablehook = except_closed_loops, except_coroutines
  warnings.filterwarnings("ignore", message="coroutine .* was never awaited")


def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
  """Returns the shapes of a tree's arrays by dotted name, such as "params.embed"."""
  return {name_of(path): tuple(x.shape) for path, x in jax.tree.leaves_with_path(tree)}


def saved_shapes(workdir: epath.PathLike, step: int) -> dict[str, tuple[int, ...]]:
  """Returns the shapes of the arrays in a checkpoint's state, by dotted name."""
  with named_damage(workdir, step), contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
    return shapes(handler.metadata(step_folder(workdir, step) / "state").tree)


def saved_checksums(workdir: epath.PathLike, step: int) -> dict[str, str] | None:
  """Returns a checkpoint's checksums by dotted name, see `integrity`; None if it has none."""
  path = step_folder(workdir, step) / "checksums"
  if not path.exists():
    return None
  with named_damage(workdir, step):
    return {name: str(value) for name, value in json.loads((path / "metadata").read_text()).items()}


def compare_checksum(name: str, saved: dict[str, str], found: str) -> None:
  """Raises ValueError if an array has another checksum than it was saved with.

  One that is read into another dtype than it was saved in is not compared.
  """
  if saved[name].split()[0] == found.split()[0] and saved[name] != found:
    raise ValueError(f"the checksum of {name} must be {saved[name]}, it is {found}")


def other_arrays(workdir: epath.PathLike, step: int, wanted: Any, all_of_them: bool) -> str:
  """Says which array a checkpoint lacks or has in another shape.

  Args:
    workdir: the run's.
    step: of the checkpoint.
    wanted: a tree of what is to be read, with shapes.
    all_of_them: whether the checkpoint may not hold other arrays besides.

  Returns:
    A clause that names the first such array; "" if there is none.
  """
  saved, expected = saved_shapes(workdir, step), shapes(wanted)
  # A name of the model's tells more than one of the optimizer's state.
  for name, shape in sorted(expected.items(), key=lambda item: item[0].startswith("opt_state.")):
    if name not in saved:
      return f"it must hold {name} {list(shape)}, and does not"
    if saved[name] != shape:
      return f"{name} must have the shape {list(shape)}, it has {list(saved[name])}"
  if all_of_them and (more := sorted(saved.keys() - expected.keys())):
    return f"it holds {more[0]} {list(saved[more[0]])}, which this config does not have"
  return ""


def check_whole(workdir: epath.PathLike, step: int) -> None:
  """Raises ValueError when the checkpoint holds weights only, as imported ones do."""
  if not any(name.startswith("opt_state.") for name in saved_shapes(workdir, step)):
    raise ValueError(
      f"checkpoint {step} must hold the optimizer's state for a run to resume from it, that in "
      f"{workdir} holds weights only: name it as --init_from and another folder as --workdir"
    )
