"""What is known of a model besides its weights: name, tokenizer, stop tokens, chat template."""

import dataclasses
import functools

from etils import epath
from tokenizers import Tokenizer

from dsmoe.data import tokenizer as tokenizer_lib
from dsmoe.data.lines import check_unicode
from dsmoe.inference import chat
from dsmoe.inference.detokenize import Vocabulary


@dataclasses.dataclass(frozen=True)
class ServedModel:
  """A model's name, tokenizer, limits and chat template."""

  name: str
  tokenizer: Tokenizer
  max_tokens_per_row: int
  stop_tokens: tuple[int, ...]  # the first one is also the prompt in place of an empty one
  prefix: tuple[int, ...] = ()  # put before a text that does not begin with it
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

  def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
    """Returns a text's token ids, after `prefix` unless it begins with that already.

    Args:
      text: valid Unicode.
      add_special_tokens: False for a chat, whose template writes every special token itself.

    Raises:
      ValueError: for half a surrogate pair.
    """
    check_unicode(text, "a text")
    ids = self.tokenizer.encode(text, add_special_tokens=False).ids
    prefix = list(self.prefix) if add_special_tokens else []
    return ids if ids[: len(prefix)] == prefix else prefix + ids


def load(
  folder: epath.PathLike, tokenizer: Tokenizer, name: str, max_tokens_per_row: int
) -> ServedModel:
  """Reads the files beside a tokenizer.json.

  The stop tokens are what `tokenizer.eos_id` finds, the `eos_token_id` of generation_config.json
  and special tokens whose known names say so. The prefix is that of `tokenizer.bos_ids`.

  Args:
    folder: the tokenizer's.
    tokenizer: loaded from there.
    name: the model's, for clients.
    max_tokens_per_row: upper limit of prompt and answer together.

  Raises:
    ValueError: for a file that cannot be read.
  """
  end = tokenizer_lib.eos_id(tokenizer, folder)
  others = (*tokenizer_lib.generation_ends(folder), *tokenizer_lib.known_ends(tokenizer))
  ends = tuple(dict.fromkeys((end, *others)))  # without duplicates
  prefix = tokenizer_lib.bos_ids(tokenizer, folder)
  return ServedModel(name, tokenizer, max_tokens_per_row, ends, prefix, chat.load_template(folder))
