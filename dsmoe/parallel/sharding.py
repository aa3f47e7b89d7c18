"""The mesh, what is sharded over it, and the few collectives; the only file naming mesh axes.

The model is written from one device's view and runs inside `jax.shard_map`, manual over
every axis. Outside, arrays carry `NamedSharding`s from the rules below. A weight is
sharded over one mesh axis a dimension and gathered axis by axis, so that the gradient of
the gather is a reduce-scatter.
"""

import dataclasses
import math
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsmoe import config as config_lib

AXES = ("stage", "data", "expert", "context", "model")
BATCH_AXES = ("data", "expert")

# Logical dimensions of every parameter, by its name in the module tree, without the
# leading layer dimension of a stack. None: that dimension is never split.
PARAMETER_DIMS: dict[str, tuple[str | None, ...]] = {
  "embed": ("out", "in"),
  "head": ("in", "out"),
  "q_proj": ("in", None, "out"),
  "q_a_proj": ("in", "out"),
  "q_b_proj": ("in", None, "out"),
  "kv_a_proj": ("in", "out"),
  "kv_b_proj": ("in", None, "out"),
  "o_proj": (None, "out", "in"),
  "router": ("in", "out"),
  "eh_proj": ("in", "out"),
  "w_gate": ("in", "out"),
  "w_up": ("in", "out"),
  "w_down": ("out", "in"),
  "experts/w_gate": ("experts", "in", None),
  "experts/w_up": ("experts", "in", None),
  "experts/w_down": ("experts", None, "in"),
}


@dataclasses.dataclass(frozen=True)
class ShardingRules:
  """Mesh axis of each logical dimension."""

  axis_of: tuple[tuple[str, str], ...] = (
    ("in", "data"),
    ("out", "expert"),
    ("experts", "expert"),
  )

  def spec(self, dims: tuple[str | None, ...]) -> PartitionSpec:
    """Returns the PartitionSpec of an array with these logical dimensions.

    Raises:
      ValueError: for an unknown dimension, or two dimensions on one mesh axis.
    """
    table = dict(self.axis_of)
    for dim in dims:
      if dim is not None and dim not in table:
        raise ValueError(f"logical dimension must be one of {', '.join(table)}, got {dim!r}")
    axes = [None if dim is None else table[dim] for dim in dims]
    used = [axis for axis in axes if axis is not None]
    if len(set(used)) != len(used):
      raise ValueError(f"a mesh axis may split one dimension only, got {axes} for {dims}")
    return PartitionSpec(*axes)


RULES = ShardingRules()


def make_mesh(config: config_lib.MeshConfig, devices: list[Any] | None = None) -> Mesh:
  """Builds the mesh over `devices` (default: all there are).

  Raises:
    ValueError: when the axis sizes do not multiply to the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  sizes = {axis: getattr(config, axis) for axis in AXES}
  others = math.prod(size for size in sizes.values() if size != -1)
  if sizes["data"] == -1:
    sizes["data"] = max(len(devices) // others, 1)
  if math.prod(sizes.values()) != len(devices):
    raise ValueError(
      f"the mesh axes {sizes} must multiply to the number of devices ({len(devices)})"
    )
  grid = mesh_utils.create_device_mesh(tuple(sizes.values()), devices)
  return Mesh(grid, AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(AXES))


def single_device_mesh() -> Mesh:
  """A mesh of one device, every axis 1."""
  return make_mesh(
    config_lib.MeshConfig(stage=1, data=1, expert=1, context=1, model=1), jax.devices()[:1]
  )


def num_batch_shards(mesh: Mesh) -> int:
  """Parts into which a batch is split."""
  return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def batch_spec() -> PartitionSpec:
  """Of arrays [batch, ...]."""
  return PartitionSpec(BATCH_AXES)


def parameter_spec(path: tuple[Any, ...], ndim: int) -> PartitionSpec:
  """Returns the spec of the parameter at `path` (module names, then the parameter's).

  Vectors (norms, biases) are replicated; a leading layer dimension is never split.

  Raises:
    ValueError: when a matrix has no entry in `PARAMETER_DIMS`.
  """
  names = [str(getattr(key, "key", getattr(key, "name", key))) for key in path]
  names = [name for name in names if name != "value"]  # a leaf of an nnx.State, not of a dict
  dims = PARAMETER_DIMS.get("/".join(names[-2:]), PARAMETER_DIMS.get(names[-1]))
  if dims is None:
    if names[-1].endswith(("_norm", "norm", "_bias")):
      return PartitionSpec()
    raise ValueError(f"parameter {'/'.join(names)} has no entry in sharding.PARAMETER_DIMS")
  if ndim == len(dims) + 1:
    return PartitionSpec(None, *RULES.spec(dims))
  if ndim != len(dims):
    raise ValueError(f"parameter {'/'.join(names)} has {ndim} dimensions, its rule {dims}")
  return RULES.spec(dims)


def parameter_specs(params: Any) -> Any:
  """Maps `parameter_spec` over a tree of arrays or ShapeDtypeStructs."""
  return jax.tree.map_with_path(lambda path, x: parameter_spec(path, x.ndim), params)


def check_divisible(params: Any, mesh: Mesh) -> None:
  """Raises ValueError, naming the parameter, when a split dimension does not divide evenly."""

  def check(path, x):
    for dim, (size, axis) in enumerate(zip(x.shape, parameter_spec(path, x.ndim))):
      if axis is not None and size % mesh.shape[axis]:
        raise ValueError(
          f"dimension {dim} of parameter {jax.tree_util.keystr(path)} ({size}) must be divisible "
          f"by the mesh axis {axis!r} ({mesh.shape[axis]})"
        )

  jax.tree.map_with_path(check, params)


def named(mesh: Mesh, specs: Any) -> Any:
  """Turns a tree of PartitionSpecs into NamedShardings."""
  return jax.tree.map(
    lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda x: isinstance(x, PartitionSpec)
  )


# Collectives, called inside shard_map.


def gather_weights(params: Any) -> Any:
  """Gathers each parameter of one layer (no layer dimension left) to its full local size.

  The expert dimension of the routed experts stays split: those devices own them. The
  gradient of each gather is a reduce-scatter over the same axis.
  """

  def gather(path, x):
    spec = parameter_spec(path, x.ndim)
    owned = RULES.spec(("experts",))[0] if any("experts" in str(key) for key in path) else None
    for dim, axis in enumerate(spec):
      # Over an axis of one device it would be a copy.
      if axis is not None and axis != owned and jax.lax.axis_size(axis) > 1:
        x = jax.lax.all_gather(x, axis, axis=dim, tiled=True)
    return x

  return jax.tree.map_with_path(gather, params)


def sum_over_batch(x: Any) -> Any:
  """Sums over every device that holds a part of the batch."""
  return jax.lax.psum(x, BATCH_AXES)


def shard_map(fn: Any, mesh: Mesh, in_specs: Any, out_specs: Any) -> Any:
  """`jax.shard_map`, manual over all axes, checking what varies over which axis."""
  return jax.shard_map(fn, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=True)
