"""A run on real text that is killed in the middle and resumed, as a part of a session."""

import json
import math
import pathlib
import re
import statistics
from typing import Any

from dsmoe.on_device.processes import Failed, Runner

WORKDIR = "run"  # in the session's folder, for the parts that follow
_CONFIG = "--config=experiments/deepseek_v2_lite.py:cut"

# Of V2-Lite's form: for a GPU, with few layers, which are written out, to compile; and for a dry run.
_LARGER = dict(hidden_size=1024, intermediate_size=2048, moe_intermediate_size=512)
_LARGER |= dict(num_attention_heads=8, kv_lora_rank=512, num_hidden_layers=2)
TINY = dict(hidden_size=32, intermediate_size=48, moe_intermediate_size=24, vocab_size=384)
TINY |= dict(num_hidden_layers=1, num_attention_heads=2, kv_lora_rank=16, n_routed_experts=8)
TINY |= dict(qk_nope_head_dim=12, qk_rope_head_dim=8, v_head_dim=10, num_experts_per_tok=2)
TINY |= dict(max_position_embeddings=64, first_k_dense_replace=0)


def flags(steps: int, save_every_steps: int) -> list[str]:
  """Returns the flags of every run of this part."""
  return [
    f"--config.num_steps={steps}",
    f"--config.optim.warmup_steps={steps // 10}",
    f"--config.optim.decay_steps={steps // 5}",
    f"--config.checkpoint.save_every_steps={save_every_steps}",
    *(f"--config.log.{field}" for field in ("log_every_steps=1", "eval_batches=4")),
    *(f"--config.log.{field}" for field in ("sample_tokens=0", "plots=False", "tensorboard=False")),
  ]


def sizes(model: dict[str, int]) -> list[str]:
  """Returns the flags that set a model's sizes."""
  return [f"--config.model.{name}={size}" for name, size in model.items()]


def of_a_gpu() -> list[str]:
  """Returns the flags that make the cut model large enough for a GPU's compiled kernels."""
  data = ["--config.batch_size=32", "--config.data.sequence_length=1024"]
  rates = ["--config.optim.learning_rate=1e-3", "--config.optim.final_learning_rate=1e-4"]
  return [*sizes(_LARGER), *data, *rates, "--config.log.eval_every_steps=100", *flags(200, 50)]


def of_a_cpu() -> list[str]:
  """Returns the flags that make it tiny, on the text of this repository."""
  data = ["--config.batch_size=2", "--config.data.sequence_length=32"]
  data += [
    f"--config.data.{name}_globs=('dsmoe/on_device/*.py',)" for name in ("train", "validation")
  ]
  return [*sizes(TINY), *data, "--config.log.eval_every_steps=1000", *flags(40, 4)]


def measure(runner: Runner, rows: list[dict[str, Any]], is_dry_run: bool) -> None:
  """Starts a run, kills it after half of its steps, and starts it again; adds one row.

  Raises:
    Failed: also when the run was not resumed from a checkpoint, or did not make all steps.
  """
  workdir = runner.folder / WORKDIR
  args = ["-m", "dsmoe.train", _CONFIG, f"--workdir={workdir}"]
  args += of_a_cpu() if is_dry_run else of_a_gpu()
  steps, kill_at = (40, 10) if is_dry_run else (200, 110)
  first = runner.start(*args)
  began_secs = runner.secs
  runner.wait_for(first, lambda: _num_lines(workdir) > 0, "its first step")
  first_step_secs = runner.secs - began_secs
  half_done = lambda: _num_lines(workdir) >= kill_at and bool(_checkpoints(workdir))  # noqa: E731
  runner.wait_for(first, half_done, f"step {kill_at} and a checkpoint")
  runner.kill(first)
  before = _metrics(workdir)
  second = runner.start(*args)
  runner.finish(second)
  after = _metrics(workdir)
  resumed = re.search(r"resumed from step (\d+)", runner.text(second))
  resumed_from_step = None if resumed is None else int(resumed[1])
  more = {"resumed_from_step": resumed_from_step, "first_step_secs": first_step_secs}
  rows.append(figures(before, after) | more)
  if resumed is None:
    raise Failed(f"the killed run must resume from a checkpoint, it wrote {runner.tail(second)}")
  if sorted(after) != list(range(1, steps + 1)):
    raise Failed(f"metrics.jsonl must have the steps 1 to {steps}, it ends with {max(after)}")
  if not all(math.isfinite(row["cross_entropy"]) for row in after.values()):
    raise Failed("every loss must be finite")


def _checkpoints(workdir: pathlib.Path) -> list[int]:
  folder = workdir / "checkpoints"
  names = (path.name for path in folder.iterdir()) if folder.exists() else ()
  return sorted(int(name) for name in names if name.isdecimal())


def _num_lines(workdir: pathlib.Path) -> int:
  path = workdir / "metrics.jsonl"
  return path.read_bytes().count(b"\n") if path.exists() else 0


def _metrics(workdir: pathlib.Path) -> dict[int, dict[str, Any]]:
  """Returns what the whole lines of metrics.jsonl say of each step that has a loss."""
  found: dict[int, dict[str, Any]] = {}
  for line in (workdir / "metrics.jsonl").read_text().splitlines(keepends=True):
    if line.endswith("\n"):
      row = json.loads(line)
      found.setdefault(row["step"], {}).update(row)
  return {step: row for step, row in found.items() if "cross_entropy" in row}


def figures(before: dict[int, dict], after: dict[int, dict]) -> dict[str, Any]:
  """Returns the figures of a run from its metrics before the kill and at its end.

  `largest_difference` is that of the losses of steps that both starts logged: those after the
  checkpoint were made twice, from the same state and the same text.
  """
  shared = before.keys() & after.keys()
  apart = [abs(before[s]["cross_entropy"] - after[s]["cross_entropy"]) for s in shared]
  speeds = [row["tokens_per_sec"] for row in after.values() if row.get("tokens_per_sec")]
  last = after[max(after)]
  return {
    "steps": len(after),
    "killed_at_step": max(before),
    "largest_difference": max(apart, default=None),
    "first_loss": after[min(after)]["cross_entropy"],
    "last_loss": last["cross_entropy"],
    "validation_loss": last.get("validation_loss"),
    "tokens_per_sec": statistics.median(speeds) if speeds else None,
  }
