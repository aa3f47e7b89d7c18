"""Sweeps drawn from a known model: true means, offsets of seeds and noise."""

import numpy as np
from etils import epath

from dsmoe.sweeps.results import Trial


def trial(number: int, params: dict, seed: int, value: float | None, **values) -> Trial:
  state = "complete" if value is not None else "failed"
  known = {"state": state, "error": "", "seconds": 60.0, "flops": 1e12}
  workdir = epath.Path(f"trials/{number:04d}")
  return Trial(number, params, seed, value=value, workdir=workdir, **(known | values))


def trials(value_SK: np.ndarray, params: list[dict] | None = None) -> list[Trial]:
  """Returns complete trials of a matrix of losses; NaN: no trial."""
  params = params or [{"x": s} for s in range(len(value_SK))]
  pairs = [(s, k) for s, k in np.ndindex(*value_SK.shape) if not np.isnan(value_SK[s, k])]
  return [trial(n, params[s], k, float(value_SK[s, k])) for n, (s, k) in enumerate(pairs)]


def losses(rng, mean_S, num_seeds: int, seed_sd: float, run_sd) -> np.ndarray:
  """Draws losses [S, K]; run_sd is a number or one a setting [S]."""
  mean_S = np.asarray(mean_S, np.float64)
  offset_K = rng.normal(0, seed_sd, num_seeds)
  run_S = np.broadcast_to(run_sd, mean_S.shape)
  return mean_S[:, None] + offset_K + rng.normal(0, 1, (len(mean_S), num_seeds)) * run_S[:, None]
