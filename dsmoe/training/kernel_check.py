"""Checks the compiled kernels of a run on the attached device before the run trusts them.

Each compiled kernel that the config chooses (or None chooses on this chip) runs once: values and
gradients, at the run's own widths, with fewer tokens and experts. Its results are compared with
those of its reference on the same device. Implementations in plain XLA are not checked.

Shapes: M tokens, D hidden, F inner, E experts, K experts a token; S tokens of a sequence, H heads,
A query and key dim, U value dim.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsmoe.config import Config, ModelConfig
from dsmoe.model import routing
from pallas_kernels import grouped_matmul, mla_attention, quantized_matmul
from pallas_kernels import routing as routing_kernels
from pallas_kernels.grouped_matmul import tile_table
from pallas_kernels.grouped_matmul.tpu_tiles import tile_rows
from pallas_kernels.mla_attention.api import chosen as chosen_attention
from pallas_kernels.quantized_matmul.experts import refusals as quantized_refusals
from pallas_kernels.routing import Routed

COMPILED = ("mosaic_tpu", "mosaic_gpu")
# At most so many, fewer where the run has fewer: several tiles of each kernel, the last partial.
ROUTED_TOKENS = 640
EXPERTS_TOKENS = 1400
NUM_EXPERTS = 5
ATTENTION_TOKENS = 4096
NUM_HEADS = 2
MATMUL_ROWS = 300

# The largest difference allowed, over the largest magnitude of the reference's result.
LIMITS = {
  "routing": 1e-4,  # elementwise in float32
  "float32": 1e-3,  # products of float32
  "bfloat16": 2e-2,  # products of bfloat16
  "fp8": 2e-2,  # a last digit decides between two E4M3 codes
}
# Two biased scores closer than this share of the larger one are not told apart by rounding alone.
MARGIN = 1e-5


class WrongKernelError(RuntimeError):
  """A compiled kernel did not run, or its results differ from its reference's."""


class Check(NamedTuple):
  """One kernel with what it is run on."""

  kernel: str
  implementation: str
  reference: str
  fallback: str  # the config field that goes without the kernel
  shapes: str  # for people
  limit: float
  results: Callable[..., dict[str, Any]]  # (implementation, *inputs) -> results by name
  inputs: tuple
  in_float32: bool = False  # whether the reference is given the inputs in float32


def check(config: Config) -> str | None:
  """Runs the chosen compiled kernels beside their references.

  Returns:
    A line that names the kernels checked; None where every choice is XLA's or a reference, and
    nothing ran.

  Raises:
    WrongKernelError: where a kernel does not run, an integer differs, or a number by more than
      its limit. One sentence names kernel, shapes and figures, and the config field to set.
  """
  start, checked = time.perf_counter(), []
  for each in _checks(config):
    _run(each)
    checked.append(f"{each.kernel} {each.implementation}")
  if not checked:
    return None
  return f"kernels checked: {', '.join(checked)} in {time.perf_counter() - start:.1f} s"


def _checks(config: Config) -> Iterator[Check]:
  """Yields the checks of those kernels that are compiled ones."""
  S, parts = config.data.sequence_length, config.mesh.model
  tokens = config.batch_size * S * parts // config.num_microbatches // jax.device_count()
  config = _of_one_part(config, parts)
  model = config.model
  found = [_attention(config)]
  if model.num_moe_layers:
    found.append(_routing(model, tokens))
  if model.num_moe_layers and model.dispatch != "dense":
    found.append((_experts if model.matmul_precision == "compute_dtype" else _fp8)(model, tokens))
  if model.matmul_precision != "compute_dtype":
    found.append(_fp8_matmul(model, tokens))
  yield from (build() for implementation, build in found if implementation in COMPILED)


