"""Turns what steps computed into lines of metrics.jsonl and of the progress."""

from typing import Any

import numpy as np

from dsmoe.config import Config
from dsmoe.model import parameters
from dsmoe.reporting import metrics, progress
from dsmoe.training import train_step


class StepLog:
  """Writes a line for each of `log.log_every_steps`, and what other steps had to count."""

  def __init__(
    self,
    config: Config,
    writer: metrics.MetricsWriter,
    bar: progress.Progress,
    running: metrics.RunningLoad,
    flops_per_step: float,
    peak_flops: float | None,
  ):
    """Prepares the log; `start` comes before the first step.

    Args:
      config: of the run.
      writer, bar: where the lines go.
      running: the load of the lines that are there.
      flops_per_step: of all devices.
      peak_flops: of all devices, a second; None where it is not known.
    """
    self._config, self._writer, self._bar, self._running = config, writer, bar, running
    self._flops_per_step, self._peak_flops = flops_per_step, peak_flops
    self._step, self._time = 0, 0.0

  def start(self, step: int, time: float) -> None:
    """Begins to measure at `time`, in seconds of any clock, after `step` steps."""
    self._step, self._time = step, time

  def leave_out(self, secs: float) -> None:
    """Does not count seconds, of saving or evaluating, as those of steps."""
    self._time += secs

  def go_back(self, step: int, time: float) -> None:
    """Removes the lines after an earlier step, from which the run goes on at `time`."""
    self._running = metrics.RunningLoad.from_rows(self._writer.cut(step))
    self.start(step, time)

  def write(
    self,
    step: int,
    host_metrics: dict,
    tokens: int,
    time: float,
    goodput: float | None = None,
  ) -> bool:
    """Writes what belongs to a step; returns whether it is one that is logged.

    Args:
      step: its number; each later than the one before.
      host_metrics: see `step_line`.
      tokens: of all training up to this step.
      time: at which it was done, by the clock of `start`.
      goodput: share of the wall time that was spent stepping, which the progress shows.
    """
    c = self._config
    line: dict[str, Any] = exchange_counts(host_metrics["load"])
    if c.recovery.bad_step == "skip":
      line["skipped_steps"] = int(not host_metrics["is_made"])
    is_logged = step % c.log.log_every_steps == 0 or step == c.num_steps
    if is_logged:
      line = step_line(host_metrics, tokens) | line
      if "expert_counts" in line:
        self._running.add(line["expert_counts"])
        line |= self._running.statistics()
      secs = (time - self._time) / (step - self._step)
      step_tokens = c.batch_size * c.data.sequence_length
      line |= throughput(step_tokens, self._flops_per_step, secs, self._peak_flops)
      self.start(step, time)
    if is_logged or any(line.values()):
      self._writer.write(step, line)
      self._bar.update(step, line | ({"goodput": goodput} if is_logged else {}))
    else:
      self._bar.update(step, {})
    return is_logged


def step_line(host_metrics: dict, tokens: int) -> dict:
  """Returns a step's line, without what its exchanges could not do; see `exchange_counts`.

  Args:
    host_metrics: of the train step, as NumPy arrays.
    tokens: of all training so far.
  """
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
  bias = [np.asarray(leaf) for _, leaf in parameters.by_stack(host_metrics["router_bias"])]
  if bias:
    line["router_bias"] = np.concatenate(bias)
    line["bias_range"] = metrics.bias_range(line["router_bias"])
  return line


def exchange_counts(load: train_step.LoadStats | None) -> dict[str, Any]:
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


def throughput(tokens: int, flops: float, secs: float, peak_flops: float | None) -> dict:
  """Returns the speed of a step.

  Args:
    tokens, flops: of a step, on all devices.
    secs: that it took.
    peak_flops: of all devices together, a second; None where it is not known.
  """
  return {
    "step_secs": secs,
    "tokens_per_sec": tokens / secs,
    "gflops_per_sec": flops / secs / 1e9,
    "mfu": peak_flops and flops / secs / peak_flops,
  }
