"""A run's config.json: reading it, writing it, and whether a checkpoint can follow a changed one."""

import copy
import json
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath

from dsmoe import config as config_lib
from dsmoe.checkpoint import contents
from dsmoe.config import Config
from dsmoe.training import train_step

CONFIG_FILE = "config.json"


def load_config(workdir: epath.PathLike, name: str = CONFIG_FILE) -> Config:
  """Reads a run's config.json, or an older one that was kept under another name.

  Raises:
    ValueError: when there is none, or it is not a valid config.
  """
  contents.check_path(workdir)
  path = epath.Path(workdir) / name
  saved = _saved(path)
  if saved is None:
    raise ValueError(f"a run's workdir must hold {name}, got {epath.Path(workdir)}")
  try:
    return config_lib.from_dict(saved)
  except (ValueError, TypeError) as error:
    raise ValueError(f"{path}: {error}") from error


def config_of_step(workdir: epath.PathLike, step: int) -> Config:
  """Reads the config of the run that saved a checkpoint, which may have been changed since.

  Raises:
    ValueError: when there is none, or it is not a valid config.
  """
  aside = epath.Path(workdir) / f"config.before_step_{step}.json"
  return load_config(workdir, aside.name if aside.exists() else CONFIG_FILE)


def check_config(
  workdir: epath.PathLike,
  config: Config,
  step: int,
  state: train_step.TrainState,
  allow_change: bool,
) -> None:
  """Checks that a run with this config can go on from a checkpoint; writes nothing.

  A checkpoint of step 0 belongs to a run that has not trained yet: it goes on with any config that
  has its arrays.

  Args:
    workdir: the run's; config.json may be absent.
    config: the run's.
    step: of the checkpoint.
    state: as `train_step.abstract_state` returns it for `config`.
    allow_change: whether the config may differ from the one in the workdir.

  Raises:
    ValueError: for a checkpoint with weights only; for a config whose arrays are not those of the
      checkpoint, naming the fields that it cannot follow; for a changed one without
      `allow_change`, naming every difference; for a config.json that is not JSON.
  """
  contents.check_whole(workdir, step)
  path = epath.Path(workdir) / CONFIG_FILE
  old, new = _saved(path), config_lib.to_dict(config)
  changed = [] if old is None else config_lib.differences(old, new)
  if other := contents.other_arrays(workdir, step, state._asdict(), all_of_them=True):
    fields = f" {'; '.join(_fields_of_arrays(old, new, changed))}" if changed else " this config"
    raise ValueError(
      f"checkpoint {step} in {workdir} cannot follow{fields}: {other}. Keep the values it was "
      "trained with, or name another --workdir"
    )
  if changed and step and not allow_change:
    raise ValueError(
      f"{path} differs from this run's config: {'; '.join(changed)}. Pass "
      "--allow_config_change to resume with the new one, or another --workdir"
    )


def record_config(workdir: epath.PathLike, config: Config, step: int) -> None:
  """Writes config.json; another one that is there is kept as config.before_step_<step>.json.

  Args:
    workdir: the run's.
    config: the run's.
    step: of the checkpoint that the run resumed from; 0 for a new run, which keeps no other.
  """
  path = epath.Path(workdir) / CONFIG_FILE
  path.parent.mkdir(parents=True, exist_ok=True)
  new = config_lib.to_dict(config)
  old = _saved(path)
  if jax.process_index() != 0 or (old is not None and not config_lib.differences(old, new)):
    return
  if step and old is not None:
    aside = path.with_name(f"config.before_step_{step}.json")
    number = 1
    while aside.exists():
      aside = path.with_name(f"config.before_step_{step}.{number}.json")
      number += 1
    aside.write_text(path.read_text())
  temporary = path.with_name(CONFIG_FILE + ".tmp")
  temporary.write_text(json.dumps(new, indent=2))
  temporary.replace(path)


def _saved(path: epath.Path) -> dict[str, Any] | None:
  """Returns what config.json holds, with defaults for newer fields; None if it does not exist."""
  if not path.exists():
    return None
  try:
    saved = json.loads(path.read_text())
    if not isinstance(saved, dict):
      raise ValueError(f"it holds {type(saved).__name__}")
    return config_lib.with_defaults(saved)
  except (ValueError, RecursionError) as error:
    raise ValueError(
      f"{path}: it must be the JSON object that a run wrote, it is damaged ({error}); put a copy in "
      "its place, or delete it and start the run again, which writes it anew"
    ) from error


def _fields_of_arrays(
  old: Mapping[str, Any] | None, new: Mapping[str, Any], changed: list[str]
) -> list[str]:
  """Returns those of the changes that give the model or the optimizer's state other arrays.

  Each change is made alone to the old config. One that breaks a rule alone counts, if it is one of
  the model's.
  """

  def arrays(values: Mapping[str, Any]) -> dict[str, Any]:
    return contents.shapes(train_step.state_shapes(config_lib.from_dict(values))._asdict())

  fields = []
  try:
    before = arrays(old or {})
  except ValueError:  # written by a version with other fields
    return changed
  for change in changed:
    path = change.split(":")[0].split(".")
    alone = copy.deepcopy(dict(old or {}))
    group, value = alone, new
    for name in path[:-1]:
      group, value = group.setdefault(name, {}), value[name]
    if path[-1] not in value:  # a field that no longer exists
      continue
    group[path[-1]] = value[path[-1]]
    try:
      if arrays(alone) != before:
        fields.append(change)
    except ValueError:
      if path[0] == "model":
        fields.append(change)
  return fields or changed
