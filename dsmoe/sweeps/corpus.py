"""One tokenised corpus for all trials of a sweep, whose losses are of the same rows."""

import os
from collections.abc import Callable, Iterable

from etils import epath

from dsmoe.config import Config
from dsmoe.data import records
from dsmoe.data.folder import ChangedDataError

DATA = "data"
# Fields on which the tokenised corpus, or the validation rows, depend: losses of trials in which they
# differ could not be compared.
FIELDS = (
  "data.train_globs",
  "data.validation_globs",
  "data.text_field",
  "data.tokenizer",
  "data.skip_null_rows",
  "data.eos_token",
  "data.sequence_length",
  "log.eval_batches",
  "model.vocab_size",
)


def check_drawn(drawn: Iterable[str], fields: Iterable[str]) -> None:
  """Raises ValueError where a point that is drawn late would have losses of other rows than the rest.

  Args:
    drawn: the fields of the point.
    fields: those that the sweep is known to search, which `check` has seen.
  """
  late = sorted(set(drawn) - set(fields))
  if found := [f for f in late if f in (*FIELDS, "data.cache_dir")]:
    raise ValueError(f"a sweep must not search {', '.join(found)}, which this point sets")
  if "batch_size" in late:
    raise ValueError(
      "a search must set batch_size in all its points or in none, because the losses of other batches "
      "are compared on the whole validation set; this point sets it, the first ones do not"
    )


def check(config: Config, workdir: epath.PathLike, fields: tuple[str, ...]) -> None:
  """Raises ValueError where trials' losses would be of other rows, or the corpus would have no place."""
  if "data.cache_dir" in fields:
    raise ValueError("a sweep must not search data.cache_dir, which is a place and no parameter")
  if found := [field for field in fields if field in FIELDS]:
    raise ValueError(
      f"a sweep must not search {', '.join(found)}: its trials' losses would be of other text, tokens or "
      "rows, and could not be compared"
    )
  if "://" in os.fspath(workdir) and not config.data.cache_dir:
    raise ValueError(
      "the tokenised text is read from a disk only: with a sweep in an object store data.cache_dir "
      "must be a folder on each host's disk, add --config.data.cache_dir=/tmp/data, say"
    )


def prepare(config: Config, workdir: epath.PathLike, say: Callable[[str], None]) -> str:
  """Tokenises the corpus of a sweep, or checks it; returns the digest that stands for it.

  Args:
    config: of any trial, in which the corpus is the same.
    workdir: the sweep's.
    say: takes a sentence for the user, because this can take long.

  Raises:
    ValueError: see `records.prepare`.
  """
  records.find_sources(config.data)
  place = epath.Path(config.data.cache_dir or epath.Path(workdir) / DATA).expanduser()
  is_there = (place / "manifest.json").exists()
  say(f"{'checking the text of' if is_there else 'tokenising the text into'} {place}")
  return records.digest(records.prepare(config.data, config.model.vocab_size, place))


def check_unchanged(
  config: Config, workdir: epath.PathLike, digest: str, say: Callable[[str], None]
) -> None:
  """Raises ChangedDataError where the corpus is not the one of `digest`, with which the sweep began."""
  rule = "the text of a sweep must stay as it was when the sweep began"
  try:
    found = prepare(config, workdir, say)
  except ValueError as error:
    raise ChangedDataError(f"{rule}: {error}") from error
  if found != digest:
    raise ChangedDataError(f"{rule}, its digest was {digest} and is {found}")


def link(config: Config, workdir: epath.PathLike, trial: epath.Path) -> None:
  """Makes the folder `data` of a trial's workdir the one that it shares with all others.

  A link, not the config's data.cache_dir, so that a sweep can be moved and seen under another path.
  """
  if config.data.cache_dir:
    return
  (epath.Path(workdir) / DATA).mkdir(parents=True, exist_ok=True)
  trial.mkdir(parents=True, exist_ok=True)
  place = trial / DATA
  if not os.path.lexists(place):
    os.symlink(os.path.relpath(epath.Path(workdir) / DATA, trial), place, target_is_directory=True)
