"""Every row goes to the device that owns its expert, and back: one copy for each chosen expert.

Devices tell each other how many rows they have for each expert. A row of x then goes straight to
its place among the rows of its expert, so that the owner's grouped matmul needs no other order, and
the result comes back to where the row came from. The owner multiplies by the gate, and not the
sender, whose gradient of the gates would need the rows that came back: under rematerialisation
those would be exchanged again. A gate and its gradient are four bytes each, which are padded, at
most four for each of the axis' devices.

The buffer of received rows is static: `receive_capacity` times the mean M K, or all rows that can
come where that is less. It takes rows in the order of the devices that sent them, of each device in
the order of its experts, and of an expert's in the order of its tokens. What comes after it is full
is not sent, counts as dropped and adds nothing to its token.

`moe_chunks` parts of the tokens are exchanged separately, with buffers of their own, which need not
all exist at once: the layer's value and gradient on v5p, at 2,048 tokens of 1,024 a device, take 22%
less temporary memory in two parts. The parts do not depend on each other, so that a compiler may
exchange one while it multiplies another. XLA:TPU of jax 0.10.2 does so with the flags of `exchange`
in `platforms/xla_flags.py`, and waits for every exchange without them. On v5p, compiled and not run, of
the four exchanges of two parts then one is under way while the other part's experts multiply; the first
and the last have nothing to hide behind, and one is left exposed between them.

With `dropless_fallback="layer"`, where any device of the mesh would drop a row, all devices compute
the layer in so many parts that each fits into the same buffer whatever its routing. The backward
pass then computes the layer again, with or without rematerialisation.

Shapes: X devices along the axis `expert`, M tokens a device, D hidden, E experts of the layer, O of
them on each device, K experts a token, P = M K rows to send, R rows received, C chunks.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from dsmoe import platforms
from dsmoe.config import ModelConfig
from dsmoe.parallel import collectives, ragged
from dsmoe.parallel.all_gather import multiplied_rows, row_alignment
from dsmoe.parallel.experts import ExpertWeights
from dsmoe.parallel.local import local
from dsmoe.parallel.mesh import TOKEN_AXES
from dsmoe.parallel.stats import DispatchStats
from pallas_kernels import permute
from pallas_kernels import quantized_matmul as quantized
from pallas_kernels.quantized_matmul.e4m3 import TILE
from pallas_kernels.routing import Routed
from pallas_kernels.varying import vary_alike, varying_like


def all_to_all(x_MD, routed: Routed, experts: ExpertWeights, config: ModelConfig):
  """Returns each token's sum over its experts, and stats; see `dispatch.routed_experts`.

  Raises:
    ValueError: when `moe_chunks` does not divide the device's tokens; on GPU for more devices
      along the axis than XLA's exchange takes.
  """
  num_devices = collectives.devices_along("expert")
  if num_devices == 1:
    return local(x_MD, routed, experts, config)
  (M, K), O, options = routed.expert_MK.shape, experts.num_experts, config.exchange
  weights, chunks = experts.own(), options.moe_chunks
  if M % chunks:
    raise ValueError(
      f"model.exchange.moe_chunks ({chunks}) must divide the tokens of a device ({M})"
    )
  most = num_devices * min(K, O)  # rows that can come for each token a device sends
  room = min(math.ceil(options.receive_capacity * (M // chunks) * K), most * (M // chunks))
  capped = functools.partial(_in_chunks, config=config, chunks=chunks, room=room)
  if options.dropless_fallback != "layer" or room == most * (M // chunks):
    return capped(x_MD, routed, weights)
  parts = next(n for n in range(1, M + 1) if M % n == 0 and (most * (M // n) <= room or n == M))
  exact = functools.partial(_one_by_one, config=config, chunks=parts, room=most * (M // parts))
  counts_CE = _split(routed, chunks).counts_E
  dropped = jnp.sum(jax.vmap(lambda counts_E: _dropped(counts_E, room))(counts_CE))
  overflow = collectives.sum_over_batch(dropped) > 0
  stats = _all_kept(routed.counts_E, O, overflow)
  x_MD, gate_MK, weights, routed = vary_alike(x_MD, routed.gate_MK, weights, routed)
  platform = platforms.current()
  return _either(exact, capped, platform, overflow, x_MD, gate_MK, weights, routed), stats


def _all_kept(counts_E, O: int, overflow) -> DispatchStats:
  """Returns the stats of an exchange that drops nothing, which both of `_either` are."""
  me = jax.lax.axis_index("expert")
  own = jnp.sum(jax.lax.dynamic_slice_in_dim(counts_E, me * O, O), dtype=jnp.int32)
  sent = jnp.sum(counts_E, dtype=jnp.int32) - own
  # All devices that hold parts of the batch take one path together.
  axes = (axis for axis in TOKEN_AXES if collectives.devices_along(axis) > 1)
  fallbacks = collectives.on_first_device(overflow.astype(jnp.int32), axes)
  return DispatchStats(jnp.zeros_like(sent), sent, varying_like(fallbacks, sent))


def _split(routed: Routed, chunks: int) -> Routed:
  """Returns the routing of each part of the tokens, with a leading dimension of parts."""
  (M, K), E = routed.expert_MK.shape, routed.counts_E.shape[0]
  split = lambda a_MK: a_MK.reshape(chunks, M // chunks, K)  # noqa: E731
  key_CMK = split(routed.expert_MK) + E * jnp.arange(chunks, dtype=jnp.int32)[:, None, None]
  counts_CE = jnp.bincount(key_CMK.reshape(-1), length=chunks * E).astype(jnp.int32)
  counts_CE = counts_CE.reshape(chunks, E)
  before_CE = ragged.before(counts_CE, axis=0)
  rank_CMK = split(routed.rank_MK) - before_CE.reshape(-1)[key_CMK]
  return Routed(split(routed.expert_MK), split(routed.gate_MK), counts_CE, rank_CMK)


def _in_chunks(x_MD, routed: Routed, weights, config: ModelConfig, chunks: int, room: int):
  """Exchanges parts of the tokens, written out so that they can overlap."""
  if chunks == 1:
    return _exchanged(x_MD, routed, weights, config, room)
  x_CMD, routed = x_MD.reshape(chunks, -1, x_MD.shape[1]), _split(routed, chunks)
  done = [
    _exchanged(x_CMD[i], Routed(*(a[i] for a in routed)), weights, config, room)
    for i in range(chunks)
  ]
  stats = jax.tree.map(lambda *s: sum(s[1:], s[0]), *(stats for _, stats in done))
  return jnp.concatenate([y for y, _ in done]), stats


def _one_by_one(x_MD, routed: Routed, weights, config: ModelConfig, chunks: int, room: int):
  """`_in_chunks`, one part after the other: takes the memory of one."""

  @jax.checkpoint
  def part(_, inputs):
    x_MD, routed = inputs
    return None, _exchanged(x_MD, routed, weights, config, room)

  parts = (x_MD.reshape(chunks, -1, x_MD.shape[1]), _split(routed, chunks))
  _, (y_CMD, stats) = jax.lax.scan(part, None, parts)
  return y_CMD.reshape(x_MD.shape), jax.tree.map(lambda s: jnp.sum(s, dtype=jnp.int32), stats)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _either(
  exact: Callable, capped: Callable, platform: str, overflow, x_MD, gate_MK, weights, routed: Routed
):
  """Returns the first result of one of two functions of (x, routed, weights).

  Of the functions nothing else is kept.
  """

  def run(fn: Callable):
    return lambda x, g, w, routed: fn(x, routed._replace(gate_MK=g), w)[0]

  return jax.lax.cond(overflow, run(exact), run(capped), x_MD, gate_MK, weights, routed)


def _either_backward(exact: Callable, capped: Callable, platform: str, saved, dy_MD):
  overflow, *operands, routed = saved

  def gradients(fn: Callable):
    def run(operands, routed, dy_MD):
      apply = lambda x, g, w: fn(x, routed._replace(gate_MK=g), w)[0]  # noqa: E731
      with platforms.compiling_for(platform):
        return jax.vjp(apply, *operands)[1](dy_MD)

    return run

  dx_MD, dgate_MK, dweights = jax.lax.cond(
    overflow, gradients(exact), gradients(capped), operands, routed, dy_MD
  )
  return None, dx_MD, dgate_MK, dweights, None


_either.defvjp(
  lambda exact, capped, platform, *args: (_either(exact, capped, platform, *args), args),
  _either_backward,
)


def _kept(counts_XE, room: int):
  """Returns the rows that are sent, [X, E] from each device for each expert; see the module."""
  X, E = counts_XE.shape
  of_owner = counts_XE.reshape(X, X, E // X).transpose(1, 0, 2).reshape(X, E)  # [owner, X O]
  kept = jnp.clip(room - ragged.before(of_owner, axis=1), 0, of_owner)
  return kept.reshape(X, X, E // X).transpose(1, 0, 2).reshape(X, E)


def _dropped(counts_E, room: int):
  """Returns how many of this device's rows find no room."""
  kept_XE = _kept(jax.lax.all_gather(counts_E, "expert"), room)
  return jnp.sum(counts_E - kept_XE[jax.lax.axis_index("expert")], dtype=jnp.int32)


