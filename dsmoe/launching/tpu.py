"""A run on TPU slices under GKE: a JobSet, the same with xpk, or a job of Pathways.

JobSet makes one job a slice and one pod a VM. GKE tells each pod its number, the other pods of the
slice and, of several slices, the variables MEGASCALE_*; JAX reads them.

Source: https://jobset.sigs.k8s.io/docs/tasks/tpu_multislice, https://jobset.sigs.k8s.io/docs/tasks/
failure_policy, https://github.com/AI-Hypercomputer/xpk, https://github.com/google/pathways-job.
"""

import dataclasses
import shlex
from collections.abc import Mapping
from typing import Any

import yaml

from dsmoe.launching import shell
from dsmoe.launching.run import MISTAKES, Run
from dsmoe.launching.topology import Topology
from dsmoe.parallel.processes import RESTART_CODE

_CONTAINER = "train"
# The client of Pathways registers itself with JAX before anything asks for devices.
_WITH_PATHWAYS = (
  "import pathwaysutils, runpy; pathwaysutils.initialize(); "
  "runpy.run_module('dsmoe.train', run_name='__main__', alter_sys=True)"
)


@dataclasses.dataclass(frozen=True)
class Options:
  """Of a run under GKE.

  Attributes:
    image: with this repository as its working directory, dsmoe installed with the extra `tpu`,
      and bash.
    cluster: of xpk; None: no command for xpk is made.
    queue: a LocalQueue of Kueue that admits the job; None: none does.
    grace_secs: how long a pod may save after it was told to end.
    pathways: folder on gs:// for a job of Pathways' single controller; None: a JobSet.
  """

  image: str
  cluster: str | None
  queue: str | None
  grace_secs: int
  pathways: str | None


def _literal(text: str) -> str:
  """Returns a text that Kubernetes hands to a container as `text`.

  In commands and variables it replaces $(NAME) by a variable, and $$ by $.
  """
  return text.replace("$", "$$")


def _variables(env: Mapping[str, str]) -> list[dict[str, str]]:
  return [{"name": name, "value": _literal(value)} for name, value in env.items()]


def command(run: Run) -> list[str]:
  """Returns the lines that a pod's shell runs.

  A run that is stopped by SIGTERM, when its VM is needed elsewhere, has saved and ends with 0. In
  a pod that must not mean that the work is done, so that it ends with RESTART_CODE instead.
  """
  return [
    *shell.started_with_traps([shlex.join(run.argv("python"))], "TERM"),
    *shell.waited(),
    f'if [ -n "$stopped" ] && [ "$code" -eq 0 ]; then code={RESTART_CODE}; fi',
    'exit "$code"',
  ]


def job_set(run: Run, topology: Topology, options: Options) -> dict[str, Any]:
  """Returns the JobSet of a run, ready for YAML.

  A pod that ends with a code of MISTAKES fails the JobSet at once. After any other failure,
  RESTART_CODE, a signal, a lost VM or its maintenance, all pods are made anew, at most
  `run.max_restarts` times.
  """
  cloud = topology.cloud
  assert cloud is not None  # since the topology is of TPUs
  container = {
    "name": _CONTAINER,
    "image": options.image,
    "command": ["bash", "-c", _literal("\n".join(command(run)) + "\n")],
    "env": _variables(run.env),
    "resources": {"limits": {"google.com/tpu": cloud.chips_per_vm}},
    "securityContext": {"privileged": True},  # which libtpu needs on the host's network
  }
  pod = {
    "restartPolicy": "Never",  # a pod's failure is the job's
    "hostNetwork": True,  # slices exchange more than a pod's own network carries
    "dnsPolicy": "ClusterFirstWithHostNet",
    "terminationGracePeriodSeconds": options.grace_secs,
    "nodeSelector": {
      "cloud.google.com/gke-tpu-accelerator": cloud.accelerator,
      "cloud.google.com/gke-tpu-topology": topology.size,
    },
    "containers": [container],
  }
  mistake = {"containerName": _CONTAINER, "operator": "In", "values": list(MISTAKES)}
  job = {
    "parallelism": topology.hosts,
    "completions": topology.hosts,
    "completionMode": "Indexed",
    "backoffLimit": 0,
    "podFailurePolicy": {"rules": [{"action": "FailJob", "onExitCodes": mistake}]},
    "template": {"spec": pod},
  }
  metadata: dict[str, Any] = {
    "name": run.name,
    "annotations": {
      # A slice's pods share a node pool, and no other job's pod is in it.
      "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
    },
  }
  if options.queue:
    metadata["labels"] = {"kueue.x-k8s.io/queue-name": options.queue}
  return {
    "apiVersion": "jobset.x-k8s.io/v1alpha2",
    "kind": "JobSet",
    "metadata": metadata,
    "spec": {
      "failurePolicy": {
        "maxRestarts": run.max_restarts,
        # Only codes of MISTAKES make a job fail for this reason; without a rule all start again.
        "rules": [
          {
            "name": "mistake",
            "action": "FailJobSet",
            "onJobFailureReasons": ["PodFailurePolicy"],
          }
        ],
      },
      "replicatedJobs": [
        {"name": "slice", "replicas": topology.num_slices, "template": {"spec": job}}
      ],
    },
  }


