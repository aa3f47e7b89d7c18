"""What each exchange does with the rows of one layer: sent, multiplied, dropped; without devices.

Nothing is run: from the experts that tokens chose follows what every device does. Devices are
numbered in the order of the batch's parts; X neighbours hold all experts between them, E / X each,
and exchange rows among themselves only.

Shapes: N devices, M tokens of each, K experts a token, E experts, X devices along `expert`.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsmoe.config import ExchangeConfig, ModelConfig
from dsmoe.parallel import shares

DEFAULTS = ExchangeConfig()
_NUMBER_BYTES = {"bfloat16": 2, "float32": 4}
_TILE = 128  # numbers of a row that share a scale in FP8


class Rows(NamedTuple):
  """The rows of one exchange, and how they are exchanged."""

  expert_NMK: np.ndarray
  owner_NMK: np.ndarray  # the place along `expert` of the device that has the row's expert
  num_experts: int
  degree: int  # X
  options: ExchangeConfig


class Work(NamedTuple):
  """What the devices do with the rows of one exchange, int64 [N]."""

  sent_N: np.ndarray  # rows of x to other devices, one way: `DispatchStats.sent_rows`
  computed_N: np.ndarray  # rows that the device's experts multiply
  dropped_N: np.ndarray | None  # as `DispatchStats.dropped_rows`; None: not computed here
  buffer_factor: float  # the most rows that come to a device at once, over the mean


def row_bytes(config: ModelConfig) -> int:
  """Returns the bytes of a row of x on its way out: in FP8 with a float32 scale a tile."""
  if config.exchange.precision == "fp8":
    return config.hidden_size + 4 * -(-config.hidden_size // _TILE)
  return sum_bytes(config)


def sum_bytes(config: ModelConfig) -> int:
  """Returns the bytes of a row of results on its way back, in compute dtype."""
  return config.hidden_size * _NUMBER_BYTES[config.compute_dtype]


def least_rows(expert_NMK: np.ndarray, num_experts: int, degree: int):
  """Counts the rows that no exchange can do without, and those that stay where they are too.

  Returns:
    (for each of a device's tokens the other devices that own an expert of it; the same with the
    device itself), int64 [N] each.
  """
  owner_NMK = owners(expert_NMK, num_experts, degree)
  return least(Rows(expert_NMK, owner_NMK, num_experts, degree, DEFAULTS))


def _hit(rows: Rows) -> np.ndarray:
  """Returns which devices of the exchange group have an expert of each token, bool [N, M, X]."""
  hit_NMX = np.zeros((*rows.owner_NMK.shape[:2], rows.degree), bool)
  np.put_along_axis(hit_NMX, rows.owner_NMK, True, axis=2)
  return hit_NMX


def least(rows: Rows) -> tuple[np.ndarray, np.ndarray]:
  """Does what `least_rows` says."""
  hit_NMX = _hit(rows)
  number_N = np.arange(len(hit_NMX))
  at_home_N = hit_NMX[number_N, :, number_N % rows.degree].sum(axis=1)
  logical_N = hit_NMX.sum(axis=(1, 2))
  return logical_N - at_home_N, logical_N


def owners(expert_NMK: np.ndarray, num_experts: int, degree: int) -> np.ndarray:
  """Returns the place along `expert` of each chosen expert's device."""
  if num_experts % degree:
    raise ValueError(
      f"the number of experts ({num_experts}) must be divisible by the expert degree ({degree})"
    )
  return expert_NMK.astype(np.int64) // (num_experts // degree)


def _counts(owner_NMK: np.ndarray, degree: int) -> np.ndarray:
  """Counts the rows of each device for each device of its exchange group, [N, X]."""
  return np.stack([np.bincount(own.ravel(), minlength=degree) for own in owner_NMK])


def _of_group(a_NX: np.ndarray) -> np.ndarray:
  """Sums over the senders of each group: [N, X] -> [N], one for each receiver."""
  return a_NX.reshape(-1, a_NX.shape[1], a_NX.shape[1]).sum(axis=1).reshape(-1)


def _factor(load_N: np.ndarray, rows: int) -> float:
  return int(load_N.max()) / rows


def _gathered(rows: Rows) -> Work:
  """Every token's row goes to every other device once."""
  N, M, K = rows.owner_NMK.shape
  load_N = _of_group(_counts(rows.owner_NMK, rows.degree))
  sent_N = np.full(N, M * (rows.degree - 1))
  return Work(sent_N, load_N, np.zeros(N, int), _factor(load_N, M * K))


