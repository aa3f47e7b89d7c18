"""What README.md, CONTRIBUTING.md, BENCHMARKS.md and the experiments' headers name exists."""

import ast
import functools
import itertools
import pathlib
import re

import numpy as np
import pytest
from safetensors.numpy import load_file

from experiments import base
from tests.helpers import TOLERANCE

ROOT = pathlib.Path(__file__).resolve().parent.parent
EXPERIMENTS = sorted((ROOT / "experiments").glob("*.py"))
DOCUMENTS = [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "BENCHMARKS.md"))]
TEXTS = pytest.mark.parametrize("path", DOCUMENTS + EXPERIMENTS, ids=lambda path: path.name)

FOLDERS = "dsmoe|pallas_kernels|experiments|scripts|tests"
# Starts in one of the repository's folders; may hold {a,b} and <placeholder>.
PATH = re.compile(rf"(?<![\w./$-])(?:{FOLDERS})/[\w./<>{{}},*-]*")
LINK = re.compile(r"\]\(([^)#]+)\)")
COMMAND = re.compile(r"\bpython (?:-m (?P<module>[\w.]+)|(?P<script>[\w./]+\.py))(?P<rest>.*)")
FLAG = re.compile(r"--(?:no)?([a-z][\w.-]*)")


def text_of(path: pathlib.Path) -> str:
  """A document's text, a command's continuation lines joined to it."""
  return path.read_text(encoding="utf-8").replace("\\\n", " ")


def alternatives(path: str) -> list[str]:
  """Expands a{b,c}d to abd and acd; <placeholder> becomes a wildcard."""
  parts = re.split(r"\{([^}]*)\}", re.sub(r"<\w+>", "*", path))
  choices = [part.split(",") if i % 2 else [part] for i, part in enumerate(parts)]
  return ["".join(choice) for choice in itertools.product(*choices)]


def exists(path: str) -> bool:
  return any(True for _ in ROOT.glob(path.rstrip("/.,")))


@TEXTS
def test_every_path_exists(path):
  named = [one for match in PATH.findall(text_of(path)) for one in alternatives(match)]
  if path.suffix == ".md":
    assert named
    named += [link for link in LINK.findall(text_of(path)) if "://" not in link]
  assert [name for name in named if not exists(name)] == []


@functools.cache
def flags_of(script: str) -> frozenset[str]:
  """The flags that a script defines, by DEFINE_...("name") or by a helper define_<name>()."""
  names = {"help"}  # of every script
  for call in ast.walk(ast.parse((ROOT / script).read_text(encoding="utf-8"))):
    if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute):
      if call.func.attr.startswith("DEFINE_") and isinstance(call.args[0], ast.Constant):
        names.add(call.args[0].value)
      elif call.func.attr.startswith("define_"):
        names.add(call.func.attr.removeprefix("define_"))
  return frozenset(names)


def has_field(name: str) -> bool:
  """Whether experiments have a field of this dotted name, `config.` in front."""
  node = base.get_config()
  for part in name.split(".")[1:]:
    if part not in node:
      return False
    node = node[part]
  return True


def commands(text: str) -> list[tuple[str, list[str]]]:
  """The script and the flags of every command that runs this repository's Python."""
  found = []
  for match in COMMAND.finditer(text):
    script = match["script"] or match["module"].replace(".", "/") + ".py"
    if re.match(rf"(?:{FOLDERS})/", script):
      rest = re.split(r"[`#;|)]", match["rest"])[0]  # the end of the command
      found.append((script, FLAG.findall(rest)))
  return found


@TEXTS
def test_every_command_has_its_script_and_its_flags(path):
  found = commands(text_of(path))
  if path.name in ("README.md", "BENCHMARKS.md"):
    assert found
  for script, flags in found:
    assert exists(script), script
    for flag in flags:
      if flag.startswith("config."):
        assert has_field(flag), f"{script} --{flag}"
      else:
        assert flag in flags_of(script), f"{script} --{flag}"


def test_a_wrong_path_flag_or_field_is_found():
  assert exists("dsmoe/train.py") and not exists("dsmoe/trane.py")
  assert alternatives("pallas_kernels/<op>/{tpu,gpu}.py") == [
    "pallas_kernels/*/tpu.py",
    "pallas_kernels/*/gpu.py",
  ]
  assert PATH.findall("`dsmoe/a.py`, pallas_kernels/<op>/{tpu,gpu}.py") == [
    "dsmoe/a.py",
    "pallas_kernels/<op>/{tpu,gpu}.py",
  ]
  text = (
    "python -m dsmoe.train --workdir=runs/a --config.seed=3  # a --comment\npython -m pytest -x"
  )
  assert commands(text) == [("dsmoe/train.py", ["workdir", "config.seed"])]
  assert "workdir" in flags_of("dsmoe/train.py") and "wrkdir" not in flags_of("dsmoe/train.py")
  assert has_field("config.model.kernels.tuned") and not has_field("config.model.sead")


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_flag_named_alone_belongs_to_a_script(path):
  known = set().union(*(flags_of(f"scripts/{p.name}") for p in (ROOT / "scripts").glob("*.py")))
  known |= flags_of("dsmoe/train.py") | flags_of("dsmoe/reporting/output.py")
  alone = re.findall(r"`--(?:no)?([a-z][\w-]*)[=\w\s.-]*`", text_of(path))
  assert [flag for flag in alone if flag not in known] == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_make_target_exists(path):
  targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
  named = re.findall(r"^ +make ([\w-]+)|`make ([\w-]+)`", text_of(path), re.MULTILINE)
  assert {a or b for a, b in named} <= targets


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_config_field_named_exists(path):
  named = re.findall(r"`(config\.\w+\.[\w.]+)[=\w]*\**`", text_of(path))
  assert [name for name in named if not has_field(name.rstrip("."))] == []


def test_readmes_python_works_as_printed():
  """On a golden case, whose logits another implementation computed."""
  (code,) = re.findall(r"```python\n(.*?)```", text_of(ROOT / "README.md"), re.DOTALL)
  folder = ROOT / "tests/golden/cases/v3_negative_bias"
  io = load_file(folder / "io.safetensors")
  tokens = "np.array([[3, 14, 15, 92]], np.int32)"
  assert code.count("path/to/folder") == code.count(tokens) == 1
  code = code.replace("path/to/folder", str(folder)).replace(tokens, "given_tokens")
  names = {"given_tokens": io["input_ids"].astype(np.int32)}
  exec(code, names)
  error = np.abs(np.asarray(names["logits_BSV"]) - io["logits"]).max()
  assert error <= TOLERANCE["model_float32"]
