"""Prefill and decode steps over the latent cache, and drafts by multi-token prediction.

Shapes: B rows, S new tokens of a row, X tokens a step may draw, D hidden, V vocabulary, P pages
of a row.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from dsmoe import platforms
from dsmoe.inference import cache, on_mesh, sampling
from dsmoe.inference.cached_attention import Place, expanded, in_latent_space
from dsmoe.inference.forward import Architecture, Weights, draft, forward, head, last_logits
from dsmoe.parallel import collectives
from pallas_kernels import varying

_PROMPT_LOGPROB_TOKENS = 128  # whose logits are in memory at once


class Drawn(NamedTuple):
  """Tokens drawn at one place of each row."""

  token_B: jax.Array  # int32
  logprobs: sampling.TokenLogprobs  # zeros if not wanted


class Wanted(NamedTuple):
  """What any row of a batch asks for: values, so that one compiled program serves all."""

  logprobs: Any  # bool
  prompt_logprobs: Any  # bool


def _log_probs(logits_BV, settings, adjustments, recent_BN, generated_B):
  """Returns the logits of the next token as `sampling.draw` takes them."""
  x_BV = sampling.adjusted(logits_BV, adjustments, recent_BN, generated_B, settings)
  return sampling.log_distribution(x_BV, settings)


@on_mesh.program(1, on_mesh.ROWS)
def _prefill(
  arch: Architecture,
  weights: Weights,
  kept: cache.LatentCache,
  tokens_BS,
  next_B,
  place: Place,
  settings: sampling.RowSampling,
  adjustments: sampling.Adjustments,
  wanted: Wanted,
):
  """Takes in a part of each row's prompt.

  Args:
    arch, weights: from `forward.prepare`; arch is static.
    kept: the cache; donated.
    tokens_BS: int32; S a multiple of cache.PAGE_TOKENS, and so is every `place.first_B`.
    next_B: int32, the prompt's token after these, or -1 where the prompt ends.
    place: where they go.
    settings: how the rows draw.
    adjustments: of the rows' logits.
    wanted: which log-probabilities to compute; the others are zeros.

  Returns:
    (cache, `Drawn`: the token after the last one of the prompt, int32 [B] draft of the token
    after that or None, `TokenLogprobs` [B, S] of each position's following token).
    What comes after a part with `next_B` >= 0 is to be ignored.
  """
  B, S = tokens_BS.shape
  hidden_BSD, kept = forward(arch, weights, kept, tokens_BS, place, expanded)
  logits_BV = last_logits(weights, hidden_BSD, place)
  none_B1, zero_B = jnp.full((B, 1), -1, jnp.int32), jnp.zeros(B, jnp.int32)
  log_probs_BV = _log_probs(logits_BV, settings, adjustments, none_B1, zero_B)
  token_B = sampling.draw(log_probs_BV, settings, place.first_B + place.count_B)
  drawn = Drawn(token_B, sampling.logprobs_if(wanted.logprobs, logits_BV, token_B))
  shifted_BS = jnp.concatenate([tokens_BS[:, 1:], tokens_BS[:, :1]], axis=1)
  is_last_BS = jnp.arange(S)[None, :] == place.count_B[:, None] - 1
  next_BS = jnp.where(is_last_BS, jnp.where(next_B >= 0, next_B, token_B)[:, None], shifted_BS)
  drafted_B = None
  if arch.mtp_graphdef is not None:
    drafted_B, kept = draft(arch, weights, kept, hidden_BSD, next_BS, place, expanded)
  # A few at a time: logits of a whole batch of prompts would be the largest array by far.
  few = math.gcd(S, _PROMPT_LOGPROB_TOKENS)
  parts = hidden_BSD.reshape(B * S // few, few, -1), next_BS.reshape(B * S // few, few)

  def of_part(part):
    logits = head(weights, part[0])
    return sampling.logprobs_of(logits, part[1])

  shapes = jax.eval_shape(lambda parts: jax.lax.map(of_part, parts), parts)
  of_prompt = jax.lax.cond(
    wanted.prompt_logprobs,
    lambda: jax.lax.map(of_part, parts),
    lambda: jax.tree.map(
      lambda x: varying.zeros_like_operands(x.shape, x.dtype, hidden_BSD), shapes
    ),
  )
  return kept, drawn, drafted_B, jax.tree.map(lambda x: x.reshape(B, S, *x.shape[2:]), of_prompt)


class Rows(NamedTuple):
  """What decoding carries from step to step; rows with nothing remaining are left alone."""

  token_B: Any  # int32, the newest, not in the cache yet
  draft_B: Any  # int32, a guess at the one after it
  length_B: Any  # int32, tokens in the cache
  remaining_B: Any  # int32, tokens still to draw


class Step(NamedTuple):
  """What one step drew: one token a row, or two where a draft was right."""

  token_BX: jax.Array  # int32, X = 1, or 2 with drafts; -1: none
  drafted_B: jax.Array  # bool, a draft was put to the test
  logprobs: sampling.TokenLogprobs  # [B, X]; zeros if not wanted


def _stops(token_B, settings: sampling.RowSampling):
  return jnp.any(token_B[:, None] == settings.stop_BX, axis=1)


def _plain_step(
  arch, weights, kept, rows: Rows, recent_BN, table_BP, settings, adjustments, want_logprobs
):
  """Decodes one token of each row."""
  active_B = rows.remaining_B > 0
  place = Place(table_BP, rows.length_B, active_B.astype(jnp.int32))
  hidden_B1D, kept = forward(arch, weights, kept, rows.token_B[:, None], place, in_latent_space)
  logits_BV = head(weights, hidden_B1D[:, 0])
  generated_B = settings.max_tokens_B - rows.remaining_B
  log_probs_BV = _log_probs(logits_BV, settings, adjustments, recent_BN, generated_B)
  token_B = sampling.draw(log_probs_BV, settings, rows.length_B + 1)
  rows = Rows(
    jnp.where(active_B, token_B, rows.token_B),
    None,
    rows.length_B + active_B,
    jnp.where(_stops(token_B, settings), 0, rows.remaining_B - active_B),
  )
  logprobs = sampling.logprobs_if(want_logprobs, logits_BV[:, None], token_B[:, None])
  token_B1 = jnp.where(active_B, token_B, -1)[:, None]
  return kept, rows, Step(token_B1, jnp.zeros_like(active_B), logprobs)


def _drafted_step(
  arch, weights, kept, rows: Rows, recent_BN, table_BP, settings, adjustments, want_logprobs
):
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
  position_B, generated_B = rows.length_B + 1, settings.max_tokens_B - rows.remaining_B
  log_probs_BV = _log_probs(logits_B2V[:, 0], settings, adjustments, recent_BN, generated_B)
  probs_BV = jax.nn.softmax(log_probs_BV, axis=-1)
  p_draft_B = jnp.take_along_axis(probs_BV, draft_B[:, None], axis=1)[:, 0]
  right_B = sampling.uniform(settings, position_B, purpose=1) < p_draft_B
  is_draft_BV = jnp.arange(probs_BV.shape[1])[None, :] == draft_B[:, None]
  instead_B = sampling.draw(jnp.where(is_draft_BV, -jnp.inf, log_probs_BV), settings, position_B)
  first_B = jnp.where(right_B, draft_B, instead_B)
  recent_BN = jnp.concatenate([recent_BN, first_B[:, None]], axis=1)
  log_probs_BV = _log_probs(logits_B2V[:, 1], settings, adjustments, recent_BN, generated_B + 1)
  second_B = sampling.draw(log_probs_BV, settings, position_B + 1)

  twice_B = active_B & right_B & (rows.remaining_B > 1) & ~_stops(first_B, settings)
  newest_B = jnp.where(twice_B, second_B, first_B)
  place = place._replace(count_B=jnp.where(active_B, 1 + twice_B, 0))
  next_B2 = jnp.stack([first_B, second_B], axis=1)
  drafted_B, kept = draft(arch, weights, kept, hidden_B2D, next_B2, place, in_latent_space)
  drawn_B2 = jnp.stack([jnp.where(active_B, first_B, -1), jnp.where(twice_B, second_B, -1)], axis=1)
  new_rows = Rows(
    jnp.where(active_B, newest_B, rows.token_B),
    drafted_B,
    rows.length_B + place.count_B,
    jnp.where(_stops(newest_B, settings), 0, rows.remaining_B - place.count_B),
  )
  logprobs = sampling.logprobs_if(want_logprobs, logits_B2V, next_B2)
  return kept, new_rows, Step(drawn_B2, active_B & (rows.remaining_B > 1), logprobs)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
@on_mesh.program(2, (on_mesh.ROWS, on_mesh.ROWS, PartitionSpec(None, *on_mesh.ROWS)))
def decode(
  arch: Architecture,
  num_steps: int,
  weights: Weights,
  kept: cache.LatentCache,
  rows: Rows,
  table_BP,
  settings: sampling.RowSampling,
  adjustments: sampling.Adjustments,
  want_logprobs,
):
  """Decodes up to `num_steps` steps of every row on the device; fewer when all rows are done.

  Args:
    arch, weights: from `forward.prepare`; arch is static.
    num_steps: static.
    kept: the cache; donated.
    rows: where the rows stand.
    table_BP: int32, pages with room for all tokens that remain, and one more with drafts.
    settings: how the rows draw, and what ends them.
    adjustments: of the rows' logits, as they are before the first step.
    want_logprobs: bool, whether any row asks for log-probabilities.

  Returns:
    (cache, rows, `Step` with a leading dimension of num_steps; tokens of steps not taken are -1).
  """
  one, X = (_plain_step, 1) if arch.mtp_graphdef is None else (_drafted_step, 2)
  B = table_BP.shape[0]

  def step(kept, rows, recent_BN):
    return one(arch, weights, kept, rows, recent_BN, table_BP, settings, adjustments, want_logprobs)

  def body(carry):
    i, kept, rows, steps, _ = carry
    recent_BN = jnp.moveaxis(steps.token_BX, 1, 0).reshape(B, num_steps * X)
    kept, rows, drawn = step(kept, rows, recent_BN)
    steps = jax.tree.map(lambda all_, x: all_.at[i].set(x), steps, drawn)
    return i + 1, kept, rows, steps, any_remains(rows)

  def any_remains(rows: Rows):
    return collectives.any_along(on_mesh.ROWS_AXIS, jnp.any(rows.remaining_B > 0))

  def goes_on(carry):
    i, *_, remains = carry
    return (i < num_steps) & remains

  shapes = jax.eval_shape(step, kept, rows, jnp.zeros((B, num_steps * X), jnp.int32))[2]
  steps = jax.tree.map(
    lambda x: varying.zeros_like_operands((num_steps, *x.shape), x.dtype, rows), shapes
  )
  steps = steps._replace(token_BX=steps.token_BX - 1)
  start = (0, kept, rows, steps, any_remains(rows))
  _, kept, rows, steps, _ = jax.lax.while_loop(goes_on, body, start)
  return kept, rows, steps


@functools.cache
def _compiled_prefill():
  # When first called, so that importing this module starts no backend.
  options = platforms.compiler_options()
  return jax.jit(_prefill, static_argnums=0, donate_argnums=2, compiler_options=options)


@functools.wraps(_prefill)
def prefill(*args):
  return _compiled_prefill()(*args)


def num_programs() -> int:
  """Returns how many programs this process has compiled for `prefill` and `decode`."""
  return sum(jitted._cache_size() for jitted in (_compiled_prefill(), decode))  # type: ignore
