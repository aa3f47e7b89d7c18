"""Tokens travel round the ring of the expert axis' devices, each of which adds its experts' share.

A device holds one block of tokens at a time, M of them, where `all_gather` holds X M. While its
experts multiply that block, the next block arrives and the sums of the last one leave: each
`ppermute` has a whole step of matmuls to hide behind. Half of the tokens travel each way round, so
that both directions of a torus' links carry them. Nothing is dropped, whatever the routing.

Why the tokens travel and not the experts: tokens cost 2 (X - 1) M D numbers a device and layer
(rows on the way out, sums on the way back), experts 3 (X - 1) O D F. For DeepSeek-V3 (D = 7,168,
F = 2,048, 256 experts) in bfloat16, with M = 4,096:

  X = 8:    tokens 0.82 GB, experts 19.7 GB
  X = 64:   tokens 7.4 GB,  experts 22.2 GB
  X = 256:  tokens 29.9 GB, experts 22.5 GB

Experts would pay above M = 1.5 O F tokens a device: 98,304 at X = 8, 3,072 at X = 256. Where that
is so (one expert a device), neither ring pays: a step's matmuls (128 rows) are over long before a
step's transfer is. And the backward pass would bring the experts round once more, and their
gradients home.

There is room for twice the mean of a block's rows of this device's experts; where a block has more,
the same is computed with room for all there can be.

The backward pass is a ring of its own: it keeps this device's inputs only, and sends the tokens
round again with the gradients of their results. Its memory is one block's, and a float32
gradient of this device's experts; saved by the forward pass, the blocks would be X M rows.

Shapes: X devices along the axis `expert`, M tokens a device, D hidden, F an expert's inner size,
O experts of this device, K experts a token.
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dsmoe.config import ModelConfig
from dsmoe.parallel import collectives
from dsmoe.parallel.experts import ExpertWeights
from dsmoe.parallel.local import local
from dsmoe.parallel.own import Tokens, own_share
from dsmoe.parallel.stats import nothing_dropped
from pallas_kernels.routing import Routed
from pallas_kernels.varying import vary_alike, varying_like

WAYS = (1, -1)  # how many devices further each step takes a part of the tokens


class Part(NamedTuple):
  """What travels one way round, in few arrays: XLA:TPU has no more than five on their way."""

  rows: tuple[jax.Array, ...]  # [N, D], of one dtype
  numbers: tuple[jax.Array, ...] = ()  # of 32 bits


Parts = tuple[Part, ...]


def ring(x_MD, routed: Routed, experts: ExpertWeights, config: ModelConfig):
  """Returns each token's sum over its experts, and stats; see `dispatch.routed_experts`."""
  num_devices = collectives.devices_along("expert")
  if num_devices == 1:
    return local(x_MD, routed, experts, config)
  operands = vary_alike(x_MD, routed.expert_MK, routed.gate_MK, experts.own())
  y_MD = _ring(config, *operands)
  return y_MD, nothing_dropped(sent_rows=x_MD.shape[0] * (num_devices - 1))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring(config: ModelConfig, x_MD, expert_MK, gate_MK, weights):
  def share(tokens: Parts):
    def within(room, x, expert, gate, weights):
      return own_share(Tokens(x, expert, gate), weights, room, config)[0]

    return _parts((_with_room(within, *_block(tokens), weights),)), ()

  parts, _ = _round(_parts((x_MD,), (expert_MK, gate_MK)), share)
  return jnp.concatenate([part.rows[0] for part in parts])


def _ring_bwd(config: ModelConfig, saved, dy_MD):
  x_MD, expert_MK, gate_MK, weights = saved

  def gradients(tokens: Parts):
    def within(room, x, dy, expert, gate, weights):
      def share(x, gate, weights):
        return own_share(Tokens(x, expert, gate), weights, room, config)[0]

      return jax.vjp(share, x, gate, weights)[1](dy)

    dx, dgate, dweights = _with_room(within, *_block(tokens), weights)
    # Each block's gradient is in the weights' dtype; their sum is rounded once.
    return _parts((dx,), (dgate,)), jax.tree.map(lambda w: w.astype(jnp.float32), dweights)

  parts, dweights = _round(_parts((x_MD, dy_MD), (expert_MK, gate_MK)), gradients)
  dx_MD = jnp.concatenate([part.rows[0] for part in parts])
  dgate_MK = jnp.concatenate([part.numbers[0] for part in parts])
  dweights = jax.tree.map(lambda dw, w: dw.astype(w.dtype), dweights, weights)
  return dx_MD, None, dgate_MK, dweights


