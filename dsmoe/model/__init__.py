"""The model: transformer, block, attention, mixture of experts, multi-token prediction."""

from dsmoe.model.moe import RouterBias
from dsmoe.model.transformer import Block, Transformer, build, compute_cast, logits, split

__all__ = ["Block", "RouterBias", "Transformer", "build", "compute_cast", "logits", "split"]
