"""The loss of a model on text: in nats a token, and in bits a byte."""

import dataclasses
import itertools
import math
import tempfile
import zlib
from collections.abc import Iterable

import jax
import numpy as np
from absl import logging

from dsmoe.checkpoint import LoadedRun
from dsmoe.config import DataConfig
from dsmoe.data import batches as data
from dsmoe.data import records, sources
from dsmoe.data import tokenizer as tokenizer_lib
from dsmoe.evaluation import held_out
from dsmoe.inference.detokenize import Vocabulary
from dsmoe.parallel import mesh as mesh_lib
from dsmoe.training import train_step

# Of the text whose tokens are decoded again as a check.
_SAMPLE_DOCUMENTS, _SAMPLE_CHARACTERS = 64, 4096
_LARGEST_LOSS = 700.0  # nats a token; the exponential of more is not finite


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


def count_bytes(
  prepared: records.PreparedData, config: DataConfig, batch_size: int, limits: Iterable[int]
) -> dict[int, int]:
  """Counts the bytes of text that the targets of the first validation batches stand for.

  Args:
    prepared: from `prepare` with the same `config`.
    config: the validation globs and the sequence length.
    batch_size: rows of a global batch.
    limits: numbers of batches; -1 for all of them.

  Returns:
    Bytes by limit; a synthetic token counts as one byte. {} when the tokens of the whole set do not
    stand for the text they were made from: bits per byte would be wrong, and a warning says why.
  """
  if not prepared.validation_tokens:
    return {}
  try:
    token_bytes = _TokenBytes(prepared)
    _check_round_trip(prepared, config)
  except ValueError as error:
    logging.warning("no bits per byte are given: %s", error)
    return {}
  counts = np.array(
    [token_bytes.sum(batch) for batch in data.validation_batches(prepared, config, batch_size)]
  )
  if counts.sum() != prepared.validation_bytes:
    logging.warning(
      "no bits per byte are given: the tokens of the validation set must stand for the %d bytes of "
      "its text, they decode to %d",
      *(prepared.validation_bytes, counts.sum()),
    )
    return {}
  return {limit: int(counts[: None if limit < 0 else limit].sum()) for limit in limits}


def subset_checksum(
  prepared: records.PreparedData, config: DataConfig, batch_size: int, limit: int
) -> int:
  """Returns the CRC-32 of the rows of the first `limit` validation batches; -1: of all of them.

  Losses on rows of equal checksum can be compared, also when they are split into other batches.
  """
  checksum = 0
  batches = data.validation_batches(prepared, config, batch_size)
  for batch in itertools.islice(batches, None if limit < 0 else limit):
    for row, weights_S in enumerate(batch["weights"]):
      if weights_S.any():  # the others fill the last batch
        for name in sorted(batch):
          checksum = zlib.crc32(batch[name][row].tobytes(), checksum)
  return checksum


class _TokenBytes:
  """The number of bytes that each token stands for; none for the end of a document."""

  def __init__(self, prepared: records.PreparedData):
    """Raises ValueError for a tokenizer whose tokens cannot be turned into bytes one by one."""
    self._end, self._lengths_V, self._spaces_V = -1, np.ones(prepared.vocab_size, np.int64), None
    if prepared.tokenizer is None:
      return
    vocabulary = Vocabulary(prepared.tokenizer)
    self._end = tokenizer_lib.eos_id(prepared.tokenizer, prepared.manifest.parent)
    texts = [vocabulary.token_bytes(token) for token in range(prepared.vocab_size)]
    texts[self._end] = b""
    self._lengths_V = np.array([len(text) for text in texts])
    if vocabulary.strips_first_space:  # a text's first token then has a space that is not text's
      self._spaces_V = np.array([text.startswith(b" ") for text in texts])

  def sum(self, batch: data.Batch) -> int:
    """Returns the bytes of a validation batch's targets."""
    bytes_BS = self._lengths_V[batch["targets"]]
    if self._spaces_V is not None:
      bytes_BS = bytes_BS - self._spaces_V[batch["targets"]] * (batch["tokens"] == self._end)
    return int(bytes_BS[batch["weights"] > 0].sum())


def _check_round_trip(prepared: records.PreparedData, config: DataConfig) -> None:
  """Raises ValueError if the beginnings of the first documents come back changed."""
  if prepared.tokenizer is None:
    return
  encoder = tokenizer_lib.text_only(prepared.tokenizer)
  for document in itertools.islice(sources.validation_documents(config), _SAMPLE_DOCUMENTS):
    text = document.text[:_SAMPLE_CHARACTERS]
    found = encoder.decode(encoder.encode(text, add_special_tokens=False).ids, False)
    if found != text:
      place = next((i for i, (a, b) in enumerate(zip(text, found)) if a != b), len(found))
      raise ValueError(
        "the tokenizer must give every text back unchanged, of "
        f"{text[max(place - 10, 0) : place + 10]!r} it makes "
        f"{found[max(place - 10, 0) : place + 10]!r}"
      )


def score_text(run: LoadedRun, text_glob: str) -> dict[str, float]:
  """Measures the loss on every token of a text, as the training loop's validation does.

  Args:
    run: from `load_run`.
    text_glob: as in `data.validation_globs`: text, .jsonl or .parquet files, or "stdlib".

  Returns:
    `nats_per_token`, `perplexity`, `bits_per_byte` (left out when `count_bytes` warns), and the
    numbers of `tokens` (the ends of documents included) and `bytes`.

  Raises:
    ValueError: when nothing matches, the run has no tokenizer, or the loss is not finite.
  """
  run.tokenizer()
  sources.find_source(text_glob, is_train=False, field="--text")
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
    processes = mesh_lib.part_of_rows(run.mesh, jax.process_index())
    held_out.warn_of_overlap(prepared.manifest, run.tokenizer_path.parent / "manifest.json")
    counted = count_bytes(prepared, config.data, config.batch_size, (-1,))
    batches = data.validation_batches(prepared, config.data, config.batch_size, *processes)
    eval_step = train_step.make_eval_step(config, run.mesh)
    nats, tokens = validation_nats(eval_step, state, batches, run.mesh)
  loss = nats / tokens
  if not loss < _LARGEST_LOSS:
    raise ValueError(f"the loss must be a number that weights can have, got {loss} nats a token")
  bits = {"bits_per_byte": nats / math.log(2) / counted[-1]} if counted else {}
  return {
    "nats_per_token": loss,
    "perplexity": math.exp(loss),
    **bits,
    "tokens": round(tokens),
    "bytes": prepared.validation_bytes,
  }
