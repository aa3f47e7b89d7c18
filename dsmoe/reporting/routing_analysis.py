"""What a routing trace says about experts: load, pairs, overlap of layers and of domains, groups.

A domain is a source of the training data, an entry of `data.train_globs`; every row of a batch comes
from one. Definitions:

  MaxVio            largest load over mean load, minus 1 (arXiv:2408.15664)
  dead, starved     experts without a token; below 10% of the mean load, dead ones included
  co-activation     tokens that chose both of two experts of a layer; their `lift` is that number
                    over the one to expect if tokens chose the two independently
  layer overlap     of layer a with layer b: for each expert of a that has tokens, the largest
                    |tokens of both| / |tokens of either| with an expert of b; the mean of these.
                    Numbers of experts mean nothing across layers, so the best match is taken. Beside
                    it what independent choices give, with the numbers of both layers' tokens
  domain overlap    of two domains in a layer: sum over experts of the smaller of the two shares of
                    choices that go to it; 1: routed alike, 0: no expert in common
  groups a token    in how many groups of neighbouring experts a token's choices lie; where each
                    group lives on a node of its own, these are the nodes that a token is sent to

Shapes: L MoE layers, M tokens, K experts a token, E experts, D domains, G groups.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dsmoe.data import position
from dsmoe.reporting import metrics, routing_trace

MOST_TOKENS = 2**16  # whose overlaps of layers are counted, spread evenly over the trace


class Domains(NamedTuple):
  """The domains of a trace's tokens."""

  names: tuple[str, ...]
  domain_M: np.ndarray  # int64, in the order of the trace


class Analysis(NamedTuple):
  """What `analyze` finds in a trace."""

  counts_LE: np.ndarray  # int64, tokens of each expert
  load: dict[str, np.ndarray]  # of `metrics.load_statistics`
  pairs_LEE: np.ndarray  # int64, tokens that chose both; on the diagonal those of the expert
  layer_overlap_LL: np.ndarray  # float64; [a, b] of layer a with layer b
  chance_overlap_LL: np.ndarray  # float64, the same for independent choices
  overlap_tokens: int  # of which the two above are
  groups_LG: np.ndarray | None  # int64; [l, n] tokens with choices in n + 1 groups
  domains: Domains | None
  domain_counts_LDE: np.ndarray | None  # int64, tokens of each domain and expert
  domain_overlap_LDD: np.ndarray | None  # float64


