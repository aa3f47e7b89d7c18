"""Measures generation with random weights: prefill and decode tokens/s, first token, cache.

  python scripts/bench_decode.py --config=experiments/bench_small.py --batches=1,8,64

Greedy, on fresh random prompts each time; medians of --repeats runs. The bound printed beside
decode is the time to read every weight a step needs, once, at the bandwidth measured here.
"""

import json
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich
import rich.table
from absl import app, flags, logging
from ml_collections import config_flags

from dsmoe import config as config_lib
from dsmoe import model as model_lib
from dsmoe import runtime
from dsmoe.config import ModelConfig
from dsmoe.inference import batcher as batcher_lib
from dsmoe.inference import cache
from dsmoe.inference.sampling import Sampling
from dsmoe.planning import accounting
from dsmoe.platforms import cpu

_CONFIG = config_flags.DEFINE_config_file("config", None, "An experiment, experiments/<name>.py.")
_BATCHES = flags.DEFINE_list("batches", ["1", "8", "64"], "Numbers of rows.")
_PROMPT = flags.DEFINE_integer("prompt_tokens", 64, "Tokens a prompt.", lower_bound=1)
_NEW = flags.DEFINE_integer("new_tokens", 128, "Tokens written to each.", lower_bound=2)
_REPEATS = flags.DEFINE_integer("repeats", 3, "Measured runs.", lower_bound=1)
_SPECULATE = flags.DEFINE_bool("speculate", False, "Draft with the MTP module.")
_JSON = flags.DEFINE_bool("json", False, "End with one line of JSON.")


def read_bandwidth() -> float:
  """Returns bytes a second at which this device sums a gigabyte."""
  x = jnp.ones(2**28, jnp.float32)
  total = jax.jit(jnp.sum)
  secs = []
  for _ in range(4):
    start = time.perf_counter()
    total(x).block_until_ready()
    secs.append(time.perf_counter() - start)
  return x.nbytes / min(secs)


def bytes_read_a_step(config: ModelConfig, rows: int) -> float:
  """Returns the bytes of the weights that decoding one token of each row needs, read once.

  Each expert is needed by at least one of the rows with the probability it has under even
  routing.
  """
  parts = accounting.parameters(config)["parts"]
  share = 1 - (1 - config.num_experts_per_tok / max(config.n_routed_experts, 1)) ** rows
  numbers = sum(n for name, n in parts.items() if name not in ("embedding", "routed_experts"))
  numbers += share * parts.get("routed_experts", 0)
  return numbers * jnp.dtype(config.compute_dtype).itemsize


def timed(batcher: batcher_lib.Batcher, rows: int, max_tokens: int, rng) -> float:
  """Returns the seconds in which fresh prompts get `max_tokens` tokens each."""
  V = batcher.config.vocab_size
  prompts = [rng.integers(0, V, _PROMPT.value).tolist() for _ in range(rows)]
  start = time.perf_counter()
  batcher_lib.generate(batcher, prompts, Sampling(max_tokens=max_tokens, temperature=0))
  return time.perf_counter() - start


def measure(config: ModelConfig, params, router_bias, rows: int) -> dict[str, Any]:
  """Returns the figures at one batch size."""
  tokens = _PROMPT.value + _NEW.value + 1
  pages = rows * -(-tokens // cache.PAGE_TOKENS)
  options = batcher_lib.BatcherOptions(
    max_rows=rows,
    cache_bytes=2 * pages * cache.page_bytes(config, _SPECULATE.value),
    speculate=_SPECULATE.value,
    prefill_tokens=rows * max(512, _PROMPT.value),
  )
  batcher = batcher_lib.Batcher(config, params, router_bias, options)
  rng = np.random.default_rng(0)
  start = time.perf_counter()
  timed(batcher, rows, _NEW.value, rng)
  timed(batcher, rows, 1, rng)
  warm_up_secs = time.perf_counter() - start
  cpu.release_memory()
  first = [timed(batcher, rows, 1, rng) for _ in range(_REPEATS.value)]
  whole = [timed(batcher, rows, _NEW.value, rng) for _ in range(_REPEATS.value)]
  first_secs = statistics.median(first)
  decode_secs = min(whole) - min(first)  # what else the machine does only adds
  stats = batcher.stats()
  return {
    "batch": rows,
    "prefill_tokens_per_sec": rows * _PROMPT.value / first_secs,
    "decode_tokens_per_sec": rows * (_NEW.value - 1) / decode_secs,
    "first_token_secs": first_secs,
    "warm_up_secs": warm_up_secs,
    "cache_bytes_per_token": cache.page_bytes(config) // cache.PAGE_TOKENS,
    "weight_bytes_per_step": bytes_read_a_step(config, rows),
    "acceptance": stats["drafts_accepted"] / stats["drafts"] if stats["drafts"] else None,
  }


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments: {' '.join(argv[1:])}")
  logging.set_verbosity(logging.WARNING)
  runtime.start()
  config = config_lib.from_config_dict(_CONFIG.value).model
  _, params, router_bias = model_lib.split(model_lib.build(config))
  bandwidth = read_bandwidth()
  rows = [measure(config, params, router_bias, int(n)) for n in _BATCHES.value]
  for row in rows:
    step_secs = row["weight_bytes_per_step"] / bandwidth
    row["decode_bound_tokens_per_sec"] = row["batch"] / step_secs
  if _JSON.value:
    device = jax.devices()[0].device_kind
    print(json.dumps({"device": device, "read_bytes_per_sec": bandwidth, "runs": rows}))
    return
  table = rich.table.Table(
    *("rows", "prefill tok/s", "first token ms", "decode tok/s", "bound", "cache B/token"),
    *(["drafts accepted"] if _SPECULATE.value else []),
    caption=f"weights read at {bandwidth / 1e9:.1f} GB/s",
  )
  for row in rows:
    cells = [row["batch"], row["prefill_tokens_per_sec"], 1e3 * row["first_token_secs"]]
    cells += [row["decode_tokens_per_sec"], row["decode_bound_tokens_per_sec"]]
    shown = [f"{x:,.0f}" for x in (*cells, row["cache_bytes_per_token"])]
    table.add_row(*shown, *([f"{row['acceptance']:.1%}"] if _SPECULATE.value else []))
  rich.print(table)


if __name__ == "__main__":
  flags.mark_flag_as_required("config")
  app.run(main)
