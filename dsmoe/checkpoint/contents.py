"""What a checkpoint holds, read from its metadata: the names and shapes of its arrays."""

import contextlib
import functools
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

CHECKPOINTS = "checkpoints"

name_of = functools.partial(jax.tree_util.keystr, simple=True, separator=".")


def step_folder(workdir: epath.PathLike, step: int) -> epath.Path:
  """Returns the folder of a step's checkpoint."""
  return epath.Path(workdir).resolve() / CHECKPOINTS / str(step)


def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
  """Returns the shapes of a tree's arrays by dotted name, such as "params.embed"."""
  return {name_of(path): tuple(x.shape) for path, x in jax.tree.leaves_with_path(tree)}


def saved_shapes(workdir: epath.PathLike, step: int) -> dict[str, tuple[int, ...]]:
  """Returns the shapes of the arrays in a checkpoint's state, by dotted name."""
  with contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
    return shapes(handler.metadata(step_folder(workdir, step) / "state").tree)


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
