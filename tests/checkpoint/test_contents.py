"""Tests of dsmoe/checkpoint/contents.py: paths under which checkpoints are restored, or refused."""

import os
import sys

import numpy as np
import pytest

from dsmoe import checkpoint
from dsmoe.checkpoint import contents
from dsmoe.config import CheckpointConfig
from dsmoe.training.train_step import TrainState

KEEP_ALL = CheckpointConfig(save_every_steps=1, keep_last=100, keep_every_steps=0)
STATE = TrainState(
  np.array(3, np.int32), {"w": np.arange(6, dtype=np.float32)}, {"mu": np.ones(2, np.float32)}, {}
)


@pytest.mark.parametrize(
  "name",
  [
    *("lr=[3e-3]", "[!a]", "[", "a*b", "what?", "{x,y}", "100%", "p%20q", "#1", "~", "t~", "a:b"),
    *(
      "-dash",
      " lead",
      "trail ",
      "new\nline",
      "x'y\"z",
      "$HOME",
      "a@b",
      "ä日本",
      "..dots",
      "a|b;c",
    ),
    "runs/lr=[3e-3]/seed=[0]",
  ],
)
def test_a_path_is_never_a_pattern(tmp_path, name):
  workdir = tmp_path / name
  with checkpoint.Checkpointer(workdir, KEEP_ALL) as checkpoints:
    checkpoints.save(STATE, 7)
  with checkpoint.Checkpointer(workdir, KEEP_ALL) as checkpoints:
    restored, next_batch = checkpoints.restore(STATE, 3)
  assert next_batch == 7 and (workdir / "checkpoints" / "3").is_dir()
  np.testing.assert_array_equal(restored.params["w"], STATE.params["w"])
  params, _, _ = checkpoint.restore_weights(workdir, STATE.params, {})
  np.testing.assert_array_equal(params["w"], STATE.params["w"])


@pytest.mark.parametrize("name", ["back\\slash", "end\\", "gs:", "a\\[b", "c:/runs"])
def test_what_tensorstore_cannot_take_is_refused(tmp_path, name):
  with pytest.raises(ValueError, match="may have a backslash in its name or a colon at its end"):
    checkpoint.Checkpointer(tmp_path / name, KEEP_ALL)
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["", " "])
def test_an_empty_path_is_refused(name):
  with pytest.raises(ValueError, match="must be the name of a folder, got '"):
    checkpoint.Checkpointer(name, KEEP_ALL)


@pytest.mark.parametrize("name", ["gs://bucket/run", "gs://bucket/lr=[3]/run"])
def test_an_object_store_stays_one(name):
  checkpoint.check_path(name)
  assert os.fspath(contents.folder(name)) == f"{name}/checkpoints"
  assert os.fspath(contents.step_folder(name, 3)) == f"{name}/checkpoints/3"
  with pytest.raises(ValueError, match="may have a backslash in its name or a colon at its end"):
    checkpoint.check_path(f"{name}/a:/b")


def test_late_reads_of_a_damaged_checkpoint_say_nothing(tmp_path, monkeypatch, capsys):
  """What other threads raise after the damage was named; anything else is still printed."""
  monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
  monkeypatch.setattr(sys, "unraisablehook", sys.__unraisablehook__)
  contents._silence_late_reads.cache_clear()
  (tmp_path / "checkpoints").mkdir()
  with pytest.raises(ValueError, match=r"checkpoint 3 in .* must be whole, .*half a file"):
    with contents.named_damage(tmp_path, 3):
      raise RuntimeError("half a file")
  for text in ("Event loop is closed", "another fault"):
    sys.excepthook(RuntimeError, RuntimeError(text), None)
  printed = capsys.readouterr().err
  assert "another fault" in printed and "Event loop" not in printed
  contents._silence_late_reads.cache_clear()
