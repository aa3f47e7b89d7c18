"""Baselines that our kernels are measured beside: those of JAX, tokamax and cuDNN.

Each baseline is a function that takes a shape and returns a function of the kernel's arguments; it
imports its library when it is called. Dimensions are those of `cases`.
"""

import functools
import importlib
from collections.abc import Callable

import jax
import jax.numpy as jnp

from dsmoe.kernel_bench.registry import IMPLEMENTATIONS, Shape

# Grouped matmul.


def _megablox(tiling: tuple[int, int, int]):
  def build(shape: Shape):
    ops = importlib.import_module("jax.experimental.pallas.ops.tpu.megablox.ops")
    dtype = jnp.dtype(shape.config.compute_dtype)
    return lambda x_PD, w_EDF, sizes_E: ops.gmm(x_PD, w_EDF, sizes_E, dtype, tiling)

  return build


def _tokamax(shape: Shape):
  tokamax = importlib.import_module("tokamax")
  return functools.partial(tokamax.ragged_dot, implementation="mosaic")


def jax_mosaic_gpu(shape: Shape):
  """Builds jax's own kernel for H100 with the tile sizes of its benchmark; it has no gradient."""
  ops = importlib.import_module("jax.experimental.pallas.ops.gpu.ragged_dot_mgpu")
  sizes = dict(block_m=128, block_n=128, block_k=64, max_concurrent_steps=4, grid_block_n=8)
  return lambda x_PD, w_EDF, sizes_E: ops.ragged_dot(x_PD, w_EDF, group_sizes=sizes_E, **sizes)


def _batched(x_PD, w_EDF):
  """Computes equal groups as one batched matmul, an upper bound of the speed."""
  E, D, F = w_EDF.shape
  return jnp.matmul(x_PD.reshape(E, -1, D), w_EDF).reshape(-1, F)


# The whole expert.


def _swiglu_unfused(shape: Shape):
  """Builds three of our grouped matmuls with XLA's activation between them."""
  matmul = IMPLEMENTATIONS["grouped_matmul"]["mosaic_tpu"](shape)

  def run(x_PD, weight_P, w_gate_EDF, w_up_EDF, w_down_EFD, sizes_E):
    gate_PF, up_PF = matmul(x_PD, w_gate_EDF, sizes_E), matmul(x_PD, w_up_EDF, sizes_E)
    inner_PF = jax.nn.silu(gate_PF.astype(jnp.float32)) * up_PF * weight_P[:, None]
    return matmul(inner_PF.astype(x_PD.dtype), w_down_EFD, sizes_E)

  return run


def _swiglu_batched(shape: Shape):
  def run(x_PD, weight_P, w_gate_EDF, w_up_EDF, w_down_EFD, sizes_E):
    gate_PF, up_PF = _batched(x_PD, w_gate_EDF), _batched(x_PD, w_up_EDF)
    inner_PF = jax.nn.silu(gate_PF.astype(jnp.float32)) * up_PF * weight_P[:, None]
    return _batched(inner_PF.astype(x_PD.dtype), w_down_EFD)

  return run


# Attention.


def _splash(folder: str, of_heads: bool, config: Callable) -> Callable:
  """Returns the builder of a splash attention: jax's, or tokamax's continuation of it.

  Args:
    folder: package of its modules.
    of_heads: whether it expects a mask for each head.
    config: maps its kernel module and a block size to its keywords.
  """

  def build(shape: Shape):
    kernel = importlib.import_module(f"{folder}.splash_attention_kernel")
    masks = importlib.import_module(f"{folder}.splash_attention_mask")
    _, S, H, A, _ = shape.attention_dims
    mask = masks.CausalMask((S, S))
    run_HSA = kernel.make_splash_mha_single_device(
      masks.MultiHeadMask([mask] * H) if of_heads else mask, **config(kernel, min(S, 1024))
    )

    def run(q_BSHA, k_BSHA, v_BSHU):
      heads_first = [a.swapaxes(1, 2) for a in (q_BSHA * A**-0.5, k_BSHA, v_BSHU)]
      return jax.vmap(run_HSA)(*heads_first).swapaxes(1, 2)

    return run

  return build


def _splash_blocks(n: int) -> dict[str, int]:
  """Returns block sizes of n tokens, half of them computed at a time, for both passes."""
  whole = dict.fromkeys(("block_q", "block_kv", "block_q_dkv", "block_kv_dkv"), n)
  return whole | dict.fromkeys(("block_kv_compute", "block_kv_dkv_compute"), max(n // 2, 128))


def _cudnn(shape: Shape):
  """Builds cuDNN's attention, which needs values as wide as keys: they are padded."""
  _, _, _, A, U = shape.attention_dims
  attention = functools.partial(
    jax.nn.dot_product_attention, is_causal=True, implementation="cudnn"
  )

  def run(q_BSHA, k_BSHA, v_BSHU):
    v_BSHA = jnp.pad(v_BSHU, [(0, 0)] * 3 + [(0, A - U)])
    return attention(q_BSHA, k_BSHA, v_BSHA, scale=A**-0.5)[..., :U]

  return run


_JAX_SPLASH = "jax.experimental.pallas.ops.tpu.splash_attention"
_TOKAMAX_SPLASH = "tokamax._src.ops.experimental.tpu.splash_attention"


def _jax_blocks(kernel, n: int) -> dict:
  return {"block_sizes": kernel.BlockSizes(**_splash_blocks(n), use_fused_bwd_kernel=True)}


def _tokamax_blocks(kernel, n: int, **scheduled) -> dict:
  return {"config": kernel.SplashConfig(**_splash_blocks(n), **scheduled)}


_scheduled = functools.partial(_tokamax_blocks, use_experimental_scheduler=True)

BASELINES: dict[str, dict[str, Callable[[Shape], Callable]]] = {
  "grouped_matmul": {
    "ragged_dot": lambda shape: jax.lax.ragged_dot,
    "megablox": _megablox((128, 128, 128)),  # its default
    "megablox_512_1024_1024": _megablox((512, 1024, 1024)),
    "tokamax": _tokamax,
    "batched": lambda shape: lambda x_PD, w_EDF, sizes_E: _batched(x_PD, w_EDF),
  },
  "grouped_swiglu": {"unfused": _swiglu_unfused, "batched": _swiglu_batched},
  "attention": {
    "splash": _splash(_JAX_SPLASH, True, lambda kernel, n: {}),
    "splash_1024": _splash(_JAX_SPLASH, True, _jax_blocks),
    "tokamax_1024": _splash(_TOKAMAX_SPLASH, False, _tokamax_blocks),
    "tokamax_1024_scheduled": _splash(_TOKAMAX_SPLASH, False, _scheduled),
    "cudnn": _cudnn,
  },
  "quantized_matmul": {"not quantized": lambda shape: jnp.matmul},
}
