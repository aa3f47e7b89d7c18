"""Which implementations of a kernel are measured on a platform, and what they are checked against."""

from collections.abc import Collection

from dsmoe.kernel_bench import cases

# Implementations that compile for one platform only, by the beginning of their names.
_ONLY_ON = {
  "tpu": ("mosaic_tpu", "megablox", "splash", "tokamax", "unfused"),
  "gpu": ("mosaic_gpu", "jax_mosaic_gpu", "cudnn"),
}

# Timed on a GPU only if they are named: they multiply every row by every expert, hold whole score
# matrices, or run a loop over thousands of tiles.
SLOW_ON_GPU = {
  "grouped_matmul": ("reference", "ragged_dot"),
  "grouped_swiglu": ("reference", "ragged_dot", "blocked"),
  "routed_swiglu": ("reference", "ragged_dot", "blocked"),
  "attention": ("reference", "xla"),
  "decode_attention": ("reference",),
  "quantized_matmul": ("reference", "xla"),
  "quantized_routed_swiglu": ("reference", "xla"),
}


def implementations(
  kernel: str, platform: str, wanted: Collection[str] = (), is_timed: bool = False
) -> list[str]:
  """Returns the names of the implementations to measure.

  Args:
    kernel: a key of `cases.IMPLEMENTATIONS`.
    platform: "cpu", "gpu" or "tpu".
    wanted: those asked for; none: chosen by the platform. On a CPU that is `blocked` and `xla`, or
      the reference, because the others multiply every row by every expert there.
    is_timed: whether they are run, not only compiled.
  """
  known = list(cases.IMPLEMENTATIONS[kernel])
  if wanted:
    return [name for name in known if name in wanted]
  if platform == "cpu":
    return [name for name in known if name in ("blocked", "xla")] or ["reference"]
  foreign = _ONLY_ON["gpu" if platform == "tpu" else "tpu"]
  slow = SLOW_ON_GPU.get(kernel, ()) if platform == "gpu" and is_timed else ()
  return [name for name in known if not name.startswith(foreign) and name not in slow]


def oracle(kernel: str, platform: str) -> str:
  """Returns the implementation that the others are checked against before they are timed.

  On a device it is XLA's form, where there is one: the reference of a published model's attention
  does not fit there, and that of its FP8 experts compiles for many minutes.
  """
  has_xla = "xla" in cases.IMPLEMENTATIONS[kernel]
  return "xla" if platform != "cpu" and has_xla else "reference"