def pathways_job(run: Run, topology: Topology, options: Options) -> dict[str, Any]:
  """Returns a PathwaysJob: one process on a CPU node drives the devices of all slices.

  The compiler runs in Pathways' proxy, which takes XLA's flags as its own.
  """
  cloud = topology.cloud
  assert cloud is not None
  env = {name: value for name, value in run.env.items() if name != "LIBTPU_INIT_ARGS"}
  flags = run.env.get("LIBTPU_INIT_ARGS", "").split()
  argv = ["python", "-c", _WITH_PATHWAYS, *run.argv("python")[3:]]
  container = {
    "name": "main",
    "image": options.image,
    "command": list(map(_literal, argv)),
    "env": _variables(env),
  }
  spec: dict[str, Any] = {
    "maxRestarts": run.max_restarts,
    "pathwaysDir": options.pathways,
    "workers": [
      {"type": cloud.machine, "topology": topology.size, "numSlices": topology.num_slices}
    ],
    "controller": {
      "deploymentMode": "default",
      "mainContainerName": "main",
      "template": {"spec": {"containers": [container]}},
    },
  }
  if flags:
    spec["customComponents"] = [
      {"componentType": "proxy_server", "customFlags": list(map(_literal, flags))}
    ]
  return {
    "apiVersion": "pathways-job.pathways.domain/v1",
    "kind": "PathwaysJob",
    "metadata": {"name": run.name},
    "spec": spec,
  }


def xpk(run: Run, topology: Topology, options: Options) -> str:
  """Returns the command by which xpk makes the same JobSet on one of its clusters."""
  cloud = topology.cloud
  assert cloud is not None
  flags = {
    "cluster": options.cluster or "",
    "workload": run.name,
    "tpu-type": f"{cloud.xpk}-{topology.size}",
    "num-slices": str(topology.num_slices),
    "docker-image": options.image,
    "max-restarts": str(run.max_restarts),
    "restart-on-exit-codes": str(RESTART_CODE),
    "termination-grace-period-seconds": str(options.grace_secs),
  }
  words = [f"--{name}={value}" for name, value in flags.items()]
  words += ["--no-use-parallel-containers"]  # one process a VM, where xpk would start two
  # xpk writes these into the JobSet as they are.
  words += [f"--env={name}={_literal(value)}" for name, value in run.env.items()]
  words += [_literal(f"--command=bash -c {shlex.quote('; '.join(command(run)))}")]  # in one line
  return " \\\n  ".join(["xpk workload create", *map(shlex.quote, words)]) + "\n"


def rendered(run: Run, topology: Topology, options: Options) -> dict[str, str]:
  """Returns the text of each file by its name; the first is what kubectl is given."""
  if options.pathways:
    manifest, name = pathways_job(run, topology, options), "pathwaysjob.yaml"
  else:
    manifest, name = job_set(run, topology, options), "jobset.yaml"
  files = {name: yaml.dump(manifest, Dumper=_Dumper, sort_keys=False, width=1000)}
  if options.cluster and not options.pathways:
    files["xpk.sh"] = xpk(run, topology, options)
  return files


class _Dumper(yaml.SafeDumper):
  """Writes texts of several lines as blocks, and texts that look like numbers quoted."""


def _text(dumper: yaml.SafeDumper, text: str):
  style = "|" if "\n" in text else None
  return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)
