"""Every experiment: its goldens, and two steps of those that fit here."""

import dataclasses
import pathlib

import pytest
from absl import flags
from ml_collections import config_flags

from dsmoe import config as config_lib
from dsmoe import train
from dsmoe.planning import accounting
from dsmoe.reporting import metrics
from tests.regenerate_golden import EXPERIMENTS, load, texts

FOLDER = pathlib.Path(__file__).resolve().parent.parent / "experiments"


def test_every_experiment_is_listed():
  names = {path.stem for path in FOLDER.glob("*.py")} - {"__init__", "base"}
  assert names == set(EXPERIMENTS)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_golden(name):
  for path, text in texts(name).items():
    assert path.exists() and path.read_text(encoding="utf-8") == text, (
      f"{path.name} is not what experiments/{name}.py gives now; if that is meant: "
      "python -m tests.regenerate_golden"
    )


def test_bench_small_costs_what_its_peers_cost():
  config = load("bench_small")
  flops = accounting.flops_per_token(config.model, config.data.sequence_length)
  assert flops["causal"] / 1e6 == pytest.approx(25.8, abs=0.05)


def test_dense_twin_has_as_many_active_parameters():
  tiny, dense = (accounting.parameters(load(n).model) for n in ("tiny", "tiny_dense"))
  assert dense["active"] == tiny["active"]
  assert "routed_experts" not in dense["parts"]


@pytest.mark.parametrize(
  "name, factor",
  [("deepseek_v3", 40), ("deepseek_v2", 40), ("deepseek_v2_lite", 40), ("kimi_k2", 32)],
)
def test_released_models(name, factor):
  pre_training, released = load(name), load(name, "released")
  assert released.model.rope_scaling.factor == factor
  assert pre_training.model.rope_scaling.factor == 1
  counts = [accounting.parameters(c.model)["total"] for c in (pre_training, released)]
  assert counts[0] == counts[1]
  with pytest.raises(ValueError, match=r"must be empty or 'released'.*, got 'realeased'"):
    load(name, "realeased")


def from_command_line(name, *overrides):
  """Returns the config that a script would build from these flags."""
  argv = ["script", f"--config={FOLDER / name}.py", *overrides]
  values = flags.FlagValues()
  config_flags.DEFINE_config_file("config", None, "", flag_values=values, sys_argv=argv)
  values(argv)
  return config_lib.from_config_dict(values.config)


def test_optional_fields_can_be_set_and_set_to_none():
  names = [f.name for f in dataclasses.fields(config_lib.KernelsConfig)]
  unset = [f"--config.model.kernels.{name}=None" for name in names]
  config = from_command_line("deepseek_v3", "--config.model.q_lora_rank=None", *unset)
  assert config.model.q_lora_rank is None
  assert config.model.kernels == config_lib.KernelsConfig()
  fields = ("--config.model.q_lora_rank=48", "--config.model.kernels.attention=xla")
  config = from_command_line("moonlight_16b", *fields)
  assert (config.model.q_lora_rank, config.model.kernels.attention) == (48, "xla")


@pytest.mark.parametrize(
  ("override", "message"),
  [
    ("model.q_lora_rank=1.5", "config.model.q_lora_rank must be int, got 1.5 of type float"),
    ("model.q_lora_rank=none", "config.model.q_lora_rank must be int, got 'none' of type str"),
    ("model.q_lora_rank", "config.model.q_lora_rank must be int, got True of type bool"),
    ("model.kernels.routing=3", "config.model.kernels.routing must be str, got 3 of type int"),
  ],
)
def test_optional_fields_of_another_type_are_refused(override, message):
  with pytest.raises(ValueError, match=message):
    from_command_line("tiny", f"--config.{override}")


@pytest.mark.parametrize(
  "name",
  [
    "tiny_dense",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("tiny", "bench_small")),
  ],
)
def test_two_steps(name, tmp_path):
  config = load(name)
  config = dataclasses.replace(
    config,
    batch_size=8,
    num_steps=2,
    model=dataclasses.replace(
      config.model, vocab_size=128, hidden_size=32, intermediate_size=48, num_attention_heads=2
    ),
    optim=dataclasses.replace(config.optim, warmup_steps=1),
    data=dataclasses.replace(
      config.data,
      train_globs=("synthetic",),
      train_weights=(1.0,),
      validation_globs=("synthetic",),
      sequence_length=16,
    ),
    log=dataclasses.replace(config.log, plots=False, tensorboard=False),
  )
  assert train.train(config, tmp_path).step == 2
  rows = metrics.read_metrics(tmp_path)
  assert rows[-1]["step"] == 2 and rows[-1]["validation_loss"] == pytest.approx(4.85, abs=0.2)
