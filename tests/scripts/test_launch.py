"""scripts/launch.py: what it renders and refuses, and runs that it starts here and by ssh."""

import json
import os
import pathlib
import re
import signal
import sys

import pytest
import yaml

from dsmoe.platforms import xla_flags
from dsmoe.reporting import metrics
from tests import runs
from tests.launching import fake_tools, schemas

WRONG = "--xla_tpu_enable_async_collective_fusion=true --xla_tpu_overlap_compute_collective_tc=true"
TINY = "--config=experiments/tiny.py"
ON_DISK = "--config.data.cache_dir=/tmp/data"
V3 = ("--config=experiments/deepseek_v3.py", "--config.batch_size=512", "--workdir=gs://b/v3")
V3 = (*V3, ON_DISK)


def launch(*args) -> tuple[int, str, str]:
  return runs.call("scripts/launch.py", *args)


def test_a_pod_run_is_rendered_to_a_folder(tmp_path):
  args = ("tpu", *V3, "--topology=v5p:8x8x8", "--image=i", "--cluster=c", f"--output={tmp_path}")
  code, out, err = launch(*args, "--env=A=1", "--env=B=x=y", "--", "--allow_config_change")
  assert (code, out) == (0, ""), err
  assert re.search(r"512 devices on 128 hosts, mesh data 64, expert 8: .* of 95.0 GiB", err)
  found = schemas.JobSet.model_validate(yaml.safe_load((tmp_path / "jobset.yaml").read_text()))
  assert found.metadata.name == "v3"
  pod = found.spec.replicatedJobs[0].template.spec.template.spec
  assert {"A": "1", "B": "x=y"}.items() <= {v.name: v.value for v in pod.containers[0].env}.items()
  train = f"python -m dsmoe.train {V3[0]} {V3[2]} {V3[1]} {ON_DISK} --allow_config_change &"
  assert train in pod.containers[0].command[2]
  assert {v.name: v.value for v in pod.containers[0].env}["DSMOE_RESTARTED"] == "1"
  assert (tmp_path / "xpk.sh").read_text().startswith("xpk workload create")


def test_the_plan_as_json():
  args = ("slurm", TINY, "--workdir=runs/x", "--topology=h100:1x8", "--json=-")
  code, out, err = launch(*args, "--config.batch_size=16")
  assert code == 0, err
  found = json.loads(out)
  assert found["plan"]["devices"] == 8 and found["plan"]["mesh"]["data"] == 8
  assert found["files"]["run.sbatch"].startswith("#!/bin/bash\n#SBATCH --job-name=x\n")


@pytest.mark.parametrize("way, files", [("local", "--num_processes=3"), ("ssh", "--hosts=a,b")])
def test_what_is_started_here_is_printed(way, files):
  code, out, err = launch(way, TINY, "--workdir=runs/x", files)
  assert (code, err) == (0, "") and out.startswith("#!/bin/bash\n")
  assert out.count("-m dsmoe.train --config=experiments/tiny.py --workdir=runs/x") == (
    3 if way == "local" else 2
  )
  assert "DSMOE_RESTARTED" not in out  # such a script starts the processes once


@pytest.mark.parametrize(
  "args, own, others",
  [
    (("slurm", "--help"), ("--tasks", "--grace_secs", "--workdir"), ("--hosts", "--image")),
    (("--help", "ssh"), ("--hosts", "--setup", "--max_restarts"), ("--tasks", "--grace_secs")),
    (("--help",), ("--topology", "--xla_flags"), ("--hosts", "--image", "--devices_per_process")),
  ],
)
def test_help_is_that_of_a_way_of_starting(args, own, others):
  _, out, _ = launch(*args)
  found = set(re.findall(r"^ *(--[a-z_]+):", out.replace("[no]", ""), re.MULTILINE))
  assert found >= {"--config", "--output", *own} and not found & {*others}


