"""Sampling of the next token: penalties, temperature, filters, seeds, log-probabilities.

Every row of a batch has its own settings. The random numbers depend on the row's seed and the
token's position only, so that a request's text does not depend on the rest of the batch.

Shapes: B rows, V vocabulary.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import varying

_LARGEST = 1e6  # temperature; at any above it all tokens are equally likely too
MAX_LOGPROBS = 20  # upper limit of the alternatives reported beside a token
MAX_STOP_TOKENS = 8


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How one request's tokens are sampled."""

  max_tokens: int = 128  # new tokens; 0 for the prompt's log-probabilities alone
  temperature: float = 1.0  # 0 for the likeliest token, the lowest id of equal ones
  top_k: int = 0  # keep the k likeliest tokens; 0 for all
  top_p: float = 1.0  # keep the likeliest tokens that together reach this probability
  min_p: float = 0.0  # keep tokens of at least this share of the likeliest one's probability
  repetition_penalty: float = 1.0  # divides the positive logits of tokens that occurred before
  presence_penalty: float = 0.0  # subtracted from the logits of tokens generated before
  frequency_penalty: float = 0.0  # the same, as often as each was generated
  logit_bias: tuple[tuple[int, float], ...] = ()  # token and what is added to its logit
  seed: int = 0
  logprobs: int | None = None  # alternatives reported beside each new token; None for no logprobs
  prompt_logprobs: bool = False  # report log-probabilities of the prompt's tokens too
  stop_tokens: tuple[int, ...] = ()  # end the text, and are not returned
  min_tokens: int = 0  # new tokens before a stop token may be drawn

  def __post_init__(self):
    rules = (
      (self.max_tokens >= 0, f"max_tokens must be at least 0, got {self.max_tokens}"),
      (
        0 <= self.temperature <= _LARGEST,
        f"temperature must be at least 0 and at most {_LARGEST:g}, got {self.temperature}",
      ),
      (self.top_k >= 0, f"top_k must be at least 0, got {self.top_k}"),
      (0 < self.top_p <= 1, f"top_p must be above 0 and at most 1, got {self.top_p}"),
      (0 <= self.min_p <= 1, f"min_p must be between 0 and 1, got {self.min_p}"),
      (
        1e-3 <= self.repetition_penalty <= 1e3,
        f"repetition_penalty must be between 0.001 and 1000, got {self.repetition_penalty}",
      ),
      (
        math.isfinite(self.presence_penalty),
        f"presence_penalty must be finite, got {self.presence_penalty}",
      ),
      (
        math.isfinite(self.frequency_penalty),
        f"frequency_penalty must be finite, got {self.frequency_penalty}",
      ),
      (
        all(math.isfinite(bias) for _, bias in self.logit_bias),
        f"logit_bias must be finite, got {self.logit_bias}",
      ),
      (0 <= self.seed < 2**63, f"seed must be at least 0 and below 2**63, got {self.seed}"),
      (
        self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS,
        f"logprobs must be None or between 0 and {MAX_LOGPROBS}, got {self.logprobs}",
      ),
      (
        0 <= self.min_tokens <= self.max_tokens,
        f"min_tokens must be between 0 and max_tokens ({self.max_tokens}), got {self.min_tokens}",
      ),
      (
        len(self.stop_tokens) <= MAX_STOP_TOKENS,
        f"stop_tokens must be at most {MAX_STOP_TOKENS}, got {len(self.stop_tokens)}",
      ),
    )
    for fine, message in rules:
      if not fine:
        raise ValueError(message)

  @property
  def adjusts(self) -> bool:
    """Whether logits change by what was generated before, or by token."""
    penalties = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty)
    return penalties != (1, 0, 0) or bool(self.logit_bias) or self.min_tokens > 0


class RowSampling(NamedTuple):
  """The settings of a batch's rows."""

  temperature_B: Any  # float32
  top_k_B: Any  # int32
  top_p_B: Any  # float32
  min_p_B: Any  # float32
  repetition_penalty_B: Any  # float32
  presence_penalty_B: Any  # float32
  frequency_penalty_B: Any  # float32
  seed_B2: Any  # uint32
  max_tokens_B: Any  # int32
  min_tokens_B: Any  # int32
  stop_BX: Any  # int32, X = MAX_STOP_TOKENS; -1 for none


