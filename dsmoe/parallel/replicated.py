"""Hot experts are copied for the microbatch, so that every device computes equally many rows.

Each device computes M K rows, no more and no fewer, whatever the routing: the receive buffers have
no slack, nothing is dropped and no device waits for another's experts. `shares` plans from the
counts, alike on all devices, which rows leave their expert's owner; a device then needs copies of
experts of one other device at most.

Bounds of the static shapes: M K rows on every device, and O copied experts, as many as it owns
(`shares` says why no fewer suffice). A device whose experts are copied gets back at most
O + X - 2 gradients, since its lent rows lie in order of experts and each taker takes neighbouring
ones; they come back in slices, so that a slice of all of them takes no more than O experts.

Bytes, for DeepSeek-V3 in bfloat16: a row is 14,336 B each way, once for a chosen expert, plus 8 B
for its place and gate. A copied expert is 88 MB on the way out, like 6,144 rows, and again for its
gradient; under rematerialisation the backward pass copies it once more. Whether loads are even or
follow Zipf's law with exponent 1.2, a device copies one expert on average and two at most (8 and 64
devices, 4,096 tokens each): it pays where routing is skewed, not for a few hundred rows. The owner
of the hottest expert sends up to 22 copies. Beside its own experts a device has room for as many
copies, and for their gradients.

Shapes: X devices along the axis `expert`, M tokens a device, D hidden, F an expert's inner size,
E experts of the layer, O of them this device's own, K experts a token, P rows.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsmoe import platforms
from dsmoe.config import ModelConfig
from dsmoe.parallel import collectives, ragged, shares
from dsmoe.parallel.all_gather import experts_of_rows, row_alignment
from dsmoe.parallel.experts import ExpertWeights
from dsmoe.parallel.local import local
from dsmoe.parallel.stats import DispatchStats
from pallas_kernels import permute
from pallas_kernels.routing import Routed, ranks
from pallas_kernels.varying import vary_alike, zeros_like_operands


class Copies(NamedTuple):
  """Which experts every device copies from its donor."""

  donor_X: jax.Array  # int32
  copied_XO: jax.Array  # bool, of the donor's experts by heat; those of a device are neighbours
  heat_O: jax.Array  # int32, of this device's own experts, 0 for the hottest


def replicated(x_MD, routed: Routed, experts: ExpertWeights, config: ModelConfig):
  """Returns each token's sum over its experts, and stats; see `dispatch.routed_experts`."""
  num_devices = collectives.devices_along("expert")
  if num_devices == 1:
    return local(x_MD, routed, experts, config)
  (M, K), weights = routed.expert_MK.shape, experts.own()
  O, P = weights[0].shape[0], M * K
  alignment = row_alignment(P, 2 * O, config)
  with jax.named_scope("plan"):
    plan, rank_MK = _planned(routed)
    device_MK = shares.device_of_rows(plan, routed.expert_MK, rank_MK)
    groups = _groups(plan, alignment)
    place_MK = _places(plan, groups, routed.expert_MK, rank_MK, device_MK)
    # Rows are sent in the order of their devices.
    rank_MK, sizes_X = ranks(device_MK, num_devices)
    pair_P, row_MK = permute.expert_order(device_MK, rank_MK, sizes_X)
    way = ragged.plan(sizes_X, P, P)
  with jax.named_scope("exchange"):
    lent = _copied(weights, _copies(plan))
    x_PD = ragged.exchange(permute.permute(x_MD, pair_P, row_MK), way)
    gate_P = ragged.exchange(permute.weights_of_rows(routed.gate_MK, row_MK, P), way)
    place_P = ragged.exchange(place_MK.reshape(-1)[pair_P], way)
  with jax.named_scope("experts"):
    num_rows = permute.num_rows(P, 2 * O, alignment)
    rows = jnp.full(num_rows, P, jnp.int32).at[place_P].set(jnp.arange(P), unique_indices=True)
    x_RD = permute.permute(x_PD, rows, place_P[:, None])
    gate_R = permute.weights_of_rows(gate_P[:, None], place_P[:, None], num_rows)
    sizes_S, starts_S = (a[jax.lax.axis_index("expert")] for a in groups)
    y_RD = experts_of_rows(x_RD, gate_R, weights, sizes_S[:O], starts_S[:O], alignment, config)
    y_RD += experts_of_rows(x_RD, gate_R, lent, sizes_S[O:], starts_S[O:], alignment, config)
    y_PD = permute.combine(y_RD, rows, place_P[:, None])
  with jax.named_scope("exchange"):
    y_PD = ragged.exchange(y_PD, ragged.back(way))
  sent = P - sizes_X[jax.lax.axis_index("expert")]
  zero = jnp.zeros((), jnp.int32)
  return permute.combine(y_PD, pair_P, row_MK), DispatchStats(zero, sent, zero)


def _planned(routed: Routed) -> tuple[shares.Shares, jax.Array]:
  """Returns the plan, and each choice's rank among all choices of its expert along the axis."""
  counts_XE = jax.lax.all_gather(routed.counts_E, "expert")
  before_XE = jnp.cumsum(counts_XE, axis=0, dtype=jnp.int32) - counts_XE
  rank_MK = routed.rank_MK + before_XE[jax.lax.axis_index("expert")][routed.expert_MK]
  plan = shares.plan(jnp.sum(counts_XE, axis=0, dtype=jnp.int32), counts_XE.shape[0])
  return plan, rank_MK