def _planned(counts_E, num_rows: int, room: int, alignment: int):
  """Returns the `Way` of rows in expert order, and sizes and starts of the own experts' rows."""
  me, E = jax.lax.axis_index("expert"), counts_E.shape[0]
  counts_XE = jax.lax.all_gather(counts_E, "expert")
  X = counts_XE.shape[0]
  O = E // X
  kept_XE, starts_XE = _kept(counts_XE, room), ragged.before(counts_XE, axis=1)
  sizes_XO = jnp.sum(kept_XE, axis=0, dtype=jnp.int32).reshape(X, O)
  first_XO = jax.vmap(lambda sizes_O: permute.group_starts(sizes_O, alignment))(sizes_XO)
  places_XE = first_XO.reshape(1, E) + ragged.before(kept_XE, axis=0)
  own = lambda a_XE: jax.lax.dynamic_slice_in_dim(a_XE, me * O, O, axis=1).reshape(-1)  # noqa: E731
  slices = ragged.Slices(
    *(a[me] for a in (starts_XE, kept_XE, places_XE)),
    *(own(a) for a in (kept_XE, places_XE, starts_XE)),
  )
  room = permute.num_rows(room, O, alignment)
  way = ragged.Way(slices, num_rows, room, platforms.current())
  return way, sizes_XO[me], first_XO[me]


