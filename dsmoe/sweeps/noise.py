"""How much two runs of one setting differ, and what that says of the difference of two settings.

A setting is one assignment of the searched fields. Final losses stand in a matrix [S, K] of S settings and K
seeds, NaN where a setting was not run with a seed. Two models of noise are used. `single`: a run is
its setting's mean plus noise. `paired`: runs of one seed also share an offset (the same initial
weights and the same order of the data make all of them a little better or worse), which cancels in
the difference of two settings on the same seeds. Where settings share seeds, `single` rests on fewer
independent draws than runs: its degrees of freedom are Satterthwaite's.

Source: pooled variances and two-way layouts without interaction are classical analysis of variance
(H. Scheffé, The Analysis of Variance, 1959); F. E. Satterthwaite, "An approximate distribution of
estimates of variance components", Biometrics Bulletin 2, 1946.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import special

MANY_SEEDS = 8  # from so many on, a setting's own noise is used, not the pooled one
_LEAST_PAIRED_DF = 2
_LEAST_CORE_DF = 4
_POOLED_REACH = 10.0  # noise is pooled over settings this close to the best, in units of noise


class Noise(NamedTuple):
  """The noise of one run of a sweep, in the unit of its values.

  `single` is None if no setting was run with two seeds, and `paired` if too few were run with the
  same seeds; no interval can then be had that way.
  """

  single: float | None  # standard deviation of a run around its setting's mean
  single_df: float  # degrees of freedom
  paired: float | None  # standard deviation of what is left without the offset of the seed
  paired_df: int
  is_pooled_S: np.ndarray  # bool [S], the settings that both were estimated from
  own_S: np.ndarray  # float64 [S], each setting's own standard deviation; NaN with one seed
  offset_K: np.ndarray  # float64 [K], what the runs of a seed share; 0 where it is not known


class Differences(NamedTuple):
  """Each of R settings minus each of S settings, [R, S] each."""

  estimate_RS: np.ndarray  # float64
  margin_RS: np.ndarray  # float64; half the interval's width, infinite where nothing is known
  num_paired_RS: np.ndarray  # int64; the seeds of both it was taken on, 0: each on its own seeds
  is_own_RS: np.ndarray  # bool; whether the noise is the two settings' own, not the pooled one


def quantile(df, tail: float):
  """Returns where Student's t has the probability `tail` above it; infinite for df of 0."""
  df = np.asarray(df, np.float64)
  return np.where(df > 0, -special.stdtrit(np.maximum(df, 1.0), tail), np.inf)


def estimate(value_SK: np.ndarray) -> Noise:
  """Estimates the noise of one run.

  It is pooled over the settings with two seeds or more that are close to the best: the noise of
  settings that are far worse, such as of a learning rate that nearly diverges, says little about good
  ones. They are chosen by their means, which are independent of their variances where the noise is
  normal, so that the choice does not bias the estimate.

  Args:
    value_SK: float64 [S, K], NaN where there is no run. Each setting has one run at least.
  """
  has_SK = ~np.isnan(value_SK)
  num_S = has_SK.sum(axis=1)
  mean_S = np.nanmean(value_SK, axis=1)
  square_S = np.nansum((value_SK - mean_S[:, None]) ** 2, axis=1)
  own_S = np.sqrt(np.divide(square_S, num_S - 1, out=np.full(len(num_S), np.nan), where=num_S > 1))
  is_pooled_S = _close_to_the_best(mean_S, square_S, num_S)
  num = int((num_S[is_pooled_S] - 1).sum())
  if not num:
    return Noise(None, 0, None, 0, is_pooled_S, own_S, np.zeros(value_SK.shape[1]))
  single = float(np.sqrt(square_S[is_pooled_S].sum() / num))
  value_N, design_NK = _without_means(value_SK[is_pooled_S])
  offset_K, _, rank, _ = np.linalg.lstsq(design_NK, value_N, rcond=None)
  paired, paired_df = None, num - int(rank)
  if paired_df < _LEAST_PAIRED_DF:
    offset_K = np.zeros(value_SK.shape[1])
  else:
    paired = float(np.sqrt(((value_N - design_NK @ offset_K) ** 2).sum() / paired_df))
  single_df = _satterthwaite(design_NK, num, single, paired)
  return Noise(single, single_df, paired, paired_df, is_pooled_S, own_S, offset_K)


