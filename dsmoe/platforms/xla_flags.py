"""XLA's flags by chip and purpose, each with the reason for it, and combinations that are refused.

They are read when a process starts: LIBTPU_INIT_ARGS by the TPU's compiler, XLA_FLAGS by the GPU's.
Tests give every set to the compilers, which accept it, and look at what they make of it; on a TPU
none was run. The default is what the sources below set in every run; the other sets are choices.

Source: https://docs.jax.dev/en/latest/gpu_performance_tips.html,
https://docs.nvidia.com/jax-toolbox/performance-profiling/gpu-performance, MaxText's
benchmarks/xla_flags_library.py; names checked in libtpu 0.0.42, jaxlib 0.10.2 and 0.12.0.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import jaxlib

DEFAULT, NONE = "default", "none"
_TPUS = ("v5p", "v6e", "tpu7x")
_GPUS = ("a100", "h100", "h800", "h200", "b200")
_PIPELINED_BEFORE = (0, 11)  # jaxlib 0.12.0 does not know these flags; 0.11 was not tried


class Flag(NamedTuple):
  """A flag of XLA, without its dashes, and the reason to set it.

  A flag that the compiler does not know ends the process.
  """

  name: str
  value: str
  reason: str
  before_jaxlib: tuple[int, int] | None = None  # from this version on it is unknown; None: known

  @property
  def is_known(self) -> bool:
    """Whether the compiler installed here knows the flag; a run elsewhere should have the same."""
    return self.before_jaxlib is None or jaxlib.version.__version_info__[:2] < self.before_jaxlib


class FlagSet(NamedTuple):
  """Flags that serve one purpose on some kinds of chips."""

  purpose: str
  kinds: tuple[str, ...]
  flags: tuple[Flag, ...]


SETS = (
  FlagSet(
    "overlap",
    _TPUS,
    (
      Flag(
        "xla_tpu_enable_latency_hiding_scheduler",
        "true",
        "starts a collective as early and ends it as late as its operands allow",
      ),
      Flag(
        "xla_enable_async_all_gather",
        "true",
        "the next layer's weights are gathered while this one computes",
      ),
    ),
  ),
  FlagSet(
    "exchange",
    _TPUS,
    (
      Flag(
        "xla_tpu_enable_async_ragged_all_to_all",
        "true",
        "tokens travel to their experts while the shared expert computes; libtpu 0.0.42 otherwise "
        "waits, but on tpu7x, whose SparseCores exchange them",
      ),
      Flag(
        "xla_tpu_enable_async_all_to_all",
        "true",
        "likewise exchanges of equal parts",
      ),
    ),
  ),
  FlagSet(
    "sparse_core",
    _TPUS,
    (
      Flag(
        "xla_tpu_enable_sparse_core_collective_offload_all_gather",
        "true",
        "the SparseCores gather weights, and the matrix units' cores go on computing",
      ),
      Flag(
        "xla_tpu_enable_all_gather_offload_tracing",
        "true",
        "profiles show the gathers that run there",
      ),
      Flag(
        "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter",
        "true",
        "likewise the sums of gradients that FSDP scatters",
      ),
      Flag(
        "xla_tpu_enable_reduce_scatter_offload_tracing",
        "true",
        "profiles show the reduce-scatters that run there",
      ),
      Flag(
        "xla_tpu_enable_sparse_core_collective_offload_ragged_all_to_all",
        "true",
        "likewise the exchange of tokens",
      ),
      Flag(
        "xla_tpu_use_tc_device_shape_on_sc",
        "true",
        "arrays keep one layout on both kinds of cores, without copies between two",
      ),
      Flag(
        "xla_tpu_enable_async_collective_fusion_fuse_all_gather",
        "false",
        "a gather that is fused with computation on the TensorCore cannot be offloaded",
      ),
    ),
  ),
  FlagSet(
    "multislice",
    _TPUS,
    (
      Flag(
        "xla_tpu_enable_data_parallel_all_reduce_opt",
        "true",
        "gradients are summed over the data centre's network during the backward pass",
      ),
      Flag(
        "xla_tpu_data_parallel_opt_different_sized_ops",
        "true",
        "the same where the summed arrays differ in size, as layers with and without experts do",
      ),
    ),
  ),
  FlagSet(
    "overlap",
    _GPUS,
    (
      Flag(
        "xla_gpu_enable_latency_hiding_scheduler",
        "true",
        "starts a collective as early and ends it as late as its operands allow",
      ),
      Flag(
        "xla_gpu_enable_pipelined_all_gather",
        "true",
        "in a scan, the next layer's weights are gathered while this one computes",
        _PIPELINED_BEFORE,
      ),
      Flag(
        "xla_gpu_enable_pipelined_reduce_scatter",
        "true",
        "in a scan, this layer's gradients are scattered while the next one computes",
        _PIPELINED_BEFORE,
      ),
      Flag(
        "xla_gpu_enable_while_loop_double_buffering",
        "true",
        "two iterations of a scan use two sets of buffers, so that such collectives need no copies",
      ),
    ),
  ),
  FlagSet(
    "combine",
    _GPUS,
    (
      Flag(
        "xla_gpu_all_gather_combine_threshold_bytes",
        str(2**29),
        "small gathers of a layer go together, since NVLink and InfiniBand need large messages",
      ),
      Flag(
        "xla_gpu_reduce_scatter_combine_threshold_bytes",
        str(2**28),
        "likewise reduce-scatters, whose inputs are as many times larger as there are devices",
      ),
      Flag(
        "xla_gpu_all_reduce_combine_threshold_bytes",
        str(2**28),
        "likewise the sums of replicated weights' gradients",
      ),
    ),
  ),
)


class Wrong(NamedTuple):
  """Flags that must not be set together on some chips."""

  kinds: tuple[str, ...]
  flags: dict[str, str]
  reason: str


WRONG = (
  Wrong(
    ("v6e",),
    {
      "xla_tpu_enable_async_collective_fusion": "true",
      "xla_tpu_overlap_compute_collective_tc": "true",
    },
    "each alone is right, but together they turned results into NaN "
    "(https://github.com/jax-ml/jax/issues/38741)",
  ),
)


def variable(kind: str) -> str:
  """Returns the variable in which a chip's compiler finds its flags."""
  return "XLA_FLAGS" if kind in _GPUS else "LIBTPU_INIT_ARGS"


