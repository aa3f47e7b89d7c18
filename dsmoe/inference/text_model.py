"""What is known of a model besides its weights: name, tokenizer, stop tokens, chat template."""

import dataclasses
import functools

from etils import epath
from tokenizers import Tokenizer

from dsmoe.data import tokenizer as tokenizer_lib
from dsmoe.data.lines import check_unicode
from dsmoe.inference import chat
from dsmoe.inference.detokenize import Vocabulary
from dsmoe.inference.sampling import MAX_STOP_TOKENS


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
    if not self.name or not 1 <= len(self.stop_tokens) <= MAX_STOP_TOKENS:
      raise ValueError(
        f"a served model must have a name and 1 to {MAX_STOP_TOKENS} stop tokens, got "
        f"{self.name!r} and {self.stop_tokens}"
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
  of_file = tokenizer_lib.generation_ends(folder)
  ends = tuple(dict.fromkeys((end, *of_file, *tokenizer_lib.known_ends(tokenizer))))  # once each
  if unknown := [token for token in of_file if tokenizer.id_to_token(token) is None]:
    raise ValueError(
      f"eos_token_id of {epath.Path(folder) / tokenizer_lib.GENERATION_FILE} must be ids of the "
      f"tokenizer, got {unknown[0]}"
    )
  prefix = tokenizer_lib.bos_ids(tokenizer, folder)
  return ServedModel(name, tokenizer, max_tokens_per_row, ends, prefix, chat.load_template(folder))
