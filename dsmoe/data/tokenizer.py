"""Trains, loads and applies tokenizers: byte-level BPE, or any tokenizer.json.

Token ids of a tokenizer trained here: 0 is <|endoftext|>, 1 to 4 the other `SPECIAL_TOKENS`,
then the 256 bytes, then merges. Loaded tokenizers keep their own ids. The files of `BESIDE`, in the
folder of a tokenizer.json, say which tokens end and begin its texts.
"""

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

SPECIAL_TOKENS = (
  "<|endoftext|>",
  "<|fim_prefix|>",
  "<|fim_suffix|>",
  "<|fim_middle|>",
  "<|pad|>",
)
SMALLEST_VOCABULARY = 256 + len(SPECIAL_TOKENS)

FILE = "tokenizer.json"
CONFIG_FILE, GENERATION_FILE = "tokenizer_config.json", "generation_config.json"
_OLD_CONFIG_FILE = "special_tokens_map.json"  # transformers 4 wrote it
# What belongs to a tokenizer.json of the same folder, and goes where it goes.
BESIDE = (CONFIG_FILE, GENERATION_FILE, "chat_template.jinja", _OLD_CONFIG_FILE)

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


def read_tokenizer(path: epath.PathLike) -> Tokenizer:
  """Reads a tokenizer.json, without the settings in it that would change a text.

  transformers writes truncation, padding and BPE dropout into the file. Here every text is encoded
  whole, alone and always in the same way, so the three are cleared.

  Args:
    path: the file, on disk or gs://.

  Raises:
    ValueError: if the file is missing or not a tokenizer.
  """
  try:
    tokenizer = Tokenizer.from_str(epath.Path(path).read_text(encoding="utf-8"))
  except Exception as error:  # tokenizers raises bare Exception
    raise ValueError(
      f"a tokenizer must be a readable tokenizer.json, got {path}: {error}"
    ) from error
  tokenizer.no_truncation()
  tokenizer.no_padding()
  if getattr(tokenizer.model, "dropout", None) is not None:  # BPE only
    tokenizer.model.dropout = None
  return tokenizer


def load_tokenizer(
  path: epath.PathLike, vocab_size: int | None = None, eos_token: str = ""
) -> Tokenizer:
  """Returns `read_tokenizer` of a file, checked for use with a model.

  Args:
    path: the file, on disk or gs://.
    vocab_size: the model's, against which the tokenizer's ids are checked; None: no check.
    eos_token: see `eos_id`.

  Raises:
    ValueError: if the file is missing or not a tokenizer, if an id does not fit in `vocab_size`,
      if no token ends a document, or
      one that texts can hold.
  """
  tokenizer = read_tokenizer(path)
  if vocab_size is not None:
    check_vocabulary(tokenizer, vocab_size)
  _make_special(tokenizer, eos_id(tokenizer, folder_of(path), eos_token))
  return tokenizer


def _make_special(tokenizer: Tokenizer, end: int) -> None:
  """Makes the end of a document a special token, as transformers does with an `eos_token`.

  Raises:
    ValueError: if a text can hold the token even so.
  """
  entry = tokenizer.get_added_tokens_decoder().get(end)
  if entry is not None and entry.special:
    return
  name, text = tokenizer.id_to_token(end), tokenizer.decode([end], skip_special_tokens=False)
  tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True)])
  if end in text_only(tokenizer).encode(text, add_special_tokens=False).ids:
    raise ValueError(f"the token that ends a document must not be one of text, got {text!r}")


def folder_of(path: epath.PathLike) -> epath.Path | None:
  """Returns where the files of `BESIDE` are; None for a file that is not called tokenizer.json.

  A folder may hold several tokenizers; those files belong to the one of that name.
  """
  path = epath.Path(path)
  return path.parent if path.name == FILE else None


def files_beside(path: epath.PathLike, eos_token: str = "") -> dict[str, str]:
  """Returns the contents of those files of `BESIDE` that a tokenizer.json has, by name.

  Args:
    path: of the tokenizer.json.
    eos_token: `data.eos_token`, which tokenizer_config.json then says; "" leaves it as it is.

  Raises:
    ValueError: if tokenizer_config.json has to be changed and is not a JSON object.
  """
  folder = folder_of(path)
  paths = [folder / name for name in BESIDE] if folder else []
  contents = {path.name: read_text(path) for path in paths if path.exists()}
  if eos_token:
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"} | read_settings(folder, CONFIG_FILE)
    contents[CONFIG_FILE] = json.dumps(settings | {"eos_token": eos_token}, indent=2)
  return contents


def read_text(path: epath.Path) -> str:
  """Reads a file of text beside a tokenizer; raises ValueError, naming it, if it is not UTF-8."""
  try:
    return path.read_text(encoding="utf-8")
  except ValueError as error:
    raise ValueError(f"{path} must be UTF-8, got: {error}") from error


def read_settings(folder: epath.PathLike | None, name: str) -> dict[str, Any]:
  """Reads a JSON object beside a tokenizer; returns {} without a folder or a file.

  Raises:
    ValueError: if the file is not a JSON object.
  """
  if folder is None or not (path := epath.Path(folder) / name).exists():
    return {}
  try:
    values = json.loads(path.read_text(encoding="utf-8"))
  except (ValueError, RecursionError) as error:
    raise ValueError(f"{path} must be JSON, got: {error}") from error
  if not isinstance(values, dict):
    raise ValueError(f"{path} must be a JSON object, got a {type(values).__name__}")
  return values


