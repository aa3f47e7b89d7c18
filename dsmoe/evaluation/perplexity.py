"""The loss of a model on text: in nats a token, and in bits a byte."""

import dataclasses
import itertools
import math
import tempfile
from collections.abc import Iterable

import jax

from dsmoe.checkpoint import LoadedRun
from dsmoe.data import batches as data
from dsmoe.data import records
from dsmoe.parallel import mesh as mesh_lib
from dsmoe.training import train_step


def validation_nats(eval_step, state, batches: Iterable[dict], mesh, limit: int = -1):
  """Returns (nats, tokens) summed over at most `limit` batches.

  Args:
    eval_step: from `train_step.make_eval_step`.
    state: a TrainState; only its params and router_bias are used.
    batches: as `data.validation_batches` yields them.
    mesh: the state's.
    limit: -1 for all batches.
  """
  sums = [
    eval_step(state, mesh_lib.to_global(batch, mesh))
    for batch in itertools.islice(batches, None if limit < 0 else limit)
  ]
  sums = jax.device_get(sums)
  return sum(float(n) for n, _ in sums), sum(float(w) for _, w in sums)


def score_text(run: LoadedRun, text_glob: str) -> dict[str, float]:
  """Measures the loss on every token of a text, as the training loop's validation does.

  Args:
    run: from `load_run`.
    text_glob: as in `data.validation_globs`: text, .jsonl or .parquet files, or "stdlib".

  Returns:
    `nats_per_token`, `perplexity`, `bits_per_byte`, and the numbers of `tokens` (the ends of
    documents included) and `bytes`.

  Raises:
    ValueError: when nothing matches, or the run has no tokenizer.
  """
  run.tokenizer()
  shards = mesh_lib.num_batch_shards(run.mesh)
  config = dataclasses.replace(
    run.config,
    batch_size=run.config.batch_size + -run.config.batch_size % shards,
    num_microbatches=1,
    data=dataclasses.replace(
      run.config.data,
      train_globs=("synthetic",),
      train_weights=(1.0,),
      validation_globs=(text_glob,),
      tokenizer=str(run.tokenizer_path),
    ),
  )
  state = train_step.TrainState(None, run.params, None, run.router_bias)
  with tempfile.TemporaryDirectory() as folder:
    prepared = records.prepare(config.data, config.model.vocab_size, folder)
    processes = (jax.process_index(), jax.process_count())
    batches = data.validation_batches(prepared, config.data, config.batch_size, *processes)
    eval_step = train_step.make_eval_step(config, run.mesh)
    nats, tokens = validation_nats(eval_step, state, batches, run.mesh)
  return {
    "nats_per_token": nats / tokens,
    "perplexity": math.exp(nats / tokens),
    "bits_per_byte": nats / math.log(2) / prepared.validation_bytes,
    "tokens": round(tokens),
    "bytes": prepared.validation_bytes,
  }
