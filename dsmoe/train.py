"""The training loop, top to bottom: mesh, data, state, restore, step, log, evaluate, save.

  python -m dsmoe.train --config=experiments/tiny.py --workdir=runs/tiny --config.num_steps=100

--config.FIELD=VALUE sets any field of the config; experiments/base.py explains them.
"""

import contextlib
import functools
import importlib.metadata
import json
import math
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
import rich
from absl import flags, logging
from etils import epath
from ml_collections import config_flags

from dsmoe import checkpoint, platforms, runtime
from dsmoe import config as config_lib
from dsmoe.config import Config
from dsmoe.data import batches as data
from dsmoe.data import records, sources
from dsmoe.evaluation import held_out, perplexity
from dsmoe.inference import batcher as batcher_lib
from dsmoe.inference.sampling import Sampling
from dsmoe.model import parameters
from dsmoe.parallel import mesh as mesh_lib
from dsmoe.parallel import processes
from dsmoe.planning import accounting
from dsmoe.platforms import cpu
from dsmoe.reporting import metrics, output, plots, progress, routing_trace
from dsmoe.training import exchange_check, kernel_check, train_step

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
_RESUME_FROM = flags.DEFINE_integer(
  "resume_from", None, "Resume from the checkpoint of this step; later ones are set aside."
)


class NonFiniteError(RuntimeError):
  """A loss or gradient was not finite; the last good state has been saved."""


def step_line(host_metrics: dict, router_bias, tokens: int) -> dict:
  """Turns a step's fetched metrics, after `tokens` of training, into a line of metrics.jsonl."""
  losses = host_metrics["losses"]
  line = {
    "loss": losses.total,
    "cross_entropy": losses.cross_entropy,
    "z_loss": losses.z_loss,
    "mtp_loss": losses.mtp_loss,
    "balance_loss": losses.balance_loss,
    "learning_rate": host_metrics["learning_rate"],
    "grad_norm": host_metrics["grad_norm"],
    "tokens": tokens,
  }
  for name, norm in host_metrics["grad_norms"].items():
    line[f"grad_norm/{name}"] = norm
  load = host_metrics["load"]
  if load is not None:
    line |= metrics.load_statistics(load.counts_LE)
    line["groups_per_token"] = load.groups_per_token_L
    line["expert_counts"] = load.counts_LE
    line |= exchange_counts(load)
  bias = [np.asarray(leaf) for _, leaf in parameters.by_stack(router_bias)]
  if bias:
    line["router_bias"] = np.concatenate(bias)
    line["bias_range"] = metrics.bias_range(line["router_bias"])
  return line


def exchange_counts(load: train_step.LoadStats | None) -> dict[str, int]:
  """Returns what a step's exchanges could not do at once, over all layers and microbatches.

  Returns:
    `dropped_rows`: rows of all devices that found no room. `fallbacks`: how often
    `dropless_fallback` computed a layer of a microbatch by an exact path instead. {} without experts.
  """
  if load is None:
    return {}
  dropped_L, fallbacks_L = load.dispatch.dropped_rows, load.dispatch.fallbacks
  # NumPy's int64: the counts of one layer are int32, their sum may be more.
  dropped, fallbacks = (int(np.sum(a, dtype=np.int64)) for a in (dropped_L, fallbacks_L))
  return {"dropped_rows": dropped, "fallbacks": fallbacks}


def throughput(tokens: int, flops: float, step_secs: float) -> dict:
  """Returns the speed of a step of `tokens` and `flops` as a line of metrics.jsonl has it."""
  peak = accounting.peak_flops(jax.devices()[0])
  return {
    "step_secs": step_secs,
    "tokens_per_sec": tokens / step_secs,
    "gflops_per_sec": flops / step_secs / 1e9,
    "mfu": peak and flops / step_secs / (peak * jax.device_count()),
  }


def validation_line(nats: float, tokens: float, num_bytes: int | None) -> dict:
  """Turns the loss on `num_bytes` of text, None if unknown, into a line of metrics.jsonl.

  The number of tokens tells the subset: points of another number are none of the same curve.
  """
  bits = {"validation_bits_per_byte": nats / math.log(2) / num_bytes} if num_bytes else {}
  return {"validation_loss": nats / tokens, **bits, "validation_tokens": int(tokens)}


