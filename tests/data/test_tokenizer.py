"""Tests of dsmoe/data/tokenizer.py."""

import json
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, processors

from dsmoe.data import tokenizer as tokenizer_lib

TEXTS = [f"def f{i}(x):\n    return x * {i} + {i % 7}\n" for i in range(200)] + ["naïve 日本語 🙂"]
TOKENIZER = tokenizer_lib.train_tokenizer(TEXTS, 400)
ENCODER = tokenizer_lib.text_only(TOKENIZER)


def test_ids_of_special_tokens_and_bytes():
  assert [TOKENIZER.id_to_token(i) for i in range(5)] == list(tokenizer_lib.SPECIAL_TOKENS)
  assert TOKENIZER.token_to_id("<|endoftext|>") == tokenizer_lib.eos_id(TOKENIZER) == 0
  assert tokenizer_lib.fim_ids(TOKENIZER) == (1, 2, 3)
  assert TOKENIZER.get_vocab_size() == 400
  assert len(TOKENIZER.encode(" return").ids) == 1  # frequent words have become one token


@settings(max_examples=50)
@given(st.text())
def test_any_text_survives(text):
  ids = ENCODER.encode(text).ids
  assert TOKENIZER.decode(ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("name", tokenizer_lib.SPECIAL_TOKENS)
def test_a_special_token_named_in_a_document_is_text(name):
  text = f"the mark {name} ends a document"
  (tokens,) = tokenizer_lib.encode_documents(tokenizer_lib.text_only(TOKENIZER), [text], 0)
  assert tokens[-1] == 0
  assert all(token >= len(tokenizer_lib.SPECIAL_TOKENS) for token in tokens[:-1])
  assert TOKENIZER.decode(tokens[:-1].tolist()) == text
  assert TOKENIZER.encode(name).ids == [TOKENIZER.token_to_id(name)]  # the original is unchanged


def test_training_twice_gives_the_same_tokenizer():
  # Another process hashes differently; ties between merges must not depend on it.
  program = (
    "from dsmoe.data import tokenizer\n"
    "texts = [f'def f{i}(x):\\n    return x * {i} + {i % 7}\\n' for i in range(200)]\n"
    "print(tokenizer.train_tokenizer([*texts, 'na\\u00efve \\u65e5\\u672c\\u8a9e \\U0001f642'], 400).to_str())"
  )
  for _ in range(2):
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert printed.stdout.decode().strip() == TOKENIZER.to_str()


def test_save_and_load(tmp_path):
  path = tmp_path / "tokenizer.json"
  path.write_text(TOKENIZER.to_str(pretty=True), encoding="utf-8")
  loaded = tokenizer_lib.load_tokenizer(path, vocab_size=400)
  assert loaded.to_str() == TOKENIZER.to_str()
  with pytest.raises(ValueError, match=r"vocabulary \(400 ids\).*vocab_size \(399\)"):
    tokenizer_lib.load_tokenizer(path, vocab_size=399)


@pytest.mark.parametrize("name", ["<|endoftext|>", "</s>", "<｜end▁of▁sentence｜>"])
def test_end_of_document_of_a_foreign_tokenizer(tmp_path, name):
  foreign = Tokenizer(models.WordLevel({"a": 0, name: 7, "?": 2}, unk_token="?"))
  with pytest.raises(ValueError, match="must have a special token that ends a document"):
    tokenizer_lib.eos_id(foreign)  # an ordinary word; </s> ends a struck-out text in HTML
  foreign.add_special_tokens([name])
  foreign.save(str(tmp_path / "foreign.json"))
  loaded = tokenizer_lib.load_tokenizer(tmp_path / "foreign.json", vocab_size=8)
  assert tokenizer_lib.eos_id(loaded) == 7
  with pytest.raises(ValueError, match=r"\(8 ids\).*\(7\)"):  # ids count, not their number
    tokenizer_lib.load_tokenizer(tmp_path / "foreign.json", vocab_size=7)
  with pytest.raises(ValueError, match=r"fill-in-the-middle needs.*<\|fim_prefix\|>"):
    tokenizer_lib.fim_ids(loaded)


def test_fill_in_the_middle_marks_of_deepseek():
  marks = {"<｜fim▁begin｜>": 4, "<｜fim▁hole｜>": 2, "<｜fim▁end｜>": 9}
  assert tokenizer_lib.fim_ids(Tokenizer(models.WordLevel(marks))) == (4, 2, 9)


def test_errors(tmp_path):
  with pytest.raises(ValueError, match=r"vocab_size \(260\) must be at least 261"):
    tokenizer_lib.train_tokenizer(TEXTS, 260)
  with pytest.raises(ValueError, match=r"readable tokenizer.json, got .*absent.json"):
    tokenizer_lib.load_tokenizer(tmp_path / "absent.json")
  (tmp_path / "bad.json").write_text("{}")
  with pytest.raises(ValueError, match=r"readable tokenizer.json, got .*bad.json"):
    tokenizer_lib.load_tokenizer(tmp_path / "bad.json")
  Tokenizer(models.WordLevel({"a": 0})).save(str(tmp_path / "endless.json"))
  with pytest.raises(ValueError, match=r"one of <\|endoftext\|>, </s>, <｜end▁of▁sentence｜>"):
    tokenizer_lib.load_tokenizer(tmp_path / "endless.json")


def written(folder, tokenizer, **files):
  """Writes tokenizer.json and JSON files beside it; returns the path of the former."""
  (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
  for name, values in files.items():
    (folder / f"{name}.json").write_text(json.dumps(values), encoding="utf-8")
  return folder / "tokenizer.json"


def copy_of(tokenizer):
  return Tokenizer.from_str(tokenizer.to_str())


@pytest.mark.parametrize("setting", ["truncation", "padding", "both", "dropout"])
def test_settings_in_tokenizer_json_do_not_change_a_text(tmp_path, setting):
  changed = copy_of(TOKENIZER)
  if setting in ("truncation", "both"):
    changed.enable_truncation(3, stride=1)
  if setting in ("padding", "both"):
    changed.enable_padding(pad_id=4, pad_token="<|pad|>", length=50, direction="left")
  if setting == "dropout":
    changed.model.dropout = 0.5
  loaded = tokenizer_lib.load_tokenizer(written(tmp_path, changed))
  assert loaded.to_str() == TOKENIZER.to_str()
  texts = [*TEXTS[:3], "a", ""]
  for encoder in (loaded, tokenizer_lib.text_only(loaded)):
    documents = tokenizer_lib.encode_documents(encoder, texts, 0)
    assert [loaded.decode(ids[:-1].tolist()) for ids in documents] == texts
    assert [loaded.encode(text).ids for text in texts] == [ids[:-1].tolist() for ids in documents]


def with_tokens(*names):
  """A byte-level tokenizer in which special tokens are those named, from id 400 on."""
  text = TOKENIZER.to_str()
  for i, name in enumerate(tokenizer_lib.SPECIAL_TOKENS):
    text = text.replace(name, f"<|other_{i}|>")
  tokenizer = Tokenizer.from_str(text)
  tokenizer.add_special_tokens(list(names))
  return tokenizer


@pytest.mark.parametrize(
  "tokens, files, end",
  [
    # Kimi's and Moonlight's, Llama 3's.
    (("[BOS]", "[EOS]", "<|im_end|>"), {"tokenizer_config": {"eos_token": "[EOS]"}}, "[EOS]"),
    (("<|eot_id|>", "<e>"), {"tokenizer_config": {"eos_token": {"content": "<e>"}}}, "<e>"),
    # A known name counts only where no file says otherwise.
    (("</s>", "[EOS]"), {"tokenizer_config": {"eos_token": "[EOS]"}}, "[EOS]"),
    (("</s>", "[EOS]"), {"tokenizer_config": {"eos_token": None}}, "</s>"),
    (("</s>", "[EOS]"), {"tokenizer_config": {"bos_token": "[EOS]"}}, "</s>"),
    (("</s>", "[EOS]"), {"special_tokens_map": {"eos_token": "[EOS]"}}, "[EOS]"),
    (("</s>", "[EOS]"), {"generation_config": {"eos_token_id": 401}}, "[EOS]"),
    (("</s>", "<a>", "<b>"), {"generation_config": {"eos_token_id": [402, 401]}}, "<b>"),
    (("</s>", "<a>"), {"generation_config": {"eos_token_id": []}}, "</s>"),
    (("</s>", "<a>"), {"generation_config": {"temperature": 1.0}}, "</s>"),
    # Kimi K2's files contradict each other: the tokenizer's own decides.
    (
      ("[EOS]", "<|im_end|>"),
      {"tokenizer_config": {"eos_token": "[EOS]"}, "generation_config": {"eos_token_id": 401}},
      "[EOS]",
    ),
  ],
)
def test_files_beside_the_tokenizer_say_what_ends_a_document(tmp_path, tokens, files, end):
  path = written(tmp_path, with_tokens(*tokens), **files)
  loaded = tokenizer_lib.load_tokenizer(path)
  assert loaded.id_to_token(tokenizer_lib.eos_id(loaded, tmp_path)) == end
  # A setting goes before all files, and they do not belong to a tokenizer of another name.
  assert tokenizer_lib.eos_id(loaded, tmp_path, tokens[0]) == 400
  path.rename(tmp_path / "other.json")
  if "</s>" in tokens:
    tokenizer_lib.load_tokenizer(tmp_path / "other.json")
  else:
    with pytest.raises(ValueError, match=r"must have a special token.*data\.eos_token"):
      tokenizer_lib.load_tokenizer(tmp_path / "other.json")
  tokenizer_lib.load_tokenizer(tmp_path / "other.json", eos_token=tokens[0])


@pytest.mark.parametrize(
  "files, message",
  [
    ({"tokenizer_config": {"eos_token": "<none>"}}, r"_config.json must be one .* got '<none>'"),
    ({"generation_config": {"eos_token_id": 999}}, r"eos_token_id .* tokenizer's ids, got 999"),
    ({"generation_config": {"eos_token_id": "</s>"}}, r"must be ids of tokens, got '</s>'"),
    ({"generation_config": {"eos_token_id": [True]}}, r"must be ids of tokens, got \[True\]"),
    ({"generation_config": {"eos_token_id": -1}}, r"must be ids of tokens, got -1"),
    ({"tokenizer_config": {"eos_token": 5}}, r"eos_token of .* must be the text of a token, got 5"),
    ({"tokenizer_config": {"eos_token": ["</s>"]}}, r"must be the text of a token, got \['</s>'\]"),
  ],
)
def test_a_wrong_end_of_document_is_refused(tmp_path, files, message):
  path = written(tmp_path, with_tokens("</s>"), **files)
  with pytest.raises(ValueError, match=message):
    tokenizer_lib.load_tokenizer(path)
  tokenizer_lib.load_tokenizer(path, eos_token="</s>")
  with pytest.raises(ValueError, match=r"data\.eos_token must be one of .* got '<no>'"):
    tokenizer_lib.load_tokenizer(path, eos_token="<no>")


def with_template(single):
  tokenizer = with_tokens("<b>", "<e>")
  tokens = [(name, tokenizer.token_to_id(name)) for name in ("<b>", "<e>")]
  tokenizer.post_processor = processors.TemplateProcessing(
    single=single, pair="$A $B", special_tokens=tokens
  )
  return tokenizer


@pytest.mark.parametrize(
  "single, settings, names",
  [
    ("<b> $A", {}, ["<b>"]),
    ("<b> $A <e>", {}, ["<b>"]),
    ("<b> <e> $A", {}, ["<b>", "<e>"]),
    ("$A <e>", {}, []),
    ("$A", {}, []),
    ("<b> $A", {"bos_token": "<e>"}, ["<b>"]),
    ("$A", {"bos_token": "<b>"}, []),
    ("$A", {"bos_token": "<b>", "add_bos_token": True}, ["<b>"]),
    ("$A", {"bos_token": {"content": "<e>"}, "add_bos_token": True}, ["<e>"]),
    ("$A", {"bos_token": "<b>", "add_bos_token": False}, []),
    ("<b> $A", {"bos_token": "<b>", "add_bos_token": True}, ["<b>"]),
    ("<b> $A", {"bos_token": "<b>", "add_bos_token": False}, ["<b>"]),
    ("$A", {"add_bos_token": True}, []),
  ],
)
def test_what_begins_a_text(tmp_path, single, settings, names):
  files = {"tokenizer_config": settings} if settings else {}
  path = written(tmp_path, with_template(single), **files)
  loaded = tokenizer_lib.read_tokenizer(path)
  assert [loaded.id_to_token(i) for i in tokenizer_lib.bos_ids(loaded, tmp_path)] == names


def test_files_beside_a_tokenizer_are_named(tmp_path):
  path = written(tmp_path, with_template("$A"))
  config = tmp_path / "tokenizer_config.json"
  config.write_text(json.dumps({"bos_token": "<none>", "add_bos_token": True}))
  with pytest.raises(ValueError, match=r"bos_token of .*_config.json must be one .* got '<none>'"):
    tokenizer_lib.bos_ids(tokenizer_lib.read_tokenizer(path), tmp_path)
  config.write_text("[" * 100_000)
  with pytest.raises(ValueError, match=r"tokenizer_config.json must be JSON, got: maximum recur"):
    tokenizer_lib.bos_ids(tokenizer_lib.read_tokenizer(path), tmp_path)
  config.unlink()
  (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
  with pytest.raises(ValueError, match=r"chat_template.jinja must be UTF-8, got: 'utf-8' codec"):
    tokenizer_lib.files_beside(path)
  with pytest.raises(ValueError, match=r"must have a special token that ends a document.*among"):
    tokenizer_lib.load_tokenizer(written(tmp_path, Tokenizer(models.BPE())), vocab_size=9)


@pytest.mark.parity
@pytest.mark.parametrize("single", ["<b> $A", "$A", "<b> $A <e>"])
@pytest.mark.parametrize("settings", [{}, {"add_bos_token": False}, {"add_eos_token": True}])
def test_transformers_begins_a_text_alike(tmp_path, single, settings):
  transformers = pytest.importorskip("transformers")
  settings = {"bos_token": "<b>", "eos_token": "<e>", **settings}
  settings["tokenizer_class"] = "PreTrainedTokenizerFast"
  path = written(tmp_path, with_template(single), tokenizer_config=settings)
  loaded = tokenizer_lib.read_tokenizer(path)
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)("def")["input_ids"]
  text = loaded.encode("def", add_special_tokens=False).ids
  expected = theirs[: theirs.index(text[0])]
  assert list(tokenizer_lib.bos_ids(loaded, tmp_path)) == expected


def test_the_end_of_a_document_is_no_text(tmp_path):
  """A token that is not marked as special, but named as the end, becomes special."""
  tokenizer = with_tokens("</s>")
  tokenizer.add_tokens([AddedToken("<end>", special=False)])
  path = written(tmp_path, tokenizer, tokenizer_config={"eos_token": "<end>"})
  loaded = tokenizer_lib.load_tokenizer(path)
  end = tokenizer_lib.eos_id(loaded, tmp_path)
  text = "a <end> is named </s>"
  [ids] = tokenizer_lib.encode_documents(tokenizer_lib.text_only(loaded), [text], end)
  assert ids.tolist().index(end) == len(ids) - 1
  assert loaded.decode(ids[:-1].tolist()) == text
  for word in (" return", "e", "\u010a"):  # tokens of text; the last is a newline's
    with pytest.raises(ValueError, match="must not be one of text, got"):
      tokenizer_lib.load_tokenizer(path, eos_token=word.replace(" ", "\u0120"))
