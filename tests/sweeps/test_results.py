"""Reading what became of a sweep's trials."""

import collections
import json
import os

import pytest

from dsmoe.sweeps import lease, results
from dsmoe.sweeps import record as record_lib
from dsmoe.sweeps import storage as storage_lib
from dsmoe.sweeps import study as study_lib
from tests.sweeps import fake_sweep


def test_trials_are_read_with_their_states(tmp_path):
  sweep = fake_sweep.make(tmp_path)
  states = collections.Counter(trial.state for trial in sweep.trials)
  assert states == {"complete": 12, "pruned": 1, "failed": 1, "interrupted": 1, "waiting": 3}
  assert [trial.number for trial in sweep.trials] == list(range(18))
  assert (sweep.name, sweep.fields) == ("fake", fake_sweep.FIELDS)
  first, second, fourth = sweep.trials[0], sweep.trials[1], sweep.trials[3]
  assert first.params == second.params != fourth.params
  assert (first.seed, second.seed) == (0, 1)
  assert first.value == fake_sweep.loss(first.params, 0, 80)
  assert first.workdir == tmp_path / "trials" / "0000" and first.seconds == 10.0
  assert sweep.trials[12].value is None
  assert sweep.trials[13].error == "the loss of step 41 must be finite, got nan"
  assert sweep.trials[17].params["optim.learning_rate"] == 8e-3


def test_a_trial_runs_while_its_lease_is_held(tmp_path):
  fake_sweep.make(tmp_path)
  with lease.Leases(tmp_path) as leases:
    assert leases.take(lease.trial_name(14))
    assert results.read(tmp_path).trials[14].state == "running"
  assert results.read(tmp_path).trials[14].state == "interrupted"


def test_a_trial_that_ends_while_it_is_looked_at_is_not_taken_for_an_interrupted_one(
  tmp_path, monkeypatch
):
  fake_sweep.make(tmp_path)
  study = study_lib.Study(tmp_path, record_lib.read(tmp_path))

  def ends(workdir, name):
    study.set_state(study.begun()[14], "complete", 3.0)
    return False

  monkeypatch.setattr(lease, "is_held", ends)
  trial = results.read(tmp_path).trials[14]
  assert (trial.state, trial.value) == ("complete", 3.0)


def test_a_finished_trial_stays_as_it_is(tmp_path):
  fake_sweep.make(tmp_path)
  study = study_lib.Study(tmp_path, record_lib.read(tmp_path))
  study.set_state(study.begun()[3], "failed", error="late")
  trial = results.read(tmp_path).trials[3]
  assert (trial.state, trial.error) == ("complete", "")


def test_a_trial_is_created_once(tmp_path):
  record_lib.write(tmp_path, plan := fake_sweep.record())
  one, other = (study_lib.Study(tmp_path, plan, creates=True) for _ in range(2))
  trials = [study.create(2, {"optim.learning_rate": 1.0}, 5, None) for study in (one, other)]
  assert trials[0]._trial_id == trials[1]._trial_id
  one.set_state(trials[0], "waiting")
  assert study_lib.state_of(other.fresh(trials[1])) == "waiting"


def test_half_a_line_of_a_killed_writer_is_cut_off(tmp_path):
  record_lib.write(tmp_path, plan := fake_sweep.record())
  study_lib.Study(tmp_path, plan, creates=True).create(0, {}, 0, None)
  path = tmp_path / "journal.log"
  whole = path.read_bytes()
  for number, half in ((1, b'{"op_code": 4, "wor'), (2, b"x" * 10_000)):
    with open(path, "ab") as file:
      file.write(half)
    study = study_lib.Study(tmp_path, plan)
    assert list(study.begun()) == list(range(number))
    study.create(number, {}, 0, None)
    assert b"}{" not in path.read_bytes() and path.read_bytes().startswith(whole)
  assert len(study_lib.Study(tmp_path, plan).begun()) == 3


def test_the_lock_of_a_killed_writer_is_free(tmp_path):
  record_lib.write(tmp_path, plan := fake_sweep.record())
  child = os.fork()
  if not child:
    from dsmoe.sweeps import journal

    with journal._locked(str(tmp_path / "journal.log.lock")):
      os.kill(os.getpid(), 9)
  os.waitpid(child, 0)
  assert not study_lib.Study(tmp_path, plan, creates=True).begun()


