"""Measures generation with random weights: prefill and decode tokens/s, first token, cache.

  python scripts/bench_decode.py --config=experiments/bench_small.py --batches=1,8,64
  python scripts/bench_decode.py --config=experiments/bench_small.py --batches=1,8 --cache_tokens=4096

Generation is greedy, on new random prompts in each of --repeats runs. The bound printed beside the
speed of decoding is what reading every weight that a step needs, once, would allow at the
bandwidth measured here. With --cache_tokens decoding alone is measured, of rows whose cache was
filled with random numbers instead of by prompts; the bound then counts the cache too.
"""

import functools
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich
import rich.table
from absl import app, flags
from ml_collections import config_flags

from dsmoe import config as config_lib
from dsmoe import model as model_lib
from dsmoe import platforms, runtime
from dsmoe.config import ModelConfig
from dsmoe.inference import batcher as batcher_lib
from dsmoe.inference import cache
from dsmoe.inference.programs import Programs
from dsmoe.inference.rows import Row
from dsmoe.inference.sampling import Sampling
from dsmoe.planning import accounting
from dsmoe.platforms import cpu
from dsmoe.reporting import output

_CONFIG = config_flags.DEFINE_config_file("config", None, "An experiment, experiments/<name>.py.")
_BATCHES = flags.DEFINE_list("batches", ["1", "8", "64"], "Batch sizes to measure.")
_PROMPT = flags.DEFINE_integer("prompt_tokens", 64, "Tokens of each prompt.", lower_bound=1)
_NEW = flags.DEFINE_integer("new_tokens", 128, "Tokens generated for each prompt.", lower_bound=2)
_REPEATS = flags.DEFINE_integer("repeats", 3, "Runs to measure.", lower_bound=1)
_CACHE_TOKENS = flags.DEFINE_integer(
  "cache_tokens",
  None,
  "Measure decoding alone, of rows with so many tokens in the cache at the end; no prompt is read.",
  lower_bound=1,
)
_SPECULATE = flags.DEFINE_bool("speculate", False, "Draft tokens with the first MTP module.")
_JSON = output.define_json()
flags.register_validator(
  "batches",
  lambda sizes: bool(sizes) and all(size.isdecimal() and int(size) > 0 for size in sizes),
  "must be positive integers",
)


def read_bandwidth() -> float:
  """Returns bytes a second at which this device sums an array larger than its caches."""
  # On CPU the array counts towards this process's peak memory, which bench_peers reports.
  # On a device, calls are queued one behind the other, so that starting each takes none of their time.
  mib, calls = (256, 1) if jax.default_backend() == "cpu" else (4096, 8)
  x = jnp.ones(mib << 18, jnp.float32)
  total = jax.jit(jnp.sum)
  secs = []
  for _ in range(4):
    start = time.perf_counter()
    jax.block_until_ready([total(x) for _ in range(calls)])
    secs.append((time.perf_counter() - start) / calls)
  return x.nbytes / min(secs)


def bytes_read_a_step(config: ModelConfig, rows: int) -> float:
  """Returns the bytes of the weights that decoding one token of each row reads, each once.

  An expert counts with the probability that at least one row chooses it under even routing.
  """
  parts = accounting.parameters(config)["parts"]
  share = 1 - (1 - config.num_experts_per_tok / max(config.n_routed_experts, 1)) ** rows
  numbers = sum(n for name, n in parts.items() if name not in ("embedding", "routed_experts"))
  numbers += share * parts.get("routed_experts", 0)
  return numbers * jnp.dtype(config.compute_dtype).itemsize


def timed(batcher: batcher_lib.Batcher, rows: int, max_tokens: int, rng) -> float:
  """Returns the seconds of generating `max_tokens` tokens for each of `rows` random prompts."""
  V = batcher.config.vocab_size
  prompts = [rng.integers(0, V, _PROMPT.value).tolist() for _ in range(rows)]
  start = time.perf_counter()
  batcher_lib.generate(batcher, prompts, Sampling(max_tokens=max_tokens, temperature=0))
  return time.perf_counter() - start


