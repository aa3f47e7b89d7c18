"""Compares two checkpoints layer by layer, by their activations for the same random tokens.

One layer of each is in memory at a time. Either may be a published folder or a run's workdir.

Shapes: B rows, S tokens of a row, D hidden, V vocabulary.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import rich.box
import rich.table
from flax import nnx

from dsmoe import checkpoint
from dsmoe import model as model_lib
from dsmoe.checkpoint import slices
from dsmoe.config import ModelConfig
from dsmoe.huggingface import loading
from dsmoe.huggingface.config import FIELDS, fail
from dsmoe.huggingface.convert import leaf_shapes, state_path
from dsmoe.model import attention, mtp, parameters, rope
from dsmoe.model.block import Block
from dsmoe.model.layers import rms_norm
from dsmoe.parallel import mesh as mesh_lib


class Source(NamedTuple):
  """A checkpoint whose tensors are read when they are needed."""

  config: ModelConfig
  slots: dict[str, loading.Slot]
  read: Callable[[str], np.ndarray]  # a published tensor by name, in our layout, float32


class StepDifference(NamedTuple):
  """How the activations of two checkpoints differ after one step of the model."""

  name: str
  difference: float  # largest difference, each checkpoint computing from its own activations
  alone: float  # largest difference if both get the first checkpoint's activations as input
  magnitude: float  # largest magnitude of the first checkpoint's activations


def open_source(path: str | pathlib.Path) -> Source:
  """Opens a published folder, or the newest checkpoint of a run.

  Raises:
    ValueError: when it is neither, or broken.
  """
  path = pathlib.Path(path)
  exact: dict[str, Any] = {"compute_dtype": "float32", "dispatch": "local", "remat": "none"}
  if not (path / checkpoint.CHECKPOINTS).exists():
    opened = loading.open_pretrained(path, **exact)
    loading.check_copies(opened)
    slots = opened.slots
    return Source(
      opened.config,
      slots,
      lambda name: slots[name].to_ours(opened.read(name).astype(np.float32, copy=False)),
    )
  config = dataclasses.replace(checkpoint.load_config(path).model, **exact)
  step = checkpoint.find_step(path)
  arrays = slices.open_step(path, step, leaf_shapes(config))
  slices.check_arrays(path, step, arrays, leaf_shapes(config))
  slots = loading.layout(*model_lib.shapes_of(config)[1:], config)

  def read(name: str) -> np.ndarray:
    part = arrays[state_path(slots[name].path)][slots[name].at].read().result()
    return part.astype(np.float32, copy=False)

  return Source(config, slots, read)


def _layer(source: Source, stack: str, index: int) -> tuple[dict, dict]:
  """Reads one layer of a stack; returns its (params, router_bias), nested dicts of float32."""
  shapes = leaf_shapes(source.config)
  leaves: dict[tuple[str, ...], np.ndarray] = {}
  # In the order of leaves, for `slices.Arrays`.
  for name, slot in sorted(source.slots.items(), key=lambda item: item[1][:2]):
    if slot.path[0] == stack and slot.at[0] == index:
      if slot.path not in leaves:
        leaves[slot.path] = np.empty(shapes[state_path(slot.path)][1:], np.float32)
      leaves[slot.path][slot.at[1:]] = source.read(name)
  trees: tuple[dict, dict] = {}, {}
  for path, leaf in leaves.items():
    *modules, last = path[1:]
    node = trees[last == "router_bias"]
    for key in modules:
      node = node.setdefault(key, {})
    node[last] = leaf
  return trees


@functools.partial(jax.jit, static_argnums=(0, 1))
def _apply(graphdef, config, params, router_bias, *inputs):
  """Runs a block, or a module of multi-token prediction, on [B, S, D] inputs."""

  def forward(params, router_bias, *inputs):
    B, S, _ = inputs[0].shape
    cos_sin = rope.cos_sin(jnp.broadcast_to(jnp.arange(S), (B, S)), config)
    attend = attention.within_rows(None)
    return nnx.merge(graphdef, params, router_bias)(*inputs, cos_sin, attend)[0]

  rows = mesh_lib.batch_spec()
  mesh = mesh_lib.single_device_mesh()
  specs = (parameters.specs(params, mesh), parameters.specs(router_bias, mesh))
  specs += (rows,) * len(inputs)
  return mesh_lib.shard_map(forward, mesh, specs, rows)(params, router_bias, *inputs)


def _graph(config: ModelConfig, stack: str):
  """Returns the graphdef of one layer of a stack."""

  def build():
    rngs = nnx.Rngs(params=0)
    block = Block(config, stack != "dense_layers" and config.num_moe_layers > 0, rngs)
    return mtp.MTPModule(config, block, rngs) if stack == "mtp" else block

  return model_lib.split(jax.eval_shape(build))[0]


def _layers(config: ModelConfig) -> Iterator[tuple[str, str, int]]:
  """Yields (name, stack, index) of every layer of the main model."""
  for i in range(config.num_hidden_layers):
    dense = i < config.first_k_dense_replace
    stack = "dense_layers" if dense else "moe_layers"
    yield f"layer {i}", stack, i if dense else i - config.first_k_dense_replace


def _check_same_model(a: ModelConfig, b: ModelConfig) -> None:
  free = ("initializer_range", "max_position_embeddings", "num_nextn_predict_layers")
  names = [name for name in FIELDS if name not in free] + ["rope_theta", "rope_scaling"]
  for name in names:
    if getattr(a, name) != getattr(b, name):
      fail(
        f"both checkpoints must be of one model: {name} is {getattr(a, name)} in the first, "
        f"{getattr(b, name)} in the second"
      )


def compare(a: Source, b: Source, tokens_BS: np.ndarray) -> Iterator[StepDifference]:
  """Yields the differences after embedding, each layer, final norm, logits and MTP's logits.

  MTP layers that only one of them has are left out.

  Args:
    a, b: from `open_source`.
    tokens_BS: int32.

  Raises:
    ValueError: when the two are not of one model, naming the field.
  """
  _check_same_model(a.config, b.config)
  config, eps = a.config, a.config.rms_norm_eps
  graphs = {stack: _graph(config, stack) for stack in ("dense_layers", "moe_layers", "mtp")}

  def row(name: str, from_a, from_b, alone) -> StepDifference:
    # NumPy, because XLA's maximum on CPU can lose a NaN.
    from_a, from_b, alone = (np.asarray(x) for x in (from_a, from_b, alone))
    difference, apart = (float(np.abs(from_a - x).max()) for x in (from_b, alone))
    return StepDifference(name, difference, apart, float(np.abs(from_a).max()))

  def step(make, inputs_a, inputs_b):
    """Runs a step of each on its own stream, and of b on a's."""
    of_a, of_b = make(a), make(b)
    return of_a(*inputs_a), of_b(*inputs_b), of_b(*inputs_a)

  def layer_of(stack: str, index: int):
    return lambda source: functools.partial(
      _apply, graphs[stack], config, *_layer(source, stack, index)
    )

  def embed_of(tokens):
    return lambda source: lambda: jnp.asarray(source.read("model.embed_tokens.weight")[tokens])

  def norm_of(source):
    weight = source.read("model.norm.weight")
    return lambda x_BSD: rms_norm(x_BSD, weight, eps)

  def head_of(source):
    if config.tie_word_embeddings:
      head_DV = source.read("model.embed_tokens.weight").T
    else:
      head_DV = source.read("lm_head.weight")
    return lambda x_BSD: x_BSD @ head_DV

  xs = step(embed_of(tokens_BS), (), ())
  yield row("embedding", *xs)
  for name, stack, index in _layers(config):
    xs = step(layer_of(stack, index), xs[:1], xs[1:2])
    yield row(name, *xs)
  xs = step(norm_of, xs[:1], xs[1:2])
  yield row("final norm", *xs)
  yield row("logits", *step(head_of, xs[:1], xs[1:2]))
  for k in range(min(a.config.num_nextn_predict_layers, b.config.num_nextn_predict_layers)):
    ahead = step(embed_of(np.asarray(mtp.shift(tokens_BS, k + 1))), (), ())
    xs = step(layer_of("mtp", k), (xs[0], ahead[0]), (xs[1], ahead[1]))
    yield row(f"MTP layer {k}", *xs)
    yield row(f"MTP logits {k}", *step(head_of, xs[:1], xs[1:2]))


def worst(rows: list[StepDifference]) -> StepDifference:
  """Returns the step with the largest difference of its own; NaN is worse than any number."""
  return max(rows, key=lambda row: np.inf if np.isnan(row.alone) else row.alone)


def exceeds(rows: list[StepDifference], tolerance: float) -> bool:
  """Says whether any logits differ by more than `tolerance`, or are not numbers."""
  return any("logits" in row.name and not row.difference <= tolerance for row in rows)


def table(rows: list[StepDifference]) -> rich.table.Table:
  """Lays the rows out for a terminal, the worst step marked."""
  result = rich.table.Table(box=rich.box.SIMPLE)
  for name in ("after", "difference", "of this step alone", "largest magnitude", ""):
    result.add_column(name, justify="left" if name in ("after", "") else "right")
  for row in rows:
    mark = "worst" if row is worst(rows) else ""
    numbers = (f"{x:.3g}" for x in row[1:])
    result.add_row(row.name, *numbers, mark, style="bold" if mark else None)
  return result