def analyze(
  trace: routing_trace.Trace, num_groups: int | None = None, domains: Domains | None = None
) -> Analysis:
  """Analyses a trace.

  Args:
    trace: of a step.
    num_groups: groups of equally many neighbouring experts; None: they are not known.
    domains: of the trace's tokens; None: they are not known.

  Raises:
    ValueError: for a trace without tokens or with experts that do not exist; when the groups do
      not divide the experts, or the domains are not those of as many tokens.
  """
  E, (_, M, _) = trace.num_experts, trace.expert_LMK.shape
  expert_LMK = trace.expert_LMK.astype(np.int64)
  if not expert_LMK.size or expert_LMK.max() >= E:
    raise ValueError(
      f"a trace must have tokens whose experts are below {E}, got {M} tokens and experts up to "
      f"{expert_LMK.max(initial=0)}"
    )
  if num_groups is not None and (num_groups < 1 or E % num_groups):
    raise ValueError(f"groups ({num_groups}) must be at least 1 and divide the {E} experts")
  if domains is not None and domains.domain_M.shape != (M,):
    raise ValueError(
      f"there must be a domain for each of {M} tokens, got {domains.domain_M.shape[0]}"
    )
  counts_LE = np.stack([np.bincount(e_MK.ravel(), minlength=E) for e_MK in expert_LMK])
  few_LMK = expert_LMK[:, :: -(-M // MOST_TOKENS)]
  overlap_LL, chance_LL = layer_overlap(few_LMK, E)
  domain_counts_LDE = domain_overlap_LDD = None
  if domains is not None:
    domain_counts_LDE = domain_counts(expert_LMK, domains, E)
    domain_overlap_LDD = np.stack([shared(counts_DE) for counts_DE in domain_counts_LDE])
  return Analysis(
    counts_LE,
    metrics.load_statistics(counts_LE),
    np.stack([pairs(e_MK, e_MK, E) for e_MK in expert_LMK]),
    overlap_LL,
    chance_LL,
    few_LMK.shape[1],
    None if num_groups is None else groups_touched(expert_LMK, E, num_groups),
    domains,
    domain_counts_LDE,
    domain_overlap_LDD,
  )


def pairs(one_MK: np.ndarray, other_MK: np.ndarray, num_experts: int) -> np.ndarray:
  """Returns int64 [E, E], the tokens that chose an expert in one layer and one in another."""
  total_EE = np.zeros(num_experts**2, np.int64)
  for one_M, other_M in itertools.product(one_MK.T, other_MK.T):
    total_EE += np.bincount(one_M * num_experts + other_M, minlength=num_experts**2)
  return total_EE.reshape(num_experts, num_experts)


def lift(pairs_EE: np.ndarray, num_tokens: int) -> np.ndarray:
  """Returns float64 [E, E], co-activation over that of independent choices; NaN without tokens."""
  counts_E = np.diagonal(pairs_EE).astype(np.float64)
  expected_EE = np.outer(counts_E, counts_E) / num_tokens
  return pairs_EE / np.where(expected_EE > 0, expected_EE, np.nan)


def layer_overlap(expert_LMK: np.ndarray, num_experts: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns float64 [L, L] twice: the overlap of layers, and that of independent choices."""
  L, M, _ = expert_LMK.shape
  counts = [np.bincount(e_MK.ravel(), minlength=num_experts) for e_MK in expert_LMK]
  overlap_LL, chance_LL = np.ones((L, L)), np.ones((L, L))
  for a, b in itertools.combinations(range(L), 2):
    both_EE = pairs(expert_LMK[a], expert_LMK[b], num_experts)
    expected_EE = np.outer(counts[a], counts[b]) / M
    for found_LL, shared_EE in ((overlap_LL, both_EE), (chance_LL, expected_EE)):
      either_EE = counts[a][:, None] + counts[b][None, :] - shared_EE
      share_EE = shared_EE / np.where(either_EE > 0, either_EE, 1)
      found_LL[a, b] = share_EE.max(axis=1)[counts[a] > 0].mean()
      found_LL[b, a] = share_EE.max(axis=0)[counts[b] > 0].mean()
  return overlap_LL, chance_LL


def groups_touched(expert_LMK: np.ndarray, num_experts: int, num_groups: int) -> np.ndarray:
  """Returns int64 [L, G]: in [l, n] the tokens whose choices lie in n + 1 groups."""
  group_LMK = np.sort(expert_LMK // (num_experts // num_groups), axis=2)
  number_LM = 1 + (np.diff(group_LMK, axis=2) > 0).sum(axis=2)
  return np.stack([np.bincount(n_M - 1, minlength=num_groups) for n_M in number_LM])


def domain_counts(expert_LMK: np.ndarray, domains: Domains, num_experts: int) -> np.ndarray:
  """Returns int64 [L, D, E], the tokens of each domain that chose each expert."""
  D = len(domains.names)
  key_LMK = domains.domain_M[None, :, None] * num_experts + expert_LMK
  flat = [np.bincount(key_MK.ravel(), minlength=D * num_experts) for key_MK in key_LMK]
  return np.stack(flat).reshape(len(flat), D, num_experts)


def shared(counts_DE: np.ndarray) -> np.ndarray:
  """Returns float64 [D, D], the overlap of domains; NaN for one without tokens."""
  total_D1 = counts_DE.sum(axis=1, keepdims=True)
  share_DE = counts_DE / np.where(total_D1 > 0, total_D1, np.nan)
  return np.minimum(share_DE[:, None], share_DE[None, :]).sum(axis=2)


def domains_of(trace: routing_trace.Trace, data: Mapping[str, Any]) -> Domains | None:
  """Returns the domains of a trace's tokens; None where the data has one source only.

  They follow from the config if the run read its data in order with it from the first step on: the
  caller must know that the run neither changed its config nor went back past a bad step.

  Args:
    trace: of a step.
    data: the group `data` of the run's config.json.

  Raises:
    ValueError: when there is no such config, or rows of another length.
  """
  try:
    globs, weights = data["train_globs"], [float(weight) for weight in data["train_weights"]]
    length = int(data["sequence_length"])
    if not (len(globs) == len(weights) and all(weight > 0 for weight in weights)):
      raise ValueError(f"train_weights {weights} are not those of train_globs {globs}")
  except (KeyError, TypeError, ValueError) as error:
    raise ValueError(f"the config must say what the rows were drawn from: {error!r}") from error
  if length != trace.sequence_length:
    raise ValueError(
      f"the config's sequence_length ({length}) must be that of the trace ({trace.sequence_length})"
    )
  if len(globs) < 2:
    return None
  first = (trace.step - 1) * trace.num_rows
  before_RD = np.array(
    [position.rows_of_sources(first + r, weights) for r in range(trace.num_rows + 1)]
  )
  source_R = np.diff(before_RD, axis=0).argmax(axis=1)
  return Domains(tuple(map(str, globs)), np.repeat(source_R, trace.sequence_length))


def strongest_pairs(analysis: Analysis, layer: int, most: int) -> list[tuple[int, int, int, float]]:
  """Returns (expert, expert, tokens that chose both, lift) of a layer's commonest pairs."""
  pairs_EE = analysis.pairs_LEE[layer]
  tokens = num_tokens(analysis, layer)
  lift_EE = lift(pairs_EE, tokens)
  e_P, f_P = np.triu_indices(len(pairs_EE), k=1)
  order_P = np.argsort(-pairs_EE[e_P, f_P], kind="stable")[:most]
  chosen = [(int(e_P[p]), int(f_P[p])) for p in order_P if pairs_EE[e_P[p], f_P[p]] > 0]
  return [(e, f, int(pairs_EE[e, f]), float(lift_EE[e, f])) for e, f in chosen]


def num_tokens(analysis: Analysis, layer: int) -> int:
  """Returns M: a layer's pairs sum to M K^2, its counts to M K."""
  chosen = int(analysis.counts_LE[layer].sum())
  return chosen * chosen // int(analysis.pairs_LEE[layer].sum())


def mean_groups(groups_LG: np.ndarray) -> np.ndarray:
  """Returns float64 [L], the groups of a token in the mean."""
  return groups_LG @ np.arange(1, groups_LG.shape[1] + 1) / groups_LG.sum(axis=1)


def to_dict(analysis: Analysis) -> dict[str, Any]:
  """Returns plain values for JSON; NaN becomes None."""
  found: dict[str, Any] = {"expert_counts": analysis.counts_LE, **analysis.load}
  found |= {"pairs": analysis.pairs_LEE, "layer_overlap": analysis.layer_overlap_LL}
  found |= {"layer_overlap_of_independent_choices": analysis.chance_overlap_LL}
  found |= {"layer_overlap_tokens": analysis.overlap_tokens}
  if analysis.groups_LG is not None:
    found |= {"tokens_by_groups": analysis.groups_LG}
    found |= {"groups_per_token": mean_groups(analysis.groups_LG)}
  if analysis.domains is not None:
    found |= {"domains": list(analysis.domains.names)}
    found |= {"domain_counts": analysis.domain_counts_LDE}
    found |= {"domain_overlap": analysis.domain_overlap_LDD}
  return {name: _plain(value) for name, value in found.items()}


def _plain(value: Any) -> Any:
  if isinstance(value, np.ndarray) and value.dtype.kind == "f":
    return np.where(np.isfinite(value), value, np.array(None)).tolist()
  return value.tolist() if isinstance(value, np.ndarray) else value


def shown_layers(num_layers: int, most: int) -> Sequence[int]:
  """Returns at most so many layers, spread evenly, the first and the last among them."""
  if num_layers <= most:
    return range(num_layers)
  return sorted({round(i * (num_layers - 1) / (most - 1)) for i in range(most)})
