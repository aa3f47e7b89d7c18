"""Planes like those of TPUs, GPUs and CPUs, against sums over single nanoseconds."""

import numpy as np
import pytest

from dsmoe.profiling import planes, scopes
from tests.profiling import programs
from tests.profiling.programs import COLLECTIVES, EXPECTED

PROGRAM = scopes.program(programs.HLO)
NAMES = [name for name in EXPECTED if name not in ("while.1", "mul.1", "copy.4")]
END = 400
SECS = pytest.approx


def in_turn(rng, first: int, end: int, names) -> list[tuple[str, int, int]]:
  """Draws operations one after the other, with gaps."""
  events, at = [], first
  while at < end - 12:
    start = at + int(rng.integers(0, 5))
    at = start + int(rng.integers(1, 9))
    events.append((str(rng.choice(names)), start, at))
  return events


def ticks(events) -> np.ndarray:
  """Returns at which nanoseconds any of the events runs."""
  running = np.zeros(END, bool)
  for _, start, end in events:
    running[start:end] = True
  return running


def check_clock(device, working, beside=(), overlaps=True):
  """Compares with sums over nanoseconds; `working` without operations around others."""
  collective = ticks([e for e in working if e[0] in COLLECTIVES] + list(beside))
  computing = ticks([e for e in working if e[0] not in COLLECTIVES])
  clock = device.clock()
  first, last = np.flatnonzero(collective | computing)[[0, -1]]
  expected = {
    "window_secs": last + 1 - first,
    "idle_secs": last + 1 - first - np.sum(collective | computing),
    "collective_secs": np.sum(collective),
    "exposed_collective_secs": np.sum(collective & ~computing),
  }
  assert clock == SECS({name: value * 1e-9 for name, value in expected.items()})
  assert 0 < clock["exposed_collective_secs"]
  assert (clock["exposed_collective_secs"] < clock["collective_secs"]) == overlaps


def sums(events) -> dict:
  found: dict = {}
  for name, start, end in events:
    key = EXPECTED.get(name, ("other programs", "other"))
    found[key] = found.get(key, 0) + (end - start) * 1e-9
  return found


@pytest.mark.parametrize("seed", range(4))
def test_tpu(seed):
  rng = np.random.default_rng(seed)
  before, inside = in_turn(rng, 3, 150, NAMES), in_turn(rng, 160, 250, ["mul.1"])
  after = in_turn(rng, 260, 300, NAMES)
  others = in_turn(rng, 310, 390, ["mul.1"])  # names of another program's instructions
  around = [("while.1", 155, 255)]
  beside = in_turn(rng, 5, 290, ["ag-start", "async-start"])
  copies = in_turn(rng, 5, 290, ["copy-start"])
  ops = [*before, *around, *inside, *after, *others]
  rng.shuffle(ops)
  text = {name: f"%{name} = f32[8]{{0}} op(%a)" for name in EXPECTED}
  line = lambda events: [(text[n], int(s), int(e), {"flops": 3}) for n, s, e in events]  # noqa: E731
  modules = [("jit_train_step(123)", 0, 300, {}), ("jit_evaluate(7)", 305, 395, {})]
  data = programs.xspace(
    {
      "/host:CPU": {"main": [("Execute", 0, 390, {})]},
      "/device:TPU:1": {
        "XLA Modules": modules,
        "XLA Ops": line(ops),
        "Async XLA Ops": line(beside + copies),
        "Steps": [("0", 0, 390, {})],
      },
      "/device:TPU:0": {"XLA Ops": line(before)},
    }
  )
  first, device = planes.devices(data, PROGRAM)
  assert (first.name, device.name) == ("TPU:0", "TPU:1")
  known = sums([*before, *inside, *after])
  known["other programs", "other"] = sum(e - s for _, s, e in others) * 1e-9
  assert device.secs_of_parts() == SECS(known)
  # Another program's time counts as computing, whatever its instructions are called.
  check_clock(device, [*before, *inside, *after, *others], beside)
  assert first.secs_of_parts() == SECS(sums(before))
  check_clock(first, before, overlaps=False)


def test_gpu_collectives_have_a_stream_of_their_own():
  rng = np.random.default_rng(5)
  computing = in_turn(rng, 0, 300, ["dot.1", "dot.2", "add", "while.1"])
  communicating = in_turn(rng, 40, 390, ["ag-start", "sum"])
  copied = in_turn(rng, 10, 200, ["a"])  # not of a program
  stream = lambda events: [  # noqa: E731
    ("kernel", s, e, {"hlo_op": n, "hlo_module": "jit_train_step"}) for n, s, e in events
  ]
  data = programs.xspace(
    {
      "/device:GPU:0": {
        "Stream #7(Compute)": stream(computing),
        "Stream #8(Compute)": stream(communicating),
        "Stream #9(MemcpyH2D)": [("MemcpyH2D", s, e, {}) for _, s, e in copied],
        "XLA Ops": stream(computing),  # derived from the streams: not counted again
      }
    }
  )
  (device,) = planes.devices(data, PROGRAM)
  known = sums([*computing, *communicating])
  known["other programs", "other"] = sum(e - s for _, s, e in copied) * 1e-9
  assert device.secs_of_parts() == SECS(known)
  check_clock(device, [*computing, *communicating, *copied])


def test_cpu_threads_work_for_several_devices():
  rng = np.random.default_rng(6)
  threads = [in_turn(rng, 0, 380, NAMES) for _ in range(3)]
  devices = [[int(rng.integers(0, 2)) for _ in events] for events in threads]
  stats = lambda name, device: {  # noqa: E731
    "hlo_op": name,
    "hlo_module": "jit_train_step",
    "device_ordinal": device,
  }
  lines = {
    f"thread {i}": [(n, s, e, stats(n, d)) for (n, s, e), d in zip(events, of)]
    for i, (events, of) in enumerate(zip(threads, devices))
  }
  lines["python"] = [("train", 0, 390, {})]
  found = planes.devices(programs.xspace({"/host:CPU": lines}), PROGRAM)
  assert [device.name for device in found] == ["CPU:0", "CPU:1"]
  for number, device in enumerate(found):
    own = [e for events, of in zip(threads, devices) for e, d in zip(events, of) if d == number]
    assert device.secs_of_parts() == SECS(sums(own))
    check_clock(device, own)


def test_an_operation_around_others_on_its_line_counts_its_own_time():
  events = [("dot.1", 0, 100), ("dot.2", 10, 40), ("add", 20, 30), ("dot.2", 50, 60)]
  stats = {"hlo_module": "jit_train_step", "device_ordinal": 0}
  line = [(n, s, e, {"hlo_op": n, **stats}) for n, s, e in events]
  (device,) = planes.devices(programs.xspace({"/host:CPU": {"thread": line}}), PROGRAM)
  own = {"dot.1": 60e-9, "dot.2": 30e-9, "add": 10e-9}
  assert device.secs_of_parts() == SECS({EXPECTED[name]: secs for name, secs in own.items()})


def test_length_of_spans():
  assert planes.length(np.zeros((0, 2))) == 0
  assert planes.length(np.array([[5.0, 9.0], [1.0, 3.0], [2.0, 6.0], [7.0, 8.0]])) == 8
