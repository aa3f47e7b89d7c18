"""Starts a run of several processes: here, by ssh, under SLURM, or on TPU pods.

  python scripts/launch.py local --config=experiments/tiny.py --workdir=runs/two --num_processes=2 --devices_per_process=1 --run
  python scripts/launch.py tpu --config=experiments/deepseek_v3.py --workdir=gs://BUCKET/v3 --config.data.cache_dir=/tmp/data --topology=v5p:8x8x8 --config.batch_size=512 --image=IMAGE

Prints what it would start, or writes it to --output, after checking that the config fits the
topology; with --run it starts it. Every process runs `python -m dsmoe.train` with the same --config,
--workdir and --config.FIELD=VALUE; further flags for it follow after `--`. With --sweep it is
scripts/sweep.py instead, on one host a job:

  python scripts/launch.py slurm --sweep --jobs=4 --config=experiments/tiny.py --workdir=runs/sweep --topology=h100:1x8 -- --storage=postgresql://HOST/sweeps --workers=8

`python scripts/launch.py tpu --help`, or slurm, ssh or local, shows the flags of that way of starting
beside those that all have.
"""

import os
import pathlib
import re
import sys
from collections.abc import Callable
from typing import Any

import jax
from absl import app, flags
from ml_collections import config_flags

from dsmoe import config as config_lib
from dsmoe.launching import environment, local, plan, slurm, ssh, supervise, topology, tpu
from dsmoe.launching import run as run_lib
from dsmoe.platforms import xla_flags
from dsmoe.reporting import output

_WAYS = ("local", "slurm", "ssh", "tpu")

_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "An experiment, experiments/<name>.py; needed."
)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Where the run's files go; all processes see it. Needed."
)
_TOPOLOGY = flags.DEFINE_string(
  "topology", None, "TPU slice, v5p:4x4x4 say, or hosts and their devices: h100:2x8, cpu:2x4."
)
_RUN = flags.DEFINE_bool("run", False, "Start it.")
_OUTPUT = flags.DEFINE_string("output", None, "Folder for the rendered files.")
_NAME = flags.DEFINE_string("name", None, "Of the job; by default the workdir's last folder.")
_ENV = flags.DEFINE_multi_string("env", [], "A variable of every process, NAME=VALUE.")
_XLA_FLAGS = flags.DEFINE_list(
  "xla_flags",
  [xla_flags.DEFAULT],
  "XLA's flags for the topology's chip, by purpose: default, none, sparse_core and others.",
)
_CACHE = flags.DEFINE_string(
  "compilation_cache", None, "Folder, seen by all processes, for compiled programs."
)
_MAX_RESTARTS = flags.DEFINE_integer(
  "max_restarts", 3, "How often a run that failed is started again.", lower_bound=0
)
_GRACE_SECS = flags.DEFINE_integer(
  "grace_secs", 300, "tpu, slurm: time to save, before the end.", lower_bound=30
)
_NUM_PROCESSES = flags.DEFINE_integer(
  "num_processes", 1, "local: how many processes.", lower_bound=1
)
_DEVICES = flags.DEFINE_integer(
  "devices_per_process",
  None,
  "local: as how many devices a process' CPU shows; by default the attached devices.",
  lower_bound=1,
)
_LOG_FOLDER = flags.DEFINE_string(
  "log_folder", None, "local, ssh: folder for a file of each process' output."
)
_NUM_SLICES = flags.DEFINE_integer("num_slices", 1, "tpu: how many slices.", lower_bound=1)
_IMAGE = flags.DEFINE_string("image", None, "tpu: the container; its folder is the repository.")
_QUEUE = flags.DEFINE_string("queue", None, "tpu: a LocalQueue of Kueue.")
_CLUSTER = flags.DEFINE_string("cluster", None, "tpu: give the command for this xpk cluster too.")
_PATHWAYS = flags.DEFINE_string("pathways", None, "tpu: folder on gs:// for a job of Pathways.")
_HOSTS = flags.DEFINE_list("hosts", [], "ssh: hosts, the first is the coordinator.")
_FOLDER = flags.DEFINE_string("folder", None, "ssh: the repository's folder; by default this one.")
_PORT = flags.DEFINE_integer("port", 8476, "ssh: where the first host listens.", 1, 65535)
_SETUP = flags.DEFINE_string("setup", "", "slurm, ssh: shell line before the run.")
_TIME_LIMIT = flags.DEFINE_string("time_limit", None, "slurm: of the job, 24:00:00 say.")
_PARTITION = flags.DEFINE_string("partition", None, "slurm: the partition.")
_ACCOUNT = flags.DEFINE_string("account", None, "slurm: the account.")
_TASKS = flags.DEFINE_enum("tasks", "node", ["node", "gpu"], "slurm: a process for each of these.")
_CONTAINER = flags.DEFINE_string("container", None, "slurm: *.sif for Apptainer, or Pyxis' image.")
_SWEEP = flags.DEFINE_bool("sweep", False, "slurm, ssh, tpu: run the trials of a sweep.")
_JOBS = flags.DEFINE_integer("jobs", 1, "slurm, tpu: with --sweep, how many jobs.", lower_bound=1)
_JSON = output.define_json()


