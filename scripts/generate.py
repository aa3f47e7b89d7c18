"""Continues text from a checkpoint.

python scripts/generate.py --workdir=runs/tiny --prompt="def " --num_tokens=200 --temperature=0.7
"""

import sys

from absl import app, flags, logging

from dsmoe import decode, evaluate, host
from dsmoe import tokenizer as tokenizer_lib

_WORKDIR = flags.DEFINE_string("workdir", None, "Of the run, on disk or gs://.", required=True)
_PROMPT = flags.DEFINE_string("prompt", None, "The text to continue.", required=True)
_NUM_TOKENS = flags.DEFINE_integer("num_tokens", 128, "The most to write.", lower_bound=1)
_TEMPERATURE = flags.DEFINE_float("temperature", 0.7, "0: always the likeliest token.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the sampling.", lower_bound=0)
_STEP = flags.DEFINE_integer("step", None, "Which checkpoint; default: the newest.")


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments: {' '.join(argv[1:])}")
  logging.set_verbosity(logging.WARNING)
  host.start()
  try:
    run = evaluate.load_run(_WORKDIR.value, _STEP.value)
    tokenizer = run.tokenizer()
    prompt = tokenizer.encode(_PROMPT.value, add_special_tokens=False).ids
    [tokens] = decode.generate(
      *(run.config, run.params, run.router_bias, run.mesh, [prompt], _NUM_TOKENS.value),
      temperature=_TEMPERATURE.value,
      seed=_SEED.value,
      stop_token=tokenizer_lib.eos_id(tokenizer),
    )
  except ValueError as error:
    sys.exit(f"generate: {error}")
  print(_PROMPT.value + tokenizer.decode(tokens))


if __name__ == "__main__":
  app.run(main)
