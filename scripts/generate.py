"""Continues text from a checkpoint: one prompt, a file of prompts, or a conversation.

  python scripts/generate.py --workdir=runs/tiny --prompt="def " --num_tokens=200
  python scripts/generate.py --workdir=runs/tiny --prompts=prompts.txt   # one line of JSON each
  python scripts/generate.py --workdir=runs/imported --chat              # by its chat template
  python scripts/generate.py --workdir=runs/tiny --prompt="def " --mesh=expert:4,model:2

Speed and memory are printed to stderr at the end. In a conversation, Ctrl-C ends an answer, an
empty line starts a new conversation, and Ctrl-D quits.
"""

import dataclasses
import json
import signal
import sys
from collections.abc import Generator

import rich.console
from absl import app, flags
from etils import epath

from dsmoe import runtime
from dsmoe.data import lines
from dsmoe.inference import batcher as batcher_lib
from dsmoe.inference import generate, text_model
from dsmoe.inference.sampling import Sampling
from dsmoe.parallel import mesh as mesh_lib
from dsmoe.platforms import cpu
from dsmoe.reporting import output, progress

_WORKDIR = flags.DEFINE_string("workdir", None, "The run's, on disk or gs://.", required=True)
_PROMPT = flags.DEFINE_string("prompt", None, "The text to continue.")
_PROMPTS = flags.DEFINE_string(
  "prompts", None, "A file with one prompt a line; in .jsonl each line is {'prompt': text}."
)
_CHAT = flags.DEFINE_bool("chat", False, "Converse, by the checkpoint's chat template.")
_NUM_TOKENS = flags.DEFINE_integer(
  "num_tokens", 128, "Upper limit of the new tokens of each prompt.", lower_bound=1
)
_TEMPERATURE = flags.DEFINE_float("temperature", 0.7, "0 takes the likeliest token always.")
_TOP_K = flags.DEFINE_integer("top_k", 0, "Sample from the k likeliest tokens only; 0 for all.")
_TOP_P = flags.DEFINE_float(
  "top_p", 1.0, "Sample only from the likeliest tokens that together have this probability."
)
_MIN_P = flags.DEFINE_float(
  "min_p", 0.0, "Sample only from tokens with at least this share of the likeliest's probability."
)
_PENALTY = flags.DEFINE_float(
  "repetition_penalty", 1.0, "Above 1 makes tokens that occurred before less likely."
)
_SEED = flags.DEFINE_integer("seed", 0, "For sampling; prompt i takes seed + i.", lower_bound=0)
_STOP = flags.DEFINE_multi_string("stop", [], "A text that ends an answer; may be repeated.")
_STEP = flags.DEFINE_integer("step", None, "The checkpoint; by default the newest.")
_MAX_ROWS = flags.DEFINE_integer("max_rows", 8, "Prompts continued at once.", lower_bound=1)
_CACHE_BYTES = flags.DEFINE_integer(
  "cache_bytes",
  2**30,
  "Upper limit of the cache of attention's latents on a device.",
  lower_bound=1,
)
_SPECULATE = flags.DEFINE_bool("speculate", False, "Draft tokens with the first MTP module.")
_MESH = flags.DEFINE_list(
  "mesh", [], "Sizes of mesh axes, as data:2,expert:4,model:2; by default one device is used."
)


def show(figures: generate.Figures, batcher: batcher_lib.Batcher) -> None:
  """Prints speed and memory to stderr."""
  stats = batcher.stats()
  rows = [
    ("new tokens", f"{figures.new_tokens:,}"),
    ("time to first token", f"{figures.first_secs:.2f} s, compiling included"),
    ("tokens/s", f"{figures.new_tokens / max(figures.secs, 1e-9):,.1f}, compiling included"),
    ("cache", f"{stats['cache_bytes']:,.0f} bytes for {stats['cache_pages']:,.0f} pages"),
  ]
  if stats["drafts"]:
    rows.append(("drafts accepted", f"{stats['drafts_accepted'] / stats['drafts']:.1%}"))
  rich.console.Console(stderr=True).print(progress.final_table(rows))


