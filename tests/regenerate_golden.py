"""Every experiment's resolved config and parameter tree as text, and how to write them anew.

python -m tests.regenerate_golden
"""

import importlib
import json
import pathlib

import jax

from dsmoe import config as config_lib
from dsmoe import model as model_lib
from dsmoe.model import parameters
from dsmoe.parallel import mesh as mesh_lib
from dsmoe.parallel import sharding

GOLDEN = pathlib.Path(__file__).resolve().parent / "golden"
EXPERIMENTS = (
  *("tiny", "tiny_dense", "bench_small", "deepseek_v3", "deepseek_v2", "deepseek_v2_lite"),
  *("moonlight_16b", "kimi_k2"),
)


def load(name: str, *args) -> config_lib.Config:
  """Returns an experiment's checked config."""
  module = importlib.import_module(f"experiments.{name}")
  return config_lib.from_config_dict(module.get_config(*args))


def parameter_tree(config: config_lib.Config) -> str:
  """Returns one line for each parameter and router bias: path, dtype, shape, spec.

  The spec is that of the config's mesh, of 8 devices along `data` where that takes what the other
  axes leave, without the axes of one device.
  """
  sizes = {axis: getattr(config.mesh, axis) for axis in mesh_lib.AXES}
  sizes["data"] = 8 if sizes["data"] == -1 else sizes["data"]
  mesh = jax.sharding.AbstractMesh(tuple(sizes.values()), tuple(sizes))
  _, params, router_bias = model_lib.shapes_of(config.model)
  lines = []
  for tree in (params, router_bias):
    for path, leaf in jax.tree.leaves_with_path(tree):
      name = "/".join(key.key for key in path)
      parts = map(sharding.axes_of, parameters.spec(path, leaf.shape, mesh))
      spec = ", ".join("+".join(a for a in axes if sizes[a] > 1) or "None" for axes in parts)
      lines.append(f"{name} {leaf.dtype} {list(leaf.shape)} ({spec})\n")
  return "".join(lines)


def texts(name: str) -> dict[pathlib.Path, str]:
  """Returns what each golden file of an experiment must hold."""
  config = load(name)
  return {
    GOLDEN / "configs" / f"{name}.json": json.dumps(config_lib.to_dict(config), indent=2) + "\n",
    GOLDEN / "params" / f"{name}.txt": parameter_tree(config),
  }


if __name__ == "__main__":
  for experiment in EXPERIMENTS:
    for path, text in texts(experiment).items():
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_text(text, encoding="utf-8")
