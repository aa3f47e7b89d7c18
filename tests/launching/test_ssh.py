"""Processes on hosts that ssh reaches; an ssh that runs here stands for the real one."""

import signal
import time

import pytest

from dsmoe.launching import ssh, topology
from dsmoe.launching.run import Run
from tests.launching import fake_tools

RUN = Run("my-run", "experiments/tiny.py", "/shared/my run", ("--config.seed=3",), {"A": "b c"}, 2)
# Like ssh, it gives the words, joined by blanks, to the user's shell; that need not be bash.
SSH = 'echo "$1 $2 $3" >> hosts.txt\nshift 3\nexec sh -c "$*"'


def options(*hosts, **fields) -> ssh.Options:
  return ssh.Options(hosts, **{"folder": ".", "setup": "", "port": 8476} | fields)


def test_each_host_runs_one_process(tmp_path):
  folder = tmp_path / "a folder"
  folder.mkdir()
  env = fake_tools.put(tmp_path / "bin", ssh=SSH, python=f"{fake_tools.PYTHON}")
  given = options("ann@one", "two", folder=str(folder), setup="echo setup $A", port=9)
  process = fake_tools.start(ssh.script(RUN, given), env | {"CODE": "2"}, tmp_path)
  out, err = process.communicate(timeout=60)
  assert process.returncode == 2, err
  hosts = sorted((tmp_path / "hosts.txt").read_text().splitlines())
  assert hosts == ["-o BatchMode=yes ann@one", "-o BatchMode=yes two"]
  said = out.splitlines()
  assert said.count("setup") == 2  # before the variables, and in their folder
  for word in (*RUN.argv("python")[1:], "--coordinator=one:9", "--num_processes=2"):
    assert said.count(word) == 2
  assert {"--process_id=0", "--process_id=1"} <= set(said)


def test_sigterm_reaches_every_host(tmp_path):
  env = fake_tools.put(tmp_path / "bin", ssh=SSH, python=fake_tools.PYTHON + "exit 9")
  given = options("one", "two", "three", folder=str(tmp_path))
  python = 'trap "echo terminated; exit 0" TERM; touch $$.up; for ((i = 0; i < 999; i++)); do sleep 0.05; done'
  env = fake_tools.put(tmp_path / "bin", python=python) | {"PATH": env["PATH"]}
  process = fake_tools.start(ssh.script(RUN, given), env, tmp_path)
  while len(list(tmp_path.glob("*.up"))) < 3 and process.poll() is None:
    time.sleep(0.01)
  process.send_signal(signal.SIGTERM)
  out, err = process.communicate(timeout=60)
  assert process.returncode == 0, err
  assert out.splitlines() == ["terminated"] * 3


def test_one_host_needs_no_coordinator():
  [command] = ssh.commands(RUN, options("one"))
  assert command.held and "--coordinator" not in command.argv[-1]


@pytest.mark.parametrize(
  "hosts, where, message",
  [
    (("a", ""), None, "--hosts must name hosts as ssh takes them, as a,b or user@a, got ''"),
    (("-oProxyCommand=x",), None, "got '-oProxyCommand=x'"),
    (("a", "b"), "h100:3x8", "must name the 3 hosts of h100:3x8, 24 devices on 3 hosts, got 2"),
  ],
)
def test_wrong_hosts_are_refused(hosts, where, message):
  with pytest.raises(ValueError, match=message):
    ssh.check_hosts(hosts, where and topology.parse(where))