def test_what_is_refused(tmp_path):
  with pytest.raises(ValueError, match=r"must have the file sweep.json; .* has none"):
    results.read(tmp_path)
  plan = fake_sweep.record()
  record_lib.write(tmp_path, plan)
  with pytest.raises(ValueError, match=r"must have its study 'fake', and has none"):
    results.read(tmp_path)
  assert [path.name for path in tmp_path.iterdir()] == ["sweep.json"]
  study_lib.Study(tmp_path, plan, creates=True)
  other = plan._replace(identity="4567")
  with pytest.raises(ValueError, match=r"a storage must have one sweep of a name, .*'fake'"):
    study_lib.Study(tmp_path, other)
  with pytest.raises(ValueError, match=r"began with journal storage, which needs no --storage"):
    results.read(tmp_path, "postgresql://localhost/x")
  with pytest.raises(ValueError, match=r"must be postgresql://.*, got 'mysql'"):
    storage_lib.kind_of("mysql://localhost/x")
  (tmp_path / "sweep.json").write_text("[]")
  with pytest.raises(ValueError, match=r"sweep.json must be what a sweep has written"):
    record_lib.read(tmp_path)


TRIAL = {"point": 0, "seed": 0, "params": {"batch_size": 8}}


@pytest.mark.parametrize(
  ("field", "value", "message"),
  [
    ("name", 5, "name must be str, got 5"),
    ("pruner", {}, "pruner must be none or median, got {}"),
    ("pruner", None, "pruner must be dict, got None"),
    ("pruner", {"name": "median", "n_startup_trials": "5"}, "pruner must be none or median"),
    ("config", [], "config must be dict"),
    ("config", {}, "config must be a config with a seed"),
    ("fields", "seed", "fields must be list, got 'seed'"),
    ("fields", [3], r"fields\[0\] must be str, got 3"),
    ("draws", [[]], r"draws\[0\] must be dict, got \[\]"),
    ("trials", {}, "trials must be list, got {}"),
    ("trials", [], "trials must be a list of at least one trial"),
    ("trials", [TRIAL, 3], r"trials\[1\] must be dict, got 3"),
    ("trials", [TRIAL | {"seed": "0"}], r"trials\[0\].seed must be int, got '0'"),
    ("trials", [TRIAL | {"params": []}], r"trials\[0\].params must be dict or null, got \[\]"),
    ("trials", [TRIAL | {"more": 1}], r"trials\[0\] has no field more"),
    ("trials", [{"seed": 1}], r"trials\[0\] must have the field point"),
    ("trials", [TRIAL | {"params": None}], "experiment must be a search's file, got ''"),
    ("more", 1, "it has no field more"),
  ],
)
def test_a_sweep_file_of_odd_types_is_refused(tmp_path, field, value, message):
  record_lib.write(tmp_path, fake_sweep.record())
  path = tmp_path / "sweep.json"
  values = json.loads(path.read_text())
  path.write_text(json.dumps(values | {field: value}))
  with pytest.raises(ValueError, match=f"sweep.json must be what a sweep has written: {message}"):
    results.read(tmp_path)
  if isinstance(value, dict):
    path.write_text(json.dumps({name: values[name] for name in values if name != field}))
    with pytest.raises(ValueError, match=f"it must have the field {field}"):
      results.read(tmp_path)
  assert [file.name for file in tmp_path.iterdir()] == ["sweep.json"]


@pytest.mark.parametrize("text", [b"null", b"\xff", b"{", b"[" * 100_000])
def test_a_sweep_file_that_is_no_record_is_refused(tmp_path, text):
  (tmp_path / "sweep.json").write_bytes(text)
  with pytest.raises(ValueError, match=r"sweep.json must be what a sweep has written: "):
    results.read(tmp_path)


def test_a_storage_that_does_not_answer(tmp_path):
  plan = fake_sweep.record()._replace(storage="postgresql")
  with pytest.raises(
    ValueError, match=r"that answers: postgresql.psycopg://me:\*\*\*@127.0.0.1:9/"
  ):
    study_lib.Study(tmp_path, plan, "postgresql://me:secret@127.0.0.1:9/x")
