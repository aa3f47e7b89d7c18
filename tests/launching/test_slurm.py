"""The script for sbatch: its settings, and when it has itself queued again."""

import os
import re
import signal
import time

import pytest

from dsmoe.launching import slurm, topology
from dsmoe.launching.run import Run
from tests.launching import fake_tools

RUN = Run("my-run", "experiments/tiny.py", "runs/my run", ("--config.seed=3",), {"A": "b c"}, 2)
OPTIONS = slurm.Options("12:00:00", None, "acc", "node", None, "", 240)
# As the real one it kills the tasks when it is told to end, and ends as they do.
SRUN = """
printf "%s\\n" "$@" > srun.txt
env > env.txt
shift 3
bash -c 'echo $$ > task.pid; exec "$@"' srun "$@" & task=$!
trap 'kill -KILL $task' TERM
wait $task; code=$?
while kill -0 $task 2>/dev/null; do wait $task; code=$?; done
exit $code
"""
# A signal goes to the tasks.
SCANCEL = '[ "$*" = "--signal=TERM 42" ] && kill -TERM "$(cat task.pid)"'
SCONTROL = 'echo "$@" >> scontrol.txt'


def script(text="h100:4x8", **options) -> str:
  where = topology.parse(text)
  return slurm.script(RUN, where, OPTIONS.__class__(**vars(OPTIONS) | options))


def settings(text: str) -> dict[str, str]:
  found = re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", text, re.MULTILINE)
  assert len(found) == len(dict(found))
  return dict(found)


def test_settings_of_the_job():
  assert settings(script(partition="gpus")) == {
    "job-name": "my-run",
    "nodes": "4",
    "ntasks-per-node": "1",
    "gpus-per-node": "8",
    "time": "12:00:00",
    "partition": "gpus",
    "account": "acc",
    "output": "my-run-%j.log",
    "open-mode": "append",
    "signal": "B:USR1@240",
    "requeue": "",
  }
  one_each = settings(script(tasks="gpu", time_limit=None))
  assert one_each["ntasks-per-node"] == "8" and "time" not in one_each
  cpus = settings(script("cpu:3x2"))
  assert (cpus["nodes"], cpus["ntasks-per-node"]) == ("3", "1") and "gpus-per-node" not in cpus


def start(folder, text, **env):
  tools = fake_tools.put(
    folder / "bin",
    python=fake_tools.PYTHON,
    srun=SRUN,
    scontrol=SCONTROL,
    scancel=SCANCEL,
    apptainer='shift 3\n"$@"',
  )
  job = {"SLURM_JOB_ID": "42", "SLURM_JOB_NAME": "my-run"}
  return fake_tools.start(text, tools | job | env, folder)


def test_srun_is_given_the_run(tmp_path):
  process = start(tmp_path, script(setup="export FROM_SETUP=yes"))
  out, err = process.communicate(timeout=60)
  assert process.returncode == 0, err
  assert out.splitlines() == RUN.argv("python")[1:]
  env = (tmp_path / "env.txt").read_text().splitlines()
  assert {"A=b c", "FROM_SETUP=yes", "JAX_LOCAL_DEVICE_IDS=0,1,2,3,4,5,6,7"} <= set(env)
  start(tmp_path, script(tasks="gpu")).communicate(timeout=60)
  assert "JAX_LOCAL_DEVICE_IDS" not in (tmp_path / "env.txt").read_text()  # JAX takes its own


def test_containers(tmp_path):
  start(tmp_path, script(container="image.sif")).communicate(timeout=60)
  words = (tmp_path / "srun.txt").read_text().splitlines()
  assert words[3:7] == ["apptainer", "exec", "--nv", "image.sif"]
  assert "--container-image=nvcr.io/x:1 python -m dsmoe.train" in script(container="nvcr.io/x:1")


@pytest.mark.parametrize(
  "code, again", [(0, False), (1, False), (2, False), (75, True), (130, False), (137, True)]
)
def test_the_job_is_queued_again_after_failures_that_pass(tmp_path, code, again):
  for count in range(1, 5):
    process = start(tmp_path, script(), CODE=str(code))
    _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    queued = tmp_path / "scontrol.txt"
    lines = queued.read_text().splitlines() if queued.exists() else []
    assert lines == ["requeue 42"] * (min(count, RUN.max_restarts) if again else 0)
    if not again:
      return
  assert "no more than 2 restarts, see my-run-42.failures" in err


@pytest.mark.parametrize(
  "number, code, again", [(signal.SIGUSR1, 0, True), (signal.SIGTERM, 0, False)]
)
def test_the_job_saves_before_its_time_limit_and_is_queued_again(tmp_path, number, code, again):
  """As often as it takes; one that scancel ends is not."""
  for count in range(1, 4):
    process = start(tmp_path, script(), CODE_AFTER_TERM=str(code))
    while not (tmp_path / "waiting").exists() and process.poll() is None:
      time.sleep(0.01)
    process.send_signal(number)
    if number == signal.SIGTERM:  # `scancel 42` signals the script and the tasks
      os.kill(int((tmp_path / "task.pid").read_text()), signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code and "terminated" in out.splitlines(), err
    queued = tmp_path / "scontrol.txt"
    assert queued.exists() == again
    if again:
      assert queued.read_text().splitlines() == ["requeue 42"] * count
    (tmp_path / "waiting").unlink()
