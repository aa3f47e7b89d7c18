"""Decoding on a mesh: what lies where, and the `shard_map` of the compiled programs.

Rows and their pages are split over the axis `data`, whose devices each have whole rows, and number
the pages of their own part of the cache. Along `expert` and `model` devices have the same rows and
pages; each has its own experts, and its own heads, inner dimensions and part of the vocabulary, as
in training. A weight that is not split so is whole on every device: none is gathered for a token.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsmoe import model as model_lib
from dsmoe.config import MeshConfig, ModelConfig
from dsmoe.model import parameters
from dsmoe.parallel import mesh as mesh_lib
from dsmoe.parallel import sharding

ROWS_AXIS = "data"
ROWS = PartitionSpec(ROWS_AXIS)  # of arrays [rows, ...], and of pages [N, T, W]


def make_mesh(
  mesh: MeshConfig, config: ModelConfig, max_rows: int, devices: list[Any] | None = None
) -> Mesh:
  """Builds the mesh to load a run onto and to decode on, over `devices` (default: all there are).

  Raises:
    ValueError: where the mesh fits the devices, the model or the rows not; it names the nearest
      that does.
  """

  def fits(sizes: Mapping[str, int]) -> None:
    check_fit(config, max_rows, sizes)
    # Loaded weights lie as training stores them, before they are cast and moved.
    abstract = jax.sharding.AbstractMesh(tuple(sizes.values()), tuple(sizes))
    parameters.check_fit(model_lib.whole_shapes(config), abstract)

  return mesh_lib.make_mesh(mesh, devices, fits)


def check_fit(config: ModelConfig, max_rows: int, sizes: Mapping[str, int]) -> None:
  """Raises ValueError unless model and rows can be split over a mesh of these axis sizes."""
  for axis in ("stage", "context"):
    if sizes[axis] != 1:
      raise ValueError(
        f"the mesh axis {axis!r} must be 1 where tokens are generated, got {sizes[axis]}"
      )
  if max_rows % sizes[ROWS_AXIS]:
    raise ValueError(
      f"max_rows ({max_rows}) must be divisible by the mesh axis {ROWS_AXIS!r} ({sizes[ROWS_AXIS]})"
    )
  mesh = jax.sharding.AbstractMesh(tuple(sizes.values()), tuple(sizes))
  for entry, shape in model_lib.whole_shapes(config).items():
    parameters.computed_spec(tuple(entry.split("/")), shape, mesh)


def check(config: ModelConfig, max_rows: int, mesh: Mesh) -> None:
  """Raises ValueError where `check_fit` does, and for devices of several processes."""
  if mesh.is_multi_process:
    raise ValueError(
      "a mesh on which tokens are generated must have devices of one process only, got "
      f"{len({d.process_index for d in mesh.devices.flat})} processes"
    )
  check_fit(config, max_rows, mesh.shape)


def placed(tree: Any, mesh: Mesh) -> Any:
  """Moves parameters or router biases to where they are computed with, leaf by leaf.

  They may lie anywhere, as training stores them too: devices then exchange what they lack, and none
  holds more of a leaf than its own part of it.

  Args:
    tree: of the whole model.
    mesh: to decode on.
  """
  return jax.device_put(tree, mesh_lib.named(mesh, parameters.computed_specs(tree, mesh)))


def weight_specs(weights: Any, mesh: Mesh) -> Any:
  """Returns how `forward.Weights` are split over a mesh."""

  def spec(name: str, x) -> PartitionSpec:
    return parameters.computed_spec((name,), x.shape, mesh)

  def of_layer(layer):
    params, bias, absorbed = layer
    by_head = [sharding.computed_spec(("heads",), x.shape[:1], mesh.shape) for x in absorbed]
    return (
      parameters.computed_specs(params, mesh),
      parameters.computed_specs(bias, mesh),
      type(absorbed)(*by_head),
    )

  return weights._replace(
    embed_VD=spec("embed", weights.embed_VD),
    layers=tuple(map(of_layer, weights.layers)),
    norm_D=spec("norm", weights.norm_D),
    head_DV=spec("head", weights.head_DV),
    mtp=None if weights.mtp is None else of_layer(weights.mtp),
  )


def over_rows(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of arrays [rows, ...] and of pages [N, T, W], as programs return them.

  They leave out an axis of one device; another sharding, though equivalent, would be compiled anew.
  """
  return NamedSharding(mesh, ROWS if mesh.shape[ROWS_AXIS] > 1 else PartitionSpec())


def program(num_static: int, out_specs: Any) -> Callable[[Callable], Callable]:
  """Returns a decorator for functions of one device's arrays, which makes them ones of global arrays.

  A function's arguments are `num_static` static ones, the first of them the `Architecture` whose mesh
  it runs on, then the weights, then arrays: with the rows or pages first, or scalars. Without a mesh
  it stays as it is.

  Args:
    num_static: number of the static arguments.
    out_specs: of the results.
  """

  def on_its_mesh(fn: Callable) -> Callable:
    @functools.wraps(fn)
    def run(arch, *args):
      if arch.mesh is None:
        return fn(arch, *args)
      static, weights, arrays = args[: num_static - 1], args[num_static - 1], args[num_static:]
      specs = jax.tree.map(lambda x: ROWS if x.ndim else PartitionSpec(), arrays)
      in_specs = (weight_specs(weights, arch.mesh), *specs)
      one_device = functools.partial(fn, arch, *static)
      return mesh_lib.shard_map(one_device, arch.mesh, in_specs, out_specs)(weights, *arrays)

    return run

  return on_its_mesh
