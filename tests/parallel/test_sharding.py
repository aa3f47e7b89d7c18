"""Where a parameter's dimensions are stored: rules by hand, and every published model's meshes."""

import importlib
import itertools
import math

import pytest
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from dsmoe import model as model_lib
from dsmoe.model import parameters
from dsmoe.parallel import mesh as mesh_lib
from dsmoe.parallel import sharding
from dsmoe.training import train_step
from tests.regenerate_golden import load

ONES = dict.fromkeys(mesh_lib.AXES, 1)
PUBLISHED = ("deepseek_v2", "deepseek_v2_lite", "deepseek_v3", "kimi_k2", "moonlight_16b")


def _spec(dims: str, *shape: int, **sizes: int):
  return sharding.stored_spec(tuple(dims.split()), shape, ONES | sizes)


def test_axes_take_the_dimensions_they_prefer():
  two = dict(data=2, expert=2, context=2)
  assert _spec("embed heads head_dim", 8, 4, 6, **two) == P("data", "context", "expert")
  assert _spec("experts ffn embed", 4, 6, 8, **two) == P("expert", "context", "data")
  assert _spec("experts embed ffn", 4, 8, 6, **two) == P("expert", "data", "context")
  assert _spec("embed", 8, **two) == sharding.stored_spec((), (), two) == P()
  # `context` and `model` are there only if they have several devices.
  assert _spec("embed q_lora", 8, 6, data=2, expert=2) == P("data", "expert")
  assert _spec("joined embed", 16, 8, data=2, expert=2) == P("data", "expert")


def test_an_axis_moves_to_a_dimension_that_it_divides():
  # V3's latents: 256 does not divide 576, so `expert` takes the dimension that `data` prefers.
  assert _spec("embed kv_lora", 7168, 576, data=64, expert=256) == P("expert", "data")
  # V3's vocabulary is divisible by 256 but not by 512, its hidden size by both.
  assert _spec("vocab embed", 129280, 7168, expert=256) == P("expert", "data")
  assert _spec("vocab embed", 129280, 7168, expert=512) == P(None, ("data", "expert"))
  # A dimension is shared by several axes of more than one device only where there is no other.
  assert _spec("embed ffn", 8, 12, data=2, expert=4) == P("data", "expert")
  assert _spec("embed ffn", 8, 6, data=2, expert=4) == P("expert", "data")
  assert _spec("embed ffn", 8, 5, data=2, expert=4) == P(("data", "expert"), None)


def test_what_stays_split_in_computation_is_split_over_its_axis_first():
  cube = dict(data=2, expert=2, model=2)
  assert _spec("embed ffn", 8, 12, **cube) == P("data", ("model", "expert"))
  assert _spec("vocab embed", 12, 8, **cube) == P(("model", "expert"), "data")
  assert _spec("embed heads head_dim", 8, 2, 6, **cube) == P("data", "model", "expert")
  assert _spec("experts embed ffn", 2, 8, 6, **cube) == P("expert", "data", "model")
  # Nothing of these is computed in parts over `model`: all its devices store them.
  assert _spec("embed q_lora", 8, 6, **cube) == P("data", "expert")
  assert _spec("embed scores", 8, 6, **cube) == P("data", "expert")


def test_what_cannot_be_split_is_refused():
  with pytest.raises(ValueError, match=r"heads \(3\) must be divisible by .* 'model' \(2\)"):
    _spec("embed heads head_dim", 8, 3, 6, model=2)
  with pytest.raises(ValueError, match=r"experts \(6\) must be divisible by .* 'expert' \(4\)"):
    _spec("experts embed ffn", 6, 8, 6, expert=4)
  message = r"axes \{'data': 4, 'expert': 3\} must divide a dimension of \{'embed': 8, 'ffn': 10\}"
  with pytest.raises(ValueError, match=message):
    _spec("embed ffn", 8, 10, data=4, expert=3)
  with pytest.raises(ValueError, match=r"must be one of joined, embed, .* scores, got 'embedd'"):
    _spec("embedd ffn", 8, 6)
  with pytest.raises(ValueError, match=r"each logical dimension once, got \('embed', 'embed'\)"):
    _spec("embed embed", 8, 8)


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_model_fits_its_meshes(name):
  """Every power of two from 8 to 256 that divides the experts, with FSDP and `model` beside it."""
  model = load(name).model
  shapes = model_lib.whole_shapes(model)
  fitting = [n for n in (8, 16, 32, 64, 128, 256) if model.n_routed_experts % n == 0]
  assert max(fitting) == {"deepseek_v3": 256, "kimi_k2": 128, "deepseek_v2": 32}.get(name, 64)
  for expert, data, tensor in itertools.product(fitting, (1, 4, 16), (1, 8)):
    sizes = ONES | dict(data=data, expert=expert, model=tensor)
    mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes))
    parameters.check_fit(shapes, mesh)
    for entry, shape in shapes.items():
      dims = parameters.TABLE[entry].dims
      split = [sharding.axes_of(part) for part in sharding.stored_spec(dims, shape, sizes)]
      parts = math.prod(sizes[axis] for axes in split for axis in axes)
      owned = any(sharding.COMPUTED.get(dim) == "model" for dim in dims)
      # A matrix is stored once among all devices, or once on each device of `model`.
      assert parts == (1 if len(dims) < 2 else data * expert * (tensor if owned else 1)), entry


@pytest.mark.parametrize(
  "name, data",
  [
    ("deepseek_v2", 16),
    ("deepseek_v2_lite", 2),
    ("deepseek_v3", 64),
    ("kimi_k2", 128),
    ("moonlight_16b", 2),
  ],
)
def test_the_mesh_that_a_published_config_names_fits(name, data):
  config = load(name)
  assert (
    config.mesh.expert > 1
    and f"data {data} x expert" in importlib.import_module(f"experiments.{name}").__doc__
  )
  sizes = {axis: getattr(config.mesh, axis) for axis in mesh_lib.AXES} | {"data": data}
  train_step.check_fit(config, sizes)
