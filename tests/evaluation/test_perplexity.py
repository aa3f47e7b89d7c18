"""Tests of dsmoe/evaluation/perplexity.py, against NumPy on `model.logits`."""

import dataclasses
import itertools
import math

import pytest
from etils import epath
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from dsmoe.data import records
from dsmoe.data import tokenizer as tokenizer_lib
from dsmoe.evaluation import perplexity
from dsmoe.evaluation.held_out import overlap, warn_of_overlap
from tests.data.cases import EOS, VOCAB, text_config, texts_of, token_documents
from tests.evaluation.oracle import SEQUENCE_LENGTH as S
from tests.evaluation.oracle import log_probabilities
from tests.helpers import assert_close


@pytest.mark.slow
def test_score_text_counts_everything(run, folder):
  result = perplexity.score_text(run, f"{folder}/v/*.txt")
  tokenizer = run.tokenizer()
  stream, starts = [EOS], [0]
  for text in texts_of(folder, "v"):
    starts.append(len(stream))
    stream += tokenizer.encode(text, add_special_tokens=False).ids + [EOS]
  assert result["tokens"] == len(stream) - 1
  assert result["bytes"] == sum(len(text.encode()) for text in texts_of(folder, "v"))
  # Token i is predicted from what its row holds of its predecessor's document.
  nats = 0.0
  for row in range(0, len(stream) - 1, S):
    for i in range(row + 1, min(row + S, len(stream) - 1) + 1):
      first = max(row, max(start for start in [0, *starts] if start <= i - 1))
      nats -= log_probabilities(run, stream[first : i + 1])[-1]
  assert_close(result["nats_per_token"], nats / result["tokens"], "model_float32")
  assert result["perplexity"] == pytest.approx(math.exp(result["nats_per_token"]))
  bits = result["nats_per_token"] * result["tokens"] / math.log(2) / result["bytes"]
  assert result["bits_per_byte"] == pytest.approx(bits)


def test_text_must_exist(run):
  with pytest.raises(ValueError, match=r"nowhere.*matches none"):
    perplexity.score_text(run, "/nowhere/*.txt")


def sentencepiece():
  """In Sentencepiece's manner: a space before every text, marks for spaces, bytes for the rest."""
  pieces = ["<unk>", "</s>", "▁", "▁a", "l", "p", *(f"<0x{byte:02X}>" for byte in range(256))]
  merges = [("▁", "a")]
  ids = {piece: i for i, piece in enumerate([*pieces, "a"])}
  tokenizer = Tokenizer(models.BPE(ids, merges, byte_fallback=True, unk_token="<unk>"))
  tokenizer.add_special_tokens(["</s>"])
  tokenizer.normalizer = normalizers.Sequence(
    [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
  )
  parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
  tokenizer.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)])
  return tokenizer


def changed(**parts):
  """A byte-level tokenizer with another part."""
  tokenizer = tokenizer_lib.train_tokenizer(["Alpha beta gamma naïve"], VOCAB)
  for name, part in parts.items():
    setattr(tokenizer, name, part)
  return tokenizer


def prepared_with(tokenizer, folder, tmp_path):
  tokenizer.save(str(tmp_path / "tokenizer.json"))
  config = text_config(folder, tokenizer=str(tmp_path / "tokenizer.json"))
  return config, records.prepare(config, VOCAB, tmp_path / "data")


def bytes_of(name, is_first):
  """The bytes behind a token's name: byte-level BPE has a character for each byte."""
  if name.startswith("<0x"):
    return 1
  if "▁" in name or name in ("l", "p", "a"):
    return len(name.replace("▁", " ")) - (is_first and name.startswith("▁"))
  return len(name)


@pytest.mark.parametrize("make", [sentencepiece, changed], ids=["sentencepiece", "byte-level"])
def test_bytes_of_a_subset_are_its_own(make, folder, tmp_path):
  config, prepared = prepared_with(make(), folder, tmp_path)
  B, S, limits = 2, config.sequence_length, (-1, 1, 2, 5, 10**6)
  counted = perplexity.count_bytes(prepared, config, B, limits)
  assert counted[-1] == counted[10**6] == prepared.validation_bytes
  sizes = []
  for *ids, _ in token_documents(prepared.validation):
    names = [prepared.tokenizer.id_to_token(i) for i in ids]
    sizes += [bytes_of(name, place == 0) for place, name in enumerate(names)] + [0]
  for limit in limits[1:]:
    assert counted[limit] == sum(sizes[: limit * B * S])


