"""Turns the tokenizer of Moonlight and Kimi K2, as they are published, into a tokenizer.json.

Those folders have `tiktoken.model` (a line for each token: its bytes in base64, its rank) and a
Python file that splits texts by a regular expression. The expression is read from that file's
source, which is not run.
"""

import ast
import base64
import pathlib
from collections.abc import Iterator

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from dsmoe.data import tokenizer as tokenizer_lib
from dsmoe.huggingface.config import fail
from dsmoe.inference.detokenize import byte_characters

FILE = "tiktoken.model"
_PATTERN = "pat_str"  # the name of the expression in the Python file


def convert(folder: pathlib.Path) -> Tokenizer:
  """Makes a tokenizer that gives the ids which the folder's own Python file gives.

  Special tokens are those of `added_tokens_decoder` in tokenizer_config.json. The reserved ones,
  which have no name there, are left out.

  Args:
    folder: with tiktoken.model, tokenizer_config.json and tokenization_*.py.

  Raises:
    ValueError: when a file is missing or of another form.
  """
  ranks = _ranks(folder / FILE)
  pattern = _pattern(folder)
  name_of = {byte: character for character, byte in byte_characters().items()}
  names = {token: "".join(name_of[byte] for byte in token) for token in ranks}
  vocabulary = {names[token]: rank for token, rank in ranks.items()}
  special = _special_tokens(folder)
  for token, entry in special.items():
    if entry.content in vocabulary or token in ranks.values():
      fail(f"special token {token}, {entry.content!r}, must not be one of those in {folder / FILE}")
    vocabulary[entry.content] = token
  # All pairs that make a token, in the order in which tiktoken would join them.
  pairs = (pair for token in sorted(ranks, key=ranks.__getitem__) for pair in _pairs(token, ranks))
  merges = [(names[a], names[b]) for a, b in pairs]
  tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(Regex(pattern), "isolated"),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )
  tokenizer.decoder = decoders.ByteLevel()
  tokenizer.add_tokens([special[token] for token in sorted(special)])
  return tokenizer


def _ranks(path: pathlib.Path) -> dict[bytes, int]:
  """Reads the tokens and their ranks, which are their ids."""
  ranks: dict[bytes, int] = {}
  try:
    for line in path.read_bytes().split(b"\n"):
      if line.strip():
        token, rank = line.split()
        ranks[base64.b64decode(token, validate=True)] = int(rank)
  except ValueError as error:
    raise ValueError(f"{path} must have a token in base64 and its rank a line: {error}") from error
  lacking = [byte for byte in range(256) if bytes([byte]) not in ranks]
  if lacking or sorted(ranks.values()) != list(range(len(ranks))):
    fail(f"{path} must have all 256 bytes, and the ranks from 0 to {len(ranks) - 1} once each")
  return ranks


def _pairs(token: bytes, ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
  """Returns the pairs of tokens that make a token, those of the lowest ranks first."""
  pairs = [(token[:i], token[i:]) for i in range(1, len(token))]
  pairs = [(a, b) for a, b in pairs if a in ranks and b in ranks]
  return sorted(pairs, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))


def _pattern(folder: pathlib.Path) -> str:
  """Returns the regular expression of the folder's Python file."""
  paths = sorted(folder.glob("tokenization_*.py"))
  for path in paths:
    try:
      tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError) as error:
      raise ValueError(f"{path} must be Python: {error}") from error
    for value in _assigned(tree):
      if isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute) and value.args:
        separator, parts = value.func.value, value.args[0]  # "|".join([...])
        if value.func.attr == "join" and isinstance(separator, ast.Constant):
          try:
            return str(separator.value).join(ast.literal_eval(parts))
          except (ValueError, TypeError):
            break
      elif isinstance(value, ast.Constant) and isinstance(value.value, str):
        return value.value
  fail(
    f"one of {folder}/tokenization_*.py must set {_PATTERN} to a string, or to the parts that "
    f"'|' joins, got {[path.name for path in paths]}"
  )


def _assigned(tree: ast.AST) -> Iterator[ast.expr]:
  """Yields what is assigned to `_PATTERN`."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Assign):
      if any(isinstance(name, ast.Name) and name.id == _PATTERN for name in node.targets):
        yield node.value


def _special_tokens(folder: pathlib.Path) -> dict[int, AddedToken]:
  """Returns the special tokens of tokenizer_config.json by id."""
  settings = tokenizer_lib.read_settings(folder, tokenizer_lib.CONFIG_FILE)
  given = settings.get("added_tokens_decoder")
  try:
    if not isinstance(given, dict) or not given:
      raise TypeError("no object")
    return {
      int(token): AddedToken(entry["content"], normalized=False, special=bool(entry["special"]))
      for token, entry in given.items()
    }
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(
      f"{folder / tokenizer_lib.CONFIG_FILE} must have an added_tokens_decoder with `content` and "
      f"`special` of every special token, got {str(given)[:80]}"
    ) from error
