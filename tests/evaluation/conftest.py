"""A run with fresh weights and a tokenizer, for every test of this folder."""

import pytest

from dsmoe.checkpoint import LoadedRun
from dsmoe.data import records
from dsmoe.training import train_step
from tests import runs
from tests.data.cases import VOCAB, make_folder, text_config
from tests.evaluation.oracle import SEQUENCE_LENGTH
from tests.helpers import mesh_of, small_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return make_folder(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
  """Fresh weights and a tokenizer trained on the small corpus, on eight devices."""
  config = small_config(
    **runs.TWO_LAYERS,
    **{"model.vocab_size": VOCAB, "model.initializer_range": 0.3},
    **{"data.sequence_length": SEQUENCE_LENGTH, "batch_size": 3},
    **{"data.train_globs": (f"{folder}/a/*.txt",)},
  )
  mesh = mesh_of(8)
  state = train_step.init_state(config, mesh)
  cache = tmp_path_factory.mktemp("cache")
  records.prepare(text_config(folder), VOCAB, cache)
  return LoadedRun(config, cache / "tokenizer.json", state.params, state.router_bias, mesh, 0)
