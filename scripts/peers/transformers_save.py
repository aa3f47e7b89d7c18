"""Saves a random DeepseekV3ForCausalLM and the logits it computes, for other code to be checked.

  python scripts/peers/transformers_save.py --config="$(cat config.json)" --folder=/tmp/model

Runs on its own in a virtual environment with torch and transformers, nothing of dsmoe. The folder
receives Hugging Face's config.json and model.safetensors, and expected.safetensors: `tokens`,
int32 [B, S], and `logits`, float32 [B, S, V]. The initial weights are those of
transformers_decode.py, except that norms and the router's bias are random too: were they all ones
and all zeros, code that mixes them up or leaves them out would compute the same logits.
"""

import argparse
import json
from pathlib import Path

import torch
import transformers
from common import make_model
from safetensors.torch import save_file


def parse_args() -> argparse.Namespace:
  """Returns the command line."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--config", required=True, help="text of a config.json")
  parser.add_argument("--folder", required=True, type=Path, help="folder to write; created")
  parser.add_argument("--batch", type=int, default=8, help="rows of tokens with known logits")
  parser.add_argument("--tokens", type=int, default=24, help="tokens in each row")
  parser.add_argument("--threads", type=int, default=2, help="threads that torch uses")
  return parser.parse_args()


@torch.inference_mode()
def main() -> None:
  args = parse_args()
  torch.set_num_threads(args.threads)
  torch.manual_seed(0)
  config = transformers.DeepseekV3Config(**json.loads(args.config))
  model = make_model(config).eval()
  for name, value in [*model.named_parameters(), *model.named_buffers()]:
    if name.endswith("norm.weight"):
      value.add_(0.1 * torch.randn_like(value))
    if name.endswith("e_score_correction_bias"):
      value.add_(0.02 * torch.randn_like(value))
  model.save_pretrained(args.folder, max_shard_size="1TB")
  tokens_BS = torch.randint(0, config.vocab_size, (args.batch, args.tokens))
  logits_BSV = model(input_ids=tokens_BS, use_cache=False).logits
  expected = {"tokens": tokens_BS.int(), "logits": logits_BSV.contiguous()}
  save_file(expected, args.folder / "expected.safetensors")


if __name__ == "__main__":
  main()
