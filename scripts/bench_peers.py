"""Measures our training or generation beside other code's, each in its own Python, in turns.

  python scripts/bench_peers.py --peer_python=.venv-peers/bin/python --json=peers.json
  python scripts/bench_peers.py --work=decode --llama_python=.venv-llama/bin/python

Each peer is compared with the run of ours just before it. Every run compiles afresh: no cache of
compiled code outlives it. All take as many threads as this process may use cores.

Training: beside transformers, as it is and compiled. Ours also moves the router's bias and adds
the sequence loss; no peer does. Generation: beside transformers, compiled, and llama.cpp. It is
greedy, in float32, without drafts. llama.cpp reads a GGUF file written from weights of transformers'
model, and is timed only if its logits are transformers'.
"""

import importlib.util
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import rich.console
import rich.table
from absl import flags
from ml_collections import config_flags
from peers.processes import ROOT, can_import, measure, num_cores, run

from dsmoe.reporting import output

# Model fields that a config.json does not have, or has in another form.
NOT_HF = (
  "compute_dtype",
  "remat",
  "dispatch",
  "matmul_precision",
  "kernels",
  "attention_chunk_tokens",
  "rope_scaling",
)
INSTALL = "pip install {} into a virtual environment and pass its interpreter as --{}_python."

CONFIG = config_flags.DEFINE_config_file(
  "config", str(ROOT / "experiments/bench_small.py"), "The experiment whose model is measured."
)
WORK = flags.DEFINE_enum("work", "train", ["train", "decode"], "What to measure.")
ROUNDS = flags.DEFINE_integer("rounds", 3, "Times each peer is measured.", lower_bound=1)
STEPS = flags.DEFINE_integer("steps", 10, "Measured steps of a training run.", lower_bound=1)
TIMEOUT_SECS = flags.DEFINE_integer(
  "timeout_secs", 1200, "Time limit of one run, in seconds.", lower_bound=1
)
OURS_PYTHON = flags.DEFINE_string(
  "ours_python", sys.executable, "Interpreter that has dsmoe. Default: the one that runs this."
)
PEER_PYTHON = flags.DEFINE_string(
  "peer_python",
  "",
  "Interpreter that has torch and transformers. Default: the one that runs this if it has them, "
  "else .venv/bin/python.",
)
LLAMA_PYTHON = flags.DEFINE_string(
  "llama_python",
  "",
  "--work=decode: interpreter that has llama-cpp-python, gguf and safetensors. Also needs "
  "--peer_python's transformers, which makes the weights. Default: the one that runs this.",
)
MAXTEXT_PYTHON = flags.DEFINE_string(
  "maxtext_python", "", "--work=train: interpreter that has MaxText."
)
JSON = output.define_json()


def hf_config(model: Any) -> dict[str, Any]:
  """Returns a model ConfigDict as a Hugging Face config.json's fields.

  Raises:
    ValueError: for a model that the peers lack, or are not measured with.
  """
  measured = {
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "compute_dtype": "float32",
    "num_nextn_predict_layers": 0,
    "remat": "none",
  }
  for name, value in measured.items():
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
  command = [OURS_PYTHON.value, script, "--json=-", *args]
  command.append(f"--config={config_flags.get_config_filename(holder)}")
  return command + [
    f"--config.{k}={v}" for k, v in config_flags.get_override_values(holder).items()
  ]


def train_cases(python: str) -> list[Case]:
  """Returns the one case of training; `python` has transformers."""
  c = CONFIG.value
  peer = [python, "scripts/peers/transformers_train.py", f"--steps={STEPS.value}"]
  peer += [f"--config={json.dumps(hf_config(c.model))}", f"--threads={num_cores()}"]
  peer += [f"--batch={c.batch_size}", f"--sequence={c.data.sequence_length}"]
  for name in ("learning_rate", "weight_decay", "clip_norm"):
    peer.append(f"--{name}={c.optim[name]}")
  command = ours("scripts/bench_train.py", f"--steps={STEPS.value}")
  peers = {"transformers": peer, "transformers-compiled": [*peer, "--compile"]}
  return [Case("training", "tokens_per_sec", command, peers)]


def decode_cases(python: str, llama_python: str, folder: Path) -> list[Case]:
  """Returns decoding at batch 1 and 8, and prefill.

  Args:
    python: has transformers.
    llama_python: has llama.cpp.
    folder: holds what `save_weights` wrote.
  """
  threads = f"--threads={num_cores()}"
  transformers = [python, "scripts/peers/transformers_decode.py", threads, "--compile"]
  transformers.append(f"--config={json.dumps(hf_config(CONFIG.value.model))}")
  llama = [llama_python, "scripts/peers/llama_cpp_decode.py", threads]
  llama += [f"--model={folder / 'model.gguf'}", f"--expected={folder / 'expected.safetensors'}"]
  cases = []
  for label, metric, batch, prompt, new in (
    ("decode, batch 1, prompt 64, 128 new", "decode_tokens_per_sec", 1, 64, 128),
    ("decode, batch 8, prompt 64, 128 new", "decode_tokens_per_sec", 8, 64, 128),
    ("prefill of 8 x 512", "prefill_tokens_per_sec", 8, 512, 16),
  ):
    sizes = [f"--prompt_tokens={prompt}", f"--new_tokens={new}"]
    command = ours("scripts/bench_decode.py", f"--batches={batch}", *sizes)
    sizes.append(f"--batch={batch}")
    peers = {"transformers-compiled": [*transformers, *sizes], "llama.cpp": [*llama, *sizes]}
    cases.append(Case(label, metric, command, peers))
  return cases


