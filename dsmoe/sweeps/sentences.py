"""What may be said about a sweep, in whole sentences that claim no more than the figures allow."""

import math
from collections.abc import Mapping
from typing import Any

from dsmoe.sweeps.effects import Effect
from dsmoe.sweeps.verdict import Difference, Ranking, Setting

_NOT_COUNTED = {
  "pruned": "pruned",
  "failed": "failed",
  "not finite": "ended without a finite loss",
  "running": "running",
  "interrupted": "interrupted",
  "waiting": "waiting",
}
_MOST_NAMED = 3


def name(params: Mapping[str, Any]) -> str:
  """Returns a setting in words: optim.learning_rate=0.003, model.n_group=4."""
  return ", ".join(f"{field}={text(value)}" for field, value in params.items()) or "the config"


def text(value: Any) -> str:
  """Returns a field's value; a float that takes more than 8 characters has 4 digits."""
  if isinstance(value, float) and len(repr(value)) > 8:
    return f"{value:.4g}"
  return f"{value:.6g}" if isinstance(value, float) else str(value)


def nats(value: float) -> str:
  """Returns a loss or a difference of losses with 4 decimals, or 2 digits where those are 0."""
  return f"{value:.4f}" if value == 0 or abs(value) >= 5e-4 else f"{value:.2g}"


def count(number: int, noun: str) -> str:
  """Returns `1 seed`, `2 seeds`, `1,000 seeds`."""
  return f"{number:,} {noun}" + ("" if number == 1 else "s")


def compute(seconds: float, flops: float) -> str:
  """Returns what runs used: 3.2 hours and 1.2e+15 FLOPs; NaN FLOPs are not known."""
  units = ((3600.0, "hours"), (60.0, "minutes"), (1.0, "seconds"))
  size, unit = next((pair for pair in units if seconds >= pair[0]), units[-1])
  used = f"{flops:.2e} FLOPs" if math.isfinite(flops) else "FLOPs that are not known"
  return f"{seconds / size:,.1f} {unit} and {used}"


def of_difference(difference: Difference) -> str:
  """Returns how much better or worse the first setting is, and whether that is beyond the noise."""
  first, second = difference.num_seeds
  seeds = f"{count(first, 'seed')} each"
  if first != second:
    seeds = f"{first} and {count(second, 'seed')}"
  if difference.num_paired:
    seeds += f", compared on the {count(difference.num_paired, 'seed')} of both"
  return _of_estimate(difference.estimate, difference.margin, difference.level, seeds)


def _of_estimate(estimate: float, margin: float, level: float, basis: str) -> str:
  word = "worse" if estimate > 0 else "better"
  size = abs(estimate)
  if not math.isfinite(margin):
    return f"{nats(size)} nats {word} (no interval: the noise is not known): not distinguishable"
  interval = f"{100 * level:.4g}% interval {nats(size - margin)} to {nats(size + margin)}, {basis}"
  said = "beyond the noise" if size > margin else "not distinguishable"
  return f"{nats(size)} nats {word} ({interval}): {said}"


def of_effect(effect: Effect) -> str:
  """Returns the effect of one field's value against another, with its interval, runs and compute."""
  what = f"{effect.field}={text(effect.value)} against {text(effect.other)}"
  basis = f"{count(effect.num_matched, 'matched pair')} of settings"
  said = _of_estimate(effect.estimate, effect.margin, effect.level, basis)
  used = f"{count(effect.num_runs, 'run')}, {compute(effect.seconds, effect.flops)}"
  if effect.num_lost:
    used += f"; {count(effect.num_lost, 'pair')} left out, without a complete trial on both sides"
  if effect.num_matched == 1:
    return f"{what}: {said}; with the other fields as they were in that pair only ({used})."
  spread = f"{nats(effect.smallest)} to {nats(effect.largest)}"
  pairs = f"worse in {effect.num_worse:,} of {effect.num_matched:,} pairs, by {spread}"
  return f"{what}: {said}; {pairs} ({used})."


