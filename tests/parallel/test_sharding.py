import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dsmoe.config import MeshConfig
from dsmoe.parallel import sharding
from tests.helpers import assert_close, equations, mesh_of, random_parts, small_config

ONES = dict(stage=1, data=1, expert=1, context=1, model=1)


def test_rules_map_dimensions_to_axes():
  assert sharding.RULES.spec(("in", None, "out")) == P("data", None, "expert")
  assert sharding.RULES.spec(("experts", None, "in")) == P("expert", None, "data")
  assert sharding.RULES.spec(()) == P()


def test_rules_refuse_unknown_dimensions_and_repeated_axes():
  with pytest.raises(ValueError, match="must be one of in, out, experts, got 'inn'"):
    sharding.RULES.spec(("inn", "out"))
  with pytest.raises(ValueError, match=r"one dimension only, got \['expert', None, 'expert'\]"):
    sharding.RULES.spec(("experts", None, "out"))
  with pytest.raises(ValueError, match="one dimension only"):
    sharding.RULES.spec(("in", "in"))


def test_specs_of_every_parameter_of_a_model():
  config = small_config(**{"model.attention_bias": True})
  _, params, bias = random_parts(config, 0)
  specs = sharding.parameter_specs(params)
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
  assert set(jax.tree.leaves(sharding.parameter_specs(bias), is_leaf=_is_spec)) == {P()}


def _is_spec(x):
  return isinstance(x, P)


def test_a_parameter_without_a_rule_or_of_another_rank_is_refused():
  with pytest.raises(ValueError, match="parameter mlp/w_side has no entry in sharding"):
    sharding.parameter_specs({"mlp": {"w_side": np.zeros((2, 3))}})
  with pytest.raises(ValueError, match=r"parameter router has 4 dimensions, its rule \('in', 'out"):
    sharding.parameter_specs({"router": np.zeros((2, 2, 2, 2))})


def test_make_mesh():
  mesh = sharding.make_mesh(MeshConfig(**ONES | {"data": -1}))
  assert dict(mesh.shape) == ONES | {"data": 8} and mesh.axis_names == sharding.AXES
  assert set(mesh.axis_types) == {AxisType.Auto}
  assert sharding.num_batch_shards(mesh) == 8
  two = sharding.make_mesh(MeshConfig(**ONES | {"data": -1}), jax.devices()[3:5])
  assert two.devices.reshape(-1).tolist() == jax.devices()[3:5]
  assert sharding.single_device_mesh().size == 1


def test_a_mesh_that_does_not_fit_the_devices_is_refused():
  with pytest.raises(ValueError, match=r"'data': 3.* number of devices \(8\)"):
    sharding.make_mesh(MeshConfig(**ONES | {"data": 3}))
  with pytest.raises(ValueError, match=r"number of devices \(2\)"):
    sharding.make_mesh(MeshConfig(**ONES | {"data": 4}), jax.devices()[:2])


def test_an_axis_that_does_not_exist_yet_is_refused():
  with pytest.raises(ValueError, match=r"mesh.expert must be 1 \(that axis does not exist yet\)"):
    MeshConfig(**ONES | {"expert": 2})


def test_check_divisible_names_the_parameter():
  params = {"mlp": {"w_down": np.zeros((5, 6))}}
  sharding.check_divisible(params, mesh_of(2))
  with pytest.raises(ValueError, match=r"dimension 1 .*w_down.* \(6\) .* axis 'data' \(4\)"):
    sharding.check_divisible(params, mesh_of(4))


def _two_by_two():
  """Devices 2 along `data` and 2 along `expert`, which no config may ask for yet."""
  devices = np.array(jax.devices()[:4]).reshape(1, 2, 2, 1, 1)
  return Mesh(devices, sharding.AXES, axis_types=(AxisType.Auto,) * 5)


@pytest.mark.parametrize("make_mesh", [lambda: mesh_of(4), _two_by_two], ids=["4", "2x2"])
def test_gather_gives_whole_weights_and_its_gradient_reduce_scatters(make_mesh):
  mesh = make_mesh()
  owners = mesh.shape["expert"]
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
  params = {"o_proj": draw(3, 10, 8), "norm": draw(5), "experts": {"w_gate": draw(6, 4, 7)}}
  specs = sharding.parameter_specs(params)
  # Each device multiplies what it gathered by numbers of its own.
  factors = {
    "o_proj": draw(4, 3, 10, 8),
    "norm": draw(4, 5),
    "experts": {"w_gate": draw(mesh.shape["data"], 6, 4, 7)},
  }
  batch = sharding.batch_spec()
  factor_specs = {
    "o_proj": batch,
    "norm": batch,
    "experts": {"w_gate": P("data", "expert")},  # an expert has one owner along `expert`
  }

  def loss(params, factors):
    def total(params):
      whole = sharding.gather_weights(params)
      assert whole["o_proj"].shape == (3, 10, 8)
      assert whole["experts"]["w_gate"].shape == (6 // owners, 4, 7)
      parts = jax.tree.map(lambda a, f: jnp.sum(a * f[0]), whole, factors)
      return sum(jax.tree.leaves(parts)), parts

    (_, parts), gradients = jax.value_and_grad(total, has_aux=True)(params)
    return sharding.sum_over_batch(parts), gradients

  run = sharding.shard_map(loss, mesh, (specs, factor_specs), (P(), specs))
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
  wrapped = sharding.named(mesh, {"a": P("data"), "b": [P()]})
  assert wrapped == {"a": NamedSharding(mesh, P("data")), "b": [NamedSharding(mesh, P())]}
