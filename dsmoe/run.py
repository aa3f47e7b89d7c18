"""A run while it trains: what the loop moves, and what follows from the steps that it dispatched."""

import json
import time
from collections.abc import Callable, Generator, Iterable
from concurrent import futures
from typing import NamedTuple, NoReturn

import jax
from etils import epath

from dsmoe import checkpoint, runtime
from dsmoe.config import Config
from dsmoe.data.reader import Reader
from dsmoe.evaluation.validation import Validation
from dsmoe.parallel import processes
from dsmoe.planning import accounting
from dsmoe.platforms import cpu
from dsmoe.profiling import capture
from dsmoe.reporting import goodput as goodput_lib
from dsmoe.reporting import metrics, progress, result, routing_trace, step_log
from dsmoe.training import bad_steps, hyperparameters, train_step
from dsmoe.training.programs import Programs


class BadStepError(RuntimeError):
  """A loss or gradient was a spike; the last good state has been saved."""


class NonFiniteError(BadStepError):
  """A loss or gradient was not finite; the last good state has been saved."""


class Dispatched(NamedTuple):
  """A step that was dispatched; what it computed may not be there yet."""

  step: int
  gate: train_step.Gate
  metrics: futures.Future[tuple[dict, float]]  # as NumPy arrays, and when they were there
  expert_LBSK: jax.Array | None  # where the step's routing is recorded


