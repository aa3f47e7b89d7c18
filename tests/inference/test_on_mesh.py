"""A batcher on a mesh gives the tokens of one on one device, and no device holds a whole weight."""

import functools
import math

import jax
import numpy as np
import pytest

from dsmoe import checkpoint
from dsmoe.config import CheckpointConfig, MeshConfig
from dsmoe.inference import batcher as batcher_lib
from dsmoe.inference import cache, decode, on_mesh
from dsmoe.inference.sampling import Sampling
from dsmoe.model import parameters
from dsmoe.parallel import mesh as mesh_lib
from dsmoe.training import train_step
from tests.helpers import assert_close, equations, random_parts, small_config

CONFIG = small_config(
  **{
    "model.num_hidden_layers": 2,
    "model.first_k_dense_replace": 1,
    "model.num_nextn_predict_layers": 1,
    "model.num_attention_heads": 6,
    "model.max_position_embeddings": 64,
  }
)
V = CONFIG.model.vocab_size
MESHES = (dict(expert=4), dict(data=2, model=2), dict(data=2, expert=2, model=2))
# What several requests ask for at once: the likeliest tokens, drawn ones, filters and penalties.
SETTINGS = (
  Sampling(max_tokens=12, temperature=0, logprobs=2, prompt_logprobs=True),
  Sampling(max_tokens=13, temperature=0.8, seed=3, logprobs=0),
  Sampling(max_tokens=11, temperature=1.1, top_p=0.9, top_k=30, seed=2**40 + 5, logprobs=0),
  Sampling(max_tokens=12, temperature=0, repetition_penalty=1.4, presence_penalty=0.3),
)
# So long that one program of each kind serves: two rows or more of a shard are taken in at once.
LENGTHS = (34, 5, 37, 16)


def _mesh(**sizes):
  sizes = dict(stage=1, data=1, expert=1, context=1, model=1) | sizes
  return mesh_lib.make_mesh(MeshConfig(**sizes), jax.devices()[: math.prod(sizes.values())])


@functools.cache
def _parts():
  _, params, bias = random_parts(CONFIG, 0)
  return params, bias


def _prompts():
  rng = np.random.default_rng(1)
  return [rng.integers(0, V, n).tolist() for n in LENGTHS]


def _batcher(mesh, speculate=False, params=None, **options):
  pages = 14 * cache.page_bytes(CONFIG.model, speculate)
  options = dict(max_rows=4, cache_bytes=pages, prompt_part_tokens=16) | options
  options = batcher_lib.BatcherOptions(speculate=speculate, **options)
  return batcher_lib.Batcher(CONFIG.model, params or _parts()[0], _parts()[1], options, mesh)


def _answers(batcher):
  """Returns the tokens of the requests, and all log-probabilities."""
  requests = [batcher.submit(*each) for each in zip(_prompts(), SETTINGS, strict=True)]
  tokens, logprobs = {request: [] for request in requests}, {request: [] for request in requests}
  unfinished = set(requests)
  for _ in range(40):
    for event in batcher.step():
      tokens[event.request] += event.tokens
      found = [*event.prompt_logprobs[1:], *event.logprobs]
      logprobs[event.request] += [x for p in found for x in (p.logprob, *(q for _, q in p.top))]
      unfinished -= {event.request} if event.finish else set()
    if not unfinished:
      break
  assert not unfinished and batcher.stats()["cache_pages_used"] == 0
  return list(tokens.values()), list(logprobs.values())


@functools.cache
def _one_device(speculate):
  """The answers of one device, the same for weights further off than sums in another order are."""
  tokens, logprobs = _answers(_batcher(None, speculate))
  rng = np.random.default_rng(2)
  near = jax.tree.map(
    lambda x: x * (1 + 1e-5 * rng.standard_normal(x.shape)).astype(np.float32), _parts()[0]
  )
  assert _answers(_batcher(None, speculate, near))[0] == tokens
  assert [len(new) for new in tokens] == [s.max_tokens for s in SETTINGS]
  return tokens, logprobs


@pytest.mark.slow
@pytest.mark.parametrize(
  "sizes, speculate",
  [(MESHES[-1], False)] + [(sizes, True) for sizes in MESHES],
  ids=str,
)
def test_every_mesh_gives_the_tokens_of_one_device(sizes, speculate):
  """And compiles one program of each kind: the cache stays where it is from round to round."""
  tokens, logprobs = _one_device(speculate)
  batcher = _batcher(_mesh(**sizes), speculate)
  programs = batcher.stats()["programs"]
  found, found_logprobs = _answers(batcher)
  assert found == tokens
  for actual, expected in zip(found_logprobs, logprobs, strict=True):
    assert_close(np.array(actual), np.array(expected), "model_float32")
  assert (batcher.stats()["drafts"] > 0) == speculate
  assert batcher.stats()["programs"] == programs + 2
  # A known beginning is taken up where its pages are, whichever part of the rows that is.
  for token in (7, 8):
    batcher.submit([*_prompts()[2][:33], token], SETTINGS[1])
  batcher._admit()
  assert [row.length for row in batcher._running] == [32, 32]
  assert len({row.shard for row in batcher._running}) == 1