def test_tokens_of_a_subset_have_their_own_number_of_bytes(run, folder):
  """Bits per byte of a part are its nats over its bytes, not those of the whole."""
  config = run.config
  prepared = records.prepare(
    dataclasses.replace(text_config(folder), tokenizer=str(run.tokenizer_path)),
    VOCAB,
    run.tokenizer_path.parent / "again",
  )
  counted = perplexity.count_bytes(prepared, text_config(folder), config.batch_size, (1, -1))
  ids = list(itertools.chain.from_iterable(token_documents(prepared.validation)))
  text = prepared.tokenizer.decode([i for i in ids[: config.batch_size * S] if i != EOS])
  assert "\ufffd" not in text
  assert counted[1] == len(text.encode())
  share = counted[1] / counted[-1]
  tokens_share = config.batch_size * S / prepared.validation_tokens
  assert share != pytest.approx(tokens_share, rel=1e-3)  # else this test could not fail


@pytest.mark.parametrize(
  "parts, message",
  [
    ({"normalizer": normalizers.Lowercase()}, "must give every text back unchanged, of 'Alpha"),
    ({"normalizer": normalizers.NFD()}, "must give every text back unchanged"),
    ({"normalizer": normalizers.Strip()}, "must give every text back unchanged"),
    ({"normalizer": normalizers.Replace("a", "")}, "must give every text back unchanged"),
    ({"pre_tokenizer": pre_tokenizers.ByteLevel(True)}, "must give every text back unchanged"),
    ({"decoder": decoders.WordPiece()}, r"decoder must be byte-level or Sentencepiece's"),
    ({"decoder": decoders.Fuse()}, r"decoder must be byte-level or Sentencepiece's"),
  ],
)
def test_no_bits_per_byte_for_a_tokenizer_that_changes_the_text(tmp_path, caplog, parts, message):
  (tmp_path / "v").mkdir()
  (tmp_path / "v" / "0.txt").write_text("Alpha naïve beta ")
  (tmp_path / "a").mkdir()
  (tmp_path / "a" / "0.txt").write_text("alpha")
  tokenizer = changed(**parts)
  tokenizer.save(str(tmp_path / "tokenizer.json"))
  globs = {"train_globs": (f"{tmp_path}/a/*",), "train_weights": (1.0,)}
  config = text_config(tmp_path, tokenizer=str(tmp_path / "tokenizer.json"), **globs)
  prepared = records.prepare(config, VOCAB, tmp_path / "data")
  assert perplexity.count_bytes(prepared, config, 2, (-1,)) == {}
  assert message in caplog.text


@pytest.mark.parametrize("setting", ["truncation", "padding"])
def test_no_bits_per_byte_when_tokens_are_not_the_text(
  run, folder, tmp_path, caplog, setting, monkeypatch
):
  """As if a setting of tokenizer.json were obeyed again."""
  encode = tokenizer_lib.encode_documents

  def obeying(tokenizer, texts, end):
    if setting == "truncation":
      tokenizer.enable_truncation(5)
    else:
      tokenizer.enable_padding(length=64, pad_id=4, pad_token="<|pad|>")
    return encode(tokenizer, texts, end)

  monkeypatch.setattr(tokenizer_lib, "encode_documents", obeying)
  result = perplexity.score_text(run, f"{folder}/v/*.txt")
  assert "bits_per_byte" not in result and math.isfinite(result["nats_per_token"])
  [line] = [r.getMessage() for r in caplog.records if "no bits per byte" in r.getMessage()]
  assert f"must stand for the {result['bytes']} bytes of its text, they decode to" in line


def test_synthetic_tokens_are_bytes(folder, tmp_path):
  config = text_config(
    folder, train_globs=("synthetic",), train_weights=(1.0,), validation_globs=("synthetic",)
  )
  prepared = records.prepare(config, VOCAB, tmp_path)
  S = config.sequence_length
  assert perplexity.count_bytes(prepared, config, 4, (-1, 3)) == {
    -1: prepared.validation_bytes,
    3: 3 * 4 * S,
  }
  none = dataclasses.replace(config, validation_globs=())
  assert perplexity.count_bytes(records.prepare(none, VOCAB, tmp_path / "b"), none, 4, (-1,)) == {}


