"""What is known of a model besides its weights: name, tokenizer, stop tokens, chat template."""

import dataclasses
import functools
import json
from collections.abc import Sequence

from etils import epath
from tokenizers import Tokenizer

from dsmoe.data import tokenizer as tokenizer_lib
from dsmoe.inference import chat
from dsmoe.inference.detokenize import Vocabulary

_GENERATION_FILE = "generation_config.json"


@dataclasses.dataclass(frozen=True)
class ServedModel:
  """A model's name, tokenizer, limits and chat template."""

  name: str
  tokenizer: Tokenizer
  max_tokens_per_row: int
  stop_tokens: tuple[int, ...]  # the first one is also the prompt in place of an empty one
  prefix: tuple[int, ...] = ()  # put before prompts that are text, but not before chats
  template: chat.ChatTemplate | None = None
  vocabulary: Vocabulary = dataclasses.field(init=False)

  def __post_init__(self):
    if not self.name or not self.stop_tokens:
      raise ValueError(
        f"a served model must have a name and a stop token, got {self.name!r} and "
        f"{self.stop_tokens}"
      )
    object.__setattr__(self, "vocabulary", Vocabulary(self.tokenizer))

  @functools.cached_property
  def max_prompt_bytes(self) -> int:
    """The length of a text of the longest tokens that just fits: what is longer is refused."""
    ids = range(self.tokenizer.get_vocab_size())
    return self.max_tokens_per_row * max(len(self.vocabulary.token_bytes(i)) for i in ids)


def load(
  folder: epath.PathLike, tokenizer: Tokenizer, name: str, max_tokens_per_row: int
) -> ServedModel:
  """Reads the files beside a tokenizer.json.

  The stop tokens are the tokenizer's end of a document, the `eos_token` of tokenizer_config.json
  and the `eos_token_id` of generation_config.json. With `add_bos_token` the prefix is `bos_token`.

  Args:
    folder: the tokenizer's.
    tokenizer: loaded from there.
    name: the model's, for clients.
    max_tokens_per_row: upper limit of prompt and answer together.

  Raises:
    ValueError: for a file that cannot be read.
  """
  config = chat.load_tokenizer_config(folder)
  special = chat.special_tokens(config)
  named = [tokenizer.token_to_id(special.get("eos_token", ""))]
  ids = [tokenizer_lib.eos_id(tokenizer), *named, *_generation_ends(epath.Path(folder))]
  bos = tokenizer.token_to_id(special.get("bos_token", ""))
  prefix = (bos,) if config.get("add_bos_token") is True and bos is not None else ()
  ends = tuple(dict.fromkeys(i for i in ids if i is not None))  # without duplicates
  return ServedModel(name, tokenizer, max_tokens_per_row, ends, prefix, chat.load_template(folder))


def _generation_ends(folder: epath.Path) -> Sequence[int]:
  path = folder / _GENERATION_FILE
  if not path.exists():
    return ()
  try:
    ends = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") or []
  except (ValueError, AttributeError) as error:
    raise ValueError(f"{path} must be a JSON object, got: {error}") from error
  return ends if isinstance(ends, list) else [ends]
