"""Tests of dsmoe/huggingface/tiktoken.py against tiktoken's algorithm, written down in Python."""

import base64
import itertools
import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsmoe import checkpoint
from dsmoe import config as config_lib
from dsmoe.data import tokenizer as tokenizer_lib
from dsmoe.huggingface import convert, tiktoken
from dsmoe.huggingface import text as text_lib
from dsmoe.inference import text_model
from dsmoe.inference.detokenize import Vocabulary
from experiments import base
from tests.huggingface.test_files import SMALL, random_tensors, write
from tests.huggingface.test_files import loading as loading_lib

TEXTS = [f"The cat{i % 3} sat, aaaaaa on the mat's édge 日本{i}!\n" for i in range(99)]
TRAINED = tokenizer_lib.train_tokenizer(TEXTS, 400)
# What merges join, in their order, as tiktoken ranks them.
RANKS = {Vocabulary(TRAINED).token_bytes(i): i - 5 for i in range(5, TRAINED.get_vocab_size())}
SPECIAL = {"[BOS]": len(RANKS), "[EOS]": len(RANKS) + 1, "<|im_end|>": len(RANKS) + 5}
PATTERN = [r"[a-zA-Z]+(?i:'s|'t)?", r" ?[^\sa-zA-Z]+", r"\s+(?!\S)", r"\s+"]
COMPILED = re.compile("|".join(PATTERN))
CODE = f"""\
raise RuntimeError("this file must not be run")
class TikTokenTokenizer:
  num_reserved_special_tokens = 256
  pat_str = "|".join({PATTERN!r})
"""


def make_folder(folder, code=CODE, **changes):
  folder.mkdir(exist_ok=True)
  lines = (f"{base64.b64encode(token).decode()} {rank}" for token, rank in RANKS.items())
  added = {str(i): {"content": name, "special": True} for name, i in SPECIAL.items()}
  config = {"added_tokens_decoder": added, "bos_token": "[BOS]", "eos_token": "[EOS]"} | changes
  (folder / "tiktoken.model").write_text("\n".join(lines) + "\n")
  (folder / "tokenizer_config.json").write_text(json.dumps(config))
  (folder / "tokenization_x.py").write_text(code)
  return folder


def by_ranks(piece):
  """Joins the leftmost pair of the lowest rank, again and again. Source: tiktoken's README."""
  if piece in RANKS:
    return [RANKS[piece]]
  parts = [piece[i : i + 1] for i in range(len(piece))]
  while True:
    ranks = [RANKS.get(a + b, 10**9) for a, b in itertools.pairwise(parts)]
    if not ranks or min(ranks) == 10**9:
      return [RANKS[part] for part in parts]
    i = ranks.index(min(ranks))
    parts[i : i + 2] = [parts[i] + parts[i + 1]]


def expected_ids(text, pattern=COMPILED):
  ids = []
  for part in re.split(f"({'|'.join(map(re.escape, SPECIAL))})", text):
    if part in SPECIAL:
      ids.append(SPECIAL[part])
    else:
      ids += [i for piece in pattern.findall(part) for i in by_ranks(piece.encode())]
  return ids


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
  return tiktoken.convert(make_folder(tmp_path_factory.mktemp("hf")))


ALPHABET = st.sampled_from("aaaathec sédge 日本!'sT\n\t0123🙂")


@settings(max_examples=200)
@given(st.text(ALPHABET, max_size=60))
def test_ids_are_tiktokens(converted, text):
  assert converted.encode(text).ids == expected_ids(text)
  assert converted.decode(converted.encode(text).ids) == text


def test_special_tokens_and_long_runs(converted):
  for text in ("[BOS]The cat<|im_end|>[EOS]", "[EOS", "a" * 300, *TEXTS[:5]):
    assert converted.encode(text).ids == expected_ids(text)
  as_text = tokenizer_lib.text_only(converted).encode("[BOS]a[EOS]").ids
  assert not set(as_text) & set(SPECIAL.values())
  assert converted.decode(as_text) == "[BOS]a[EOS]"
  assert converted.id_to_token(len(RANKS) + 2) is None  # reserved


