"""Continues prompts with Hugging Face's DeepseekV3ForCausalLM and prints how fast it went.

  python scripts/peers/transformers_decode.py --config="$(cat config.json)" --batch=8

Runs on its own in a virtual environment with torch and transformers, nothing of dsmoe.
`--config=-` reads the JSON from stdin. The last line printed is a JSON object. Greedy, with a
loop of its own over the model's forward pass: `generate` is slower. The settings below are the
fastest of those tried on a CPU with two cores; what lost stands beside each.
"""

import argparse
import json
import statistics
import sys
import time
from typing import Any

import torch
import transformers
from common import keep_freed_memory, make_model, peak_rss_mib


def parse_args() -> argparse.Namespace:
  """Returns the command line, checked."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--config", required=True, help="config.json's text; '-': read from stdin")
  parser.add_argument("--batch", type=int, required=True, help="prompts at once")
  parser.add_argument("--prompt_tokens", type=int, default=64, help="tokens a prompt")
  parser.add_argument("--new_tokens", type=int, default=128, help="tokens written to each")
  parser.add_argument("--repeats", type=int, default=3, help="measured runs; medians are printed")
  parser.add_argument("--threads", type=int, default=2)
  parser.add_argument("--compile", action="store_true", help="use torch.compile, a static cache")
  args = parser.parse_args()
  for name, least in dict(batch=1, prompt_tokens=1, new_tokens=2, repeats=1, threads=1).items():
    if getattr(args, name) < least:
      raise ValueError(f"{name} must be at least {least}, got {getattr(args, name)}")
  return args


class Generator:
  """Writes greedily; times each part."""

  def __init__(self, model: Any, args: argparse.Namespace):
    self.model = model
    # For one token a row; with 1, 8 and 64 rows the other was slower. "eager" was slowest.
    self.decode_experts = "batched_mm" if args.compile else "grouped_mm"
    self.static_cache: transformers.StaticCache | None = None
    self.next_token = next_token
    if args.compile:
      length = args.prompt_tokens + args.new_tokens
      self.static_cache = transformers.StaticCache(config=model.config, max_cache_len=length)
      # Compiling the prefill too is faster than leaving it eager.
      self.next_token = torch.compile(next_token, dynamic=False)

  def run(self, prompt_BS: torch.Tensor, new_tokens: int) -> tuple[torch.Tensor, float, float]:
    """Returns the new tokens, the first one's seconds and the others'."""
    cache: transformers.Cache
    if self.static_cache is None:
      cache = transformers.DynamicCache(config=self.model.config)
    else:
      cache = self.static_cache
      self.static_cache.reset()
    # With many rows an expert, batched_mm copies its weights for each.
    self.model.set_experts_implementation("grouped_mm")
    start = time.perf_counter()
    tokens = [self.next_token(self.model, prompt_BS, cache)]
    first = time.perf_counter()
    self.model.set_experts_implementation(self.decode_experts)
    for _ in range(new_tokens - 1):
      tokens.append(self.next_token(self.model, tokens[-1], cache))
    end = time.perf_counter()
    return torch.cat(tokens, dim=1), first - start, end - first


def next_token(model: Any, tokens_BS: torch.Tensor, cache: transformers.Cache) -> torch.Tensor:
  """Returns each row's likeliest next token, [B, 1]; the cache grows."""
  output = model(input_ids=tokens_BS, past_key_values=cache, use_cache=True, logits_to_keep=1)
  return output.logits[:, -1].argmax(-1, keepdim=True)


@torch.inference_mode()
def main() -> None:
  args = parse_args()
  keep_freed_memory()
  torch.set_num_threads(args.threads)
  torch.manual_seed(0)
  values = json.loads(sys.stdin.read() if args.config == "-" else args.config)
  config = transformers.DeepseekV3Config(**values)
  model = make_model(config).eval()
  # Without Python between kernels; `freezing`, which packs the weights, was no faster with it.
  torch._inductor.config.cpp_wrapper = True
  generator = Generator(model, args)
  prompt_BS = torch.randint(0, config.vocab_size, (args.batch, args.prompt_tokens))

  start = time.perf_counter()
  generator.run(prompt_BS, args.new_tokens)  # compiles
  warm_up_secs = time.perf_counter() - start
  runs = [generator.run(prompt_BS, args.new_tokens) for _ in range(args.repeats)]
  first_secs = statistics.median(run[1] for run in runs)
  decode_secs = statistics.median(run[2] for run in runs)
  result = {
    "prefill_tokens_per_sec": args.batch * args.prompt_tokens / first_secs,
    "decode_tokens_per_sec": args.batch * (args.new_tokens - 1) / decode_secs,
    "first_token_secs": first_secs,
    "warm_up_secs": warm_up_secs,
    "peak_rss_mib": peak_rss_mib(),
    "new_tokens": runs[-1][0][0].tolist(),
    "num_parameters": sum(p.numel() for p in model.parameters()),
    "experts_implementation": ["grouped_mm", generator.decode_experts],
    "torch": torch.__version__,
    "transformers": transformers.__version__,
  }
  print(json.dumps(result), flush=True)


if __name__ == "__main__":
  main()
