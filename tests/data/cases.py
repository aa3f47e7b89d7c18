"""Small corpora for the tests of data, and ways to read them back."""

import dataclasses
import random

import numpy as np
from array_record.python import array_record_data_source

from dsmoe import config as config_lib
from dsmoe.data import sources
from experiments import base

VOCAB = 300
EOS = 0
NAMES = ("tokens", "targets", "positions", "segments", "weights")


def data_config(**values):
  return dataclasses.replace(config_lib.from_config_dict(base.get_config()).data, **values)


def words(seed, count):
  rng = random.Random(seed)
  return " ".join(rng.choice("alpha beta gamma delta naïve ὦ\n".split(" ")) for _ in range(count))


def make_folder(folder):
  """Writes two training sources, a and b, and a validation source, v."""
  rng = random.Random(0)
  for name, count in (("a", 12), ("b", 5), ("v", 6)):
    (folder / name).mkdir()
    for i in range(count):
      text = f"{name}{i}: " + words(f"{name}{i}", rng.randrange(60))
      (folder / name / f"{i:02d}.txt").write_text(text, encoding="utf-8")
  return folder


def text_config(folder, **values):
  defaults = dict(
    train_globs=(f"{folder}/a/*.txt", f"{folder}/b/*.txt"),
    train_weights=(3.0, 1.0),
    validation_globs=(f"{folder}/v/*.txt",),
    sequence_length=16,
  )
  return data_config(**{**defaults, **values})


def whole_texts(source, **values):
  """Reads a source's documents and joins the pieces of each."""
  texts, text = [], ""
  for piece in sources.documents(source, data_config(**values)):
    text += piece.text
    if piece.is_end:
      texts.append(text)
      text = ""
  assert not text
  return texts


def texts_of(folder, name):
  return [p.read_text(encoding="utf-8") for p in sorted((folder / name).glob("*.txt"))]


def token_documents(paths):
  """Reads records the slow way, as lists of ints."""
  source = array_record_data_source.ArrayRecordDataSource([str(path) for path in paths])
  return [np.frombuffer(source[i], "<u4").tolist() for i in range(len(source))]


def assert_equal(a, b):
  assert set(a) == set(b) == set(NAMES)
  for name in NAMES:
    assert a[name].dtype == b[name].dtype
    np.testing.assert_array_equal(a[name], b[name])


def row_by_loops(stream, documents, S, cross, first_token_weight=0.0):
  """Builds a row token by token; `documents` numbers each token's document."""
  row = {name: np.zeros(S, np.int32) for name in NAMES[:-1]} | {"weights": np.zeros(S, np.float32)}
  segment, position, seen = 0, 0, None
  for t in range(min(S, len(stream) - 1)):
    segment, position = (segment, position + 1) if documents[t] == seen else (segment + 1, 0)
    seen = documents[t]
    row["tokens"][t], row["targets"][t] = stream[t], stream[t + 1]
    row["positions"][t] = t if cross else position
    row["segments"][t] = 1 if cross else segment
    row["weights"][t] = 1 if cross or documents[t + 1] == seen else first_token_weight
  return row