def _close_to_the_best(mean_S, square_S, num_S) -> np.ndarray:
  """Returns bool [S], of the settings with two seeds those whose noise is pooled."""
  is_repeated_S = num_S > 1
  order = np.flatnonzero(is_repeated_S)
  order = order[np.argsort(mean_S[order], kind="stable")]
  core = order[: (len(order) + 1) // 2]
  df = (num_S[core] - 1).sum()
  if df < _LEAST_CORE_DF:
    return is_repeated_S
  reach = _POOLED_REACH * np.sqrt(square_S[core].sum() / df)
  is_close_S = is_repeated_S & (mean_S <= mean_S[core[0]] + reach)
  is_close_S[core] = True
  return is_close_S


def _without_means(value_SK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns each run's loss [N] and its seed as a column of ones and zeros [N, K].

  Each setting's mean is taken off both (Frisch, Waugh and Lovell), so that least squares over seeds
  alone is that over settings and seeds.
  """
  has_SK = ~np.isnan(value_SK)
  rows, seeds = np.nonzero(has_SK)
  share_SK = has_SK / has_SK.sum(axis=1, keepdims=True)
  mean_S = np.nansum(value_SK * share_SK, axis=1)
  design_NK = np.eye(value_SK.shape[1])[seeds] - share_SK[rows]
  return value_SK[rows, seeds] - mean_S[rows], design_NK


def _satterthwaite(design_NK: np.ndarray, num: int, single: float, paired: float | None) -> float:
  """Returns the degrees of freedom of the pooled variance single**2 from `num` deviations.

  They are (tr AV)**2 / tr AVAV, where A takes the settings' means off the runs, and V is the runs'
  covariance: paired**2, and for runs of one seed single**2 - paired**2. Where that split is not known,
  all of the noise is taken for the seeds', which gives the fewest degrees of freedom.
  """
  if single == 0:
    return float(num)
  rest = min((paired or 0.0) / single, 1.0) ** 2
  seeds = 1.0 - rest
  gram_KK = design_NK.T @ design_NK  # its trace is num
  squares = seeds**2 * (gram_KK**2).sum() + 2 * seeds * rest * num + rest**2 * num
  return float(num**2 / squares)


def differences(
  value_SK: np.ndarray, noise: Noise, tail: float, rows: Sequence[int] | np.ndarray
) -> Differences:
  """Compares the settings of R rows with every setting, themselves included.

  On the seeds that both ran, where those are at least half of the seeds of the one with fewer;
  otherwise as two independent means. The noise is pooled, but the two settings' own where both have
  MANY_SEEDS (for the paired difference, in common; for independent means, Welch's interval). A
  setting that was not pooled because it is far worse counts with its own noise where that is larger.

  Args:
    value_SK: float64 [S, K], NaN where there is no run.
    noise: of `estimate`.
    tail: the probability that is left outside each end of an interval.
    rows: the settings that are compared; memory is in proportion to R * S * K.
  """
  rows = np.asarray(rows, np.int64)
  num_S = (~np.isnan(value_SK)).sum(axis=1)
  mean_S = np.nanmean(value_SK, axis=1)
  apart_RSK = value_SK[rows, None] - value_SK
  common_RS = (~np.isnan(apart_RSK)).sum(axis=2)
  fewer_RS = np.minimum(num_S[rows, None], num_S)
  is_paired_RS = (2 * common_RS >= fewer_RS) & (noise.paired is not None)
  paired_RS = np.nansum(apart_RSK, axis=2) / np.maximum(common_RS, 1)
  estimate_RS = np.where(is_paired_RS, paired_RS, mean_S[rows, None] - mean_S)
  variance_RS = _pooled_variance(noise, rows, num_S, common_RS, is_paired_RS)
  paired, single = quantile(noise.paired_df, tail), quantile(noise.single_df, tail)
  quantile_RS = np.where(is_paired_RS, paired, single)
  is_own_RS = np.where(is_paired_RS, common_RS, fewer_RS) >= MANY_SEEDS
  for r, s in np.argwhere(is_own_RS):
    apart_K = apart_RSK[r, s][~np.isnan(apart_RSK[r, s])] if is_paired_RS[r, s] else None
    pair = (num_S[rows[r]], noise.own_S[rows[r]], num_S[s], noise.own_S[s])
    variance_RS[r, s], df = _own_variance(apart_K, *pair)
    quantile_RS[r, s] = quantile(df, tail)
  known_RS = np.isfinite(quantile_RS)
  margin_RS = np.where(known_RS, np.where(known_RS, quantile_RS, 0) * np.sqrt(variance_RS), np.inf)
  itself = (np.arange(len(rows)), rows)
  estimate_RS[itself] = margin_RS[itself] = 0.0
  return Differences(estimate_RS, margin_RS, np.where(is_paired_RS, common_RS, 0), is_own_RS)


def _pooled_variance(noise: Noise, rows, num_S, common_RS, is_paired_RS):
  """Returns the variance of the differences [R, S]."""
  own_S = np.where(noise.is_pooled_S, 0.0, np.nan_to_num(noise.own_S))
  single_S = np.maximum(own_S, noise.single or 0.0) ** 2 / num_S
  paired_S = np.maximum(own_S, noise.paired or 0.0) ** 2
  of_common_RS = (paired_S[rows, None] + paired_S) / np.maximum(common_RS, 1)
  return np.where(is_paired_RS, of_common_RS, single_S[rows, None] + single_S)


def _own_variance(apart_K, num_a, own_a, num_b, own_b) -> tuple[float, float]:
  """Returns a difference's variance and degrees of freedom from its two settings alone.

  Args:
    apart_K: the differences on the seeds of both; None for independent means.
    num_a, own_a, num_b, own_b: the number of runs and the standard deviation of each.
  """
  if apart_K is not None:
    return float(apart_K.var(ddof=1) / len(apart_K)), len(apart_K) - 1.0
  a, b = own_a**2 / num_a, own_b**2 / num_b
  below = a**2 / (num_a - 1) + b**2 / (num_b - 1)
  return a + b, float((a + b) ** 2 / below) if below else float(num_a + num_b - 2)


def interval(value_K: np.ndarray, noise: Noise, s: int, tail: float) -> tuple[float, float] | None:
  """Returns the interval of setting s's mean over seeds; None with one seed or unknown noise.

  The noise is that of `differences` for independent means.
  """
  num = len(value_K)
  if num < 2 or noise.single is None:
    return None
  deviation, df = noise.single, noise.single_df
  if num >= MANY_SEEDS:
    deviation, df = noise.own_S[s], num - 1
  elif not noise.is_pooled_S[s]:
    deviation = max(deviation, noise.own_S[s])
  margin = float(quantile(df, tail)) * deviation / np.sqrt(num)
  mean = float(np.mean(value_K))
  return mean - margin, mean + margin
