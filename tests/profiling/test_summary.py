"""The trace of real steps, part by part, and the bound of known chips."""

import gzip
import json

import jax
import pytest
import rich.console

from dsmoe.compilers import hlo
from dsmoe.parallel import mesh as mesh_lib
from dsmoe.profiling import capture, planes, scopes, show, summary
from dsmoe.training import hyperparameters, train_step
from tests import runs
from tests.helpers import random_batch, small_config
from tests.profiling import programs

# Parts that a mixture of experts over two devices has.
PRESENT = ("embed", "norm", "attention", "dense ffn", "route", "permute", "exchange", "experts")
PRESENT += ("combine", "shared", "head", "balance", "weights", "optimizer")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  """The trace of two steps on two devices that exchange rows."""
  folder = tmp_path_factory.mktemp("run")
  config = small_config(
    **runs.TWO_LAYERS,
    **{"mesh.data": 1, "mesh.expert": 2, "model.dispatch": "all_to_all"},
    **{"model.remat": "full", "profile.steps": "2:4"},
  )
  mesh = train_step.make_mesh(config, jax.devices()[:2])
  state = train_step.init_state(config, mesh)
  batch = mesh_lib.to_global(random_batch(config, 0), mesh)
  hyper = hyperparameters.of(config)
  with capture.named(config.profile):
    step_fn = train_step.make_train_step(config, mesh).lower(state, batch, hyper).compile()
  with capture.Capture(config, folder, mesh, 0, step_fn, 1e6, print) as profiler:
    for step in range(1, 5):
      profiler.before(step, state)
      state, _ = step_fn(state, batch, hyper)
      profiler.after(step, state)
  return folder


@pytest.mark.slow
def test_every_part_of_a_step_is_found(workdir):
  text = gzip.decompress(next(workdir.rglob("*.hlo.txt.gz")).read_bytes()).decode()
  program, (computations, entry) = scopes.program(text), hlo.parse(text)
  computing = [i for i, *_ in hlo.executed(computations, entry) if i.opcode in ("fusion", "dot")]
  unnamed = [i for i in computing if program.operations[i.name].part == scopes.UNNAMED]
  # What the compiler brings into another layout before it is first used carries its own name.
  others = [i for i in unnamed if 'op_name="state.' not in i.attributes]
  assert len(others) < 0.01 * len(computing) and all(i.opcode == "fusion" for i in others)
  found = summary.read(summary.find(workdir))
  assert found["steps"] == [2, 3] and found["platform"] == "cpu" and found["bound"] is None
  assert [row["device"] for row in found["devices"]] == [f"CPU:{i}" for i in range(2)]
  parts = found["parts"]
  for part in PRESENT:
    assert sum(parts[part].values()) > 0, part
  for part in ("attention", "route", "experts", "exchange"):
    assert parts[part]["forward"] > 0 and parts[part]["backward"] > 0, part
  assert parts["experts"]["recomputed"] > 0 and parts["optimizer"]["other"] > 0
  assert "other programs" not in parts
  clock = found["clock"]
  assert 0 < clock["exposed_collective_secs"] <= clock["collective_secs"] < clock["window_secs"]
  assert 0 <= clock["idle_secs"] < clock["window_secs"]


@pytest.mark.slow
def test_the_parts_add_up_to_all_operations(workdir):
  found = summary.read(workdir / "profiles" / "step_2")
  total = sum(sum(row.values()) for row in found["parts"].values())
  assert total == pytest.approx(found["secs"], rel=1e-9)
  (path,) = workdir.rglob("*.xplane.pb")
  events = [
    (dict(event.stats), event.duration_ns * 1e-9)
    for plane in jax.profiler.ProfileData.from_file(str(path)).planes
    for line in plane.lines
    for event in line.events
  ]
  around = ("while", "conditional", "call")
  operations = [
    secs
    for stats, secs in events
    if "hlo_op" in stats and stats["hlo_op"].split(".")[0] not in around
  ]
  assert total == pytest.approx(sum(operations) / (2 * 2), rel=1e-6)


@pytest.mark.slow
def test_a_damaged_trace_is_named(workdir, tmp_path):
  folder = tmp_path / "step_2"
  source = workdir / "profiles" / "step_2"
  for damaged in sorted(path.relative_to(source) for path in source.rglob("process_0.*")):
    for path in source.rglob("process_0.*"):
      target = folder / path.relative_to(source)
      target.parent.mkdir(parents=True, exist_ok=True)
      target.write_bytes(path.read_bytes())
    (folder / damaged).write_bytes(b"\x1f\x8bdamaged")
    with pytest.raises(ValueError, match=f"{damaged} is damaged: "):
      summary.read(folder)


@pytest.mark.parametrize("changed", [{"steps": []}, {"steps": "ab"}, {"num_processes": "2"}])
def test_odd_values_beside_a_trace_are_named(tmp_path, changed):
  values = about("H100", None)._asdict() | changed
  (tmp_path / "process_0.json").write_text(json.dumps(values))
  with pytest.raises(ValueError, match=r"process_0.json is damaged: steps \(.*must be whole"):
    summary.read(tmp_path)


def about(kind: str, links: float | None) -> capture.About:
  peaks = {"expert": links, "data": links}
  return capture.About([5], 0, 1, "gpu", kind, {"data": 1, "expert": 2}, 989e9, peaks)


def test_the_bound_of_a_known_chip():
  # H100: 989 TFLOP/s, 3,352 GB/s. Bytes of the program below: multiplications read two and write one
  # array of 8 numbers, the loop's body (once) one and one; 16 numbers are added; copies and
  # collectives read and write theirs.
  found = summary.bound(about("NVIDIA H100 80GB HBM3", 900e9), programs.HLO)
  assert found["compute_secs"] == pytest.approx(1e-3) and found["bound"] == "compute"
  assert found["bound_secs"] == found["compute_secs"]
  sent = 8 * 4 + 8 * 4 + 8 * 4  # two gathers of shards of 8 numbers, a sum of 8: 2 (n - 1) / n
  assert found["link_secs"] == {"expert": pytest.approx(sent / 450e9)}
  assert found["hbm_secs"] > 0
  assert summary.bound(about("NVIDIA H100 80GB HBM3", None), programs.HLO)["link_secs"] == {}
  assert summary.bound(about("cpu", None), programs.HLO) is None


def test_the_table_of_a_known_chip():
  line = [
    (f"%{n} = f32[8]{{0}} op()", 10 * i, 10 * i + 8, {}) for i, n in enumerate(["add", "sum"])
  ]
  data = programs.xspace({"/device:TPU:0": {"XLA Ops": line}})
  found = summary.figures(planes.devices(data, summary.scopes.program(programs.HLO)), 1)
  rest = {"folder": "a", "steps": [5], "platform": "gpu", "device_kind": "H100", "processes": [0]}
  rest |= {
    "num_processes": 2,
    "bound": summary.bound(about("NVIDIA H100 80GB HBM3", 9e11), programs.HLO),
  }
  console = rich.console.Console(width=100)
  with console.capture() as shown:
    for table in show.tables(found | rest):
      console.print(table)
  text = shown.get()
  for words in ("optimizer", "moe, rest", "least for the links along expert", "gap to the bound"):
    assert words in text
  assert show.heading(found | rest) == "step 5, 1 x H100 of 1 of 2 processes; ms of a step"
  assert "streams" in show.notes(found | rest)[0]
