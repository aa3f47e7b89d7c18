"""What is rendered for GKE: valid by the schemas, right in its numbers, and a pod's exit code."""

import dataclasses
import re
import signal
import time

import pydantic
import pytest
import yaml

from dsmoe.launching import topology, tpu
from dsmoe.launching.run import Run
from tests.launching import fake_tools, schemas

ENV = {"LIBTPU_INIT_ARGS": "--xla_a=true --xla_b=2", "PYTHONUNBUFFERED": "1"}
RUN = Run(
  "my-run",
  "experiments/tiny.py",
  "gs://bucket/my run",
  ("--config.data.train_globs=('a b', \"c\")", "--allow_config_change"),
  ENV,
  7,
)
OPTIONS = tpu.Options("example.com/image:1", None, None, 120, None)


def job_set(text: str, num_slices: int = 1, **options) -> schemas.JobSet:
  """Renders, reads and validates a JobSet."""
  where = topology.parse(text, num_slices)
  [(name, rendered)] = tpu.rendered(RUN, where, dataclasses.replace(OPTIONS, **options)).items()
  assert name == "jobset.yaml"
  return schemas.JobSet.model_validate(yaml.safe_load(rendered))


@pytest.mark.parametrize(
  "text, slices, pods, accelerator, size",
  [
    ("v5p:4x4x8", 2, 32, "tpu-v5p-slice", "4x4x8"),
    ("v6e:4x8", 3, 8, "tpu-v6e-slice", "4x8"),
    ("tpu7x:2x2x4", 1, 4, "tpu7x", "2x2x4"),
    ("v5e:2x2", 1, 1, "tpu-v5-lite-podslice", "2x2"),
    ("v4:2x4x4", 5, 8, "tpu-v4-podslice", "2x4x4"),
  ],
)
def test_a_job_set_has_a_job_for_each_slice_and_a_pod_for_each_vm(
  text, slices, pods, accelerator, size
):
  found = job_set(text, slices, queue="queue-a")
  assert found.metadata.name == "my-run"
  assert found.metadata.labels == {"kueue.x-k8s.io/queue-name": "queue-a"}
  exclusive = "alpha.jobset.sigs.k8s.io/exclusive-topology"
  assert found.metadata.annotations == {exclusive: "cloud.google.com/gke-nodepool"}
  [replicated] = found.spec.replicatedJobs
  assert replicated.replicas == slices
  job = replicated.template.spec
  assert (job.parallelism, job.completions, job.completionMode) == (pods, pods, "Indexed")
  pod = job.template.spec
  assert pod.nodeSelector == {
    "cloud.google.com/gke-tpu-accelerator": accelerator,
    "cloud.google.com/gke-tpu-topology": size,
  }
  assert pod.terminationGracePeriodSeconds == 120
  [container] = pod.containers
  assert container.image == "example.com/image:1"
  assert container.resources.limits == {"google.com/tpu": 4}
  assert {v.name: v.value for v in container.env} == ENV


def expanded(text: str, variables: dict[str, str]) -> str:
  """Returns what Kubernetes makes of a command's or a variable's text, as its documentation says.

  $(NAME) is the variable of that name, where there is one; $$ is a $ that begins no such name.
  """
  made, place = "", 0
  while place < len(text):
    rest = text[place:]
    named = re.match(r"\$\(([^)]*)\)", rest)
    if rest.startswith("$$"):
      made, place = made + "$", place + 2
    elif named and named[1] in variables:
      made, place = made + variables[named[1]], place + len(named[0])
    else:
      made, place = made + rest[0], place + 1
  return made


def handed(container: schemas.Container) -> tuple[list[str], dict[str, str]]:
  """Returns a container's command and variables as Kubernetes hands them to it."""
  variables: dict[str, str] = {}
  for variable in container.env:  # each may name those before it
    variables[variable.name] = expanded(variable.value, variables)
  return [expanded(word, variables) for word in container.command], variables


# What Kubernetes would replace, what a shell would, and what neither does.
ODD = ("A$(HOME)", "$$", "$$(A)", "$", "a$(", "$HOME$$$", "$(PYTHONUNBUFFERED)")


def odd_run() -> Run:
  env = {"A": "a"} | {f"ODD_{n}": text for n, text in enumerate(ODD)} | ENV
  arguments = tuple(f"--config.data.train_globs=('{text}',)" for text in ODD)
  return dataclasses.replace(RUN, env=env, arguments=arguments)