class Writer:
  """Continues texts with one checkpoint and one way of sampling."""

  def __init__(self, sampling: Sampling):
    """Loads the checkpoint that the flags name."""
    options = batcher_lib.BatcherOptions(_MAX_ROWS.value, _CACHE_BYTES.value, _SPECULATE.value)
    mesh = mesh_lib.axes_of_flag(_MESH.value) if _MESH.value else None
    run, self.batcher = batcher_lib.load(_WORKDIR.value, _STEP.value, options, mesh)
    cpu.release_memory()  # that restoring and preparing the weights used: compiling comes next
    folder, limit = run.tokenizer_path.parent, self.batcher.max_tokens_per_row
    self.model = text_model.load(folder, run.tokenizer(), _WORKDIR.value, limit)
    self.sampling = dataclasses.replace(sampling, stop_tokens=self.model.stop_tokens)
    self.figures = generate.Figures()

  def stream(self, texts: list[str], is_chat: bool = False) -> Generator[generate.Piece]:
    """Yields pieces of the texts' continuations."""
    prompts = [self.model.encode(text, add_special_tokens=not is_chat) for text in texts]
    return generate.stream(
      self.batcher, self.model.vocabulary, prompts, self.sampling, _STOP.value, self.figures
    )

  def complete(self, prompt: str) -> None:
    """Prints a prompt and its continuation."""
    print(prompt, end="", flush=True)
    for piece in self.stream([prompt]):
      print(piece.text, end="", flush=True)
    print()

  def complete_all(self, prompts: list[str]) -> None:
    """Prints a line of JSON for each prompt, in the order in which they are finished."""
    texts = [""] * len(prompts)
    for piece in self.stream(prompts):
      texts[piece.prompt] += piece.text
      if piece.finish:
        line = {
          "prompt": prompts[piece.prompt],
          "text": texts[piece.prompt],
          "finish": piece.finish,
        }
        print(json.dumps(line, ensure_ascii=False), flush=True)

  def chat(self) -> None:
    """Answers messages from stdin until it ends."""
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
      except ValueError as error:  # the conversation is too long, or the template refuses it
        print(f"{error}; an empty line starts a new conversation", file=sys.stderr)
        messages.pop()
        continue
      messages.append({"role": "assistant", "content": answer})

  def answer(self, conversation: str) -> str:
    """Prints and returns the next message; Ctrl-C ends it between two rounds of the batcher."""
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
  output.refuse_arguments(argv)
  if (_PROMPT.value is not None) + (_PROMPTS.value is not None) + _CHAT.value != 1:
    raise app.UsageError("give one of --prompt, --prompts and --chat")
  for option in (_WORKDIR, _PROMPTS):
    if option.value is not None and not option.value.strip():
      raise app.UsageError(f"--{option.name} must not be empty")
  runtime.start()
  # All are checked before the checkpoint is loaded.
  for name, text in (("prompt", _PROMPT.value or ""), *(("stop", text) for text in _STOP.value)):
    lines.check_unicode(text, f"--{name}")
  if not all(_STOP.value):
    raise ValueError("--stop must have at least 1 character, got an empty one")
  sampling = Sampling(
    max_tokens=_NUM_TOKENS.value,
    temperature=_TEMPERATURE.value,
    top_k=_TOP_K.value,
    top_p=_TOP_P.value,
    min_p=_MIN_P.value,
    repetition_penalty=_PENALTY.value,
    seed=_SEED.value,
  )
  prompts = [] if _PROMPTS.value is None else generate.read_prompts(epath.Path(_PROMPTS.value))
  writer = Writer(sampling)
  if _CHAT.value:
    writer.chat()
  elif prompts:
    writer.complete_all(prompts)
  else:
    writer.complete(_PROMPT.value or "")
  if writer.figures.new_tokens:
    show(writer.figures, writer.batcher)


if __name__ == "__main__":
  output.run_script(main)