def train(
  config: Config,
  workdir: epath.PathLike,
  allow_config_change: bool = False,
  init_from: epath.PathLike | None = None,
  resume_from: int | None = None,
  allow_other_tokenizer: bool = False,
) -> int:
  """Trains to `config.num_steps`, resuming from the newest checkpoint in `workdir`.

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

  Returns:
    The step reached; less than num_steps after SIGTERM or Ctrl-C, with the state saved.

  Raises:
    ValueError: for a config that breaks a rule, differs from the saved one, or needs other arrays
      than the checkpoint has; for a damaged checkpoint; when another process trains in `workdir`.
    NonFiniteError: when a loss or gradient is not finite.
    WrongKernelError: when a compiled kernel's results differ from its reference's on this device.
    WrongExchangeError: when an exchange's results differ from the dense oracle's on this mesh.
  """
  # --- mesh, and what is refused before anything is written
  checkpoint.check_path(workdir)
  workdir = epath.Path(workdir)
  with processes.failing_together():
    if init_from:
      config = checkpoint.with_tokenizer_of(config, init_from, allow_other_tokenizer)
    mesh = train_step.make_mesh(config)
    platforms.check_kernels(config.model.kernels)
    records.find_sources(config.data)  # raises when a glob matches nothing
    abstract = train_step.abstract_state(config, mesh)
    train_step.check_memory(abstract, mesh)
  check_processes(config)
  if checked := kernel_check.check(config):
    processes.say(checked)
  if checked := exchange_check.check(config, mesh):
    processes.say(checked)
  start_from = Start(allow_config_change, init_from, resume_from)
  with contextlib.ExitStack() as stack:
    with processes.failing_together():
      check_owner = stack.enter_context(checkpoint.owned(workdir))
    checkpoints = stack.enter_context(checkpoint.Checkpointer(workdir, config.checkpoint))
    signals = stack.enter_context(runtime.noted_interrupts())
    try:
      return _train(config, workdir, mesh, abstract, checkpoints, check_owner, signals, start_from)
    except (jax.errors.JaxRuntimeError, ValueError) as error:
      processes.leave_if_alone(error)  # before a save is waited for that the other cannot finish
      raise


class Start(NamedTuple):
  """Where a run starts: arguments of `train`."""

  allow_config_change: bool
  init_from: epath.PathLike | None
  resume_from: int | None


