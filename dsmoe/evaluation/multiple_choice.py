"""Multiple choice: the likelihood of given continuations, and the answers it chooses.

Shapes: B rows, S tokens of a row, D hidden, V vocabulary, c tokens of a chunk.
"""

import json
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from tokenizers import Tokenizer

from dsmoe import model as model_lib
from dsmoe.checkpoint import LoadedRun
from dsmoe.config import Config
from dsmoe.data import tokenizer as tokenizer_lib
from dsmoe.data.lines import check_unicode, read_lines
from dsmoe.model import parameters
from dsmoe.parallel import mesh as mesh_lib


def make_row_loglikelihoods(config: Config, mesh):
  """Returns the jitted function (params, bias, tokens_BS, targets_BS, weights_BS) -> float32 [B].

  Each row is one document; the result is the sum of weight * log p(target) over it.
  """
  graphdef, params, router_bias = model_lib.shapes_of(config.model)

  def rows(params, router_bias, tokens_BS, targets_BS, weights_BS):
    B, S = tokens_BS.shape
    model = nnx.merge(graphdef, parameters.compute_cast(params, config.model), router_bias)
    positions_BS = jnp.broadcast_to(jnp.arange(S), tokens_BS.shape)
    hidden_BSD = model(tokens_BS, positions_BS).hidden_BSD
    head_DV = model.gathered_head()

    def log_p(chunk):
      x_cD, targets_c = chunk
      logits_cV = jnp.matmul(x_cD, head_DV, preferred_element_type=jnp.float32)
      target_c = jnp.take_along_axis(logits_cV, targets_c[:, None], axis=-1)[:, 0]
      return target_c - jax.nn.logsumexp(logits_cV, axis=-1)

    size = math.gcd(B * S, config.loss.cross_entropy_chunk_tokens)
    chunks = (hidden_BSD.reshape(-1, size, hidden_BSD.shape[-1]), targets_BS.reshape(-1, size))
    log_p_BS = jax.lax.map(log_p, chunks).reshape(B, S)
    return jnp.sum(log_p_BS * weights_BS, axis=1)

  batch = mesh_lib.batch_spec()
  specs = (parameters.specs(params, mesh), parameters.specs(router_bias, mesh))
  return jax.jit(mesh_lib.shard_map(rows, mesh, (*specs, batch, batch, batch), batch))


def loglikelihoods(
  run: LoadedRun, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], batch_size: int = 16
) -> np.ndarray:
  """Returns log p(continuation | context) in nats, float64 [len(pairs)].

  Args:
    run: from `load_run`.
    pairs: token ids of (context, continuation), at least one each.
    batch_size: rows computed at once, rounded up to the devices.

  Raises:
    ValueError: for an empty part, or a pair longer than max_position_embeddings.
  """
  limit = run.config.model.max_position_embeddings
  for number, (context, continuation) in enumerate(pairs):
    if not len(context) or not len(continuation):
      raise ValueError(
        f"context and continuation must have at least 1 token each, got {len(context)} and "
        f"{len(continuation)} in pair {number}"
      )
    if len(context) + len(continuation) - 1 > limit:
      raise ValueError(
        f"context plus continuation ({len(context)} + {len(continuation)} tokens, pair {number}) "
        f"must not exceed max_position_embeddings ({limit}) by more than 1"
      )
  fn = make_row_loglikelihoods(run.config, run.mesh)
  B = batch_size + -batch_size % mesh_lib.num_batch_shards(run.mesh)
  result = np.zeros(len(pairs))
  order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]) + len(pairs[i][1]))
  for group in [order[i : i + B] for i in range(0, len(order), B)]:
    longest = max(len(pairs[i][0]) + len(pairs[i][1]) - 1 for i in group)
    S = min(max(16, 1 << (longest - 1).bit_length()), limit)  # few shapes, few compilations
    tokens_BS, targets_BS = np.zeros((2, B, S), np.int32)
    weights_BS = np.zeros((B, S), np.float32)
    for row, i in enumerate(group):
      context, continuation = pairs[i]
      ids = [*context, *continuation]
      tokens_BS[row, : len(ids) - 1] = ids[:-1]
      targets_BS[row, : len(ids) - 1] = ids[1:]
      weights_BS[row, len(context) - 1 : len(ids) - 1] = 1
    values = fn(run.params, run.router_bias, tokens_BS, targets_BS, weights_BS)
    result[group] = np.asarray(values)[: len(group)]
  return result


_KINDS = {list: "list", int: "whole number", str: "text"}  # as JSON's values are called in errors


class Question(NamedTuple):
  """One multiple-choice question; `answer` is an index into `choices`."""

  prompt: str
  choices: list[str]
  answer: int


