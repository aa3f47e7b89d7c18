"""What every script has in common: the flag --json, and errors that end in one sentence."""

import ast
import contextlib
import dataclasses
import itertools
import json
import os
import re
import sys
from collections.abc import Callable
from logging import WARNING
from typing import Any, NoReturn

from absl import app, flags, logging
from etils import epath

from dsmoe.config import Config
from dsmoe.parallel import processes, watch

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


def write_json_so_far(path: str | None, value: Any) -> None:
  """Writes what a script has measured so far, so that it outlives the script's end at any moment.

  The file is replaced at once: whoever reads it finds this value, or the one before. To `-`, and to
  what is no file, such as a pipe, nothing is written before `write_json` writes all of it.
  """
  if path is None or path == STDOUT:
    return
  file = epath.Path(path)
  if file.exists() and not file.is_file():
    return
  beside = file.with_name(f"{file.name}.part")
  write_json(str(beside), value)
  beside.replace(file)


def run_script(main: Callable[[list[str]], Any]) -> None:
  """Parses the flags and calls `main`; the user's mistakes end in one sentence on stderr.

  Wrong flags (also what `main` raises as `app.UsageError`) and wrong inputs (`ValueError`, `OSError`
  and paths on file systems that are not known here) end in `error: <sentence>` and exit code 2. With --traceback they are raised as they
  are. Other exceptions are defects of the program and keep their traceback.

  Args:
    main: called with the arguments that are not flags, the script's name first.
  """
  flags.disclaim_key_flags()  # --help lists the flag under the script that calls this
  flags.DEFINE_bool("traceback", False, "Show where in the code an error was raised.")

  def guarded(argv: list[str]) -> Any:
    # JAX tells, at INFO, of each platform that it looked for in vain.
    logging.set_verbosity(logging.WARNING)
    try:
      return main(argv)
    except (app.UsageError, ValueError, OSError) as error:
      processes.leave_if_alone(error)  # JAX raises ValueError too where a process is lost
      if flags.FLAGS.traceback:
        raise
      fail(_sentence(error))
    except (KeyError, ImportError) as error:
      if flags.FLAGS.traceback or not (reason := _unreachable(error)):
        raise
      fail(reason)

  logging.get_absl_logger().addFilter(_is_worth_logging)
  with watch.ending_together():
    app.run(guarded, flags_parser=_parse_flags)


def _is_worth_logging(record: Any) -> bool:
  """Whether a record is none of the warnings by which orbax says, several times, that a run stops."""
  return record.levelno > WARNING or "Reached preemption sync point" not in record.getMessage()


def refuse_arguments(argv: list[str]) -> None:
  """Raises app.UsageError if there are arguments that are not flags."""
  if len(argv) > 1:
    raise app.UsageError(f"only flags may be given, got {' '.join(argv[1:])!r}")


def fail(sentence: str, code: int = 2) -> NoReturn:
  """Prints `error: ` and one sentence to stderr, and exits; code 2 is for the user's mistakes."""
  print(f"error: {sentence}", file=sys.stderr)
  sys.exit(code)


def _parse_flags(argv: list[str]) -> list[str]:
  """Parses flags; a config's loading runs in here, so that whatever it raises is a wrong flag."""
  for argument in argv:
    path = argument.removeprefix("--config=").partition(":")[0]
    if argument.startswith("--config=") and not epath.Path(path).is_file():
      fail(f"--config must name a file such as experiments/tiny.py, there is no {path!r}")
  try:
    return flags.FLAGS(argv)
  except BrokenPipeError:  # of `--help | head`: nobody reads the rest, which is flushed at the exit
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(1)
  except Exception as error:
    if "--traceback" in argv:
      raise
    fail(_stray_argument(argv) or _flag_error(error, argv))


def _stray_argument(argv: list[str]) -> str | None:
  """Returns one sentence about an argument that was meant as a flag, where there is one."""
  for before, argument in itertools.pairwise(argv):
    follows_a_flag = before.startswith("-") and "=" not in before  # and may be its value
    is_odd = not argument.startswith("-") and ("=" in argument or argument.endswith(".py"))
    if is_odd and not follows_a_flag:
      return f"only flags may be given, and a flag begins with --, got {argument!r}"
  return None


def _flag_error(error: Exception, argv: list[str]) -> str:
  """Returns in one sentence why absl or ml_collections refused a flag."""
  text = _sentence(error)
  # How ml_collections refuses --config.<it>; a file without get_config is another mistake.
  if isinstance(error, AttributeError) and "'get_config'" not in text:
    text = text.replace(" Did you mean", "; did you mean")
    return f"a flag must name a field of the config, got {text}{_places(_unknown_field(argv))}"
  if absent := re.fullmatch(
    r"flag --(\S+)=None: Flag --\S+ must have a value other than None.", text
  ):
    return f"--{absent[1]} must be given"
  if absent := re.search(r"one of \((.*)\) must have a value other than None", text):
    return f"one of --{absent[1].replace(', ', ' and --')} must be given, and one only"
  if isinstance(error, flags.UnrecognizedFlagError):
    return text + _places(error.flagname.rpartition(".")[2])
  for argument in argv:
    name, _, value = argument.partition("=")
    if name.startswith("--config.") and text.endswith(f": {value!r}"):  # int()'s own message
      return f"flag {name}: {text}"
  return text


def _unknown_field(argv: list[str]) -> str:
  fields = (arg.partition("=")[0].rpartition(".")[2] for arg in argv if arg.startswith("--config."))
  return next((field for field in fields if _places(field)), "")


def _places(field: str) -> str:
  """Returns a hint at the flags that set a field of this name, or "" if there is none."""
  found = []
  for group in dataclasses.fields(Config):
    if group.name == field:
      found.append(f"--config.{field}")
    elif dataclasses.is_dataclass(group.type):
      names = {member.name for member in dataclasses.fields(group.type)}
      found += [f"--config.{group.name}.{field}"] if field in names else []
  return f"; the field may be {' or '.join(found)}" if found else ""


def _unreachable(error: KeyError | ImportError) -> str:
  """Returns what is wrong if etils has no access to a path's file system; "" for other errors."""
  if isinstance(error, KeyError):
    scheme = str((*error.args, "")[0])
    return f"a path must be on disk or on gs://, got {scheme}" if scheme.endswith("://") else ""
  # An import statement names its module, fsspec's request for a package does not.
  return "" if error.name else f"a path must be on a file system with its package: {error}"


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