def measure(config: ModelConfig, rows: int) -> dict[str, Any]:
  """Returns the figures at one batch size, of a model of its own with random weights."""
  tokens = _PROMPT.value + _NEW.value + 1
  pages = rows * -(-tokens // cache.PAGE_TOKENS)
  options = batcher_lib.BatcherOptions(
    max_rows=rows,
    cache_bytes=2 * pages * cache.page_bytes(config, _SPECULATE.value),
    speculate=_SPECULATE.value,
    prefill_tokens=rows * max(512, _PROMPT.value),
  )
  _, params, router_bias = model_lib.split(model_lib.build(config))
  batcher = batcher_lib.Batcher(config, params, router_bias, options)
  del params, router_bias  # the batcher has what it needs of them
  cpu.release_memory()
  rng = np.random.default_rng(0)
  start = time.perf_counter()
  timed(batcher, rows, _NEW.value, rng)
  timed(batcher, rows, 1, rng)
  warm_up_secs = time.perf_counter() - start
  cpu.release_memory()
  first = [timed(batcher, rows, 1, rng) for _ in range(_REPEATS.value)]
  whole = [timed(batcher, rows, _NEW.value, rng) for _ in range(_REPEATS.value)]
  first_secs = statistics.median(first)
  decode_secs = min(whole) - min(first)  # other work on the machine only adds time
  stats = batcher.stats()
  # A few tokens of a small model can take less time than that of the first one varies.
  is_told = decode_secs > 0
  return {
    "batch": rows,
    "prefill_tokens_per_sec": rows * _PROMPT.value / first_secs,
    "decode_tokens_per_sec": rows * (_NEW.value - 1) / decode_secs if is_told else None,
    "first_token_secs": first_secs,
    "warm_up_secs": warm_up_secs,
    "cache_bytes_per_token": cache.page_bytes(config) // cache.PAGE_TOKENS,
    "weight_bytes_per_step": bytes_read_a_step(config, rows),
    "acceptance": stats["drafts_accepted"] / stats["drafts"] if stats["drafts"] else None,
  }


def check_cache_tokens(config: ModelConfig, tokens: int) -> None:
  """Raises ValueError for more tokens than the model has positions, or no more than a round adds."""
  steps = batcher_lib.BatcherOptions().steps_per_round
  if not steps < tokens <= config.max_position_embeddings:
    raise ValueError(
      f"cache_tokens must be above the {steps} tokens of a round and at most "
      f"max_position_embeddings ({config.max_position_embeddings}), got {tokens}"
    )


def rows_in_cache(config: ModelConfig, number: int, tokens: int, steps: int) -> list[Row]:
  """Returns rows that `steps` more steps bring to `tokens` tokens in the cache, all in other pages."""
  rng = np.random.default_rng(0)
  pages = rng.permutation(number * -(-tokens // cache.PAGE_TOKENS)).reshape(number, -1).tolist()
  sampling = Sampling(max_tokens=steps + 1, temperature=0)
  newest = rng.integers(0, config.vocab_size, (number, 1)).tolist()
  return [
    Row(i, [0], sampling, [], pages=pages[i], length=tokens - steps, tokens=newest[i])
    for i in range(number)
  ]


@functools.partial(jax.jit, donate_argnums=0)
def filled(kept: cache.LatentCache) -> cache.LatentCache:
  """Returns a cache of random numbers in the place of this one."""
  return jax.tree.map(lambda x: jax.random.normal(jax.random.key(0), x.shape, x.dtype), kept)


def measure_decoding(config: ModelConfig, number: int, tokens: int) -> dict[str, Any]:
  """Returns the figures of decoding `number` rows with `tokens` tokens in the cache."""
  pages = number * -(-tokens // cache.PAGE_TOKENS)
  options = batcher_lib.BatcherOptions(number, pages * cache.page_bytes(config))
  steps = options.steps_per_round
  rows = rows_in_cache(config, number, tokens, steps)
  _, params, router_bias = model_lib.split(model_lib.build(config))
  programs = Programs(config, params, router_bias, options, None)
  del params, router_bias
  programs.kept = filled(programs.kept)
  batch = programs.arranged(rows)
  secs = []
  for _ in range(1 + _REPEATS.value):
    start = time.perf_counter()
    drawn, _ = programs.decode(batch)
    secs.append(time.perf_counter() - start)
  assert (drawn.token_BX[:, :number] >= 0).all(), "every step must draw a token of every row"
  round_secs = statistics.median(secs[1:])
  token_bytes = cache.page_bytes(config) // cache.PAGE_TOKENS
  return {
    "batch": number,
    "cache_tokens": tokens,
    "prefill_tokens_per_sec": None,
    "decode_tokens_per_sec": number * steps / round_secs,
    "first_token_secs": None,
    "step_secs": round_secs / steps,
    "warm_up_secs": secs[0],
    "cache_bytes_per_token": token_bytes,
    "cache_bytes_per_step": number * tokens * token_bytes,
    "weight_bytes_per_step": bytes_read_a_step(config, number),
    "acceptance": None,
  }


def show(rows: list[dict[str, Any]], bandwidth: float) -> None:
  """Prints a table of the figures, a line for each batch size."""
  table = rich.table.Table(caption=f"memory read at {bandwidth / 1e9:.1f} GB/s")
  columns = ["rows", "prefill tok/s", "first token ms", "decode tok/s", "bound", "cache B/token"]
  if _SPECULATE.value:
    columns.append("drafts accepted")
  for column in columns:
    table.add_column(column)
  for row in rows:
    numbers = [
      row["batch"],
      row["prefill_tokens_per_sec"],
      row["first_token_secs"] and 1e3 * row["first_token_secs"],
      row["decode_tokens_per_sec"],
      row["decode_bound_tokens_per_sec"],
      row["cache_bytes_per_token"],
    ]
    cells = ["none" if number is None else f"{number:,.0f}" for number in numbers]
    if _SPECULATE.value:
      cells.append("none" if row["acceptance"] is None else f"{row['acceptance']:.1%}")
    table.add_row(*cells)
  rich.print(table)


def main(argv: list[str]) -> None:
  output.refuse_arguments(argv)
  prompts = [n for n in ("prompt_tokens", "new_tokens", "speculate") if flags.FLAGS[n].present]
  if _CACHE_TOKENS.value is not None and prompts:
    raise app.UsageError(
      f"--cache_tokens measures decoding alone, so --{prompts[0]} must not be given"
    )
  runtime.start()
  config = config_lib.from_config_dict(_CONFIG.value).model
  platforms.check_kernels(config.kernels)
  if _CACHE_TOKENS.value is not None:
    check_cache_tokens(config, _CACHE_TOKENS.value)
  bandwidth = read_bandwidth()
  cpu.release_memory()
  rows: list[dict[str, Any]] = []
  found = {
    "device": jax.devices()[0].device_kind,
    "read_bytes_per_sec": bandwidth,
    "runs": rows,
  }
  for number in map(int, _BATCHES.value):
    if _CACHE_TOKENS.value is None:
      row = measure(config, number)
    else:
      row = measure_decoding(config, number, _CACHE_TOKENS.value)
    read_bytes = row["weight_bytes_per_step"] + row.get("cache_bytes_per_step", 0)
    rows.append(row | {"decode_bound_tokens_per_sec": number * bandwidth / read_bytes})
    output.write_json_so_far(_JSON.value, found)
  output.write_json(_JSON.value, found)
  if _JSON.value != output.STDOUT:
    show(rows, bandwidth)


if __name__ == "__main__":
  flags.mark_flag_as_required("config")
  output.run_script(main)