def stack(settings: Sequence[Sampling]) -> RowSampling:
  """Stacks the settings of rows into NumPy arrays."""
  # Logits over a smaller temperature would not be finite.
  settings = [
    dataclasses.replace(s, temperature=0.0) if s.temperature < 1e-5 else s for s in settings
  ]

  def column(name: str, dtype=np.float32):
    return np.array([min(getattr(s, name), 2**31 - 1) for s in settings], dtype)

  stop_BX = np.full((len(settings), MAX_STOP_TOKENS), -1, np.int32)
  for row, s in zip(stop_BX, settings):
    row[: len(s.stop_tokens)] = s.stop_tokens
  return RowSampling(
    column("temperature"),
    column("top_k", np.int32),
    column("top_p"),
    column("min_p"),
    column("repetition_penalty"),
    column("presence_penalty"),
    column("frequency_penalty"),
    np.array([(s.seed >> 32, s.seed & 0xFFFFFFFF) for s in settings], np.uint32),
    column("max_tokens", np.int32),
    column("min_tokens", np.int32),
    stop_BX,
  )


class Adjustments(NamedTuple):
  """What changes the logits of a batch's rows by token."""

  wanted: Any  # bool, whether any row asks for it; the rest is read only then
  in_prompt_BV: Any  # bool
  count_BV: Any  # int32, how often each token was generated
  bias_BV: Any  # float32


def argmax(x_BV):
  """Returns the lowest index of the largest value, int32 [B]; faster on CPU than jnp.argmax."""
  V = x_BV.shape[-1]
  is_top_BV = x_BV == jnp.max(x_BV, axis=-1, keepdims=True)
  return jnp.min(jnp.where(is_top_BV, jnp.arange(V, dtype=jnp.int32)[None, :], V - 1), axis=-1)


def penalised(logits_BV, seen_BV, rows: RowSampling):
  """Lowers the logits of tokens in `seen_BV`. Source: arXiv:1909.05858, section 4.1."""
  penalty_B1 = rows.repetition_penalty_B[:, None]
  lower_BV = jnp.where(logits_BV > 0, logits_BV / penalty_B1, logits_BV * penalty_B1)
  return jnp.where(seen_BV, lower_BV, logits_BV)


def adjusted(logits_BV, adjustments: Adjustments, recent_BN, generated_B, rows: RowSampling):
  """Applies biases, penalties and `min_tokens`.

  The order is vLLM's: biases, then the penalties of repetition, frequency and presence.

  Args:
    logits_BV: float32, the model's.
    adjustments: as they were before `recent_BN`.
    recent_BN: int32, tokens generated since; -1 for none.
    generated_B: int32, how many tokens each row has generated.
    rows: the rows' settings.

  Returns:
    float32 [B, V]; -inf for stop tokens that come too soon.
  """

  def changed():
    B, V = logits_BV.shape
    rows_B1 = jnp.arange(B)[:, None]
    # V is outside, and dropped.
    recent = jnp.where(recent_BN < 0, V, recent_BN)
    count_BV = adjustments.count_BV.at[rows_B1, recent].add(1, mode="drop")
    seen_BV = adjustments.in_prompt_BV | (count_BV > 0)
    x_BV = penalised(logits_BV + adjustments.bias_BV, seen_BV, rows)
    x_BV -= rows.frequency_penalty_B[:, None] * count_BV
    x_BV -= rows.presence_penalty_B[:, None] * (count_BV > 0)
    too_soon_B1 = (generated_B < rows.min_tokens_B)[:, None]
    stop_BX = jnp.where(too_soon_B1 & (rows.stop_BX >= 0), rows.stop_BX, V)
    return x_BV.at[rows_B1, stop_BX].set(-jnp.inf, mode="drop")

  return jax.lax.cond(adjustments.wanted, changed, lambda: logits_BV)


def _filtered(logits_BV, rows: RowSampling):
  """Applies top-k, top-p and min-p, in this order as Hugging Face does: others become -inf.

  Tokens that are as likely as the last one kept are kept too.
  """
  V = logits_BV.shape[1]
  sorted_BV = -jnp.sort(-logits_BV, axis=-1)
  k_B = jnp.where(rows.top_k_B == 0, V, jnp.minimum(rows.top_k_B, V))
  place_1V = jnp.arange(V)[None, :]
  sorted_BV = jnp.where(place_1V < k_B[:, None], sorted_BV, -jnp.inf)
  probs_BV = jax.nn.softmax(sorted_BV, axis=-1)
  before_BV = jnp.cumsum(probs_BV, axis=-1) - probs_BV
  top_p_B1 = rows.top_p_B[:, None]
  keep_BV = (place_1V < k_B[:, None]) & ((before_BV < top_p_B1) | (top_p_B1 == 1))
  keep_BV &= probs_BV >= rows.min_p_B[:, None] * probs_BV[:, :1]
  keep_BV |= place_1V == 0
  last_B1 = jnp.min(jnp.where(keep_BV, sorted_BV, jnp.inf), axis=-1, keepdims=True)
  return jnp.where(logits_BV >= last_B1, logits_BV, -jnp.inf)


