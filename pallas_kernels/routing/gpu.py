"""Routing for H100 (Mosaic GPU): the logits read once, no sort, no one-hot in memory.

A thread block takes TOKENS tokens, a warp a token at a time with the experts on its lanes. Scores
are compared as int32 keys of the same order, for which a warp has a reduction in one instruction;
the lowest expert of a tie is found by a second one. The block then counts, in token order, how
often each expert was chosen and how often before each choice. A sum over the blocks before,
in XLA, makes these ranks global; nothing depends on the order in which blocks run.

Shapes: M tokens, E experts, G groups, K experts a token, C blocks, T tokens of a block, R tokens
at once, J K rounded up.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_gpu import call, load
from pallas_kernels.routing.reference import Routed, Rule

TOKENS = 32  # T
AT_ONCE = 8  # R, at most 256 experts
LANES = 32
THREADS = 128

MOST_GROUPS = 31  # a bit each of an int32

REMOVED = -(2**31)  # a key below that of -inf

f32, i32 = jnp.float32, jnp.int32

# A row to a warp, a column to a lane.
ROWS = plgpu.Layout.TILED(
  plgpu.Tiling(((4, LANES), (1,))), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1
)


def _store(ref, value):
  """Stores lanes' numbers where they belong, though banks conflict."""
  if hasattr(plgpu, "store"):  # from jax 0.12; before, every store may
    plgpu.store(ref, value, optimized=False)
  else:
    ref[...] = value


def _strided(*shape: int):
  return plgpu.Layout.WG_STRIDED(shape=shape, vec_size=1)


def _columns(value_R, E: int):
  """[R] to [R, E]."""
  wide = jax.lax.broadcast_in_dim(value_R, (value_R.shape[0], E), (0,))
  return plgpu.layout_cast(wide, ROWS)


def _iota(shape, dimension: int, layout):
  return plgpu.broadcasted_iota(i32, shape, dimension, layout=layout)


def _bits(x):
  return jax.lax.bitcast_convert_type(x, i32)


def _floats(x):
  return jax.lax.bitcast_convert_type(x, f32)


def _flip(bits):
  """Between a float's bits and an int32 of the same order; its own inverse."""
  return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _scores(logits_RE, scoring_func: str):
  if scoring_func == "sigmoid":
    return 1 / (1 + jnp.exp(-logits_RE))
  if scoring_func == "softmax":
    exp_RE = jnp.exp(logits_RE - _columns(jnp.max(logits_RE, axis=1), logits_RE.shape[1]))
    return exp_RE / _columns(jnp.sum(exp_RE, axis=1), logits_RE.shape[1])
  # log(1 + u) loses what 1 + u rounds away, and the quotient has lost the same.
  u = jnp.exp(-jnp.abs(logits_RE))
  w = 1 + u
  softplus = jnp.maximum(logits_RE, 0) + jnp.where(
    w == 1, u, u * jnp.log(w) / jnp.maximum(w - 1, 1e-30)
  )
  return jnp.where(softplus > 0, softplus * jax.lax.rsqrt(jnp.maximum(softplus, 1e-38)), 0)


def _without(removed_RE, key_RE):
  """Returns the keys, REMOVED where told."""
  # The constant comes last: from a constant first, Mosaic GPU (jax 0.10 to 0.12) takes integers
  # for unsigned ones, and a later maximum finds REMOVED the largest.
  return jnp.where(~removed_RE, key_RE, REMOVED)


def _first_best(key_RE, down_RE):
  """Returns each row's largest key and the lowest column that holds it; down counts from the last."""
  best_R = jnp.max(key_RE, axis=1)
  down_R = jnp.max(jnp.where(key_RE == _columns(best_R, key_RE.shape[1]), down_RE, -1), axis=1)
  return best_R, down_R


