"""The share that this device's experts have in tokens, whose other experts live elsewhere.

Shapes: N tokens, D hidden, O experts of this device, K experts a token, C of them considered, P
rows.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsmoe.config import ModelConfig
from dsmoe.parallel.all_gather import experts_of_rows, row_alignment
from pallas_kernels import permute
from pallas_kernels.routing import ranks


class Tokens(NamedTuple):
  """Tokens of any device, or places for some."""

  x_ND: jax.Array
  expert_NK: jax.Array  # int32, of the whole layer; -1: none
  gate_NK: jax.Array  # float32


class Order(NamedTuple):
  """The order of choices by group, as far as there is room for them."""

  pair_P: jax.Array  # int32, n * C + c, or N * C where nothing lies
  row_NC: jax.Array  # int32; choices that have no place share a row where nothing lies
  starts_G: jax.Array  # int32
  sizes_G: jax.Array  # int32, of what has a place


def own_share(tokens: Tokens, weights, room: int, config: ModelConfig):
  """Sums the shares of this device's experts in every token.

  Args:
    tokens: of this device and others.
    weights: of this device's experts, [O, D, F] twice and [O, F, D].
    room: the most rows of experts that there is memory for; others are dropped.
    config: matmul_precision, kernels.

  Returns:
    ([N, D] in x's dtype; int32, how many rows were dropped).
  """
  O, K = weights[0].shape[0], tokens.expert_NK.shape[1]
  alignment = row_alignment(room, O, config)
  rows = permute.num_rows(room, O, alignment)
  with jax.named_scope("plan"):
    local_NK = tokens.expert_NK - jax.lax.axis_index("expert") * O
    own_NC, (local_NC, gate_NC) = first_of(
      (local_NK >= 0) & (local_NK < O), min(K, O), local_NK, tokens.gate_NK
    )
    order = ordered(jnp.where(own_NC, local_NC, O), O, rows, alignment)
    weight_P = jnp.take(gate_NC.reshape(-1), order.pair_P, mode="fill", fill_value=0)
  x_PD = permute.permute(tokens.x_ND, order.pair_P, order.row_NC)
  groups = order.sizes_G, order.starts_G
  with jax.named_scope("experts"):
    y_PD = experts_of_rows(x_PD, weight_P, weights, *groups, alignment, config)
  dropped = jnp.sum(own_NC & (order.row_NC == rows), dtype=jnp.int32)
  return permute.combine(y_PD, order.pair_P, order.row_NC), dropped


def first_of(wanted_NK, C: int, *arrays):
  """Brings each token's wanted choices before the others, and keeps C choices.

  Returns:
    Which are wanted, bool [N, C]; the arrays' [N, C] of the same choices.
  """
  nth_NC = jnp.argsort(~wanted_NK, axis=1, stable=True)[:, :C]
  wanted_NC, *kept = (jnp.take_along_axis(a, nth_NC, axis=1) for a in (wanted_NK, *arrays))
  return wanted_NC, kept


def ordered(group_NC, num_groups: int, room: int, alignment: int = 1) -> Order:
  """Orders choices by group, as far as there is room for them.

  Args:
    group_NC: int32; `num_groups` stands for none.
    num_groups: G.
    room: rows, a multiple of `alignment`.
    alignment: groups start at multiples of this.
  """
  rank_NC, sizes_G = ranks(group_NC, num_groups + 1)
  starts_G = permute.group_starts(sizes_G, alignment)
  row_NC = starts_G[group_NC] + rank_NC
  row_NC = jnp.where((group_NC < num_groups) & (row_NC < room), row_NC, room)
  nothing, pairs = group_NC.size, jnp.arange(group_NC.size, dtype=jnp.int32)
  pair_P = jnp.full(room + alignment, nothing, jnp.int32).at[row_NC.reshape(-1)].set(pairs)
  pair_P = pair_P.at[room].set(nothing)
  starts_G = jnp.minimum(starts_G[:num_groups], room)
  return Order(pair_P, row_NC, starts_G, jnp.clip(room - starts_G, 0, sizes_G[:num_groups]))
