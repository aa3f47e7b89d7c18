"""What a new run takes from the run whose weights it starts with, besides the weights."""

import dataclasses

from absl import logging
from etils import epath

from dsmoe.checkpoint.run_config import load_config
from dsmoe.config import Config
from dsmoe.data import sources
from dsmoe.data import tokenizer as tokenizer_lib


def tokenizer_path(config: Config, workdir: epath.PathLike) -> epath.Path:
  """Returns where a run has its tokenizer.json; one whose data is synthetic has none there.

  A workdir that has one itself needs no `data.cache_dir`, which may be on another host: see `copies`.
  """
  own = epath.Path(workdir) / "data" / tokenizer_lib.FILE
  if own.exists():
    return own
  return epath.Path(config.data.cache_dir or own.parent).expanduser() / tokenizer_lib.FILE


def with_tokenizer_of(
  config: Config, source: epath.PathLike, allow_other_tokenizer: bool = False
) -> Config:
  """Returns the config with the tokenizer that the weights of another run were trained with.

  Preparing the data copies the tokenizer with the files beside it, such as the chat template.

  Args:
    config: the new run's.
    source: the workdir, of a run or imported, whose weights it starts with.
    allow_other_tokenizer: leave the config as it is.

  Raises:
    ValueError: when `source` holds no run; when `data.tokenizer` is another tokenizer than the
      source's, or ends documents with another token; when text is to be read, and neither names a
      tokenizer.
  """
  theirs = tokenizer_path(load_config(source), source)
  globs = (*config.data.train_globs, *config.data.validation_globs)
  if allow_other_tokenizer or all(name == sources.SYNTHETIC for name in globs):
    return config
  allow = "pass --allow_other_tokenizer"
  if not theirs.exists():
    if config.data.tokenizer:
      logging.warning(
        "data.tokenizer cannot be compared with that of the weights in %s: %s does not exist",
        *(source, theirs),
      )
      return config
    raise ValueError(
      f"data.tokenizer must be the tokenizer.json that the weights in {source} were trained with, "
      f"which {theirs.parent} does not have; to train a new one, {allow}"
    )
  if not config.data.tokenizer:
    return dataclasses.replace(
      config, data=dataclasses.replace(config.data, tokenizer=str(theirs), eos_token="")
    )
  ours = epath.Path(config.data.tokenizer).expanduser()
  tokenizers = [tokenizer_lib.read_tokenizer(path) for path in (ours, theirs)]
  end = tokenizer_lib.eos_id(tokenizers[0], tokenizer_lib.folder_of(ours), config.data.eos_token)
  its_end = tokenizer_lib.eos_id(tokenizers[1], theirs.parent)
  if tokenizers[0].to_str() != tokenizers[1].to_str():
    raise ValueError(
      f"data.tokenizer must be the tokenizer of the weights in {source}, {ours} differs from "
      f"{theirs}: leave it empty to take that one, or {allow}"
    )
  if end != its_end:
    raise ValueError(
      f"documents must end with the token that the weights in {source} know, "
      f"{tokenizers[0].id_to_token(its_end)!r}, got {tokenizers[0].id_to_token(end)!r} from "
      f"{ours} and data.eos_token: leave both empty to take those of {theirs}, or {allow}"
    )
  return config