def _one_a_pair(rows: Rows) -> Work:
  """A row goes out for each chosen expert of another device, as long as there is room for it.

  A buffer of `receive_capacity` times the mean takes rows in the order of the senders; each of
  `moe_chunks` parts of the tokens has its own.
  """
  (N, M, K), X, options = rows.owner_NMK.shape, rows.degree, rows.options
  if M % options.moe_chunks:
    raise ValueError(f"moe_chunks ({options.moe_chunks}) must divide the tokens of a device ({M})")
  chunk_rows = M // options.moe_chunks * K
  room = math.ceil(options.receive_capacity * chunk_rows)
  counts, kept = [], []
  for owner_NMK in np.split(rows.owner_NMK, options.moe_chunks, axis=1):
    counts_NX = _counts(owner_NMK, X)
    counts_GXX = counts_NX.reshape(-1, X, X)
    before_NX = (np.cumsum(counts_GXX, axis=1) - counts_GXX).reshape(N, X)
    counts.append(counts_NX)
    kept.append(np.clip(room - before_NX, 0, counts_NX))
  if options.dropless_fallback == "layer" and any((k < c).any() for k, c in zip(kept, counts)):
    kept = counts
  kept_NX, counts_NX = np.sum(kept, axis=0), np.sum(counts, axis=0)
  own_N = kept_NX[np.arange(N), np.arange(N) % X]
  factor = max(_factor(_of_group(c), chunk_rows) for c in counts)
  dropped_N = (counts_NX - kept_NX).sum(axis=1)
  return Work(kept_NX.sum(axis=1) - own_N, _of_group(kept_NX), dropped_N, factor)


def _one_a_group(rows: Rows) -> Work:
  """A row goes to a device of each group that has an expert of the token, and on from there.

  Every `devices_per_group` neighbours are a group; the device with the sender's number is gone to.
  """
  (N, M, K), X, per_group = rows.owner_NMK.shape, rows.degree, rows.options.devices_per_group
  hit_NMGO = _hit(rows).reshape(N, M, X // per_group, per_group)
  sent_N, load_N = np.zeros(N, int), _of_group(_counts(rows.owner_NMK, X))
  for n in range(N):
    group, number = n % X // per_group, n % per_group
    for g in range(X // per_group):
      hit_MO = hit_NMGO[n, :, g]
      sent_N[n] += 0 if g == group else int(hit_MO.any(axis=1).sum())
      middle = n - n % X + g * per_group + number
      sent_N[middle] += int(hit_MO.sum() - hit_MO[:, number].sum())
  return Work(sent_N, load_N, None, _factor(load_N, M * K))


def _equal_shares(rows: Rows) -> Work:
  """A row goes to the device that computes it by the plan of `shares`; copied weights are no rows."""
  (N, M, K), X, E = rows.owner_NMK.shape, rows.degree, rows.num_experts
  sent_N = np.zeros(N, int)
  for first in range(0, N, X):
    expert_P = rows.expert_NMK[first : first + X].astype(np.int32).reshape(-1)
    # The rank of a row among all of its expert, in the order of the devices.
    order_P, rank_P = np.argsort(expert_P, kind="stable"), np.empty(X * M * K, np.int32)
    counts_E = np.bincount(expert_P, minlength=E).astype(np.int32)
    starts_E = np.cumsum(counts_E) - counts_E
    rank_P[order_P] = np.arange(X * M * K) - starts_E[expert_P[order_P]]
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
      plan = shares.plan(jnp.asarray(counts_E), X)
      rows_P1 = (jnp.asarray(a[:, None]) for a in (expert_P, rank_P))
      device_XP = np.asarray(shares.device_of_rows(plan, *rows_P1)).reshape(X, M * K)
    sent_N[first : first + X] = (device_XP != np.arange(X)[:, None]).sum(axis=1)
  return Work(sent_N, np.full(N, M * K), np.zeros(N, int), 1.0)


# How the back ends of `dispatch` exchange rows, by their names there.
EXCHANGES: dict[str, Callable[[Rows], Work]] = {
  "dense": _gathered,
  "all_gather": _gathered,
  "ring": _gathered,
  "all_to_all": _one_a_pair,
  "hierarchical": _one_a_group,
  "replicated": _equal_shares,
}


def refused(name: str, degree: int, options: ExchangeConfig) -> str | None:
  """Returns why a back end cannot exchange rows among `degree` devices, or None if it can."""
  if name == "local" and degree > 1:
    return f"back end 'local' needs an expert degree of 1, got {degree}"
  if name == "hierarchical" and degree % options.devices_per_group:
    return (
      f"back end 'hierarchical' needs an expert degree ({degree}) that is divisible by "
      f"exchange.devices_per_group ({options.devices_per_group})"
    )
  return None


def work(
  name: str,
  expert_NMK: np.ndarray,
  num_experts: int,
  degree: int,
  options: ExchangeConfig = DEFAULTS,
) -> Work:
  """Returns what the devices do in one exchange.

  Args:
    name: of the back end, in `EXCHANGES`.
    expert_NMK: int [N, M, K], what tokens chose.
    num_experts: E.
    degree: X.
    options: of the exchange.
  """
  owner_NMK = owners(expert_NMK, num_experts, degree)
  return EXCHANGES[name](Rows(expert_NMK, owner_NMK, num_experts, degree, options))