_ring.defvjp(lambda config, *operands: (_ring(config, *operands), operands), _ring_bwd)


def _with_room(fn: Callable, *operands):
  """Runs fn(room, *operands), with room for twice the mean of rows wherever that suffices.

  Args:
    fn: of the most rows of experts that a block of tokens may have here, and the operands.
    *operands: rows [N, D], experts [N, K], gates [N, K] and the weights of O experts.
  """
  *_, expert_NK, _, weights = operands
  (N, K), O, X = expert_NK.shape, weights[0].shape[0], collectives.devices_along("expert")
  most, twice = N * min(K, O), 2 * math.ceil(N * K / X)
  if twice >= most:
    return fn(most, *operands)
  own = jnp.sum(expert_NK // O == jax.lax.axis_index("expert"), dtype=jnp.int32)
  few, many = (functools.partial(fn, room) for room in (twice, most))
  return jax.lax.cond(own <= twice, few, many, *operands)


def _parts(rows_MD: tuple, numbers_MK: tuple = ()) -> Parts:
  """Splits tokens by the way they travel; a single token has nothing for the second way."""
  M = rows_MD[0].shape[0]
  ways = (slice(0, (M + 1) // 2), slice((M + 1) // 2, M))[: min(M, 2)]
  return tuple(
    Part(*(tuple(a[way] for a in tree) for tree in (rows_MD, numbers_MK))) for way in ways
  )


def _block(tokens: Parts) -> list[jax.Array]:
  """Joins tokens that came from both sides, those of the first way first: rows, then numbers."""
  return [jnp.concatenate(a) for a in zip(*((*part.rows, *part.numbers) for part in tokens))]


def _passed(*loads: Parts) -> list[Parts]:
  """Sends what travels each way to the next device there, all together."""
  X = collectives.devices_along("expert")
  bits = lambda a: jax.lax.bitcast_convert_type(a, jnp.int32).reshape(-1)  # noqa: E731
  passed = []
  for parts, way in zip(zip(*loads), WAYS):
    hops = [(d, (d + way) % X) for d in range(X)]
    hop = functools.partial(jax.lax.ppermute, axis_name="expert", perm=hops)
    numbers = [part.numbers for part in parts]
    with jax.named_scope("exchange"):
      rows = _together(hop, [part.rows for part in parts])
      arrived = _together(hop, jax.tree.map(bits, numbers))
    numbers = jax.tree.map(
      lambda a, b: jax.lax.bitcast_convert_type(b.reshape(a.shape), a.dtype), numbers, arrived
    )
    passed.append([Part(*both) for both in zip(rows, numbers)])
  return [tuple(parts) for parts in zip(*passed)]


def _round(tokens: Parts, compute: Callable[[Parts], tuple[Parts, Any]]) -> tuple[Parts, Any]:
  """Sends every device's tokens past every other device, and the sums of their results home.

  Args:
    tokens: of this device, by way.
    compute: what a device does with the tokens it holds: returns results that are summed on the
      way, by way, and results that are summed where they are.

  Returns:
    The sums of this device's tokens' results over all devices, and this device's own sums.
  """
  (onward,) = _passed(tokens)
  home, kept = compute(tokens)
  sums: Any = None
  if collectives.devices_along("expert") > 2:

    def step(carry, _):
      tokens, sums, kept = carry
      # Neither of these is needed before the step's end.
      onward, arrived = _passed(tokens, sums)
      share, more = compute(tokens)
      return (onward, _added(arrived, share), _added(kept, more)), None

    nothing = jax.tree.map(lambda a: varying_like(jnp.zeros(a.shape, a.dtype), a), home)
    steps = collectives.devices_along("expert") - 2
    (onward, sums, kept), _ = jax.lax.scan(step, (onward, nothing, kept), length=steps)
    (sums,) = _passed(sums)
  share, more = compute(onward)
  (back,) = _passed(share if sums is None else _added(sums, share))
  return _added(home, back), _added(kept, more)


def _added(a, b):
  return jax.tree.map(jnp.add, a, b)


def _together(fn: Callable, tree: Any) -> Any:
  """Applies fn to the arrays of a tree laid one after the other, and takes them apart again."""
  leaves, structure = jax.tree.flatten(tree)
  if not leaves:
    return tree
  ends = list(itertools.accumulate(a.shape[0] for a in leaves))
  return jax.tree.unflatten(structure, jnp.split(fn(jnp.concatenate(leaves)), ends[:-1]))
