"""The model: transformer, block, attention, mixture of experts, multi-token prediction."""

from dsmoe.model.moe import RouterBias
from dsmoe.model.parameters import compute_cast
from dsmoe.model.transformer import Transformer, build, logits, shapes_of, split, whole_shapes

__all__ = [
  "RouterBias",
  "Transformer",
  "build",
  "compute_cast",
  "logits",
  "shapes_of",
  "split",
  "whole_shapes",
]
