"""Wrong exchanges stop a run before its first step; right ones are named in one line."""

import re

import jax
import pytest

from dsmoe import train
from dsmoe.parallel import dispatch
from dsmoe.parallel import mesh as mesh_lib
from dsmoe.training import exchange_check, train_step
from pallas_kernels.routing import Routed, ranks
from tests.helpers import small_config

TWO = {"mesh.expert": 2, "mesh.data": 1, "model.dispatch": "all_to_all"}


@pytest.fixture
def checks_here(monkeypatch):
  monkeypatch.setattr(exchange_check, "PLATFORMS", ("cpu",))


def _mesh(config):
  m = config.mesh
  return mesh_lib.make_mesh(m, jax.devices()[: m.data * m.expert * m.context * m.model])


def _gates_exchanged(right, x_MD, routed, *rest):
  """The first token's first two gates are taken for each other."""
  gate_MK = routed.gate_MK.at[0, :2].set(routed.gate_MK[0, 1::-1])
  return right(x_MD, routed._replace(gate_MK=gate_MK), *rest)


def _row_to_another_expert(right, x_MD, routed, experts, config):
  E = config.n_routed_experts
  expert_MK = routed.expert_MK.at[3, 1].set((routed.expert_MK[3, 1] + E // 2) % E)
  counted = ranks(expert_MK, E)[::-1]
  return right(x_MD, Routed(expert_MK, routed.gate_MK, *counted), experts, config)


def _gradient_lost(right, x_MD, routed, *rest):
  gate_MK = routed.gate_MK.at[5].set(jax.lax.stop_gradient(routed.gate_MK[5]))
  return right(x_MD, routed._replace(gate_MK=gate_MK), *rest)


WRONG = {
  _gates_exchanged: r"the output differs from the oracle's by \d\.\de-0[12] \(limit 1e-04\)",
  _row_to_another_expert: r"the output differs from the oracle's by \d\.\de[-+]0\d \(limit 1e-04\)",
  _gradient_lost: r"the gradient of x differs from the oracle's by \d\.\de-0\d \(limit 1e-04\)",
}


@pytest.mark.parametrize("wrong", WRONG, ids=lambda fn: fn.__name__)
def test_a_wrong_exchange_stops_the_run_before_its_first_step(
  checks_here, monkeypatch, tmp_path, wrong
):
  right = dispatch.BACK_ENDS["all_to_all"]
  monkeypatch.setitem(dispatch.BACK_ENDS, "all_to_all", lambda *args: wrong(right, *args))
  monkeypatch.setattr(train_step, "make_train_step", lambda *_: pytest.fail("the run went on"))
  config = small_config(**TWO)
  mesh = _mesh(config)
  monkeypatch.setattr(train.train_step, "make_mesh", lambda _: mesh)
  with pytest.raises(exchange_check.WrongExchangeError) as error:
    train.train(config, tmp_path)
  expected = (
    r"exchange all_to_all on \{'expert': 2\} of cpu is wrong: with 128 tokens a device, 3 of 12 "
    r"experts, 40 x 18, float32, \{'receive_capacity': 2\.0, 'dropless_fallback': 'none', "
    rf"'moe_chunks': 1, 'precision': 'compute_dtype'\}}, routing balanced, {WRONG[wrong]}; "
    r"set model\.dispatch=all_gather to run without it"
  )
  assert re.fullmatch(expected, str(error.value)), str(error.value)
  assert not list(tmp_path.iterdir())  # nothing has been written


@pytest.mark.parametrize(
  "fields",
  [
    {
      "model.dispatch": "all_to_all",
      "model.exchange.dropless_fallback": "layer",
      "model.exchange.receive_capacity": 1.2,  # the skewed routing overflows, the even one does not
      "model.exchange.moe_chunks": 2,
      "mesh.context": 2,
      "mesh.model": 2,
      "mesh.expert": 2,
      "mesh.data": 1,
      "model.num_attention_heads": 4,
      "model.moe_intermediate_size": 20,
      "data.sequence_length": 16,
    },
    pytest.param(
      {"model.dispatch": "ring", "mesh.expert": 4, "mesh.data": 2, "model.remat": "full"},
      marks=pytest.mark.slow,
    ),
  ],
  ids=lambda fields: fields["model.dispatch"],
)
def test_right_exchanges_are_named(checks_here, fields):
  config = small_config(**fields)
  line = exchange_check.check(config, _mesh(config))
  assert re.fullmatch(
    rf"exchange checked: {config.model.dispatch} on \{{.*\}} of cpu in \d+\.\d s", line
  )


def test_an_exchange_that_does_not_run_is_named(checks_here, monkeypatch):
  def refuses(*_):
    raise NotImplementedError("no such operation\non this chip")

  monkeypatch.setitem(dispatch.BACK_ENDS, "all_to_all", refuses)
  config = small_config(**TWO)
  message = "exchange all_to_all on .* could not be run with 128 .*: no such operation; set model"
  with pytest.raises(exchange_check.WrongExchangeError, match=message):
    exchange_check.check(config, _mesh(config))


def test_nothing_runs_where_there_is_nothing_to_check(monkeypatch):
  monkeypatch.setattr(exchange_check.exchange_layer, "program", lambda *_: pytest.fail("it ran"))
  on_cpu = small_config(**TWO)
  assert exchange_check.check(on_cpu, _mesh(on_cpu)) is None
  monkeypatch.setattr(exchange_check, "PLATFORMS", ("cpu",))
  for fields in (
    {"mesh.data": 2},
    TWO | {"model.dispatch": "dense"},
    TWO | {"model.first_k_dense_replace": 5, "model.num_nextn_predict_layers": 0},
  ):
    config = small_config(**fields)
    assert exchange_check.check(config, _mesh(config)) is None


def test_the_layer_that_is_checked_fits_the_mesh_of_the_run():
  """Sizes are multiples of every axis, or the run's; the routing's are the run's."""
  model = small_config(
    **{"model.hidden_size": 1536, "model.moe_intermediate_size": 768, "model.n_routed_experts": 240}
  ).model
  mesh = jax.sharding.AbstractMesh((1, 6, 4, 1, 2), mesh_lib.AXES)
  small = exchange_check.narrow(model, mesh)
  assert (small.hidden_size, small.moe_intermediate_size, small.n_shared_experts) == (384, 384, 0)
  for name in ("n_routed_experts", "num_experts_per_tok", "n_group", "topk_group", "exchange"):
    assert getattr(small, name) == getattr(model, name)
