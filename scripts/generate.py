"""Continues text from a checkpoint: one prompt, a file of prompts, or a conversation.

  python scripts/generate.py --workdir=runs/tiny --prompt="def " --num_tokens=200
  python scripts/generate.py --workdir=runs/tiny --prompts=prompts.txt   # a JSON line an answer
  python scripts/generate.py --workdir=runs/imported --chat              # its chat template

What it took is printed at the end, to stderr. In a conversation, Ctrl-C ends an answer, an empty
line begins anew, Ctrl-D leaves.
"""

import json
import signal
import sys

import rich.console
from absl import app, flags, logging
from etils import epath

from dsmoe import checkpoint, runtime
from dsmoe.inference import batcher as batcher_lib
from dsmoe.inference import generate, text_model
from dsmoe.inference.sampling import Sampling
from dsmoe.reporting import progress

_WORKDIR = flags.DEFINE_string("workdir", None, "Of the run, on disk or gs://.", required=True)
_PROMPT = flags.DEFINE_string("prompt", None, "The text to continue.")
_PROMPTS = flags.DEFINE_string(
  "prompts", None, "A file with a prompt a line; .jsonl: {'prompt': text}."
)
_CHAT = flags.DEFINE_bool("chat", False, "Talk, by the checkpoint's chat template.")
_NUM_TOKENS = flags.DEFINE_integer("num_tokens", 128, "The most to write.", lower_bound=1)
_TEMPERATURE = flags.DEFINE_float("temperature", 0.7, "0: always the likeliest token.")
_TOP_K = flags.DEFINE_integer("top_k", 0, "Only the k likeliest tokens; 0: all.")
_TOP_P = flags.DEFINE_float("top_p", 1.0, "Only the likeliest that reach this probability.")
_MIN_P = flags.DEFINE_float("min_p", 0.0, "Only those at least this share as likely as the best.")
_PENALTY = flags.DEFINE_float("repetition_penalty", 1.0, "Above 1: less of what is there already.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the sampling; prompt i takes seed + i.", lower_bound=0)
_STOP = flags.DEFINE_multi_string("stop", [], "A text that ends an answer; may be repeated.")
_STEP = flags.DEFINE_integer("step", None, "Which checkpoint; default: the newest.")
_MAX_ROWS = flags.DEFINE_integer("max_rows", 8, "Prompts written at once.", lower_bound=1)
_CACHE_BYTES = flags.DEFINE_integer("cache_bytes", 2**30, "The most it takes.", lower_bound=1)
_SPECULATE = flags.DEFINE_bool("speculate", False, "Draft with the MTP module.")


def show(figures: generate.Figures, batcher: batcher_lib.Batcher) -> None:
  """Prints what it took, to stderr."""
  stats = batcher.stats()
  rows = [
    ("tokens written", f"{figures.new_tokens:,}"),
    ("tokens/s", f"{figures.new_tokens / max(figures.secs, 1e-9):,.1f}"),
    ("time to first token", f"{figures.first_secs:.2f} s, compiling included"),
    ("cache", f"{stats['cache_bytes']:,.0f} bytes for {stats['cache_pages']:,.0f} pages"),
  ]
  if stats["drafts"]:
    rows.append(("drafts accepted", f"{stats['drafts_accepted'] / stats['drafts']:.1%}"))
  rich.console.Console(stderr=True).print(progress.final_table(rows))


class Writer:
  """A checkpoint and how it is to write."""

  def __init__(self):
    run = checkpoint.load_run(_WORKDIR.value, _STEP.value)
    options = batcher_lib.BatcherOptions(_MAX_ROWS.value, _CACHE_BYTES.value, _SPECULATE.value)
    self.batcher = batcher_lib.make(run, options)
    folder, limit = run.tokenizer_path.parent, self.batcher.max_tokens_per_row
    self.model = text_model.load(folder, run.tokenizer(), _WORKDIR.value, limit)
    self.settings = Sampling(
      *(_NUM_TOKENS.value, _TEMPERATURE.value, _TOP_K.value, _TOP_P.value, _MIN_P.value),
      *(_PENALTY.value, _SEED.value),
      stop_tokens=self.model.stop_tokens,
    )
    self.figures = generate.Figures()

  def stream(self, texts: list[str], is_chat: bool = False):
    """Yields pieces of the texts' continuations."""
    prefix = [] if is_chat else list(self.model.prefix)
    encode = self.model.tokenizer.encode
    prompts = [prefix + encode(text, add_special_tokens=False).ids for text in texts]
    args = (self.batcher, self.model.vocabulary, prompts, self.settings, _STOP.value)
    return generate.stream(*args, self.figures)

  def chat(self) -> None:
    """Talks until the input ends."""
    if self.model.template is None:
      raise ValueError(f"--chat needs a chat template beside the tokenizer of {_WORKDIR.value}")
    messages: list[dict[str, str]] = []
    while True:
      try:
        said = input("\n> ")
      except (EOFError, KeyboardInterrupt):
        return
      if not said.strip():
        messages = []
        print("(a new conversation)")
        continue
      messages.append({"role": "user", "content": said})
      try:
        answer = self.answer(self.model.template.render(messages))
      except ValueError as error:  # too long, or the template refuses it
        print(f"{error}; an empty line begins anew", file=sys.stderr)
        messages.pop()
        continue
      messages.append({"role": "assistant", "content": answer})

  def answer(self, conversation: str) -> str:
    """Prints and returns what comes next; Ctrl-C ends it between two rounds of the batcher."""
    interrupts: list[int] = []
    previous = signal.signal(signal.SIGINT, lambda number, _: interrupts.append(number))
    text, pieces = "", self.stream([conversation], is_chat=True)
    try:
      for piece in pieces:
        text += piece.text
        print(piece.text, end="", flush=True)
        if interrupts:
          break
    finally:
      pieces.close()
      signal.signal(signal.SIGINT, previous)
    print()
    return text


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments: {' '.join(argv[1:])}")
  if (_PROMPT.value is not None) + (_PROMPTS.value is not None) + _CHAT.value != 1:
    raise app.UsageError("give one of --prompt, --prompts and --chat")
  logging.set_verbosity(logging.WARNING)
  runtime.start()
  try:
    prompts = (
      generate.read_prompts(epath.Path(_PROMPTS.value)) if _PROMPTS.value is not None else []
    )
    writer = Writer()
    if _CHAT.value:
      writer.chat()
    elif prompts:
      texts = dict.fromkeys(range(len(prompts)), "")
      for piece in writer.stream(prompts):
        texts[piece.prompt] += piece.text
        if piece.finish:
          line = {
            "prompt": prompts[piece.prompt],
            "text": texts[piece.prompt],
            "finish": piece.finish,
          }
          print(json.dumps(line, ensure_ascii=False), flush=True)
    else:
      prompt: str = _PROMPT.value or ""
      print(prompt, end="", flush=True)
      for piece in writer.stream([prompt]):
        print(piece.text, end="", flush=True)
      print()
  except ValueError as error:
    sys.exit(f"generate: {error}")
  if writer.figures.new_tokens:
    show(writer.figures, writer.batcher)


if __name__ == "__main__":
  app.run(main)
