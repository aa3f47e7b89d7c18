"""What one platform's compiler likes, behind named functions; the measurements stand in its file.

The model asks these functions and never a platform's name. `current` is the platform a program is
traced for, which is not the default one when a TPU's program is compiled on a CPU machine.
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterator

import jax

from dsmoe.config import KernelsConfig
from dsmoe.platforms import cpu
from pallas_kernels.grouped_matmul import tile_table

_PLATFORM: contextvars.ContextVar[str | None] = contextvars.ContextVar("platform", default=None)


@contextlib.contextmanager
def compiling_for(platform: str) -> Iterator[None]:
  """Makes `platform` ("cpu", "gpu" or "tpu") the current one while a program is traced."""
  token = _PLATFORM.set(platform)
  try:
    yield
  finally:
    _PLATFORM.reset(token)


def current() -> str:
  """Returns the platform that programs are traced for: "cpu", "gpu" or "tpu"."""
  return _PLATFORM.get() or jax.default_backend()


def compiler_options(platform: str | None = None) -> dict[str, bool | str]:
  """Returns the XLA options for `jax.jit` that a platform's programs are compiled with.

  Args:
    platform: "cpu", "gpu" or "tpu"; None: the current one.
  """
  return dict(cpu.COMPILER_OPTIONS) if (platform or current()) == "cpu" else {}


def writes_out(num_layers: int) -> bool:
  """Returns whether a stack of layers is written out one by one instead of scanned.

  On GPU as well: the H200's figures in BENCHMARKS.md are of four layers written out, and a scan
  has not been measured there.
  """
  return current() != "tpu" and num_layers <= cpu.MAX_WRITTEN_OUT_LAYERS


def computed_once(fn: Callable, x_BS: jax.Array):
  """Returns fn(x_BS) for a cheap function of rows that many later operations read.

  `fn` maps [..., S] to arrays with the same leading dimensions.
  """
  return cpu.computed_once(fn, x_BS) if current() == "cpu" else fn(x_BS)


def experts_at_once() -> int:
  """Returns how many experts a decoding step multiplies in one round of its loop."""
  return cpu.EXPERTS_AT_ONCE  # other platforms have not been measured and take the same


def reads_chosen_experts(num_tokens: int) -> bool:
  """Returns whether so few tokens are decoded that reading weights dominates.

  Each chosen expert then multiplies all tokens, which spares sorting them: up to this many the
  products take less time than reading an expert's weights from memory.
  """
  return num_tokens <= 128


def device_memory(device: jax.Device) -> int | None:
  """Returns the bytes of memory that a device may use, or None where it is not known.

  Devices that are parts of one CPU share the machine's memory evenly.
  """
  if device.platform == "cpu":
    return cpu.machine_memory() // jax.local_device_count()
  return (device.memory_stats() or {}).get("bytes_limit")


def unusable_kernels(kernels: KernelsConfig) -> dict[str, str]:
  """Finds the choices of kernels that programs traced here cannot have.

  Returns:
    By field of `kernels`, one sentence that says why: a kernel of another platform, or a table of
    tile sizes that cannot be read.
  """
  found = {}
  for field, name in dataclasses.asdict(kernels).items():
    platform = {"mosaic_tpu": "tpu", "mosaic_gpu": "gpu"}.get(name, current())
    if platform != current():
      found[field] = (
        f"kernels.{field} must be an implementation for {current()} or None, "
        f"got {name!r}, which runs on {platform} only"
      )
  if kernels.tuned is not None:
    try:
      tile_table.load(kernels.tuned)
    except ValueError as error:
      found["tuned"] = str(error)
  return found


def check_kernels(kernels: KernelsConfig) -> None:
  """Raises ValueError, with its sentence, for the first choice that `unusable_kernels` finds."""
  for reason in unusable_kernels(kernels).values():
    raise ValueError(reason)
