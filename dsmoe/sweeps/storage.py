"""Opens what keeps a sweep's trials: Optuna's journal in the workdir, or a PostgreSQL server."""

import time
import warnings
from typing import Any

from etils import epath

JOURNAL = "journal"
POSTGRESQL = "postgresql"
JOURNAL_FILE = "journal.log"
_CONNECT_SECS = 10


def optuna_package() -> Any:
  """Imports Optuna, which takes a second and is an extra.

  Raises:
    ValueError: where it is not installed.
  """
  try:
    import optuna
  except ImportError as error:
    raise ValueError(f'a sweep needs Optuna: pip install ".[sweep]" ({error})') from error
  optuna.logging.set_verbosity(optuna.logging.ERROR)
  warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
  return optuna


def kind_of(storage: str | None) -> str:
  """Returns which kind of storage --storage names; None is the journal.

  Raises:
    ValueError: for another form.
  """
  if storage is None:
    return JOURNAL
  if storage.partition("://")[0] not in ("postgresql", "postgres", "postgresql+psycopg"):
    scheme = storage.partition("://")[0] if "://" in storage else storage
    raise ValueError(f"--storage must be postgresql://USER@HOST:PORT/DATABASE, got {scheme!r}")
  return POSTGRESQL


class SilentStorageError(ValueError):
  """The storage has not answered for long; what it was to be told is not stored."""


def check_answers(workdir: epath.PathLike, storage: str) -> None:
  """Raises ValueError when a PostgreSQL server does not answer."""
  optuna_package()
  kind_of(storage)
  opened(epath.Path(workdir), storage, 0.0, creates=False)


def opened(workdir: epath.Path, storage: str | None, patience_secs: float, creates: bool) -> Any:
  """Opens the storage; a server is tried twice at least, and for as long as `patience_secs`.

  Args:
    workdir: the sweep's.
    storage: URL of a PostgreSQL server; None for the journal in `workdir`.
    patience_secs: see above.
    creates: whether the journal is created if absent.

  Raises:
    FileNotFoundError: for a journal that is absent and not to be created.
    ValueError: when the storage does not answer, or the journal is none.
  """
  if storage is None:
    from dsmoe.sweeps import journal

    if not creates and not (workdir / JOURNAL_FILE).exists():
      raise FileNotFoundError(workdir / JOURNAL_FILE)
    try:
      return journal.storage(str(workdir / JOURNAL_FILE))
    except Exception as error:
      raise ValueError(
        f"{workdir / JOURNAL_FILE} must be a journal of Optuna: {reason(error)}"
      ) from error
  import optuna
  import sqlalchemy

  url = sqlalchemy.make_url(storage).set(drivername="postgresql+psycopg")
  options = {"pool_pre_ping": True, "connect_args": {"connect_timeout": _CONNECT_SECS}}
  began, tries = time.monotonic(), 0
  while True:
    try:
      return optuna.storages.RDBStorage(url.render_as_string(hide_password=False), options)
    except ImportError as error:
      raise ValueError(f'--storage needs psycopg: pip install ".[sweep]" ({error})') from error
    except Exception as error:
      # Two machines that make the tables at once get in each other's way, once.
      tries += 1
      if tries > 1 and time.monotonic() - began > patience_secs:
        raise ValueError(
          f"--storage must be a PostgreSQL server that answers: {url.render_as_string()}: "
          f"{reason(error)}"
        ) from error
    time.sleep(1.0)


def reason(error: BaseException) -> str:
  """Returns the first line of the error that was at the bottom of another."""
  while error.__cause__ is not None:
    error = error.__cause__
  text = str(error).strip().splitlines()
  return text[0] if text else type(error).__name__
