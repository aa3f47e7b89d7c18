"""Measures our training or generation beside other code's, each in its own Python, in turns.

  python scripts/bench_peers.py --peer_python=.venv-peers/bin/python --json=peers.json
  python scripts/bench_peers.py --work=decode

Each peer is compared with the run of ours just before it. All compile afresh: no compile cache
outlives a run. In training ours also moves the router's bias and adds the sequence loss; no peer
does. Generation is greedy, without drafts.
"""

import importlib.util
import json
import statistics
import sys
from pathlib import Path
from typing import Any, NamedTuple

import rich
import rich.console
import rich.table
from absl import app, flags
from ml_collections import config_flags
from peers.processes import ROOT, can_import, num_cores, run

# Model fields that a config.json does not have, or has in another form.
NOT_HF = (
  *("compute_dtype", "remat", "dispatch", "matmul_precision", "kernels"),
  *("attention_chunk_tokens", "rope_scaling"),
)
INSTALL = "pip install {} into a virtual environment and pass its interpreter as --{}_python."

CONFIG = config_flags.DEFINE_config_file("config", str(ROOT / "experiments/bench_small.py"))
WORK = flags.DEFINE_enum("work", "train", ["train", "decode"], "What to measure.")
ROUNDS = flags.DEFINE_integer("rounds", 3, "Times each peer is measured.", lower_bound=1)
STEPS = flags.DEFINE_integer("steps", 10, "Measured steps a run of training.", lower_bound=1)
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


class Case(NamedTuple):
  """One thing to measure: the figure's name in the JSON that every command ends with."""

  label: str
  metric: str
  ours: list[str]
  peers: dict[str, list[str]]


def ours(script: str, *args: str) -> list[str]:
  """Returns the command of one of our own benchmarks on the config."""
  holder = flags.FLAGS["config"]
  command = [OURS_PYTHON.value, script, "--json", *args]
  command.append(f"--config={config_flags.get_config_filename(holder)}")
  return command + [
    f"--config.{k}={v}" for k, v in config_flags.get_override_values(holder).items()
  ]


def train_cases(peer: list[str]) -> list[Case]:
  """Returns the one case of training; `peer` starts each peer's command."""
  c = CONFIG.value
  peer = [*peer, "scripts/peers/transformers_train.py", f"--steps={STEPS.value}"]
  peer += [f"--config={json.dumps(hf_config(c.model))}", f"--threads={num_cores()}"]
  peer += [f"--batch={c.batch_size}", f"--sequence={c.data.sequence_length}"]
  for name in ("learning_rate", "weight_decay", "clip_norm"):
    peer.append(f"--{name}={c.optim[name]}")
  command = ours("scripts/bench_train.py", f"--steps={STEPS.value}")
  peers = {"transformers": peer, "transformers-compiled": [*peer, "--compile"]}
  return [Case("training", "tokens_per_sec", command, peers)]


def decode_cases(peer: list[str]) -> list[Case]:
  """Returns decoding at batch 1 and 8, and prefill."""
  cases = []
  for label, metric, batch, prompt, new in (
    ("decode, batch 1, prompt 64, 128 new", "decode_tokens_per_sec", 1, 64, 128),
    ("decode, batch 8, prompt 64, 128 new", "decode_tokens_per_sec", 8, 64, 128),
    ("prefill of 8 x 512", "prefill_tokens_per_sec", 8, 512, 16),
  ):
    sizes = [f"--prompt_tokens={prompt}", f"--new_tokens={new}"]
    theirs = [*peer, "scripts/peers/transformers_decode.py", f"--batch={batch}", *sizes]
    theirs += [f"--config={json.dumps(hf_config(CONFIG.value.model))}", f"--threads={num_cores()}"]
    command = ours("scripts/bench_decode.py", f"--batches={batch}", *sizes)
    cases.append(Case(label, metric, command, {"transformers-compiled": [*theirs, "--compile"]}))
  return cases


def find_cases() -> tuple[list[Case], dict[str, str]]:
  """Returns what to measure, and why each absent peer is absent."""
  absent = {"maxtext": INSTALL.format("maxtext", "maxtext")}
  if can_import(MAXTEXT_PYTHON.value, "maxtext"):
    absent["maxtext"] = "installed, but scripts/peers has no program that trains it."
  here = all(importlib.util.find_spec(name) for name in ("torch", "transformers"))
  python = PEER_PYTHON.value or (sys.executable if here else str(ROOT / ".venv/bin/python"))
  cases = (train_cases if WORK.value == "train" else decode_cases)([python])
  if not can_import(python, "torch", "transformers"):
    absent["transformers"] = INSTALL.format("torch==2.13.0 transformers==5.23.0", "peer")
    cases = [case._replace(peers={}) for case in cases]
  return cases, absent


def measure(case: Case, absent: dict[str, str]) -> dict[str, Any]:
  """Runs ours and each peer in turns; a peer that fails becomes absent."""
  runs: dict[str, list[dict[str, Any]]] = {name: [] for name in ("ours", *case.peers)}
  ratios: dict[str, list[float]] = {name: [] for name in case.peers}
  limit = TIMEOUT_SECS.value
  for _ in range(ROUNDS.value):
    for name in [name for name in ratios if name not in absent] or ["ours"]:
      runs["ours"].append(run("ours", case.ours, case.metric, limit))
      if name == "ours":
        continue
      try:
        runs[name].append(run(name, case.peers[name], case.metric, limit))
      except RuntimeError as error:
        absent[name] = str(error)
        continue
      ratios[name].append(runs["ours"][-1][case.metric] / runs[name][-1][case.metric])
  return {"label": case.label, "metric": case.metric, "runs": runs, "ratios": ratios}


def show(measured: dict[str, Any]) -> None:
  """Prints a table of medians."""
  columns = ("", "tokens/s", "min", "max", "peak MiB", "warm-up s", "ours / peer")
  table = rich.table.Table(*columns, title=measured["label"])
  for name, results in measured["runs"].items():
    if not results:
      continue
    speeds = [r[measured["metric"]] for r in results]
    peak = statistics.median(r["peak_rss_mib"] for r in results)
    warm_up = statistics.median(r.get("compile_secs", r.get("warm_up_secs")) for r in results)
    ratios = measured["ratios"].get(name)
    ratio = f"{statistics.median(ratios):.2f}" if ratios else ""
    shown = [f"{f(speeds):,.0f}" for f in (statistics.median, min, max)]
    table.add_row(name, *shown, f"{peak:,.0f}", f"{warm_up:.1f}", ratio)
  # As wide as it is: 80 columns cut the peers' names.
  rich.console.Console(width=120).print(table)


def main(_) -> None:
  cases, absent = find_cases()
  measured = [measure(case, absent) for case in cases]
  for one in measured:
    show(one)
  for name, reason in absent.items():
    rich.print(f"{name} is absent: {reason}")
  if JSON.value:
    values = {"cases": measured, "absent": absent, "num_cores": num_cores()}
    Path(JSON.value).write_text(json.dumps(values, indent=2) + "\n")


if __name__ == "__main__":
  app.run(main)