def _of_one_part(config: Config, parts: int) -> Config:
  """Returns the config of what one device computes of dimensions split over the axis `model`."""
  split = ("num_attention_heads", "intermediate_size", "moe_intermediate_size")
  sizes = {name: -(-getattr(config.model, name) // parts) for name in split}
  return dataclasses.replace(
    config,
    model=dataclasses.replace(config.model, **sizes),
    mesh=dataclasses.replace(config.mesh, model=1),
  )


def _run(each: Check) -> None:
  """Raises WrongKernelError unless the kernel's results are those of the reference."""
  advice = f"set {each.fallback} to run without it"
  who = f"kernel {each.kernel} ({each.implementation}) on {jax.devices()[0].device_kind}"

  def results(implementation: str):
    return jax.jit(functools.partial(each.results, implementation))

  try:
    actual = jax.block_until_ready(results(each.implementation)(*each.inputs))
  except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
    reason = (str(error).strip().splitlines() or [repr(error)])[0]
    raise WrongKernelError(
      f"{who} could not be run with {each.shapes}: {reason}; {advice}"
    ) from error
  inputs = jax.tree.map(_to_float32, each.inputs) if each.in_float32 else each.inputs
  with jax.default_matmul_precision("highest"):
    expected = results(each.reference)(*inputs)
  figures = jax.device_get(differences(actual, expected))
  for name in sorted(figures, key=lambda name: name.startswith("gradient")):
    difference = figures[name]
    size = actual[name].size
    if jnp.issubdtype(actual[name].dtype, jnp.integer):
      how, limit = f"in {int(difference)} of {size} entries (limit 0)", 0.0
    else:
      how = f"by {difference:.1e} of the largest magnitude (limit {each.limit:.0e})"
      limit = each.limit
    if not difference <= limit:
      raise WrongKernelError(
        f"{who} is wrong: with {each.shapes}, {name} differs from the implementation "
        f"{each.reference!r} {how}; {advice}"
      )


@jax.jit
def differences(actual: dict[str, Any], expected: dict[str, Any]) -> dict[str, Any]:
  """Returns by name how many integers differ, or the largest difference over the largest value."""

  def one(a, b):
    if jnp.issubdtype(a.dtype, jnp.integer):
      return jnp.sum(a != b)
    a, b = _to_float32(a), _to_float32(b)
    # A maximum may pass over a NaN.
    difference = jnp.max(jnp.where(jnp.isfinite(a), jnp.abs(a - b), jnp.inf))
    return difference / jnp.maximum(jnp.max(jnp.abs(b)), 1e-30)

  return jax.tree.map(one, actual, expected)


def _to_float32(a):
  return a.astype(jnp.float32) if jnp.issubdtype(a.dtype, jnp.floating) else a


def _with_gradients(fn: Callable, names: tuple[str, ...], operands, dy) -> dict[str, Any]:
  """Returns the value of fn and its gradients, named after the operands."""
  y, vjp = jax.vjp(fn, *operands)
  gradients = vjp(dy.astype(y.dtype))
  return {"output": y} | {f"gradient of {n}": g for n, g in zip(names, gradients, strict=True)}


def _matmul_limit(dtype) -> float:
  """Returns the limit of products; TPUs multiply float32 as bfloat16 unless told otherwise."""
  exact = dtype == jnp.float32 and jax.default_backend() != "tpu"
  return LIMITS["float32" if exact else "bfloat16"]


def _normal(seed: int, *shape: int, dtype: Any = jnp.float32):
  """Draws values that keep the size of what they are multiplied with, if shape is a matrix's."""
  scale = shape[-2] ** -0.5 if len(shape) == 3 else 1.0
  return (scale * jax.random.normal(jax.random.key(seed), shape)).astype(dtype)


# Each of the following returns the implementation chosen, and how its check is made.


def _routing(model: ModelConfig, tokens: int):
  E, rule = model.n_routed_experts, routing.rule(model)
  implementation = routing_kernels.chosen(model.kernels.routing, E, rule)

  def build() -> Check:
    logits_ME, bias_E = _clear_choices(model, min(tokens, ROUTED_TOKENS))
    M, K = logits_ME.shape[0], rule.num_experts_per_tok

    def results(implementation, logits_ME, bias_E, dgate_MK):
      def gates(logits_ME):
        routed = routing_kernels.route(logits_ME, bias_E, rule, implementation)
        return routed.gate_MK, routed

      _, vjp, routed = jax.vjp(gates, logits_ME, has_aux=True)
      return routed._asdict() | {"gradient of logits_ME": vjp(dgate_MK)[0]}

    return Check(
      "routing",
      implementation,
      "reference",
      "model.kernels.routing=reference",
      f"{M} tokens and {K} of {E} experts",
      LIMITS["routing"],
      results,
      (logits_ME, bias_E, _normal(2, M, K)),
    )

  return implementation, build


def _clear_choices(model: ModelConfig, num_tokens: int):
  """Draws logits [M, E] and a bias [E] or None by which no choice hangs on rounding."""
  E, rule = model.n_routed_experts, routing.rule(model)
  rng = np.random.default_rng(0)
  logits_ME = rng.standard_normal((4 * num_tokens, E)).astype(np.float32)
  scores_ME = np.asarray(routing.scores(jnp.asarray(logits_ME), rule.scoring_func), np.float64)
  bias_E = None
  if model.topk_method == "noaux_tc":
    bias_E = (0.1 * rng.standard_normal(E)).astype(np.float32)
    scores_ME = scores_ME + bias_E[None]
  clear_M = margins(scores_ME, rule) > MARGIN * np.abs(scores_ME).max(axis=1)
  return jnp.asarray(logits_ME[clear_M][:num_tokens]), None if bias_E is None else jnp.asarray(
    bias_E
  )


def margins(biased_ME, rule: routing_kernels.Rule):
  """Returns the smallest difference of scores that a token's choice hangs on, float64 [M].

  Args:
    biased_ME: float64 scores with the bias added.
    rule: how tokens choose.
  """
  (M, E), G, K = biased_ME.shape, rule.n_group, rule.num_experts_per_tok
  margin_M = np.full(M, np.inf)
  if rule.topk_group < G:
    best = 2 if rule.group_score == "top2" else 1
    score_MG = np.sort(biased_ME.reshape(M, G, E // G), axis=2)[:, :, -best:].sum(axis=2)
    ranked_MG = np.sort(score_MG, axis=1)[:, ::-1]
    last_M = ranked_MG[:, rule.topk_group - 1]
    margin_M = last_M - ranked_MG[:, rule.topk_group]
    dropped_ME = np.repeat(score_MG < last_M[:, None], E // G, axis=1)
    biased_ME = np.where(dropped_ME, -np.inf, biased_ME)
  best_MK = np.sort(biased_ME, axis=1)[:, ::-1][:, : K + 1]
  return np.minimum(margin_M, (best_MK[:, :-1] - best_MK[:, 1:]).min(axis=1, initial=np.inf))


def _few_experts(model: ModelConfig, tokens: int):
  """Draws tokens, their choices among a few experts, weights, and the output's gradient."""
  dtype, D, F = jnp.dtype(model.compute_dtype), model.hidden_size, model.moe_intermediate_size
  M, E = min(tokens, EXPERTS_TOKENS), min(model.n_routed_experts, NUM_EXPERTS)
  used = np.arange(min(E - 1, 1), E, dtype=np.int32)  # the first one gets no token
  K = min(model.num_experts_per_tok, used.size)
  rng = np.random.default_rng(0)
  expert_MK = np.stack([rng.permutation(used)[:K] for _ in range(M)])
  rank_MK, counts_E = routing_kernels.ranks(jnp.asarray(expert_MK), E)
  gate_MK = jax.random.uniform(jax.random.key(1), (M, K), minval=0.1)
  weights = tuple(
    _normal(seed, *shape, dtype=dtype)
    for seed, shape in ((2, (E, D, F)), (3, (E, D, F)), (4, (E, F, D)))
  )
  x_MD, dy_MD = (_normal(seed, M, D, dtype=dtype) for seed in (5, 6))
  shapes = f"{M} tokens, {K} of {E} experts, {D} x {F}, {dtype.name}"
  return (x_MD, gate_MK, weights, expert_MK, counts_E, rank_MK, dy_MD), shapes


def _experts_results(apply: Callable) -> Callable:
  """Returns `Check.results` of experts; apply: (x, routed, weights, implementation) -> y."""

  def results(implementation, x_MD, gate_MK, weights, expert_MK, counts_E, rank_MK, dy_MD):
    def fn(x_MD, gate_MK, *weights):
      routed = Routed(expert_MK, gate_MK, counts_E, rank_MK)
      return apply(x_MD, routed, weights, implementation)

    names = ("x_MD", "gate_MK", "w_gate_EDF", "w_up_EDF", "w_down_EFD")
    return _with_gradients(fn, names, (x_MD, gate_MK, *weights), dy_MD)

  return results


def _experts(model: ModelConfig, tokens: int):
  dtype, D, F = jnp.dtype(model.compute_dtype), model.hidden_size, model.moe_intermediate_size
  kernels, E, P = model.kernels, model.n_routed_experts, tokens * model.num_experts_per_tok
  refusals = grouped_matmul.refusals(dtype, D, F, P / E)
  implementation = grouped_matmul.chosen(kernels.grouped_matmul, refusals)

  def build() -> Check:
    tile = None
    if implementation == "mosaic_tpu":  # that of the run, which has more rows an expert
      listed = tile_table.tile(kernels.tuned, implementation, P, E, D, F, dtype)
      tile = listed or tile_rows(P / E)

    def apply(x_MD, routed, weights, name):
      own_tile = tile if name == implementation else None
      return grouped_matmul.routed_swiglu(x_MD, routed, weights, name, own_tile)

    inputs, shapes = _few_experts(model, tokens)
    return Check(
      "grouped_matmul",
      implementation,
      "reference",
      "model.kernels.grouped_matmul=ragged_dot",
      shapes + (f", tiles of {tile} rows" if tile else ""),
      _matmul_limit(dtype),
      _experts_results(apply),
      inputs,
      in_float32=True,
    )

  return implementation, build


def _fp8(model: ModelConfig, tokens: int):
  dtype, D, F = jnp.dtype(model.compute_dtype), model.hidden_size, model.moe_intermediate_size
  named, power_of_two = model.quantization
  implementation = quantized_matmul.chosen(named, quantized_refusals(dtype, D, F))

  def apply(x_MD, routed, weights, name):
    return quantized_matmul.quantized_routed_swiglu(x_MD, routed, weights, name, power_of_two)

  def build() -> Check:
    inputs, shapes = _few_experts(model, tokens)
    return Check(
      "quantized_routed_swiglu",
      implementation,
      "xla",  # the reference would take minutes to compile at these widths
      "model.kernels.quantized_matmul=xla",
      shapes,
      LIMITS["fp8"],
      _experts_results(apply),
      inputs,
    )

  return implementation, build


def _fp8_matmul(model: ModelConfig, tokens: int):
  dtype, D, F = jnp.dtype(model.compute_dtype), model.hidden_size, model.intermediate_size
  named, power_of_two = model.quantization
  implementation = quantized_matmul.chosen(named)

  def build() -> Check:
    M = min(tokens, MATMUL_ROWS)
    w_DF = (D**-0.5 * _normal(2, D, F)).astype(dtype)

    def results(implementation, x_MD, w_DF, dy_MF):
      def fn(x_MD, w_DF):
        return quantized_matmul.quantized_matmul(x_MD, w_DF, implementation, power_of_two)

      return _with_gradients(fn, ("x_MD", "w_DF"), (x_MD, w_DF), dy_MF)

    return Check(
      "quantized_matmul",
      implementation,
      "xla",
      "model.kernels.quantized_matmul=xla",
      f"{M} rows, {D} x {F}, {dtype.name}",
      LIMITS["fp8"],
      results,
      (_normal(1, M, D, dtype=dtype), w_DF, _normal(3, M, F, dtype=dtype)),
    )

  return implementation, build


def _attention(config: Config):
  model, dtype = config.model, jnp.dtype(config.model.compute_dtype)
  S, X = config.data.sequence_length, config.mesh.context
  H, A, U = min(model.num_attention_heads, NUM_HEADS), model.qk_head_dim, model.v_head_dim
  q, v = (jax.ShapeDtypeStruct((1, S // X, H, size), dtype) for size in (A, U))
  implementation = chosen_attention(model.kernels.attention, q, v, 0 if X == 1 else 2)
  starts_Y, S = None, min(S, ATTENTION_TOKENS) if X == 1 else S
  if X > 1:  # the first device's two chunks, as long as the run's or multiples of 128 tokens
    chunk = min(S // (2 * X), 128 * max(ATTENTION_TOKENS // (256 * X), 1))
    starts_Y, S = np.array([0, (2 * X - 1) * chunk], np.int32), 2 * X * chunk
  packed = not config.data.cross_document_attention

  def results(implementation, q_BSHA, k_BSHA, v_BSHU, segments_BS, dout_BSHU):
    def fn(q_BSHA, k_BSHA, v_BSHU):
      return mla_attention.causal_attention(
        q_BSHA, k_BSHA, v_BSHU, segments_BS, A**-0.5, implementation, starts_Y=starts_Y
      )

    names = ("q_BSHA", "k_BSHA", "v_BSHU")
    return _with_gradients(fn, names, (q_BSHA, k_BSHA, v_BSHU), dout_BSHU)

  def build() -> Check:
    shapes = ((S // X, A), (S, A), (S, U), (S // X, U))
    q_BSHA, k_BSHA, v_BSHU, dout_BSHU = (
      _normal(i, 1, tokens, H, size, dtype=dtype) for i, (tokens, size) in enumerate(shapes, 1)
    )
    segments_BS = None
    if packed:  # two documents
      segments_BS = (jnp.arange(S, dtype=jnp.int32) >= 2 * S // 5).astype(jnp.int32)[None]
    return Check(
      "attention",
      implementation,
      "reference",
      "model.kernels.attention=xla",
      f"{S} tokens{f' over {X} devices' * (X > 1)}, {H} heads of {A} and {U}, {dtype.name}",
      _matmul_limit(dtype),
      results,
      (q_BSHA, k_BSHA, v_BSHU, segments_BS, dout_BSHU),
      in_float32=True,
    )

  return implementation, build
