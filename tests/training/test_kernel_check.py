"""Wrong kernels stop a run before its first step; right ones are named in one line."""

import dataclasses
import itertools
import re

import jax
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from dsmoe import platforms, train
from dsmoe.training import kernel_check, train_step
from pallas_kernels.grouped_matmul import api as grouped_matmul
from pallas_kernels.mla_attention import api as attention
from pallas_kernels.quantized_matmul import IMPLEMENTATIONS, xla
from pallas_kernels.quantized_matmul import experts as quantized
from pallas_kernels.routing import Rule
from pallas_kernels.routing import api as routing
from tests.helpers import mesh_of, small_config
from tests.runs import TWO_LAYERS


@pytest.fixture(autouse=True)
def interpreted():
  with pltpu.force_tpu_interpret_mode(), platforms.compiling_for("tpu"):
    yield


def _config(**kernels):
  changes = {f"model.kernels.{name}": value for name, value in kernels.items()}
  return small_config(**TWO_LAYERS | changes, num_steps=2, **{"optim.warmup_steps": 1})


def _wrong(fn, change):
  """A routing kernel whose results and gradient are changed afterwards."""

  def route(logits_ME, bias_E, rule):
    return change(fn(logits_ME, bias_E, rule))

  return route


@jax.custom_vjp
def _gradient_times_1_01(x):
  return x


_gradient_times_1_01.defvjp(lambda x: (x, None), lambda _, dx: (1.01 * dx,))


CHANGES = {
  "gate_MK": lambda r: r._replace(gate_MK=r.gate_MK.at[3, 1].multiply(1.001)),
  "expert_MK": lambda r: r._replace(expert_MK=r.expert_MK.at[2].set(r.expert_MK[2, ::-1])),
  "counts_E": lambda r: r._replace(counts_E=r.counts_E.at[5].add(1)),
  "rank_MK": lambda r: r._replace(rank_MK=r.rank_MK.at[4, 0].add(1)),
  "gradient of logits_ME": lambda r: r._replace(gate_MK=_gradient_times_1_01(r.gate_MK)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_wrong_kernel_stops_the_run_before_its_first_step(monkeypatch, tmp_path, name):
  """A value, an index, a count, a rank or a gradient: each is found and named."""
  right = routing.IMPLEMENTATIONS["mosaic_tpu"]
  monkeypatch.setitem(routing.IMPLEMENTATIONS, "mosaic_tpu", _wrong(right, CHANGES[name]))
  monkeypatch.setattr(train_step, "make_train_step", lambda *_: pytest.fail("the run went on"))
  with pytest.raises(kernel_check.WrongKernelError) as error:
    train.train(_config(routing="mosaic_tpu"), tmp_path)
  how = {
    "gate_MK": r"by [1-9]\.\de-0[34] of the largest magnitude \(limit 1e-04\)",
    "expert_MK": r"in 2 of 84 entries \(limit 0\)",
    "counts_E": r"in 1 of 12 entries \(limit 0\)",
    "rank_MK": r"in 1 of 84 entries \(limit 0\)",
    "gradient of logits_ME": r"by 1\.0e-02 of the largest magnitude \(limit 1e-04\)",
  }[name]
  expected = (
    r"kernel routing \(mosaic_tpu\) on cpu is wrong: with 28 tokens and 3 of 12 experts, "
    rf"{re.escape(name)} differs from the implementation 'reference' {how}; "
    r"set model\.kernels\.routing=reference to run without it"
  )
  assert re.fullmatch(expected, str(error.value)), str(error.value)
  assert not list(tmp_path.iterdir())  # nothing has been written


def test_right_kernels_are_named_and_the_run_goes_on(monkeypatch, tmp_path, capsys):
  # On one device: interpreted kernels wait for each other inside steps that wait for each other.
  mesh = mesh_of(1)
  monkeypatch.setattr(train.train_step, "make_mesh", lambda _: mesh)
  assert train.train(_config(routing="mosaic_tpu"), tmp_path).step == 2
  assert re.search(
    r"^kernels checked: routing mosaic_tpu in \d+\.\d s$", capsys.readouterr().out, re.M
  )


def test_every_compiled_kernel_of_a_config_is_checked(monkeypatch):
  """Attention, routing and experts; and the FP8 ones in place of those where they are on."""
  monkeypatch.setattr(kernel_check, "_run", lambda _: None)
  names = dict.fromkeys(
    ("attention", "routing", "grouped_matmul", "quantized_matmul"), "mosaic_tpu"
  )
  config = _config(**names)
  line = kernel_check.check(config)
  named = "attention mosaic_tpu, routing mosaic_tpu, grouped_matmul mosaic_tpu"
  assert re.fullmatch(rf"kernels checked: {named} in \d+\.\d s", line)
  model = dataclasses.replace(config.model, matmul_precision="fp8")
  line = kernel_check.check(dataclasses.replace(config, model=model))
  named = "attention mosaic_tpu, routing mosaic_tpu, quantized_routed_swiglu mosaic_tpu, "
  named += "quantized_matmul mosaic_tpu"
  assert re.fullmatch(rf"kernels checked: {named} in \d+\.\d s", line)
  model = dataclasses.replace(config.model, dispatch="dense", first_k_dense_replace=2)
  line = kernel_check.check(dataclasses.replace(config, model=model))
  assert re.fullmatch(r"kernels checked: attention mosaic_tpu in \d+\.\d s", line)


def test_a_kernel_is_checked_at_the_sizes_of_one_device():
  config = _config(grouped_matmul="mosaic_tpu")
  model = dataclasses.replace(config.model, num_attention_heads=4)
  config = dataclasses.replace(config, model=model)
  split = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, model=2))
  whole, part = (list(kernel_check._checks(c))[-1].shapes for c in (config, split))
  assert "28 tokens" in whole and "40 x 18" in whole
  assert "56 tokens" in part and "40 x 9" in part


