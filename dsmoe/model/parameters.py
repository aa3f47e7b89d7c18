"""Every parameter of the model, in one table: its logical dimensions, dtype and weight decay.

Whatever needs to know a parameter's kind asks here: how it is stored and gathered, what is cast to
the compute dtype, what decays, what is counted. A parameter is found by its path in the module
tree below its stack: `moe_layers/mlp/router` is listed as `mlp/router`.

Logical dimensions: `parallel/sharding.py`. In shapes: L layers of a stack.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from jax.sharding import PartitionSpec

from dsmoe.config import ModelConfig
from dsmoe.parallel import collectives, sharding

# Modules whose parameters are stacked along a leading dimension of layers. What every MoE layer
# of a model reports or owns is listed in this order.
STACKS = ("dense_layers", "moe_layers", "mtp")


class Parameter(NamedTuple):
  """What one kind of parameter is."""

  dims: tuple[str, ...]  # logical dimensions, without the leading one of a stack
  float32: bool = False  # stays so in bfloat16 computation
  decays: bool = True  # under weight decay


def _vector(dim: str) -> Parameter:
  """Norm scales and biases: replicated, float32, not decayed."""
  return Parameter((dim,), float32=True, decays=False)


TABLE: dict[str, Parameter] = {
  "embed": Parameter(("vocab", "embed")),
  "head": Parameter(("embed", "vocab")),
  "norm": _vector("embed"),
  # A block.
  "attention_norm": _vector("embed"),
  "attention/q_proj": Parameter(("embed", "heads", "head_dim")),
  "attention/q_a_proj": Parameter(("embed", "q_lora")),
  "attention/q_a_bias": _vector("q_lora"),
  "attention/q_a_norm": _vector("q_lora"),
  "attention/q_b_proj": Parameter(("q_lora", "heads", "head_dim")),
  "attention/kv_a_proj": Parameter(("embed", "kv_lora")),
  "attention/kv_a_bias": _vector("kv_lora"),
  "attention/kv_a_norm": _vector("kv_lora"),
  "attention/kv_b_proj": Parameter(("kv_lora", "heads", "head_dim")),
  "attention/o_proj": Parameter(("heads", "head_dim", "embed")),
  "attention/o_bias": _vector("embed"),
  "mlp_norm": _vector("embed"),
  "mlp/w_gate": Parameter(("embed", "ffn")),
  "mlp/w_up": Parameter(("embed", "ffn")),
  "mlp/w_down": Parameter(("ffn", "embed")),
  # The router decides by small differences of scores.
  "mlp/router": Parameter(("embed", "scores"), float32=True),
  "mlp/router_bias": _vector("scores"),
  "mlp/experts/w_gate": Parameter(("experts", "embed", "ffn")),
  "mlp/experts/w_up": Parameter(("experts", "embed", "ffn")),
  "mlp/experts/w_down": Parameter(("experts", "ffn", "embed")),
  "mlp/shared/w_gate": Parameter(("embed", "ffn")),
  "mlp/shared/w_up": Parameter(("embed", "ffn")),
  "mlp/shared/w_down": Parameter(("ffn", "embed")),
  # An MTP module, around its block.
  "embed_norm": _vector("embed"),
  "hidden_norm": _vector("embed"),
  "eh_proj": Parameter(("joined", "embed")),
}


def _names(path: tuple[Any, ...]) -> list[str]:
  names = [str(getattr(key, "key", getattr(key, "name", key))) for key in path]
  return [name for name in names if name != "value"]  # a leaf of an nnx.State, not of a dict


def _entry(path: tuple[Any, ...]) -> str:
  """Returns the name under which the table lists the parameter at `path`."""
  names = _names(path)
  return "/".join(names[names[0] in STACKS :]).removeprefix("block/")


def is_stacked(path: tuple[Any, ...]) -> bool:
  """Returns whether the parameter at `path` has a leading dimension of layers."""
  return _names(path)[0] in STACKS


def of(path: tuple[Any, ...]) -> Parameter:
  """Returns the table's entry of the parameter at `path`, of the whole model or of one layer.

  Args:
    path: keys of a nested dict or of an nnx.State, or plain strings.

  Raises:
    ValueError: when the table has none.
  """
  name = _entry(path)
  if name not in TABLE:
    raise ValueError(f"parameter {'/'.join(_names(path))} has no entry in parameters.TABLE")
  return TABLE[name]


def is_matrix(path: tuple[Any, ...]) -> bool:
  """Returns whether tokens are multiplied with the parameter, or look rows up in it."""
  return len(of(path).dims) > 1


def spec(path: tuple[Any, ...], shape: tuple[int, ...], mesh) -> PartitionSpec:
  """Returns how the parameter at `path` is stored on a mesh.

  Args:
    path: as for `of`; below a stack's name it has a leading dimension, which is never split.
    shape: its sizes, the leading one of a stack included.
    mesh: a Mesh or AbstractMesh.

  Raises:
    ValueError: when the table has no entry or one with other dimensions, and where a mesh axis
      divides none of the parameter's dimensions.
  """
  parameter, lead = of(path), is_stacked(path)
  if len(shape) != len(parameter.dims) + lead:
    raise ValueError(
      f"parameter {'/'.join(_names(path))} must have the dimensions {parameter.dims}"
      f"{' behind its stack' if lead else ''}, got {len(shape)} dimensions"
    )
  stored = _stored(_entry(path), shape[lead:], mesh)
  return PartitionSpec(None, *stored) if lead and len(stored) else stored


def _stored(entry: str, shape: tuple[int, ...], mesh) -> PartitionSpec:
  """Returns how a parameter of an entry of the table is stored, without a stack's layers."""
  try:
    return sharding.stored_spec(TABLE[entry].dims, shape, mesh.shape)
  except ValueError as error:
    raise ValueError(f"parameter {entry}: {error}") from error


