"""Each token crosses to a group of devices at most once, and spreads to its experts inside it.

Between groups lie slow links (InfiniBand, DCN), inside them fast ones. A token goes to one device
of every group in which any of its experts lives, the one with the sender's number, which sends it
on to the devices of its group that own those experts. Their results are summed on the way back:
in that device first, then at home. With routing limited to 4 of 8 groups a token crosses 3.175
times on average, however many of its experts a group has.

How groups lie on the axis `expert`: `devices_per_group` neighbouring devices are one, so the
outer, slow part of the axis counts groups. Both exchanges run over the whole axis, with no rows for
devices that take no part: `ragged_all_to_all` knows no groups of devices, and the mesh needs no
further axis.

Buffers hold `receive_capacity` times M K rows, the mean of what a device's experts compute, or all
that can ever come where that is less. Nothing is dropped where the capacity is the number of
devices. A token that finds no room loses the experts it was sent for; its rows are counted there.

Shapes: X devices along the axis `expert`, M tokens a device, N tokens anywhere, D hidden, E experts
of the layer, O of them this device's own, K experts a token, C devices a token is sent to, or
experts of one device.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from dsmoe.config import ModelConfig
from dsmoe.parallel import collectives, ragged
from dsmoe.parallel.experts import ExpertWeights
from dsmoe.parallel.local import local
from dsmoe.parallel.own import Tokens, first_of, ordered, own_share
from dsmoe.parallel.stats import DispatchStats
from pallas_kernels import permute
from pallas_kernels.routing import Routed


def hierarchical(x_MD, routed: Routed, experts: ExpertWeights, config: ModelConfig):
  """Returns each token's sum over its experts, and stats; see `dispatch.routed_experts`."""
  X, per_group = collectives.devices_along("expert"), config.exchange.devices_per_group
  if X == 1:
    return local(x_MD, routed, experts, config)
  (M, K), O = routed.expert_MK.shape, experts.num_experts
  me, groups = jax.lax.axis_index("expert"), X // per_group
  room = math.ceil(config.exchange.receive_capacity * M * K)
  tokens = Tokens(x_MD, routed.expert_MK, routed.gate_MK)

  def of_my_number(device_NK):
    return device_NK // per_group * per_group + me % per_group

  def in_my_group(device_NK):
    return jnp.where(device_NK // per_group == me // per_group, device_NK, X)

  with jax.named_scope("exchange"):
    rooms = min(M * min(groups, K), room), min(M * groups, room)
    tokens, home, crossing = _spread(tokens, of_my_number, O, min(groups, K), rooms)
    rooms = min(rooms[1] * min(per_group, K), room), min(rooms[1] * per_group, room)
    tokens, back, inside = _spread(tokens, in_my_group, O, min(per_group, K), rooms)
  room = min(room, tokens.x_ND.shape[0] * min(K, O))
  y_ND, dropped = own_share(tokens, experts.own(), room, config)
  with jax.named_scope("exchange"):
    y_MD = home(back(y_ND))
  spread = jax.tree.map(jnp.add, crossing, inside)
  return y_MD, spread._replace(dropped_rows=spread.dropped_rows + dropped)


def _spread(
  tokens: Tokens, device_of: Callable, O: int, C: int, rooms: tuple[int, int]
) -> tuple[Tokens, Callable, DispatchStats]:
  """Sends each token once to every device that any of its experts asks for.

  Args:
    tokens: of this device.
    device_of: the device to go to, from the device that owns an expert, int32 [N, K]; X: none.
    O: experts of each device.
    C: the most devices that a token is sent to.
    rooms: the most that this device sends, and that it receives.

  Returns:
    The tokens received; a function that sends results of these back and sums each token's; stats.
  """
  X, K = collectives.devices_along("expert"), tokens.expert_NK.shape[1]
  device_NK = jnp.where(tokens.expert_NK >= 0, device_of(tokens.expert_NK // O), X)
  alike_NKK = device_NK[:, :, None] == device_NK[:, None, :]
  earlier_NK = jnp.any(alike_NKK & jnp.tri(K, k=-1, dtype=bool)[None], axis=2)
  choices_NC, (to_NC, pairs_NC) = first_of(
    (device_NK < X) & ~earlier_NK, C, device_NK, jnp.sum(alike_NKK, axis=2, dtype=jnp.int32)
  )
  to_NC = jnp.where(choices_NC, to_NC, X)
  order = ordered(to_NC, X, rooms[0])
  way = ragged.plan(order.sizes_G, order.pair_P.shape[0], rooms[1])
  last_X = jnp.append(order.starts_G + way.slices.sizes, 0)
  goes_NC = order.row_NC < last_X[to_NC]
  dropped = jnp.sum(jnp.where(choices_NC & ~goes_NC, pairs_NC, 0), dtype=jnp.int32)

  token_P = order.pair_P // C
  received = Tokens(
    ragged.exchange(permute.permute(tokens.x_ND, order.pair_P, order.row_NC), way),
    # Places that nobody fills are 0 when they arrive.
    ragged.exchange(tokens.expert_NK[token_P] + 1, way) - 1,
    ragged.exchange(permute.permute(tokens.gate_NK, order.pair_P, order.row_NC), way),
  )

  def back(y_RD):
    y_PD = ragged.exchange(y_RD, ragged.back(way))
    return permute.combine(y_PD, order.pair_P, order.row_NC)

  sent = jnp.sum(way.slices.sizes, dtype=jnp.int32) - way.slices.sizes[jax.lax.axis_index("expert")]
  return received, back, DispatchStats(dropped, sent, jnp.zeros_like(sent))