@pytest.mark.parity
def test_unicode_classes_as_python_knows_them(tmp_path):
  """With the kind of expression that Kimi K2 has: scripts, and intersections of classes."""
  regex = pytest.importorskip("regex")
  letters = r"[\p{L}\p{M}&&[^\p{Han}]]"
  parts = [r"[\p{Han}]+", rf"[^\r\n\p{{L}}\p{{N}}]?{letters}+(?i:'s|'ll)?", r"\p{N}{1,3}"]
  parts += [r" ?[^\s\p{L}\p{N}]+[\r\n]*", r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+"]
  tokenizer = tiktoken.convert(make_folder(tmp_path, f"pat_str = {'|'.join(parts)!r}"))
  pattern = regex.compile("|".join(parts), regex.V1)

  @settings(max_examples=200)
  @given(st.text(max_size=40) | st.text(ALPHABET, max_size=40))
  def check(text):
    assert tokenizer.encode(text).ids == expected_ids(text, pattern)

  check()


@pytest.mark.parametrize(
  "file, content, message",
  [
    ("tiktoken.model", "YQ== 0\n", r"tiktoken.model must have all 256 bytes"),
    ("tiktoken.model", "YQ==\n", r"tiktoken.model must have a token in base64"),
    ("tiktoken.model", "!! 0\n", r"tiktoken.model must have a token in base64"),
    ("tokenization_x.py", "x = 1", r"must set pat_str to a string, .* got \['tokenization_x.py'\]"),
    ("tokenization_x.py", "pat_str = f(1)", "must set pat_str to a string"),
    ("tokenization_x.py", "pat_str = '|'.join([f(1)])", "must set pat_str to a string"),
    ("tokenization_x.py", "def (", "tokenization_x.py must be Python"),
    ("tokenizer_config.json", "{}", "must have an added_tokens_decoder"),
    ("tokenizer_config.json", "[", "tokenizer_config.json must be JSON"),
    ("tokenizer_config.json", '{"added_tokens_decoder": {"7": {"content": "x", "special": true}}}',
     "special token 7, 'x', must not be one of those in"),
  ],
)  # fmt: skip
def test_another_form_is_refused(tmp_path, caplog, file, content, message):
  make_folder(tmp_path)
  (tmp_path / file).write_text(content)
  with pytest.raises(ValueError, match=message):
    tiktoken.convert(tmp_path)
  assert text_lib.converted(tmp_path, 10**6) is None
  assert "the weights are imported without a tokenizer.json: " in caplog.text


def test_too_many_ids_for_the_model_are_said(tmp_path, caplog):
  needed = max(SPECIAL.values()) + 1
  assert text_lib.converted(make_folder(tmp_path), needed) is not None
  assert text_lib.converted(tmp_path, needed - 1) is None
  assert f"({needed} ids) must fit in the model's vocab_size ({needed - 1})" in caplog.text


def test_an_import_has_the_tokenizer(tmp_path):
  folder = make_folder(tmp_path / "hf")
  hf_config = SMALL | {"vocab_size": 512}
  write(folder, hf_config, random_tensors(loading_lib.config_from_hf(hf_config)))
  (folder / "generation_config.json").write_text(
    json.dumps({"eos_token_id": SPECIAL["<|im_end|>"]})
  )
  defaults = config_lib.from_config_dict(base.get_config())
  convert.import_folder(folder, tmp_path / "run", defaults)
  data = tmp_path / "run" / "data"
  run_tokenizer = tokenizer_lib.load_tokenizer(data / "tokenizer.json", 512)
  assert run_tokenizer.encode(TEXTS[0]).ids == expected_ids(TEXTS[0])
  served = text_model.load(data, run_tokenizer, "kimi", 64)
  assert served.stop_tokens == (SPECIAL["[EOS]"], SPECIAL["<|im_end|>"])
  assert checkpoint.load_config(tmp_path / "run").model.vocab_size == 512