def purposes(kind: str) -> tuple[str, ...]:
  """Returns the purposes for which there are flags on a kind of chip."""
  return tuple(s.purpose for s in SETS if kind in s.kinds)


def defaults(kind: str, num_slices: int) -> tuple[str, ...]:
  """Returns the purposes chosen by default."""
  wanted = ("overlap", "combine", *(("multislice",) if num_slices > 1 else ()))
  return tuple(purpose for purpose in purposes(kind) if purpose in wanted)


def chosen(kind: str, choice: Iterable[str], num_slices: int = 1) -> dict[str, str]:
  """Returns the flags for a chip, by name.

  Args:
    kind: the chip's name.
    choice: purposes, or "default" among them, or "none" alone.
    num_slices: of TPUs; above 1 the default has flags for the network between them.

  Raises:
    ValueError: for a purpose that the chip has no flags for.
  """
  names: list[str] = []
  for name in choice:
    names += defaults(kind, num_slices) if name == DEFAULT else [name] if name != NONE else []
  known = purposes(kind)
  for name in names:
    if name not in known:
      raise ValueError(
        f"--xla_flags must be among {', '.join((DEFAULT, NONE, *known))} for {kind}, got {name!r}"
      )
  sets = [s for s in SETS if kind in s.kinds and s.purpose in names]
  return {flag.name: flag.value for s in sets for flag in s.flags if flag.is_known}


def parse(text: str) -> dict[str, str]:
  """Reads flags from a variable's text; one without a value is true."""
  parts = (word.lstrip("-").partition("=") for word in text.split())
  return {name: value if equals else "true" for name, equals, value in parts}


def text(flags: Mapping[str, str]) -> str:
  """Returns flags as a variable has them."""
  return " ".join(f"--{name}={value}" for name, value in flags.items())


def check(kind: str, flags: Mapping[str, str]) -> None:
  """Raises ValueError for flags that must not be set together on a kind of chip."""
  spelled = {"1": "true", "enabled": "true", "0": "false", "disabled": "false"}
  values = {name: spelled.get(value.lower(), value.lower()) for name, value in flags.items()}
  for wrong in WRONG:
    if kind in wrong.kinds and wrong.flags.items() <= values.items():
      names = " and ".join(f"--{name}={value}" for name, value in wrong.flags.items())
      raise ValueError(f"{names} must not be set together on {kind}: {wrong.reason}")
