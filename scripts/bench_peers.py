"""Measures our training step beside other code's, each in its own Python, in turns.

  python scripts/bench_peers.py --peer_python=.venv-peers/bin/python --json=peers.json

Each peer is compared with the run of ours just before it. All compile afresh: no compile cache
outlives a run. Ours also moves the router's bias and adds the sequence loss; no peer does.
"""

import importlib.util
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import rich
import rich.table
from absl import app, flags
from ml_collections import config_flags

ROOT = Path(__file__).resolve().parent.parent
# Model fields that a config.json does not have, or has in another form.
NOT_HF = ("compute_dtype", "remat", "dispatch", "attention_chunk_tokens", "rope_scaling")
INSTALL = "pip install {} into a virtual environment and pass its interpreter as --{}_python."

CONFIG = config_flags.DEFINE_config_file("config", str(ROOT / "experiments/bench_small.py"))
ROUNDS = flags.DEFINE_integer("rounds", 3, "Times each peer is measured.", lower_bound=1)
STEPS = flags.DEFINE_integer("steps", 10, "Measured steps a run.", lower_bound=1)
TIMEOUT_SECS = flags.DEFINE_integer("timeout_secs", 1200, "Limit of one run.", lower_bound=1)
OURS_PYTHON = flags.DEFINE_string("ours_python", sys.executable, "Has dsmoe.")
PEER_PYTHON = flags.DEFINE_string(
  "peer_python", "", "Has torch, transformers. Default: this one if it does, or .venv/bin/python."
)
MAXTEXT_PYTHON = flags.DEFINE_string("maxtext_python", "", "Has MaxText.")
JSON = flags.DEFINE_string("json", "", "File for every run's numbers.")


def hf_config(model: Any) -> dict[str, Any]:
  """Returns a model ConfigDict as a Hugging Face config.json's fields.

  Raises:
    ValueError: for a model that the peers lack, or are not measured with.
  """
  measured = dict(scoring_func="sigmoid", topk_method="noaux_tc", compute_dtype="float32")
  for name, value in {**measured, "num_nextn_predict_layers": 0, "remat": "none"}.items():
    if model[name] != value:
      raise ValueError(f"peers are measured with {name} {value!r} only, got {model[name]!r}")
  values = {k: v for k, v in model.to_dict().items() if k not in NOT_HF}
  values["num_key_value_heads"] = model.num_attention_heads
  if model.rope_scaling.factor != 1:
    values["rope_scaling"] = {"type": "yarn", **model.rope_scaling.to_dict()}
  return values


def can_import(python: str, *names: str) -> bool:
  """Whether that interpreter exists and finds those packages; none is imported."""
  code = f"import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, {names!r})))"
  try:
    return subprocess.run([python, "-c", code], capture_output=True).returncode == 0
  except OSError:
    return False


def commands() -> tuple[dict[str, list[str]], dict[str, str]]:
  """Returns what to run for ours and each peer, and why each absent peer is absent."""
  c, holder = CONFIG.value, flags.FLAGS["config"]
  ours = [OURS_PYTHON.value, "scripts/bench_train.py", "--json", f"--steps={STEPS.value}"]
  ours.append(f"--config={config_flags.get_config_filename(holder)}")
  ours += [f"--config.{k}={v}" for k, v in config_flags.get_override_values(holder).items()]
  found, absent = {"ours": ours}, {}

  here = all(importlib.util.find_spec(name) for name in ("torch", "transformers"))
  python = PEER_PYTHON.value or (sys.executable if here else str(ROOT / ".venv/bin/python"))
  if can_import(python, "torch", "transformers"):
    peer = [python, "scripts/peers/transformers_train.py", f"--steps={STEPS.value}"]
    peer += [f"--config={json.dumps(hf_config(c.model))}", f"--threads={num_cores()}"]
    peer += [f"--batch={c.batch_size}", f"--sequence={c.data.sequence_length}"]
    for name in ("learning_rate", "weight_decay", "clip_norm"):
      peer.append(f"--{name}={c.optim[name]}")
    found["transformers"] = peer
    found["transformers-compiled"] = peer + ["--compile"]
  else:
    absent["transformers"] = INSTALL.format("torch==2.13.0 transformers==5.23.0", "peer")

  absent["maxtext"] = INSTALL.format("maxtext", "maxtext")
  if can_import(MAXTEXT_PYTHON.value, "maxtext"):
    absent["maxtext"] = "installed, but scripts/peers has no program that trains it."
  return found, absent


