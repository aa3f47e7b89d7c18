"""The training loop, top to bottom: mesh, data, state, restore, step, log, evaluate, save.

  python -m dsmoe.train --config=experiments/tiny.py --workdir=runs/tiny --config.num_steps=100

--config.FIELD=VALUE sets any field of the config; experiments/base.py explains them. In a program
`train` trains to the end, and `points` yields the validation curve meanwhile.
"""

import contextlib
import itertools
import time
from collections.abc import Generator
from concurrent import futures

import jax
import rich
from absl import flags
from etils import epath
from ml_collections import config_flags

from dsmoe import checkpoint, platforms, runtime, start
from dsmoe import config as config_lib
from dsmoe.config import Config
from dsmoe.data import records
from dsmoe.data.reader import Reader
from dsmoe.evaluation import held_out
from dsmoe.evaluation import validation as validation_lib
from dsmoe.inference import generate
from dsmoe.parallel import mesh as mesh_lib
from dsmoe.parallel import processes
from dsmoe.profiling import capture
from dsmoe.reporting import code_version, final, output, progress, watchdog
from dsmoe.reporting import goodput as goodput_lib
from dsmoe.reporting import result as result_lib
from dsmoe.reporting.result import Point, Result
from dsmoe.run import BadStepError, Dispatched, Run
from dsmoe.run import NonFiniteError as NonFiniteError
from dsmoe.training import (
  bad_steps,
  exchange_check,
  hyperparameters,
  kernel_check,
  train_step,
)
from dsmoe.training.programs import Programs

_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "An experiment, experiments/<name>.py; needed."
)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Where the run's files go; a run that is there is resumed. Needed."
)
_COORDINATOR = flags.DEFINE_string(
  "coordinator",
  None,
  "Address and port of process 0, of a run of several processes that no Cloud TPU, SLURM or Open "
  "MPI has started.",
)
_NUM_PROCESSES = flags.DEFINE_integer(
  "num_processes", None, "How many processes the run has; goes with --coordinator.", lower_bound=1
)
_PROCESS_ID = flags.DEFINE_integer(
  "process_id", None, "Number of this process, from 0; goes with --coordinator.", lower_bound=0
)
_ALLOW_CONFIG_CHANGE = flags.DEFINE_bool(
  "allow_config_change", False, "Resume although the config differs from the saved one."
)
_INIT_FROM = flags.DEFINE_string(
  "init_from",
  "",
  "A workdir, of a run or imported, whose newest weights and tokenizer a new run starts with.",
)
_ALLOW_OTHER_TOKENIZER = flags.DEFINE_bool(
  "allow_other_tokenizer",
  False,
  "With --init_from: use data.tokenizer, or train one, whatever the weights were trained with.",
)
_ELASTIC = flags.DEFINE_bool(
  "elastic",
  False,
  "Where the config's mesh does not fit the devices there are, go on with one that does, and with "
  "the same global batches.",
)
_RESUME_FROM = flags.DEFINE_integer(
  "resume_from", None, "Resume from the checkpoint of this step; later ones are set aside."
)


def fetch(step_metrics: dict) -> tuple[dict, float]:
  """Waits for a step's metrics; returns them as NumPy arrays, and when they were there."""
  return jax.device_get(step_metrics), time.perf_counter()


def train(*args, **options) -> Result:
  """Trains to the end; takes the arguments of `points`, and raises what it raises."""
  run = points(*args, **options)
  while True:
    try:
      next(run)
    except StopIteration as end:
      return end.value


def stop(run: Generator[Point, str | None, Result], reason: str) -> Result:
  """Ends a run at the point that it has yielded last, with the state saved, and returns its result.

  Args:
    run: what `points` returned.
    reason: a word or a sentence, which becomes the result's `why`; a run whose last point this is
      has finished all the same.
  """
  try:
    run.send(reason)
  except StopIteration as end:
    return end.value
  raise AssertionError("a run that is sent a reason to stop must end")


