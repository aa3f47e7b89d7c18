"""The latent cache: kv_lora_rank + qk_rope_head_dim numbers a token and layer, in pages.

A page holds PAGE_TOKENS consecutive tokens of one row, under one number in every layer. Rows find theirs through
a table, so that rows of any length share one array, join, leave, and share a common beginning.
`PageTable` is the host's book about who owns what; the rest are functions of arrays.

Shapes: N pages, T tokens of a page, W numbers a token, B rows, S new tokens of a row, P pages of
a row.
"""

import collections
import hashlib
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsmoe.config import ModelConfig
from pallas_kernels.mla_attention import decode_width

PAGE_TOKENS = 16
BLOCK_PAGES = 8  # read at once


def width(config: ModelConfig) -> int:
  """Numbers a token and layer: the latent, the rotated key that all heads share, any padding."""
  W = config.kv_lora_rank + config.qk_rope_head_dim
  return decode_width(W, config.kernels.decode_attention)


class LatentCache(NamedTuple):
  """Every row's latents, in a buffer a layer."""

  layers: tuple[jax.Array, ...]  # pages [N, T, W] of each layer of the main model
  mtp: jax.Array | None  # of the MTP module that drafts


def empty(config: ModelConfig, num_pages: int, speculate: bool = False) -> LatentCache:
  """Returns cleared pages in the compute dtype."""

  def pages():
    return jnp.zeros((num_pages, PAGE_TOKENS, width(config)), config.compute_dtype)

  layers = tuple(pages() for _ in range(config.num_hidden_layers))
  return LatentCache(layers, pages() if speculate else None)


def page_bytes(config: ModelConfig, speculate: bool = False) -> int:
  """Returns the bytes of one page, all layers."""
  return sum(
    x.size * x.dtype.itemsize
    for x in jax.tree.leaves(jax.eval_shape(lambda: empty(config, 1, speculate)))
  )


def write(pages_NTW, new_BSW, table_BP, first_B, count_B):
  """Stores new latents of one layer, in place where the pages are donated or carried by a loop.

  Args:
    pages_NTW: the layer's.
    new_BSW: latents of S new tokens a row. S is 1 or a few, or a multiple of PAGE_TOKENS with
      every row's first token at the start of a page.
    table_BP: int32, each row's pages.
    first_B: int32, each row's tokens before these.
    count_B: int32, how many of the S are real; the others are not stored, or stored behind
      them in the row's last page, where the next tokens replace them.

  Returns:
    The pages with them. What is not finite becomes 0: rows read pages of others, masked, and
    no mask keeps out 0 x NaN.
  """
  N, T, W = pages_NTW.shape
  new_BSW = jnp.where(jnp.isfinite(new_BSW), new_BSW, 0)
  new_BSW = jnp.pad(new_BSW, ((0, 0), (0, 0), (0, W - new_BSW.shape[2])))
  B, S, _ = new_BSW.shape
  rows = jnp.arange(B)[:, None]
  if S % T:
    position_BS = first_B[:, None] + jnp.arange(S)[None, :]
    page_BS = table_BP[rows, jnp.minimum(position_BS // T, table_BP.shape[1] - 1)]
    page_BS = jnp.where(jnp.arange(S)[None, :] < count_B[:, None], page_BS, N)  # N: dropped
    return pages_NTW.at[page_BS, position_BS % T].set(new_BSW, mode="drop")
  step_BQ = jnp.arange(S // T)[None, :]
  place_BQ = jnp.minimum(first_B[:, None] // T + step_BQ, table_BP.shape[1] - 1)
  page_BQ = jnp.where(step_BQ * T < count_B[:, None], table_BP[rows, place_BQ], N)
  return pages_NTW.at[page_BQ].set(new_BSW.reshape(B, S // T, T, W), mode="drop")


def read(pages_NTW, table_BP, block):
  """Returns the latents [B, BLOCK_PAGES * T, W] of each row's block of pages."""
  page_Bp = jax.lax.dynamic_slice_in_dim(table_BP, block * BLOCK_PAGES, BLOCK_PAGES, axis=1)
  return pages_NTW[page_Bp].reshape(page_Bp.shape[0], -1, pages_NTW.shape[-1])


def page_keys(prompt: Sequence[int]) -> list[bytes]:
  """Names a prompt's full pages that have a token after them.

  A name is a hash of all tokens up to the page's end and the next: the drafting module's latent
  of a token depends on the one that follows it.
  """
  tokens, keys, key = np.asarray(prompt, np.int64), [], b""
  for start in range(0, len(prompt) - PAGE_TOKENS, PAGE_TOKENS):
    key = hashlib.sha256(key + tokens[start : start + PAGE_TOKENS + 1].tobytes()).digest()
    keys.append(key)
  return keys


class PageTable:
  """Which pages are free, and which hold a beginning that another row may share.

  A full page of a prompt is known by all tokens up to its end. It stays after its rows are
  gone, until the space is needed: the page unused for longest goes first.
  """

  def __init__(self, num_pages: int):
    self.num_pages = num_pages
    self._free = list(range(num_pages))[::-1]
    self._users = [0] * num_pages
    self._known: dict[bytes, int] = {}  # name -> page
    self._key_of: dict[int, bytes] = {}
    self._idle: collections.OrderedDict[int, None] = collections.OrderedDict()  # known, no user

  @property
  def num_used(self) -> int:
    """Pages some row holds."""
    return self.num_pages - len(self._free) - len(self._idle)

  def known_pages(self, keys: Sequence[bytes]) -> list[int]:
    """Returns the pages of the longest known beginning."""
    known = itertools.takewhile(lambda key: key in self._known, keys)
    return [self._known[key] for key in known]

  def take(self, keys: Sequence[bytes], num_tokens: int) -> tuple[list[int], int] | None:
    """Reserves pages for a row.

    Args:
      keys: `page_keys` of its prompt.
      num_tokens: that the row may come to hold.

    Returns:
      (its pages in order, tokens of the prompt that are in them already), or None when there
      is no space now.
    """
    shared = self.known_pages(keys)
    needed = -(-num_tokens // PAGE_TOKENS) - len(shared)
    idle_shared = sum(not self._users[page] for page in shared)
    if needed > len(self._free) + len(self._idle) - idle_shared:
      return None
    for page in shared:
      self._users[page] += 1
      self._idle.pop(page, None)
    fresh = []
    for _ in range(needed):
      if not self._free:
        page, _ = self._idle.popitem(last=False)
        del self._known[self._key_of.pop(page)]
        self._free.append(page)
      fresh.append(self._free.pop())
      self._users[fresh[-1]] = 1
    return shared + fresh, len(shared) * PAGE_TOKENS

  def publish(self, keys: Sequence[bytes], pages: Sequence[int]) -> None:
    """Makes a prompt's pages, now filled, known to later rows."""
    for page, key in zip(pages, keys):
      if key not in self._known and page not in self._key_of:
        self._known[key] = page
        self._key_of[page] = key

  def give_back(self, pages: Sequence[int]) -> None:
    """Ends a row's hold on its pages."""
    for page in reversed(pages):  # a beginning outlives what follows it
      self._users[page] -= 1
      if self._users[page]:
        continue
      if page in self._key_of:
        self._idle[page] = None
      else:
        self._free.append(page)
