"""Validation and choice of implementation for routing."""

from collections.abc import Callable

import jax.numpy as jnp

from pallas_kernels import platform
from pallas_kernels.routing import gpu, reference, tpu
from pallas_kernels.routing.reference import Routed, Rule

IMPLEMENTATIONS: dict[str, Callable] = {
  "reference": reference.route,
  "mosaic_tpu": tpu.route,
  "mosaic_gpu": gpu.route,
}


def _check(E: int, rule: Rule) -> None:
  G, K = rule.n_group, rule.num_experts_per_tok
  if rule.scoring_func not in reference.SCORING_FUNCS:
    raise ValueError(
      f"scoring_func must be one of {', '.join(reference.SCORING_FUNCS)}, got {rule.scoring_func!r}"
    )
  if rule.group_score not in ("top2", "max"):
    raise ValueError(f"group_score must be one of top2, max, got {rule.group_score!r}")
  if not 1 <= rule.topk_group <= G:
    raise ValueError(f"topk_group ({rule.topk_group}) must be between 1 and n_group ({G})")
  if E % G:
    raise ValueError(f"the number of experts ({E}) must be divisible by n_group ({G})")
  if not 1 <= K <= rule.topk_group * (E // G):
    raise ValueError(
      f"num_experts_per_tok ({K}) must be between 1 and the {rule.topk_group * (E // G)} experts of "
      f"topk_group ({rule.topk_group}) groups of {E // G}"
    )
  if rule.group_score == "top2" and rule.topk_group < G and E // G < 2:
    raise ValueError(f"group_score 'top2' needs groups of at least 2 experts, got {E // G}")


def chosen(implementation: str | None, E: int, rule: Rule) -> str:
  """Returns the implementation that None stands for here, or the one given, for E experts."""
  refusals = {"mosaic_tpu": lambda: tpu.refused(E), "mosaic_gpu": lambda: gpu.refused(rule)}
  return platform.choose(implementation, IMPLEMENTATIONS, "reference", refusals)


def route(logits_ME, bias_E, rule: Rule, implementation: str | None = None) -> Routed:
  """Chooses each token's experts and their gates, counts the loads, and ranks the tokens.

  Args:
    logits_ME: float32.
    bias_E: float32, added to the scores for selection only; no gradient; None for none.
    rule: how tokens choose.
    implementation: a key of `IMPLEMENTATIONS`; None: the compiled kernel on the chips listed in
      `pallas_kernels.platform` if it takes the rule, else `reference`.

  Returns:
    A `Routed`; only its gates have a gradient, to the logits.

  Raises:
    ValueError: for a rule that cannot be followed, shapes or dtypes that do not fit.

  Source: DeepSeek-V3 (arXiv:2412.19437) equations 12-16 and section 2.1.2.
  """
  if logits_ME.ndim != 2 or logits_ME.dtype != jnp.float32:
    raise ValueError(f"logits_ME must be float32 [M, E], got {logits_ME.dtype} {logits_ME.shape}")
  E = logits_ME.shape[1]
  _check(E, rule)
  if bias_E is not None and (bias_E.shape, bias_E.dtype) != ((E,), jnp.float32):
    raise ValueError(f"bias_E must be float32 [{E}], got {bias_E.dtype} {list(bias_E.shape)}")
  return IMPLEMENTATIONS[chosen(implementation, E, rule)](logits_ME, bias_E, rule)
