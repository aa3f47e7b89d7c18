"""The flag --json and one-sentence errors, in a script of its own."""

import json
import logging
import os

import pytest

from dsmoe.reporting import output
from tests import runs

SCRIPT = """
from absl import app, flags, logging
from etils import epath
from ml_collections import config_flags
from dsmoe.reporting import output

_JSON = output.define_json()
_RAISE = flags.DEFINE_enum("raise", None, ["usage", "value", "file", "type", "path", "package"], "What to raise.")
_CONFIG = config_flags.DEFINE_config_file("config", None, "A config.")

def main(argv):
  output.refuse_arguments(argv)
  if _RAISE.value == "usage":
    raise app.UsageError("--a goes with --b")
  if _RAISE.value == "value":
    raise ValueError("n (3) must be even\\nand positive")
  if _RAISE.value == "file":
    open("/nowhere/at/all")
  if _RAISE.value in ("path", "package"):
    epath.Path({"path": "hdfs://a", "package": "az://a"}[_RAISE.value]).exists()
  if _RAISE.value == "type":
    raise TypeError("a defect")
  logging.info("no TPU was found")
  logging.warning("a file is missing")
  if _CONFIG.value is not None:
    print(_CONFIG.value.num_steps)
  output.write_json(_JSON.value, {"rows": [1, 2]})
  if _JSON.value != output.STDOUT:
    print("a table")

if __name__ == "__main__":
  output.run_script(main)
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory):
  path = tmp_path_factory.mktemp("scripts") / "measure.py"
  path.write_text(SCRIPT)
  return path


def test_json_goes_to_a_file_beside_the_table(script, tmp_path):
  assert runs.run(script, f"--json={tmp_path}/rows.json") == "a table\n"
  assert json.loads((tmp_path / "rows.json").read_text()) == {"rows": [1, 2]}


def test_json_is_all_that_stdout_gets(script):
  assert json.loads(runs.run(script, "--json=-")) == {"rows": [1, 2]}


def test_without_json_there_is_the_table_only(script):
  assert runs.run(script) == "a table\n"


def test_warnings_are_logged_and_what_is_below_them_is_not(script):
  code, _, err = runs.call(script)
  assert code == 0 and "a file is missing" in err and "no TPU was found" not in err


@pytest.mark.parametrize(
  "args, message",
  [
    (("--raise=usage",), "--a goes with --b"),
    (("--raise=value",), "n (3) must be even and positive"),
    (("--raise=file",), "[Errno 2] No such file or directory: '/nowhere/at/all'"),
    (("--raise=path",), "a path must be on disk or on gs://, got hdfs://"),
    (("--raise=package",), "a path must be on a file system with its package: Install adlfs to"),
    (("more",), "only flags may be given, got 'more'"),
    (("--json=",), "flag --json=: the folder of the file must exist"),
    (("--json=/nowhere/a.json",), "flag --json=/nowhere/a.json: the folder of the file must"),
    (("--rise=value",), "Unknown command line flag 'rise'"),
    (
      ("--raise=some",),
      "flag --raise=some: value should be one of <usage|value|file|type|path|package>",
    ),
    (("--config=/nowhere.py",), "experiments/tiny.py, there is no '/nowhere.py'"),
    (("experiments/tiny.py", "--rise"), "a flag begins with --, got 'experiments/tiny.py'"),
    (("--batch_size=3",), "'batch_size'; the field may be --config.batch_size"),
    (("--config=tests/helpers.py",), "module 'config_config' has no attribute 'get_config'"),
    (("--config=experiments/tiny.py:arg",), "TypeError: get_config() takes 0 positional"),
    (("--config=experiments/tiny.py", "--config.stepps=1"), "a field of the config, got "),
    (("--config=experiments/tiny.py", "--config.num_steps=1.5"), "--config.num_steps=1.5"),
    (
      ("--config=experiments/tiny.py", "--config.hidden_size=8"),
      "; the field may be --config.model.hidden_size",
    ),
    (
      ("--config=experiments/tiny.py", "--config.model.hidden_size=a"),
      "flag --config.model.hidden",
    ),
  ],
)
def test_mistakes_end_in_one_sentence(script, args, message):
  found, out, err = runs.call(script, *args)
  assert (found, out) == (2, "")
  [line] = err.splitlines()
  assert line.startswith("error: ") and message in line


def test_help_that_nobody_reads_to_the_end_is_no_mistake(script):
  process = runs.start(script, "--help", env={"PYTHONUNBUFFERED": "1"})
  process.stdout.close()
  assert process.stderr.read() == ""
  assert process.wait(runs.LIMIT_SECS) == 1


@pytest.mark.parametrize(
  "args",
  [
    ("--raise=type",),
    ("--raise=value", "--traceback"),
    ("--config=experiments/tiny.py", "--config.stepps=1", "--traceback"),
  ],
)
def test_defects_and_what_is_asked_for_keep_their_traceback(script, args):
  code, _, err = runs.call(script, *args)
  assert code == 1 and "Traceback" in err


@pytest.mark.parametrize(
  "error, sentence",
  [
    (AttributeError("'\\'size\\'\\nDid you mean \"sizes\"?'"), "'size' Did you mean \"sizes\"?"),
    (KeyError("sizes"), "sizes"),
    (ValueError("'a' must be one of 'b'"), "'a' must be one of 'b'"),
    (AttributeError("'a' has no 'b'"), "'a' has no 'b'"),
    (ValueError(""), "ValueError"),
  ],
)
def test_a_message_is_one_line_without_quoting(error, sentence):
  assert output._sentence(error) == sentence


@pytest.mark.parametrize(
  "level, text, is_logged",
  [
    (logging.WARNING, "[process=%d] Reached preemption sync point, step=3", False),
    (logging.ERROR, "[process=%d] Reached preemption sync point, step=3", True),
    (logging.WARNING, "[process=%d] cannot be read", True),
  ],
)
def test_what_orbax_says_of_a_stop_is_not_logged(level, text, is_logged):
  record = logging.LogRecord("absl", level, "multihost.py", 436, text, (1,), None)
  assert output._is_worth_logging(record) == is_logged


def test_what_is_measured_so_far_replaces_the_file_at_once(tmp_path, capsys):
  path = tmp_path / "a.json"
  output.write_json_so_far(str(path), [1])
  output.write_json_so_far(str(path), [1, 2])
  assert json.loads(path.read_text()) == [1, 2]
  assert [one.name for one in tmp_path.iterdir()] == ["a.json"]
  pipe = tmp_path / "pipe"
  os.mkfifo(pipe)
  for nowhere in (str(pipe), output.STDOUT, None):
    output.write_json_so_far(nowhere, [1])  # would wait for ever if it wrote into the pipe
  assert capsys.readouterr().out == "" and len(list(tmp_path.iterdir())) == 2