class Run:
  """The state that the loop moves, and all that takes part in judging, writing and saving it.

  Attributes:
    state: after the last step that was dispatched; arrays on the mesh.
    step: number of that step.
    outstanding: the steps that are yet to be judged, in order.
    step_flops: the model's of a step, all devices together.
    earlier_points: of the present validation curve, which earlier starts have written.
    is_validated: whether there is a point of the step that the run starts from.
  """

  def __init__(
    self,
    config: Config,
    asked_for: Config,
    workdir: epath.Path,
    mesh: jax.sharding.Mesh,
    abstract: train_step.TrainState,
    programs: Programs,
    state: train_step.TrainState,
    reader: Reader,
    judge: bad_steps.BadSteps,
    validation: Validation,
    checkpoints: checkpoint.Checkpointer,
    check_owner: Callable[[], None],
    goodput: goodput_lib.Goodput,
    record: result.Record,
  ):
    """Opens the metrics of a run; `writer` and `bar` are contexts in which to train.

    Args:
      config: with a mesh that fits the devices.
      asked_for: the config that is recorded.
      workdir, mesh: the run's.
      abstract: of the state, as `train_step.abstract_state` returns it.
      programs: where the run's are.
      state: that the run starts with, after step `reader.first`.
      reader, judge, validation, checkpoints, goodput, record: the run's.
      check_owner: raises ValueError when the workdir has become another process's.
    """
    self.config, self.asked_for, self.workdir = config, asked_for, workdir
    self.mesh, self.abstract, self.programs, self.state = mesh, abstract, programs, state
    self.reader, self.judge, self.validation = reader, judge, validation
    self.checkpoints, self.check_owner = checkpoints, check_owner
    self.goodput, self.record = goodput, record
    self.step, self.outstanding = reader.first, list[Dispatched]()
    S = config.data.sequence_length
    flops_per_token = accounting.flops_per_token(config.model, S)["causal_mtp"]
    self.step_flops = flops_per_token * config.batch_size * S
    peak_flops = accounting.peak_flops(jax.devices()[0])
    with processes.failing_together():
      self.writer: metrics.MetricsWriter = metrics.NoMetrics()
      rows: list[dict] = []
      if processes.is_first():
        self.writer = metrics.MetricsWriter(workdir, config.log.tensorboard, self.step)
        rows = metrics.read_metrics(workdir)
      running = metrics.RunningLoad.from_rows(rows)
    self.bar = progress.Progress(config.num_steps, self.step, is_quiet=not processes.is_first())
    peak_flops = peak_flops and peak_flops * jax.device_count()
    self.log = step_log.StepLog(config, self.writer, self.bar, running, self.step_flops, peak_flops)
    [text, *_] = processes.exchange(json.dumps(list(result.points_of(rows, config.batch_size * S))))
    points = [result.Point(*values) for values in json.loads(text)]
    self._curves = {(point.validation_tokens, point.checksum) for point in points[-1:]}
    self.is_validated = self.step in {point.step for point in points}
    self.earlier_points = [p for p in points if p.checksum == validation.checksum]
    self.note(self.step)

  def compiled(
    self, hyper: hyperparameters.Hyperparameters, is_recording: bool
  ) -> tuple[jax.stages.Compiled, jax.stages.Compiled]:
    """Compiles the step, and with `is_recording` the one that records routing, too.

    Args:
      hyper: of the config.
      is_recording: whether routing is recorded at a step.

    Returns:
      The step, and the one for steps whose routing is recorded; see `Programs.train_step`.
    """
    self.bar.print(f"compiling for {self.mesh.size} x {jax.devices()[0].device_kind}")
    with runtime.CachedPrograms() as cached, self.goodput.during("compile"):
      began = time.perf_counter()
      args = self.state, self.reader.batch, hyper, self.judge.gate(self.step + 1)
      with capture.named(self.config.profile):
        recording_step_fn = step_fn = self.programs.train_step(self.config, self.mesh, args)
      if is_recording:
        recording_step_fn = self.programs.train_step(
          self.config, self.mesh, args, record_routing=True
        )
      cpu.release_memory()
      processes.exchange("compiled")  # a first collective waits 30 s for all on CPUs, and no longer
    self.bar.print(f"compiled in {time.perf_counter() - began:.1f} s{cached}")
    return step_fn, recording_step_fn

  def finish(self, dispatched: Dispatched) -> bool:
    """Waits for what a step computed, judges and writes it; returns False for going back."""
    step, (step_metrics, _) = dispatched.step, dispatched.metrics.result()
    verdict, first = self.judge.judge(step, step_metrics), self.reader.first
    if step == first + 1 and (first == 0 or verdict in (None, "skip")):
      checkpoint.record_config(self.workdir, self.asked_for, first)  # it is known to work
    if verdict == "stop":
      self.stop(dispatched)
    if verdict == "rewind":
      return False
    if verdict == "skip":
      reason = self.judge.reason(step, step_metrics, dispatched.gate)
      self.bar.print(f"{reason}; {self.judge.skipped()}")
    self.write(dispatched)
    return True

  def write(self, dispatched: Dispatched) -> None:
    """Writes what a step computed."""
    step, (step_metrics, now) = dispatched.step, dispatched.metrics.result()
    if dispatched.expert_LBSK is not None:
      counts_LE, parts = step_metrics["load"].counts_LE, self.config.num_microbatches
      routing_trace.write(self.workdir, step, dispatched.expert_LBSK, counts_LE, parts)
    self.goodput.beat(step)
    self.note(step)
    if self.log.write(step, step_metrics, self.record.tokens, now, self.goodput.fraction):
      self.goodput.write(step)

  def note(self, step: int) -> None:
    """Notes how far the run has got."""
    self.record.step, self.record.tokens = step, self.reader.position_after(step).tokens

  def stop(self, bad: Dispatched) -> NoReturn:
    """Ends the run after a bad step, the last good state saved."""
    # That is the one before this step, though another has been dispatched: see `Gate`. If steps are
    # skipped, it is the one after that other.
    good, (step_metrics, _) = int(self.state.step), bad.metrics.result()
    why = self.judge.why_stopped()
    if good >= bad.step:
      self.write(bad)
      for later in self.outstanding:
        self.judge.judge(later.step, later.metrics.result()[0])
        self.write(later)
    last_good = f"the state after step {good} is saved in {self.workdir}"
    try:
      self.save(good)
    except checkpoint.NotFiniteError as error:
      last_good = str(error)
    kind = BadStepError if step_metrics["finite"] else NonFiniteError
    reason = self.judge.reason(bad.step, step_metrics, bad.gate)
    raise kind(f"{reason}; {last_good}; {why}")

  def go_back(self, bad: Dispatched, profiler: capture.Capture) -> None:
    """Restores the newest checkpoint, and passes over the data up to the bad step's and more."""
    self.checkpoints.wait()
    newest = self.checkpoints.find_step()
    if not self.judge.goes_back(newest or 0):
      self.stop(bad)
    self.outstanding.clear()
    profiler.drop()
    self.goodput.write(bad.step)
    with self.goodput.during("start_up"):
      passed_over = bad.step + self.config.recovery.rewind_more_batches
      position, first = self.reader.position_after(passed_over), newest or 0
      for leaf in jax.tree.leaves(self.state):
        leaf.delete()  # there may be room for one state only
      saved: dict = {}
      if newest is None:
        self.state = self.programs.init_state(self.config, self.mesh)
      else:
        self.state, saved = self.checkpoints.restore(self.abstract, newest)
      self.judge.restart(saved)
      # A start after a kill before the next save goes on from there too.
      self.checkpoints.amend(self.state, position.to_dict() | self.judge.to_dict())
      self.reader.restart(first, position)
      self.log.go_back(first, time.perf_counter())
      self.record.go_back(first)
    self.step = first
    self.note(first)
    self.goodput.write(first, resumed_from=first)
    step_metrics, _ = bad.metrics.result()
    line = {"rewinds": 1, "bad_step": bad.step, "bad_loss": step_metrics["losses"].total}
    line["bad_grad_norm"] = step_metrics["grad_norm"]
    self.writer.write(first, line)
    reason = self.judge.reason(bad.step, step_metrics, bad.gate)
    self.bar.print(f"{reason}; {self.judge.went_back()}")
    self.bar.update(first, line)

  def save(self, step: int) -> None:
    """Saves the state, which is that after `step`, and the place in the data."""
    position = self.reader.position_after(step).to_dict()
    self.checkpoints.save(self.state, position | self.judge.to_dict())

  def save_all(self) -> None:
    """Saves the state after the last step, and makes durable what was written of the steps."""
    with self.goodput.during("save"):
      self.check_owner()
      self.writer.flush()
      self.save(self.step)
    self.goodput.write(self.step)
    self.goodput.flush()

  def evaluate(self) -> result.Point:
    """Writes a point of the validation curve, and returns it."""
    if self.step == self.config.num_steps:
      self.bar.print("evaluating on the whole validation set")
    with self.goodput.during("evaluate"):
      line = self.validation.line(self.state, self.step, self.goodput.beats)
    if self._curves and metrics.validation_curve(line) not in self._curves:
      tokens = f"{line['validation_tokens']:,} tokens"
      self.bar.print(f"a new validation curve: of {tokens}, on other rows than the one before")
    self._curves.add(metrics.validation_curve(line))
    self.writer.write(self.step, line)
    self.bar.update(self.step, line)
    tokens_read = self.reader.position_after(self.step).tokens
    return result.point_of({"step": self.step, **line}, tokens_read)

  def shown(
    self, points: Iterable[result.Point]
  ) -> Generator[result.Point, str | None, str | None]:
    """Yields points until a reason to stop is sent to a process; returns it, None otherwise.

    Raises:
      ValueError: when something else than a text is sent.
    """
    for point in points:
      self.record.points.append(point)
      with self.goodput.during("paused"):
        sent = yield point
        if sent is not None and not (isinstance(sent, str) and sent):
          raise ValueError(f"the reason to stop a run must be a text, got {sent!r}")
        if reason := processes.agreed_reason(sent):
          return reason
    return None
