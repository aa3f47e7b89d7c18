"""Traces training steps with JAX's profiler into <workdir>/profiles/step_<first>.

Every process traces its own devices, and leaves there

  process_<number>.json          `About` the trace
  process_<number>.hlo.txt.gz    the compiled step, whose instructions carry the model's scopes
  plugins/profile/steps/process_<number>.xplane.pb    the trace, where XProf looks for it
"""

import contextlib
import gzip
import json
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from etils import epath

from dsmoe.compilers import program_cost
from dsmoe.config import Config, ProfileConfig
from dsmoe.planning import chips

FOLDER = "profiles"
TRACES = "plugins/profile/steps"
ABOUT, PROGRAM, TRACE = ".json", ".hlo.txt.gz", ".xplane.pb"


class About(NamedTuple):
  """What a trace is of."""

  steps: list[int]  # those that were traced
  process: int
  num_processes: int
  platform: str
  device_kind: str
  mesh: dict[str, int]  # devices along each axis
  model_flops: float  # of a step and device, with causal attention and without recomputation
  link_bytes_per_sec: dict[str, float | None]  # by mesh axis, both directions summed; {}: unknown


@contextlib.contextmanager
def named(config: ProfileConfig) -> Iterator[None]:
  """Compile the traced program in here: it then has the scopes of this very code.

  JAX's cache of compiled programs does not look at names, and may return one with older names.
  """
  field = "jax_compilation_cache_include_metadata_in_key"
  before = getattr(jax.config, field)
  jax.config.update(field, before or bool(config.traced))
  try:
    yield
  finally:
    jax.config.update(field, before)


class Capture:
  """Traces the steps of `config.profile` around a training loop, which may run ahead of the device.

  The loop calls `before` and `after` around dispatching each step. At the first traced step
  everything dispatched before is waited for, and at the last one the step itself, so that the trace
  holds all that the devices do for these steps and nothing of others. A loop that goes back calls
  `drop`. Leaving the context ends a trace that a stopped loop left open.
  """

  def __init__(
    self,
    config: Config,
    workdir: epath.PathLike,
    mesh: jax.sharding.Mesh,
    first: int,
    program: jax.stages.Compiled,
    flops_per_step: float,
    say: Callable[[str], Any],
  ):
    """Prepares to trace, and says which of the steps this run does not make.

    Args:
      config: of the run.
      workdir: where the traces go.
      mesh: that the step runs on.
      first: the step that the run starts from.
      program: the compiled step.
      flops_per_step: of the model, all devices together.
      say: prints a line.
    """
    steps = config.profile.traced
    last = min(steps.stop - 1, config.num_steps)
    self._steps = range(max(steps.start, first + 1), last + 1)
    self._workdir, self._program, self._say = epath.Path(workdir), program, say
    self._mesh, self._flops = mesh, flops_per_step / mesh.size
    self._traced: list[int] = []
    self._state: Any = None
    self._folder: tempfile.TemporaryDirectory | None = None
    self._is_done = not self._steps
    if len(self._steps) < len(steps):
      which = _name(self._steps) if self._steps else "nothing"
      say(
        f"profile.steps ({config.profile.steps}): this run makes the steps {first + 1} to "
        f"{config.num_steps}; {which} will be traced"
      )

  def is_edge(self, step: int) -> bool:
    """Whether a trace begins after this step or ends with it, so that both its ends wait for it."""
    return len(self._steps) > 0 and step in (self._steps[0] - 1, self._steps[-1])

  def before(self, step: int, state: Any) -> float:
    """Call before a step is dispatched; returns the seconds that starting a trace took.

    Args:
      step: its number.
      state: arrays that the step waits for.
    """
    if self._is_done or self._folder is not None or step not in self._steps:
      return 0.0
    jax.block_until_ready(state)
    start = time.perf_counter()
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # would slow the loop down
    self._folder = tempfile.TemporaryDirectory(prefix="trace")
    jax.profiler.start_trace(self._folder.name, profiler_options=options)
    return time.perf_counter() - start

  def after(self, step: int, state: Any) -> float:
    """Call after a step was dispatched; returns the seconds that ending a trace took.

    Args:
      step: its number.
      state: arrays that are ready when the step has run.
    """
    if self._folder is None:
      return 0.0
    self._traced.append(step)
    self._state = state
    if step < self._steps[-1]:
      return 0.0
    jax.block_until_ready(state)
    start = time.perf_counter()
    self._end()
    return time.perf_counter() - start

  def drop(self) -> None:
    """Ends a trace that is open, and keeps nothing of it: its steps are made again."""
    if self._folder is not None:
      jax.profiler.stop_trace()
      self._folder.cleanup()
      self._folder, self._state, self._traced = None, None, []

  def __enter__(self) -> "Capture":
    return self

  def __exit__(self, exc_type, *_):
    if self._folder is not None:
      if exc_type is None:
        jax.block_until_ready(self._state)
      self._end()

  def _end(self) -> None:
    """Ends the trace and writes it, if it has a step; says where it is, or why it is not there."""
    folder, self._folder, self._state, self._is_done = self._folder, None, None, True
    assert folder is not None
    with folder:
      jax.profiler.stop_trace()
      if not self._traced:
        return
      target = self._workdir / FOLDER / f"step_{self._traced[0]}"
      try:
        (trace,) = pathlib.Path(folder.name).rglob("*.xplane.pb")
        self._write(target, trace.read_bytes())
      except OSError as error:  # no reason to end a run
        self._say(f"the trace of {_name(self._traced)} could not be written: {error}")
        return
    every = f"each of {jax.process_count()} processes its own devices, "
    self._say(
      f"traced {_name(self._traced)}, {every if jax.process_count() > 1 else ''}into {target}; "
      "tracing makes these steps slower, writing it is not in their time"
    )

  def _write(self, target: epath.Path, trace: bytes) -> None:
    device = self._mesh.local_devices[0]
    chip = chips.of_device(device)
    peaks = {
      axis: program_cost.link_peak(self._mesh, chip, [axis]) for axis in self._mesh.shape if chip
    }
    about = About(
      self._traced,
      jax.process_index(),
      jax.process_count(),
      device.platform,
      device.device_kind,
      dict(self._mesh.shape),
      self._flops,
      peaks,
    )
    (target / TRACES).mkdir(parents=True, exist_ok=True)
    name = f"process_{about.process}"
    (target / TRACES / f"{name}{TRACE}").write_bytes(trace)
    text = gzip.compress((self._program.as_text() or "").encode(), compresslevel=6)
    (target / f"{name}{PROGRAM}").write_bytes(text)
    # The last one: where it is, the others are.
    (target / f"{name}{ABOUT}").write_text(json.dumps(about._asdict(), indent=2) + "\n")


def _name(steps) -> str:
  one = len(steps) == 1
  return f"step {steps[0]}" if one else f"the steps {steps[0]} to {steps[-1]}"
