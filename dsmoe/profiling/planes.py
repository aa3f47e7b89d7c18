"""Reads what each device ran from a trace, XLA's xplane.pb, and measures it.

Where the operations of a device are:
- TPU: in the line "XLA Ops" of a plane of its own, by the text of the instruction; an operation that
  runs others, such as a loop, lies around them. Collectives and copies that run beside the others lie
  in the line "Async XLA Ops", from start to end.
- GPU: in the lines of its streams, with the instruction's name; collectives have streams of their own.
- CPU: in the lines of the process' threads, with the instruction's name and the device's number. Here
  times are those of threads, of which several may work for one device at once. XLA:CPU hands large
  matrix products to a pool of threads: their events end when they are handed over.

Times are in nanoseconds in the arrays, N operations of a device, and in seconds in what is returned.
"""

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import jax
import numpy as np

from dsmoe.profiling.scopes import UNNAMED, Operation, Program

OTHER_PROGRAMS = "other programs"
_OTHER = Operation(OTHER_PROGRAMS, "other", False, False)
_UNKNOWN = Operation(UNNAMED, "other", False, False)
_TPU_LINES = {"XLA Ops": False, "Async XLA Ops": True}


class Event(NamedTuple):
  """One run of an operation."""

  start: float
  end: float
  operation: Operation


class Device(NamedTuple):
  """What one device ran."""

  name: str  # "TPU:0", "CPU:3"
  operations: list[Operation]  # N
  span_N2: np.ndarray  # start and end
  self_N: np.ndarray  # its duration without the operations of the same line that lie inside it
  beside_X2: np.ndarray  # of collectives that run beside the operations

  def secs_of_parts(self) -> dict[tuple[str, str], float]:
    """Returns by (part, direction) the seconds of operations, which add up to all of them."""
    found: dict[tuple[str, str], float] = {}
    for operation, secs in zip(self.operations, (self.self_N * 1e-9).tolist()):
      if not operation.is_around_others:
        key = operation.part, operation.direction
        found[key] = found.get(key, 0.0) + secs
    return found

  def clock(self) -> dict[str, float]:
    """Returns seconds on the clock, of all steps together.

    `window_secs`: from the first operation's start to the last one's end. `idle_secs`: when nothing
    ran. `collective_secs`: when a collective ran. `exposed_collective_secs`: when one ran and no
    computation did. An operation that runs others does not count for itself.
    """
    works = np.array([not o.is_around_others for o in self.operations], bool)
    collective = np.array([o.is_collective for o in self.operations], bool)
    computing = length(self.span_N2[works & ~collective])
    collectives_X2 = np.concatenate([self.span_N2[works & collective], self.beside_X2])
    busy = length(np.concatenate([self.span_N2[works], self.beside_X2]))
    whole_X2 = np.concatenate([self.span_N2, self.beside_X2])
    window = whole_X2[:, 1].max() - whole_X2[:, 0].min() if len(whole_X2) else 0.0
    return {
      "window_secs": window * 1e-9,
      "idle_secs": (window - busy) * 1e-9,
      "collective_secs": length(collectives_X2) * 1e-9,
      "exposed_collective_secs": (busy - computing) * 1e-9,
    }


def length(span_N2: np.ndarray) -> float:
  """Returns how much time the spans cover together, what several cover counted once."""
  if not len(span_N2):
    return 0.0
  start_N, end_N = span_N2[np.argsort(span_N2[:, 0], kind="stable")].T
  reached_N = np.maximum.accumulate(end_N)
  before_N = np.concatenate([start_N[:1], reached_N[:-1]])
  return float(np.sum(np.maximum(reached_N - np.maximum(before_N, start_N), 0)))