def _groups(plan: shares.Shares, alignment: int) -> tuple[jax.Array, jax.Array]:
  """Returns sizes and starts [X, 2 O] of every device's groups of rows.

  First come its own experts, then its donor's, the hottest first.
  """
  X = plan.donor_X.shape[0]
  sizes_XS = jnp.concatenate([plan.kept_E.reshape(X, -1), plan.lent_XO], axis=1)
  return sizes_XS, jax.vmap(lambda sizes_S: permute.group_starts(sizes_S, alignment))(sizes_XS)


def _places(plan: shares.Shares, groups, expert_MK, rank_MK, device_MK):
  """Returns where each row lies among the rows of the device that computes it, int32 [M, K]."""
  _, starts_XS = groups
  O = starts_XS.shape[1] // 2
  owner_MK, start_MK = expert_MK // O, plan.place_E[expert_MK]
  is_kept_MK = device_MK == owner_MK
  group_MK = jnp.where(is_kept_MK, expert_MK % O, O + plan.heat_E[expert_MK])
  first_MK = jnp.where(is_kept_MK, plan.given_X[owner_MK], plan.first_X[device_MK])
  first_MK = jnp.maximum(first_MK, start_MK)  # of the group's rows
  return starts_XS[device_MK, group_MK] + start_MK + rank_MK - first_MK


def _copies(plan: shares.Shares) -> Copies:
  """Returns which experts are copied: those of which a device takes rows."""
  O = plan.lent_XO.shape[1]
  heat_O = jax.lax.dynamic_slice_in_dim(plan.heat_E, jax.lax.axis_index("expert") * O, O)
  return Copies(plan.donor_X, plan.lent_XO > 0, heat_O)


def _copied(weights, copies: Copies):
  """Returns the weights of this device's donor that it needs, by heat; zeros in place of others."""
  return tuple(_copy(platforms.current(), *vary_alike(w, copies)) for w in weights)


def _ways(copies: Copies) -> tuple[jax.Array, jax.Array]:
  """Returns which experts each device takes from this one, and this one from each; bool [X, O]."""
  me = jax.lax.axis_index("expert")
  takes_XO = copies.copied_XO & (copies.donor_X == me)[:, None]
  is_donor_X = jnp.arange(copies.donor_X.shape[0]) == copies.donor_X[me]
  return takes_XO, copies.copied_XO[me][None] & is_donor_X[:, None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _copy(platform: str, w_OAB, copies: Copies):
  X, O = copies.copied_XO.shape
  takes_XO, gets_XO = (a.astype(jnp.int32).reshape(-1) for a in _ways(copies))
  by_heat_O = jnp.zeros(O, jnp.int32).at[copies.heat_O].set(jnp.arange(O), unique_indices=True)
  starts, places = jnp.tile(by_heat_O, X), jnp.tile(jnp.arange(O), X)
  return _by_slices(
    lambda w_OaB: ragged.move(w_OaB, O, starts, takes_XO, places, gets_XO), w_OAB, X
  )


def _copy_bwd(platform: str, copies: Copies, dlent_OAB):
  """Sums the gradients of all copies where their expert lives."""
  me, (X, O) = jax.lax.axis_index("expert"), copies.copied_XO.shape
  most = O + X - 2
  takes_XO, gets_XO = _ways(copies)
  # An owner receives the gradients of one taker after the other, of each by heat.
  row_XO = (jnp.cumsum(takes_XO.reshape(-1), dtype=jnp.int32) - 1).reshape(X, O)
  row_XO = jnp.where(takes_XO, row_XO, most)
  heat_XO = jnp.broadcast_to(jnp.arange(O)[None], (X, O))
  heat_R = jnp.full(most, O).at[row_XO].set(heat_XO, mode="drop")
  # This device's rows begin, at its donor, behind those of the takers before it.
  before_XO = copies.copied_XO & (copies.donor_X == copies.donor_X[me])[:, None]
  place = jnp.sum(before_XO & (jnp.arange(X) < me)[:, None], dtype=jnp.int32)
  num = lambda a_XO: jnp.sum(a_XO, axis=1, dtype=jnp.int32)  # noqa: E731
  ways = jnp.full(X, jnp.argmax(copies.copied_XO[me])), num(gets_XO), jnp.full(X, place)

  def bring_back(d_OaB):
    d_RaB = ragged.move(d_OaB, most, *ways, num(takes_XO)).astype(jnp.float32)
    by_heat_OaB = jax.ops.segment_sum(d_RaB, heat_R, O + 1)[:O]
    return by_heat_OaB[copies.heat_O].astype(d_OaB.dtype)

  with platforms.compiling_for(platform):  # a gradient is traced where nothing else tells
    return _by_slices(bring_back, dlent_OAB, X), None


_copy.defvjp(
  lambda platform, w_OAB, copies: (_copy(platform, w_OAB, copies), copies),
  _copy_bwd,
)


def _by_slices(fn, a_OAB, X: int):
  """Applies fn to slices along the second dimension, so small that O + X - 2 take no more than O."""
  O, A, _ = a_OAB.shape
  num = next(n for n in range(1, A + 1) if A % n == 0 and (O * n >= O + X - 2 or n == A))
  if num == 1:
    return fn(a_OAB)

  def one(i, done_OAB):
    slice_OaB = fn(jax.lax.dynamic_slice_in_dim(a_OAB, i * (A // num), A // num, axis=1))
    return jax.lax.dynamic_update_slice_in_dim(done_OAB, slice_OaB, i * (A // num), axis=1)

  return jax.lax.fori_loop(0, num, one, zeros_like_operands(a_OAB.shape, a_OAB.dtype, a_OAB))
