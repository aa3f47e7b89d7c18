"""The one table of parameters: specs, dtypes and weight decay of every parameter of a model."""

import jax
import numpy as np
import pytest
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
  specs = parameters.specs(params)
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
  assert set(jax.tree.leaves(parameters.specs(bias), is_leaf=_is_spec)) == {P()}


def _is_spec(x):
  return isinstance(x, P)


def test_a_parameter_without_a_rule_or_of_another_rank_is_refused():
  with pytest.raises(ValueError, match=r"parameter mlp/w_side has no entry in parameters\.TABLE"):
    parameters.specs({"mlp": {"w_side": np.zeros((2, 3))}})
  with pytest.raises(ValueError, match=r"mlp/router must .* \('embed', 'scores'\), got 3 dim"):
    parameters.specs({"mlp": {"router": np.zeros((2, 2, 2))}})
  stack = {"moe_layers": {"mlp": {"router": np.zeros((2, 2))}}}
  with pytest.raises(ValueError, match=r"'scores'\) behind its stack, got 2 dimensions"):
    parameters.specs(stack)


def test_check_divisible_names_the_parameter():
  params = {"mlp": {"w_down": np.zeros((5, 6))}}
  parameters.check_divisible(params, mesh_of(2))
  with pytest.raises(ValueError, match=r"dimension 1 .*w_down.* \(6\) .* axis 'data' \(4\)"):
    parameters.check_divisible(params, mesh_of(4))


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
