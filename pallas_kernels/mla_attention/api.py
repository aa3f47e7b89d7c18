"""Validation and choice of implementation for MLA's attention.

Shapes: B rows, S queries, T keys, Y runs of queries, H heads, A query and key dim (qk_nope +
qk_rope), U value dim; of decoding S new tokens, N pages of T tokens, W numbers a token (kv_lora +
qk_rope), C of them the value (kv_lora), P pages of a row.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from pallas_kernels import platform, varying
from pallas_kernels.mla_attention import cpu, gpu, gpu_decode, reference, tpu, tpu_decode

CAUSAL_IMPLEMENTATIONS: dict[str, Callable] = {
  "reference": reference.causal_attention,
  "xla": cpu.causal_attention,
  "mosaic_tpu": tpu.causal_attention,
  "mosaic_gpu": gpu.causal_attention,
}

# Of those, the ones whose queries may be only some of a row's tokens.
RUN_IMPLEMENTATIONS = ("reference", "xla", "mosaic_tpu")

# The same, with the log of each softmax's normaliser as a second result; without gradients.
_WITH_NORMALISER: dict[str, Callable] = {
  "reference": reference.causal_attention_with_normaliser,
  "xla": cpu.causal_attention_with_normaliser,
  "mosaic_tpu": tpu.causal_attention_with_normaliser,
  "mosaic_gpu": gpu.causal_attention_with_normaliser,
}

DECODE_IMPLEMENTATIONS: dict[str, Callable] = {
  "reference": reference.decode_attention,
  "xla": cpu.decode_attention,
  "mosaic_tpu": tpu_decode.decode_attention,
  "mosaic_gpu": gpu_decode.decode_attention,
}


def chosen(implementation: str | None, q_BSHA, v_BSHU, runs: int = 0) -> str:
  """Returns the implementation of causal attention that None stands for here, or the one given.

  Args:
    implementation: a key of `CAUSAL_IMPLEMENTATIONS`, or None.
    q_BSHA, v_BSHU: only their shapes and dtypes count.
    runs: Y where the queries are runs of a row's tokens, else 0.
  """
  refusals = {
    "mosaic_tpu": lambda: tpu.refused(q_BSHA, v_BSHU, runs),
    "mosaic_gpu": lambda: "it takes no runs" if runs else gpu.refused(q_BSHA, v_BSHU),
  }
  return platform.choose(implementation, CAUSAL_IMPLEMENTATIONS, "xla", refusals)


def _check(arrays: dict) -> None:
  """Raises ValueError where an array of {name: (array, shape, dtype)} is another."""
  for name, (array, shape, dtype) in arrays.items():
    if array.shape != shape:
      raise ValueError(f"{name} must have shape {shape}, got {array.shape}")
    if array.dtype != dtype:
      raise ValueError(f"{name} must be {jnp.dtype(dtype).name}, got {array.dtype}")


def _check_floating(name: str, array, rank: int) -> None:
  if array.ndim != rank or 0 in array.shape:
    raise ValueError(f"{name} must have {rank} dimensions, none of them 0, got {array.shape}")
  if array.dtype not in (jnp.bfloat16, jnp.float32):
    raise ValueError(f"{name} must be bfloat16 or float32, got {array.dtype}")


def _checked(
  q_BSHA, k_BTHA, v_BTHU, segments_BT, implementation, chunk_tokens: int, starts_Y=None
) -> tuple[str, tuple[Any, ...]]:
  """Checks what `causal_attention` takes; returns the implementation and its positional operands."""
  _check_floating("q_BSHA", q_BSHA, 4)
  _check_floating("v_BTHU", v_BTHU, 4)
  B, S, H, A = q_BSHA.shape
  T = S
  if starts_Y is not None:
    _check({"starts_Y": (starts_Y, starts_Y.shape[:1], jnp.int32)})
    T = v_BTHU.shape[1]
    if not starts_Y.size or S % starts_Y.size:
      raise ValueError(f"S ({S}) must be divisible by the number of starts_Y ({starts_Y.size})")
    if S > T:
      raise ValueError(f"S ({S}) must not exceed T ({T})")
  arrays: dict[str, tuple] = {
    "k_BTHA": (k_BTHA, (B, T, H, A), q_BSHA.dtype),
    "v_BTHU": (v_BTHU, (B, T, H, v_BTHU.shape[3]), q_BSHA.dtype),
  }
  if segments_BT is not None:
    arrays["segments_BT"] = (segments_BT, (B, T), jnp.int32)
  _check(arrays)
  if chunk_tokens < 1:
    raise ValueError(f"chunk_tokens must be at least 1, got {chunk_tokens}")
  runs = 0 if starts_Y is None else starts_Y.size
  implementation = chosen(implementation, q_BSHA, v_BTHU, runs)
  if runs and implementation not in RUN_IMPLEMENTATIONS:
    raise ValueError(
      f"implementation must be one of {', '.join(RUN_IMPLEMENTATIONS)} where the queries are runs "
      f"of a row's tokens, got {implementation!r}"
    )
  # Rows are taken by traced numbers, which NumPy's own arrays refuse.
  operands = varying.vary_alike(*map(jnp.asarray, (q_BSHA, k_BTHA, v_BTHU)))
  return implementation, (*operands, None if segments_BT is None else jnp.asarray(segments_BT))


def causal_attention(
  q_BSHA,
  k_BTHA,
  v_BTHU,
  segments_BT,
  scale: float,
  implementation: str | None = None,
  chunk_tokens: int = 512,
  starts_Y=None,
):
  """Softmax attention of each token to itself and earlier ones of its segment.

  Memory is linear in T, forward and backward, but for `reference`.

  Args:
    q_BSHA: queries, bfloat16 or float32.
    k_BTHA, v_BTHU: keys and values of the whole rows, in q's dtype.
    segments_BT: int32 document number of each token, or None for one document a row.
    scale: factor on the logits.
    implementation: a key of `CAUSAL_IMPLEMENTATIONS`; None: the compiled kernel on the
      chips listed in `pallas_kernels.platform` if it takes the operands, else `xla`.
    chunk_tokens: queries `xla` handles at once.
    starts_Y: int32, traced or not. The queries are then those of only some of the T tokens, of
      Y runs of S / Y tokens each; run y begins at the row's token starts_Y[y], and all its tokens
      are the row's. No block of queries meets a block of keys behind it. Only `RUN_IMPLEMENTATIONS`
      take it, and `mosaic_tpu` wants runs that are chunks of the row: multiples of 128 tokens into
      which T divides, in ascending order. None: S = T, every token asks.

  Returns:
    [B, S, H, U] in v's dtype; logits and softmax are float32. Differentiable in q, k and v.

  Raises:
    ValueError: for shapes or dtypes that do not fit together, no tokens in a chunk, an unknown
      implementation, or one that takes no runs.

  Source: FlashAttention-2 (arXiv:2307.08691), algorithms 1 and 2.
  """
  implementation, operands = _checked(
    q_BSHA, k_BTHA, v_BTHU, segments_BT, implementation, chunk_tokens, starts_Y
  )
  if starts_Y is not None:
    starts_Y = jnp.asarray(starts_Y)
  if implementation == "xla":
    q_BSHA, k_BTHA, v_BTHU, segments_BT = operands
    return cpu.causal_attention(q_BSHA, k_BTHA, v_BTHU, segments_BT, scale, chunk_tokens, starts_Y)
  if starts_Y is not None:
    return CAUSAL_IMPLEMENTATIONS[implementation](*operands, scale, starts_Y=starts_Y)
  return CAUSAL_IMPLEMENTATIONS[implementation](*operands, scale)


def prefill_attention(
  q_BSHA,
  k_BSHA,
  v_BSHU,
  expand: Callable,
  pages_NTW,
  table_BP,
  first_B,
  scale: float,
  implementation: str | None = None,
  chunk_tokens: int = 512,
):
  """Attention of new tokens to themselves, causally, and to the row's tokens in the cache.

  The new tokens attend to each other by `causal_attention`'s implementations; the softmax then
  continues over the cached tokens, in plain XLA, a block of pages at a time.

  Args:
    q_BSHA, k_BSHA, v_BSHU: of the new tokens, as in `causal_attention`.
    expand: latents [B, t, W] -> keys [B, t, H, A] and values [B, t, H, U].
    pages_NTW: the cache, in q's dtype.
    table_BP: int32, each row's pages in order.
    first_B: int32, the row's tokens that are in the cache before the new ones.
    scale, implementation, chunk_tokens: as in `causal_attention`.

  Returns:
    [B, S, H, U] in v's dtype. No gradient is meant.

  Raises:
    ValueError: as `causal_attention`.
  """
  implementation, operands = _checked(q_BSHA, k_BSHA, v_BSHU, None, implementation, chunk_tokens)
  more = (chunk_tokens,) if implementation == "xla" else ()
  out_BSHU, log_z_BHS = _WITH_NORMALISER[implementation](*operands, scale, *more)

  def expand_heads_first(latents_BTW):
    return tuple(a.swapaxes(1, 2) for a in expand(latents_BTW))

  top = log_z_BHS[..., None]
  running = cpu.Running(top, jnp.ones_like(top), out_BSHU.swapaxes(1, 2).astype(jnp.float32))
  out_BHSU = cpu.attend_to_pages(
    running,
    operands[0].swapaxes(1, 2),
    expand_heads_first,
    pages_NTW,
    table_BP,
    jnp.broadcast_to(first_B[:, None], q_BSHA.shape[:2]),
    scale,
  )
  return out_BHSU.swapaxes(1, 2).astype(v_BSHU.dtype)


def decode_width(W: int, implementation: str | None = None) -> int:
  """Returns how many numbers a token should take in the cache: TPUs copy whole 128s."""
  padded = platform.choose(implementation, DECODE_IMPLEMENTATIONS, "xla") == "mosaic_tpu"
  return -(-W // 128) * 128 if padded else W


def decode_attention(
  q_BSHW,
  pages_NTW,
  table_BP,
  end_BS,
  scale: float,
  value_width: int,
  implementation: str | None = None,
):
  """Attention of a few new tokens to a paged latent cache, all heads to the same latents.

  A query's key is all W numbers of a cached token, its value the first C: the absorbed form
  of MLA, with kv_b_proj folded into queries and outputs. The cost follows the tokens present,
  not the table's width, but for `reference`.

  Args:
    q_BSHW: absorbed queries, bfloat16 or float32.
    pages_NTW: the cache, in q's dtype.
    table_BP: int32, each row's pages in order; entries behind the row's end are not looked at.
    end_BS: int32, how many of the row's tokens each query sees; clipped to 0 ... P T.
    scale: factor on the logits.
    value_width: C.
    implementation: a key of `DECODE_IMPLEMENTATIONS`; None: as in `causal_attention`.

  Returns:
    [B, S, H, C] in q's dtype, zeros where a query sees nothing; logits, softmax and sums are
    float32. No gradient is meant.

  Raises:
    ValueError: for shapes or dtypes that do not fit together, a value wider than a token, or
      an unknown implementation.

  Source: DeepSeek-V2 (arXiv:2405.04434) section 2.1.
  """
  _check_floating("q_BSHW", q_BSHW, 4)
  _check_floating("pages_NTW", pages_NTW, 3)
  B, S, _, W = q_BSHW.shape
  if table_BP.ndim != 2 or 0 in table_BP.shape:
    raise ValueError(f"table_BP must have 2 dimensions, none of them 0, got {table_BP.shape}")
  _check(
    {
      "pages_NTW": (pages_NTW, (*pages_NTW.shape[:2], W), q_BSHW.dtype),
      "table_BP": (table_BP, (B, table_BP.shape[1]), jnp.int32),
      "end_BS": (end_BS, (B, S), jnp.int32),
    }
  )
  if not 1 <= value_width <= W:
    raise ValueError(f"value_width must be from 1 to W ({W}), got {value_width}")
  refusals = {
    "mosaic_tpu": lambda: tpu_decode.refused(pages_NTW, table_BP),
    "mosaic_gpu": lambda: gpu_decode.refused(q_BSHW, pages_NTW, value_width),
  }
  implementation = platform.choose(implementation, DECODE_IMPLEMENTATIONS, "xla", refusals)
  q_BSHW, pages_NTW, table_BP, end_BS = map(jnp.asarray, (q_BSHW, pages_NTW, table_BP, end_BS))
  end_BS = jnp.clip(end_BS, 0, table_BP.shape[1] * pages_NTW.shape[1])
  fn = DECODE_IMPLEMENTATIONS[implementation]
  return fn(q_BSHW, pages_NTW, table_BP, end_BS, scale, value_width)
