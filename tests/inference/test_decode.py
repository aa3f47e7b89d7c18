"""Prefill and decode over the cache against full forward passes, token for token."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from dsmoe import config as config_lib
from dsmoe import model as model_lib
from dsmoe.inference import cache, decode, forward, sampling
from dsmoe.inference.cached_attention import Place, expanded, in_latent_space
from dsmoe.inference.sampling import Sampling
from dsmoe.model import moe, routing
from dsmoe.parallel import dispatch
from pallas_kernels.mla_attention import api as mla_api
from tests import oracles
from tests.helpers import TOLERANCE, assert_close, random_model, random_parts, small_config
from tests.huggingface import cases

CONFIG = small_config(
  **{
    "model.num_hidden_layers": 3,
    "model.first_k_dense_replace": 1,
    "model.num_nextn_predict_layers": 1,
    "model.max_position_embeddings": 256,
  }
)
V = CONFIG.model.vocab_size


@functools.cache
def _prepared(speculate=False):
  _, params, bias = random_parts(CONFIG, 0)
  return forward.prepare(CONFIG.model, params, bias, speculate)


def _record_routing(monkeypatch):
  """Collects each MoE layer's experts, as values."""
  seen = []
  route = routing.route

  def recorded(*args):
    routed = route(*args)
    jax.debug.callback(lambda e: seen.append(np.asarray(e)), routed.expert_MK, ordered=True)
    return routed

  monkeypatch.setattr(moe.routing, "route", recorded)
  return seen


def _forward(arch, attend):
  """A fresh compiled forward pass, with the logits of every position."""

  @jax.jit
  def run(weights, kept, tokens, place):
    hidden, kept = forward.forward(arch, weights, kept, tokens, place, attend)
    return forward.head(weights, hidden), kept

  return run


def _place(first, count, pages=24):
  """Two rows with interleaved pages, so that neither lies in one piece."""
  table = np.arange(2 * pages, dtype=np.int32).reshape(pages, 2).T
  return Place(jnp.asarray(table), jnp.asarray(first), jnp.asarray(count))


@pytest.mark.parametrize(
  "implementation", [None, "xla", pytest.param("mosaic_tpu", marks=pytest.mark.slow)]
)
def test_prefill_in_parts_and_decoding_equal_a_full_pass_at_every_position(
  monkeypatch, implementation
):
  """Over a block's end (128 tokens), rows of different lengths, one or two tokens at a time."""
  assert cache.BLOCK_PAGES * cache.PAGE_TOKENS == 128
  # Other implementations of decoding are slow to interpret: their own suite has several blocks.
  lengths, total = ((112, 144), 160) if implementation is None else ((21, 33), 40)
  tokens = np.random.default_rng(0).integers(0, V, (2, total)).astype(np.int32)
  jax.clear_caches()  # what was compiled before records nothing
  seen = _record_routing(monkeypatch)
  full = np.asarray(model_lib.logits(random_model(CONFIG, 0), tokens))
  jax.effects_barrier()
  K = CONFIG.model.num_experts_per_tok
  full_routes = [layer.reshape(2, total, K) for layer in seen]
  assert len(full_routes) == 2
  seen.clear()

  kernels = config_lib.KernelsConfig(attention=implementation, decode_attention=implementation)
  model = dataclasses.replace(CONFIG.model, kernels=kernels)
  arch, weights = forward.prepare(model, *random_parts(CONFIG, 0)[1:])
  kept = cache.empty(model, 48)
  assert kept.layers[0].shape[2] == (128 if implementation == "mosaic_tpu" else 16 + 8)
  first, count = np.zeros(2, np.int32), np.zeros(2, np.int32)
  take_in = _forward(arch, expanded)
  compared = np.zeros((2, total), bool)

  def compare(logits, first, count):
    jax.effects_barrier()
    S = logits.shape[1]
    for row in range(2):
      mine = slice(first[row], first[row] + count[row])
      assert_close(logits[row, : count[row]], full[row, mine], "model_float32")
      for layer in range(2):
        routed = seen[layer].reshape(2, S, K)[row, : count[row]]
        np.testing.assert_array_equal(routed, full_routes[layer][row, mine])
      compared[row, mine] = True
    seen.clear()

  while (first < lengths).any():
    count = np.minimum(48, np.asarray(lengths) - first).clip(0).astype(np.int32)
    part = np.zeros((2, 48), np.int32)
    for row in range(2):
      part[row, : count[row]] = tokens[row, first[row] : first[row] + count[row]]
    with pltpu.force_tpu_interpret_mode():
      logits, kept = take_in(weights, kept, part, _place(first, count))
    compare(np.asarray(logits), first, count)
    first = first + count
  many = ((1, 4), (2, 6)) if implementation is None else ((2, 1),)
  for S, steps in many:
    step = _forward(arch, in_latent_space)
    for _ in range(steps):
      part = np.stack([tokens[row, first[row] : first[row] + S] for row in range(2)])
      count = np.full(2, S, np.int32)
      with pltpu.force_tpu_interpret_mode():
        logits, kept = step(weights, kept, part, _place(first, count))
      compare(np.asarray(logits), first, count)
      first = first + S
  decoded = sum(S * steps for S, steps in many)
  assert all(compared[row, : lengths[row] + decoded].all() for row in range(2))


