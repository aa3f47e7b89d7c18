"""What every script has in common: the flag --json, and errors that end in one sentence."""

import ast
import contextlib
import json
import pathlib
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from absl import app, flags
from etils import epath

STDOUT = "-"


def define_json() -> flags.FlagHolder[str | None]:
  """Defines --json: the file for a script's results, `-` for stdout, by default none.

  Its folder is checked when flags are parsed, so that no measurement ends without a place for it.
  """
  flags.disclaim_key_flags()  # --help lists the flag under the script that calls this
  holder = flags.DEFINE_string(
    "json", None, "File for the results as JSON; - writes them to stdout, and nothing else there."
  )
  flags.register_validator(holder, _has_folder, "the folder of the file must exist")
  flags.register_validator(holder, _is_no_folder, "it must name a file, not a folder")
  return holder


def _has_folder(path: str | None) -> bool:
  return path is None or path == STDOUT or (path != "" and epath.Path(path).parent.is_dir())


def _is_no_folder(path: str | None) -> bool:
  return path is None or path == STDOUT or not epath.Path(path).is_dir()


def write_json(path: str | None, value: Any) -> None:
  """Writes a value as JSON to the place that --json names.

  Args:
    path: the flag's value. With `-` the caller must print nothing else to stdout; with None
      nothing is written.
    value: what `json.dumps` takes.
  """
  if path is None:
    return
  text = json.dumps(value, indent=2) + "\n"
  if path == STDOUT:
    sys.stdout.write(text)
  else:
    epath.Path(path).write_text(text)


def run_script(main: Callable[[list[str]], Any]) -> None:
  """Parses the flags and calls `main`; the user's mistakes end in one sentence on stderr.

  Wrong flags (among them what `main` raises as `app.UsageError`) exit with code 2, wrong inputs
  (`ValueError` and `OSError`) with code 1, neither with a traceback. With --verbosity=1 an error
  of `main` is raised as it is. Other exceptions are defects of the program and keep their
  traceback.

  Args:
    main: called with the arguments that are not flags, the script's name first.
  """

  def guarded(argv: list[str]) -> Any:
    debugging = flags.FLAGS.verbosity >= 1
    try:
      return main(argv)
    except app.UsageError as error:
      fail(_sentence(error), 2)
    except (ValueError, OSError) as error:
      if debugging:
        raise
      fail(_sentence(error))

  app.run(guarded, flags_parser=_parse_flags)


def refuse_arguments(argv: list[str]) -> None:
  """Raises app.UsageError if there are arguments that are not flags."""
  if len(argv) > 1:
    raise app.UsageError(f"only flags may be given, got {' '.join(argv[1:])!r}")


def fail(sentence: str, code: int = 1) -> NoReturn:
  """Prints the script's name and one sentence to stderr, and exits."""
  print(f"{pathlib.Path(sys.argv[0]).stem}: {sentence}", file=sys.stderr)
  sys.exit(code)


def _parse_flags(argv: list[str]) -> list[str]:
  """Parses flags; a config's loading runs in here, so that whatever it raises is a wrong flag."""
  try:
    return flags.FLAGS(argv)
  except AttributeError as error:  # how ml_collections refuses --config.<unknown>
    fail(f"a flag must name a field of the config, got {_sentence(error)}", 2)
  except Exception as error:
    fail(_sentence(error), 2)


def _sentence(error: Exception) -> str:
  """Returns an error's message in one line; of a traceback inside it, what was raised."""
  text = str(error)
  if isinstance(error, AttributeError | KeyError):
    with contextlib.suppress(ValueError, SyntaxError):
      text = str(ast.literal_eval(text))  # a KeyError's message is quoted, its line ends escaped
  lines = [line.strip() for line in text.splitlines() if line.strip()]
  begin = next((n for n, line in enumerate(lines) if line.startswith("Traceback")), None)
  if begin is not None:
    lines = [*lines[:begin], lines[-1]]
  return " ".join(lines) or type(error).__name__
