"""Every device of the expert axis sees all its tokens, and applies its own experts to them.

The tokens of the axis' devices are gathered, each device sums its experts' shares of every token,
and a reduce-scatter gives each token's sum back to its device. Shapes are static and nothing is
dropped, whatever the routing. A token's row crosses to every other device and back: for few
devices. (One copy for each chosen expert is less from degree 8 on, with 8 experts a token.)

Shapes: X devices along the axis `expert`, M tokens a device, T = X M, D hidden, E experts of the
layer, O of them this device's own, K experts a token, P rows.
"""

import jax
import jax.numpy as jnp

from dsmoe.config import ModelConfig
from dsmoe.parallel import collectives
from dsmoe.parallel.experts import ExpertWeights
from dsmoe.parallel.local import local
from dsmoe.parallel.stats import nothing_dropped
from pallas_kernels import grouped_matmul, permute
from pallas_kernels import quantized_matmul as quantized
from pallas_kernels.grouped_matmul import tile_table
from pallas_kernels.routing import Routed

# Of experts: gate and up [O, D, F], down [O, F, D].
Matrices = tuple[jax.Array, jax.Array, jax.Array]


def all_gather(x_MD, routed: Routed, experts: ExpertWeights, config: ModelConfig):
  """Returns each token's sum over its experts, and stats; see `dispatch.routed_experts`."""
  num_devices = collectives.devices_along("expert")
  if num_devices == 1:
    return local(x_MD, routed, experts, config)
  with jax.named_scope("exchange"):
    x_TD, routed = gathered_tokens(x_MD, routed)
  y_TD = own_experts(x_TD, routed, experts, config)
  with jax.named_scope("exchange"):
    y_MD = collectives.sum_to_owners(y_TD, "expert")
  return y_MD, nothing_dropped(sent_rows=x_MD.shape[0] * (num_devices - 1))


def gathered_tokens(x_MD, routed: Routed) -> tuple[jax.Array, Routed]:
  """Gathers the tokens of all devices of the expert axis, device by device.

  Args:
    x_MD: this device's tokens.
    routed: their experts and gates; counts and ranks are of this device's tokens.

  Returns:
    x_TD, and the same for all T tokens: an expert's tokens are ranked in the order of the devices.
  """
  counts_XE = jax.lax.all_gather(routed.counts_E, "expert")
  before_XE = jnp.cumsum(counts_XE, axis=0, dtype=jnp.int32) - counts_XE
  rank_MK = routed.rank_MK + before_XE[jax.lax.axis_index("expert")][routed.expert_MK]
  x_TD, expert_TK, gate_TK, rank_TK = (
    jax.lax.all_gather(a, "expert", tiled=True)
    for a in (x_MD, routed.expert_MK, routed.gate_MK, rank_MK)
  )
  counts_E = jnp.sum(counts_XE, axis=0, dtype=jnp.int32)
  return x_TD, Routed(expert_TK, gate_TK, counts_E, rank_TK)


def own_experts(x_TD, routed: Routed, experts: ExpertWeights, config: ModelConfig):
  """Returns the sum of this device's experts' shares of every token, [T, D] in x's dtype."""
  weights, (T, K) = experts.own(), routed.expert_MK.shape
  O, E = weights[0].shape[0], routed.counts_E.shape[0]
  alignment = row_alignment(T * K, E, config)
  counts_E = routed.counts_E
  with jax.named_scope("plan"):
    pair_P, row_TK = permute.expert_order(routed.expert_MK, routed.rank_MK, counts_E, alignment)
    first = jax.lax.axis_index("expert") * O
    starts_E = permute.group_starts(counts_E, alignment)
    sizes_O, starts_O = (jax.lax.dynamic_slice_in_dim(a, first, O) for a in (counts_E, starts_E))
    weight_P = permute.weights_of_rows(routed.gate_MK, row_TK, pair_P.shape[0])
  x_PD = permute.permute(x_TD, pair_P, row_TK)
  with jax.named_scope("experts"):
    y_PD = experts_of_rows(x_PD, weight_P, weights, sizes_O, starts_O, alignment, config)
  return permute.combine(y_PD, pair_P, row_TK)


def row_alignment(P: int, E: int, config: ModelConfig) -> int:
  """Returns what the starts of E groups of P rows in all should be multiples of."""
  if config.matmul_precision != "compute_dtype":
    return quantized.row_alignment(P, E, config.kernels.quantized_matmul)
  return grouped_matmul.row_alignment(P, E, config.kernels.grouped_matmul)


def experts_of_rows(
  x_PD, weight_P, weights, sizes_O, starts_O, alignment: int, config: ModelConfig
):
  """Applies experts to their rows, which lie where `starts_O` and `sizes_O` say.

  Args:
    x_PD: rows; those of no expert may be undefined, and get neither a result nor a gradient.
    weight_P: float32, what each row's result is multiplied by.
    weights: the experts' matrices, [O, D, F] twice and [O, F, D].
    sizes_O, starts_O: int32, how many rows each expert has, and the first of them.
    alignment: divides every start.
    config: matmul_precision, kernels.

  Returns:
    [P, D] in x's dtype, zeros in rows of no expert.
  """
  own_P = permute.in_a_group(x_PD.shape[0], sizes_O, starts_O)
  x_PD = jnp.where(own_P[:, None], x_PD, 0)
  y_PD = multiplied_rows(x_PD, weight_P, weights, sizes_O, starts_O, alignment, config)
  return jnp.where(own_P[:, None], y_PD, 0)


def multiplied_rows(
  x_PD, weight_P, weights: Matrices, sizes_O, starts_O, alignment: int, config: ModelConfig
):
  """`experts_of_rows`, of which rows of no expert are undefined in results and gradients."""
  (P, D), (O, _, F), kernels = x_PD.shape, weights[0].shape, config.kernels
  if config.matmul_precision != "compute_dtype":
    implementation, power_of_two = config.quantization
    return quantized.quantized_grouped_swiglu(
      x_PD,
      weight_P,
      *weights,
      sizes_O,
      implementation,
      power_of_two,
      alignment,
      starts_O,
    )
  return grouped_matmul.grouped_swiglu(
    x_PD,
    weight_P,
    *weights,
    sizes_O,
    implementation=kernels.grouped_matmul,
    alignment=alignment,
    group_starts_E=starts_O,
    tile=tile_table.tile(kernels.tuned, kernels.grouped_matmul, P, O, D, F, x_PD.dtype),
  )