def special_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
  """Returns the special tokens of a tokenizer_config.json, text by name, such as `eos_token`."""
  result = {}
  for name, value in settings.items():
    if name.endswith("_token"):
      text = value.get("content") if isinstance(value, Mapping) else value
      if isinstance(text, str):
        result[name] = text
  return result


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
  """Raises ValueError if a token id is not below the model's `vocab_size`."""
  needed = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
  if needed > vocab_size:
    raise ValueError(
      f"the tokenizer's vocabulary ({needed} ids) must fit in the model's vocab_size ({vocab_size})"
    )


def eos_id(tokenizer: Tokenizer, folder: epath.PathLike | None = None, eos_token: str = "") -> int:
  """Returns the id of the token that ends a document.

  The first of these that names one decides: `eos_token`; the `eos_token` of tokenizer_config.json,
  or of special_tokens_map.json; `eos_token_id` of generation_config.json, the first of several; a
  special token with a known name. An ordinary token never counts by its name: </s> also ends a
  struck-out text in HTML.

  Args:
    tokenizer: any.
    folder: the tokenizer's, where these files are; None for a tokenizer alone.
    eos_token: a token's text, `data.eos_token`; "" leaves the choice to the files.

  Raises:
    ValueError: if a token that is named does not exist, or none is named.
  """
  named = {"data.eos_token": eos_token} if eos_token else {}
  for file in () if eos_token else (CONFIG_FILE, _OLD_CONFIG_FILE):
    where, settings = f"eos_token of {epath.Path(folder or '') / file}", read_settings(folder, file)
    text = special_tokens(settings).get("eos_token")
    if text is None and settings.get("eos_token") is not None:
      raise ValueError(f"{where} must be the text of a token, got {settings['eos_token']!r:.80}")
    named |= {where: text} if text else {}
  for where, text in named.items():
    token = tokenizer.token_to_id(text)
    if token is None:
      raise ValueError(f"{where} must be one of the tokenizer's tokens, got {text!r}")
    return token
  if ends := generation_ends(folder):
    if tokenizer.id_to_token(ends[0]) is None:
      raise ValueError(
        f"eos_token_id of {epath.Path(folder or '') / GENERATION_FILE} must be one of the "
        f"tokenizer's ids, got {ends[0]}"
      )
    return ends[0]
  if ends := known_ends(tokenizer):
    return ends[0]
  raise ValueError(
    "the tokenizer must have a special token that ends a document, named by eos_token in the "
    f"{CONFIG_FILE} beside it, by data.eos_token, or one of {', '.join(_END_OF_DOCUMENT)}; none is "
    f"among its {tokenizer.get_vocab_size()} tokens"
  )


def generation_ends(folder: epath.PathLike | None) -> tuple[int, ...]:
  """Returns the `eos_token_id` of generation_config.json, which may be several; () for none.

  Raises:
    ValueError: if it is not an id or a list of ids.
  """
  given = read_settings(folder, GENERATION_FILE).get("eos_token_id")
  ends = given if isinstance(given, list) else [] if given is None else [given]
  if not all(type(end) is int and 0 <= end < 2**31 for end in ends):
    path = epath.Path(folder or "") / GENERATION_FILE
    raise ValueError(f"eos_token_id of {path} must be ids of tokens, got {given!r}")
  return tuple(ends)


def known_ends(tokenizer: Tokenizer) -> tuple[int, ...]:
  """Returns the special tokens whose known names say that they end a document, in order."""
  added = tokenizer.get_added_tokens_decoder()
  special = {entry.content: token for token, entry in added.items() if entry.special}
  return tuple(special[name] for name in _END_OF_DOCUMENT if name in special)


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


def bos_ids(tokenizer: Tokenizer, folder: epath.PathLike | None = None) -> tuple[int, ...]:
  """Returns the ids that belong before a text that a model continues; () for none.

  They are what the tokenizer's own post-processor puts before a text, whatever it puts behind it.
  Where it puts nothing, `add_bos_token` in tokenizer_config.json asks for `bos_token`: with
  transformers 4 the tokenizer's class added it; transformers 5 saves the post-processor instead.

  Raises:
    ValueError: if a file is not a JSON object, or the token does not exist.

  Source: transformers 5.23, `PreTrainedTokenizerBase._from_pretrained`, which drops
  `add_bos_token` where there is a tokenizer.json.
  """
  encoding = tokenizer.encode("a")
  added = itertools.takewhile(lambda pair: pair[1], zip(encoding.ids, encoding.special_tokens_mask))
  if ids := tuple(token for token, _ in added):
    return ids
  settings = read_settings(folder, CONFIG_FILE)
  name = special_tokens(settings).get("bos_token", "")
  if not name or settings.get("add_bos_token") is not True:
    return ()
  token = tokenizer.token_to_id(name)
  if token is None:
    path = epath.Path(folder or "") / CONFIG_FILE
    raise ValueError(f"bos_token of {path} must be one of the tokenizer's tokens, got {name!r}")
  return (token,)


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