def save_weights(python: str, llama_python: str, folder: Path) -> None:
  """Writes transformers' random weights as a GGUF file, and the logits it computes with them.

  Raises:
    RuntimeError: if one of the two programs fails.
  """
  config = json.dumps(hf_config(CONFIG.value.model))
  save = [python, "scripts/peers/transformers_save.py", f"--config={config}", f"--folder={folder}"]
  write = [llama_python, "scripts/peers/gguf_write.py", f"--folder={folder}"]
  write.append(f"--out={folder / 'model.gguf'}")
  for command in (save, write):
    run(Path(command[1]).stem, command, TIMEOUT_SECS.value)


def find_cases(folder: Path) -> tuple[list[Case], dict[str, str]]:
  """Returns what to measure, and why each absent peer is absent.

  Args:
    folder: receives the weights for llama.cpp.
  """
  here = all(importlib.util.find_spec(name) for name in ("torch", "transformers"))
  python = PEER_PYTHON.value or (sys.executable if here else str(ROOT / ".venv/bin/python"))
  absent = {}
  if not can_import(python, "torch", "transformers"):
    names = ["transformers"] * (WORK.value == "train") + ["transformers-compiled"]
    absent = dict.fromkeys(names, INSTALL.format("torch==2.13.0 transformers==5.23.0", "peer"))
  if WORK.value == "train":
    absent["maxtext"] = INSTALL.format("maxtext", "maxtext")
    if can_import(MAXTEXT_PYTHON.value, "maxtext"):
      absent["maxtext"] = "it is installed, but scripts/peers has no program that trains with it."
    return train_cases(python), absent
  llama_python = LLAMA_PYTHON.value or sys.executable
  if not can_import(llama_python, "llama_cpp", "gguf", "safetensors"):
    absent["llama.cpp"] = INSTALL.format("llama-cpp-python gguf safetensors", "llama")
  elif absent:
    absent["llama.cpp"] = "transformers, which makes its weights, is absent."
  else:
    try:
      save_weights(python, llama_python, folder)
    except RuntimeError as error:
      absent["llama.cpp"] = str(error)
  return decode_cases(python, llama_python, folder), absent


def measure_in_turns(case: Case, absent: dict[str, str]) -> dict[str, Any]:
  """Runs ours and each peer in turns; a peer that fails becomes absent."""
  runs: dict[str, list[dict[str, Any]]] = {name: [] for name in ("ours", *case.peers)}
  ratios: dict[str, list[float]] = {name: [] for name in case.peers}
  limit = TIMEOUT_SECS.value
  for _ in range(ROUNDS.value):
    for name in [name for name in ratios if name not in absent] or ["ours"]:
      runs["ours"].append(measure("ours", case.ours, case.metric, limit))
      if name == "ours":
        continue
      try:
        runs[name].append(measure(name, case.peers[name], case.metric, limit))
      except RuntimeError as error:
        absent[name] = str(error)
        continue
      ratios[name].append(runs["ours"][-1][case.metric] / runs[name][-1][case.metric])
  return {"label": case.label, "metric": case.metric, "runs": runs, "ratios": ratios}


def table(measured: dict[str, Any]) -> rich.table.Table:
  """Returns a table of medians."""
  columns = ("", "tokens/s", "min", "max", "peak MiB", "warm-up s", "ours / peer")
  result = rich.table.Table(*columns, title=measured["label"])
  for name, results in measured["runs"].items():
    if not results:
      continue
    speeds = [r[measured["metric"]] for r in results]
    peak = statistics.median(r["peak_rss_mib"] for r in results)
    warm_up = statistics.median(r.get("compile_secs", r.get("warm_up_secs")) for r in results)
    ratios = measured["ratios"].get(name)
    ratio = f"{statistics.median(ratios):.2f}" if ratios else ""
    shown = [f"{f(speeds):,.0f}" for f in (statistics.median, min, max)]
    result.add_row(name, *shown, f"{peak:,.0f}", f"{warm_up:.1f}", ratio)
  return result


def main(argv: list[str]) -> None:
  output.refuse_arguments(argv)
  with tempfile.TemporaryDirectory() as folder:
    cases, absent = find_cases(Path(folder))
    measured = [measure_in_turns(case, absent) for case in cases]
  # 80 columns, a terminal's or a file's, would cut the peers' names.
  console = rich.console.Console(width=120, stderr=JSON.value == output.STDOUT)
  for one in measured:
    console.print(table(one))
  for name, reason in absent.items():
    console.print(f"{name} is absent: {reason}", highlight=False, markup=False)
  output.write_json(JSON.value, {"cases": measured, "absent": absent, "num_cores": num_cores()})


if __name__ == "__main__":
  output.run_script(main)