def overrides(argv: list[str]) -> list[str]:
  """Returns the arguments that set fields of the config, as they were given."""
  argv = argv[: argv.index("--")] if "--" in argv else argv
  found = [a for a in argv[1:] if re.match(r"--?(no)?config\.", a)]
  for argument in found:
    if "=" not in argument:
      raise app.UsageError(f"fields must be set as --config.FIELD=VALUE, got {argument!r}")
  return found


def ways_of(flag: flags.Flag) -> list[str]:
  """Returns the ways of starting that a flag's help names before a colon; [] if all have it."""
  choices = r"(?:<.*>: )?"  # with which absl begins the help of a flag that has choices
  ways = re.match(choices + r"((local|slurm|ssh|tpu)(, (local|slurm|ssh|tpu))*): ", flag.help or "")
  return ways[1].split(", ") if ways else []


def narrow_help(argv: list[str]) -> None:
  """Where help is asked for, leaves only the flags of the way that is named, and of all ways."""
  argv = argv[: argv.index("--")] if "--" in argv else argv
  if not {"--help", "-help", "--helpshort", "-helpshort", "-?"} & set(argv):
    return
  way = next((argument for argument in argv[1:] if argument in _WAYS), None)
  for name in list(flags.FLAGS):
    if (ways := ways_of(flags.FLAGS[name])) and way not in ways:
      delattr(flags.FLAGS, name)


def check_flags(way: str) -> None:
  """Raises UsageError for flags that another way of starting has, and for those that lack."""
  for name in flags.FLAGS:
    flag = flags.FLAGS[name]
    if (ways := ways_of(flag)) and flag.present and way not in ways:
      raise app.UsageError(f"--{name} goes with {', '.join(ways)}, not with {way}")
  needed = {"tpu": (_TOPOLOGY, _IMAGE), "slurm": (_TOPOLOGY,), "ssh": (_HOSTS,), "local": ()}[way]
  for holder in needed:
    if not holder.value:
      raise app.UsageError(f"--{holder.name} must be given, and not empty")
  if way == "local" and _TOPOLOGY.value:
    raise app.UsageError("--topology goes with tpu, slurm and ssh; local has --num_processes")


def check_sweep(where: topology.Topology | None, workdir: str, more: list[str]) -> None:
  """Refuses what a sweep's jobs cannot be, each of which is a program on one host."""
  if not _SWEEP.value:
    if _JOBS.value > 1:
      raise app.UsageError("--jobs goes with --sweep")
    return
  if _PATHWAYS.value or _TASKS.value != "node":
    raise app.UsageError("--sweep goes with neither --pathways nor --tasks=gpu")
  if where and not _HOSTS.value and where.hosts * where.num_slices > 1:
    raise ValueError(f"a job of a sweep runs on one host: --topology must have one, got {where}")
  if "://" in workdir and not any(argument.startswith("--storage") for argument in more):
    raise ValueError(
      f"a sweep in an object store ({workdir}) must have -- --storage=postgresql://..., because its "
      "journal would be a file on a disk"
    )


def check_shared(way: str, name: str, path: str) -> str:
  """Returns a flag's path; raises UsageError where it is empty, or the disk of a pod."""
  if not path.strip():
    raise app.UsageError(f"--{name} must not be empty")
  if way == "tpu" and not path.startswith("gs://"):
    raise app.UsageError(
      f"--{name} must be on gs://, which all pods see and which outlives them, got {path!r}"
    )
  return path


def check_data(workdir: str, cache_dir: str) -> None:
  """Raises ValueError where the tokenised text would have to lie in an object store."""
  folder = cache_dir or workdir
  if "://" in folder:
    raise ValueError(
      "data.cache_dir must be a folder on each host's disk, for the tokenised text, which is not "
      f"read from an object store, got {folder}: add --config.data.cache_dir=/tmp/data, say"
    )


def devices(way: str) -> topology.Topology | None:
  """Returns the run's devices, None for those that are attached to hosts where it is to run."""
  if way == "local" and _DEVICES.value:
    return topology.Topology(topology.CPU, (_NUM_PROCESSES.value, _DEVICES.value))
  if _TOPOLOGY.value is None:
    return None
  found = topology.parse(_TOPOLOGY.value, _NUM_SLICES.value)
  if (way == "tpu") != (found.cloud is not None) and way != "ssh":
    kinds = topology.TPUS if way == "tpu" else (*topology.GPUS, topology.CPU)
    raise ValueError(f"--topology of {way} must be of {', '.join(kinds)}, got {found.kind}")
  return found


