"""Which implementation `None` stands for: on chips they were compiled for, the compiled kernels.

The tests compile each kernel for the chips listed here. On these chips the compiled kernels are
the default, unless a kernel refuses the sizes or dtype at hand. On every other chip, and on CPU,
XLA's own forms are.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterable, Iterator, Mapping

import jax

# jax names v5p and v6e either way, depending on the version of the TPU runtime.
TPU_KINDS = ("TPU v5", "TPU v5p", "TPU v6 lite", "TPU v6e", "TPU7x")
GPU_CAPABILITIES = ("9.0",)  # Hopper: H100, H200

# By the name of a compiled implementation: a function that returns why its kernel does not take
# the operands, or None where it does.
Refusals = Mapping[str, Callable[[], str | None]]

_DEVICE: contextvars.ContextVar[jax.Device | None] = contextvars.ContextVar("device", default=None)


@contextlib.contextmanager
def tracing_for(device: jax.Device) -> Iterator[None]:
  """Makes a device, which need not be attached, the one that programs are traced for."""
  token = _DEVICE.set(device)
  try:
    yield
  finally:
    _DEVICE.reset(token)


def backend() -> str:
  """Returns "cpu", "gpu" or "tpu": what programs are traced for."""
  device = _DEVICE.get()
  return device.platform if device else jax.default_backend()


def device_kind() -> str:
  """Returns the name that jax gives to the kind of chip that programs are traced for."""
  return (_DEVICE.get() or jax.devices()[0]).device_kind


def compiled_kernels() -> str | None:
  """Returns the name of the implementation compiled for the chip traced for, or None."""
  if backend() == "tpu" and device_kind() in TPU_KINDS:
    return "mosaic_tpu"
  device = _DEVICE.get() or jax.devices()[0]
  if backend() == "gpu" and device.compute_capability in GPU_CAPABILITIES:
    return "mosaic_gpu"
  return None


def choose(
  implementation: str | None,
  implementations: Iterable[str],
  otherwise: str,
  refusals: Refusals | None = None,
) -> str:
  """Returns the implementation named, or what None stands for on the chip traced for.

  Args:
    implementation: the caller's choice; a named one is not checked against the refusals.
    implementations: the names there are.
    otherwise: what None stands for where no compiled kernel takes the operands.
    refusals: see `Refusals`; a kernel without an entry takes everything.

  Raises:
    ValueError: for an unknown name.
  """
  if implementation is None:
    kernels = compiled_kernels()
    if kernels is None or kernels not in implementations:
      return otherwise
    refused = (refusals or {}).get(kernels)
    return kernels if refused is None or refused() is None else otherwise
  if implementation not in implementations:
    names = ", ".join(implementations)
    raise ValueError(f"implementation must be one of {names}, got {implementation!r}")
  return implementation
