"""Prefill and decode steps over the latent cache, and drafts by multi-token prediction.

Shapes: B rows, S new tokens of a row, X tokens a step may draw, D hidden, V vocabulary, P pages
of a row.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dsmoe import platforms
from dsmoe.inference import cache, sampling
from dsmoe.inference.cached_attention import Place, expanded, in_latent_space
from dsmoe.inference.forward import Architecture, Weights, draft, forward, head, last_logits


class Drawn(NamedTuple):
  """Tokens drawn at one place of each row."""

  token_B: jax.Array  # int32
  logprobs: sampling.TokenLogprobs | None


def _draw(logits_BV, rows, seen_BV, position_B, want_logprobs: bool) -> Drawn:
  log_probs_BV = sampling.log_distribution(logits_BV, rows, seen_BV)
  token_B = sampling.draw(log_probs_BV, rows, position_B)
  return Drawn(token_B, sampling.logprobs_of(logits_BV, token_B) if want_logprobs else None)


def _prefill(
  arch: Architecture,
  want_logprobs: bool,
  want_prompt_logprobs: bool,
  weights: Weights,
  kept: cache.LatentCache,
  tokens_BS,
  next_B,
  place: Place,
  rows: sampling.RowSampling,
  seen_BV,
):
  """Takes in a part of each row's prompt.

  Args:
    arch, weights: from `inference.prepare`.
    want_logprobs, want_prompt_logprobs: whether to compute those.
    kept: the cache; donated.
    tokens_BS: int32; S a multiple of cache.PAGE_TOKENS, and so is every `place.first_B`.
    next_B: int32, the prompt's token after these, or -1 where the prompt ends.
    place: where they go.
    rows: how the rows draw.
    seen_BV: bool, tokens of the whole prompt; None when no row has a repetition penalty.

  Returns:
    (cache, `Drawn`: the token after the last one of the prompt, int32 [B] draft of the token
    after that or None, `TokenLogprobs` [B, S] of each position's following token or None).
    What comes after a part with `next_B` >= 0 is to be ignored.
  """
  hidden_BSD, kept = forward(arch, weights, kept, tokens_BS, place, expanded)
  logits_BV = last_logits(weights, hidden_BSD, place)
  drawn = _draw(logits_BV, rows, seen_BV, place.first_B + place.count_B, want_logprobs)
  shifted_BS = jnp.concatenate([tokens_BS[:, 1:], tokens_BS[:, :1]], axis=1)
  is_last_BS = jnp.arange(tokens_BS.shape[1])[None, :] == place.count_B[:, None] - 1
  next_BS = jnp.where(
    is_last_BS, jnp.where(next_B >= 0, next_B, drawn.token_B)[:, None], shifted_BS
  )
  drafted_B = prompt_logprobs = None
  if arch.mtp_graphdef is not None:
    drafted_B, kept = draft(arch, weights, kept, hidden_BSD, next_BS, place, expanded)
  if want_prompt_logprobs:
    # A row at a time: logits of a whole batch of prompts would be the largest array by far.
    prompt_logprobs = jax.lax.map(
      lambda row: sampling.logprobs_of(head(weights, row[0]), row[1]), (hidden_BSD, next_BS)
    )
  return kept, drawn, drafted_B, prompt_logprobs


class Rows(NamedTuple):
  """What decoding carries from step to step; rows with nothing remaining are left alone."""

  token_B: Any  # int32, the newest, not in the cache yet
  draft_B: Any  # int32, a guess at the one after it
  length_B: Any  # int32, tokens in the cache
  remaining_B: Any  # int32, tokens still to draw
  seen_BV: Any  # bool, tokens there; None when no row has a repetition penalty


class Step(NamedTuple):
  """What one step drew: one token a row, or two where a draft was right."""

  token_BX: jax.Array  # int32, X = 1, or 2 with drafts; -1: none
  drafted_B: jax.Array  # bool, a draft was put to the test
  logprobs: sampling.TokenLogprobs | None  # [B, X]


def _seen(seen_BV, token_B):
  if seen_BV is None:
    return None
  return seen_BV | (jnp.arange(seen_BV.shape[1])[None, :] == token_B[:, None])


def _plain_step(arch, want_logprobs, weights, kept, rows: Rows, table_BP, settings, stop_BX):
  """Decodes one token of each row."""
  active_B = rows.remaining_B > 0
  place = Place(table_BP, rows.length_B, active_B.astype(jnp.int32))
  hidden_B1D, kept = forward(arch, weights, kept, rows.token_B[:, None], place, in_latent_space)
  logits_BV = head(weights, hidden_B1D[:, 0])
  drawn = _draw(logits_BV, settings, rows.seen_BV, rows.length_B + 1, want_logprobs)
  stopped_B = jnp.any(drawn.token_B[:, None] == stop_BX, axis=1)
  rows = Rows(
    jnp.where(active_B, drawn.token_B, rows.token_B),
    None,
    rows.length_B + active_B,
    jnp.where(stopped_B, 0, rows.remaining_B - active_B),
    _seen(rows.seen_BV, drawn.token_B),
  )
  logprobs = jax.tree.map(lambda x: x[:, None], drawn.logprobs)
  token_B1 = jnp.where(active_B, drawn.token_B, -1)[:, None]
  return kept, rows, Step(token_B1, jnp.zeros_like(active_B), logprobs)


def _drafted_step(arch, want_logprobs, weights, kept, rows: Rows, table_BP, settings, stop_BX):
  """Checks each row's draft and decodes the token after it, or the one in its place.

  The draft d is certain in its own view, so it is accepted with the model's probability of d;
  otherwise the token is drawn from the model's distribution without d. Each token then has
  exactly the distribution it has without drafts. Source: arXiv:2211.17192.
  """
  active_B, draft_B = rows.remaining_B > 0, rows.draft_B
  place = Place(table_BP, rows.length_B, 2 * active_B.astype(jnp.int32))
  tokens_B2 = jnp.stack([rows.token_B, draft_B], axis=1)
  hidden_B2D, kept = forward(arch, weights, kept, tokens_B2, place, in_latent_space)
  logits_B2V = head(weights, hidden_B2D)
  position_B = rows.length_B + 1
  log_probs_BV = sampling.log_distribution(logits_B2V[:, 0], settings, rows.seen_BV)
  probs_BV = jax.nn.softmax(log_probs_BV, axis=-1)
  p_draft_B = jnp.take_along_axis(probs_BV, draft_B[:, None], axis=1)[:, 0]
  right_B = sampling.uniform(settings, position_B, purpose=1) < p_draft_B
  is_draft_BV = jnp.arange(probs_BV.shape[1])[None, :] == draft_B[:, None]
  instead_B = sampling.draw(jnp.where(is_draft_BV, -jnp.inf, log_probs_BV), settings, position_B)
  first_B = jnp.where(right_B, draft_B, instead_B)
  seen_BV = _seen(rows.seen_BV, first_B)
  second = _draw(logits_B2V[:, 1], settings, seen_BV, position_B + 1, False)

  def stops(token_B):
    return jnp.any(token_B[:, None] == stop_BX, axis=1)

  twice_B = active_B & right_B & (rows.remaining_B > 1) & ~stops(first_B)
  newest_B = jnp.where(twice_B, second.token_B, first_B)
  place = place._replace(count_B=jnp.where(active_B, 1 + twice_B, 0))
  next_B2 = jnp.stack([first_B, second.token_B], axis=1)
  drafted_B, kept = draft(arch, weights, kept, hidden_B2D, next_B2, place, in_latent_space)
  drawn_B2 = jnp.stack(
    [jnp.where(active_B, first_B, -1), jnp.where(twice_B, second.token_B, -1)], axis=1
  )
  new_rows = Rows(
    jnp.where(active_B, newest_B, rows.token_B),
    drafted_B,
    rows.length_B + place.count_B,
    jnp.where(stops(newest_B), 0, rows.remaining_B - place.count_B),
    None
    if seen_BV is None
    else jnp.where(twice_B[:, None], _seen(seen_BV, second.token_B), seen_BV),
  )
  logprobs = sampling.logprobs_of(logits_B2V, next_B2) if want_logprobs else None
  return kept, new_rows, Step(drawn_B2, active_B & (rows.remaining_B > 1), logprobs)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=4)
def decode(
  arch: Architecture,
  num_steps: int,
  want_logprobs: bool,
  weights: Weights,
  kept: cache.LatentCache,
  rows: Rows,
  table_BP,
  settings: sampling.RowSampling,
  stop_BX,
):
  """Decodes up to `num_steps` steps of every row on the device; fewer when all rows are done.

  Args:
    arch, weights: from `inference.prepare`.
    num_steps, want_logprobs: static.
    kept: the cache; donated.
    rows: where the rows stand.
    table_BP: int32, pages with room for all tokens that remain, and one more with drafts.
    settings: how the rows draw.
    stop_BX: int32, tokens that end a row; -1 for none.

  Returns:
    (cache, rows, `Step` with a leading dimension of num_steps; tokens of steps not taken are -1).
  """
  one = _plain_step if arch.mtp_graphdef is None else _drafted_step

  def step(kept, rows):
    return one(arch, want_logprobs, weights, kept, rows, table_BP, settings, stop_BX)

  def body(carry):
    i, kept, rows, steps = carry
    kept, rows, drawn = step(kept, rows)
    return i + 1, kept, rows, jax.tree.map(lambda all_, x: all_.at[i].set(x), steps, drawn)

  def goes_on(carry):
    i, _, rows, _ = carry
    return (i < num_steps) & jnp.any(rows.remaining_B > 0)

  shapes = jax.eval_shape(step, kept, rows)[2]
  steps = jax.tree.map(lambda x: jnp.zeros((num_steps, *x.shape), x.dtype), shapes)
  steps = steps._replace(token_BX=steps.token_BX - 1)
  _, kept, rows, steps = jax.lax.while_loop(goes_on, body, (0, kept, rows, steps))
  return kept, rows, steps


@functools.cache
def _compiled_prefill():
  # When first called, so that importing this module starts no backend.
  options = platforms.compiler_options()
  return jax.jit(_prefill, static_argnums=(0, 1, 2), donate_argnums=4, compiler_options=options)


@functools.wraps(_prefill)
def prefill(*args):
  return _compiled_prefill()(*args)
