"""Runs of one process share their programs, and compute what each computes alone."""

import jax
import pytest

from dsmoe import train
from dsmoe.training import exchange_check, kernel_check, train_step
from dsmoe.training.programs import Programs
from tests import runs
from tests.helpers import mesh_of, small_config

QUICK = {
  **runs.TWO_LAYERS,
  "batch_size": 4,
  "num_steps": 3,
  "optim.warmup_steps": 1,
  "log.tensorboard": False,
  "log.log_every_steps": 1,
  "log.eval_every_steps": 2,
  "log.eval_batches": 1,
}
OTHER = {
  "seed": 3,
  "num_steps": 4,
  "model.initializer_range": 0.08,
  "balance.bias_update_speed": 0.01,
  "balance.sequence_loss_weight": 0.03,
  "loss.z_loss_weight": 0.01,
  "optim.learning_rate": 0.02,
  "optim.final_learning_rate": 0.005,
  "optim.warmup_steps": 2,
  "optim.beta2": 0.98,
  "optim.weight_decay": 0.3,
  "optim.clip_norm": 0.1,
  "data.seed": 5,
  "log.eval_every_steps": 4,
}
COMPILED = "/jax/core/compile/backend_compile_duration"


@pytest.fixture
def compiled():
  """Yields the names of the functions that JAX compiles, in order."""
  names: list[str] = []

  def note(event, _, fun_name="", **__):
    if event == COMPILED:
      names.append(fun_name)

  jax.monitoring.register_event_duration_secs_listener(note)
  yield names
  jax.monitoring.unregister_event_duration_listener(note)


@pytest.mark.slow
def test_a_run_with_other_arguments_compiles_no_program(compiled, tmp_path, monkeypatch):
  """Its metrics and its state are bitwise those of the run alone."""
  monkeypatch.setattr(train.train_step, "make_mesh", lambda config: mesh_of(1))
  config, other = small_config(**QUICK), small_config(**QUICK | OTHER)
  assert train.train(other, tmp_path / "alone").step == 4
  whole = {name for name in compiled if "train_step" in name or "initial" in name}
  assert len(whole) == 2, compiled
  programs = Programs()
  assert train.train(config, tmp_path / "first", programs=programs).step == 3
  compiled.clear()
  assert train.train(other, tmp_path / "shared", programs=programs).step == 4
  assert compiled == []
  arrays = [runs.checkpoint_arrays(tmp_path / name, 4) for name in ("alone", "shared")]
  runs.assert_bitwise_equal(*arrays)
  lines = [runs.comparable_metrics(tmp_path / name) for name in ("alone", "shared", "first")]
  assert lines[0] == lines[1] != lines[2]


def test_the_program_used_least_recently_goes_first(monkeypatch):
  made = []
  monkeypatch.setattr(train_step, "make_eval_step", lambda c, _: (made.append(c.batch_size), c)[1])
  programs, mesh = Programs(limit=2), mesh_of(1)
  for batch_size in (1, 2, 1, 3, 1, 2):
    assert programs.eval_step(small_config(batch_size=batch_size), mesh).batch_size == batch_size
  assert made == [1, 2, 3, 2]
  programs.eval_step(small_config(batch_size=2), mesh_of(2))
  assert made == [1, 2, 3, 2, 2]


def test_what_was_checked_is_not_checked_again(monkeypatch):
  """What failed is; a check that had nothing to do says nothing."""
  lines = iter(["kernels checked", "again"])
  monkeypatch.setattr(kernel_check, "check", lambda _: next(lines))
  errors = iter([exchange_check.WrongExchangeError("wrong")])

  def check(*_):
    for error in errors:
      raise error

  monkeypatch.setattr(exchange_check, "check", check)
  programs, mesh = Programs(), mesh_of(1)
  config, other = small_config(), small_config(**{"optim.learning_rate": 0.5})
  with pytest.raises(exchange_check.WrongExchangeError, match="wrong"):
    programs.check(config, mesh)
  assert programs.check(config, mesh) == ["again"]
  assert programs.check(other, mesh) == programs.check(config, mesh) == []
