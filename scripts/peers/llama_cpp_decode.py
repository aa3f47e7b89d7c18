"""Continues prompts with llama.cpp and prints how fast it went.

  python scripts/peers/llama_cpp_decode.py --model=model.gguf --expected=expected.safetensors --batch=8

Runs on its own in a virtual environment with llama-cpp-python, numpy and safetensors, nothing of
dsmoe. `--expected` holds tokens and the logits that another implementation computed from the same
weights (transformers_save.py writes it): a model with other logits is not timed. The last line
printed is a JSON object. Greedy: every call of llama_decode takes all rows' next tokens, and numpy
picks the likeliest.
"""

import argparse
import json
import logging
import resource
import statistics
import sys
import time
from typing import Any

import llama_cpp
import numpy as np
from safetensors.numpy import load_file

# Whole models in float32 against another implementation.
TOLERANCE = 2e-4
# Tokens that one pass over the layers takes.
MICROBATCH_TOKENS = 512


def parse_args() -> argparse.Namespace:
  """Returns the command line, checked."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--model", required=True, help="GGUF file")
  parser.add_argument("--expected", required=True, help="safetensors file of tokens and logits")
  parser.add_argument("--batch", type=int, required=True, help="prompts at once")
  parser.add_argument("--prompt_tokens", type=int, default=64, help="tokens a prompt")
  parser.add_argument("--new_tokens", type=int, default=128, help="tokens written to each")
  parser.add_argument("--repeats", type=int, default=3, help="measured runs; medians are printed")
  parser.add_argument("--threads", type=int, default=2, help="threads that llama.cpp uses")
  args = parser.parse_args()
  for name, least in dict(batch=1, prompt_tokens=1, new_tokens=2, repeats=1, threads=1).items():
    if getattr(args, name) < least:
      raise ValueError(f"{name} must be at least {least}, got {getattr(args, name)}")
  return args


class Decoder:
  """A model, and a cache for some rows of tokens."""

  def __init__(self, path: str, rows: int, max_tokens: int, threads: int):
    self.model = llama_cpp.llama_model_load_from_file(
      path.encode(), llama_cpp.llama_model_default_params()
    )
    if not self.model:
      raise RuntimeError(f"llama.cpp cannot load {path}")
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = rows * max_tokens
    params.n_batch = rows * max_tokens
    params.n_ubatch = min(MICROBATCH_TOKENS, params.n_batch)
    params.n_seq_max = rows
    params.n_threads = params.n_threads_batch = threads
    # In float32, as the others are: the default cache is float16, and flash attention rounds keys
    # and values to float16 whatever the cache holds (logits then differ by 1e-3).
    params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
    params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    self.context = llama_cpp.llama_init_from_model(self.model, params)
    if not self.context:
      raise RuntimeError(f"llama.cpp has no context for {rows} rows of {max_tokens} tokens")
    self.num_tokens = 0  # of each row in the cache
    vocab = llama_cpp.llama_model_get_vocab(self.model)
    self.shape = (rows, llama_cpp.llama_vocab_n_tokens(vocab))
    self.batches: dict[int, Batch] = {}  # by tokens a row

  def reset(self) -> None:
    """Empties the cache."""
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
    self.num_tokens = 0

  def next_logits(self, tokens_BS: np.ndarray) -> np.ndarray:
    """Returns the logits after each row's tokens, [B, V], valid until the next call."""
    rows, length = tokens_BS.shape
    if length not in self.batches:
      self.batches[length] = Batch(rows, length)
    batch = self.batches[length]
    batch.token_BS[:] = tokens_BS
    batch.position_BS[:] = np.arange(self.num_tokens, self.num_tokens + length)
    status = llama_cpp.llama_decode(self.context, batch.raw)
    if status:
      raise RuntimeError(f"llama_decode returned {status}")
    self.num_tokens += length
    # One row of logits for each sequence, in their order.
    return np.ctypeslib.as_array(llama_cpp.llama_get_logits(self.context), self.shape)