def devices(data: bytes, program: Program) -> list[Device]:
  """Returns what each device of a trace ran, in the order of their numbers.

  Args:
    data: of an xplane.pb.
    program: that the trace is of; operations of others belong to OTHER_PROGRAMS.
  """
  lines: dict[str, list[list[Event]]] = {}
  beside: dict[str, list[Event]] = {}
  for plane in jax.profiler.ProfileData.from_serialized_xspace(data).planes:
    found = re.fullmatch(r"/device:((TPU|GPU):\d+)", plane.name)
    if found and found[2] == "TPU":
      events, asynchronous = _of_tpu(plane, program)
      lines[found[1]], beside[found[1]] = [events], asynchronous
    elif found:
      streams = [line for line in plane.lines if line.name.startswith("Stream")]
      lines[found[1]] = [_of_stream(stream, program) for stream in streams]
    elif plane.name == "/host:CPU":
      for line in plane.lines:
        for number, events in _of_thread(line, program).items():
          lines.setdefault(f"CPU:{number}", []).append(events)
  made = [_device(name, lines[name], beside.get(name, [])) for name in lines]
  ran = [device for device in made if len(device.operations)]
  return sorted(ran, key=lambda device: int(device.name.split(":")[1]))


def _device(name: str, lines: Iterable[list[Event]], beside: list[Event]) -> Device:
  ordered = [sorted(line, key=lambda event: (event.start, -event.end)) for line in lines]
  events = [event for line in ordered for event in line]
  return Device(
    name,
    [event.operation for event in events],
    _spans(events),
    np.concatenate([np.zeros(0), *map(_without_inner, ordered)]),
    _spans(beside),
  )


def _spans(events: list[Event]) -> np.ndarray:
  return np.array([event[:2] for event in events], np.float64).reshape(-1, 2)


def _without_inner(events: list[Event]) -> np.ndarray:
  """Returns durations without those of the next inner events, of one line's events in order."""
  own_N = np.array([event.end - event.start for event in events], np.float64)
  around: list[int] = []
  for i, event in enumerate(events):
    while around and events[around[-1]].end <= event.start:
      around.pop()
    if around:
      own_N[around[-1]] -= min(event.end, events[around[-1]].end) - event.start
    around.append(i)
  return np.maximum(own_N, 0)


def _of(name: str, module: str | None, program: Program) -> Operation:
  if module is not None and module != program.module:
    return _OTHER
  return program.operations.get(name, _UNKNOWN)


def _of_tpu(plane, program: Program) -> tuple[list[Event], list[Event]]:
  """Returns the operations of a TPU's plane, and the collectives beside them."""
  modules: list[tuple[float, float, str]] = []
  events: dict[bool, list] = {False: [], True: []}
  for line in plane.lines:
    if line.name == "XLA Modules":
      modules += [(e.start_ns, e.end_ns, e.name.split("(")[0]) for e in line.events]
    elif line.name in _TPU_LINES:
      events[_TPU_LINES[line.name]] += [(e.start_ns, e.end_ns, e.name) for e in line.events]
  modules.sort()
  starts = np.array([start for start, _, _ in modules])

  def read(found: list) -> Iterator[Event]:
    for start, end, text in found:
      place = int(np.searchsorted(starts, start, side="right")) - 1
      inside = place >= 0 and start < modules[place][1]
      name = re.match(r"%?([\w.\-]+)", text)
      module = modules[place][2] if inside else None
      yield Event(start, end, _of(name[1] if name else "", module, program))

  beside = [event for event in read(events[True]) if event.operation.is_collective]
  return list(read(events[False])), beside


def _of_stream(line, program: Program) -> list[Event]:
  """Returns the operations of a GPU's stream, which lie beside each other, never around others."""
  events = []
  for event in line.events:
    stats = dict(event.stats)
    name, operation = stats.get("hlo_op"), _OTHER  # a copy to the device has no name
    if name is not None:
      operation = _of(name, stats.get("hlo_module"), program)._replace(is_around_others=False)
    events.append(Event(event.start_ns, event.end_ns, operation))
  return events


def _of_thread(line, program: Program) -> dict[int, list[Event]]:
  """Returns the operations of a thread, by the number of the CPU device it ran them for."""
  events: dict[int, list[Event]] = {}
  for event in line.events:
    stats = dict(event.stats)
    if (name := stats.get("hlo_op")) is not None:
      operation = _of(name, stats.get("hlo_module"), program)
      of_device = events.setdefault(stats.get("device_ordinal") or 0, [])
      of_device.append(Event(event.start_ns, event.end_ns, operation))
  return events
