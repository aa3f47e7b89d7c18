"""The parts of Kubernetes' resources that launching renders, as pydantic types without other fields.

Written from the documentation, not copied: https://jobset.sigs.k8s.io/docs/reference/jobset.v1alpha2,
https://kubernetes.io/docs/reference/kubernetes-api/workload-resources (Job v1, Pod v1) and
https://github.com/google/pathways-job. Kubernetes drops fields that it does not know; here they are
errors.
"""

from typing import Annotated, Literal

import pydantic
from pydantic import Field

Name = Annotated[str, Field(pattern=r"^[a-z]([-a-z0-9]*[a-z0-9])?$", max_length=63)]
Count = Annotated[int, Field(ge=0, lt=2**31)]
Positive = Annotated[int, Field(ge=1, lt=2**31)]
Labels = dict[
  Annotated[str, Field(pattern=r"^([a-z0-9.-]{1,253}/)?[A-Za-z0-9]([\w.-]{0,61}[A-Za-z0-9])?$")],
  Annotated[str, Field(pattern=r"^([A-Za-z0-9]([\w.-]{0,61}[A-Za-z0-9])?)?$")],
]


class Strict(pydantic.BaseModel):
  model_config = pydantic.ConfigDict(extra="forbid", strict=True)


class Metadata(Strict):
  name: Name
  labels: Labels = {}
  annotations: dict[str, str] = {}


class Variable(Strict):
  name: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
  value: str


class Resources(Strict):
  limits: dict[str, Positive]


class SecurityContext(Strict):
  privileged: bool


class Container(Strict):
  name: Name
  image: Annotated[str, Field(min_length=1)]
  command: Annotated[list[str], Field(min_length=1)]
  env: list[Variable] = []
  resources: Resources | None = None
  securityContext: SecurityContext | None = None


class PodSpec(Strict):
  restartPolicy: Literal["Never"]  # which a podFailurePolicy needs
  hostNetwork: bool
  dnsPolicy: Literal["ClusterFirstWithHostNet", "ClusterFirst", "Default"]
  terminationGracePeriodSeconds: Positive
  nodeSelector: Labels
  containers: Annotated[list[Container], Field(min_length=1)]


class Pod(Strict):
  spec: PodSpec


class OnExitCodes(Strict):
  containerName: Name
  operator: Literal["In", "NotIn"]
  values: Annotated[list[int], Field(min_length=1, max_length=255)]

  @pydantic.field_validator("values")
  @classmethod
  def _ordered(cls, values):
    assert values == sorted(set(values)) and 0 not in values
    return values


class PodFailureRule(Strict):
  action: Literal["FailJob", "FailIndex", "Ignore", "Count"]
  onExitCodes: OnExitCodes


class PodFailurePolicy(Strict):
  rules: Annotated[list[PodFailureRule], Field(max_length=20)]


class JobSpec(Strict):
  parallelism: Positive
  completions: Positive
  completionMode: Literal["Indexed", "NonIndexed"]
  backoffLimit: Count
  podFailurePolicy: PodFailurePolicy
  template: Pod


class Job(Strict):
  spec: JobSpec


class ReplicatedJob(Strict):
  name: Name
  replicas: Count
  template: Job


class FailureRule(Strict):
  name: Annotated[str, Field(pattern=r"^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$")]
  action: Literal[
    "FailJobSet",
    "RestartJobSet",
    "RestartJobSetAndIgnoreMaxRestarts",
    "RestartJob",
    "RestartJobAndIgnoreMaxRestarts",
  ]
  onJobFailureReasons: list[
    Literal[
      "BackoffLimitExceeded",
      "DeadlineExceeded",
      "FailedIndexes",
      "MaxFailedIndexesExceeded",
      "PodFailurePolicy",
    ]
  ]


class FailurePolicy(Strict):
  maxRestarts: Count
  rules: list[FailureRule]


class JobSetSpec(Strict):
  failurePolicy: FailurePolicy
  replicatedJobs: list[ReplicatedJob]


class JobSet(Strict):
  apiVersion: Literal["jobset.x-k8s.io/v1alpha2"]
  kind: Literal["JobSet"]
  metadata: Metadata
  spec: JobSetSpec

  @pydantic.model_validator(mode="after")
  def _names_of_pods_are_short(self):
    for job in self.spec.replicatedJobs:
      last = job.template.spec.completions - 1
      assert len(f"{self.metadata.name}-{job.name}-{job.replicas - 1}-{last}-abcde") <= 63
    return self


class Worker(Strict):
  type: Literal[
    "tpu7x-standard-4t",
    "ct6e-standard-4t",
    "ct6e-standard-8t",
    "ct5p-hightpu-4t",
    "ct5lp-hightpu-4t",
    "ct5lp-hightpu-8t",
    "ct4p-hightpu-4t",
  ]
  topology: str
  numSlices: Positive


class UserPodSpec(Strict):
  containers: Annotated[list[Container], Field(min_length=1)]


class UserPod(Strict):
  spec: UserPodSpec


class Controller(Strict):
  deploymentMode: Literal["default", "colocate_head_with_workers"]
  mainContainerName: Name
  template: UserPod


class Component(Strict):
  componentType: Literal["pathways_server", "worker", "proxy_server", "colocated_python_sidecar"]
  customFlags: list[str]


class PathwaysJobSpec(Strict):
  maxRestarts: Count
  pathwaysDir: Annotated[str, Field(pattern="^gs://")]
  workers: Annotated[list[Worker], Field(min_length=1, max_length=1)]
  controller: Controller
  customComponents: Annotated[list[Component], Field(max_length=4)] = []


class PathwaysJob(Strict):
  apiVersion: Literal["pathways-job.pathways.domain/v1"]
  kind: Literal["PathwaysJob"]
  metadata: Metadata
  spec: PathwaysJobSpec
