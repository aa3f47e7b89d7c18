"""The one table of parameters: specs, dtypes and weight decay of every parameter of a model."""

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from dsmoe.model import parameters
from tests.helpers import (
  mesh_of,
  random_parts,
  small_config,
)


def test_specs_of_every_parameter_of_a_model():
  config = small_config(**{"model.attention_bias": True})
  _, params, bias = random_parts(config, 0)
  sizes = dict(stage=1, data=4, expert=2, context=1, model=1)
  mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes))
  specs = parameters.specs(params, mesh)
  attention = {
    "q_a_proj": P(None, "data", "expert"),
    "q_b_proj": P(None, "data", None, "expert"),
    "kv_a_proj": P(None, "data", "expert"),
    "kv_b_proj": P(None, "data", None, "expert"),
    "o_proj": P(None, None, "expert", "data"),
  } | dict.fromkeys(["q_a_norm", "kv_a_norm", "q_a_bias", "kv_a_bias", "o_bias"], P())
  inward = P(None, "data", "expert")
  swiglu = {"w_gate": inward, "w_up": inward, "w_down": P(None, "expert", "data")}
  experts = {
    "w_gate": P(None, "expert", "data", None),
    "w_up": P(None, "expert", "data", None),
    "w_down": P(None, "expert", None, "data"),
  }
  block = {"attention_norm": P(), "mlp_norm": P(), "attention": attention}
  moe_block = block | {"mlp": {"router": inward, "experts": experts, "shared": swiglu}}
  assert specs == {
    "embed": P("expert", "data"),
    "head": P("data", "expert"),
    "norm": P(),
    "dense_layers": block | {"mlp": swiglu},
    "moe_layers": moe_block,
    "mtp": {
      "block": moe_block,
      "eh_proj": inward,
      **dict.fromkeys(["embed_norm", "hidden_norm", "norm"], P()),
    },
  }
  assert set(jax.tree.leaves(parameters.specs(bias, mesh), is_leaf=_is_spec)) == {P()}


def _is_spec(x):
  return isinstance(x, P)


def test_a_parameter_without_a_rule_or_of_another_rank_is_refused():
  mesh = mesh_of(1)
  with pytest.raises(ValueError, match=r"parameter mlp/w_side has no entry in parameters\.TABLE"):
    parameters.specs({"mlp": {"w_side": np.zeros((2, 3))}}, mesh)
  with pytest.raises(ValueError, match=r"mlp/router must .* \('embed', 'scores'\), got 3 dim"):
    parameters.specs({"mlp": {"router": np.zeros((2, 2, 2))}}, mesh)
  stack = {"moe_layers": {"mlp": {"router": np.zeros((2, 2))}}}
  with pytest.raises(ValueError, match=r"'scores'\) behind its stack, got 2 dimensions"):
    parameters.specs(stack, mesh)


def test_shapes_are_of_one_layer_and_a_misfit_is_named():
  params = {"dense_layers": {"mlp": {"w_down": np.zeros((3, 5, 6)), "w_up": np.zeros((3, 6, 5))}}}
  shapes = parameters.shapes(params)
  assert shapes == {"mlp/w_down": (5, 6), "mlp/w_up": (6, 5)}
  parameters.check_fit(shapes, mesh_of(2))
  message = r"parameter mlp/w_down: .*\{'data': 4\} must divide .*\{'ffn': 5, 'embed': 6\}"
  with pytest.raises(ValueError, match=message):
    parameters.check_fit(shapes, mesh_of(4))


def test_compute_cast_keeps_vectors_and_the_router():
  config = small_config(**{"model.compute_dtype": "bfloat16", "model.attention_bias": True})
  _, params, _ = random_parts(config, 0)
  cast = parameters.compute_cast(params, config.model)
  kept = {p[-1].key for p, x in jax.tree.leaves_with_path(cast) if x.dtype == np.float32}
  assert kept == {
    *("norm", "attention_norm", "mlp_norm", "q_a_norm", "kv_a_norm", "embed_norm", "hidden_norm"),
    *("q_a_bias", "kv_a_bias", "o_bias", "router"),
  }


def test_only_matrices_of_the_model_decay():
  config = small_config(**{"model.attention_bias": True})
  _, params, _ = random_parts(config, 0)
  mask = parameters.decayed(params)
  kept = {path[-1].key for path, on in jax.tree.leaves_with_path(mask) if not on}
  moved = {path[-1].key for path, on in jax.tree.leaves_with_path(mask) if on}
  assert kept == {
    *("norm", "attention_norm", "mlp_norm", "q_a_norm", "kv_a_norm", "embed_norm", "hidden_norm"),
    *("q_a_bias", "kv_a_bias", "o_bias"),
  }
  assert moved == {
    *("embed", "head", "q_a_proj", "q_b_proj", "kv_a_proj", "kv_b_proj", "o_proj", "eh_proj"),
    *("router", "w_gate", "w_up", "w_down"),
  }