@pytest.mark.parametrize(
  "fields, path",
  [
    ({}, "chosen"),
    ({"kernels": config_lib.KernelsConfig(grouped_matmul="reference")}, "local"),
    ({"matmul_precision": "fp8"}, "local"),
    ({"dispatch": "dense"}, "dense"),
  ],
  ids=str,
)
def test_decoding_takes_the_path_that_the_config_names(monkeypatch, fields, path):
  taken = []
  monkeypatch.setattr(dispatch.chosen, "chosen", lambda *args: taken.append("chosen"))
  for name in ("local", "dense"):
    back_end = lambda *args, name=name: taken.append(name)  # noqa: E731
    monkeypatch.setitem(dispatch.BACK_ENDS, name, back_end)
  config = dataclasses.replace(CONFIG.model, **fields)
  for tokens, inference in ((128, True), (129, True), (128, False)):
    dispatch.routed_experts(np.zeros((tokens, 3)), None, None, config, inference=inference)
  assert taken == [path, *["dense" if path == "dense" else "local"] * 2]


@pytest.mark.parametrize("attention", ["reference", "xla"])
def test_prefill_attends_as_the_config_says(monkeypatch, attention):
  seen = []
  fn = mla_api._WITH_NORMALISER[attention]
  record = lambda *args: (seen.append(attention), fn(*args))[1]  # noqa: E731
  monkeypatch.setitem(mla_api._WITH_NORMALISER, attention, record)
  kernels = config_lib.KernelsConfig(attention=attention)
  model = dataclasses.replace(CONFIG.model, kernels=kernels)
  arch, weights = forward.prepare(model, *random_parts(CONFIG, 0)[1:])
  count = np.full(2, 16, np.int32)
  args = (weights, cache.empty(model, 48), np.zeros((2, 16), np.int32), _place(count * 0, count))
  jax.eval_shape(_forward(arch, expanded), *args)
  assert seen == [attention] * model.num_hidden_layers


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_experts_are_not_copied_for_decoding(dtype):
  """They are nearly all of a model; in another dtype than training's masters they are cast."""
  model = dataclasses.replace(CONFIG.model, compute_dtype=dtype)
  _, params, bias = jax.tree.map(jnp.asarray, random_parts(CONFIG, 0))
  _, weights = forward.prepare(model, params, bias)
  stacks = params["moe_layers"]["mlp"]["experts"]
  for layer in weights.layers[CONFIG.model.first_k_dense_replace :]:
    for name, w in layer[0]["mlp"]["experts"].items():
      same = w.unsafe_buffer_pointer() == stacks[name].unsafe_buffer_pointer()
      assert same == (dtype == "float32")
      assert w is weights.layers[-1][0]["mlp"]["experts"][name]