def num_cores() -> int:
  """Cores this process may use; XLA takes as many."""
  return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run(name: str, command: list[str]) -> dict[str, Any]:
  """Runs one process to its end; returns its JSON line, with peak memory as the kernel saw it.

  Raises:
    RuntimeError: if it fails or takes longer than --timeout_secs.
  """
  with tempfile.TemporaryDirectory() as scratch:
    out, err = Path(scratch, "out"), Path(scratch, "err")
    fresh = {"TORCHINDUCTOR_CACHE_DIR": scratch, "JAX_ENABLE_COMPILATION_CACHE": "false"}
    with out.open("w") as stdout, err.open("w") as stderr:
      process = subprocess.Popen(
        command, cwd=ROOT, env=os.environ | fresh, stdout=stdout, stderr=stderr, process_group=0
      )
      timer = threading.Timer(TIMEOUT_SECS.value, os.killpg, (process.pid, signal.SIGKILL))
      timer.start()
      _, status, usage = os.wait4(process.pid, 0)
      timer.cancel()
    process.returncode = os.waitstatus_to_exitcode(status)
    lines = out.read_text().strip().splitlines()
    if process.returncode or not lines:
      tail = " | ".join(err.read_text().strip().splitlines()[-3:])
      raise RuntimeError(f"{name} ended with {process.returncode}: {tail or 'no output'}")
    warnings = [x for x in err.read_text().splitlines() if "WARNING: experts" in x]
  unit_bytes = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
  result = json.loads(lines[-1]) | {"peak_rss_mib": usage.ru_maxrss * unit_bytes / 2**20}
  rich.print(f"{name}: {result['tokens_per_sec']:,.0f} tokens/s", *warnings)
  return result


def main(_) -> None:
  found, absent = commands()
  runs: dict[str, list[dict[str, Any]]] = {name: [] for name in found}
  ratios: dict[str, list[float]] = {name: [] for name in found if name != "ours"}
  for _ in range(ROUNDS.value):
    for name in [name for name in ratios if name not in absent] or ["ours"]:
      ours = run("ours", found["ours"])
      runs["ours"].append(ours)
      if name == "ours":
        continue
      try:
        runs[name].append(run(name, found[name]))
      except RuntimeError as error:
        absent[name] = str(error)
        continue
      ratios[name].append(ours["tokens_per_sec"] / runs[name][-1]["tokens_per_sec"])

  table = rich.table.Table("", "tokens/s", "min", "max", "peak MiB", "compile s", "ours / peer")
  for name, results in runs.items():
    if not results:
      continue
    speeds = [r["tokens_per_sec"] for r in results]
    peak, compile_secs = (
      statistics.median(r[key] for r in results) for key in ("peak_rss_mib", "compile_secs")
    )
    ratio = f"{statistics.median(ratios[name]):.2f}" if ratios.get(name) else ""
    columns = [f"{f(speeds):,.0f}" for f in (statistics.median, min, max)]
    table.add_row(name, *columns, f"{peak:,.0f}", f"{compile_secs:.1f}", ratio)
  rich.print(table)
  for name, reason in absent.items():
    rich.print(f"{name} is absent: {reason}")
  if JSON.value:
    values = {"runs": runs, "ratios": ratios, "absent": absent, "num_cores": num_cores()}
    Path(JSON.value).write_text(json.dumps(values, indent=2) + "\n")


if __name__ == "__main__":
  app.run(main)
