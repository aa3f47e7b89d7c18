"""What a trace of training steps says, as figures: time by part, exposed collectives, and the bound."""

import contextlib
import gzip
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

from etils import epath

from dsmoe.compilers import collective_bytes, hlo
from dsmoe.planning import chips
from dsmoe.profiling import capture, planes, scopes
from dsmoe.profiling.capture import About
from dsmoe.profiling.planes import Device

PARTS = (*scopes.SCOPES, scopes.UNNAMED, planes.OTHER_PROGRAMS)


def find(path: epath.PathLike, step: int | None = None) -> epath.Path:
  """Returns the folder of a trace.

  Args:
    path: that folder, or a run's workdir.
    step: the first traced step, where a workdir has several traces; None: the latest.

  Raises:
    ValueError: where there is none.
  """
  path = epath.Path(path)
  if not path.is_dir():
    raise ValueError(f"a run's workdir or a trace's folder must exist, got {path}")
  if _processes(path):
    return path
  folders: dict[int, epath.Path] = {}
  if (path / capture.FOLDER).is_dir():
    for folder in (path / capture.FOLDER).iterdir():
      name = re.fullmatch(r"step_(\d+)", folder.name)
      if name and _processes(folder):
        folders[int(name[1])] = folder
  if not folders:
    raise ValueError(
      f"{path} must hold a trace, it has none in {capture.FOLDER}/: a run leaves one with "
      "--config.profile.steps=FIRST:END"
    )
  if step is not None and step not in folders:
    raise ValueError(
      f"the first traced step must be one of {', '.join(map(str, sorted(folders)))}, got {step}"
    )
  return folders[max(folders) if step is None else step]


def _processes(folder: epath.Path) -> list[int]:
  """Returns the numbers of the processes whose traces are in a folder, in order."""
  names = (re.fullmatch(r"process_(\d+)\.json", file.name) for file in folder.iterdir())
  return sorted(int(name[1]) for name in names if name)


def read(folder: epath.PathLike) -> dict[str, Any]:
  """Reads the traces of all processes in a folder.

  Returns:
    `folder`, `steps`, `platform`, `device_kind`, `mesh`; `num_processes` of the run, of which
    `processes` left traces. Of a step and in the mean over devices: `parts`, seconds by part and
    direction; `secs`, their sum; `clock`, see `Device.clock`. `devices`: `clock` and `secs` of each.
    `bound`, see that function, None for a kind of device whose peaks are not known. `secs` are of
    operations: where several run at once, as on a CPU's threads, more than the clock's.

  Raises:
    ValueError: for a damaged file, naming it, and when no device ran anything.
  """
  folder, devices = epath.Path(folder), []
  numbers = _processes(folder)
  for number in numbers:
    about, text, found = _read_process(folder, number)
    prefix = f"process {number}, " if about.num_processes > 1 else ""
    devices += [device._replace(name=prefix + device.name) for device in found]
  if not devices:
    raise ValueError(f"the trace in {folder} must hold operations of a device, it holds none")
  return {
    "folder": str(folder),
    "steps": about.steps,
    "platform": about.platform,
    "device_kind": about.device_kind,
    "mesh": about.mesh,
    "num_processes": about.num_processes,
    "processes": numbers,
    **figures(devices, len(about.steps)),
    "bound": bound(about, text),
  }


def _read_process(folder: epath.Path, number: int) -> tuple[About, str, list[Device]]:
  name = f"process_{number}"
  with _content(folder / (name + capture.ABOUT)) as content:
    about = About(**json.loads(content))
    whole_numbers = [about.num_processes, *about.steps]
    if not about.steps or any(type(number) is not int for number in whole_numbers):
      raise ValueError(
        f"steps ({about.steps}) and num_processes ({about.num_processes}) must be whole numbers, and "
        "there must be a step"
      )
  with _content(folder / (name + capture.PROGRAM)) as content:
    text = gzip.decompress(content).decode()
    program = scopes.program(text)
  with _content(folder / capture.TRACES / (name + capture.TRACE)) as content:
    return about, text, planes.devices(content, program)


@contextlib.contextmanager
def _content(path: epath.Path) -> Iterator[bytes]:
  """Yields what a file holds, and names it in errors about that."""
  try:
    yield path.read_bytes()
  except (ValueError, TypeError, EOFError, OSError, RuntimeError, zlib.error) as error:
    raise ValueError(f"{path} is damaged: {error}") from error


def figures(devices: Sequence[Device], num_steps: int) -> dict[str, Any]:
  """Returns `parts`, `secs`, `clock` and `devices` of `read`."""
  scale = 1 / (num_steps * len(devices))
  parts: dict[str, dict[str, float]] = {}
  clock: dict[str, float] = {}
  rows: list[dict[str, Any]] = []
  for device in devices:
    by_part, own = device.secs_of_parts(), device.clock()
    for (part, direction), secs in by_part.items():
      row = parts.setdefault(part, dict.fromkeys(scopes.DIRECTIONS, 0.0))
      row[direction] += secs * scale
    for name, secs in own.items():
      clock[name] = clock.get(name, 0.0) + secs * scale
    of_step = {name: secs / num_steps for name, secs in own.items()}
    rows.append({"device": device.name, "secs": sum(by_part.values()) / num_steps, **of_step})
  return {
    "parts": {part: parts[part] for part in PARTS if part in parts},
    "secs": sum(row["secs"] for row in rows) / len(rows),
    "clock": clock,
    "devices": rows,
  }


def bound(about: About, text: str) -> dict[str, Any] | None:
  """Returns the least time of a step on these devices, at the peaks that are published for them.

  Returns:
    Of one device: `compute_secs`, of the model's FLOPs at the dense bfloat16 peak; `hbm_secs`, of the
    bytes that the compiled step's instructions move; `link_secs` by mesh axis, of the bytes that its
    collectives send, at half of what is published for both directions; `bound` names the longest of
    the three, links summed, and `bound_secs` is its time. None for devices that the table of chips
    does not have; what has no published figure is left out.

  Args:
    about: the trace.
    text: HLO of the compiled step.
  """
  chip = chips.of_device(about)
  if chip is None:
    return None
  computations, entry = hlo.parse(text)
  moved = sum(
    times * hlo.hbm_bytes(instruction, where, computations)
    for instruction, where, times in hlo.executed(computations, entry)
  )
  sent = collective_bytes.by_axis(collective_bytes.collectives(text, about.mesh))
  links = {}
  for axis, of_axis in sent.items():
    peaks = [about.link_bytes_per_sec.get(one) for one in axis.split("+")]
    if axis != "all" and all(peaks):
      links[axis] = of_axis["sent_bytes"] / (min(peak for peak in peaks if peak) / 2)
  found: dict[str, float] = {"compute": about.model_flops / chip.peak_flops}
  if chip.hbm_bytes_per_sec:
    found["HBM"] = moved / chip.hbm_bytes_per_sec
  if links:
    found["links"] = sum(links.values())
  longest = max(found, key=found.__getitem__)
  return {
    "chip": chip.name,
    "compute_secs": found["compute"],
    "hbm_secs": found.get("HBM"),
    "link_secs": links,
    "bound": longest,
    "bound_secs": found[longest],
  }