def test_checksums_tell_which_points_belong_to_one_validation_curve(folder, tmp_path):
  """Changes that give the validation losses other rows give another checksum, and only they do.

  Most of the changed subsets have as many tokens as the first.
  """
  tokenizer_lib.train_tokenizer(texts_of(folder, "v"), VOCAB).save(str(tmp_path / "a.json"))
  tokenizer_lib.train_tokenizer(texts_of(folder, "a"), VOCAB).save(str(tmp_path / "b.json"))
  (tmp_path / "reversed").mkdir()
  for place, text in enumerate(reversed(texts_of(folder, "v"))):
    (tmp_path / "reversed" / f"{place}.txt").write_text(text, encoding="utf-8")
  count = itertools.count()

  def checksum(batch_size=2, limit=2, **fields):
    config = text_config(folder, **{"tokenizer": str(tmp_path / "a.json")} | fields)
    prepared = records.prepare(config, VOCAB, tmp_path / f"data{next(count)}")
    return perplexity.subset_checksum(prepared, config, batch_size, limit)

  first = checksum()
  assert first == checksum(batch_size=4, limit=1) == checksum(batch_size=1, limit=4)
  one_source = {"train_globs": (f"{folder}/b/*.txt",), "train_weights": (1.0,)}
  assert first == checksum(**one_source) == checksum(seed=7)
  assert checksum(limit=-1) == checksum(batch_size=7, limit=-1) == checksum(limit=10**6)
  noise = one_source | {"train_globs": ("synthetic",), "validation_globs": ("synthetic",)}
  others = [
    checksum(limit=1),
    checksum(batch_size=3),
    checksum(limit=-1),
    checksum(sequence_length=32, batch_size=1),
    checksum(sequence_length=8, batch_size=4),
    checksum(cross_document_attention=True),
    checksum(tokenizer=str(tmp_path / "b.json")),
    checksum(validation_globs=(f"{tmp_path}/reversed/*.txt",)),
    checksum(validation_globs=(f"{folder}/a/*.txt",)),
    checksum(validation_globs=(f"{folder}/v/0[1-5].txt",)),
    checksum(validation_globs=(f"{folder}/b/*.txt", f"{folder}/v/*.txt")),
    checksum(**noise),
    checksum(**noise, seed=7),
  ]
  assert len({first, *others}) == 1 + len(others)


def test_text_that_the_model_was_trained_on_is_said(run, folder, tmp_path, caplog):
  perplexity.score_text(run, f"{folder}/v/*.txt")
  assert "not that of unseen text" not in caplog.text
  perplexity.score_text(run, f"{folder}/[bv]/0[12].txt")
  assert (
    "2 validation files are also training data, such as b/01.txt, which is 01.txt" in caplog.text
  )
  # By content, whatever the name.
  (tmp_path / "copy.text").write_bytes((folder / "a" / "03.txt").read_bytes())
  caplog.clear()
  perplexity.score_text(run, str(tmp_path / "copy.text"))
  assert "1 validation files are also training data, such as copy.text, which is" in caplog.text


def test_overlap_by_loops():
  def manifest(**sources):
    sources = {n.replace("_", "-"): {"glob": n, "sha256": files} for n, files in sources.items()}
    return {"inputs": {"sources": sources}}

  empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
  trained = manifest(train_0={"a": "1", "e": empty}, train_1={"b": "2"}, validation_0={"c": "3"})
  held_out = manifest(train_0={"x": "9"}, validation_0={"v": "3", "w": "2", "e": empty})
  assert overlap(held_out, trained) == [("w", "b")]
  assert overlap(trained, trained) == []
  assert overlap(manifest(), trained) == overlap(held_out, manifest()) == []


@pytest.mark.parametrize("text", ["", "{", "[]", '{"inputs": 1}', '{"inputs": {}}'])
def test_a_damaged_manifest_of_the_training_data_is_said(tmp_path, caplog, text):
  whole, damaged = tmp_path / "manifest.json", tmp_path / "damaged.json"
  whole.write_text('{"inputs": {"sources": {}}}')
  damaged.write_text(text)
  warn_of_overlap(epath.Path(whole), epath.Path(damaged))
  assert "damaged.json is damaged" in caplog.text


@pytest.mark.parametrize("nats", [math.nan, math.inf, 1e9])
def test_a_loss_that_is_no_number_is_refused(run, folder, monkeypatch, nats):
  monkeypatch.setattr(perplexity, "validation_nats", lambda *_: (nats, 100.0))
  with pytest.raises(ValueError, match="the loss must be a number that weights can have, got"):
    perplexity.score_text(run, f"{folder}/v/*.txt")
