"""Which devices or cores of this machine each worker of a sweep has."""

import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

_PROBE = "import jax; found = jax.local_devices(); print(found[0].platform, len(found))"
_PROBE_SECS = 300


class Slot(NamedTuple):
  """A worker's part of a machine: its name, variables of its process, and its cores if any."""

  name: str
  env: dict[str, str]
  cores: tuple[int, ...]


def found(environ: Mapping[str, str], say: Callable[[str], None]) -> tuple[str, int]:
  """Returns the platform of the attached devices and their number; of "cpu" the number of cores.

  Another process asks JAX, because one that has asked holds the devices; `say` tells the user.

  Raises:
    ValueError: when JAX finds no device.
  """
  if environ.get("JAX_PLATFORMS") == "cpu":
    return "cpu", len(os.sched_getaffinity(0))
  say("asking JAX for the devices of this machine")
  asked = subprocess.run(
    [sys.executable, "-c", _PROBE],
    env=dict(environ),
    capture_output=True,
    text=True,
    timeout=_PROBE_SECS,
    check=False,
  )
  if asked.returncode:
    last = (asked.stderr.strip().splitlines() or ["it printed nothing"])[-1]
    raise ValueError(f"a sweep needs a device, and JAX finds none: {last}")
  platform, number = asked.stdout.split()[-2:]
  return platform, len(os.sched_getaffinity(0)) if platform == "cpu" else int(number)


def slots(
  num_workers: int, platform: str, number: int, machine: str, environ: Mapping[str, str]
) -> list[Slot]:
  """Splits a machine evenly among workers.

  Args:
    num_workers: how many there are.
    platform: "cpu", "gpu" or "tpu".
    number: of devices, or cores.
    machine: name for the slots, which no two machines share.
    environ: of this process; the GPUs that it names are those that are split.

  Raises:
    ValueError: when the workers do not divide the devices, or are more than the cores.
  """
  what = "cores" if platform == "cpu" else "devices"
  if num_workers < 1 or num_workers > number:
    raise ValueError(
      f"--workers must be from 1 to the number of this machine's {what} ({number}), got "
      f"{num_workers}"
    )
  if platform == "cpu":
    cores = sorted(os.sched_getaffinity(0))[:number]
    edges = [number * worker // num_workers for worker in range(num_workers + 1)]
    parts = [tuple(cores[a:b]) for a, b in itertools.pairwise(edges)]
    return [Slot(_name(machine, "core", part), {}, part) for part in parts]
  if number % num_workers:
    raise ValueError(f"--workers ({num_workers}) must divide the {number} devices of this machine")
  each = number // num_workers
  ids = [str(device) for device in range(number)]
  if platform == "gpu":
    ids = environ.get("CUDA_VISIBLE_DEVICES", ",".join(ids)).split(",")
    groups = [ids[worker * each :][:each] for worker in range(num_workers)]
    return [
      Slot(_name(machine, "gpu", group), {"CUDA_VISIBLE_DEVICES": ",".join(group)}, ())
      for group in groups
    ]
  if num_workers == 1:
    return [Slot(_name(machine, platform, ids), {}, ())]
  if platform != "tpu" or each != 1:
    raise ValueError(
      f"--workers ({num_workers}) must be 1 or the number of this machine's TPU chips ({number})"
    )
  alone = {"TPU_PROCESS_BOUNDS": "1,1,1", "TPU_CHIPS_PER_PROCESS_BOUNDS": "1,1,1"}
  return [Slot(_name(machine, "tpu", [i]), alone | {"TPU_VISIBLE_CHIPS": i}, ()) for i in ids]


_MOST_LISTED = 4


def _name(machine: str, kind: str, ids: Sequence[str | int]) -> str:
  """Returns the name of a slot, fit for a file."""
  listed = "+".join(map(str, ids))
  if len(ids) > _MOST_LISTED:  # they are neighbours, and a file's name has a limit
    listed = f"{ids[0]}-{ids[-1]}"
  text = f"worker {machine} {kind} {listed}"
  return "".join(sign if sign.isalnum() or sign in "+-." else "_" for sign in text)
