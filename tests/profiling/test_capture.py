"""Which steps are traced, around loops that run ahead of the device or stop early."""

import collections
import json

import jax
import jax.numpy as jnp
import pytest

from dsmoe.profiling import capture
from tests.helpers import mesh_of, small_config


@pytest.fixture(scope="module")
def program():
  def step(x):
    return jnp.sin(x) @ x

  return jax.jit(step).lower(jax.ShapeDtypeStruct((64, 64), jnp.float32)).compile()


def run(program, workdir, steps: str, first: int, num_steps: int, stop_after=None, error=None):
  """Runs a loop that dispatches a step before it looks at the last one's result."""
  config = small_config(**{"profile.steps": steps, "num_steps": num_steps})
  said, secs = [], {}
  x = jnp.ones((64, 64)) / 64
  with capture.Capture(config, workdir, mesh_of(1), first, program, 5e6, said.append) as profiler:
    for step in range(first + 1, num_steps + 1):
      secs[step] = profiler.before(step, x)
      last, x = x, program(x)
      secs[step] += profiler.after(step, x)
      last.block_until_ready()
      if step == stop_after:
        break
      if step == error:
        raise FloatingPointError("not finite")
  return said, secs


def traced(folder) -> dict[str, int]:
  """Returns how often each program ran in a trace."""
  (path,) = folder.rglob("*.xplane.pb")
  runs = collections.defaultdict(set)
  for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
    for line in plane.lines:
      for event in line.events:
        stats = dict(event.stats)
        if "hlo_op" in stats:
          runs[stats["hlo_module"]].add(stats["run_id"])
  return {name: len(found) for name, found in runs.items()}


@pytest.mark.parametrize(
  "steps, first, stop_after, expected",
  [
    ("3:6", 0, None, [3, 4, 5]),
    ("2:4", 2, None, [3]),  # the run starts after step 2
    ("5:99", 0, None, [5, 6]),
    ("4:7", 0, 4, [4]),  # the run is stopped
  ],
)
def test_the_steps_of_the_trace(program, tmp_path, steps, first, stop_after, expected):
  said, secs = run(program, tmp_path, steps, first, 6, stop_after)
  (folder,) = (tmp_path / "profiles").iterdir()
  assert folder.name == f"step_{expected[0]}"
  assert traced(folder) == {"jit_step": len(expected)}
  about = json.loads((folder / "process_0.json").read_text())
  assert about["steps"] == expected and about["model_flops"] == 5e6
  assert about["platform"] == "cpu" and about["num_processes"] == 1
  assert set(about["mesh"].values()) == {1} and about["link_bytes_per_sec"] == {}
  named = {"3:6": "the steps 3 to 5", "2:4": "step 3", "5:99": "the steps 5 to 6", "4:7": "step 4"}
  assert said[-1].startswith(
    f"traced {named[steps]}, into {folder}; tracing makes these steps slow"
  )
  cut = [text for text in said[:-1] if text.startswith(f"profile.steps ({steps}): this run makes")]
  assert len(said) == 1 + len(cut) and bool(cut) == (steps in ("2:4", "5:99"))
  # What a trace costs is told for the first and the last traced step only.
  assert {step for step, took in secs.items() if took > 0} <= {expected[0], expected[-1]}
  assert secs[expected[0]] > 0


def test_steps_that_the_run_does_not_make(program, tmp_path):
  said, secs = run(program, tmp_path, "2:4", 4, 6)
  assert said == ["profile.steps (2:4): this run makes the steps 5 to 6; nothing will be traced"]
  assert not any(secs.values()) and not (tmp_path / "profiles").exists()
  assert run(program, tmp_path, "", 0, 3)[0] == []


def test_an_error_in_the_loop_keeps_the_trace(program, tmp_path):
  with pytest.raises(FloatingPointError):
    run(program, tmp_path, "1:5", 0, 6, error=2)
  about = json.loads((tmp_path / "profiles/step_1/process_0.json").read_text())
  assert about["steps"] == [1, 2]
  # Another trace can be taken, and replaces one of the same steps.
  run(program, tmp_path, "1:3", 0, 6)
  assert traced(tmp_path / "profiles/step_1") == {"jit_step": 2}


def test_a_loop_that_goes_back_begins_its_trace_anew(program, tmp_path):
  config = small_config(**{"profile.steps": "2:4", "num_steps": 5})
  x, said = jnp.ones((64, 64)) / 64, []
  with capture.Capture(config, tmp_path, mesh_of(1), 0, program, 5e6, said.append) as profiler:
    for step in (1, 2, 3, 2, 3, 4):
      if step == 3 and "gone back" not in said:  # the step before is bad
        profiler.drop()
        said.append("gone back")
        continue
      profiler.before(step, x)
      x = program(x)
      profiler.after(step, x)
    profiler.drop()  # nothing is open
  assert traced(tmp_path / "profiles/step_2") == {"jit_step": 2}
  assert json.loads((tmp_path / "profiles/step_2/process_0.json").read_text())["steps"] == [2, 3]
  assert said[0] == "gone back" and said[1].startswith("traced the steps 2 to 3") and len(said) == 2


def test_a_trace_that_cannot_be_written_does_not_end_the_run(program, tmp_path):
  (tmp_path / "profiles").write_text("a file where the folder should be")
  said, secs = run(program, tmp_path, "2:3", 0, 3)
  assert said[-1].startswith("the trace of step 2 could not be written: ") and len(secs) == 3


def test_traced_programs_are_compiled_with_their_own_names():
  field = "jax_compilation_cache_include_metadata_in_key"
  for steps in ("", "2:3"):
    config = small_config(**{"profile.steps": steps})
    with capture.named(config.profile):
      assert getattr(jax.config, field) == bool(steps)
    assert not getattr(jax.config, field)