@pytest.mark.parametrize("folder", cases.supported("decode."), ids=cases.label)
def test_published_greedy_decoding(folder):
  case = cases.load(folder)
  config = case.model.config
  prompt = np.asarray(case.io["decode.prompt_ids"], np.int32)
  output = np.asarray(case.io["decode.output_ids"], np.int32)
  logits_of = np.asarray(case.io["decode.step_logits"])
  prompt, output = np.atleast_2d(prompt), np.atleast_2d(output)
  B, n = prompt.shape
  new = output[:, n:] if output.shape[1] > logits_of.shape[-2] else output
  logits_of = logits_of.reshape(B, -1, config.vocab_size)
  _, params, bias = model_lib.split(case.model)
  arch, weights = forward.prepare(config, params, bias)
  width = -(-(n + 16) // 128) * 8
  kept = cache.empty(config, B * width)
  table = jnp.arange(B * width, dtype=jnp.int32).reshape(B, width)
  S = -(-n // cache.PAGE_TOKENS) * cache.PAGE_TOKENS
  part = np.zeros((B, S), np.int32)
  part[:, :n] = prompt
  place = Place(table, jnp.zeros(B, jnp.int32), jnp.full(B, n))
  logits, kept = _forward(arch, expanded)(weights, kept, part, place)
  logits = np.asarray(logits)[:, n - 1]
  step = _forward(arch, in_latent_space)
  for i in range(new.shape[1]):
    error = np.abs(logits - logits_of[:, i]).max()
    assert error <= TOLERANCE["model_float32"], f"step {i}: absolute error {error:.2e}"
    np.testing.assert_array_equal(logits.argmax(axis=-1), new[:, i])
    place = Place(table, jnp.full(B, n + i), jnp.ones(B, jnp.int32))
    logits, kept = step(weights, kept, new[:, i : i + 1], place)
    logits = np.asarray(logits)[:, 0]


def _chi_square(counts, probs):
  """The statistic over the outcomes expected at least 5 times, and its degrees of freedom."""
  n = counts.sum()
  often = n * probs >= 5
  expected = np.append(n * probs[often], n * probs[~often].sum())
  observed = np.append(counts[often], counts[~often].sum())
  return ((observed - expected) ** 2 / np.maximum(expected, 1e-9)).sum(), often.sum()


@pytest.mark.slow
@pytest.mark.parametrize("draft_rank", [0, 3])
def test_drafts_leave_the_distribution_as_it_is(draft_rank):
  """One step of thousands of equal rows that differ in their seeds."""
  n, settings = 4096, dict(temperature=0.8, top_k=12)
  arch, weights = _prepared(speculate=True)
  prompt = np.random.default_rng(5).integers(0, V, (1, 20)).astype(np.int32)
  model = random_model(CONFIG, 0)

  def distribution(tokens):
    logits = np.asarray(model_lib.logits(model, np.asarray([tokens], np.int32)))[0, -1]
    kept = np.argsort(-logits)[: settings["top_k"]]
    probs = np.zeros(V)
    probs[kept] = oracles.softmax(logits[kept] / settings["temperature"])
    return probs

  # The prompt but for its last token is in the cache; every row writes the same after it.
  one = Place(jnp.arange(8, dtype=jnp.int32)[None], jnp.zeros(1, jnp.int32), jnp.full(1, 19))
  padded = np.zeros((1, 32), np.int32)
  padded[0, :20] = prompt
  kept = cache.empty(CONFIG.model, 8, speculate=True)
  hidden, kept = forward.forward(arch, weights, kept, padded, one, expanded)
  _, kept = forward.draft(arch, weights, kept, hidden, np.roll(padded, -1, 1), one, expanded)
  first_probs = distribution(prompt[0])
  draft = int(np.argsort(-first_probs)[draft_rank])
  same = lambda value: jnp.full(n, value, jnp.int32)  # noqa: E731
  rows = decode.Rows(same(prompt[0, -1]), same(draft), same(19), same(5))
  table = jnp.broadcast_to(one.table_BP, (n, 8))
  stacked = sampling.stack([Sampling(seed=i, **settings) for i in range(n)])
  none = sampling.Adjustments(False, *jnp.zeros((3, n, V), jnp.int32))
  _, after, steps = decode.decode(
    arch, 1, weights, kept, rows, table, stacked, none._replace(bias_BV=jnp.zeros((n, V))), False
  )
  tokens = np.asarray(steps.token_BX[0])
  assert np.asarray(steps.drafted_B).all()
  accepted = tokens[:, 0] == draft
  np.testing.assert_array_equal(accepted, tokens[:, 1] >= 0)
  # Above the limit once in ten thousand times; 1.0 + 5 sqrt(2 / k) bounds it for few degrees.
  for counts, probs in (
    (np.bincount(tokens[:, 0], minlength=V), first_probs),
    (np.bincount(tokens[accepted, 1], minlength=V), distribution([*prompt[0], draft])),
  ):
    assert counts[probs == 0].sum() == 0
    statistic, freedom = _chi_square(counts, probs)
    assert freedom >= 4 and statistic < freedom + 5 * np.sqrt(2 * freedom)
  np.testing.assert_array_equal(after.length_B, 19 + 1 + accepted)
  np.testing.assert_array_equal(after.remaining_B, 5 - 1 - accepted)
  np.testing.assert_array_equal(after.token_B, np.where(accepted, tokens[:, 1], tokens[:, 0]))


def test_drafts_need_a_module():
  config = small_config(**{"model.num_nextn_predict_layers": 0}).model
  with pytest.raises(ValueError, match="num_nextn_predict_layers must be at least 1, got 0"):
    forward.architecture(config, True)