def test_no_device_holds_more_than_its_part_of_the_moved_weights():
  """From how training stores them; the largest is one that is computed with whole, an MTP module's."""
  mesh = _mesh(**MESHES[-1])
  params = _parts()[0]
  stored = jax.device_put(params, mesh_lib.named(mesh, parameters.specs(params, mesh)))
  before = {id(x) for x in jax.live_arrays()}
  weights = _batcher(mesh, True, stored)._programs.weights
  mixture = weights.layers[1][0]["mlp"]
  D, E, F = 40, 12, 18
  part_of = {
    (96, D): weights.embed_VD,
    (D, 96): weights.head_DV,
    (1, E, D, F): mixture["experts"]["w_up"],
    (1, E, F, D): mixture["experts"]["w_down"],
    (D, 2 * F): mixture["shared"]["w_gate"],
    (24, 6, 20): weights.layers[0][0]["attention"]["q_b_proj"],
    (6, 12, 16): weights.layers[0][2].k_HNC,
    (D, 24): weights.mtp[0]["block"]["attention"]["q_a_proj"],
  }
  assert {shape: _shard(x) for shape, x in part_of.items()} == {
    (96, D): (48, D),
    (D, 96): (D, 48),
    (1, E, D, F): (1, 6, D, 9),
    (1, E, F, D): (1, 6, 9, D),
    (D, 2 * F): (D, F),
    (24, 6, 20): (24, 3, 20),
    (6, 12, 16): (3, 12, 16),
    (D, 24): (D, 24),
  }
  made = [x for x in jax.live_arrays() if id(x) not in before]
  assert len(made) > 40
  assert max(math.prod(_shard(x)) for x in made) == 2 * D * D < 96 * D
  for x, shape in zip(part_of.values(), part_of, strict=True):
    whole = np.zeros(shape)
    for shard in x.addressable_shards:
      whole[shard.index] = shard.data
    assert_close(whole, np.asarray(x))


def test_a_checkpoint_is_loaded_onto_a_mesh(tmp_path):
  """The weights lie where, and are bitwise what, parameters in memory become."""
  shapes, (params, bias) = train_step.state_shapes(CONFIG), _parts()
  zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
  checkpoint.record_config(tmp_path, CONFIG, 0)
  with checkpoint.Checkpointer(tmp_path, CheckpointConfig(1, 1, 0)) as checkpoints:
    checkpoints.save(zeros._replace(params=params, router_bias=bias), 0)
  options = batcher_lib.BatcherOptions(max_rows=4, speculate=True)
  axes = MeshConfig(stage=1, context=1, **MESHES[-1])
  run, batcher = batcher_lib.load(tmp_path, None, options, axes)
  assert dict(run.mesh.shape) == dict(stage=1, context=1, **MESHES[-1]) and run.params is None
  expected = jax.tree.leaves(_batcher(run.mesh, True)._programs.weights)
  found = jax.tree.leaves(batcher._programs.weights)
  assert [x.sharding for x in found] == [x.sharding for x in expected]
  for x, y in zip(found, expected, strict=True):
    np.testing.assert_array_equal(x, y)
  with pytest.raises(
    ValueError, match=r"multiply to the number of devices \(8\); the nearest mesh"
  ):
    batcher_lib.load(
      tmp_path, None, options, MeshConfig(stage=1, data=1, expert=3, context=1, model=1)
    )


def _shard(x):
  [shape] = {shard.data.shape for shard in x.addressable_shards}
  return shape


@pytest.mark.parametrize(
  "sizes, options, message",
  [
    (dict(model=4), {}, r"dimension heads \(6\) must be divisible by the mesh axis 'model' \(4\)"),
    (dict(expert=8), {}, r"experts/w_\w+: dimension experts \(12\) .* 'expert' \(8\)"),
    (dict(data=4), dict(max_rows=6), r"max_rows \(6\) must be .* mesh axis 'data' \(4\)"),
    (dict(context=2), {}, "mesh axis 'context' must be 1 where tokens are generated, got 2"),
  ],
)
def test_a_mesh_that_does_not_fit_is_refused(sizes, options, message):
  with pytest.raises(ValueError, match=message):
    _batcher(_mesh(**sizes), **options)
  axes = MeshConfig(**dict(stage=1, data=1, expert=1, context=1, model=1) | sizes)
  rows = options.get("max_rows", 4)
  devices = jax.devices()[: math.prod(sizes.values())]
  with pytest.raises(ValueError, match=message + ".*; the nearest mesh that fits is {'stage': 1"):
    on_mesh.make_mesh(axes, CONFIG.model, rows, devices)


def test_a_step_sums_rows_and_gathers_no_weight(monkeypatch):
  """Of two rows a shard, and a draft beside each newest token: at most logits cross at once."""
  batcher, largest = _batcher(_mesh(**MESHES[-1]), True), {}

  def traced(*args):
    for equation in equations(jax.make_jaxpr(run, static_argnums=(0, 1))(*args).jaxpr):
      axes = equation.params.get("axes", equation.params.get("axis_name", ()))
      name = equation.primitive.name.split("_")[0]
      if name not in ("pvary", "axis") and not all(isinstance(axis, int) for axis in axes):
        size = max(math.prod(v.aval.shape) for v in equation.outvars)
        largest[name] = max(size, largest.get(name, 0))
    raise StopIteration

  run = decode.decode
  monkeypatch.setattr(decode, "decode", traced)
  with pytest.raises(StopIteration):
    batcher._programs.decode([None] * 4)
  # Whether any row remains; sums over experts, heads and inner dimensions, and joined logits.
  assert largest == {"pmax": 1, "psum": 2 * 2 * V}