def points(
  config: Config,
  workdir: epath.PathLike,
  allow_config_change: bool = False,
  init_from: epath.PathLike | None = None,
  resume_from: int | None = None,
  allow_other_tokenizer: bool = False,
  is_elastic: bool = False,
  began: float | None = None,
  programs: Programs | None = None,
) -> Generator[Point, str | None, Result]:
  """Trains to `config.num_steps`, and yields every point of the validation curve when it is written.

  A run resumes from the newest checkpoint in `workdir`; the points before it come first. After the
  return to an earlier checkpoint that `config.recovery` may ask for, the steps of points begin anew.
  `stop` ends the run at a point; all processes of a run end when one of them does this. Until its
  end, `close` or the generator's deletion the run holds the workdir's lock, and SIGTERM and Ctrl-C
  end it after its next step: use `contextlib.closing` where the caller may fail. The main thread
  trains; one run after the other may do so in a process.

  Args:
    config: the run's.
    workdir: where its files go.
    allow_config_change: resume although the saved config differs.
    init_from: a workdir whose weights and router bias a new run starts with, of a model with the
      same shapes; None for newly initialised ones. Its tokenizer is taken too, see
      `checkpoint.with_tokenizer_of`. A run that has trained does not read the weights.
    resume_from: step of the checkpoint to resume from instead of the newest. Later checkpoints, and
      metrics.jsonl as it was, are moved to the folder checkpoints_after_step_<step>.
    allow_other_tokenizer: whether the tokenizer may be another than that of `init_from`.
    is_elastic: take another mesh if the config's does not fit the devices, see `elastic`. The config
      is recorded as it is.
    began: when the process was started, in seconds since 1970, for the goodput log; None: now.
    programs: compiled ones of earlier runs in this process, which this run shares where it can, and
      adds to; None: it compiles its own.

  Returns:
    What the run came to; its step is less than num_steps after SIGTERM, Ctrl-C or `stop`, with the
    state saved.

  Raises:
    ValueError: for a config that breaks a rule, differs from the saved one, or needs other arrays
      than the checkpoint has; for a damaged checkpoint; when another process trains in `workdir`.
    BadStepError: when a loss or gradient is a spike, NonFiniteError when it is not finite, and the
      config says that the run stops then.
    DamagedSaveError: when a checkpoint was not written as it must be; it is left out.
    WrongKernelError: when a compiled kernel's results differ from its reference's on this device.
    WrongExchangeError: when an exchange's results differ from the dense oracle's on this mesh.
  """
  # --- mesh, and what is refused before anything is written
  checkpoint.check_path(workdir)
  workdir, programs = epath.Path(workdir), programs or Programs()
  goodput = goodput_lib.Goodput(goodput_lib.file_of(workdir, jax.process_index()), began)
  with processes.failing_together():
    if init_from:
      config = checkpoint.with_tokenizer_of(config, init_from, allow_other_tokenizer)
    asked_for, config = config, start.on_these_devices(config) if is_elastic else config
    mesh = train_step.make_mesh(config)
    platforms.check_kernels(config.model.kernels)
    records.find_sources(config.data)  # raises when a glob matches nothing
    abstract = programs.abstract_state(config, mesh)
    train_step.check_memory(abstract, mesh)
  versions = code_version.check_processes(config)
  if config != asked_for:
    changes = config_lib.differences(config_lib.to_dict(asked_for), config_lib.to_dict(config))
    processes.say(f"for {mesh.size} devices: {'; '.join(changes)}")
  elif is_elastic:
    processes.say(f"the config's mesh fits the {mesh.size} devices there are")
  for checked in programs.check(config, mesh):
    processes.say(checked)
  with contextlib.ExitStack() as stack:
    signals = stack.enter_context(runtime.noted_interrupts())
    with processes.failing_together():
      check_owner = stack.enter_context(checkpoint.owned(workdir))
    record = stack.enter_context(result_lib.Record(workdir, goodput, check_owner))
    stack.enter_context(goodput)
    stack.enter_context(watchdog.watching(goodput, workdir, config.recovery.watchdog_secs))
    checkpoints = stack.enter_context(
      checkpoint.Checkpointer(
        workdir, config.checkpoint, resume_from, lambda: goodput.beat(goodput.step)
      )
    )
    # A process that lost another leaves before a save is waited for that the other cannot finish.
    stack.enter_context(processes.leaving_if_alone())

    # --- where the run starts, and its data on disk
    origin = start.find(
      checkpoints, workdir, asked_for, abstract, allow_config_change, init_from, resume_from
    )
    goodput.enter("data")
    folder = config.data.cache_dir or workdir / "data"
    prepared = processes.first_then_others(
      f"to prepare the data in {folder}",
      lambda: records.prepare(config.data, config.model.vocab_size, folder),
    )
    data_digest = records.digest(prepared)
    processes.check_same("tokenised data", data_digest, "{} and {}".format)
    record.about = {
      "config": config_lib.to_dict(asked_for),
      "versions": versions,
      "git": code_version.git() if processes.is_first() else None,
      "dataset_sha256": data_digest,
    }
    held_out.warn_of_overlap(prepared.manifest, prepared.manifest)
    part = mesh_lib.part_of_rows(mesh, jax.process_index())
    eval_step = programs.eval_step(config, mesh)
    validation = validation_lib.Validation(config, prepared, mesh, part, eval_step)

    # --- state: restored, or new
    goodput.enter("start_up")
    state, position, saved = start.state(
      origin, checkpoints, workdir, config, mesh, abstract, programs
    )
    if origin.weights is not None:
      processes.say(f"weights of step {origin.weights[2]} of {init_from}")
    reader = Reader(prepared, config, mesh, part, origin.step, position)
    stack.callback(reader.close)
    judge = bad_steps.BadSteps(config.recovery, saved)
    run = Run(
      config,
      asked_for,
      workdir,
      mesh,
      abstract,
      programs,
      state,
      reader,
      judge,
      validation,
      checkpoints,
      check_owner,
      goodput,
      record,
    )
    # Of weights that come from another run there is a checkpoint before the first step.
    record.signals = signals
    yield from _trained(run, signals, saves_first=origin.weights is not None)
  assert record.result is not None
  return record.result


