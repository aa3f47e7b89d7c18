"""Text from a running batch: pieces as they come, and what it took."""

import dataclasses
import json
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from etils import epath

from dsmoe.inference.batcher import Batcher
from dsmoe.inference.detokenize import Detokenizer, StopStrings, Vocabulary
from dsmoe.inference.sampling import Sampling


class Piece(NamedTuple):
  """New text of one prompt."""

  prompt: int  # its place in the list
  text: str  # whole characters, perhaps none
  finish: str | None  # "stop", "length"; then nothing comes after it


@dataclasses.dataclass
class Figures:
  """What generation took."""

  first_secs: float = 0.0  # until the first token
  secs: float = 0.0
  new_tokens: int = 0


def stream(
  engine: Batcher,
  vocabulary: Vocabulary,
  prompts: Sequence[Sequence[int]],
  settings: Sampling,
  stop: Sequence[str] = (),
  figures: Figures | None = None,
) -> Iterator[Piece]:
  """Continues prompts, as many at once as the engine decodes; prompt i draws by seed + i.

  Closed early, it ends what still runs. Nobody else may step the engine meanwhile.

  Args:
    engine: without other requests.
    vocabulary: of the tokenizer.
    prompts: token ids.
    settings: of every prompt.
    stop: texts that end an answer and are not returned.
    figures: added to as it goes; its `first_secs` is that of the first call.

  Raises:
    ValueError: for no prompt, an empty stop string, or a prompt that the engine refuses.
  """
  if not prompts:
    raise ValueError("prompts must have at least 1 prompt, got 0")
  figures = figures or Figures()
  start, secs_before = time.perf_counter(), figures.secs
  open_texts: dict[int, tuple[int, Detokenizer, StopStrings]] = {}
  try:
    for i, prompt in enumerate(prompts):
      request = engine.submit(prompt, dataclasses.replace(settings, seed=settings.seed + i))
      open_texts[request] = i, Detokenizer(vocabulary, prompt), StopStrings(stop)
    while open_texts:
      for event in engine.step():
        if event.request not in open_texts:
          continue
        figures.secs = secs_before + time.perf_counter() - start
        figures.first_secs = figures.first_secs or figures.secs
        figures.new_tokens += len(event.tokens)
        place, detokenizer, stops = open_texts[event.request]
        text, finish = stops.push(detokenizer.push(event.tokens)), event.finish
        if finish and not stops.found:
          text += stops.push(detokenizer.flush())
          text += stops.flush()
        if stops.found:
          finish = "stop"
        if finish:
          del open_texts[event.request]
          engine.cancel(event.request)
        yield Piece(place, text, finish)
  finally:
    for request in open_texts:
      engine.cancel(request)


def read_prompts(path: epath.Path) -> list[str]:
  """Reads a file of prompts.

  Raises:
    ValueError: for a missing or empty file, or a line of another form.
  """
  if not path.is_file():
    raise ValueError(f"the file of prompts must exist, got {path}")
  try:
    lines = [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    if path.suffix == ".jsonl":
      lines = [json.loads(line)["prompt"] for line in lines]
    if not all(isinstance(line, str) for line in lines):
      raise TypeError("a prompt that is no text")
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(
      f"{path} must be UTF-8, in .jsonl lines of {{'prompt': text}}: {error!r}"
    ) from error
  if not lines:
    raise ValueError(f"the file of prompts must have at least 1 line, {path} has none")
  return lines
