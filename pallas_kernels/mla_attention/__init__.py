"""Attention with the unequal head dims of MLA, and decoding in its latent space."""

from pallas_kernels.mla_attention.api import (
  CAUSAL_IMPLEMENTATIONS,
  DECODE_IMPLEMENTATIONS,
  RUN_IMPLEMENTATIONS,
  causal_attention,
  decode_attention,
  decode_width,
  prefill_attention,
)

__all__ = [
  "CAUSAL_IMPLEMENTATIONS",
  "DECODE_IMPLEMENTATIONS",
  "RUN_IMPLEMENTATIONS",
  "causal_attention",
  "decode_attention",
  "decode_width",
  "prefill_attention",
]
