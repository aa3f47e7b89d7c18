"""The limits beside a loop over a list, what follows a bad step, and what is refused."""

import json
import statistics
import types

import numpy as np
import pytest

from dsmoe.config.recovery import RecoveryConfig
from dsmoe.training import bad_steps
from dsmoe.training.train_step import Gate

WINDOW = 6


def metrics_of(loss, grad_norm, is_made=True):
  finite = bool(np.isfinite(loss) and np.isfinite(grad_norm))
  losses = types.SimpleNamespace(total=np.float32(loss))
  made = finite and is_made
  return dict(losses=losses, grad_norm=np.float32(grad_norm), finite=finite, is_made=made)


def config_of(**fields):
  fields = {"bad_step": "skip", "spike_deviations": 2.5, "spike_window_steps": WINDOW} | fields
  return RecoveryConfig(**fields)


@pytest.mark.parametrize("ahead", [0, 1], ids=["all are fetched", "one is not fetched yet"])
def test_limits_are_deviations_above_the_mean_of_the_steps_before_the_last(ahead):
  """Whether or not the last step is fetched; what is not finite is left out, spikes are not."""
  rng = np.random.default_rng(0)
  values = [tuple(np.float32(3 + rng.random(2))) for _ in range(20)]
  values[8], values[11] = (np.float32(50), np.float32(3)), (np.float32(np.nan), np.float32(1))
  judge = bad_steps.BadSteps(config_of())
  judged = 0
  for step in range(1, 21):
    while judged < step - 1 - ahead:
      judged += 1
      judge.judge(judged, metrics_of(*values[judged - 1], is_made=judged != 9))
    if step == 15:  # as a start after a kill has it
      saved = json.loads(json.dumps(judge.to_dict()))
      if not ahead:  # checkpoints are saved when all is fetched
        judge = bad_steps.BadSteps(config_of(), saved)
    gate = judge.gate(step)
    known = [v for v in values[: max(step - 2, 0)] if np.isfinite(v).all()][-WINDOW:]
    assert gate.step == step - 1 and gate.step.dtype == np.int32
    for i, limit in enumerate((gate.max_loss, gate.max_grad_norm)):
      column = [float(v[i]) for v in known]
      expected = np.inf
      if len(column) >= WINDOW // 2:
        expected = statistics.mean(column) + 2.5 * statistics.stdev(column)
      assert limit.dtype == np.float32
      np.testing.assert_allclose(limit, expected, rtol=1e-6)


def test_without_spikes_there_is_no_limit_and_nothing_to_save():
  judge = bad_steps.BadSteps(RecoveryConfig())
  for step in range(1, 200):
    assert judge.judge(step, metrics_of(step, 1.0)) is None
  assert judge.gate(200) == (199, np.inf, np.inf)
  assert judge.to_dict() == {}
  assert judge.judge(200, metrics_of(np.inf, 1.0)) == "stop"
  for values, bad in (
    ((np.inf, 1.0), "loss (inf)"),
    ((2.0, np.nan), "gradient norm (nan)"),
    ((-np.inf, np.nan), "loss (-inf) and gradient norm (nan)"),
  ):
    reason = judge.reason(200, metrics_of(*values), judge.gate(200))
    assert reason == f"{bad} must be finite, at step 200"
  assert "config.recovery.bad_step=skip a run passes over such a step, with rewind" in (
    judge.why_stopped()
  )


def test_a_spike_is_named_with_its_limit():
  judge, gate = bad_steps.BadSteps(config_of()), Gate(np.int32(8), np.float32(3.5), np.float32(2))
  for values, bad in (
    ((3.5, 2.25), "gradient norm (2.25) must be at most 2.0, 2.5"),
    ((4.0, 1.0), "loss (4.0) must be at most 3.5, 2.5"),
    ((4.0, 8.0), "loss (4.0) must be at most 3.5 and gradient norm (8.0) must be at most 2.0, 2.5"),
  ):
    reason = judge.reason(9, metrics_of(*values), gate)
    expected = f"{bad} standard deviations above the mean of the latest steps, at step 9"
    assert reason == expected


def test_skipped_steps_in_a_row_end_the_run():
  judge = bad_steps.BadSteps(RecoveryConfig(bad_step="skip", max_in_a_row=2))
  bad, good = metrics_of(np.nan, 1.0), metrics_of(2.0, 1.0)
  verdicts = [judge.judge(n, m) for n, m in enumerate([bad, bad, good, bad], 1)]
  assert verdicts == ["skip", "skip", None, "skip"]
  assert judge.skipped() == "skipped (3 so far, 1 of at most 2 in a row)"
  judge = bad_steps.BadSteps(judge._config, json.loads(json.dumps(judge.to_dict())))  # resumed
  assert [judge.judge(n, bad) for n in (5, 6)] == ["skip", "stop"]
  assert judge.why_stopped() == "3 bad steps in a row are more than recovery.max_in_a_row (2)"


def test_a_run_goes_back_to_one_checkpoint_so_often_and_no_more():
  judge = bad_steps.BadSteps(RecoveryConfig(bad_step="rewind", max_in_a_row=2))
  assert judge.judge(7, metrics_of(np.nan, 1.0)) == "rewind"
  assert [judge.goes_back(step) for step in (6, 6, 8)] == [True] * 3
  assert judge.went_back() == "back to step 8 (3 returns so far, 1 of at most 2 to this checkpoint)"
  judge.restart({bad_steps.COUNTS: {"returns": 99}})  # those of the checkpoint are too old
  judge = bad_steps.BadSteps(judge._config, json.loads(json.dumps(judge.to_dict())))  # resumed
  assert [judge.goes_back(step) for step in (8, 8)] == [True, False]
  assert judge.why_stopped() == "the run has gone back to step 8 recovery.max_in_a_row (2) times"


@pytest.mark.parametrize(
  "fields, message",
  [
    (dict(bad_step="ignore"), "recovery.bad_step must be one of stop, skip, rewind, got 'ignore'"),
    (dict(max_in_a_row=3), r"max_in_a_row \(3\) must be 10 without recovery.bad_step 'skip' or"),
    (dict(bad_step="skip", rewind_more_batches=9), r"\(9\) must be 0 without recovery.bad_step 'r"),
    (dict(spike_window_steps=64), r"must be 128 without recovery.spike_deviations above 0"),
    (dict(spike_deviations=-1.0), "spike_deviations must be at least 0.0, got -1.0"),
    (dict(watchdog_secs=-5.0), "watchdog_secs must be at least 0.0, got -5.0"),
    (dict(spike_deviations=6.0, spike_window_steps=2), "spike_window_steps must be at least 4"),
    (dict(bad_step="skip", max_in_a_row=0), "max_in_a_row must be at least 1, got 0"),
  ],
)
def test_what_makes_no_sense_is_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    RecoveryConfig(**fields)