def _trained(run: Run, signals: list[str], saves_first: bool) -> Generator[Point, str | None, None]:
  """Compiles the step and makes the steps; notes why they end.

  Args:
    run: as it starts.
    signals: names of those that came; more are added.
    saves_first: whether to save the state of step 0.
  """
  config, goodput, log, first = run.config, run.goodput, run.log, run.step
  with run.writer, run.bar, contextlib.ExitStack() as stack:
    hyper = hyperparameters.of(config)
    recorded = [step for step in config.log.routing_trace_steps if step > first]
    step_fn, recording_step_fn = run.compiled(hyper, is_recording=bool(recorded))

    # --- what an earlier start was stopped before
    if saves_first:
      if run.checkpoints.find_step() == 0:
        run.checkpoints.delete(0)
      run.save(0)
    reason = yield from run.shown(run.earlier_points)
    if not reason and run.validation.is_due(first) and not run.is_validated:
      reason = yield from run.shown([run.evaluate()])

    # --- loop
    stack.enter_context(runtime.stop_signals(signals))
    profiler = stack.enter_context(
      capture.Capture(config, run.workdir, run.mesh, first, step_fn, run.step_flops, run.bar.print)
    )
    fetcher = stack.enter_context(futures.ThreadPoolExecutor(1, "fetch_metrics"))
    goodput.enter("step")
    goodput.start(first, jax.process_count(), step_flops=run.step_flops)
    run.record.has_begun = True
    log.start(first, time.perf_counter())
    stops, turns = False, itertools.count(first + 1)
    while run.step < config.num_steps and not reason:
      # --- step: dispatched before the metrics of the one before it are there, which are taken next
      run.step = step = run.step + 1
      log.leave_out(profiler.before(step, run.state))
      gate = run.judge.gate(step)
      make = recording_step_fn if step in recorded else step_fn
      run.state, step_metrics = make(run.state, run.reader.batch, hyper, gate)
      experts = step_metrics.pop("expert_LBSK", None)
      run.outstanding.append(Dispatched(step, gate, fetcher.submit(fetch, step_metrics), experts))
      asked = time.perf_counter()
      run.reader.read()
      if run.outstanding[-1].metrics.done():
        _, idle_since = run.outstanding[-1].metrics.result()
        goodput.stalled(asked, time.perf_counter(), idle_since)

      # --- the metrics; what needs the state waits for those of this step too
      stops = stops or processes.agreed_to_stop(next(turns), signals)
      saves = step % config.checkpoint.save_every_steps == 0 or step == config.num_steps or stops
      waits = saves or run.validation.is_due(step) or profiler.is_edge(step)
      bad = None
      while bad is None and len(run.outstanding) > (0 if waits else 1):
        earliest = run.outstanding.pop(0)
        bad = None if run.finish(earliest) else earliest
      if bad is not None:
        run.go_back(bad, profiler)
        continue

      log.leave_out(profiler.after(step, run.state))

      # --- save; the time of saving and evaluating does not count as that of steps
      began = time.perf_counter()
      if saves:
        run.save_all()
      if stops:
        run.record.why = f"stopped by {signals[0]}"
        run.bar.print(f"{run.record.why}; saved at step {step}")
        break

      # --- evaluate, after the save: a run that ends here evaluates when it is resumed
      if run.validation.is_due(step):
        point = run.evaluate()
        goodput.write(step)
        reason = yield from run.shown([point])
        if reason and not saves:
          run.save_all()
      log.leave_out(time.perf_counter() - began)

    if reason and run.step < config.num_steps:
      run.record.why = reason
      run.bar.print(f"stopped: {reason}; saved at step {run.step}")
  goodput.enter("save")  # which goes on in the background, until the run ends