def _exchanged(x_MD, routed: Routed, weights, config: ModelConfig, room: int):
  """Brings some tokens' rows to their experts and back; `room` is the most that a device takes."""
  P, O = routed.expert_MK.size, weights[0].shape[0]
  alignment = row_alignment(P, O, config)
  with jax.named_scope("plan"):
    order = permute.expert_order(routed.expert_MK, routed.rank_MK, routed.counts_E)
    way, sizes_O, starts_O = _planned(routed.counts_E, P, room, alignment)
    weight_P = permute.weights_of_rows(routed.gate_MK, order[1], P)
  with jax.named_scope("exchange"):
    x_RD, weight_R = _sent(x_MD, order, way, config), ragged.exchange(weight_P, way)
  with jax.named_scope("experts"):
    y_RD = multiplied_rows(x_RD, weight_R, weights, sizes_O, starts_O, alignment, config)
  with jax.named_scope("exchange"):
    y_PD = ragged.exchange(y_RD, ragged.back(way))
  with jax.named_scope("combine"):
    y_MD = permute.combine(y_PD, *order)
  kept = jnp.sum(way.slices.sizes, dtype=jnp.int32)
  own = jnp.sum(way.slices.sizes.reshape(-1, O)[jax.lax.axis_index("expert")], dtype=jnp.int32)
  return y_MD, DispatchStats(P - kept, kept - own, jnp.zeros_like(kept))


def _sent(x_MD, order, way: ragged.Way, config: ModelConfig):
  """Returns the rows that this device receives, [R, D] in x's dtype."""
  if config.exchange.precision == "compute_dtype":
    return ragged.exchange(permute.permute(x_MD, *order), way)
  x_MD, order, slices = vary_alike(x_MD, tuple(order), way.slices)
  return _sent_in_fp8(config.quantization, way[1:], x_MD, order, slices)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sent_in_fp8(quantization, static, x_MD, order, slices):
  """Quantises the tokens, sends codes and scales, and returns their products."""
  way, (pair_P, row_MK) = ragged.Way(slices, *static), order
  codes_MD, scale_TM = quantized.quantize_rows(x_MD, *quantization)
  token_P = pair_P // row_MK.shape[1]
  codes_RD, scale_RT = (ragged.exchange(a[token_P], way) for a in (codes_MD, scale_TM.T))
  scale_RD = jnp.repeat(scale_RT, TILE, axis=1)[:, : x_MD.shape[1]]
  return (codes_RD.astype(jnp.float32) * scale_RD).astype(x_MD.dtype)


def _sent_in_fp8_backward(quantization, static, saved, d_RD):
  """The gradient goes straight through the quantisation, in the compute dtype."""
  order, slices = saved
  d_PD = ragged.exchange(d_RD, ragged.back(ragged.Way(slices, *static)))
  return permute.combine(d_PD, *order), None, None


_sent_in_fp8.defvjp(
  lambda quantization, static, x_MD, order, slices: (
    _sent_in_fp8(quantization, static, x_MD, order, slices),
    (order, slices),
  ),
  _sent_in_fp8_backward,
)
