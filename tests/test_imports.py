"""Imports point one way, and what lies beside the road can be deleted without touching it."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
# A package of the road may import those before it; `train.py` and `runtime.py` close the list.
ROAD = ("config", "platforms", "parallel", "model", "training", "data", "checkpoint", "reporting")
BESIDE = (
  "inference",
  "serving",
  "huggingface",
  "evaluation",
  "planning",
  "compilers",
  "profiling",
  "kernel_bench",
  "on_device",
  "expert_parallel_bench",
  "launching",
  "sweeps",
)


def _imports(path: pathlib.Path) -> set[str]:
  """Returns the modules a file imports, with the names taken from them: dsmoe.model.rope."""
  found = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom) and node.module:
      found |= {f"{node.module}.{alias.name}" for alias in node.names}
  return found


def _of_package(name: str) -> set[str]:
  return set().union(*map(_imports, (ROOT / "dsmoe" / name).rglob("*.py")))


def _packages(imports: set[str]) -> set[str]:
  return {name.split(".")[1] for name in imports if name.startswith("dsmoe.")}


def test_every_package_is_listed():
  folders = {path.parent.name for path in (ROOT / "dsmoe").glob("*/__init__.py")}
  assert folders == set(ROAD) | set(BESIDE)


@pytest.mark.parametrize("name", ROAD)
def test_the_road_imports_what_comes_before(name):
  assert _packages(_of_package(name)) <= set(ROAD[: ROAD.index(name) + 1])


def test_kernels_import_no_dsmoe():
  imports = set().union(*map(_imports, (ROOT / "pallas_kernels").rglob("*.py")))
  assert not {name for name in imports if name.split(".")[0] in ("dsmoe", "experiments", "scripts")}


def test_dsmoe_imports_no_experiments_scripts_or_tests():
  imports = set().union(*map(_imports, (ROOT / "dsmoe").rglob("*.py")))
  assert not {name for name in imports if name.split(".")[0] in ("experiments", "scripts", "tests")}