def test_flags_of_xla_and_the_compilation_cache():
  args = ("tpu", *V3, "--topology=v6e:16x16", "--num_slices=2", "--image=i", "--json=-")
  cache = "--compilation_cache=gs://b/cache"
  mine = "--env=LIBTPU_INIT_ARGS=--xla_enable_async_all_gather=false --xla_mine=3"
  code, out, err = launch(*args, cache, "--xla_flags=default,sparse_core", mine)
  assert code == 0, err
  spec = yaml.safe_load(json.loads(out)["files"]["jobset.yaml"])["spec"]
  pod = spec["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
  env = {v["name"]: v["value"] for v in pod["containers"][0]["env"]}
  assert env["JAX_COMPILATION_CACHE_DIR"] == "gs://b/cache"
  chosen = xla_flags.chosen("v6e", ["default", "sparse_core"], num_slices=2)
  expected = chosen | {"xla_enable_async_all_gather": "false", "xla_mine": "3"}
  assert xla_flags.parse(env["LIBTPU_INIT_ARGS"]) == expected and len(chosen) == 11
  code, out, _ = launch(*args, "--xla_flags=none")
  assert code == 0 and "LIBTPU_INIT_ARGS" not in out


POD = ("tpu", TINY, "--workdir=gs://b/x", "--image=i", ON_DISK)


@pytest.mark.parametrize(
  "args, message",
  [
    ((), "the first argument must be one of local, slurm, ssh, tpu, got []"),
    (("local", "--workdir=x"), "--config must be given"),
    ((TINY, "--workdir=x"), "the first argument must be one of local, slurm, ssh, tpu, got []"),
    (
      ("pod", TINY, "--workdir=x"),
      "the first argument must be one of local, slurm, ssh, tpu, got ['pod']",
    ),
    (("local", "x", TINY, "--workdir=x"), "flags for dsmoe.train must follow after --, got ['x']"),
    (("local", TINY), "--workdir must be given"),
    (("local", TINY, "--workdir="), "--workdir must not be empty"),
    (("tpu", TINY, "--workdir=gs://b/x", "--topology=v5p:2x2x1"), "--image must be given"),
    (POD, "--topology must be given"),
    ((*POD, "--topology=h100:2x8"), "--topology of tpu must be of v4, v5e, v5p, v6e, tpu7x, got h"),
    ((*POD, "--topology=v5p:2x2x1", "--hosts=a"), "--hosts goes with ssh, not with tpu"),
    ((*POD, "--topology=v5p:2x2x1", "--tasks=gpu"), "--tasks goes with slurm, not with tpu"),
    ((*POD, "--topology=v5p:2x2x1", "--config.mesh.data=3"), "(4); the nearest mesh that fits is"),
    (
      (*POD[:-1], "--topology=v5p:2x2x1"),
      "data.cache_dir must be a folder on each host's disk, for the tokenised text, which is not",
    ),
    ((*POD, "--topology=v6e:16x16"), "batch (256) times num_microbatches (1); the nearest"),
    (("tpu", TINY, "--workdir=runs/x", "--image=i", "--topology=v5p:2x2x1"), "must be on gs://"),
    (("slurm", TINY, "--workdir=x", "--topology=v5p:2x2x1"), "of slurm must be of a100, h100,"),
    (
      (*POD, "--topology=v5p:2x2x1", "--xla_flags=default,combine"),
      "--xla_flags must be among default, none, overlap, exchange, sparse_core, multislice for v5p, got",
    ),
    (
      (*POD, "--topology=v6e:2x2", f"--env=LIBTPU_INIT_ARGS={WRONG}"),
      "must not be set together on v6e: each alone is right, but together they turned results into",
    ),
    (
      (*POD, "--topology=v6e:2x2", "--compilation_cache=/tmp"),
      "--compilation_cache must be on gs:",
    ),
    (
      ("local", TINY, "--workdir=x", "--compilation_cache="),
      "--compilation_cache must not be empty",
    ),
    (("ssh", TINY, "--workdir=x"), "--hosts must be given, and not empty"),
    (("local", TINY, "--workdir=x", "--topology=cpu:2x2"), "local has --num_processes"),
    (("local", TINY, "--workdir=x", "--env=A"), "--env must be NAME=VALUE, got 'A'"),
    (("local", TINY, "--workdir=x", "--name=A b"), "--name must have at most 40 letters"),
    (
      ("local", TINY, "--workdir=x", "--config.log.plots"),
      "as --config.FIELD=VALUE, got '--config",
    ),
    (("local", TINY, "--workdir=x", "--config.sead=1"), "a flag must name a field of the config"),
    (
      ("local", TINY, "--workdir=x", "--num_processes=3", "--devices_per_process=2"),
      "devices along the batch (6) times num_microbatches (1); no mesh of 6 devices fits",
    ),
  ],
)
def test_mistakes_end_in_one_sentence(args, message):
  code, out, err = launch(*args)
  assert (code, out) == (2, ""), err
  [line] = err.splitlines()
  assert line.startswith("error: ") and message in line


def test_a_tool_that_is_not_installed_is_named(tmp_path, monkeypatch):
  args = ("slurm", TINY, "--workdir=x", "--topology=cpu:1x1", "--run")
  env = {"PATH": str(tmp_path)}
  code, _, err = runs.finish(runs.start("scripts/launch.py", *args, env=env))
  assert code == 2 and "error: --run needs sbatch, which must be on the path" in err


# Two programs less to compile: of evaluating, and of predicting further tokens.
SPLIT = (
  "--config.mesh.expert=2",
  "--config.model.dispatch=all_gather",
  "--config.model.num_nextn_predict_layers=0",
  "--config.data.validation_globs=()",
)


def steps(workdir) -> list[int]:
  return [row["step"] for row in metrics.read_metrics(workdir) if "loss" in row]


def process_of(workdir, number: int) -> int:
  """Returns the process id of a run's process, which is no child of this one."""
  words = (f"--workdir={workdir}", f"--process_id={number}", "dsmoe.train")
  for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
    try:
      if set(words) <= set(path.read_text().split("\0")):
        return int(path.parent.name)
    except OSError:
      continue  # it has ended
  raise AssertionError(f"process {number} must be there")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
def test_two_processes_here_are_started_again_when_one_is_killed(tmp_path):
  """And save together when the launcher is told to stop."""
  workdir = tmp_path / "run"
  args = ("local", f"--config={runs.SHORT_RUN}", f"--workdir={workdir}", "--num_processes=2")
  args = (*args, "--devices_per_process=1", *SPLIT, "--config.num_steps=100000", "--run")
  launcher = runs.start("scripts/launch.py", *args)
  assert runs.wait_for(lambda: runs.logged_lines(workdir) >= 4, launcher)
  os.kill(process_of(workdir, 1), signal.SIGKILL)
  killed_at = steps(workdir)[-1]
  assert runs.wait_for(lambda: steps(workdir)[-1] > killed_at + 10, launcher)
  launcher.send_signal(signal.SIGTERM)
  code, out, err = runs.finish(launcher)
  assert code == 0, out + err
  assert "all are started again, 1 of at most 3 times" in err
  [saved] = re.findall(r"^\[0\] stopped by SIGTERM; saved at step (\d+)$", out, re.MULTILINE)
  assert int(saved) > killed_at and (workdir / "checkpoints" / saved).exists()
  assert len(re.findall(r"^\[0\] resumed from step \d+$", out, re.MULTILINE)) == 1


@pytest.mark.slow
def test_two_hosts_train(tmp_path):
  """By an ssh that runs here; the second host's name is never looked up."""
  env = fake_tools.put(tmp_path / "bin", ssh='shift 3\nexec sh -c "$*"')
  env |= {"PATH": f"{tmp_path / 'bin'}:{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"}
  workdir = tmp_path / "run"
  args = ("ssh", f"--config={runs.SHORT_RUN}", f"--workdir={workdir}", "--hosts=localhost,other")
  args = (*args, f"--port={runs.free_port()}", "--topology=cpu:2x1", *SPLIT)
  # A host's own flags are not those of who starts it; without them it compiles for long.
  args = (*args, f"--env=XLA_FLAGS={os.environ['XLA_FLAGS']}")
  launcher = runs.start(
    "scripts/launch.py", *args, "--config.num_steps=6", "--run", env={"PATH": env["PATH"]}
  )
  code, out, err = runs.finish(launcher)
  assert code == 0, out + err
  assert steps(workdir) == [2, 4, 6]


def test_jobs_of_a_sweep():
  flags = (TINY, "--workdir=gs://b/s", ON_DISK, "--image=i", "--sweep", "--json=-")
  storage = "--storage=postgresql://db/sweeps"
  code, out, err = launch("tpu", *flags, "--jobs=2", "--topology=v5e:2x2", "--", storage)
  assert code == 0, err
  files = json.loads(out)["files"]
  assert list(files) == ["s-0.jobset.yaml", "s-1.jobset.yaml"]
  for number, text in enumerate(files.values()):
    found = schemas.JobSet.model_validate(yaml.safe_load(text))
    assert found.metadata.name == f"s-{number}"
    command = found.spec.replicatedJobs[0].template.spec.template.spec.containers[0].command[2]
    assert f"python scripts/sweep.py {TINY} --workdir=gs://b/s {ON_DISK} {storage} &" in command
  code, out, err = launch("ssh", TINY, "--workdir=runs/s", "--hosts=a,b", "--sweep")
  assert code == 0 and out.count("python scripts/sweep.py") == 2 and "--coordinator" not in out, err


@pytest.mark.parametrize(
  ("args", "message"),
  [
    (("slurm", "--workdir=runs/s", "--jobs=2", "--topology=h100:1x8"), "--jobs goes with --sweep"),
    (
      ("slurm", "--workdir=runs/s", "--sweep", "--topology=h100:2x8"),
      "a job of a sweep runs on one host: --topology must have one, got",
    ),
    (
      ("tpu", "--workdir=gs://b/s", ON_DISK, "--image=i", "--sweep", "--topology=v5e:2x2"),
      "must have -- --storage=postgresql://...",
    ),
  ],
)
def test_sweeps_that_no_job_can_run_are_refused(args, message):
  code, out, err = launch(args[0], TINY, *args[1:])
  assert (code, out) == (2, "") and message in err
