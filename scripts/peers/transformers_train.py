"""Trains Hugging Face's DeepseekV3ForCausalLM for a few steps and prints how fast it went.

  python scripts/peers/transformers_train.py --config="$(cat config.json)" --batch=8 --sequence=512

Runs on its own in a virtual environment with torch and transformers, nothing of dsmoe.
`--config=-` reads the JSON from stdin. The last line printed is a JSON object. The settings
below are the fastest of those tried on a CPU with two cores; what lost stands beside each.
"""

import argparse
import json
import statistics
import sys
import time

import torch
import transformers
from common import keep_freed_memory, make_model, peak_rss_mib


def parse_args() -> argparse.Namespace:
  """Returns the command line, checked."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--config", required=True, help="config.json's text; '-': read from stdin")
  parser.add_argument("--batch", type=int, required=True, help="sequences a step")
  parser.add_argument("--sequence", type=int, required=True, help="tokens a sequence")
  parser.add_argument("--steps", type=int, default=10, help="measured steps")
  parser.add_argument("--warmup_steps", type=int, default=3, help="unmeasured steps; one compiles")
  parser.add_argument("--threads", type=int, default=2)
  parser.add_argument("--learning_rate", type=float, default=1e-3)
  parser.add_argument("--weight_decay", type=float, default=0.1)
  parser.add_argument("--clip_norm", type=float, default=1.0, help="0: no clipping")
  parser.add_argument("--compile", action="store_true", help="use torch.compile")
  args = parser.parse_args()
  for name in ("batch", "sequence", "steps", "warmup_steps", "threads"):
    if getattr(args, name) < 1:
      raise ValueError(f"{name} must be at least 1, got {getattr(args, name)}")
  return args


def main() -> None:
  args = parse_args()
  keep_freed_memory()
  torch.set_num_threads(args.threads)
  torch.manual_seed(0)
  values = json.loads(sys.stdin.read() if args.config == "-" else args.config)
  config = transformers.DeepseekV3Config(**values)
  model = make_model(config).train()
  parameters = list(model.parameters())
  # foreach=True measured no faster.
  optimizer = torch.optim.AdamW(
    parameters,
    lr=args.learning_rate,
    betas=(0.9, 0.95),
    weight_decay=args.weight_decay,
    fused=True,
  )
  if args.compile:
    # The whole model with its loss, default mode. One graph a layer, max-autotune and a compiled
    # optimizer measured no faster.
    model.compile(dynamic=False)

  num_steps = args.warmup_steps + args.steps
  tokens_IBS = torch.randint(0, config.vocab_size, (num_steps, args.batch, args.sequence))
  step_secs, loss = [], float("nan")
  for tokens_BS in tokens_IBS:
    start = time.perf_counter()
    output = model(input_ids=tokens_BS, labels=tokens_BS, use_cache=False)
    output.loss.backward()
    if args.clip_norm:
      torch.nn.utils.clip_grad_norm_(parameters, args.clip_norm, foreach=True)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    loss = output.loss.item()
    step_secs.append(time.perf_counter() - start)
    del output  # the logits

  median_secs = statistics.median(step_secs[args.warmup_steps :])
  result = {
    "tokens_per_sec": args.batch * args.sequence / median_secs,
    "median_step_secs": median_secs,
    "compile_secs": max(0.0, step_secs[0] - median_secs),  # what the first step took longer
    "peak_rss_mib": peak_rss_mib(),
    "loss": loss,
    "num_parameters": sum(p.numel() for p in parameters),
    "experts_implementation": getattr(model.config, "_experts_implementation", None),
    "torch": torch.__version__,
    "transformers": transformers.__version__,
  }
  print(json.dumps(result), flush=True)


if __name__ == "__main__":
  main()