def read_questions(path: epath.PathLike) -> list[Question]:
  """Reads a question from each line of JSON.

  A line has "question" or "prompt", and either "choices": [texts] with "answer": index from 0, or
  the published form of ARC and CommonsenseQA: "choices": {"text": [texts], "label": [names]} with
  "answerKey": name.

  Raises:
    ValueError: for a missing file or a line of another form, naming it.
  """
  questions = []
  for number, line in enumerate(read_lines(path, "questions"), 1):
    if not line.strip():
      continue
    try:
      questions.append(_question(json.loads(line)))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
      raise ValueError(
        f'{path}, line {number}: must be {{"question": text, "choices": [texts], "answer": '
        f'index}} or {{"question": text, "choices": {{"text": [texts], "label": [names]}}, '
        f'"answerKey": name}} with at least 2 choices, got {line[:80]!r}: {_reason(error)}'
      ) from error
  if not questions:
    raise ValueError(f"the file of questions must have at least 1 line, {path} has none")
  return questions


def _question(row: dict[str, Any]) -> Question:
  """Raises ValueError, KeyError or TypeError for a row of another form."""
  prompt, choices = row["question"] if "question" in row else row["prompt"], row["choices"]
  if isinstance(choices, dict):
    labels, choices = choices["label"], choices["text"]
    _require(choices, list)
    _require(labels, list)
    if len(set(labels)) != len(labels) or len(labels) != len(choices):
      raise ValueError("each choice must have a label of its own")
    answer = labels.index(row["answerKey"])
  else:
    answer = row["answer"]
  _require(choices, list)
  _require(answer, int)
  for text in (prompt, *choices):
    _require(text, str)
    check_unicode(text, "a text")
  if len(choices) < 2 or not all(choices):
    raise ValueError("there must be at least 2 choices, none of them empty")
  if not 0 <= answer < len(choices):
    raise ValueError(f"answer ({answer}) must be the index of one of {len(choices)} choices")
  return Question(prompt, choices, answer)


def _require(value: Any, kind: type) -> None:
  if type(value) is not kind:  # True is no index
    raise TypeError(f"{value!r:.40} must be a {_KINDS[kind]}")


def _reason(error: Exception) -> str:
  """Returns what is wrong with a line that `_question` or json refused."""
  if isinstance(error, KeyError):
    return f"it has no {error.args[0]!r}"
  return "it is not JSON" if isinstance(error, json.JSONDecodeError) else str(error)


def encode_choice(
  tokenizer: Tokenizer, prompt: str, choice: str, end: int
) -> tuple[list[int], list[int]]:
  """Returns the token ids of (context, continuation), encoded separately.

  A space joins them unless there is white space between them already. White space between the
  two belongs to the continuation, as tokens of running text begin with it. The context of an
  empty prompt is `end`, the token that ends a document.
  """
  context = prompt.rstrip()
  between = prompt[len(context) :]
  if context and not between and not choice[0].isspace():
    between = " "
  encode = tokenizer_lib.text_only(tokenizer).encode
  ids = [encode(text, add_special_tokens=False).ids for text in (context, between + choice)]
  return ids[0] or [end], ids[1]


def score_choices(run: LoadedRun, questions: Sequence[Question]) -> dict[str, float]:
  """Answers each question with its likeliest choice.

  Returns:
    `accuracy` by the sum of log-likelihoods and `accuracy_per_byte` by that sum over the
    choice's bytes; `margin` and `margin_per_byte`, the mean of how far the right choice lies
    above the best wrong one, in nats; `questions`, their number.

  Raises:
    ValueError: for no question, one that does not fit, or scores that are not finite.
  """
  if not questions:
    raise ValueError("there must be at least 1 question, got 0")
  tokenizer = run.tokenizer()
  end = tokenizer_lib.eos_id(tokenizer, run.tokenizer_path.parent)
  pairs = [encode_choice(tokenizer, q.prompt, c, end) for q in questions for c in q.choices]
  scores = loglikelihoods(run, pairs)
  if not np.isfinite(scores).all():
    worst = scores[~np.isfinite(scores)][0]
    raise ValueError(f"log-likelihoods must be finite, got {worst} with step {run.step}")
  bytes_ = np.array([len(choice.encode()) for q in questions for choice in q.choices])
  result: dict[str, float] = {"questions": len(questions)}
  starts = np.cumsum([len(q.choices) for q in questions])[:-1]
  for suffix, values in (("", scores), ("_per_byte", scores / bytes_)):
    margins = [
      choice_scores[q.answer] - np.delete(choice_scores, q.answer).max()
      for q, choice_scores in zip(questions, np.split(values, starts))
    ]
    result[f"accuracy{suffix}"] = float(np.mean(np.array(margins) > 0))
    result[f"margin{suffix}"] = float(np.mean(margins))
  return result