def computed_spec(path: tuple[Any, ...], shape: tuple[int, ...], mesh) -> PartitionSpec:
  """Returns how the parameter at `path` lies on a mesh while it is computed with.

  Args:
    path: as for `of`, of the whole model or of one layer.
    shape: its sizes; leading dimensions that the table does not list are not split.
    mesh: a Mesh or AbstractMesh.

  Raises:
    ValueError: naming the parameter, where a mesh axis does not divide a dimension that it splits.
  """
  dims = of(path).dims
  lead = len(shape) - len(dims)
  try:
    own = sharding.computed_spec(dims, shape[lead:], mesh.shape)
  except ValueError as error:
    raise ValueError(f"parameter {_entry(path)}: {error}") from error
  return PartitionSpec(*(None,) * lead, *own) if len(own) else own


def computed_specs(tree: Any, mesh) -> Any:
  """Maps `computed_spec` over a tree of parameters or router biases."""
  return jax.tree.map_with_path(lambda path, x: computed_spec(path, x.shape, mesh), tree)


def specs(tree: Any, mesh) -> Any:
  """Maps `spec` over a tree of parameters or router biases, arrays or ShapeDtypeStructs."""
  return jax.tree.map_with_path(lambda path, x: spec(path, x.shape, mesh), tree)


def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
  """Returns the shape of each kind of parameter of a tree, of one layer where it has a stack.

  Args:
    tree: whole parameters, arrays or ShapeDtypeStructs. Those of one entry of the table have one
      shape in all layers.
  """
  leaves = jax.tree.leaves_with_path(tree)
  return {_entry(path): x.shape[is_stacked(path) :] for path, x in leaves}


def check_fit(shapes: dict[str, tuple[int, ...]], mesh) -> None:
  """Raises ValueError, naming the parameter, where a mesh axis divides none of its dimensions."""
  for entry, shape in shapes.items():
    _stored(entry, shape, mesh)


def gathered(tree: Any, shapes: dict[str, tuple[int, ...]]) -> Any:
  """Gathers the parameters of one layer, or any without a stack's dimension, for computation.

  Call it inside `mesh.shard_map`. What is computed with split stays so: a device's own routed
  experts, its heads, its part of the feed-forward layers and of the vocabulary.

  Args:
    tree: this device's parts.
    shapes: of the whole parameters, from the function of that name.
  """
  with jax.named_scope("weights"):
    return jax.tree.map_with_path(
      lambda path, x: collectives.gather_weight(x, of(path).dims, shapes[_entry(path)]), tree
    )


def compute_cast(params: Any, config: ModelConfig) -> Any:
  """Casts parameters to the compute dtype, but for those that the table keeps in float32."""
  with jax.named_scope("weights"):
    return jax.tree.map_with_path(
      lambda path, x: x if of(path).float32 else x.astype(config.compute_dtype), params
    )


def decayed(params: Any) -> Any:
  """Returns a tree of bools: whether weight decay applies."""
  return jax.tree.map_with_path(lambda path, _: of(path).decays, params)


def by_stack(router_bias: Any) -> Iterator[tuple[str, jax.Array]]:
  """Yields the router bias [L, E] of each stack that has one, in the order of `STACKS`."""
  for name in STACKS:
    for leaf in jax.tree.leaves(router_bias.get(name, {})):
      yield name, leaf