def log_distribution(logits_BV, rows: RowSampling):
  """Returns unnormalised float32 log-probabilities of the next token, -inf where impossible.

  Args:
    logits_BV: float32, with penalties and biases.
    rows: the rows' settings; with temperature 0 only the likeliest token is possible.
  """
  greedy_B1 = (rows.temperature_B == 0)[:, None]
  scaled_BV = logits_BV / jnp.where(greedy_B1, 1, rows.temperature_B[:, None])
  filters_B = (rows.top_k_B > 0) | (rows.top_p_B < 1) | (rows.min_p_B > 0)
  filters = jnp.any(filters_B & (rows.temperature_B > 0))
  scaled_BV = jax.lax.cond(filters, lambda: _filtered(scaled_BV, rows), lambda: scaled_BV)
  is_best_BV = jnp.arange(logits_BV.shape[-1])[None, :] == argmax(logits_BV)[:, None]
  return jnp.where(greedy_B1, jnp.where(is_best_BV, 0.0, -jnp.inf), scaled_BV)


def _keys(rows: RowSampling, position_B, purpose: int):
  def key(seed_2, position):
    base = jax.random.wrap_key_data(seed_2, impl="threefry2x32")
    return jax.random.fold_in(jax.random.fold_in(base, position), purpose)

  return jax.vmap(key)(rows.seed_B2, position_B)


def uniform(rows: RowSampling, position_B, purpose: int):
  """Returns a random float32 number in [0, 1) for each row; see `draw` for `purpose`."""
  return jax.vmap(jax.random.uniform)(_keys(rows, position_B, purpose))


def draw(log_probs_BV, rows: RowSampling, position_B, purpose: int = 0):
  """Draws from unnormalised log-probabilities, int32 [B].

  Args:
    log_probs_BV: float32, -inf for impossible tokens.
    rows: the rows' settings.
    position_B: int32, positions of the sampled tokens.
    purpose: a number that differs between independent draws for one position.
  """

  def sampled():
    gumbel = jax.vmap(lambda key: jax.random.gumbel(key, log_probs_BV.shape[1:]))
    return argmax(log_probs_BV + gumbel(_keys(rows, position_B, purpose)))

  return jax.lax.cond(jnp.any(rows.temperature_B > 0), sampled, lambda: argmax(log_probs_BV))


class TokenLogprobs(NamedTuple):
  """Log-probabilities under the model, before temperature, penalties and filters."""

  chosen: jax.Array  # float32 [...], of the tokens asked about
  rank: jax.Array  # int32 [...], of those tokens; 1 is the likeliest
  top: jax.Array  # float32 [..., MAX_LOGPROBS], descending
  top_tokens: jax.Array  # int32 [..., MAX_LOGPROBS]


def logprobs_of(logits, tokens) -> TokenLogprobs:
  """Returns log-probabilities of tokens [...] under logits [..., V], and the likeliest ones."""
  log_probs = jax.nn.log_softmax(logits, axis=-1)
  chosen = jnp.take_along_axis(log_probs, tokens[..., None], axis=-1)
  rank = 1 + jnp.sum(log_probs > chosen, axis=-1, dtype=jnp.int32)
  top = jax.lax.top_k(log_probs, min(MAX_LOGPROBS, logits.shape[-1]))
  return TokenLogprobs(chosen[..., 0], rank, *top)


def logprobs_if(wanted, logits, tokens) -> TokenLogprobs:
  """Returns `logprobs_of`, or zeros, which cost nothing, when none are wanted."""
  shapes = jax.eval_shape(logprobs_of, logits, tokens)

  def zeros():
    return jax.tree.map(lambda x: varying.zeros_like_operands(x.shape, x.dtype, logits), shapes)

  return jax.lax.cond(wanted, lambda: logprobs_of(logits, tokens), zeros)