def test_kubernetes_replaces_nothing(tmp_path):
  """The process is given what the user wrote, by a JobSet, a job of Pathways and xpk."""
  assert expanded("$(A)$$(A)$$$(A)$(B)$x$", {"A": "a"}) == "a$(A)$a$(B)$x$"
  run, where = odd_run(), topology.parse("v5p:2x2x2")
  job = schemas.JobSet.model_validate(tpu.job_set(run, where, OPTIONS))
  [container] = job.spec.replicatedJobs[0].template.spec.template.spec.containers
  command, variables = handed(container)
  assert variables == run.env
  env = fake_tools.put(tmp_path / "bin", python=fake_tools.PYTHON, xpk='printf "%s\\0" "$@"')
  out, err = fake_tools.start(command[2], env, tmp_path).communicate(timeout=60)
  assert out.splitlines() == run.argv("python")[1:], err

  options = dataclasses.replace(OPTIONS, pathways="gs://bucket/tmp")
  flags = {"LIBTPU_INIT_ARGS": "--xla_a=$(A)"}
  job = tpu.pathways_job(dataclasses.replace(run, env=flags | {"A": "$$"}), where, options)
  found = schemas.PathwaysJob.model_validate(job)
  [container] = found.spec.controller.template.spec.containers
  command, variables = handed(container)
  assert command[3:] == run.argv("python")[3:] and variables == {"A": "$$"}
  [proxy] = found.spec.customComponents
  assert [expanded(flag, {"A": "a"}) for flag in proxy.customFlags] == ["--xla_a=$(A)"]

  text = tpu.rendered(run, where, dataclasses.replace(OPTIONS, cluster="big"))["xpk.sh"]
  words = fake_tools.start(text, env, tmp_path).communicate(timeout=60)[0].split("\0")
  given = [word.removeprefix("--env=").split("=", 1) for word in words if word[:6] == "--env="]
  assert {name: expanded(value, {"A": "a"}) for name, value in given} == run.env
  [command] = [word.removeprefix("--command=") for word in words if word[:10] == "--command="]
  script = f"({expanded(command, {'A': 'a'})}) & wait $!"
  out, err = fake_tools.start(script, env, tmp_path).communicate(timeout=60)
  assert out.splitlines() == run.argv("python")[1:], err


def test_mistakes_end_a_job_set_and_other_failures_restart_it():
  found = job_set("v5p:2x2x2")
  assert found.spec.failurePolicy.maxRestarts == 7
  [rule] = found.spec.failurePolicy.rules  # without a matching rule all jobs are made anew
  assert (rule.action, rule.onJobFailureReasons) == ("FailJobSet", ["PodFailurePolicy"])
  job = found.spec.replicatedJobs[0].template.spec
  assert job.backoffLimit == 0
  [pods] = job.podFailurePolicy.rules
  assert (pods.action, pods.onExitCodes.operator) == ("FailJob", "In")
  assert pods.onExitCodes.values == [1, 2]
  assert pods.onExitCodes.containerName == job.template.spec.containers[0].name


def test_a_wrong_field_or_value_is_found():
  where = topology.parse("v5p:2x2x2")
  for change in (
    lambda spec: spec.update(succesPolicy={}),
    lambda spec: spec["failurePolicy"]["rules"][0].update(action="Fail"),
    lambda spec: spec["failurePolicy"].update(maxRestarts="3"),
    lambda spec: spec["replicatedJobs"][0]["template"]["spec"].pop("completions"),
  ):
    manifest = tpu.job_set(RUN, where, OPTIONS)
    change(manifest["spec"])
    with pytest.raises(pydantic.ValidationError):
      schemas.JobSet.model_validate(manifest)


