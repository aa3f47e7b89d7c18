"""Experts on one device: permute, grouped matmul, combine, in the fused token-to-token form."""

from dsmoe.config import ModelConfig
from dsmoe.parallel.experts import ExpertWeights
from dsmoe.parallel.stats import nothing_dropped
from pallas_kernels.grouped_matmul import routed_swiglu, tile_table
from pallas_kernels.quantized_matmul import quantized_routed_swiglu
from pallas_kernels.routing import Routed


def local(x_MD, routed: Routed, experts: ExpertWeights, config: ModelConfig):
  """Brings rows into expert order, applies each expert to its own, and sums each token's rows."""
  weights = experts.own()
  if config.matmul_precision != "compute_dtype":
    y_MD = quantized_routed_swiglu(x_MD, routed, weights, *config.quantization)
    return y_MD, nothing_dropped()
  kernels, (E, D, F) = config.kernels, weights[0].shape
  tile = tile_table.tile(
    kernels.tuned, kernels.grouped_matmul, routed.expert_MK.size, E, D, F, x_MD.dtype
  )
  y_MD = routed_swiglu(x_MD, routed, weights, kernels.grouped_matmul, tile)
  return y_MD, nothing_dropped()
