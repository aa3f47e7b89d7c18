"""A process that hangs leaves its stacks, ends with the code for a restart, and resumes."""

import pytest

from dsmoe.reporting import goodput
from tests import runs

FIELDS = (
  "--config.data.validation_globs=()",
  "--config.model.num_nextn_predict_layers=0",
  "--config.num_steps=14",
)


@pytest.mark.slow
def test_a_run_that_hangs_ends_for_a_restart_and_goes_on(tmp_path):
  """First for want of a batch, then in a step; the launcher's third start finds all in order."""
  stuck = [f"--config={runs.SHORT_RUN}", f"--workdir={tmp_path}", *FIELDS]
  stuck.append("--config.recovery.watchdog_secs=6")
  for what, name, saved in (("data", "hang.0.txt", 3), ("step", "hang.0.1.txt", 6)):
    code, out, err = runs.finish(runs.start("tests/hanging_run.py", what, *stuck))
    assert code == 75, out + err
    text = (tmp_path / name).read_text()
    assert "in wait_for_ever" in text and "in _trained" in text and text in err
    assert text.startswith("process 0 of 1") and "stepping after step" in text
    assert runs.checkpoint_arrays(tmp_path, saved)["['step']"] == saved
  code, out, err = runs.finish(runs.start_training(tmp_path, *stuck[2:]))
  assert code == 0 and "resumed from step 6" in out, out + err
  assert sorted(path.name for path in tmp_path.glob("hang*")) == ["hang.0.1.txt", "hang.0.txt"]
  secs, num_starts = goodput.account(goodput.read(goodput.file_of(tmp_path, 0)))
  assert num_starts == 3 and secs["down"] > 0 and secs["made_again"] > 0 and not secs["stopped"]
  assert "lost between a kill and the next start" in out