def _train(
  config: Config,
  workdir: epath.Path,
  mesh: jax.sharding.Mesh,
  abstract: train_step.TrainState,
  checkpoints: checkpoint.Checkpointer,
  check_owner: Callable[[], None],
  signals: list[str],
  start_from: Start,
) -> int:
  """The rest of `train`, by the one process that may write to the workdir."""
  # --- where the run starts
  allow_config_change, init_from, resume_from = start_from
  with processes.failing_together():
    first = checkpoints.find_step(resume_from)
    if first is not None:
      checkpoint.check_config(workdir, config, first, abstract, allow_config_change)
    if (first or 0) > config.num_steps:
      raise ValueError(
        f"num_steps ({config.num_steps}) must be at least the step that the run in {workdir} has "
        f"reached ({first})"
      )
  weights = None
  if init_from and not first:
    weights = checkpoint.restore_weights(init_from, abstract.params, abstract.router_bias)
  # A checkpoint of step 0 has the weights that an earlier start took from another run.
  resumes, first = first is not None and weights is None, first or 0

  # --- data on disk
  folder = config.data.cache_dir or workdir / "data"
  prepared = processes.first_then_others(
    f"to prepare the data in {folder}",
    lambda: records.prepare(config.data, config.model.vocab_size, folder),
  )
  processes.check_same("tokenised data", records.digest(prepared), "{} and {}".format)
  held_out.warn_of_overlap(prepared.manifest, prepared.manifest)
  limits = (config.log.eval_batches, -1)
  num_bytes = perplexity.count_bytes(prepared, config.data, config.batch_size, limits)

  # --- state: restored, or new
  if resumes:
    state, saved = checkpoints.restore(abstract, first)
    config_then = functools.partial(checkpoint.config_of_step, workdir, first)
    position = data.position_from_dict(saved, config_then)
    processes.say(f"resumed from step {first}")
    if (aside := checkpoints.set_later_aside(first)) is not None:
      if processes.is_first() and (workdir / metrics.METRICS_FILE).exists():
        (workdir / metrics.METRICS_FILE).copy(aside / metrics.METRICS_FILE)
      processes.say(f"later checkpoints and metrics are kept in {aside}")
  else:
    state, position = train_step.init_state(config, mesh), data.first_position(config.data)
    if weights is not None:
      state = state._replace(params=weights[0], router_bias=weights[1])
      processes.say(f"weights of step {weights[2]} of {init_from}")

  # --- batches
  part = mesh_lib.part_of_rows(mesh, jax.process_index())
  batches = data.train_iterator(prepared, config.data, config.batch_size, *part, position)

  def next_batch() -> dict[str, jax.Array]:
    rows = next(batches)
    train_step.check_no_padding(rows)
    return mesh_lib.to_global(rows, mesh)

  def position_after(step: int) -> data.Position:
    return position.advance(config.data, (step - first) * config.batch_size)

  # --- metrics and progress
  S = config.data.sequence_length
  tokens_per_step = config.batch_size * S
  flops_per_step = accounting.flops_per_token(config.model, S)["causal_mtp"] * tokens_per_step
  with processes.failing_together():
    writer: metrics.MetricsWriter = metrics.NoMetrics()
    rows: list[dict] = []
    if processes.is_first():
      writer = metrics.MetricsWriter(workdir, config.log.tensorboard, first)
      rows = metrics.read_metrics(workdir)
    running = metrics.RunningLoad.from_rows(rows)
  points = [row for row in rows if "validation_loss" in row]
  curves = {row["validation_tokens"] for row in points[-1:] if "validation_tokens" in row}
  validated = processes.exchange(str(first in {row["step"] for row in points}))[0] == str(True)
  bar = progress.Progress(config.num_steps, first, is_quiet=not processes.is_first())

  # --- the compiled step
  eval_step = train_step.make_eval_step(config, mesh)
  step_fn = train_step.make_train_step(config, mesh)

  def evaluate(state, step: int) -> float:
    """Writes a point of the validation curve, and the whole set's at the end; returns seconds."""
    start, is_last, lines = time.perf_counter(), step == config.num_steps, {}
    for limit in limits if is_last else limits[:1]:
      if limit not in lines:
        unseen = data.validation_batches(prepared, config.data, config.batch_size, *part)
        nats, tokens = perplexity.validation_nats(eval_step, state, unseen, mesh, limit)
        lines[limit] = validation_line(nats, tokens, num_bytes.get(limit))
    line = lines[config.log.eval_batches]
    if is_last:
      line = line | {f"whole_{name}": value for name, value in lines[-1].items()}
    tokens = line["validation_tokens"]
    if curves and tokens not in curves:
      bar.print(f"a new validation curve: of {tokens:,} tokens, before of {max(curves):,}")
    curves.add(tokens)
    writer.write(step, line)
    bar.update(step, line)
    return time.perf_counter() - start

  def evaluates(step: int) -> bool:
    due = step % config.log.eval_every_steps == 0 or step == config.num_steps
    return bool(step and due and prepared.validation_tokens)

  with writer, bar, contextlib.ExitStack() as stack:
    bar.print(f"compiling for {mesh.size} x {jax.devices()[0].device_kind}")
    start = time.perf_counter()
    batch = next_batch()
    step_fn = step_fn.lower(state, batch).compile()
    recorded = [step for step in config.log.routing_trace_steps if step > first]
    recording_step_fn = step_fn
    if recorded:
      recording = train_step.make_train_step(config, mesh, record_routing=True)
      recording_step_fn = recording.lower(state, batch).compile()
    cpu.release_memory()
    bar.print(f"compiled in {time.perf_counter() - start:.1f} s")

    # --- what an earlier start was stopped before
    if weights is not None:
      if checkpoints.find_step() == 0:
        checkpoints.delete(0)
      checkpoints.save(state, position.to_dict())
    if evaluates(first) and not validated:
      evaluate(state, first)

    # --- loop
    stack.enter_context(runtime.stop_signals(signals))
    logged_step, logged_time = first, time.perf_counter()
    saved = first
    for step in range(first + 1, config.num_steps + 1):
      is_last = step == config.num_steps

      # --- step; the next batch is read while the device computes
      fn = recording_step_fn if step in recorded else step_fn
      state, step_metrics = fn(state, batch)
      experts = step_metrics.pop("expert_LBSK", None)
      batch = next_batch()
      step_metrics = jax.device_get(step_metrics)
      if step == first + 1 and (first == 0 or step_metrics["finite"]):
        checkpoint.record_config(workdir, config, first)  # it is known to work
      if not step_metrics["finite"]:
        # The state returned is the one before this step.
        last_good = f"the state after step {step - 1} is saved in {workdir}"
        try:
          checkpoints.save(state, position_after(step - 1).to_dict())
        except checkpoint.NotFiniteError as error:
          last_good = str(error)
        raise NonFiniteError(
          f"loss ({step_metrics['losses'].total}) and gradient norm ({step_metrics['grad_norm']}) "
          f"must be finite, at step {step}; {last_good}"
        )

      if experts is not None:
        counts_LE = step_metrics["load"].counts_LE
        routing_trace.write(workdir, step, experts, counts_LE, config.num_microbatches)

      # --- log
      if step % config.log.log_every_steps == 0 or is_last:
        line = step_line(step_metrics, state.router_bias, position_after(step).tokens)
        if "expert_counts" in line:
          running.add(line["expert_counts"])
          line |= running.statistics()
        now = time.perf_counter()
        line |= throughput(
          tokens_per_step, flops_per_step, (now - logged_time) / (step - logged_step)
        )
        logged_step, logged_time = step, now
        writer.write(step, line)
        bar.update(step, line)
      elif any((counts := exchange_counts(step_metrics["load"])).values()):
        writer.write(step, counts)
        bar.update(step, counts)
      else:
        bar.update(step, {})

      # --- save; the time of saving and evaluating does not count as that of steps
      stops = processes.agreed_to_stop(step, signals)
      if step % config.checkpoint.save_every_steps == 0 or is_last or stops:
        start = time.perf_counter()
        check_owner()
        writer.flush()
        checkpoints.save(state, position_after(step).to_dict())
        saved = step
        logged_time += time.perf_counter() - start
      if stops:
        bar.print(f"stopped by {signals[0]}; saved at step {saved}")
        break

      # --- evaluate, after the save: a run that ends here evaluates when it is resumed
      if evaluates(step):
        logged_time += evaluate(state, step)
  return int(state.step)