class Batch:
  """llama.cpp's arrays for as many tokens of every row; logits are asked for the last one."""

  def __init__(self, rows: int, length: int):
    self.raw = llama_cpp.llama_batch_init(rows * length, 0, 1)
    self.raw.n_tokens = rows * length
    shape = (rows, length)
    self.token_BS = np.ctypeslib.as_array(self.raw.token, shape)
    self.position_BS = np.ctypeslib.as_array(self.raw.pos, shape)
    np.ctypeslib.as_array(self.raw.n_seq_id, shape)[:] = 1
    for place in range(rows * length):
      self.raw.seq_id[place][0] = place // length
    logits_BS = np.ctypeslib.as_array(self.raw.logits, shape)
    logits_BS[:] = 0
    logits_BS[:, -1] = 1


def check(decoder: Decoder, expected: dict[str, np.ndarray]) -> float:
  """Returns the largest difference in logits: of a prompt's last token, then token by token.

  Raises:
    RuntimeError: if it is above the tolerance.
  """
  rows = np.arange(decoder.shape[0]) % len(expected["tokens"])
  tokens_BS, logits_BSV = expected["tokens"][rows], expected["logits"][rows]
  length = tokens_BS.shape[1]
  decoder.reset()
  start, differences = 0, []
  for end in (length // 2, *range(length // 2 + 1, length + 1)):
    logits_BV = decoder.next_logits(tokens_BS[:, start:end])
    differences.append(np.abs(logits_BV - logits_BSV[:, end - 1]).max())
    start = end
  largest = float(np.max(differences))
  if not largest <= TOLERANCE:  # NaN is not
    raise RuntimeError(
      f"llama.cpp's logits must be within {TOLERANCE} of the expected ones, got {largest:.3g}"
    )
  return largest


def generate(
  decoder: Decoder, prompt_BS: np.ndarray, new_tokens: int
) -> tuple[list[int], float, float]:
  """Returns the first row's new tokens, the first token's seconds and the others'."""
  decoder.reset()
  start = time.perf_counter()
  token_B = decoder.next_logits(prompt_BS).argmax(axis=1)
  first = time.perf_counter()
  tokens = [int(token_B[0])]
  for _ in range(new_tokens - 1):
    token_B = decoder.next_logits(token_B[:, None]).argmax(axis=1)
    tokens.append(int(token_B[0]))
  return tokens, first - start, time.perf_counter() - first


def peak_rss_mib() -> float:
  """Returns the most memory this process ever held."""
  scale = 2**20 if sys.platform == "darwin" else 2**10  # macOS counts bytes, Linux KiB
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale


def main() -> None:
  args = parse_args()
  logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)
  start = time.perf_counter()
  expected: dict[str, Any] = load_file(args.expected)
  longest = max(args.prompt_tokens + args.new_tokens, expected["tokens"].shape[1])
  decoder = Decoder(args.model, args.batch, longest, args.threads)
  difference = check(decoder, expected)
  rng = np.random.default_rng(0)
  prompt_BS = rng.integers(0, decoder.shape[1], (args.batch, args.prompt_tokens))
  generate(decoder, prompt_BS, args.new_tokens)
  warm_up_secs = time.perf_counter() - start
  runs = [generate(decoder, prompt_BS, args.new_tokens) for _ in range(args.repeats)]
  first_secs = statistics.median(run[1] for run in runs)
  decode_secs = statistics.median(run[2] for run in runs)
  result = {
    "prefill_tokens_per_sec": args.batch * args.prompt_tokens / first_secs,
    "decode_tokens_per_sec": args.batch * (args.new_tokens - 1) / decode_secs,
    "first_token_secs": first_secs,
    "warm_up_secs": warm_up_secs,
    "peak_rss_mib": peak_rss_mib(),
    "new_tokens": runs[-1][0],
    "largest_logit_difference": difference,
    "num_parameters": llama_cpp.llama_model_n_params(decoder.model),
    "system": llama_cpp.llama_print_system_info().decode(),
    "llama_cpp_python": llama_cpp.__version__,
  }
  print(json.dumps(result), flush=True)


if __name__ == "__main__":
  main()
