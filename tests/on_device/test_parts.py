"""What the parts run on a GPU is accepted by the programs and fits one device."""

import pytest
from absl import flags
from ml_collections import config_flags

from dsmoe import config as config_lib
from dsmoe.kernel_bench import cases, selection
from dsmoe.on_device import parts, training
from dsmoe.on_device.processes import Failed
from dsmoe.planning import accounting
from tests import runs

PARTS = {part.name: part for stage in parts.STAGES for lane in stage for part in lane}


class Recorder:
  """Stands for a runner: keeps the first command, and fails."""

  def __init__(self, folder):
    self.folder, self.secs, self.args = folder, 0.0, ()

  def start(self, *args):
    self.args = args
    raise Failed("only recorded")

  run = start


def command(name, tmp_path, is_dry_run: bool = False) -> tuple[str, ...]:
  (tmp_path / training.WORKDIR / "checkpoints").mkdir(parents=True, exist_ok=True)
  recorder = Recorder(tmp_path)
  with pytest.raises(Failed, match="only recorded"):
    PARTS[name].measure(recorder, [], is_dry_run)
  return recorder.args


def config_of(args) -> config_lib.Config:
  """The config that a script would build from these flags."""
  argv = ["script", *(arg for arg in args if arg.startswith("--config"))]
  found = flags.FlagValues()
  config_flags.DEFINE_config_file("config", None, "", flag_values=found, sys_argv=argv)
  found(argv)
  return config_lib.from_config_dict(found.config)


@pytest.mark.parametrize("name", [name for name in parts.NAMES if name != "values"])
def test_the_flags_are_accepted(name, tmp_path):
  """absl checks them and ends."""
  code, _, err = runs.call(*command(name, tmp_path), "--only_check_args")
  assert code == 0, err


def test_the_values_are_those_of_the_kernels_tests(tmp_path):
  args = command("values", tmp_path)
  assert args[:3] == ("-m", "pytest", "tests/pallas_kernels")
  assert args[args.index("-m", 1) + 1] == "hopper and not gpu"


@pytest.mark.parametrize("name", ["step_bfloat16", "step_fp8", "decode"])
def test_the_model_is_v2_lite_on_one_device(name, tmp_path):
  config = config_of(command(name, tmp_path))
  assert (config.mesh.expert, config.model.dispatch) == (1, "all_gather")
  assert (config.model.hidden_size, config.model.n_routed_experts) == (2048, 64)
  assert accounting.parameters(config.model)["total"] == pytest.approx(2.25e9, rel=0.01)
  precision = "fp8" if name == "step_fp8" else "compute_dtype"
  assert config.model.matmul_precision == precision
  if name != "decode":
    assert (config.batch_size, config.data.sequence_length) == (16, 2048)


def test_the_run_has_the_text_of_the_library_and_v2_lites_heads(tmp_path):
  config = config_of(command("train", tmp_path))
  assert config.data.train_globs == ("stdlib",) and config.num_steps == 200
  assert (config.model.qk_head_dim, config.model.v_head_dim) == (192, 128)
  assert config.checkpoint.save_every_steps * 2 == 100
  assert config_of(command("train", tmp_path, is_dry_run=True)).num_steps == 40


def test_every_kernel_is_timed_beside_baselines_that_exist():
  timed = {
    kernel: selection.implementations(kernel, "gpu", is_timed=True) for kernel in parts.KERNELS
  }
  assert all("mosaic_gpu" in names for names in timed.values())
  assert timed["grouped_matmul"] == ["mosaic_gpu", "batched", "jax_mosaic_gpu"]
  assert timed["attention"] == ["mosaic_gpu", "cudnn"]
  assert timed["decode_attention"] == ["xla", "mosaic_gpu"]
  assert timed["routing"] == ["reference", "mosaic_gpu"]
  assert selection.oracle("attention", "gpu") == "xla"
  assert selection.oracle("attention", "cpu") == selection.oracle("routing", "gpu") == "reference"
  for kernel, names in selection.SLOW_ON_GPU.items():
    assert set(names) < set(cases.IMPLEMENTATIONS[kernel])
  gradients = {name.removesuffix("_gradient") for name in cases.OPERATIONS}
  assert gradients - {"routed_swiglu"} == set(parts.KERNELS)  # it is timed with grouped_swiglu


def test_tests_that_are_cut_off_are_counted_by_their_lines():
  text = (
    "created: 8/8 workers\n[gw3] [  1%] PASSED tests/a.py::test_x[a b] \n"
    "[gw0] [ 50%] FAILED tests/a.py::test_y\nnoise PASSED\n[gw1] [100%] SKIPPED tests/b.py::test_z\n"
  )
  assert parts.counted_so_far(text) == {
    "passed": 1,
    "skipped": 1,
    "failed": 1,
    "failures": ["tests/a.py::test_y"],
    "is_cut_off": True,
  }
