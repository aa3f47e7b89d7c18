"""The text side of a checkpoint: tokenizer files, and the special tokens of config.json."""

import json
import pathlib
import shutil
from typing import Any

from absl import logging

from dsmoe.config import ModelConfig
from dsmoe.data import tokenizer as tokenizer_lib
from dsmoe.huggingface import tiktoken
from dsmoe.huggingface.files import read_json

# Files that are copied. Moonlight and Kimi K2 have the last two instead of the first.
FILES = (
  "tokenizer.json",
  "tokenizer_config.json",
  "generation_config.json",
  "chat_template.jinja",
  "special_tokens_map.json",
  "added_tokens.json",
  "tiktoken.model",
  "tokenization_*.py",
)
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def copy(source: pathlib.Path, target: pathlib.Path) -> None:
  """Copies those of `FILES` that exist."""
  target.mkdir(exist_ok=True)
  for pattern in FILES:
    for path in source.glob(pattern):
      shutil.copyfile(path, target / path.name)


def converted(folder: pathlib.Path, vocab_size: int) -> str | None:
  """Returns a tokenizer.json made of tiktoken.model if a folder has only that; None if not.

  If it is of a form that is not supported, a warning says that the weights go without it.
  """
  if (folder / tokenizer_lib.FILE).exists() or not (folder / tiktoken.FILE).exists():
    return None
  try:
    tokenizer = tiktoken.convert(folder)
    tokenizer_lib.check_vocabulary(tokenizer, vocab_size)
  except ValueError as error:
    logging.warning("the weights are imported without a tokenizer.json: %s", error)
    return None
  return tokenizer.to_str(pretty=True)


def generation_tokens(folder: pathlib.Path) -> dict[str, Any] | None:
  """Returns the special tokens of generation_config.json; None if there is no such file.

  Raises:
    ValueError: when it is not a JSON object.
  """
  path = folder / "generation_config.json"
  if not path.exists():
    return None
  given = read_json(path)
  return {name: given[name] for name in TOKENS if name in given}


def settings(folder: pathlib.Path, config: ModelConfig) -> tuple[dict[str, Any], dict[str, str]]:
  """Returns the special tokens for config.json, and files to write beside `FILES`.

  Args:
    folder: the tokenizer's folder; it may lack a tokenizer.
    config: the model's config.

  Raises:
    ValueError: if the tokenizer is broken or has more tokens than the model.
  """
  tokens, path = generation_tokens(folder), folder / "tokenizer.json"
  if tokens is not None or not path.exists():
    return tokens or {}, {}
  tokenizer = tokenizer_lib.read_tokenizer(path)
  tokenizer_lib.read_settings(folder, tokenizer_lib.CONFIG_FILE)  # raises if it is broken
  tokenizer_lib.check_vocabulary(tokenizer, config.vocab_size)
  tokens, known = {}, {}
  try:
    end = tokenizer_lib.eos_id(tokenizer, folder)
    begin = (*tokenizer_lib.bos_ids(tokenizer, folder), None)[0]
    tokens = {"bos_token_id": begin, "eos_token_id": end}
    known = {"eos_token": tokenizer.id_to_token(end)}
  except ValueError:
    pass  # nothing says which token ends a document: leave it out
  if (folder / "tokenizer_config.json").exists():
    return tokens, {}
  # A tokenizer that was trained here.
  own: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **known}
  own["model_max_length"] = config.max_position_embeddings
  return tokens, {"tokenizer_config.json": json.dumps(own, indent=2)}
