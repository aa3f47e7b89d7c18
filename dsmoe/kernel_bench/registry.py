"""The registry of operations that kernels are measured on, and of their implementations.

An operation draws its arguments (in equal groups, so that a compiled program and a timed one do the
same work), counts its FLOPs and declares its results; an implementation is a function of those
arguments. The least bytes of an operation are those of each argument and each result once.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsmoe.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Shape:
  """One device's share of a model's layer.

  Each device routes `tokens` tokens and, on average, receives as many rows as it sends.
  """

  config: ModelConfig
  tokens: int
  sequence_length: int  # divides tokens
  expert_devices: int  # devices the experts are spread over; divides n_routed_experts

  def __post_init__(self):
    if self.tokens % self.sequence_length:
      raise ValueError(
        f"sequence_length ({self.sequence_length}) must divide tokens ({self.tokens})"
      )
    if self.config.n_routed_experts % self.expert_devices:
      raise ValueError(
        f"expert_devices ({self.expert_devices}) must divide n_routed_experts "
        f"({self.config.n_routed_experts})"
      )

  @property
  def dims(self) -> tuple[int, int, int, int, int]:
    """Returns M, D, F, e, P."""
    c = self.config
    experts = c.n_routed_experts // self.expert_devices
    rows = self.tokens * c.num_experts_per_tok
    return self.tokens, c.hidden_size, c.moe_intermediate_size, experts, rows

  @property
  def attention_dims(self) -> tuple[int, int, int, int, int]:
    """Returns B, S, H, A, U."""
    c, S = self.config, self.sequence_length
    return self.tokens // S, S, c.num_attention_heads, c.qk_head_dim, c.v_head_dim


class Case(NamedTuple):
  """An operation by one implementation."""

  fn: Callable[..., Any]
  args: tuple[jax.ShapeDtypeStruct, ...]
  results: Any  # tree of `jax.ShapeDtypeStruct`
  flops: int

  @property
  def least_bytes(self) -> int:
    """Each argument read once and each result written once."""
    leaves = jax.tree.leaves((self.args, self.results))
    return sum(math.prod(a.shape) * a.dtype.itemsize for a in leaves)


class Operation(NamedTuple):
  """A computation, independent of its implementations."""

  draw: Callable[[Shape], tuple]  # draws the arguments, in jax.numpy for jax.eval_shape
  results: Callable[[Shape], Any]  # tree of `jax.ShapeDtypeStruct`
  flops: Callable[[Shape], int]  # multiplications and additions


OPERATIONS: dict[str, Operation] = {}
# Functions from a shape to a function of the operation's arguments. "reference" is plain JAX.
IMPLEMENTATIONS: dict[str, dict[str, Callable[[Shape], Callable]]] = {}


def case(kernel: str, implementation: str, shape: Shape) -> Case:
  """Builds a case.

  Raises:
    ImportError: if the implementation's library is not installed.
    ValueError: for an unknown kernel or implementation.
  """
  if kernel not in OPERATIONS:
    raise ValueError(f"kernel must be one of {', '.join(OPERATIONS)}, got {kernel!r}")
  known = IMPLEMENTATIONS[kernel]
  if implementation not in known:
    raise ValueError(
      f"implementation of {kernel} must be one of {', '.join(known)}, got {implementation!r}"
    )
  operation = OPERATIONS[kernel]
  args = jax.eval_shape(functools.partial(operation.draw, shape))
  fn = known[implementation](shape)
  return Case(fn, args, operation.results(shape), operation.flops(shape))


def known_args(kernel: str, shape: Shape) -> tuple:
  """Returns an operation's arguments: drawn integers, and the shapes of all others."""
  draw = functools.partial(OPERATIONS[kernel].draw, shape)
  structs = jax.eval_shape(draw)
  real = [jnp.issubdtype(a.dtype, jnp.inexact) for a in structs]
  drawn = jax.jit(lambda: [None if r else a for r, a in zip(real, draw())])()
  return tuple(s if a is None else np.asarray(a) for s, a in zip(structs, drawn))


def operation(kernel: str, results: Callable, flops: Callable) -> Callable:
  """Registers an operation by the function that draws its arguments."""

  def register(draw):
    OPERATIONS[kernel] = Operation(draw, results, flops)
    IMPLEMENTATIONS[kernel] = {}
    return draw

  return register


def implementation(kernel: str, name: str) -> Callable:
  """Registers a function from a shape to a function of the kernel's arguments."""

  def register(build):
    IMPLEMENTATIONS[kernel][name] = build
    return build

  return register


def implementations(
  kernel: str, fn: Callable, names: Iterable[str], keywords: Callable[[Shape], dict] | None = None
) -> None:
  """Registers a function that has an `implementation` argument, once for each name."""

  def build(name: str, shape: Shape) -> Callable:
    return functools.partial(fn, implementation=name, **(keywords(shape) if keywords else {}))

  for name in names:
    IMPLEMENTATIONS[kernel][name] = functools.partial(build, name)


def add_gradient(kernel: str, num_real: int, flops: Callable[[Shape], int]) -> None:
  """Registers a kernel's gradient: of its first `num_real` arguments, given its result's."""
  forward = OPERATIONS[kernel]

  def draw(shape: Shape):
    return *forward.draw(shape), normal(shape, *forward.results(shape).shape)

  def results(shape: Shape):
    return jax.eval_shape(functools.partial(draw, shape))[:num_real]

  def of(build: Callable) -> Callable:
    def build_gradient(shape: Shape):
      fn = build(shape)

      def run(*args):
        real, rest, dout = args[:num_real], args[num_real:-1], args[-1]
        return jax.vjp(lambda *real: fn(*real, *rest), *real)[1](dout)

      return run

    return build_gradient

  operation(f"{kernel}_gradient", results, flops)(draw)
  for name, build in IMPLEMENTATIONS[kernel].items():
    implementation(f"{kernel}_gradient", name)(of(build))


def normal(shape: Shape, *dims: int):
  """Returns standard normal numbers in the model's compute dtype, like activations."""
  return jax.random.normal(jax.random.key(len(dims)), dims).astype(shape.config.compute_dtype)


def weights(shape: Shape, *dims: int):
  return normal(shape, *dims) * dims[-2] ** -0.5


def equal(rows: int, groups: int):
  """Returns sizes of groups that differ by at most one row, int32."""
  return (rows // groups + (jnp.arange(groups) < rows % groups)).astype(jnp.int32)


def struct(*dims: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(dims, jnp.dtype(dtype))


def rows(shape: Shape, *dims: int) -> jax.ShapeDtypeStruct:
  return struct(*dims, dtype=shape.config.compute_dtype)
