"""Continuing text: a full forward pass for every new token, on the training mesh.

Shapes: B rows, T length of the buffer, V vocabulary.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsmoe import model as model_lib
from dsmoe import sharding
from dsmoe.config import Config


def make_next_logits(config: Config, graphdef, params, router_bias, mesh):
  """Returns the jitted function (params, bias, tokens_BT, last_B) -> float32 [B, V].

  It gives the logits that follow token `last_B` of each row. `params` and `router_bias`
  are needed for their shapes only.
  """

  def next_logits(params, router_bias, tokens_BT, last_B):
    cast = model_lib.compute_cast(params, config.model)
    model = nnx.merge(graphdef, cast, router_bias)
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    hidden_BTD = model(tokens_BT, positions_BT).hidden_BSD
    hidden_BD = jnp.take_along_axis(hidden_BTD, last_B[:, None, None], axis=1)[:, 0]
    return jnp.matmul(hidden_BD, model.gathered_head(), preferred_element_type=jnp.float32)

  rows = sharding.batch_spec()
  specs = (sharding.parameter_specs(params), sharding.parameter_specs(router_bias), rows, rows)
  return jax.jit(sharding.shard_map(next_logits, mesh, specs, rows))


def generate(
  config: Config,
  params,
  router_bias,
  mesh,
  prompts: Sequence[Sequence[int]],
  num_tokens: int,
  temperature: float = 1.0,
  seed: int = 0,
  stop_token: int | None = None,
) -> list[list[int]]:
  """Continues each prompt by up to `num_tokens` sampled tokens.

  Args:
    config: the run's.
    params, router_bias: sharded over `mesh`.
    prompts: token ids, at least one each.
    num_tokens: new tokens a prompt.
    temperature: 0 takes the likeliest token.
    seed: of the sampling; row i of equal calls gets the same text.
    stop_token: ends a row, and is not returned.

  Returns:
    The new tokens of each prompt.

  Raises:
    ValueError: for no prompt or an empty one, a token outside the vocabulary, a negative
      temperature, or more tokens than max_position_embeddings.
  """
  if not prompts:
    raise ValueError("prompts must have at least 1 prompt, got 0")
  longest = max(len(p) for p in prompts)
  limit = config.model.max_position_embeddings
  if min(len(p) for p in prompts) == 0:
    raise ValueError("each prompt must have at least 1 token, got 0")
  if temperature < 0:
    raise ValueError(f"temperature must be at least 0, got {temperature}")
  if longest + num_tokens > limit:
    raise ValueError(
      f"prompt ({longest} tokens) plus num_tokens ({num_tokens}) must not exceed "
      f"max_position_embeddings ({limit})"
    )
  V = config.model.vocab_size
  for token in (min(min(p) for p in prompts), max(max(p) for p in prompts)):
    if not 0 <= token < V:
      raise ValueError(f"tokens must be at least 0 and below vocab_size ({V}), got {token}")
  graphdef, *_ = model_lib.split(jax.eval_shape(lambda: model_lib.build(config.model)))
  next_logits = make_next_logits(config, graphdef, params, router_bias, mesh)
  B = len(prompts) + -len(prompts) % sharding.num_batch_shards(mesh)
  tokens_BT = np.zeros((B, longest + num_tokens), np.int32)
  lengths_B = np.ones((B,), np.int32)
  for row, prompt in enumerate(prompts):
    tokens_BT[row, : len(prompt)] = prompt
    lengths_B[row] = len(prompt)
  done_B = np.arange(B) >= len(prompts)
  random = [np.random.default_rng((seed, row)) for row in range(B)]
  first_B = lengths_B.copy()
  for _ in range(num_tokens):
    logits_BV = np.asarray(next_logits(params, router_bias, tokens_BT, lengths_B - 1))
    for row in np.flatnonzero(~done_B).tolist():
      token = _sample(logits_BV[row], temperature, random[row])
      if token == stop_token:
        done_B[row] = True
      else:
        tokens_BT[row, lengths_B[row]] = token
        lengths_B[row] += 1
    if done_B.all():
      break
  return [tokens_BT[i, first_B[i] : lengths_B[i]].tolist() for i in range(len(prompts))]


def _sample(logits_V, temperature: float, random: np.random.Generator) -> int:
  if temperature == 0:
    return int(np.argmax(logits_V))
  # Gumbel's trick: the argmax of perturbed logits is a draw from their softmax.
  return int(
    np.argmax(logits_V.astype(np.float64) / temperature + random.gumbel(size=logits_V.shape))
  )
