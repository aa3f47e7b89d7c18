"""Text of several prompts, piece by piece as it is generated, with timings."""

import dataclasses
import json
import time
from collections.abc import Generator, Sequence
from typing import NamedTuple

from etils import epath

from dsmoe.checkpoint import load_run
from dsmoe.data.lines import check_unicode, read_lines
from dsmoe.inference import batcher as batcher_lib
from dsmoe.inference.batcher import Batcher
from dsmoe.inference.detokenize import Detokenizer, StopStrings, Vocabulary
from dsmoe.inference.sampling import Sampling


class Piece(NamedTuple):
  """New text that continues one prompt."""

  prompt: int  # the prompt's index in the list
  text: str  # whole characters, perhaps none
  finish: str | None  # "stop" or "length" in a prompt's last piece, otherwise None


@dataclasses.dataclass
class Figures:
  """How long generation took, for how many tokens."""

  first_secs: float = 0.0  # until the first token
  secs: float = 0.0  # until the last
  new_tokens: int = 0


def stream(
  batcher: Batcher,
  vocabulary: Vocabulary,
  prompts: Sequence[Sequence[int]],
  settings: Sampling,
  stop: Sequence[str] = (),
  figures: Figures | None = None,
) -> Generator[Piece]:
  """Continues prompts and yields their text; prompt i is sampled with `settings.seed` + i.

  Closing the iterator early cancels the prompts that are not finished. Nothing else may call the
  batcher's `step` meanwhile.

  Args:
    batcher: without other requests.
    vocabulary: of the tokenizer.
    prompts: token ids.
    settings: of every prompt.
    stop: texts that end a continuation and are not returned.
    figures: where times and tokens are added up; `first_secs` is set by the first call only.

  Raises:
    ValueError: for no prompt, an empty stop string, or a prompt that the batcher refuses.
  """
  if not prompts:
    raise ValueError("prompts must have at least 1 prompt, got 0")
  figures = figures or Figures()
  start, secs_before = time.perf_counter(), figures.secs
  open_texts: dict[int, tuple[int, Detokenizer, StopStrings]] = {}
  try:
    for i, prompt in enumerate(prompts):
      request = batcher.submit(prompt, dataclasses.replace(settings, seed=settings.seed + i))
      open_texts[request] = i, Detokenizer(vocabulary, prompt), StopStrings(stop)
    while open_texts:
      for event in batcher.step():
        if event.request not in open_texts:
          continue
        figures.secs = secs_before + time.perf_counter() - start
        figures.first_secs = figures.first_secs or figures.secs
        figures.new_tokens += len(event.tokens)
        index, detokenizer, stops = open_texts[event.request]
        text, finish = stops.push(detokenizer.push(event.tokens)), event.finish
        if finish and not stops.found:
          text += stops.push(detokenizer.flush())
          text += stops.flush()
        if stops.found:
          finish = "stop"
        if finish:
          del open_texts[event.request]
          batcher.cancel(event.request)
        yield Piece(index, text, finish)
  finally:
    for request in open_texts:
      batcher.cancel(request)


def sample(workdir: epath.PathLike, max_tokens: int, prompt: str = "def ") -> str:
  """Returns `prompt` and up to `max_tokens` by which the newest checkpoint of a run continues it.

  A run without a tokenizer returns "".
  """
  run = load_run(workdir)
  if not run.tokenizer_path.exists():
    return ""
  encoder = run.tokenizer()
  tokens = encoder.encode(prompt, add_special_tokens=False).ids
  batcher = batcher_lib.make(run, batcher_lib.BatcherOptions(max_rows=1))
  tokens = tokens[: batcher.max_tokens_per_row - 1]
  room = batcher.max_tokens_per_row - len(tokens)
  settings = Sampling(min(max_tokens, room), temperature=0.7)
  return prompt + encoder.decode(batcher_lib.generate(batcher, [tokens], settings)[0])


def read_prompts(path: epath.Path) -> list[str]:
  """Reads a file with one prompt a line; in .jsonl each line is {"prompt": text}.

  Raises:
    ValueError: for a missing or empty file, or a line of another form.
  """
  lines = [line for line in read_lines(path, "prompts") if line.strip()]
  if path.suffix == ".jsonl":
    try:
      lines = [json.loads(line)["prompt"] for line in lines]
      if not all(isinstance(line, str) for line in lines):
        raise TypeError("every prompt must be text")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
      raise ValueError(f"{path} must have {{'prompt': text}} in each line: {error!r}") from error
  for line in lines:
    check_unicode(line, f"every prompt of {path}")
  if not lines:
    raise ValueError(f"the file of prompts must have at least 1 line, {path} has none")
  return lines