def check_processes(config: Config) -> None:
  """Checks that all processes of a run have the same config and the same libraries.

  Raises:
    ValueError: naming a process that differs, and the difference.
  """
  versions = {name: importlib.metadata.version(name) for name in ("dsmoe", "jax", "jaxlib")}

  def differences(one: str, other: str) -> str:
    return "; ".join(config_lib.differences(json.loads(one), json.loads(other)))

  for what, value in (("config", config_lib.to_dict(config)), ("versions", versions)):
    processes.check_same(what, json.dumps(value), differences)


def write_sample(config: Config, workdir: epath.PathLike, prompt: str = "def ") -> str:
  """Returns `prompt` and the newest checkpoint's continuation of it, "" without a tokenizer."""
  run = checkpoint.load_run(workdir)
  if not run.tokenizer_path.exists():
    return ""
  encoder = run.tokenizer()
  tokens = encoder.encode(prompt, add_special_tokens=False).ids
  batcher = batcher_lib.make(run, batcher_lib.BatcherOptions(max_rows=1))
  tokens = tokens[: batcher.max_tokens_per_row - 1]
  room = batcher.max_tokens_per_row - len(tokens)
  settings = Sampling(min(config.log.sample_tokens, room), temperature=0.7)
  return prompt + encoder.decode(batcher_lib.generate(batcher, [tokens], settings)[0])


def report(config: Config, workdir: epath.Path) -> None:
  """Prints a run's final figures, those of compressors on the same text, and where its files are."""
  rows = progress.summary(metrics.iter_metrics(workdir))
  if "synthetic" not in config.data.validation_globs and config.data.validation_globs:
    for name, bits in sources.compressed_bits_per_byte(
      sources.validation_documents(config.data)
    ).items():
      rows.append((f"{name}, bits per byte", f"{bits:.3f}"))
  if config.log.plots:
    for path in plots.draw(workdir):
      rows.append(("plot", str(path)))
  rows.append(("checkpoints", str(workdir / "checkpoints")))
  rows.append(("metrics", str(workdir / metrics.METRICS_FILE)))
  rich.print(progress.final_table(rows, title=str(workdir)))
  # Reading the checkpoint for a sample would need all processes.
  if config.log.sample_tokens and jax.process_count() == 1:
    print("\nWhat the model writes:\n")
    print(write_sample(config, workdir))


def main(argv: list[str]) -> None:
  output.refuse_arguments(argv)
  logging.set_verbosity(logging.WARNING)
  runtime.start(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
  config = config_lib.from_config_dict(_CONFIG.value)
  workdir = _WORKDIR.value
  try:
    step = train(
      config,
      workdir,
      _ALLOW_CONFIG_CHANGE.value,
      _INIT_FROM.value or None,
      _RESUME_FROM.value,
      _ALLOW_OTHER_TOKENIZER.value,
    )
    if step == config.num_steps and jax.process_index() == 0:
      report(config, epath.Path(workdir))
  except (
    NonFiniteError,
    kernel_check.WrongKernelError,
    exchange_check.WrongExchangeError,
  ) as error:
    output.fail(str(error), 1)
  except KeyboardInterrupt:
    output.fail(
      "stopped by Ctrl-C; the same command starts again, from the newest checkpoint if there is one",
      130,
    )


if __name__ == "__main__":
  flags.mark_flags_as_required(["config", "workdir"])
  output.run_script(main)