def _limit_groups(key_RE, down_RE, column_RE, rule: Rule, E: int):
  """Sets the keys outside each row's best groups to -inf's, as `reference.limit_groups`."""
  G, size = rule.n_group, E // rule.n_group
  width = key_RE.shape[1]
  score = []
  for g in range(G):
    if size % LANES == 0:  # a group is whole registers
      own = slice(g * size, (g + 1) * size)
      group, down = key_RE[:, own], down_RE[:, own]
    else:
      mine = (column_RE >= g * size) & (column_RE < (g + 1) * size)
      group, down = jnp.where(mine, key_RE, REMOVED), down_RE
    best_R, down_R = _first_best(group, down)
    score_R = _floats(_flip(best_R))
    if rule.group_score == "top2":
      rest = _without(down == _columns(down_R, group.shape[1]), group)
      score_R = score_R + _floats(_flip(jnp.max(rest, axis=1)))
    score.append(score_R)
  kept_R = None  # a bit a group
  for g in range(G):
    better = [score[h] >= score[g] if h < g else score[h] > score[g] for h in range(G) if h != g]
    num_better = sum(b.astype(i32) for b in better)
    bit = jnp.where(num_better < rule.topk_group, 1 << g, 0)
    kept_R = bit if kept_R is None else kept_R | bit
  kept_RE = (_columns(kept_R, width) >> (column_RE // size)) & 1
  return jnp.where(kept_RE == 1, key_RE, _minus_infinity())


def _minus_infinity() -> int:
  return 0xFF800000 - 2**32 ^ 0x7FFFFFFF


def _choose(logits_RE, bias_RE, rule: Rule, E: int):
  """Returns each row's experts [R] and gates [R], K of each."""
  width = logits_RE.shape[1]
  scores_RE = _scores(logits_RE, rule.scoring_func)
  column_RE = _iota(scores_RE.shape, 1, ROWS)
  down_RE = width - 1 - column_RE
  key_RE = _flip(_bits(scores_RE + bias_RE))
  if rule.topk_group < rule.n_group:
    key_RE = _limit_groups(key_RE, down_RE, column_RE, rule, E)
  experts, gates = [], []
  for _ in range(rule.num_experts_per_tok):
    _, down_R = _first_best(key_RE, down_RE)
    chosen_RE = down_RE == _columns(down_R, width)
    key_RE = _without(chosen_RE, key_RE)
    experts.append(width - 1 - down_R)
    # Scores are not negative: their bits have their order.
    gates.append(_floats(jnp.max(jnp.where(chosen_RE, _bits(scores_RE), 0), axis=1)))
  if rule.norm_topk_prob:
    total_R = sum(gates[1:], gates[0]) + 1e-20
    gates = [gate / total_R for gate in gates]
  return experts, [gate * rule.routed_scaling_factor for gate in gates]


def _forward(rule: Rule, M: int, E: int, logits_hbm, bias_hbm, *refs):
  expert_hbm, gate_hbm, rank_hbm, counts_hbm, expert_smem, gate_smem = refs
  K, shape = rule.num_experts_per_tok, expert_smem.shape
  steps, R, J = shape
  last, width = logits_hbm.shape[0], logits_hbm.shape[2]
  block = jax.lax.axis_index("block")
  bias_E = load(bias_hbm, ROWS.reduce(0))
  bias_RE = jax.lax.broadcast_in_dim(bias_E, (R, width), (1,))
  bias_RE = plgpu.layout_cast(bias_RE, ROWS)
  nobody = plgpu.layout_cast(jnp.full((R,), -1, i32), ROWS.reduce(1))

  @pl.loop(0, steps)
  def _(step):
    rows = jnp.minimum(block * steps + step, last - 1)  # past the last: for nothing
    logits_RE = load(logits_hbm.at[rows], ROWS)
    experts, gates = _choose(logits_RE, bias_RE, rule, E)
    for k in range(K):
      _store(expert_smem.at[step, :, k], experts[k])
      _store(gate_smem.at[step, :, k], gates[k])
    for k in range(K, J):
      _store(expert_smem.at[step, :, k], nobody)

  spread = _strided(*shape)
  expert = plgpu.layout_cast(expert_smem[...], spread)
  token = _iota(shape, 0, spread) * R + _iota(shape, 1, spread)
  counted = counts_hbm.shape[1]
  expert_E = _iota((counted,), 0, _strided(counted))

  def count(t, carry):
    rank, counts_E = carry
    for k in range(K):
      its_expert = expert_smem[jax.lax.div(t, R), jax.lax.rem(t, R), k]
      rank = jnp.where((expert == its_expert) & (token > t), rank + 1, rank)
      counts_E = jnp.where(expert_E == its_expert, counts_E + 1, counts_E)
    return rank, counts_E

  nothing = (
    plgpu.layout_cast(jnp.zeros(shape, i32), spread),
    plgpu.layout_cast(jnp.zeros((counted,), i32), _strided(counted)),
  )
  T = steps * R
  rank, counts_E = jax.lax.fori_loop(0, jnp.minimum(T, M - block * T), count, nothing)
  expert_hbm[block] = expert
  gate_hbm[block] = plgpu.layout_cast(gate_smem[...], spread)
  rank_hbm[block] = rank
  counts_hbm[block] = counts_E


def _backward(rule: Rule, steps: int, logits_hbm, expert_hbm, dgate_hbm, dlogits_hbm):
  last, R, width = logits_hbm.shape
  block = jax.lax.axis_index("block")

  def column(hbm, rows, k):
    return load(hbm.at[rows, :, k], ROWS.reduce(1))

  def one_step(rows):
    logits_RE = load(logits_hbm.at[rows], ROWS)
    scores_RE = _scores(logits_RE, rule.scoring_func)
    column_RE = _iota((R, width), 1, ROWS)
    K = rule.num_experts_per_tok
    chosen = [column_RE == _columns(column(expert_hbm, rows, k), width) for k in range(K)]
    dgates = [column(dgate_hbm, rows, k) * rule.routed_scaling_factor for k in range(K)]
    if rule.norm_topk_prob:
      bits_RE = _bits(scores_RE)
      picked = [_floats(jnp.max(jnp.where(c, bits_RE, 0), axis=1)) for c in chosen]
      total_R = sum(picked[1:], picked[0]) + 1e-20
      products = [dgate * score for dgate, score in zip(dgates, picked)]
      along_R = sum(products[1:], products[0]) / total_R
      dgates = [(dgate - along_R) / total_R for dgate in dgates]
    dscores_RE = jnp.zeros((R, width), f32)
    for chosen_RE, dgate_R in zip(chosen, dgates):
      dscores_RE = jnp.where(chosen_RE, _columns(dgate_R, width), dscores_RE)
    if rule.scoring_func == "sigmoid":
      dlogits_RE = dscores_RE * scores_RE * (1 - scores_RE)
    elif rule.scoring_func == "softmax":
      mean_R = jnp.sum(dscores_RE * scores_RE, axis=1)
      dlogits_RE = scores_RE * (dscores_RE - _columns(mean_R, width))
    else:
      slope_RE = 1 / ((1 + jnp.exp(-logits_RE)) * 2 * jnp.maximum(scores_RE, 1e-19))
      dlogits_RE = dscores_RE * slope_RE
    _store(dlogits_hbm.at[rows], dlogits_RE)

  @pl.loop(0, steps)
  def _(step):
    rows = block * steps + step
    pl.when(rows < last)(lambda: one_step(rows))


def _plan(M: int, E: int):
  """Returns R, the steps of R tokens in a block, and the blocks."""
  R = AT_ONCE if E <= 256 else AT_ONCE // 2
  return R, TOKENS // R, pl.cdiv(M, TOKENS)


def _steps_of(a, R: int, width: int):
  """[M, n] to [M / R, R, width], padded with -inf: experts that no token chooses."""
  value = -jnp.inf if a.dtype == f32 else 0
  a = jnp.pad(a, [(0, -a.shape[0] % R), (0, width - a.shape[1])], constant_values=value)
  return a.reshape(-1, R, width)


def refused(rule: Rule) -> str | None:
  """Returns why the kernel does not take a rule, or None."""
  if rule.topk_group < rule.n_group and rule.n_group > MOST_GROUPS:
    return f"n_group ({rule.n_group}) must be at most {MOST_GROUPS} where groups are limited"
  return None


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def route(logits_ME, bias_E, rule: Rule) -> Routed:
  """See `api.route`. Token or expert counts that are no multiples of R or LANES cost a copy."""
  M, E = logits_ME.shape
  K = rule.num_experts_per_tok
  if broken := refused(rule):
    raise ValueError(broken)
  J = pl.cdiv(K * TOKENS, THREADS) * THREADS // TOKENS
  R, steps, C = _plan(M, E)
  width = pl.cdiv(E, LANES) * LANES
  bias_E = jnp.zeros(E, f32) if bias_E is None else bias_E
  bias_E = jnp.pad(bias_E, (0, width - E), constant_values=-jnp.inf)
  operands = [_steps_of(logits_ME, R, width), bias_E]
  out = jax.ShapeDtypeStruct
  each, counted = (C, steps, R, J), pl.cdiv(width, THREADS) * THREADS
  expert, gate, rank, counts_CE = call(
    functools.partial(_forward, rule, M, E),
    "routing",
    operands,
    [out(each, i32), out(each, f32), out(each, i32), out((C, counted), i32)],
    {"block": C},
    [plgpu.SMEM(each[1:], i32), plgpu.SMEM(each[1:], f32)],
  )
  tokens = lambda a: a.reshape(C * TOKENS, J)[:M, :K]  # noqa: E731
  last_CE = jnp.cumsum(counts_CE, axis=0)
  expert_MK = tokens(expert)
  block_M1 = jnp.arange(M, dtype=i32)[:, None] // TOKENS
  before_MK = (last_CE - counts_CE)[block_M1, expert_MK]
  return Routed(expert_MK, tokens(gate), last_CE[-1, :E], tokens(rank) + before_MK)


def _route_fwd(logits_ME, bias_E, rule):
  routed = route(logits_ME, bias_E, rule)
  return routed, (logits_ME, bias_E, routed.expert_MK)


def _route_bwd(rule, saved, dout: Routed):
  logits_ME, bias_E, expert_MK = saved
  M, E = logits_ME.shape
  K = rule.num_experts_per_tok
  R, steps, C = _plan(M, E)
  width = pl.cdiv(E, LANES) * LANES
  operands = [
    _steps_of(a, R, n) for a, n in [(logits_ME, width), (expert_MK, K), (dout.gate_MK, K)]
  ]
  dlogits = call(
    functools.partial(_backward, rule, steps),
    "routing_gradient",
    operands,
    jax.ShapeDtypeStruct(operands[0].shape, f32),
    {"block": C},
  )
  dlogits_ME = dlogits.reshape(-1, width)[:M, :E]
  return dlogits_ME, None if bias_E is None else jnp.zeros_like(bias_E)


route.defvjp(_route_fwd, _route_bwd)
