import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dsmoe.config import MeshConfig
from dsmoe.model import parameters
from dsmoe.parallel import collectives, sharding
from dsmoe.parallel import mesh as mesh_lib
from tests.helpers import assert_close, equations, mesh_of, random_parts, small_config

ONES = dict(stage=1, data=1, expert=1, context=1, model=1)


def test_dimensions_are_stored_over_one_axis_each():
  assert sharding.stored_spec(("embed", "heads", "head_dim")) == P("data", None, "expert")
  assert sharding.stored_spec(("q_lora", "heads", "head_dim")) == P("data", None, "expert")
  assert sharding.stored_spec(("embed", "q_lora")) == P("data", "expert")
  assert sharding.stored_spec(("experts", "ffn", "embed")) == P("expert", None, "data")
  assert sharding.stored_spec(("joined", "embed")) == P("data", "expert")
  assert sharding.stored_spec(("embed",)) == sharding.stored_spec(()) == P()


def test_unknown_and_repeated_dimensions_are_refused():
  with pytest.raises(ValueError, match=r"must be one of joined, embed, .* scores, got 'embedd'"):
    sharding.stored_spec(("embedd", "ffn"))
  with pytest.raises(ValueError, match=r"each logical dimension once, got \('embed', 'embed'\)"):
    sharding.stored_spec(("embed", "embed"))


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


def test_make_mesh():
  mesh = mesh_lib.make_mesh(MeshConfig(**ONES | {"data": -1}))
  assert dict(mesh.shape) == ONES | {"data": 8} and mesh.axis_names == mesh_lib.AXES
  assert set(mesh.axis_types) == {AxisType.Auto}
  assert mesh_lib.num_batch_shards(mesh) == 8
  two = mesh_lib.make_mesh(MeshConfig(**ONES | {"data": -1}), jax.devices()[3:5])
  assert two.devices.reshape(-1).tolist() == jax.devices()[3:5]
  assert mesh_lib.single_device_mesh().size == 1


def test_a_mesh_that_does_not_fit_the_devices_is_refused():
  with pytest.raises(ValueError, match=r"'data': 3.* number of devices \(8\)"):
    mesh_lib.make_mesh(MeshConfig(**ONES | {"data": 3}))
  with pytest.raises(ValueError, match=r"number of devices \(2\)"):
    mesh_lib.make_mesh(MeshConfig(**ONES | {"data": 4}), jax.devices()[:2])


def test_an_axis_that_does_not_exist_yet_is_refused():
  with pytest.raises(ValueError, match=r"mesh.expert must be 1 \(that axis does not exist yet\)"):
    MeshConfig(**ONES | {"expert": 2})


def test_check_divisible_names_the_parameter():
  params = {"mlp": {"w_down": np.zeros((5, 6))}}
  parameters.check_divisible(params, mesh_of(2))
  with pytest.raises(ValueError, match=r"dimension 1 .*w_down.* \(6\) .* axis 'data' \(4\)"):
    parameters.check_divisible(params, mesh_of(4))


def _two_by_two():
  """Devices 2 along `data` and 2 along `expert`, which no config may ask for yet."""
  devices = np.array(jax.devices()[:4]).reshape(1, 2, 2, 1, 1)
  return Mesh(devices, mesh_lib.AXES, axis_types=(AxisType.Auto,) * 5)


@pytest.mark.parametrize("make_mesh", [lambda: mesh_of(4), _two_by_two], ids=["4", "2x2"])
def test_gather_gives_whole_weights_and_its_gradient_reduce_scatters(make_mesh):
  mesh = make_mesh()
  owners = mesh.shape["expert"]
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
  params = {
    "attention": {"o_proj": draw(3, 10, 8)},
    "norm": draw(5),
    "mlp": {"experts": {"w_gate": draw(6, 4, 7)}, "router": draw(8, 6)},
  }
  specs = parameters.specs(params)
  # Each device multiplies what it gathered by numbers of its own.
  factors = {
    "attention": {"o_proj": draw(4, 3, 10, 8)},
    "norm": draw(4, 5),
    "mlp": {
      "experts": {"w_gate": draw(mesh.shape["data"], 6, 4, 7)},
      "router": draw(4, 8, 6),
    },
  }
  batch = mesh_lib.batch_spec()
  factor_specs = {
    "attention": {"o_proj": batch},
    "norm": batch,
    # An expert has one owner along `expert`; the router's scores are everybody's.
    "mlp": {"experts": {"w_gate": P("data", "expert")}, "router": batch},
  }

  def loss(params, factors):
    def total(params):
      whole = parameters.gathered(params)
      assert whole["attention"]["o_proj"].shape == (3, 10, 8)
      assert whole["mlp"]["experts"]["w_gate"].shape == (6 // owners, 4, 7)
      assert whole["mlp"]["router"].shape == (8, 6)
      parts = jax.tree.map(lambda a, f: jnp.sum(a * f[0]), whole, factors)
      return sum(jax.tree.leaves(parts)), parts

    (_, parts), gradients = jax.value_and_grad(total, has_aux=True)(params)
    return collectives.sum_over_batch(parts), gradients

  run = mesh_lib.shard_map(loss, mesh, (specs, factor_specs), (P(), specs))
  parts, gradients = jax.jit(run)(params, factors)
  summed = jax.tree.map(lambda f: f.astype(np.float64).sum(axis=0), factors)
  assert_close(gradients, summed)
  expected = jax.tree.map(lambda a, s: (a * s).sum(), params, summed)
  assert_close(parts, expected)
  # What is as large as a weight is scattered; only scalars and vectors are summed whole.
  found = list(equations(jax.make_jaxpr(run)(params, factors).jaxpr))
  names = [e.primitive.name for e in found]
  assert "reduce_scatter" in names and "all_gather" in names
  sums = [e for e in found if e.primitive.name.startswith("psum")]
  assert sums and all(v.aval.size <= 5 for e in sums for v in e.outvars)


def test_named_wraps_every_spec():
  mesh = mesh_of(2)
  wrapped = mesh_lib.named(mesh, {"a": P("data"), "b": [P()]})
  assert wrapped == {"a": NamedSharding(mesh, P("data")), "b": [NamedSharding(mesh, P())]}
