"""Trains, loads and applies tokenizers: byte-level BPE, or any tokenizer.json.

Token ids of a tokenizer trained here: 0 is <|endoftext|>, 1 to 4 the other `SPECIAL_TOKENS`,
then the 256 bytes, then merges. Loaded tokenizers keep their own ids; their special tokens are
found by name.
"""

from collections.abc import Iterable, Sequence

import numpy as np
from etils import epath
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

SPECIAL_TOKENS = (
  "<|endoftext|>",
  "<|fim_prefix|>",
  "<|fim_suffix|>",
  "<|fim_middle|>",
  "<|pad|>",
)
SMALLEST_VOCABULARY = 256 + len(SPECIAL_TOKENS)

# Names of the end-of-document token, in order of preference; the last is DeepSeek's.
_END_OF_DOCUMENT = ("<|endoftext|>", "</s>", "<｜end▁of▁sentence｜>")
# Prefix, suffix and middle marks; the second row is DeepSeek's.
_FILL_IN_THE_MIDDLE = (
  ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
  ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
)


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> Tokenizer:
  """Trains a byte-level BPE tokenizer; the same text gives the same tokenizer.

  Args:
    documents: the text, read once.
    vocab_size: largest number of tokens; a short text may not give that many.

  Returns:
    A tokenizer whose `decode(encode(text))` is any text unchanged.

  Raises:
    ValueError: if `vocab_size` has no room for the bytes and the special tokens.
  """
  if vocab_size < SMALLEST_VOCABULARY:
    raise ValueError(
      f"vocab_size ({vocab_size}) must be at least {SMALLEST_VOCABULARY}: 256 bytes and "
      f"{len(SPECIAL_TOKENS)} special tokens"
    )
  tokenizer = Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=vocab_size,
    special_tokens=list(SPECIAL_TOKENS),
    initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    show_progress=False,
  )
  tokenizer.train_from_iterator(documents, trainer)
  return tokenizer


def load_tokenizer(path: epath.PathLike, vocab_size: int | None = None) -> Tokenizer:
  """Loads a tokenizer.json.

  Args:
    path: the file, on disk or gs://.
    vocab_size: the model's, against which the tokenizer's ids are checked; None: no check.

  Raises:
    ValueError: if the file is missing or not a tokenizer, if an id does not fit in `vocab_size`,
      or if no token ends a document.
  """
  try:
    tokenizer = Tokenizer.from_str(epath.Path(path).read_text(encoding="utf-8"))
  except Exception as error:  # tokenizers raises bare Exception
    raise ValueError(
      f"a tokenizer must be a readable tokenizer.json, got {path}: {error}"
    ) from error
  if vocab_size is not None:
    check_vocabulary(tokenizer, vocab_size)
  eos_id(tokenizer)
  return tokenizer


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
  """Raises ValueError if a token id is not below the model's `vocab_size`."""
  needed = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
  if needed > vocab_size:
    raise ValueError(
      f"the tokenizer's vocabulary ({needed} ids) must fit in the model's vocab_size ({vocab_size})"
    )


def eos_id(tokenizer: Tokenizer) -> int:
  """Returns the id of the token that ends a document.

  Raises:
    ValueError: if the vocabulary has none of the known names.
  """
  for name in _END_OF_DOCUMENT:
    token = tokenizer.token_to_id(name)
    if token is not None:
      return token
  raise ValueError(
    f"the tokenizer must have a token that ends a document, one of {', '.join(_END_OF_DOCUMENT)}; "
    f"none is among its {tokenizer.get_vocab_size()} tokens"
  )


def fim_ids(tokenizer: Tokenizer) -> tuple[int, int, int]:
  """Returns the ids of the prefix, suffix and middle marks of fill-in-the-middle.

  Raises:
    ValueError: if the vocabulary lacks them.
  """
  for names in _FILL_IN_THE_MIDDLE:
    prefix, suffix, middle = (tokenizer.token_to_id(name) for name in names)
    if prefix is not None and suffix is not None and middle is not None:
      return prefix, suffix, middle
  looked_for = " or ".join(", ".join(names) for names in _FILL_IN_THE_MIDDLE)
  raise ValueError(
    f"fill-in-the-middle needs the tokens {looked_for}; they are not all among the tokenizer's "
    f"{tokenizer.get_vocab_size()} tokens"
  )


def text_only(tokenizer: Tokenizer) -> Tokenizer:
  """Returns a copy that encodes the names of special tokens as plain text.

  Documents are encoded with it, so that a document that mentions <|endoftext|> does not end there.
  """
  copy = Tokenizer.from_str(tokenizer.to_str())
  copy.encode_special_tokens = True
  return copy


def encode_documents(tokenizer: Tokenizer, texts: Sequence[str], end: int) -> list[np.ndarray]:
  """Encodes whole documents, each ended by the end-of-document token.

  Args:
    tokenizer: used as it is; see `text_only`.
    texts: the documents, valid Unicode.
    end: from `eos_id`.

  Returns:
    For each document a uint32 array of its ids and `end`, without the tokens that a tokenizer's
    template adds at the beginning.
  """
  encodings = tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
  return [np.array([*encoding.ids, end], np.uint32) for encoding in encodings]
