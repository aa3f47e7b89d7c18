"""Permute for FP8 experts on TPU (Mosaic): rows are copied as E4M3 codes.

Copies address 32-bit rows, so a token's row travels as words: four codes each, the byte b of word
128 i + c that of column 512 i + 128 b + c, and behind them its tiles' scales. Tokens are quantised
once, before they are sent to their K places.

Shapes: M tokens, K choices a token, D hidden, a multiple of 512, T = D / 128 tiles, P rows, W
words of a row, m rows of a block.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.permute import tpu as permute
from pallas_kernels.quantized_matmul import tpu
from pallas_kernels.quantized_matmul.e4m3 import CODE, TILE, encode, f32

BYTES = 4  # codes of a word
COLUMNS = BYTES * TILE  # D must be a multiple

u32 = jnp.uint32


def row_words(D: int) -> int:
  """Returns W: D / 4 words of codes, and a scale a tile, in whole pieces of 128."""
  return D // BYTES + pl.cdiv(D // TILE, TILE) * TILE


def _pack(power_of_two: bool, x_ref, words_ref):
  """Quantises rows by tiles of 1 x 128, codes and scales as words."""
  m, D = x_ref.shape
  for first in range(0, D // TILE, TILE):  # the tiles whose scales share a piece
    tiles = min(TILE, D // TILE - first)

    def tile_of(t, first=first):
      return x_ref[:, (first + t) * TILE : (first + t + 1) * TILE].astype(f32)

    scale_mt = tpu.scales_of_tiles(tile_of, m, tiles, power_of_two)
    own = slice(D // BYTES + first, D // BYTES + first + TILE)
    words_ref[:, own] = jax.lax.bitcast_convert_type(scale_mt, u32)
    inverse_mt = 1 / scale_mt
    for t in range(0, tiles, BYTES):
      word = jnp.zeros((m, TILE), u32)
      for b in range(BYTES):
        codes = encode(tile_of(t + b), inverse_mt[:, t + b : t + b + 1])
        byte = pltpu.bitcast(codes, jnp.uint8).astype(u32)
        word |= byte << (8 * b)
      words_ref[:, pl.ds((first + t) // BYTES * TILE, TILE)] = word


def scatter(x_MD, row_MK, num_rows: int, power_of_two: bool):
  """Copies each token's row, quantised, to its K places: words uint32 [P, W]."""
  words = jax.ShapeDtypeStruct((row_words(x_MD.shape[1]),), u32)
  pack = functools.partial(_pack, power_of_two)
  return permute.scatter_as(words, pack, x_MD, row_MK, num_rows, "quantized_permute")


def unpack_into(codes_ref, scale_ref, words_ref) -> None:
  """Words [m, W] to codes [m, D] and scales, at least [T, m], rounded up to whole pieces."""
  D = codes_ref.shape[1]
  for c in range(D // COLUMNS):
    word = words_ref[:, c * TILE : (c + 1) * TILE]
    for b in range(BYTES):
      byte = ((word >> (8 * b)) & u32(0xFF)).astype(jnp.uint8)
      first = c * COLUMNS + b * TILE
      codes_ref[:, first : first + TILE] = pltpu.bitcast(byte, CODE)
  for first in range(0, D // TILE, TILE):
    scale_mt = words_ref[:, D // BYTES + first : D // BYTES + first + TILE]
    scale_ref[first : first + TILE] = jax.lax.bitcast_convert_type(scale_mt, f32).T
