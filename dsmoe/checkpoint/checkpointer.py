"""Checkpoints through orbax: asynchronous, atomic, keep-last-n and keep-every-n.

A checkpoint holds the whole train state (parameters, optimizer, router bias, step) and the
data position. The resolved config lies beside them as config.json.
"""

import contextlib
import functools
import json
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from dsmoe import config as config_lib
from dsmoe.config import CheckpointConfig, Config
from dsmoe.training.train_step import TrainState

CONFIG_FILE = "config.json"
CHECKPOINTS = "checkpoints"


def _manager(workdir: epath.PathLike, options: ocp.CheckpointManagerOptions):
  return ocp.CheckpointManager(
    epath.Path(workdir).resolve() / CHECKPOINTS,
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

  def save(self, state: TrainState, position: Any) -> None:
    """Starts saving in the background; does nothing when there is a checkpoint of this step.

    Args:
      state: as the train step returned it.
      position: the place in the training data, as values of JSON.
    """
    step = int(state.step)
    if step in self._manager.all_steps():
      return
    items = ocp.args.Composite(
      state=ocp.args.StandardSave(state._asdict()),
      data=ocp.args.JsonSave(position),
    )
    self._manager.save(step, args=items)

  def restore(self, abstract: TrainState, step: int) -> tuple[TrainState, Any]:
    """Reads a checkpoint into the shardings of `abstract`; it may be written by any mesh.

    Returns:
      The state and the position that was saved with it.

    Raises:
      ValueError: when the checkpoint's arrays are not those of the model.
    """
    items = ocp.args.Composite(
      state=ocp.args.StandardRestore(abstract._asdict()), data=ocp.args.JsonRestore()
    )
    restored = self._manager.restore(step, args=items)
    return TrainState(**restored["state"]), restored["data"]

  def wait(self) -> None:
    """Blocks until every checkpoint whose saving was started is on disk."""
    self._manager.wait_until_finished()

  def __enter__(self) -> "Checkpointer":
    return self

  def __exit__(self, *_):
    self._manager.wait_until_finished()
    self._manager.close()


def record_config(workdir: epath.PathLike, config: Config, step: int, allow_change: bool) -> None:
  """Writes config.json, or compares the config with the one in the workdir.

  Args:
    workdir: the run's.
    config: the run's.
    step: of the checkpoint that the run resumes from; 0 for a new run.
    allow_change: whether a run may resume with a changed config; the old one is then kept as
      config.before_step_<step>.json.

  Raises:
    ValueError: for a changed config without `allow_change`, naming every difference.
  """
  path = epath.Path(workdir) / CONFIG_FILE
  path.parent.mkdir(parents=True, exist_ok=True)
  text = json.dumps(config_lib.to_dict(config), indent=2)
  if path.exists():
    old = config_lib.with_defaults(json.loads(path.read_text()))
    changed = config_lib.differences(old, config_lib.to_dict(config))
    if not changed:
      return
    if not allow_change:
      raise ValueError(
        f"{path} differs from this run's config: {'; '.join(changed)}. Pass "
        "--allow_config_change to resume with the new one, or another --workdir"
      )
    aside = path.with_name(f"config.before_step_{step}.json")
    number = 1
    while aside.exists():
      aside = path.with_name(f"config.before_step_{step}.{number}.json")
      number += 1
    aside.write_text(path.read_text())
  if jax.process_index() == 0:
    temporary = path.with_name(CONFIG_FILE + ".tmp")
    temporary.write_text(text)
    temporary.replace(path)


def load_config(workdir: epath.PathLike, name: str = CONFIG_FILE) -> Config:
  """Reads a run's config.json, or an older one that was kept under another name.

  Raises:
    ValueError: when there is none, or it is not a valid config.
  """
  path = epath.Path(workdir) / name
  if not path.exists():
    raise ValueError(f"a run's workdir must hold {name}, got {epath.Path(workdir)}")
  try:
    return config_lib.from_dict(json.loads(path.read_text()))
  except (ValueError, TypeError) as error:
    raise ValueError(f"{path}: {error}") from error


def config_of_step(workdir: epath.PathLike, step: int) -> Config:
  """Reads the config of the run that saved a checkpoint, which may have been changed since.

  Raises:
    ValueError: when there is none, or it is not a valid config.
  """
  aside = epath.Path(workdir) / f"config.before_step_{step}.json"
  return load_config(workdir, aside.name if aside.exists() else CONFIG_FILE)


def step_folder(workdir: epath.PathLike, step: int) -> epath.Path:
  """Returns the folder of a step's checkpoint."""
  return epath.Path(workdir).resolve() / CHECKPOINTS / str(step)


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


def _saved(workdir: epath.PathLike, step: int) -> dict[str, Any]:
  """Returns the tree of a checkpoint's state; its leaves have a `shape`."""
  with contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
    return handler.metadata(step_folder(workdir, step) / "state").tree


def _check_shapes(workdir: epath.PathLike, step: int, wanted: Any) -> None:
  """Raises ValueError naming the first array that the checkpoint lacks or has in another shape."""
  name_of = functools.partial(jax.tree_util.keystr, simple=True, separator=".")
  saved = {name_of(path): x.shape for path, x in jax.tree.leaves_with_path(_saved(workdir, step))}
  for path, leaf in jax.tree.leaves_with_path(wanted):
    found = saved.get(name_of(path))
    if found is None or tuple(found) != leaf.shape:
      raise ValueError(
        f"checkpoint {step} in {workdir} must hold the arrays of the model: {name_of(path)} has "
        f"the shape {list(leaf.shape)} there, got {found and list(found)}"
      )


def check_whole(workdir: epath.PathLike, step: int) -> None:
  """Raises ValueError when the checkpoint holds weights only, as imported ones do."""
  if "opt_state" not in _saved(workdir, step):
    raise ValueError(
      f"checkpoint {step} must hold the optimizer's state for a run to resume from it, that in "
      f"{workdir} holds weights only: name it as --init_from and another folder as --workdir"
    )


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
  _check_shapes(workdir, step, wanted)
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