def of_ranking(ranking: Ranking) -> list[str]:
  """Returns the verdict on a sweep: the best, what is tied with it, the noise, what was left out."""
  said = []
  if not ranking.ranked:
    said.append("No trial is complete with a finite loss, so nothing can be ranked.")
  else:
    said += [_of_best(ranking), _of_ties(ranking), _of_noise(ranking)]
  said += _of_left_out(ranking)
  return [sentence for sentence in said if sentence]


def _of_best(ranking: Ranking) -> str:
  best = ranking.ranked[0]
  seeds = count(len(best.setting.losses), "seed")
  if best.interval is None:
    seeds += ", no interval"
  else:
    low, high = best.interval
    seeds += f", {100 * ranking.level:.4g}% interval {nats(low)} to {nats(high)}"
  verb = "is lowest" if len(ranking.tied) == 1 and len(ranking.ranked) > 1 else "is at the top"
  return f"{name(best.setting.params)} {verb} with a mean loss of {nats(best.mean)} ({seeds})."


def _of_ties(ranking: Ranking) -> str:
  S, tied = len(ranking.ranked), ranking.tied
  if S == 1:
    return "It is the only setting with a complete trial, so it was compared with none."
  if len(tied) == 1:
    return (
      f"It is better than {'the other setting' if S == 2 else f'all {S - 1:,} others'} beyond the "
      f"noise; next comes {name(ranking.ranked[1].setting.params)}, "
      f"{of_difference(ranking.ranked[1].behind)}."
    )
  names = "; ".join(name(one.setting.params) for one in tied[1 : 1 + _MOST_NAMED])
  more = len(tied) - 1 - _MOST_NAMED
  names += f"; and {more:,} more" if more > 0 else ""
  return (
    f"{len(tied):,} of {S:,} settings are tied: any of them may be the best, and the noise does not "
    f"say which. Beside the first these are {names}."
  )


def _of_noise(ranking: Ranking) -> str:
  noise = ranking.noise
  if noise is None or len(ranking.ranked) == 1:
    return ""
  if noise.single is None:
    return (
      "No setting was run with two seeds, so the noise is not known and no difference can be told "
      "from it: run some of them with further seeds."
    )
  said = (
    f"The noise of one run, its standard deviation over seeds, is {nats(noise.single)} nats, "
    f"pooled over {count(int(noise.is_pooled_S.sum()), 'setting')} "
    f"({noise.single_df:.3g} degrees of freedom)"
  )
  if noise.paired is not None:
    said += f", and {nats(noise.paired)} without what all runs of a seed share"
  return f"{said}. The {100 * ranking.level:.4g}% intervals of the differences hold together (Bonferroni)."


def _of_left_out(ranking: Ranking) -> list[str]:
  found = [*(ranked.setting for ranked in ranking.ranked), *ranking.unranked]
  totals = {
    words: sum(setting.num_by_state.get(state, 0) for setting in found)
    for state, words in _NOT_COUNTED.items()
  }
  parts = [f"{count(number, 'trial')} {words}" for words, number in totals.items() if number]
  said = [f"Not counted in any mean: {', '.join(parts)}."] if parts else []
  partial = [ranked.setting for ranked in ranking.tied if lost(ranked.setting)]
  if partial:
    number = count(len(partial), "tied setting")
    said.append(
      f"{number} lost runs to pruning or failure, so the mean is of the runs that ended well and may "
      f"flatter: {'; '.join(name(setting.params) for setting in partial[:_MOST_NAMED])}."
    )
  if ranking.unranked:
    number = count(len(ranking.unranked), "setting")
    said.append(
      f"{number} without a complete trial cannot be ranked, and may be the best all the same."
    )
  return said


def lost(setting: Setting) -> int:
  """Returns how many of a setting's trials ended without a loss that counts."""
  return sum(setting.num_by_state.get(state, 0) for state in ("pruned", "failed", "not finite"))
