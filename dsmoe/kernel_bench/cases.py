"""The cases that kernels are measured on: one device's share of a model's layer.

Shapes: M tokens, D hidden, F expert inner, E experts, e experts of this device, K experts a
token, P = M K rows; B sequences, S positions, H heads, A = qk head dim, U = v head dim, W
numbers of a cached token, C of them the value.
"""

import jax
import jax.numpy as jnp

from dsmoe.config import ModelConfig
from dsmoe.kernel_bench import baselines
from dsmoe.kernel_bench.registry import (
  IMPLEMENTATIONS,
  OPERATIONS,
  Case,
  Shape,
  add_gradient,
  case,
  equal,
  implementation,
  implementations,
  known_args,
  normal,
  operation,
  rows,
  struct,
  weights,
)
from pallas_kernels import grouped_matmul, mla_attention, permute, quantized_matmul, routing
from pallas_kernels.grouped_matmul.api import MATMULS
from pallas_kernels.grouped_matmul.tpu_tiles import tile_rows

__all__ = ["IMPLEMENTATIONS", "OPERATIONS", "Case", "Shape", "case", "known_args"]

# Routing: logits and bias -> experts, gates, counts, and each choice's rank within its expert.


def _routing_results(shape: Shape):
  M, K, E = shape.tokens, shape.config.num_experts_per_tok, shape.config.n_routed_experts
  return struct(M, K), struct(M, K, dtype=jnp.float32), struct(E), struct(M, K)


@operation("routing", _routing_results, lambda s: s.tokens * s.config.n_routed_experts)
def _routing_args(shape: Shape):
  key, E = jax.random.key(0), shape.config.n_routed_experts
  return jax.random.normal(key, (shape.tokens, E)), 0.1 * jax.random.normal(key, (E,))


def _rule(config: ModelConfig) -> routing.Rule:
  return routing.Rule(
    num_experts_per_tok=config.num_experts_per_tok,
    n_group=config.n_group,
    topk_group=config.topk_group,
    group_score="top2" if config.topk_method == "noaux_tc" else "max",
    scoring_func=config.scoring_func,
    norm_topk_prob=config.norm_topk_prob,
    routed_scaling_factor=config.routed_scaling_factor,
  )


for _name in routing.IMPLEMENTATIONS:
  implementation("routing", _name)(
    lambda shape, name=_name: (
      lambda logits_ME, bias_E: tuple(routing.route(logits_ME, bias_E, _rule(shape.config), name))
    )
  )


# Permute and combine: tokens into expert order, and the sum of each token's rows.


def _choices(shape: Shape, num_experts: int):
  """Draws K experts for each token, all different, int32 [M, K]."""
  drawn_ME = jax.random.uniform(jax.random.key(0), (shape.tokens, num_experts))
  return jnp.argsort(drawn_ME, axis=1)[:, : shape.config.num_experts_per_tok].astype(jnp.int32)


def _order(shape: Shape):
  expert_MK = _choices(shape, shape.config.n_routed_experts)
  return permute.expert_order(expert_MK, *routing.ranks(expert_MK, shape.config.n_routed_experts))


@operation("permute", lambda s: rows(s, s.dims[4], s.dims[1]), lambda s: 0)
def _permute_args(shape: Shape):
  M, D, *_ = shape.dims
  return normal(shape, M, D), *_order(shape)


@operation("combine", lambda s: rows(s, s.dims[0], s.dims[1]), lambda s: s.dims[4] * s.dims[1])
def _combine_args(shape: Shape):
  _, D, _, _, P = shape.dims
  return normal(shape, P, D), *_order(shape)


implementations("permute", permute.permute, permute.IMPLEMENTATIONS)
implementations("combine", permute.combine, permute.IMPLEMENTATIONS)


# Grouped matmul: rows times their expert's matrix.


@operation(
  "grouped_matmul",
  lambda s: rows(s, s.dims[4], s.dims[2]),
  lambda s: 2 * s.dims[4] * s.dims[1] * s.dims[2],
)
def _matmul_args(shape: Shape):
  _, D, F, e, P = shape.dims
  return normal(shape, P, D), weights(shape, e, D, F), equal(P, e)


