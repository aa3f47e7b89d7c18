"""Permute and combine for H100 (Mosaic GPU): each row is read once and written once.

`permute` copies a token's row on chip and stores it K times, with one thread block a token.
`combine` copies a token's K rows on chip and stores their sum, with one thread block a token and
part of D. Thread blocks are small, so that many share a multiprocessor and some work while others
wait for memory.

Shapes: M tokens, D hidden, K experts a token, P rows; a row is [c, 128] to the copy engine,
which moves at most 256 numbers a dimension.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_gpu import call

LANES = 128
MOST_WIDTH = 256 * LANES  # of a row: a copy takes at most 256 lines
BLOCK_BYTES = 36 * 1024  # of a block of `combine`: six share a multiprocessor

f32 = jnp.float32


def refused(dtype, D: int) -> str | None:
  """Returns the rule that rows of a dtype and width break, or None."""
  if D % LANES or not 0 < D <= MOST_WIDTH:
    return f"D must be a multiple of {LANES}, at most {MOST_WIDTH}, got {D}"
  if dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
    return f"rows must be bfloat16, float16 or float32, got {jnp.dtype(dtype)}"
  return None


def num_chunks(D: int) -> int:
  """Returns how many chunks of 128 numbers a row has."""
  if rule := refused(jnp.float32, D):
    raise ValueError(rule)
  return D // LANES


@functools.partial(jax.jit, static_argnums=2)  # lowered once for all layers
def permute(x_MD, row_MK, num_rows: int):
  """Copies each token's row to its K places.

  Args:
    x_MD: bfloat16, float16 or float32.
    row_MK: int32 place of each copy, all different; outside [0, num_rows) none is made.
    num_rows: P.

  Returns:
    [P, D] in x's dtype; rows to which no token was copied are undefined.
  """
  M, D = x_MD.shape
  K = row_MK.shape[1]
  chunks = num_chunks(D)

  def kernel(x_hbm, row_hbm, y_hbm, row_smem, arrived):
    m = jax.lax.axis_index("token")
    plgpu.copy_gmem_to_smem(x_hbm.at[m], row_smem, arrived)
    plgpu.barrier_wait(arrived)
    for k in range(K):
      row = row_hbm[m, k]
      store = functools.partial(plgpu.copy_smem_to_gmem, row_smem, y_hbm.at[row])
      pl.when((row >= 0) & (row < num_rows))(store)

    plgpu.wait_smem_to_gmem(0)

  y = call(
    kernel,
    "permute",
    [x_MD.reshape(M, chunks, LANES), row_MK],
    jax.ShapeDtypeStruct((num_rows, chunks, LANES), x_MD.dtype),
    {"token": M},
    [plgpu.SMEM((chunks, LANES), x_MD.dtype), plgpu.Barrier()],
  )
  return y.reshape(num_rows, D)


@jax.jit
def combine(y_PD, row_MK, weight_MK=None):
  """Sums each token's K rows, weighted where weights are given, in float32.

  Args:
    y_PD: bfloat16, float16 or float32.
    row_MK: int32 row of each choice, in [0, P).
    weight_MK: float32 or None.

  Returns:
    [M, D] in y's dtype.
  """
  P, D = y_PD.shape
  M, K = row_MK.shape
  chunks = num_chunks(D)
  most = max(BLOCK_BYTES // (K * LANES * y_PD.dtype.itemsize), 1)
  part = max(c for c in range(1, most + 1) if chunks % c == 0)
  weights = [] if weight_MK is None else [weight_MK]

  def kernel(y_hbm, row_hbm, *refs):
    *weight_hbm, sum_hbm, rows_smem, arrived = refs
    m = jax.lax.axis_index("token")
    mine = pl.ds(jax.lax.axis_index("part") * part, part)
    for k in range(K):
      plgpu.copy_gmem_to_smem(y_hbm.at[row_hbm[m, k], mine], rows_smem.at[k], arrived)
    plgpu.barrier_wait(arrived)
    rows = [rows_smem[k].astype(f32) for k in range(K)]
    if weights:
      rows = [row * weight_hbm[0][m, k] for k, row in enumerate(rows)]
    rows_smem[0] = sum(rows[1:], rows[0]).astype(rows_smem.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(rows_smem.at[0], sum_hbm.at[m, mine])
    plgpu.wait_smem_to_gmem(0)

  y = call(
    kernel,
    "combine",
    [y_PD.reshape(P, chunks, LANES), row_MK, *weights],
    jax.ShapeDtypeStruct((M, chunks, LANES), y_PD.dtype),
    {"token": M, "part": chunks // part},
    [plgpu.SMEM((K, part, LANES), y_PD.dtype), plgpu.Barrier(num_arrivals=K)],
  )
  return y.reshape(M, D)