def report(config: Config, workdir: epath.Path) -> None:
  """Prints a run's final figures, where its files are, and what the model writes."""
  rich.print(progress.final_table(final.rows(config, workdir), title=str(workdir)))
  # Reading the checkpoint for a sample would need all processes.
  if config.log.sample_tokens and jax.process_count() == 1:
    print("\nWhat the model writes:\n")
    text = generate.sample(workdir, config.log.sample_tokens)
    print(text)
    (workdir / final.SAMPLE_FILE).write_text(text)


def main(argv: list[str]) -> None:
  output.refuse_arguments(argv)
  try:
    runtime.start(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
  except TimeoutError as error:
    output.fail(str(error), processes.RESTART_CODE)
  config = config_lib.from_config_dict(_CONFIG.value)
  workdir = _WORKDIR.value
  try:
    result = train(
      config,
      workdir,
      _ALLOW_CONFIG_CHANGE.value,
      _INIT_FROM.value or None,
      _RESUME_FROM.value,
      _ALLOW_OTHER_TOKENIZER.value,
      _ELASTIC.value,
      runtime.process_began(),
    )
    if result.step == config.num_steps and jax.process_index() == 0:
      report(config, epath.Path(workdir))
  except (
    BadStepError,
    kernel_check.WrongKernelError,
    exchange_check.WrongExchangeError,
  ) as error:
    output.fail(str(error), 1)
  except checkpoint.DamagedSaveError as error:
    output.fail(str(error), processes.RESTART_CODE)
  except KeyboardInterrupt:
    output.fail(
      "stopped by Ctrl-C; the same command starts again, from the newest checkpoint if there is one",
      130,
    )


if __name__ == "__main__":
  flags.mark_flags_as_required(["config", "workdir"])
  output.run_script(main)