def _alignment(shape: Shape) -> dict[str, int]:
  """Returns the alignment of the groups: our tile size if it divides each group, else 1."""
  *_, e, P = shape.dims
  tile = tile_rows(P / e)
  return {"alignment": tile if P % e == 0 and P // e % tile == 0 else 1}


implementations("grouped_matmul", grouped_matmul.grouped_matmul, MATMULS, _alignment)


# A whole expert: the two inner matmuls, the activation, the row's weight, the outer matmul.


@operation(
  "grouped_swiglu",
  lambda s: rows(s, s.dims[4], s.dims[1]),
  lambda s: 6 * s.dims[4] * s.dims[1] * s.dims[2],
)
def _swiglu_args(shape: Shape):
  _, D, F, e, P = shape.dims
  weight_P = jax.random.uniform(jax.random.key(0), (P,))
  matrices = (weights(shape, e, D, F), weights(shape, e, D, F), weights(shape, e, F, D))
  return normal(shape, P, D), weight_P, *matrices, equal(P, e)


implementations(
  "grouped_swiglu", grouped_matmul.grouped_swiglu, grouped_matmul.IMPLEMENTATIONS, _alignment
)


# Permute, experts, combine, for the experts of one device.


@operation(
  "routed_swiglu",
  lambda s: rows(s, s.dims[0], s.dims[1]),
  lambda s: 6 * s.dims[4] * s.dims[1] * s.dims[2],
)
def _routed_args(shape: Shape):
  M, D, F, e, _ = shape.dims
  expert_MK = _choices(shape, e)
  gate_MK = jax.random.uniform(jax.random.key(1), expert_MK.shape)
  matrices = (weights(shape, e, D, F), weights(shape, e, D, F), weights(shape, e, F, D))
  return normal(shape, M, D), gate_MK, *matrices, expert_MK, *routing.ranks(expert_MK, e)


def routed_swiglu(
  x_MD,
  gate_MK,
  w_gate_EDF,
  w_up_EDF,
  w_down_EFD,
  expert_MK,
  rank_MK,
  counts_E,
  implementation=None,
  tile=None,
):
  """Calls `grouped_matmul.routed_swiglu`; the arguments with gradients come first here."""
  routed = routing.Routed(expert_MK, gate_MK, counts_E, rank_MK)
  experts = (w_gate_EDF, w_up_EDF, w_down_EFD)
  return grouped_matmul.routed_swiglu(x_MD, routed, experts, implementation, tile)


implementations("routed_swiglu", routed_swiglu, grouped_matmul.IMPLEMENTATIONS)


# The same in FP8.

operation("quantized_routed_swiglu", *OPERATIONS["routed_swiglu"][1:])(_routed_args)


def quantized_routed_swiglu(
  x_MD, gate_MK, w_gate_EDF, w_up_EDF, w_down_EFD, expert_MK, rank_MK, counts_E, implementation
):
  """Calls `quantized_matmul.quantized_routed_swiglu`; arguments with gradients come first."""
  routed = routing.Routed(expert_MK, gate_MK, counts_E, rank_MK)
  experts = (w_gate_EDF, w_up_EDF, w_down_EFD)
  return quantized_matmul.quantized_routed_swiglu(x_MD, routed, experts, implementation)


implementations(
  "quantized_routed_swiglu", quantized_routed_swiglu, quantized_matmul.GROUPED_IMPLEMENTATIONS
)


# Causal attention of training, with queries and keys wider than values.


def _attention_results(shape: Shape):
  B, S, H, _, U = shape.attention_dims
  return rows(shape, B, S, H, U)


def _attention_flops(shape: Shape) -> int:
  """Counts the causal triangle with its diagonal."""
  B, S, H, A, U = shape.attention_dims
  return B * H * S * (S + 1) * (A + U)


@operation("attention", _attention_results, _attention_flops)
def _attention_args(shape: Shape):
  B, S, H, A, U = shape.attention_dims
  return normal(shape, B, S, H, A), normal(shape, B, S, H, A), normal(shape, B, S, H, U)


implementations(
  "attention",
  mla_attention.causal_attention,
  mla_attention.CAUSAL_IMPLEMENTATIONS,
  lambda s: {"segments_BT": None, "scale": s.config.qk_head_dim**-0.5},
)


# Decoding: one new token of each row attends to its row's pages of the latent cache.

DECODED_ROWS, PAGE_TOKENS = 32, 16


def _decode_dims(shape: Shape):
  c = shape.config
  width = c.kv_lora_rank + c.qk_rope_head_dim
  return DECODED_ROWS, c.num_attention_heads, shape.sequence_length, width, c.kv_lora_rank


def _decode_flops(shape: Shape) -> int:
  B, H, tokens, W, C = _decode_dims(shape)
  return 2 * B * H * tokens * (W + C)


def _decode_results(shape: Shape):
  B, H, _, _, C = _decode_dims(shape)
  return rows(shape, B, 1, H, C)


@operation("decode_attention", _decode_results, _decode_flops)
def _decode_args(shape: Shape):
  B, H, tokens, W, _ = _decode_dims(shape)
  on_gpu = jax.default_backend() == "gpu"
  laid_out_for = shape.config.kernels.decode_attention or ("mosaic_gpu" if on_gpu else "mosaic_tpu")
  W = mla_attention.decode_width(W, laid_out_for)
  table_BP = jax.random.permutation(jax.random.key(0), B * -(-tokens // PAGE_TOKENS))
  pages_NTW = normal(shape, table_BP.size, PAGE_TOKENS, W)
  end_BS = jnp.full((B, 1), tokens, jnp.int32)
  return normal(shape, B, 1, H, W), pages_NTW, table_BP.reshape(B, -1).astype(jnp.int32), end_BS


implementations(
  "decode_attention",
  mla_attention.decode_attention,
  mla_attention.DECODE_IMPLEMENTATIONS,
  lambda s: {"scale": s.config.qk_head_dim**-0.5, "value_width": s.config.kv_lora_rank},
)


# A projection whose operands are quantised to FP8 as part of it.


@operation(
  "quantized_matmul",
  lambda s: rows(s, s.dims[0], s.dims[2]),
  lambda s: 2 * s.dims[0] * s.dims[1] * s.dims[2],
)
def _quantized_args(shape: Shape):
  M, D, F, _, _ = shape.dims
  return normal(shape, M, D), weights(shape, D, F)


implementations(
  "quantized_matmul", quantized_matmul.quantized_matmul, quantized_matmul.IMPLEMENTATIONS
)


# The baselines.

for _kernel, _builds in baselines.BASELINES.items():
  for _name, _build in _builds.items():
    implementation(_kernel, _name)(_build)


# The backward passes, including what they compute again of the forward pass.


def _attention_gradient_flops(shape: Shape) -> int:
  """Counts forward and the five products of backward, which computes the probabilities again."""
  B, S, H, A, U = shape.attention_dims
  return B * H * S * (S + 1) * (A + U + 3 * A + 2 * U)


add_gradient("grouped_matmul", 2, lambda s: 2 * OPERATIONS["grouped_matmul"].flops(s))


def _swiglu_gradient_flops(shape: Shape) -> int:
  """Counts the six products of backward and the two of forward that it computes again."""
  _, D, F, _, P = shape.dims
  return 8 * 2 * P * D * F


add_gradient("grouped_swiglu", 5, _swiglu_gradient_flops)
add_gradient("routed_swiglu", 5, _swiglu_gradient_flops)
add_gradient("quantized_routed_swiglu", 5, _swiglu_gradient_flops)
add_gradient("attention", 3, _attention_gradient_flops)
add_gradient("quantized_matmul", 2, lambda s: 2 * OPERATIONS["quantized_matmul"].flops(s))

implementation("grouped_matmul", "jax_mosaic_gpu")(baselines.jax_mosaic_gpu)  # forward only