@pytest.mark.parametrize(
  "kernels", [{}, {"routing": "reference", "grouped_matmul": "ragged_dot", "attention": "xla"}]
)
def test_nothing_runs_where_nothing_is_compiled(monkeypatch, kernels):
  monkeypatch.setattr(kernel_check, "_run", lambda _: pytest.fail("a check ran"))
  assert kernel_check.check(_config(**kernels)) is None


def _one_wrong(right, value):
  """A function that returns what `right` does, but for one element."""

  def wrong(*args):
    y = right(*args)
    return y.at[(0,) * y.ndim].set(value)

  return wrong


@pytest.mark.parametrize("value", [40.0, np.nan])  # a maximum may pass over a NaN
def test_a_wrong_value_of_attention(monkeypatch, value):
  config, table = _config(attention="mosaic_tpu"), attention.CAUSAL_IMPLEMENTATIONS
  monkeypatch.setitem(table, "mosaic_tpu", _one_wrong(table["mosaic_tpu"], value))
  message = (
    r"kernel attention \(mosaic_tpu\) .* with 14 tokens, 2 heads of 20 and 10, float32, output "
    r"differs .*; set model\.kernels\.attention=xla to run"
  )
  with pytest.raises(kernel_check.WrongKernelError, match=message):
    kernel_check.check(config)


@pytest.mark.slow
def test_attention_of_rows_that_are_split_over_devices(monkeypatch):
  config = _config(attention="mosaic_tpu")
  data = dataclasses.replace(config.data, sequence_length=512)
  mesh = dataclasses.replace(config.mesh, context=2)
  config = dataclasses.replace(config, data=data, mesh=mesh)
  assert "attention mosaic_tpu" in kernel_check.check(config)
  right = attention.CAUSAL_IMPLEMENTATIONS["mosaic_tpu"]
  wrong = lambda *args, starts_Y: right(*args, starts_Y=starts_Y * 0)  # noqa: E731
  monkeypatch.setitem(attention.CAUSAL_IMPLEMENTATIONS, "mosaic_tpu", wrong)
  with pytest.raises(kernel_check.WrongKernelError, match="512 tokens over 2 devices, 2 heads of"):
    kernel_check.check(config)