def render(
  way: str, run: run_lib.Run, where: topology.Topology | None
) -> tuple[dict[str, str], Callable[[], int]]:
  """Returns the text of each file by name, and what starts the run and returns its exit code."""
  again = run_lib.restarted(run)
  if way == "local":
    count = _NUM_PROCESSES.value
    files = {"local.sh": local.script(run, count)}
    return files, lambda: supervise.supervise(
      lambda _: local.commands(again, count, local.free_port()), run.max_restarts, _LOG_FOLDER.value
    )
  if way == "ssh":
    hosts, folder = tuple(_HOSTS.value), _FOLDER.value or str(pathlib.Path.cwd())
    ssh.check_hosts(hosts, where)
    reached = ssh.Options(hosts, folder, _SETUP.value, _PORT.value)
    files, commands = {"ssh.sh": ssh.script(run, reached)}, ssh.commands(again, reached)
    return files, lambda: supervise.supervise(
      lambda _: commands, run.max_restarts, _LOG_FOLDER.value
    )
  assert where is not None  # `check_flags`
  if way == "slurm":
    job = slurm.Options(
      _TIME_LIMIT.value,
      _PARTITION.value,
      _ACCOUNT.value,
      _TASKS.value,
      _CONTAINER.value,
      _SETUP.value,
      _GRACE_SECS.value,
    )
    files = {"run.sbatch": slurm.script(again, where, job)}
    return files, lambda: run_lib.give(["sbatch"], files["run.sbatch"])
  pods = tpu.Options(
    _IMAGE.value or "", _CLUSTER.value, _QUEUE.value, _GRACE_SECS.value, _PATHWAYS.value
  )
  files = tpu.rendered(again, where, pods)
  return files, lambda: run_lib.give(["kubectl", "apply", "-f", "-"], next(iter(files.values())))


def render_jobs(
  way: str, runs: list[run_lib.Run], where: topology.Topology | None
) -> tuple[dict[str, str], Callable[[], int]]:
  """Returns what `render` does, of several jobs that are started one after the other."""
  if len(runs) == 1:
    return render(way, runs[0], where)
  rendered = [render(way, run, where) for run in runs]
  files = {
    f"{run.name}.{name}": text
    for run, (texts, _) in zip(runs, rendered, strict=True)
    for name, text in texts.items()
  }
  return files, lambda: max(start() for _, start in rendered)


def show(files: dict[str, str], plan_of_run: dict[str, Any] | None) -> None:
  """Writes the files to --output or prints them; prints the plan's figures as --json says."""
  if _OUTPUT.value is not None:
    folder = pathlib.Path(_OUTPUT.value)
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
      (folder / name).write_text(text)
      print(folder / name, file=sys.stderr)
  output.write_json(_JSON.value, {"plan": plan_of_run, "files": files})
  if _OUTPUT.value is None and not _RUN.value and _JSON.value != output.STDOUT:
    print("\n".join(files.values()), end="")


def main(argv: list[str]) -> None:
  if len(argv) < 2 or argv[1] not in _WAYS:
    raise app.UsageError(f"the first argument must be one of {', '.join(_WAYS)}, got {argv[1:2]}")
  if any(not argument.startswith("-") for argument in argv[2:]):
    raise app.UsageError(f"flags for dsmoe.train must follow after --, got {argv[2:]}")
  way = argv[1]
  for holder in (_CONFIG, _WORKDIR):
    if holder.value is None:
      raise app.UsageError(f"--{holder.name} must be given")
  check_flags(way)
  workdir = check_shared(way, "workdir", _WORKDIR.value or "")
  cache = None if _CACHE.value is None else check_shared(way, "compilation_cache", _CACHE.value)
  jax.config.update("jax_platforms", "cpu")  # of this process, which only plans
  where = devices(way)
  config = config_lib.from_config_dict(_CONFIG.value)
  check_data(workdir, config.data.cache_dir)
  check_sweep(where, workdir, argv[2:])
  path = config_flags.get_config_filename(flags.FLAGS["config"])
  found = None if where is None else plan.of(config, where)
  inherited = os.environ.get("XLA_FLAGS", "") if way == "local" else ""
  env = environment.read(_ENV.value)
  env = environment.complete(env, where, _XLA_FLAGS.value, cache, inherited)
  run = run_lib.Run(
    run_lib.job_name(_NAME.value, workdir),
    path,
    workdir,
    (*overrides(sys.argv), *argv[2:]),
    env,
    _MAX_RESTARTS.value,
    run_lib.SWEEP if _SWEEP.value else run_lib.TRAIN,
  )
  files, start = render_jobs(way, run_lib.jobs_of_sweep(run, _JOBS.value), where)
  if where and found:
    print(plan.line(found, where, [f"--config={path}", *overrides(sys.argv)]), file=sys.stderr)
  show(files, found)
  if _RUN.value:
    sys.exit(start())


if __name__ == "__main__":
  narrow_help(sys.argv)
  output.run_script(main)