@pytest.mark.parametrize(
  "code, after_term, expected",
  [(0, None, 0), (1, None, 1), (2, None, 2), (75, None, 75), (0, 0, 75), (0, 1, 1), (0, 75, 75)],
)
def test_a_pod_that_is_told_to_end_is_not_done(tmp_path, code, after_term, expected):
  """The pod's own command, by bash: its program's code, but 75 where that was stopped and saved."""
  container = job_set("v5p:2x2x2").spec.replicatedJobs[0].template.spec.template.spec.containers[0]
  (bash, flag, script), _ = handed(container)
  assert (bash, flag) == ("bash", "-c")
  env = fake_tools.put(tmp_path / "bin", python=fake_tools.PYTHON) | {"CODE": str(code)}
  if after_term is not None:
    env["CODE_AFTER_TERM"] = str(after_term)
  process = fake_tools.start(script, env, tmp_path)
  if after_term is not None:
    while not (tmp_path / "waiting").exists() and process.poll() is None:
      time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
  out, err = process.communicate(timeout=60)
  assert process.returncode == expected, err
  said = out.splitlines()
  assert said[: len(RUN.argv("python")) - 1] == RUN.argv("python")[1:]
  assert ("terminated" in said) == (after_term is not None)


def test_xpk_makes_the_same_job_set(tmp_path):
  where = topology.parse("tpu7x:4x4x8", 3)
  options = dataclasses.replace(OPTIONS, cluster="big")
  text = tpu.rendered(RUN, where, options)["xpk.sh"]
  env = fake_tools.put(tmp_path / "bin", xpk='printf "%s\\0" "$@"', python=fake_tools.PYTHON)
  out, err = fake_tools.start(text, env, tmp_path).communicate(timeout=60)
  words = out.split("\0")[:-1]
  assert words[:2] == ["workload", "create"], err
  flags = [word.partition("=") for word in words[2:]]
  values = {name: value for name, _, value in flags if name not in ("--env", "--command")}
  assert values == {
    "--cluster": "big",
    "--workload": "my-run",
    "--tpu-type": "tpu7x-4x4x8",
    "--num-slices": "3",
    "--docker-image": "example.com/image:1",
    "--max-restarts": "7",
    "--restart-on-exit-codes": "75",
    "--termination-grace-period-seconds": "120",
    "--no-use-parallel-containers": "",
  }
  assert [value for name, _, value in flags if name == "--env"] == [
    f"{name}={value}" for name, value in ENV.items()
  ]
  [command] = [expanded(value, {}) for name, _, value in flags if name == "--command"]
  assert "\n" not in command  # which xpk puts into a line of its own
  process = fake_tools.start(f"({command}) & wait $!", env | {"CODE": "2"}, tmp_path)
  out, err = process.communicate(timeout=60)
  assert (process.returncode, out.splitlines()) == (2, RUN.argv("python")[1:]), err


def test_a_job_of_pathways():
  where = topology.parse("v6e:8x8", 2)
  options = dataclasses.replace(OPTIONS, pathways="gs://bucket/tmp", cluster="big")
  [(name, text)] = tpu.rendered(RUN, where, options).items()
  assert name == "pathwaysjob.yaml"
  found = schemas.PathwaysJob.model_validate(yaml.safe_load(text))
  [worker] = found.spec.workers
  assert (worker.type, worker.topology, worker.numSlices) == ("ct6e-standard-4t", "8x8", 2)
  [proxy] = found.spec.customComponents
  assert (proxy.componentType, proxy.customFlags) == (
    "proxy_server",
    ["--xla_a=true", "--xla_b=2"],
  )
  [container] = found.spec.controller.template.spec.containers
  assert {v.name: v.value for v in container.env} == {"PYTHONUNBUFFERED": "1"}
  assert container.command[:2] == ["python", "-c"]
  assert container.command[3:] == RUN.argv("python")[3:]


def test_pathways_client_is_there_before_training(tmp_path):
  """The command of the job runs dsmoe.train's main, after the client's own initialization."""
  where = topology.parse("v6e:2x2")
  job = tpu.pathways_job(RUN, where, dataclasses.replace(OPTIONS, pathways="gs://bucket/tmp"))
  container = job["spec"]["controller"]["template"]["spec"]["containers"][0]
  code = expanded(container["command"][2], {})
  names = {}
  calls = []

  class Pathways:
    initialize = staticmethod(lambda: calls.append("pathways"))

  class Runpy:
    run_module = staticmethod(lambda name, run_name, alter_sys: calls.append((name, run_name)))

  modules = {"pathwaysutils": Pathways, "runpy": Runpy}
  names["__builtins__"] = {"__import__": lambda name, *_: modules[name]}
  exec(code, names)
  assert calls == ["pathways", ("dsmoe.train", "__main__")]