def test_right_and_wrong_experts(monkeypatch):
  config = _config(grouped_matmul="mosaic_tpu")
  assert "grouped_matmul mosaic_tpu" in kernel_check.check(config)
  monkeypatch.setattr(grouped_matmul.tpu, "routed_swiglu", lambda x_MD, *_: 0 * x_MD)
  message = (
    r"kernel grouped_matmul \(mosaic_tpu\) .* with 28 tokens, 3 of 5 experts, 40 x 18, float32, "
    r"tiles of 128 rows, output differs .* by 1\.0e\+00 of the largest magnitude \(limit 1e-03\); "
    r"set model\.kernels\.grouped_matmul=ragged_dot to run"
  )
  with pytest.raises(kernel_check.WrongKernelError, match=message):
    kernel_check.check(config)


@pytest.mark.parametrize("factor", [1.0, 1.03])
def test_right_and_wrong_fp8(monkeypatch, factor):
  """XLA's form stands for the kernels, whose values have tests of their own."""

  def routed_swiglu(power_of_two_scales, *args):
    return factor * quantized.quantized_routed_swiglu(*args, "xla", power_of_two_scales)

  monkeypatch.setattr(quantized, "_mosaic_tpu", routed_swiglu)
  monkeypatch.setitem(IMPLEMENTATIONS, "mosaic_tpu", xla)
  config = _config(quantized_matmul="mosaic_tpu")
  model = dataclasses.replace(config.model, matmul_precision="fp8")
  config = dataclasses.replace(config, model=model)
  if factor == 1:
    assert "quantized_routed_swiglu mosaic_tpu, quantized" in kernel_check.check(config)
    return
  message = r"output differs from the implementation 'xla' by .*quantized_matmul=xla to run without"
  with pytest.raises(kernel_check.WrongKernelError, match=message):
    kernel_check.check(config)


def test_a_kernel_that_does_not_run_is_named(monkeypatch):
  def route(*_):
    raise NotImplementedError("no such instruction\non this chip")

  monkeypatch.setitem(routing.IMPLEMENTATIONS, "mosaic_tpu", route)
  message = (
    r"kernel routing \(mosaic_tpu\) on cpu could not be run with 28 tokens and 3 of 12 experts: "
    r"no such instruction; set model\.kernels\.routing=reference to run without it"
  )
  with pytest.raises(kernel_check.WrongKernelError, match=message):
    kernel_check.check(_config(routing="mosaic_tpu"))


@pytest.mark.parametrize("group_score, kept", [("top2", 2), ("max", 3), ("max", 4)])
def test_margins_are_the_smallest_change_that_changes_a_choice(group_score, kept):
  """By trial: moving any score by less than half the margin leaves the choice as it was."""
  E, G, K = 12, 4, 3
  rule = Rule(K, G, kept, group_score, "sigmoid", True, 1.0)
  biased = np.random.default_rng(1).uniform(0, 1, (6, E))
  margins = kernel_check.margins(biased, rule)
  assert (margins > 0).all()

  def chosen(row):
    groups = row.reshape(G, -1)
    best = np.sort(groups, axis=1)[:, -(2 if group_score == "top2" else 1) :].sum(axis=1)
    own = np.argsort(-best, kind="stable")[:kept]
    row = np.where(np.isin(np.arange(E) // (E // G), own), row, -np.inf)
    return np.argsort(-row, kind="stable")[:K].tolist()

  changed = []
  for row, margin in zip(biased, margins):
    for e, f, step in itertools.product(range(E), range(E), (-1, 1)):
      moved = row.copy()
      moved[[e, f]] += 0.24 * margin * step * np.array([1, -1])
      assert chosen(moved) == chosen(row)
      moved = row.copy()
      moved[e] += 1.01 * margin * step
      changed.append(chosen(moved) != chosen(row))
  assert sum(changed) >= len(biased)


def test_inputs_hang_on_no_rounding(monkeypatch):
  """Every token kept is clear of ties, and of candidates that are not, none is kept."""
  model = small_config().model
  seen = {}
  margins = kernel_check.margins

  def some_close(biased_ME, rule):
    seen["margins"] = margins(biased_ME, rule)
    seen["margins"][:7] = 1e-6
    return seen["margins"]

  monkeypatch.setattr(kernel_check, "margins", some_close)
  logits, bias = kernel_check._clear_choices(model, 28)
  monkeypatch.undo()
  assert logits.shape == (28, 12) and bias.shape == (12,)
  first = np.random.default_rng(0).standard_normal((112, 12)).astype(np.float32)
  assert logits[0].tolist() == first[7].tolist()
